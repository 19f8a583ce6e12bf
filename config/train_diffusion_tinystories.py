# Masked diffusion of stories on a laptop's CPU; on a GPU give it more: --max_iters, --n_layer, --n_embd, --block_size
#   python prepare.py tinystories --tokenizer=bpe:4096
#   python train.py config/train_diffusion_tinystories.py
# Neither its time nor its loss has been measured; the rate is not tuned.
out_dir = 'out-diffusion-tinystories'
dataset = 'tinystories_bpe4096'
model_type = 'diffusion'
n_layer = 4
n_head = 4
n_embd = 256
block_size = 64
batch_size = 32
max_iters = 2000
learning_rate = 2e-3
lr_schedule = 'linear'
warmup_iters = 100
beta2 = 0.99
ema = 0.99
eval_interval = 500
eval_iters = 20
log_interval = 100
compile = False  # would cost more time than it saves in a run this short
