# Heat-kernel attention beside gpt2: everything else as in compare_gpt2.py
#   python train.py config/compare_heat.py     options: --heat_t=adaptive (or a number), --heat_form=distance
# Validation loss: see the table in README.md.
from config.compare_gpt2 import *  # noqa: F403

out_dir = 'out-compare-heat'
model_type = 'heat'
