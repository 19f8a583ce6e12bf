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

import drifting
from configurator import one_of
from data import derive_seed
from machine import autocast

IGNORE = -1  # a target with this id is left out of losses and metrics
LOGITS_PER_CHUNK = 2 ** 25  # how many logits the fused head holds at once: large enough for fast matrix products


@dataclass(frozen=True)
class Objective:
    """
    make_batch: (tokens (B, window) int64, rng torch.Generator, part) -> X, Y, W; W is None or the loss weight of each
        target; part = (i, n) says that this is micro-batch i of the n of an iteration, over all ranks.
    head_loss: (x (B, T, C), head weight (Vp, C), n_logits, Y, W) -> the mean loss, logits never held all at once.
    loss: (logits (B, T, V), Y, W) -> the same mean loss from logits.
    metrics: (model, X, Y, W) -> {name: sum over positions, a float64 tensor of any shape}, which `add` adds up.
    summary: such sums -> {name: number}, what evaluation reports.
    window: block_size -> tokens that one example reads.
    val_metric: which number of the summary is val_loss and picks the best checkpoint; smaller is better.
    eval_batch: make_batch of evaluation, where it differs.
    numbers: (range of example numbers, first of the iteration, rng) -> those that make_batch sees, where it differs.
    couple: (model, micro-batches of this rank, ranks, rng) -> the same, once each has seen the others of the iteration.
    """
    make_batch: Callable
    head_loss: Callable
    loss: Callable
    metrics: Callable
    summary: Callable
    window: Callable
    val_metric: str
    eval_batch: Callable | None = None
    numbers: Callable | None = None
    couple: Callable | None = None


# ---------------------------------------------------------------------------------------------------------------------
# next-token prediction

def next_token_batch(tokens, rng, part=(0, 1)):
    """tokens (B, T+1) -> X (B, T), Y (B, T): at every position the token that follows."""
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None


def parts_of(tokens, ids):
    """Which of tokens (B, T) are part of this sequence of ids, also where the window cuts it, -> bool (B, T)."""
    n, (B, T) = len(ids), tokens.shape
    edge = torch.full((B, n - 1), IGNORE, device=tokens.device)
    wide, ids = torch.cat((edge, tokens, edge), dim=1), torch.tensor(ids, device=tokens.device)
    windows = wide.unfold(1, n, 1)  # (B, T+n-1, n)
    inside = windows != IGNORE
    found = ((windows == ids) | ~inside).all(-1) & (inside.sum(-1) > min(1, n - 1))  # one token alone tells nothing
    hits = torch.zeros(wide.shape, dtype=torch.bool, device=tokens.device)
    for i in range(n):
        hits[:, i:i + found.size(1)] |= found
    return hits[:, n - 1:n - 1 + T]


def ignoring(make_batch, ids):
    """`make_batch`, whose targets (B, T) are the last T tokens, without those that are part of this sequence of ids."""
    def batch(tokens, rng, part=(0, 1)):
        X, Y, W = make_batch(tokens, rng, part)
        return X, Y.masked_fill(parts_of(tokens, ids)[:, -Y.size(1):], IGNORE), W
    return batch


def cross_entropy(logits, targets, weights=None, flag=None):
    """Mean over the counted positions of weight * cross entropy, in float32. logits (B, T, V), targets (B, T).

    With `flag`, an id, only the weights of positions whose likeliest id it is count; elsewhere the weight is 1."""
    logits, targets = logits.float().flatten(0, -2), targets.flatten()
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction='none')
    if weights is not None:
        weights = weights.flatten()
        losses = losses * (weights if flag is None else torch.where(logits.argmax(-1) == flag, weights, 1.0))
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
    def forward(ctx, x, weight, vocab_size, targets, weights, flag):
        """x (N, C) in the compute type, weight (Vp, C) float32, targets (N,), weights (N,) float32 or None; for flag see
        `cross_entropy`."""
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
            if flag is not None:
                w[rows] = torch.where(logits.argmax(1) == flag, w[rows], (targets[rows] != IGNORE).float())
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
        return dx * grad.to(dx.dtype), dW * grad, None, None, None, None


