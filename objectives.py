"""
What each model type learns. An Objective is a set of pure functions: tokens in, (inputs, targets, weights) out, and the
loss of hidden states against them. The training loop and the evaluator reach every type through these and nothing else.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from configurator import one_of

IGNORE = -1  # a target with this id is left out of losses and metrics
LOGITS_PER_CHUNK = 2 ** 25  # how many logits the fused head holds at once: large enough for fast matrix products


@dataclass(frozen=True)
class Objective:
    """
    make_batch: (tokens (B, window) int64, rng torch.Generator) -> X, Y, W; W is None or the loss weight of each target.
    head_loss: (x (B, T, C), head weight (Vp, C), vocab_size, Y, W) -> the mean loss, logits never held all at once.
    loss: (logits (B, T, V), Y, W) -> the same mean loss from logits.
    metrics: (model, X, Y, W) -> {name: sum over positions, a float64 tensor of any shape}, which `add` adds up.
    summary: such sums -> {name: number}, what evaluation reports.
    window: block_size -> tokens that one example reads.
    val_metric: which number of the summary is val_loss and picks the best checkpoint; smaller is better.
    """
    make_batch: Callable
    head_loss: Callable
    loss: Callable
    metrics: Callable
    summary: Callable
    window: Callable
    val_metric: str


# ---------------------------------------------------------------------------------------------------------------------
# next-token prediction

def next_token_batch(tokens, rng):
    """tokens (B, T+1) -> X (B, T), Y (B, T): at every position the token that follows."""
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None


def cross_entropy(logits, targets, weights=None):
    """Mean over the counted positions of weight * cross entropy, in float32. logits (B, T, V), targets (B, T)."""
    logits, targets = logits.float().flatten(0, -2), targets.flatten()
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction='none')
    if weights is not None:
        losses = losses * weights.flatten()
    return losses.sum() / (targets != IGNORE).sum().clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    """
    Sum of weight * cross entropy of x @ W^T, chunk by chunk, gradients taken in the forward pass.

    The (N, V) logits are by far the largest tensor of a small language model; here a chunk of them lives in one buffer
    that is used three times (logits, exponentials, both gradients) and never leaves. With e = exp(logits - max) and
    s = sum e, the gradient (e/s - onehot) W is computed as (e W)/s - W[y], and its transpose likewise, so that no pass
    over the (N, V) chunk is spent on dividing or on the one-hot.
    """

    @staticmethod
    def forward(ctx, x, weight, vocab_size, targets, weights):
        """x (N, C) in the compute type, weight (Vp, C) float32, targets (N,), weights (N,) float32 or None."""
        N, Vp = len(x), len(weight)
        n = min(N, max(1, LOGITS_PER_CHUNK // Vp))
        W = weight.to(x.dtype)
        w = (targets != IGNORE).float()
        if weights is not None:
            w = w * weights
        y = targets.clamp(min=0)
        dx, dW = torch.empty_like(x), torch.zeros_like(weight)
        losses = torch.empty_like(w)
        product = x.new_empty(n, Vp)
        buffer = product if x.dtype == torch.float32 else product.float()
        for i in range(0, N, n):
            rows = slice(i, min(i + n, N))
            m = rows.stop - i
            logits = buffer[:m]
            torch.mm(x[rows], W.t(), out=product[:m])
            if product is not buffer:
                logits.copy_(product[:m])
            logits[:, vocab_size:] = -math.inf  # the padding has no text and no probability
            top, at_target = logits.amax(1, keepdim=True), logits.gather(1, y[rows, None])
            e = logits.sub_(top).exp_()
            s = e.sum(1, keepdim=True)
            losses[rows] = (top + s.log() - at_target).squeeze(1) * w[rows]
            if product is not buffer:
                e = product[:m].copy_(e)
            scale = w[rows, None] / s
            dx[rows] = (e @ W) * scale
            dW += e.t() @ (x[rows] * scale).to(x.dtype)
        dx -= W[y] * w[:, None].to(x.dtype)
        dW.index_add_(0, y, x.float() * w[:, None], alpha=-1)
        ctx.save_for_backward(dx, dW)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        dx, dW = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dW * grad, None, None, None


def linear_cross_entropy(x, weight, vocab_size, targets, weights=None):
    """`cross_entropy` of the logits x @ weight[:vocab_size]^T without ever holding them whole. x (B, T, C), targets (B, T).

    Follows autocast: the matrix products run in its type, softmax and sums in float32."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    targets = targets.flatten()
    weights = None if weights is None else weights.flatten()
    total = _LinearCrossEntropy.apply(x.flatten(0, -2), weight, vocab_size, targets, weights)
    return total / (targets != IGNORE).sum().clamp(min=1)


