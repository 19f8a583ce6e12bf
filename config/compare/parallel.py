# Blocks in pairs beside gpt2: everything else as in compare_gpt2.py
#   python train.py config/compare_parallel.py     options: --parallel_merge=add or concat
# Validation loss: see the table in README.md.
from config.compare_gpt2 import *  # noqa: F403

out_dir = 'out-compare-parallel'
model_type = 'parallel'
