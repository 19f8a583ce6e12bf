"""
Generative modeling via drifting: a generator is trained so that its samples stand where a field of attraction by real
samples and repulsion by its own is zero. Deng, Li, Li, Du, He, arXiv 2602.04770.

The field as a pure function, the features of text that it is taken in, and the objective of model_type drifting.
"""
import math
from dataclasses import dataclass

import torch

import ngrams

TEMPERATURES = (0.02, 0.05, 0.2)
AFFINITY_FLOOR = 1e-3
LEAST_SCALE = 1e-3
ITSELF = 100.0  # added to the distance of a sample from itself
PLACES = 32  # positions whose states are features of their own
WINDOWS = (4, 16)
QUEUE = 1000  # examples before an iteration's own that further positives are taken from
STYLES, STYLE_INDICES = 64, 32


# ---------------------------------------------------------------------------------------------------------------------
# the field

def distances(x, y):
    """Euclidean distances (..., N, M) of x (..., N, D) and y (..., M, D), the root of at least 1e-8."""
    square = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT
    return square.clamp(min=1e-8).sqrt()


def raw_field(x, positive, negative, temperature, floor=AFFINITY_FLOOR, itself=None):
    """
    V (..., N, D) at x (..., N, D): attraction by `positive` (..., P, D), repulsion by `negative` (..., M, D).

    V = S- sum A+ y+ - S+ sum A- y-, where A = sqrt(softmax over columns * softmax over rows) of -distance / temperature over
    [negative | positive] jointly, and S are the row sums of each group (algorithm 1 of the paper). `itself` is added to the
    distance of x_i from negative_i, where both are the same samples. The coefficients of each row sum to zero.
    """
    away = distances(x, negative)
    if itself is not None:
        away = away + itself * torch.eye(*away.shape[-2:], device=x.device)
    logits = -torch.cat((away, distances(x, positive)), dim=-1) / temperature
    affinity = (logits.softmax(-1) * logits.softmax(-2)).sqrt().clamp(min=floor)
    push, pull = affinity.split((negative.size(-2), positive.size(-2)), dim=-1)
    return push.sum(-1, keepdim=True) * (pull @ positive) - pull.sum(-1, keepdim=True) * (push @ negative)


def scale_of(x, positive):
    """The mean distance of x (..., N, D) from itself and from `positive`: one number for a feature set."""
    together = torch.cat((distances(x, x), distances(x, positive)), dim=-1)
    return together.mean()


