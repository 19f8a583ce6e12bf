# GPT-2 Medium on WikiText-103 with next-token and fill-in prediction: what differs from the baseline
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_medium/duo.py
# Not run here. Published validation loss: perplexity 13.5 against 67.8, which the leak in the published form may explain,
# or that the library shifts its labels once more (LOG.md), which is not rebuilt here
# (BluebrainAI, Parallel Transformer Models, 2025, read off its plots).
from config.gpt2_medium.gpt2 import *  # noqa: F403

out_dir = 'out-wikitext103-gpt2-medium-duo'
model_type = 'duo'
block_size = 512
published = True
