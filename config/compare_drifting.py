# One-step generation beside gpt2, in the features of a gpt2 model of another seed: everything else as in compare_gpt2.py
#   python train.py config/compare_gpt2.py --seed=2 --out_dir=out-encoder
#   python train.py config/compare_drifting.py --encoder=out-encoder
# Its val_loss, a divergence of 2-grams, has not been measured yet.
from config.compare_gpt2 import *  # noqa: F403

out_dir = 'out-compare-drifting'
model_type = 'drifting'
encoder = 'out-encoder'
learning_rate = 1e-3
weight_decay = 0.05
ema = 0.99
eval_iters = 20
