# Drift-diffusion attention compared with gpt2; everything else is as in config/compare/gpt2.py
#   python train.py config/compare/dd.py
#   options: --apply_drift=False, --apply_diffusion=False, --baseline_each_head=False, --published=True
# Validation loss: see the table in docs/types.md.
from config.compare.gpt2 import *  # noqa: F403

out_dir = 'out-compare-dd'
model_type = 'dd'
