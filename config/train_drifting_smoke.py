# Drifting, twenty steps: does everything run?
#   make demo                                                       trains the encoder, out-demo
#   python train.py config/train_drifting_smoke.py
# A val_loss (divergence of 2-grams) near 1 is expected: nothing is learned in so short a time.
out_dir = 'out-drifting-smoke'
dataset = 'python_bpe1024'
model_type = 'drifting'
encoder = 'out-demo'
n_layer = 2
n_head = 4
n_embd = 128
block_size = 32
batch_size = 16
max_iters = 20
learning_rate = 1e-3
weight_decay = 0.05
warmup_iters = 5
ema = 0.9
eval_interval = 10
eval_iters = 2
compile = False  # would cost more time than it saves in a run this short
