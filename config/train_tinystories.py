# GPT-2's shape in small on TinyStories: a CPU's afternoon, or minutes on a GPU
#   python prepare.py tinystories
#   python train.py config/train_tinystories.py
# Measured on machine A of LOG.md: 552 tokens/s, 7.4 s per iteration, 1.6 times as fast as nanoGPT beside it. The loss at the
# end is not measured yet.
out_dir = 'out-tinystories'
dataset = 'tinystories'
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
bias = False
batch_size = 16
max_iters = 300
learning_rate = 1e-3
warmup_iters = 30
beta2 = 0.99
eval_interval = 150
eval_iters = 10
