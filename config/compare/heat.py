# Heat-kernel attention compared with gpt2; everything else is as in config/compare/gpt2.py
#   python train.py config/compare/heat.py     options: --heat_t=adaptive (or a number), --heat_form=distance
# Validation loss: see the table in docs/types.md.
from config.compare.gpt2 import *  # noqa: F403

out_dir = 'out-compare-heat'
model_type = 'heat'
