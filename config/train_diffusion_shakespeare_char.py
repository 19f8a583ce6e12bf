# Masked diffusion of Shakespeare's characters on a laptop's CPU
#   python prepare.py shakespeare --tokenizer=char
#   python train.py config/train_diffusion_shakespeare_char.py
# Measured on machine A of LOG.md, one seed each: validation loss (the bound) 2.29 nats, with --diffusion_objective=nelbo
# 2.19 in 18.5 minutes of one core. The rate is not tuned.
out_dir = 'out-diffusion-shakespeare-char'
dataset = 'shakespeare_char'
model_type = 'diffusion'
n_layer = 4
n_head = 4
n_embd = 256
block_size = 128
batch_size = 32
data_order = 'random'
max_iters = 600
learning_rate = 2e-3
lr_schedule = 'linear'
warmup_iters = 100
beta2 = 0.99
eval_iters = 20
log_interval = 100
compile = False  # would cost more time than it saves in a run this short