def prediction_sums(logits, targets):
    """Sums over positions of cross entropy and of correct top-1 predictions. logits (N, V), targets (N,)."""
    counted = targets != IGNORE
    losses = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction='none')
    correct = (logits.argmax(-1) == targets) & counted
    sums = {'loss': losses, 'accuracy': correct, 'count': counted}
    return {name: values.cpu().double().sum() for name, values in sums.items()}  # not every device has float64


def sum_in_chunks(model, x, targets, measure=prediction_sums):
    """The sums that `measure` finds in the logits of hidden states x (B, T, C), which are never held all at once."""
    rows = max(1, LOGITS_PER_CHUNK // model.config.vocab_size)
    chunks = zip(x.flatten(0, -2).split(rows), targets.flatten().split(rows))
    return add([measure(model.head(x), y) for x, y in chunks])


def add(parts):
    """One {name: sum} of several; what is called '..._min' or '..._max' is the least or the greatest of them."""
    together = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        extreme = {'min': min, 'max': max}.get(name.rpartition('_')[2])
        together[name] = extreme(values) if extreme else sum(values)
    return together


def next_token_metrics(model, X, Y, W=None):
    """X, Y (B, T)."""
    return sum_in_chunks(model, model.trunk(X), Y)


def means(sums):
    """Each sum divided by the count of its kind: 'fill_loss' by 'fill_count', 'loss' by 'count'."""
    kinds = [name.removesuffix('count') for name in sums if name.endswith('count')]
    found = {}
    for name in sums:
        kind = max((k for k in kinds if name.startswith(k)), key=len)
        if name != f'{kind}count':
            found[name] = float(sums[name]) / float(sums[f'{kind}count'])
    return found


NEXT_TOKEN = Objective(make_batch=next_token_batch, head_loss=linear_cross_entropy, loss=cross_entropy,
                       metrics=next_token_metrics, summary=means, window=lambda block_size: block_size + 1,
                       val_metric='loss')


# ---------------------------------------------------------------------------------------------------------------------
# duo: the next token, and the token that a mask stands for

def duo_batch(tokens, rng, fill_weight):
    """tokens (B, T+1) -> X (B, T); Y, W (B, 2T-1): the next token of all T, then of the T-1 masks the token they hide.

    The weights, 1 and fill_weight, are divided by their mean, so that the loss is a mean over both kinds."""
    X, following, _ = next_token_batch(tokens, rng)
    Y = torch.cat((following, X[:, :-1]), dim=1)
    W = torch.ones(Y.shape)
    W[:, X.size(1):] = fill_weight
    return X, Y, W / W.mean()


def duo_metrics(model, X, Y, W=None):
    """Next tokens and fill-ins apart, for only the first can be compared with other model types."""
    x, T = model.trunk(X, fill=True), X.size(1)
    fill = sum_in_chunks(model, x[:, T:], Y[:, T:])
    return sum_in_chunks(model, x[:, :T], Y[:, :T]) | {f'fill_{name}': total for name, total in fill.items()}


def next_token(config):
    return NEXT_TOKEN


def duo(config):
    """Without weight on the masks there is nothing to learn from them: then it is `gpt2`, to the bit."""
    if config.duo_fill_weight == 0:
        return NEXT_TOKEN
    return replace(NEXT_TOKEN, make_batch=partial(duo_batch, fill_weight=config.duo_fill_weight), metrics=duo_metrics)


OBJECTIVES = {'gpt2': next_token, 'dd': next_token, 'heat': next_token, 'rotating': next_token, 'parallel': next_token,
              'duo': duo}


def get_objective(config):
    """The objective of a GPTConfig."""
    return OBJECTIVES[one_of('model_type', config.model_type, OBJECTIVES)](config)
