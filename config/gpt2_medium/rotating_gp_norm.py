# GPT-2 Medium on WikiText-103 with fixed rotation rates, normalised: what differs from the baseline
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_medium/rotating_gp_norm.py
# As described; the published code of it does not run (LOG.md). The norm divides a head's own scale out again, so that
# all heads rotate at nearly the same rates.
# Not run here. Published validation loss: no figure could be read off the plots
# (BluebrainAI, Parallel Transformer Models, 2025, read off its plots).
from config.gpt2_medium.gpt2 import *  # noqa: F403

out_dir = 'out-wikitext103-gpt2-medium-rotating-gp-norm'
model_type = 'rotating'
rotating_head = 'gp'
use_norm = True
