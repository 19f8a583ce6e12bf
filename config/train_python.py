# The demo: the Python standard library's source on a CPU
#   make demo     or     python prepare.py python --tokenizer=bpe:1024
#                        python train.py config/train_python.py
# Machine A of LOG.md, 2 cores: 4 minutes; validation loss 3.364 over the whole split, that is 1.766 bits per byte, where
# xz -9 needs 2.042 for each file by itself and 1.660 for all together (commit 0fc2b65; LOG.md, 2026-11-26).
out_dir = 'out-python'
dataset = 'python_bpe1024'
n_layer = 2
n_head = 4
n_embd = 128
block_size = 64
bias = False
max_iters = 4000
learning_rate = 6e-3
lr_schedule = 'linear'
warmup_iters = 100
beta2 = 0.99
eval_interval = 2000
eval_iters = 20
log_interval = 100
compile = False  # would cost more time than it saves in a run this short
