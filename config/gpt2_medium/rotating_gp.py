# GPT-2 Medium on WikiText-103 with fixed rotation rates: what differs from the baseline
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_medium/rotating_gp.py
# Not run here. Published validation loss: perplexity 24.5 against a baseline of 23.7;
# its code may have trained learned rates (LOG.md)
# (BluebrainAI, Parallel Transformer Models, 2025, read off its plots).
from config.gpt2_medium.gpt2 import *  # noqa: F403

out_dir = 'out-wikitext103-gpt2-medium-rotating-gp'
model_type = 'rotating'
rotating_head = 'gp'
