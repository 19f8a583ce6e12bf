# A rotary embedding of its own for every head compared with gpt2; everything else is as in config/compare/gpt2.py
#   python train.py config/compare/rotating.py     options: --rotating_head=gp, --use_norm=True
# Validation loss: see the table in docs/types.md.
from config.compare.gpt2 import *  # noqa: F403

out_dir = 'out-compare-rotating'
model_type = 'rotating'
