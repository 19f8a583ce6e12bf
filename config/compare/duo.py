# The next token and fill-in together compared with gpt2; everything else is as in config/compare/gpt2.py
#   python train.py config/compare/duo.py     options: --duo_fill_weight=..., --published=True
# Validation loss: see the table in docs/types.md.
from config.compare.gpt2 import *  # noqa: F403

out_dir = 'out-compare-duo'
model_type = 'duo'
