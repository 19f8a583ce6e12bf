# GPT-2 Medium on WikiText-103 with drift and diffusion: what differs from the baseline
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_medium/drift_diffusion.py
# Not run here. Published validation loss: perplexity 29.0 against a baseline of 23.6,
# perhaps with ten times the noise of here (LOG.md)
# (BluebrainAI, Parallel Transformer Models, 2025, read off its plots).
from config.gpt2_medium.gpt2 import *  # noqa: F403

out_dir = 'out-wikitext103-gpt2-medium-drift-diffusion'
model_type = 'dd'
published = True
