# GPT-2 Medium on WikiText-103 with heat-kernel attention, t = 0.28 * sqrt(4 / 24): what differs from the baseline
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_medium/heat.py
# Not run here. Published validation loss: nothing at this size
# (Curry, zenodo 18004600).
from config.gpt2_medium.gpt2 import *  # noqa: F403

out_dir = 'out-wikitext103-gpt2-medium-heat'
model_type = 'heat'
