# One-step generation of the Python standard library's source on a CPU, in the features of the demo's gpt2 model
#   make demo MODEL=drifting     or     python prepare.py python --tokenizer=bpe:1024
#                                       python train.py config/train_python.py --out_dir=out-demo
#                                       python train.py config/train_drifting_python.py
# val_loss (divergence of 2-grams from real text) 0.703, where other real text has 0.218: 2.5 minutes on 2 cores with
# bfloat16, one seed, 4 min 11 s with the encoder, measured with the former demo.py; the rate is not tuned
out_dir = 'out-drifting'
dataset = 'python_bpe1024'
model_type = 'drifting'
encoder = 'out-demo'
drift_features = 'tokens'
drift_temperatures = '0.1,0.3'
drift_floor = 0.0
drift_output = 'soft'
drift_look = 10.0
drift_positives = 128
n_layer = 4
n_head = 4
n_embd = 128
block_size = 32
batch_size = 128
max_iters = 250
learning_rate = 4e-3
weight_decay = 0.05
warmup_iters = 25
drift_prefix = 8
ema = 0.99
eval_interval = 125
eval_iters = 16
log_interval = 25
compile = False  # would cost more time than it saves in a run this short
