# The demo of block diffusion: the Python standard library's source on a CPU
#   make demo MODEL=diffusion     or     python prepare.py python --tokenizer=bpe:1024
#                                        python train.py config/train_diffusion_python.py
# Neither its time nor its loss has been measured; the rate is not tuned. 750 iterations take as long as 1,500 with one
# canvas would; on stories blocks of 4 have the lower loss even so (docs/masked_diffusion.md).
out_dir = 'out-diffusion'
dataset = 'python_bpe1024'
model_type = 'diffusion'
diffusion_objective = 'nelbo'
diffusion_block = 4
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 32
max_iters = 750
learning_rate = 3e-3
lr_schedule = 'linear'
warmup_iters = 75
beta2 = 0.99
ema = 0.99
eval_interval = 375
eval_iters = 20
log_interval = 50
compile = False  # would cost more time than it saves in a run this short
