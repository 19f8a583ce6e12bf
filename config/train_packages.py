# The model in models/gpt2-python: the source of four Python packages (config/packages.txt), one pass and a sixth
#   python prepare.py --packages=config/packages.txt --name=packages --tokenizer=bpe:4096
#   python train.py config/train_packages.py
#   python export.py --out_dir=out-packages --to=models/gpt2-python --dtype=float16
# One core of machine A of LOG.md: 44 minutes, some nine of them stalled; validation loss 3.016 over the whole
# split, 1.323 bits per byte (seed 1, commit d23ef86). The rate was not tuned.
out_dir = 'out-packages'
dataset = 'packages_bpe4096'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 16
max_iters = 9766  # 10M tokens
learning_rate = 2e-3
lr_schedule = 'linear'
warmup_iters = 200
beta2 = 0.99
eval_interval = 1200
eval_iters = 20
seed = 1