@torch.no_grad()
def drift(x, positive, temperatures=TEMPERATURES, floor=AFFINITY_FLOOR):
    """
    The field of a feature set at its own samples x (S, N, D), in float32 -> targets (S, N, D) in scaled features, the scale
    that features are divided by, and {temperature: root mean square of the raw field}.

    For each temperature the field is divided by its own root mean square, so that a loss against these targets is no
    measure of progress; the raw one is.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, positive = x.float(), positive.float()
        mean = scale_of(x, positive)
        scale = (mean / math.sqrt(x.size(-1))).clamp(min=LEAST_SCALE)
        unit = mean.clamp(min=LEAST_SCALE)
        x, positive = x / scale, positive / scale
        total, rms = torch.zeros_like(x), {}
        for temperature in temperatures:
            factor = unit / scale  # temperatures and `itself` are stated in mean distances
            raw = raw_field(x, positive, x, temperature * factor, floor, ITSELF * factor)
            square = raw.square().mean()
            rms[temperature] = square.sqrt()
            total += raw / square.clamp(min=1e-8).sqrt()
        return x + total, scale, rms


# ---------------------------------------------------------------------------------------------------------------------
# features of text

def depths(n_layer):
    """After which blocks of the encoder states are taken: a quarter, half, three quarters, all."""
    return sorted({max(1, round(n_layer * share)) for share in (0.25, 0.5, 0.75, 1.0)})


def mean_and_std(x, dim):
    return x.mean(dim), (x.var(dim, unbiased=False) + 1e-6).sqrt()


def pool(states, places):
    """Hidden states (B, T, C) of one depth -> {name: feature set (S, B, C)}: states at `places`, mean and deviation over the
    whole and over windows."""
    B, T, C = states.shape
    found = {'place': states[:, places].transpose(0, 1)}
    for length in (T, *(w for w in WINDOWS if w < T)):
        windows = states[:, :T - T % length].view(B, T // length, length, C).transpose(0, 1)
        for name, values in zip(('mean', 'std'), mean_and_std(windows, 2)):
            found[f'{name}_{length}'] = values
    return found


def features(encoder, embeddings, places):
    """{name: feature set (S, B, C)} of input embeddings (B, T, C) in a frozen GPT."""
    found = {}
    at = depths(encoder.config.n_layer)
    for depth, states in zip(at, encoder.states(embeddings, at)):
        found |= {f'{depth}_{name}': values for name, values in pool(states, places).items()}
    return found


@dataclass
class Field:
    """What one micro-batch is trained against: for each feature set the targets (S, B, C) and the scale; at which places
    states are features; the ids (B, prefix) that generated text starts with."""
    targets: dict
    scales: dict
    places: torch.Tensor
    prefix: torch.Tensor


def residual(found, field):
    """Sum over feature sets of the mean squared distance from the targets; gradients flow through `found` alone."""
    return sum((found[name].float() / scale - field.targets[name]).square().mean() for name, scale in field.scales.items())


# ---------------------------------------------------------------------------------------------------------------------
# the objective

def batch(tokens, rng, part=(0, 1), *, n_embd, extra=0):
    """tokens (B+extra, T) -> noise (B, T, C), real ids (B+extra, T), style indices (B, 32). Real text beyond the batch comes
    from `numbers`."""
    B = len(tokens) - extra
    noise = torch.randn(B, tokens.size(1), n_embd, generator=rng)
    return noise, tokens, torch.randint(STYLES, (B, STYLE_INDICES), generator=rng)


def numbers(own, rng, *, extra):
    """Example numbers: a micro-batch's own (a range), and `extra` of the QUEUE before them (the first has only its own): the
    queue is a place in the seeded order of examples, so that there is nothing to save."""
    start = own[0]
    low, high = (max(0, start - QUEUE), start) if start else (0, own[-1] + 1)
    return [*own, *(low + torch.randint(high - low, (extra,), generator=rng)).tolist()]


@torch.no_grad()
def couple(model, batches, ranks):
    """Turns the real ids of each micro-batch of an iteration into its Field, over all micro-batches and ranks together."""
    T, c = batches[0][0].size(1), model.config
    places = torch.randperm(T)[:PLACES].sort().values
    length = int(torch.randint(c.drift_prefix + 1, ()))
    places, length = ranks.gather((places, length))[0]
    mine, real = [], []
    for noise, ids, style in batches:
        prefix = ids[:len(noise), :length]
        mine.append(features(model.encoder, model.generator_output(noise, style, prefix), places))
        real.append(features(model.encoder, model.encoder.transformer.wte(ids), places))
    fields = [Field({}, {}, places, ids[:len(noise), :length]) for noise, ids, _ in batches]
    for name in mine[0]:
        x = ranks.concatenate(torch.cat([found[name] for found in mine], dim=1), dim=1)
        positive = ranks.concatenate(torch.cat([found[name] for found in real], dim=1), dim=1)
        targets, scale, _ = drift(x, positive)
        parts = targets.chunk(ranks.world_size, dim=1)[ranks.rank].chunk(len(batches), dim=1)
        for field, part in zip(fields, parts):
            field.targets[name], field.scales[name] = part, scale
    return [(noise, field, style) for (noise, _, style), field in zip(batches, fields)]


def metrics(model, noise, ids, style):
    """Samples, to be compared with real text as a whole; raw field, diversity and distance to the vocabulary, batch by
    batch."""
    x = model.generator_output(noise, style)
    places = torch.arange(noise.size(1), device=noise.device)[:PLACES]
    mine = features(model.encoder, x, places)
    real = features(model.encoder, model.encoder.transformer.wte(ids), places)
    nearest = model.similarities(x).max(-1)
    sums = {'count': torch.tensor(1.0), 'vocabulary_distance': 1 - nearest.values.mean().cpu().double()}
    whole = [name for name in mine if name.endswith(f'mean_{noise.size(1)}')]
    spread = [torch.stack([pairwise(found[name]) for name in whole]).mean() for found in (mine, real)]
    sums['diversity'] = (spread[0] / spread[1].clamp(min=1e-8)).cpu().double()
    for name in mine:
        _, _, rms = drift(mine[name], real[name])
        for temperature, value in rms.items():
            key = f'field_{temperature}'
            sums[key] = sums.get(key, 0.0) + value.cpu().double() / len(mine)
    return sums | {'samples_all': nearest.indices.cpu(), 'real_all': ids.cpu()}


def pairwise(x):
    """Mean distance between different samples of a feature set (S, N, D)."""
    n = x.size(1)
    return distances(x, x).sum((-1, -2)).mean() / max(1, n * (n - 1))


def summary(sums):
    """Means; divergence of 2-grams from real text, which is the val_metric; distinct 2-grams; whether samples collapsed."""
    samples, real, n = sums['samples_all'].numpy(), sums['real_all'].numpy(), float(sums['count'])
    found = {name: float(total) / n for name, total in sums.items() if name != 'count' and not name.endswith('_all')}
    found |= {f'js_{k}': ngrams.divergence(samples, real, k) for k in (1, 2, 3)}
    found |= {'distinct_2': ngrams.distinct(samples, 2), 'distinct_2_real': ngrams.distinct(real, 2)}
    return found | {'collapsed': float(found['distinct_2'] < found['distinct_2_real'] / 2)}
