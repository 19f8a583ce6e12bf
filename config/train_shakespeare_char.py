# Characters of Shakespeare on a laptop's CPU
#   python prepare.py shakespeare --tokenizer=char
#   python train.py config/train_shakespeare_char.py
# Measured on machine A of LOG.md, 2 cores: 5,000 iterations in 134 s, validation loss 1.691 over the whole split; 6,800 in
# 184 s, 1.662. nanoGPT's recipe for a CPU took 148 s in turns with it and reached 1.898. Rate, depth and batch were chosen
# on the last tenth of the training text.
out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
n_layer = 2
n_head = 4
n_embd = 128
block_size = 64
bias = False
batch_size = 8
data_order = 'random'
max_iters = 6800
learning_rate = 8e-3
lr_schedule = 'linear'
warmup_iters = 100
beta2 = 0.99
eval_interval = 2000
log_interval = 500
compile = False  # would cost more time than it saves in a run this short
