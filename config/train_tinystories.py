# Stories on a laptop's CPU, in minutes; on a GPU give it more: --max_iters, --n_layer, --n_embd, --block_size
#   python prepare.py tinystories
#   python train.py config/train_tinystories.py
# Measured on machine A of LOG.md, on an excerpt of 2,961 stories (seed 1337, commit c1d07bf): 150 iterations, about 1,000
# tokens/s, under 9 minutes with 3 evaluations, the last of them slowed by other work; validation loss 4.827, 1.714 bits per
# byte. The rate was not tuned.
out_dir = 'out-tinystories'
dataset = 'tinystories'
n_layer = 4
n_head = 4
n_embd = 256
block_size = 128
bias = False
batch_size = 16
max_iters = 150
learning_rate = 2e-3
warmup_iters = 15
beta2 = 0.99
eval_interval = 75
eval_iters = 20
compile = False  # would cost more time than it saves in a run this short
