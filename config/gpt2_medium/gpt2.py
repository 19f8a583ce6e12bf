# GPT-2 Medium on WikiText-103: the baseline of the published drift-diffusion experiments
#   python prepare.py wikitext-103
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_medium/gpt2.py
# Not run here. Published, read off the plots of BluebrainAI, "Parallel Transformer Models" (2025): validation perplexity
# 23.6 to 24.0 (a loss of 3.16 to 3.18). Their `batch_size: 40000` is the chunk of the tokenising map; 64 is the batch.
out_dir = 'out-wikitext103-gpt2-medium'
dataset = 'wikitext-103'
n_layer = 24
n_head = 16
n_embd = 1024
dropout = 0.1
batch_size = 8
gradient_accumulation_steps = 8
num_epochs = 5
learning_rate = 1e-4
lr_schedule = 'linear'
warmup_ratio = 0.1
weight_decay = 0.01
beta2 = 0.999
# no gradient_checkpointing: counted as by bench.py --part=plan, with dropout, there are 6 GB of state, and 11 to 14 GB that
# a step of the types of this folder keeps; a card has 80 GB, and one of 24 GB may need it
dtype = 'bfloat16'
eval_interval = 1000
eval_iters = 0
