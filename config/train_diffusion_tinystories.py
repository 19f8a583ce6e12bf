# Masked diffusion of stories on a laptop's CPU; on a GPU give it more: --max_iters, --n_layer, --n_embd, --block_size
#   python prepare.py tinystories --tokenizer=bpe:4096
#   python train.py config/train_diffusion_tinystories.py
# Measured on machine A of LOG.md, on an excerpt of 2,961 stories (seeds 1 to 3, commit ee42008): about 10 minutes on one of
# two cores; validation loss over the whole split, an upper bound, 4.116 (standard deviation 0.003), with
# --diffusion_objective=nelbo 3.971 (0.000). gpt2 with the same settings: 2.993. The rate is not tuned.
out_dir = 'out-diffusion-tinystories'
dataset = 'tinystories_bpe4096'
model_type = 'diffusion'
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
