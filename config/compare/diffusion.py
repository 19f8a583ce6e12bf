# Masked diffusion compared with gpt2; everything else is as in config/compare/gpt2.py
#   python train.py config/compare/diffusion.py     options: --diffusion_objective=nelbo
# Validation loss, an upper bound: 4.963 ± 0.067 (seeds 1 to 3; docs/types.md).
from config.compare.gpt2 import *  # noqa: F403

out_dir = 'out-compare-diffusion'
model_type = 'diffusion'
