# Masked diffusion compared with gpt2; everything else is as in config/compare/gpt2.py
#   python train.py config/compare/diffusion.py     options: --diffusion_objective=nelbo
# Validation loss, an upper bound: not measured yet.
from config.compare.gpt2 import *  # noqa: F403

out_dir = 'out-compare-diffusion'
model_type = 'diffusion'
