# The next token and fill-in together beside gpt2: everything else as in compare_gpt2.py
#   python train.py config/compare_duo.py     options: --duo_fill_weight=..., --published=True
# Validation loss: see the table in README.md.
from config.compare_gpt2 import *  # noqa: F403

out_dir = 'out-compare-duo'
model_type = 'duo'
