# GPT-2 Medium on WikiText-103 with drift alone: what differs from the baseline
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_medium/drift.py
# Not run here. Published validation loss: perplexity 25.5 against a baseline of 23.6
# (BluebrainAI, Parallel Transformer Models, 2025, read off its plots).
from config.gpt2_medium.gpt2 import *  # noqa: F403

out_dir = 'out-wikitext103-gpt2-medium-drift'
model_type = 'dd'
apply_diffusion = False
published = True
