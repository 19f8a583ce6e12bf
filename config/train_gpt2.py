# GPT-2 (124M) on OpenWebText, nanoGPT's recipe: about 0.5M tokens per iteration
#   python prepare.py --input=PATH/TO/openwebtext --name=openwebtext      (.parquet or .jsonl files, one document a row)
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
# Not run here. Published for this recipe: validation loss 2.85 after 600,000 iterations, about 4 days on 8 A100 40GB
# (nanoGPT's README, commit 3adf61e). What is not named below, such as batch_size 12, is the default.
out_dir = 'out-gpt2'
dataset = 'openwebtext'
gradient_accumulation_steps = 5 * 8
data_order = 'random'
bias = False
max_iters = 600_000
min_lr = 6e-5
warmup_iters = 2000
eval_interval = 1000
eval_iters = 200
