# Eight ways of modelling text compared with each other on a CPU, this one the baseline: the Python standard library's
# source, half an epoch, so that noise cannot win as a regulariser
#   python prepare.py python --tokenizer=bpe:1024
#   python train.py config/compare/gpt2.py
# Validation loss: see the table in docs/types.md. For gpt2 half and twice the rate are worse (LOG.md).
out_dir = 'out-compare-gpt2'
dataset = 'python_bpe1024'
n_layer = 4
n_head = 4
n_embd = 64
block_size = 128
batch_size = 16
max_iters = 1000  # 2.05M tokens
learning_rate = 4e-3
warmup_iters = 50
lr_schedule = 'linear'
beta2 = 0.99
eval_interval = 500
eval_iters = 80  # half of the validation split
log_interval = 100
compile = False  # would cost more time than it saves in a run this short
dtype = 'float32'  # at this size bfloat16 is slower, also where the processor has it
