# A rotary embedding of its own for every head beside gpt2: everything else as in compare_gpt2.py
#   python train.py config/compare_rotating.py     options: --rotating_head=gp, --use_norm=True
# Validation loss: see the table in README.md.
from config.compare_gpt2 import *  # noqa: F403

out_dir = 'out-compare-rotating'
model_type = 'rotating'
