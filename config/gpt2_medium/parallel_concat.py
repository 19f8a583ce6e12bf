# GPT-2 Medium on WikiText-103 with paired blocks, merged by one projection: what differs from the baseline
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_medium/parallel_concat.py
# Not run here. Published validation loss: perplexity 25.7 against a baseline of 24.0
# (BluebrainAI, Parallel Transformer Models, 2025, read off its plots).
from config.gpt2_medium.gpt2 import *  # noqa: F403

out_dir = 'out-wikitext103-gpt2-medium-parallel-concat'
model_type = 'parallel'
parallel_merge = 'concat'
