# GPT-2's weights, its attention opened up, taught to fill in and to flag: stories, one GPU
#   python prepare.py tinystories
#   python train.py config/finetune_diffusion_from_gpt2.py
# Not run here; no validation loss is published for it. --init_from=hf:FOLDER takes weights from a disk.
out_dir = 'out-diffusion-from-gpt2'
dataset = 'tinystories'
init_from = 'hf:gpt2'
model_type = 'diffusion'
positions = 'learned'  # those that the weights know
block_size = 256
batch_size = 32
max_iters = 20_000
learning_rate = 1e-4
warmup_iters = 500
ema = 0.999
