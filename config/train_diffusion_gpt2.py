# Masked diffusion of the size of GPT-2 (124M) on OpenWebText, 0.5M tokens per iteration; optimizer and average as MDLM's
#   python prepare.py --input=PATH/TO/openwebtext --name=openwebtext      (.parquet or .jsonl files, one document a row)
#   torchrun --standalone --nproc_per_node=8 train.py config/train_diffusion_gpt2.py
# Not run here. Published for MDLM of this size after 1M steps: perplexity at most 23.2 (arXiv 2406.07524), that is a
# validation loss of at most 3.14 with GPT-2's tokenizer; its objective is --diffusion_objective=nelbo.
out_dir = 'out-diffusion-gpt2'
dataset = 'openwebtext'
model_type = 'diffusion'
gradient_accumulation_steps = 8
batch_size = 64
data_order = 'random'
max_iters = 1_000_000
learning_rate = 3e-4
lr_schedule = 'constant'
warmup_iters = 2500
weight_decay = 0.0
beta2 = 0.999
ema = 0.9999
eval_interval = 1000
eval_iters = 200