def linear_cross_entropy(x, weight, vocab_size, targets, weights=None, flag=None):
    """`cross_entropy` of the logits x @ weight[:vocab_size]^T without ever holding them whole. x (B, T, C), targets (B, T).

    Follows autocast: the matrix products run in its type, softmax and sums in float32."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    targets = targets.flatten()
    weights = None if weights is None else weights.flatten()
    total = _LinearCrossEntropy.apply(x.flatten(0, -2), weight, vocab_size, targets, weights, flag)
    return total / (targets != IGNORE).sum().clamp(min=1)


def prediction_sums(logits, targets):
    """Sums over positions of cross entropy and of correct top-1 predictions. logits (N, V), targets (N,)."""
    counted = targets != IGNORE
    losses = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction='none')
    correct = (logits.argmax(-1) == targets) & counted
    sums = {'loss': losses, 'accuracy': correct, 'count': counted}
    return {name: values.cpu().double().sum() for name, values in sums.items()}  # not every device has float64


def sum_in_chunks(model, x, targets, measure=prediction_sums):
    """The sums that `measure` finds in the logits of hidden states x (..., C), which are never held all at once."""
    rows = max(1, LOGITS_PER_CHUNK // model.config.vocab_size)
    chunks = zip(x.flatten(0, -2).split(rows), targets.flatten().split(rows))
    return add([measure(model.head(x), y) for x, y in chunks])


def add(parts):
    """One {name: sum} of several; what is called '..._min' or '..._max' is the least or the greatest of them, '..._all' is
    laid one behind the other."""
    together = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        together[name] = {'min': min, 'max': max, 'all': torch.cat}.get(name.rpartition('_')[2], sum)(values)
    return together


@torch.no_grad()
def over_windows(windows, offsets, batch_size, make_batch, metrics, ranks, dtype, seeds=(), counted=0):
    """{name: sum} of `metrics(X, Y, W)` over the windows at these offsets.

    Batches are dealt to the ranks and summed in one order, so that any number of ranks gives the same number; no random
    state moves. With `counted` only so many predictions at the end of a window count, but all of the first."""
    batches = [offsets[i:i + batch_size] for i in range(0, len(offsets), batch_size)]
    sums = {}  # {number of the batch: {name: sum}}
    for i in range(ranks.rank, len(batches), ranks.world_size):
        rng = torch.Generator().manual_seed(derive_seed(4, i, *seeds))
        X, Y, W = make_batch(windows.read(batches[i]), rng)
        if counted:
            Y[torch.tensor(batches[i] > 0), :-counted] = IGNORE
        batch = [t if t is None else t.to(ranks.device) for t in (X, Y, W)]
        with autocast(ranks.device, dtype):
            sums[i] = {name: total.cpu() for name, total in metrics(*batch).items()}
    everyones = {i: found for rank in ranks.gather(sums) for i, found in rank.items()}
    return add([everyones[i] for i in sorted(everyones)])


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
            count = float(sums[f'{kind}count'])
            found[name] = float(sums[name]) / count if count else math.nan
    return found


NEXT_TOKEN = Objective(make_batch=next_token_batch, head_loss=linear_cross_entropy, loss=cross_entropy,
                       metrics=next_token_metrics, summary=means, window=lambda block_size: block_size + 1,
                       val_metric='loss')


# ---------------------------------------------------------------------------------------------------------------------
# duo: the next token, and the token that a mask stands for

def duo_batch(tokens, rng, part=(0, 1), *, fill_weight):
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


# ---------------------------------------------------------------------------------------------------------------------
# masked diffusion. mask is the id of [MASK]: as many as there are ids with text

LEVELS = (20, 40, 60, 80, 100)  # per cent of a sequence that is corrupted, at most
LEAST_TIME = 1e-3
MOST_CORRUPTED = 0.99


def ranks(shape, rng):
    """A random permutation of the positions of each row, (B, T)."""
    return torch.rand(shape, generator=rng).argsort(1).argsort(1)


def weights_of_flags(X, Y, mask, penalty_keep_mask, penalty_mask_correct):
    """The weight (B, T) of the loss where the answer is [MASK]: for a masked token, for a right one; 1 for a wrong one."""
    W = torch.ones(X.shape, device=X.device)
    W[X == mask] = penalty_keep_mask
    W[(X == Y) & (X != mask)] = penalty_mask_correct
    return W


def repair_batch(tokens, rng, part=(0, 1), *, mask, penalty_keep_mask, penalty_mask_correct):
    """tokens (B, T) -> X, Y, W (B, T). Of each sequence a random share is masked, to be filled in; a random share of the
    others is replaced by any other token, to be answered with [MASK]; the rest is to be kept."""
    T = tokens.size(1)
    u = torch.rand(2, len(tokens), 1, generator=rng)
    rate_mask = MOST_CORRUPTED * u[0]
    rate_random = (MOST_CORRUPTED - rate_mask) * u[1]
    n_mask, n_random = (T * rate_mask).floor(), (T * rate_random).floor()
    rank = ranks(tokens.shape, rng)
    masked = rank < n_mask
    replaced = ~masked & (rank < n_mask + n_random)
    others = (tokens + torch.randint(1, mask, tokens.shape, generator=rng)) % mask
    X = torch.where(replaced, others, tokens).masked_fill(masked, mask)
    Y = tokens.masked_fill(replaced, mask)
    return X, Y, weights_of_flags(X, Y, mask, penalty_keep_mask, penalty_mask_correct)


def nelbo_batch(tokens, rng, part=(0, 1), *, mask):
    """tokens (B, T) -> X, Y, W (B, T): each token masked with probability t and weighted by 1/t, t stratified over all
    sequences of the iteration. Sahoo et al., arXiv 2406.07524, equation 10."""
    B, (i, n) = len(tokens), part
    numbers = torch.arange(i * B, i * B + B)[:, None]
    t = LEAST_TIME + (1 - LEAST_TIME) * ((torch.rand(B, 1, generator=rng) + numbers) / (n * B)).frac()
    masked = torch.rand(tokens.shape, generator=rng) < t
    return tokens.masked_fill(masked, mask), tokens, masked / t


def count_batch(tokens, rng, part=(0, 1), *, mask):
    """tokens (B, T) -> X, Y, W (B, T): exactly l masked, l uniform on 1 to T and spread over the batch, weight T/l. The
    expected mean of W * cross entropy is an upper bound of -log p(tokens) / T. LLaDA: Nie et al., arXiv 2502.09992."""
    B, T = tokens.shape
    start = torch.rand(1, generator=rng, dtype=torch.float64)
    share = (start + torch.arange(B, dtype=torch.float64) / B).frac()[:, None]
    count = 1 + (T * share).floor()
    masked = ranks(tokens.shape, rng) < count
    return tokens.masked_fill(masked, mask), tokens, (masked * T / count).float()


def both_batches(tokens, rng, part=(0, 1), *, repair, count):
    """For evaluation: the rows of the one and then those of the other."""
    parts = zip(repair(tokens, rng, part), count(tokens, rng, part))
    return tuple(torch.cat(pair) for pair in parts)


def without_mask(loss):
    """`loss` with the logit of [MASK], the last one, left out of the softmax."""
    if loss is cross_entropy:
        return lambda logits, Y, W=None: cross_entropy(logits[..., :-1], Y, W)
    return lambda x, weight, n_logits, Y, W=None: linear_cross_entropy(x, weight, n_logits - 1, Y, W)


def answers(model, x, targets, columns):
    """Cross entropy and likeliest id, (N,), of hidden states x (N, C) against targets (N,), over so many logits."""
    rows = max(1, LOGITS_PER_CHUNK // columns)
    found = []
    for part, y in zip(x.split(rows), targets.split(rows)):
        logits = model.head(part)[:, :columns].float()
        found.append((F.cross_entropy(logits, y, reduction='none'), logits.argmax(-1)))
    return [torch.cat(part) for part in zip(*found)]


def by_level(kind, where, level, **values):
    """Sums of values (B, T) over the positions `where` (B, T): of all rows, and of those of each noise level (B,)."""
    found = {}
    for name, rows in [('', torch.ones_like(level, dtype=torch.bool))] + [(f'{p}_', level == p) for p in LEVELS]:
        here = where & rows[:, None]
        found |= {f'{kind}_{name}{key}': value[here].cpu().double().sum() for key, value in values.items()}
        found[f'{kind}_{name}count'] = here.cpu().double().sum()
    return found


def level_of(corrupted):
    """The noise level (B,), one of LEVELS, of rows with these corrupted positions (B, T)."""
    share = 100 * corrupted.sum(1) / corrupted.size(1)
    return torch.tensor(LEVELS, device=share.device)[torch.bucketize(share, torch.tensor(LEVELS, device=share.device))]


def bound_sums(model, x, X, Y, W, mask):
    """Sums for the bound, from hidden states x (B, T, C) of rows of `count_batch`."""
    masked = X == mask
    losses, top = torch.zeros_like(W), torch.full_like(Y, mask)
    ce, best = answers(model, x[masked], Y[masked], mask)
    losses[masked], top[masked] = ce, best
    bound = (losses * W).mean(1).cpu().double()  # of each sequence, in nats per token
    sums = {'bounds_all': bound}
    correct = (top == Y).cpu() & masked.cpu()
    sums |= {'accuracy': correct.double().sum(), 'count': masked.cpu().double().sum()}
    return sums | by_level('masked', masked, level_of(masked), loss=losses)


def repair_sums(model, x, X, Y, W, mask):
    """Sums of what the repair objective teaches, from hidden states x (B, T, C) of rows of `repair_batch`."""
    ce, best = (found.view(X.shape) for found in answers(model, x.flatten(0, 1), Y.flatten(), mask + 1))
    masked, replaced, said = X == mask, Y == mask, best == mask
    weighted = ce * torch.where(said, W, 1.0)
    level = level_of(masked | replaced)
    sums = {'repair_loss': weighted.cpu().double().sum(), 'repair_count': torch.tensor(float(X.numel()))}
    sums |= by_level('fill', masked, level, loss=ce)
    sums |= by_level('flag', replaced, level, loss=ce, hits=said)
    sums |= by_level('keep', ~masked & ~replaced, level, loss=ce, alarms=said)
    return sums


def diffusion_metrics(model, X, Y, W, repair):
    """Of rows of `both_batches`, or of `count_batch` alone."""
    x, mask, n = model.trunk(X), model.config.vocab_size, len(X) // 2 if repair else 0
    sums = bound_sums(model, x[n:], X[n:], Y[n:], W[n:], mask)
    return sums | (repair_sums(model, x[:n], X[:n], Y[:n], W[:n], mask) if repair else {})


def diffusion_summary(sums, draws=1):
    """Means; the bound and its standard error over sequences, each an average over its `draws`; of the flags precision and
    recall in place of hits and false alarms."""
    bounds = sums['bounds_all'].view(draws, -1).mean(0)
    found = means({name: value for name, value in sums.items() if name != 'bounds_all'})
    found['nelbo'] = float(bounds.mean())
    found['nelbo_stderr'] = float(bounds.std(correction=0)) / math.sqrt(len(bounds))
    for name in [name for name in found if name.endswith('_hits')]:
        level = name.removeprefix('flag_').removesuffix('hits')
        hits, alarms = float(sums[name]), float(sums[f'keep_{level}alarms'])
        found[f'flag_{level}recall'] = found.pop(name)
        found[f'flag_{level}precision'] = hits / (hits + alarms) if hits + alarms else math.nan
        del found[f'keep_{level}alarms']
    return found


@torch.no_grad()
def nelbo(model, tokens, draws, rng):
    """The bound on -log p of token ids (B, T), in nats per token, and its standard error over the B sequences."""
    parts = []
    for _ in range(draws):
        X, Y, W = (t.to(tokens.device) for t in count_batch(tokens.cpu(), rng, mask=model.config.vocab_size))
        parts.append(bound_sums(model, model.trunk(X), X, Y, W, model.config.vocab_size))
    found = diffusion_summary(add(parts), draws)
    return found['nelbo'], found['nelbo_stderr']


def diffusion_loss_function(logits, targets, inputs, mask_token_id, penalty_keep_mask=0.25, penalty_mask_correct=0.5):
    """The loss of the repair objective from logits (B, T, V+1), targets and inputs (B, T)."""
    W = weights_of_flags(inputs, targets, mask_token_id, penalty_keep_mask, penalty_mask_correct)
    return cross_entropy(logits, targets, W, flag=mask_token_id)


def next_token(config):
    return NEXT_TOKEN


def duo(config):
    """Without weight on the masks there is nothing to learn from them: then it is `gpt2`, to the bit."""
    if config.duo_fill_weight == 0:
        return NEXT_TOKEN
    return replace(NEXT_TOKEN, make_batch=partial(duo_batch, fill_weight=config.duo_fill_weight), metrics=duo_metrics)


def diffusion(config):
    mask = config.vocab_size
    count = partial(count_batch, mask=mask)
    common = dict(summary=diffusion_summary, window=lambda block_size: block_size, val_metric='nelbo')
    if config.diffusion_objective in ('nelbo', 'drift'):
        couple = drifting.couple_tokens if config.diffusion_objective == 'drift' else None
        return Objective(make_batch=partial(nelbo_batch, mask=mask), head_loss=without_mask(linear_cross_entropy),
                         loss=without_mask(cross_entropy), metrics=partial(diffusion_metrics, repair=False),
                         eval_batch=count, couple=couple, **common)
    repair = partial(repair_batch, mask=mask, penalty_keep_mask=config.penalty_keep_mask,
                     penalty_mask_correct=config.penalty_mask_correct)
    return Objective(make_batch=repair, head_loss=partial(linear_cross_entropy, flag=mask),
                     loss=partial(cross_entropy, flag=mask), metrics=partial(diffusion_metrics, repair=True),
                     eval_batch=partial(both_batches, repair=repair, count=count), **common)


def one_step(config):
    make_batch = partial(drifting.batch, n_embd=config.n_embd)
    return Objective(make_batch=partial(make_batch, extra=config.drift_positives), eval_batch=make_batch,
                     head_loss=None, loss=None, metrics=drifting.metrics, summary=drifting.summary,
                     window=lambda block_size: block_size, val_metric='js_2', couple=drifting.couple,
                     numbers=partial(drifting.numbers, extra=config.drift_positives))


OBJECTIVES = {'gpt2': next_token, 'dd': next_token, 'heat': next_token, 'rotating': next_token, 'parallel': next_token,
              'duo': duo, 'diffusion': diffusion, 'drifting': one_step}


def get_objective(config):
    """The objective of a GPTConfig."""
    return OBJECTIVES[one_of('model_type', config.model_type, OBJECTIVES)](config)
