# Drifting, 131M parameters, on TinyStories, with GPT-2 for the features: the published hyperparameters. How many positives
# its queue adds is not published, and that gradients are clipped at 2 is from the authors' code for images
#   python prepare.py tinystories
#   python train.py config/train_drifting_tinystories.py
# Not run here. No validation loss, and for text from noise no result at all, is published.
out_dir = 'out-drifting-tinystories'
dataset = 'tinystories'
model_type = 'drifting'
encoder = 'hf:gpt2'
block_size = 256
batch_size = 64
max_iters = 200_000
learning_rate = 1e-4
weight_decay = 0.05
warmup_iters = 5000
min_lr = 1e-6
grad_clip = 2.0
ema = 0.999
drift_positives = 64
eval_interval = 1000
