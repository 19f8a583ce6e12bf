# Drift-diffusion attention beside gpt2: everything else as in compare_gpt2.py
#   python train.py config/compare_dd.py
#   options: --apply_drift=False, --apply_diffusion=False, --baseline_each_head=False, --published=True
# Validation loss: see the table in README.md.
from config.compare_gpt2 import *  # noqa: F403

out_dir = 'out-compare-dd'
model_type = 'dd'
