# Block diffusion of stories on a laptop's CPU: blocks of four tokens from left to right, text of any length
#   python prepare.py tinystories --tokenizer=bpe:4096
#   python train.py config/train_blocks_tinystories.py
#   python generate_diffusion.py --out_dir=out-blocks-tinystories --start="Once upon a time" --max_new_tokens=200
# Measured on an excerpt of 2,961 stories (one seed, commit 18087cf, LOG.md "What came of blocks"): validation loss over the
# whole split, an upper bound, 3.597; one block of 64 4.001; gpt2 with the same settings 2.993. The rate is not tuned.
out_dir = 'out-blocks-tinystories'
dataset = 'tinystories_bpe4096'
model_type = 'diffusion'
diffusion_objective = 'nelbo'
diffusion_block = 4
n_layer = 4
n_head = 4
n_embd = 256
block_size = 64
batch_size = 16
max_iters = 1200
learning_rate = 2e-3
lr_schedule = 'linear'
warmup_iters = 100
beta2 = 0.99
eval_interval = 300
eval_iters = 20
log_interval = 100
compile = False  # would cost more time than it saves in a run this short
