# Masked diffusion beside gpt2: everything else as in compare_gpt2.py
#   python train.py config/compare_diffusion.py     options: --diffusion_objective=nelbo
# Validation loss, an upper bound: not measured yet.
from config.compare_gpt2 import *  # noqa: F403

out_dir = 'out-compare-diffusion'
model_type = 'diffusion'
