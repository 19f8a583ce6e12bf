# Blocks in pairs compared with gpt2; everything else is as in config/compare/gpt2.py
#   python train.py config/compare/parallel.py     options: --parallel_merge=add or concat
# Validation loss: see the table in docs/types.md.
from config.compare.gpt2 import *  # noqa: F403

out_dir = 'out-compare-parallel'
model_type = 'parallel'
