"""
What each model type learns. An Objective is a set of pure functions: tokens in, (inputs, targets, weights) out, the loss
of hidden states against them, and what evaluation measures. The training loop and the evaluator reach every type through
these and nothing else.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from nanodrift import drifting
from nanodrift.data import permute
from nanodrift.kernels import IGNORE, cross_entropy, linear_cross_entropy, rows_per_chunk
from nanodrift.metrics import Calibration, Mean, Rows, calibrated_predictions, over_chunks, predictions, summarize
from nanodrift.streams import draft_blocks


@dataclass(frozen=True)
class Objective:
    """
    make_batch: (tokens (B, window) int64, rng torch.Generator, part) -> X, Y, W; W is None or the loss weight of each
        target; part = (i, n, seed) says that this is micro-batch i of the n of an iteration, over all ranks, and has a seed
        that they share.
    head_loss: (x (B, T, C), head weight (Vp, C), n_logits, Y, W, softmax) -> the mean loss, logits never held all at once;
        softmax: kernels.exponentials, or the same compiled.
    loss: (logits (B, T, V), Y, W) -> the same mean loss from logits.
    metrics: (model, X, Y, W, calibrated) -> {name: metric}; `calibrated` adds what evaluate.py reports of confidence.
    summary: {name: metric} of a split -> {name: number}.
    window: block_size -> tokens that one example reads.
    val_metric: which number of the summary is val_loss and picks the best checkpoint; smaller is better.
    eval_batch: make_batch of evaluation, where it differs.
    device_batch: (tokens, part, device) -> what training on a GPU takes in place of make_batch, where it differs.
    examples: (range of example numbers, first of the iteration, rng) -> those that make_batch sees, where it differs.
    compute_targets: (model, micro-batches of this rank, ranks, rng) -> the same with targets that depend on all of the
        iteration's micro-batches together.
    """
    make_batch: Callable
    head_loss: Callable
    loss: Callable
    metrics: Callable
    summary: Callable
    window: Callable
    val_metric: str
    eval_batch: Callable | None = None
    device_batch: Callable | None = None
    examples: Callable | None = None
    compute_targets: Callable | None = None


# ---------------------------------------------------------------------------------------------------------------------
# next-token prediction

def next_token_batch(tokens, rng, part=(0, 1)):
    """tokens (B, T+1) -> X (B, T), Y (B, T): at every position the token that follows."""
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None


def next_token_metrics(model, X, Y, W=None, calibrated=False):
    """X, Y (B, T)."""
    return over_chunks(model, model.trunk(X), Y, calibrated_predictions if calibrated else predictions)


def sequence_positions(tokens, ids):
    """Which of tokens (B, T) are part of this sequence of ids, also where the window cuts it, -> bool (B, T)."""
    n, (B, T) = len(ids), tokens.shape
    edge = torch.full((B, n - 1), IGNORE, device=tokens.device)
    wide, ids = torch.cat((edge, tokens, edge), dim=1), torch.tensor(ids, device=tokens.device)
    windows = wide.unfold(1, n, 1)  # (B, T+n-1, n)
    inside = windows != IGNORE
    matches = ((windows == ids) | ~inside).all(-1) & (inside.sum(-1) > min(1, n - 1))  # one token alone tells nothing
    hits = torch.zeros(wide.shape, dtype=torch.bool, device=tokens.device)
    for i in range(n):
        hits[:, i:i + matches.size(1)] |= matches
    return hits[:, n - 1:n - 1 + T]


def ignoring(make_batch, ids):
    """`make_batch`, whose targets (B, T) are the last T tokens, without those that are part of this sequence of ids."""
    def batch(tokens, rng, part=(0, 1)):
        X, Y, W = make_batch(tokens, rng, part)
        return X, Y.masked_fill(sequence_positions(tokens, ids)[:, -Y.size(1):], IGNORE), W
    return batch


NEXT_TOKEN = Objective(make_batch=next_token_batch, head_loss=linear_cross_entropy, loss=cross_entropy,
                       metrics=next_token_metrics, summary=summarize, window=lambda block_size: block_size + 1,
                       val_metric='loss')


def draft_batch(tokens, rng, part=(0, 1), *, mask, block, count, weight):
    """
    tokens (B, T+1) -> X (B, 2, T + count * block): ids, and their positions; Y, W (B, T + count * block).

    The T tokens, and behind them `count` blocks of [MASK], on a grid that starts anywhere. As everywhere in gpt2, position m
    predicts token m+1: a block behind token i, at the positions i+1 to i+block, predicts the tokens i+2 to i+block+1. The
    loss is the mean over tokens and `weight` times the mean over [MASK]s. TiDAR: arXiv 2511.08923.
    """
    B, T = len(tokens), tokens.size(1) - 1
    start = 1 + int(torch.randint(block, (1,), generator=rng))
    drafts = torch.arange(start, start + count * block)
    ids = torch.cat((tokens[:, :-1], torch.full((B, len(drafts)), mask)), dim=1)
    X = torch.stack((ids, torch.cat((torch.arange(T), drafts)).expand(B, -1)), dim=1)
    Y = torch.cat((tokens[:, 1:], tokens[:, drafts + 1]), dim=1)
    W = torch.cat((torch.full((T,), 1 / T), torch.full((len(drafts),), weight / len(drafts)))) * Y.size(1)
    return X, Y, W.expand(B, -1).contiguous()


def next_token(config):
    if not config.has_drafts:
        return NEXT_TOKEN
    make_batch = partial(draft_batch, mask=config.vocab_size, block=config.draft_block, count=draft_blocks(config),
                         weight=config.draft_weight)
    return replace(NEXT_TOKEN, make_batch=make_batch, eval_batch=next_token_batch)


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


def duo_metrics(model, X, Y, W=None, calibrated=False):
    """Next tokens and fill-ins apart, for only the first can be compared with other model types."""
    x, T = model.trunk(X, fill=True), X.size(1)
    fill = over_chunks(model, x[:, T:], Y[:, T:], predictions)
    tokens = over_chunks(model, x[:, :T], Y[:, :T], calibrated_predictions if calibrated else predictions)
    return tokens | {f'fill_{name}': metric for name, metric in fill.items()}


def duo(config):
    """With fill_weight 0 the masks contribute nothing; the model is exactly gpt2."""
    if config.duo_fill_weight == 0:
        return NEXT_TOKEN
    return replace(NEXT_TOKEN, make_batch=partial(duo_batch, fill_weight=config.duo_fill_weight), metrics=duo_metrics)


# ---------------------------------------------------------------------------------------------------------------------
# masked diffusion; mask is the id of [MASK], which is vocab_size

NOISE_LEVELS = (20, 40, 60, 80, 100)  # per cent of a sequence that is corrupted, at most
LEAST_TIME = 1e-3
MOST_CORRUPTED = 0.99


def random_order(shape, rng):
    """A random permutation of the positions of each row, (..., T)."""
    return torch.rand(shape, generator=rng).argsort(-1).argsort(-1)


def flag_weights(X, Y, mask, penalty_keep_mask, penalty_mask_correct):
    """Loss weights (B, T), used where [MASK] is predicted: penalty_keep_mask at masked, penalty_mask_correct at correct, 1
    at wrong tokens."""
    W = torch.ones(X.shape, device=X.device)
    W[X == mask] = penalty_keep_mask
    W[(X == Y) & (X != mask)] = penalty_mask_correct
    return W


def repair_batch(tokens, rng, part=(0, 1), *, mask, penalty_keep_mask, penalty_mask_correct):
    """tokens (B, T) -> X, Y, W (B, T). A random share of each sequence is masked; of the rest a random share is replaced by
    other tokens, whose target is [MASK]; all other tokens are their own target."""
    T = tokens.size(1)
    u = torch.rand(2, len(tokens), 1, generator=rng)
    rate_mask = MOST_CORRUPTED * u[0]
    rate_random = (MOST_CORRUPTED - rate_mask) * u[1]
    n_mask, n_random = (T * rate_mask).floor(), (T * rate_random).floor()
    order = random_order(tokens.shape, rng)
    masked = order < n_mask
    replaced = ~masked & (order < n_mask + n_random)
    others = (tokens + torch.randint(1, mask, tokens.shape, generator=rng)) % mask
    X = torch.where(replaced, others, tokens).masked_fill(masked, mask)
    Y = tokens.masked_fill(replaced, mask)
    return X, Y, flag_weights(X, Y, mask, penalty_keep_mask, penalty_mask_correct)


def nelbo_batch(tokens, rng, part=(0, 1), *, mask, t_min=0.0, t_max=1.0):
    """tokens (B, T) -> X, Y, W (B, T): each token masked with probability t and weighted by 1/t, t stratified over all
    sequences of the iteration. Sahoo et al., arXiv 2406.07524, equation 10. With t from a narrower range, as in BD3-LM
    (arXiv 2503.09573, section 5), the expected loss is no bound."""
    B, (i, n) = len(tokens), part[:2]
    numbers = torch.arange(i * B, i * B + B)[:, None]
    least = max(t_min, LEAST_TIME)
    t = least + (t_max - least) * ((torch.rand(B, 1, generator=rng) + numbers) / (n * B)).frac()
    masked = torch.rand(tokens.shape, generator=rng) < t
    return tokens.masked_fill(masked, mask), tokens, masked / t


def count_batch(tokens, rng, part=(0, 1), *, mask):
    """tokens (B, T) -> X, Y, W (B, T): exactly l masked, l uniform on 1 to T and spread over the batch, weight T/l. The
    expected mean of W * cross entropy is an upper bound of -log p(tokens) / T. LLaDA: Nie et al., arXiv 2502.09992."""
    B, T = tokens.shape
    start = torch.rand(1, generator=rng, dtype=torch.float64)
    share = (start + torch.arange(B, dtype=torch.float64) / B).frac()[:, None]
    count = 1 + (T * share).floor()
    masked = random_order(tokens.shape, rng) < count
    return tokens.masked_fill(masked, mask), tokens, (masked * T / count).float()


def block_batch(tokens, rng, part=(0, 1), *, mask, block, shift, complement=False, t_min=0.0, t_max=1.0):
    """
    tokens (B, T), or (B, T+1) with `shift` -> X (B, T - block + slots), the clean tokens and the noisy slots of
    `streams.Streams`; Y, W (B, T).

    In each block exactly l tokens are masked, l uniform on 1 to `block`, and weighted by block / l: `count_batch` block by
    block. The l of all blocks of the iteration are spread evenly, and dealt to the blocks at random. With t_min and t_max
    l is 1 + floor(block * t), t uniform between them.

    complement: each block has a second noisy copy after it, in which block + 1 - l tokens are masked, among them all that
    the first leaves; Y, W (B, 2T). So every token is predicted at each step. After Fast-dLLM v2 (arXiv 2509.26328), whose
    second copy masks exactly the others: its l would not be uniform on 1 to `block`.
    """
    text, (i, n) = tokens[:, int(shift):], part[:2]
    shape = len(text), text.size(1) // block, block
    blocks = shape[0] * shape[1]
    seed = part[2] if len(part) > 2 else int(torch.randint(2 ** 62, (1,), generator=rng))
    start = torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    strata = permute(range(i * blocks, i * blocks + blocks), n * blocks, seed)
    t = t_min + (t_max - t_min) * (start + torch.from_numpy(strata) / (n * blocks)).frac()
    count = 1 + (block * t).floor().view(*shape[:2], 1)
    order = random_order(shape, rng)
    masked, text = order < count, text.reshape(shape)
    if complement:
        masked, count, text = (torch.stack(copies, dim=2).flatten(1, 2) for copies in (
            (masked, order >= count - 1), (count, block + 1 - count), (text, text)))
    noisy = text.masked_fill(masked, mask).flatten(1)
    text = text.flatten(1).contiguous()
    return clean_and_noisy(tokens, noisy, block, shift), text, (masked * block / count).float().flatten(1)


def clean_and_noisy(tokens, noisy, block, shift):
    """What a pass of block diffusion reads, (B, T - block + slots): of tokens (B, T), or (B, T+1) with `shift`, those that
    are seen from later blocks, and the slots of the noisy text (B, T), or of several copies of each of its blocks."""
    T, slots = tokens.size(1) - shift, noisy.unflatten(1, (-1, block))
    if shift:
        before = tokens[:, :-1:block, None].repeat_interleave(noisy.size(1) // T, dim=1)  # the clean token before the block
        slots = torch.cat((before, slots), dim=2)
    return torch.cat((tokens[:, :T - block], slots.flatten(1)), dim=1)


def repair_and_count_batch(tokens, rng, part=(0, 1), *, repair, count):
    """For evaluation: the rows of `repair_batch` and then those of `count_batch`."""
    return tuple(torch.cat(pair) for pair in zip(repair(tokens, rng, part), count(tokens, rng, part)))


def without_mask(loss):
    """`loss` with the logit of [MASK], the last one, left out of the softmax."""
    if loss is cross_entropy:
        return lambda logits, Y, W=None: cross_entropy(logits[..., :-1], Y, W)
    return lambda x, weight, n_logits, *rest: linear_cross_entropy(x, weight, n_logits - 1, *rest)


def diffusion_loss_function(logits, targets, inputs, mask_token_id, penalty_keep_mask=0.25, penalty_mask_correct=0.5):
    """The loss of the repair objective from logits (B, T, V+1), targets and inputs (B, T)."""
    W = flag_weights(inputs, targets, mask_token_id, penalty_keep_mask, penalty_mask_correct)
    return cross_entropy(logits, targets, W, flag=mask_token_id)


# -- what is measured -------------------------------------------------------------------------------------------------

def losses_and_argmax(model, x, targets, columns):
    """Cross entropy and argmax, (N,) each, of hidden states x (N, C) against targets (N,), over so many logits."""
    rows = rows_per_chunk(columns)
    chunks = []
    for chunk, y in zip(x.split(rows), targets.split(rows)):
        logits = model.head(chunk)[:, :columns].float()
        chunks.append((F.cross_entropy(logits, y, reduction='none'), logits.argmax(-1)))
    return [torch.cat(pieces) for pieces in zip(*chunks)]


def noise_level(corrupted):
    """The noise level (B,), one of NOISE_LEVELS, of rows with these corrupted positions (B, T)."""
    share, levels = 100 * corrupted.sum(1) / corrupted.size(1), torch.tensor(NOISE_LEVELS, device=corrupted.device)
    return levels[torch.bucketize(share, levels)]


def rows_by_level(level):
    """Yields (a part of a metric's name, the rows (B,) that it covers): all rows, then those of each noise level (B,)."""
    yield '', torch.ones_like(level, dtype=torch.bool)
    for percent in NOISE_LEVELS:
        yield f'{percent}_', level == percent


def bound_metrics(model, x, X, Y, W, mask, calibrated=False):
    """The bound on -log p, from hidden states x (B, T, C) of rows of `count_batch`: `nelbo`, that of each sequence in nats
    per token; accuracy and cross entropy of masked tokens."""
    masked = W > 0
    losses, top = torch.zeros_like(W), torch.full_like(Y, mask)
    losses[masked], top[masked] = losses_and_argmax(model, x[masked], Y[masked], mask)
    metrics = {'nelbo': Rows((losses * W).mean(1).cpu().double()), 'accuracy': Mean.of(top == Y, masked)}
    for name, rows in rows_by_level(noise_level(masked)):
        where = masked & rows[:, None]
        metrics[f'masked_{name}loss'] = Mean.of(losses, where)
        if calibrated and where.any():
            suffix = f'_at_{name}'.removesuffix('_') if name else ''
            metrics |= over_chunks(model, x[where], Y[where], lambda logits, y, suffix=suffix: {
                f'calibration{suffix}': Calibration.of(logits[:, :mask], y, suffix)})
    return metrics


def conditional_bound(model, context, continuation, draws, rng):
    """
    The bound on -log p(continuation | context), ids (P,) and (n,), P at least 1, both together no longer than a window of
    the objective: nats (draws,), one for each time that the continuation is masked anew.

    The context is given, and the continuation alone is masked, as in `count_batch`. With diffusion_block it is masked block
    by block, as in `block_batch`; context in its first block is given there too, and what would follow it in its last block
    is [MASK], as in generation.
    """
    c, mask, P, n = model.config, model.config.vocab_size, len(context), len(continuation)
    N, shift = c.diffusion_block or n, int(c.diffusion_shift)
    first = N - (P - shift) % N if c.diffusion_block else n  # tokens that still fit into the block of the context
    Y = continuation.expand(draws, -1)
    X, _, W = (torch.cat(pieces, dim=1) for pieces in zip(*(
        count_batch(piece, rng, mask=mask) for piece in (Y[:, :first], *Y[:, first:].split(N, dim=1)) if piece.size(1))))
    noisy = torch.cat((context.expand(draws, -1), X), dim=1)
    if c.diffusion_block:
        missing = c.block_size + shift - P - n
        tokens = F.pad(torch.cat((context.expand(draws, -1), Y), dim=1), (0, missing), value=mask)
        noisy = clean_and_noisy(tokens, F.pad(noisy[:, shift:], (0, missing), value=mask), N, shift)
    x = model.trunk(noisy.to(model.device))[:, P - shift:][:, :n]
    X, Y, W = (t.to(model.device) for t in (X, Y, W))
    return n * bound_metrics(model, x, X, Y, W, mask)['nelbo'].rows


def repair_metrics(model, x, X, Y, W, mask):
    """What the repair objective teaches, from hidden states x (B, T, C) of rows of `repair_batch`: to fill, to keep, and to
    flag wrong tokens by predicting [MASK]."""
    losses, top = (values.view(X.shape) for values in losses_and_argmax(model, x.flatten(0, 1), Y.flatten(), mask + 1))
    masked, replaced, flagged = X == mask, Y == mask, top == mask
    kept, everywhere = ~masked & ~replaced, torch.ones_like(masked)
    metrics = {'repair_loss': Mean.of(losses * torch.where(flagged, W, 1.0), everywhere)}
    for name, rows in rows_by_level(noise_level(masked | replaced)):
        here = rows[:, None]
        metrics |= {f'{kind}_{name}loss': Mean.of(losses, where & here)
                    for kind, where in (('fill', masked), ('flag', replaced), ('keep', kept))}
        metrics[f'flag_{name}recall'] = Mean.of(flagged, replaced & here)
        metrics[f'flag_{name}precision'] = Mean.of(replaced, flagged & ~masked & here)
    return metrics


def diffusion_metrics(model, X, Y, W, calibrated=False, *, repair):
    """Of rows of `repair_and_count_batch`, or of `count_batch` alone."""
    x, mask, n = model.trunk(X), model.config.vocab_size, len(X) // 2 if repair else 0
    metrics = bound_metrics(model, x[n:], X[n:], Y[n:], W[n:], mask, calibrated)
    return metrics | (repair_metrics(model, x[:n], X[:n], Y[:n], W[:n], mask) if repair else {})


def diffusion_summary(metrics):
    """Numbers of such metrics: the bound is the mean over sequences, and has a standard error."""
    bounds = metrics['nelbo'].rows
    numbers = summarize({name: metric for name, metric in metrics.items() if name != 'nelbo'})
    stderr = float(bounds.std(correction=0)) / math.sqrt(len(bounds)) if len(bounds) > 1 else math.nan
    return numbers | {'nelbo': float(bounds.mean()), 'nelbo_stderr': stderr}


def diffusion(config):
    mask = config.vocab_size
    count = partial(count_batch, mask=mask)
    context = int(config.diffusion_shift)
    common = dict(summary=diffusion_summary, window=lambda block_size: block_size + context, val_metric='nelbo')
    if config.diffusion_objective in ('nelbo', 'drift'):
        targets = drifting.compute_token_drift_targets if config.diffusion_objective == 'drift' else None
        rates = dict(t_min=config.diffusion_t_min, t_max=config.diffusion_t_max)
        noise = partial(nelbo_batch, mask=mask, **rates)
        if config.diffusion_block:
            count = partial(block_batch, mask=mask, block=config.diffusion_block, shift=config.diffusion_shift)
            noise = partial(count, complement=config.diffusion_complement, **rates)
        return Objective(make_batch=noise, head_loss=without_mask(linear_cross_entropy),
                         loss=without_mask(cross_entropy), metrics=partial(diffusion_metrics, repair=False),
                         eval_batch=count, compute_targets=targets, **common)
    repair = partial(repair_batch, mask=mask, penalty_keep_mask=config.penalty_keep_mask,
                     penalty_mask_correct=config.penalty_mask_correct)
    return Objective(make_batch=repair, head_loss=partial(linear_cross_entropy, flag=mask),
                     loss=partial(cross_entropy, flag=mask), metrics=partial(diffusion_metrics, repair=True),
                     eval_batch=partial(repair_and_count_batch, repair=repair, count=count), **common)


# ---------------------------------------------------------------------------------------------------------------------
# drifting: its batches, targets and metrics are in drifting.py

def one_step(config):
    sizes = dict(n_embd=config.n_embd, extra=config.drift_positives)
    return Objective(make_batch=partial(drifting.make_batch, **sizes), device_batch=partial(drifting.device_batch, **sizes),
                     eval_batch=partial(drifting.make_batch, n_embd=config.n_embd),
                     head_loss=None, loss=None, metrics=drifting.measure, summary=drifting.summary,
                     window=lambda block_size: block_size, val_metric='js_2',
                     compute_targets=drifting.compute_drift_targets,
                     examples=partial(drifting.examples, extra=config.drift_positives))
