"""
Generative modeling via drifting: a generator is trained so that its samples stand where a field of attraction by real
samples and repulsion by its own is zero. Deng, Li, Li, Du, He, arXiv 2602.04770.

The field as a pure function, the features of text that it is taken in, and the objective of model_type drifting.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import ngrams
from machine import exact

TEMPERATURES = (0.02, 0.05, 0.2)
AFFINITY_FLOOR = 1e-3
LEAST_SCALE = 1e-3
ITSELF = 100.0  # added to the distance of a sample from itself
PLACES = 32  # positions whose states, or stacks of tokens, are features of their own
WINDOWS = (4, 16)
STACKS = (2, 4)  # neighbouring tokens whose embeddings together are a feature
TOGETHER = 4  # places whose stacks are one feature set: a field of so many more points is less noisy
QUEUE = 1000  # examples before an iteration's own that further positives are taken from
STYLES, STYLE_INDICES = 64, 32
MEASURED = 256  # samples whose field and distances are measured together: both depend on how many there are


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
    return _field(away, distances(x, positive), positive, negative, temperature, floor)


def _field(away, toward, positive, negative, temperature, floor):
    """`raw_field` from the distances (..., N, M) from `negative` and (..., N, P) from `positive`."""
    logits = -torch.cat((away, toward), dim=-1) / temperature
    affinity = (logits.softmax(-1) * logits.softmax(-2)).sqrt().clamp(min=floor)
    push, pull = affinity.split((negative.size(-2), positive.size(-2)), dim=-1)
    return push.sum(-1, keepdim=True) * (pull @ positive) - pull.sum(-1, keepdim=True) * (push @ negative)


@torch.no_grad()
def drift(x, positive, temperatures=TEMPERATURES, floor=AFFINITY_FLOOR):
    """
    The field of a feature set at its own samples x (S, N, D), in float32 -> targets (S, N, D) in scaled features, the scale
    that features are divided by, and {temperature: root mean square of the raw field}.

    For each temperature, stated in mean distances of all samples from each other and from real ones, the field is divided
    by its own root mean square, so that a loss against these targets is no measure of progress; the raw one is.
    """
    with exact(x.device):
        x, positive = x.float(), positive.float()
        middle = torch.cat((x, positive), dim=1).mean(1, keepdim=True)  # large offsets would cost digits
        near, positive = x - middle, positive - middle
        away, toward = distances(near, near), distances(near, positive)
        mean = torch.cat((away, toward), dim=-1).mean()
        scale = (mean / math.sqrt(x.size(-1))).clamp(min=LEAST_SCALE)
        unit = mean.clamp(min=LEAST_SCALE)
        away = away + ITSELF * unit * torch.eye(x.size(1), device=x.device)
        total, rms = torch.zeros_like(x), {}
        for temperature in temperatures:
            raw = _field(away, toward, positive, near, temperature * unit, floor) / scale
            square = raw.square().mean()
            rms[temperature] = square.sqrt()
            total += raw / square.clamp(min=1e-8).sqrt()
        return x / scale + total, scale, rms


# ---------------------------------------------------------------------------------------------------------------------
# features of text

def depths(n_layer):
    """After which blocks of the encoder states are taken: a quarter, half, three quarters, all."""
    return sorted({max(1, round(n_layer * share)) for share in (0.25, 0.5, 0.75, 1.0)})


def mean_and_std(x, dim):
    mean = x.mean(dim, keepdim=True)
    return mean.squeeze(dim), ((x - mean).square().mean(dim) + 1e-6).sqrt()  # var() takes several times as long


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


def of_states(encoder, embeddings, places):
    """{name: feature set (S, B, C)} of the hidden states that a frozen GPT has for input embeddings (B, T, C)."""
    found = {}
    at = depths(encoder.config.n_layer)
    for depth, states in zip(at, encoder.states(embeddings, at)):
        found |= {f'{depth}_{name}': values for name, values in pool(states, places).items()}
    return found


def of_tokens(encoder, embeddings, places):
    """{name: feature set (S, n*B, k*C)} of k neighbours' embeddings, each of (B, T, C), side by side, n = TOGETHER places
    in a set: what a field makes of n-grams. Unlike hidden states they are linear in an embedding, so that its gradient
    holds as far as the next token. Beyond both ends stand zeros: a stack at a place ends there, those of the first places
    have a second one beyond the end, and so the tokens at the ends are in as many stacks as all others."""
    found, T = {}, embeddings.size(1)
    for k in STACKS:
        stacks = F.pad(embeddings, (0, 0, k - 1, k - 1)).unfold(1, k, 1).mT.flatten(2)  # (B, T+k-1, k*C)
        found[f'tokens_{k}'] = together(stacks[:, torch.cat((places, places[places < k - 1] + T))])
    return found


def together(x):
    """Features (B, P, D) of P places -> sets (S, n*B, D) of n = TOGETHER places each, or of all where there are fewer. Where
    n does not divide P, the last set shares some with the one before, and these count twice."""
    n = min(TOGETHER, x.size(1))
    starts = torch.tensor([*range(0, x.size(1) - n, n), x.size(1) - n], device=x.device)
    sets = x[:, starts[:, None] + torch.arange(n, device=x.device)]  # (B, S, n, D)
    return sets.transpose(0, 1).flatten(1, 2)


def of_both(encoder, embeddings, places):
    return of_states(encoder, embeddings, places) | of_tokens(encoder, embeddings, places)


FEATURES = {'states': of_states, 'tokens': of_tokens, 'both': of_both}


def features(encoder, embeddings, places, kind):
    """{name: feature set (S, N, D)} of embeddings (B, T, C) of a frozen GPT; N is B times the places in a set."""
    return FEATURES[kind](encoder, embeddings, places)


@dataclass
class Field:
    """What one micro-batch is trained against: for each feature set the targets (S, N, D) and the scale; at which places
    states or stacks are features; ids: those (B, prefix) that generated text starts with, for token drift the real text
    (B, T)."""
    targets: dict
    scales: dict
    places: torch.Tensor
    ids: torch.Tensor


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


def numbers(own, start, rng, *, extra):
    """Example numbers: a micro-batch's own (a range), and `extra` of the QUEUE before its iteration, which begins at `start`
    (the first has only its own): a place in the seeded order of examples, so that there is nothing to save."""
    low, high = (max(0, start - QUEUE), start) if start else (0, own[-1] + 1)
    count = high - low
    enough = extra <= count
    more = torch.randperm(count, generator=rng)[:extra] if enough else torch.randint(count, (extra,), generator=rng)
    return [*own, *(low + more).tolist()]


def some_places(T, rng):
    return torch.randperm(T, generator=rng)[:PLACES].sort().values


def take_field(mine, real, places, ids, ranks, config):
    """A Field for each micro-batch of this rank: from the features of its samples, of real text, and its ids (lists over
    micro-batches), over all of them and all ranks together."""
    fields = [Field({}, {}, places, part) for part in ids]
    for name in mine[0]:
        x = ranks.concatenate(torch.cat([found[name] for found in mine], dim=1), dim=1)
        positive = ranks.concatenate(torch.cat([found[name] for found in real], dim=1), dim=1)
        targets, scale, _ = drift(x, positive, config.field_temperatures(), config.drift_floor)
        parts = targets.chunk(ranks.world_size, dim=1)[ranks.rank].chunk(len(fields), dim=1)
        for field, part in zip(fields, parts):
            field.targets[name], field.scales[name] = part, scale
    return fields


@torch.no_grad()
def couple(model, batches, ranks, rng):
    """Turns the real ids of each micro-batch of an iteration into its Field, over all micro-batches and ranks together.
    `rng` is the same on all ranks."""
    places, kind = some_places(batches[0][0].size(1), rng), model.config.drift_features
    length = int(torch.randint(model.config.drift_prefix + 1, (), generator=rng))
    mine, real, prefixes = [], [], []
    for noise, ids, style in batches:
        prefixes.append(ids[:len(noise), :length])
        mine.append(features(model.encoder, model.generator_output(noise, style, prefixes[-1]), places, kind))
        real.append(features(model.encoder, model.encoder.transformer.wte(ids), places, kind))
    fields = take_field(mine, real, places, prefixes, ranks, model.config)
    return [(noise, field, style) for (noise, _, style), field in zip(batches, fields)]


@torch.no_grad()
def couple_tokens(model, batches, ranks, rng):
    """Token drift (arXiv 2605.19470): `couple` for corrupted ids, real ids and weights of the bound."""
    places, kind = some_places(batches[0][0].size(1), rng), model.config.drift_features
    mine = [features(model.encoder, model.soft_tokens(X, model.trunk(X)), places, kind) for X, _, _ in batches]
    real = [features(model.encoder, model.encoder.transformer.wte(Y), places, kind) for _, Y, _ in batches]
    fields = take_field(mine, real, places, [Y for _, Y, _ in batches], ranks, model.config)
    return [(X, field, W) for (X, _, W), field in zip(batches, fields)]


def metrics(model, noise, ids, style):
    """Samples and real text, their ids and, for each depth, their states averaged over positions: to be laid together."""
    x, places = model.generator_output(noise, style), torch.arange(1, device=noise.device)
    sums = {'count': torch.tensor(float(len(noise)))}
    for kind, embeddings in (('samples', x), ('real', model.encoder.transformer.wte(ids))):
        for name, values in of_states(model.encoder, embeddings, places).items():
            if name.endswith(f'mean_{noise.size(1)}'):
                sums[f'{kind}_{name}_all'] = values[0].float().cpu()
    cosine, nearest = model.nearest(x)
    sums['vocabulary_distance'] = (1 - cosine.mean(1)).cpu().double().sum()
    return sums | {'samples_all': nearest.cpu(), 'real_all': ids.cpu()}


def pairwise(x):
    """Mean distance between different samples (N, D)."""
    with exact(x.device):
        return float(distances(x, x).fill_diagonal_(0).sum() / max(1, len(x) * (len(x) - 1)))


def blocks(x, y):
    """Pairs of blocks of MEASURED rows of x and y (N, D), or of all rows where there are fewer."""
    whole = max(1, len(x) // MEASURED) * MEASURED
    return list(zip(x[:whole].split(MEASURED), y[:whole].split(MEASURED)))


def summary(sums):
    """Divergence of n-grams from real text, of which that of 2-grams is the val_metric, beside it the floor, which is that
    of one half of the real text from the other (a little high, for half as much text); distinct 2-grams, and whether
    samples collapsed; in hidden states and at TEMPERATURES, whatever a model is trained in, mean over depths and blocks of
    samples: diversity in units of real text's, root mean square of the raw field without a floor, under which it would grow
    with the number of samples."""
    samples, real = sums['samples_all'].numpy(), sums['real_all'].numpy()
    found = {f'js_{k}': ngrams.divergence(samples, real, k) for k in (1, 2, 3)}
    found['floor'] = ngrams.divergence(real[::2], real[1::2], 2) if len(real) > 1 else math.nan
    found |= {'distinct_2': ngrams.distinct(samples, 2), 'distinct_2_real': ngrams.distinct(real, 2)}
    found['collapsed'] = float(found['distinct_2'] < found['distinct_2_real'] / 2)
    found['vocabulary_distance'] = float(sums['vocabulary_distance']) / float(sums['count'])
    names = [name for name in sums if name.startswith('samples_') and 'mean' in name]
    pairs = [pair for name in names for pair in blocks(sums[name], sums[name.replace('samples', 'real')])]
    found['diversity'] = sum(pairwise(x) / max(pairwise(y), 1e-8) for x, y in pairs) / len(pairs)
    for x, y in pairs:
        for temperature, rms in drift(x[None], y[None], floor=0.0)[2].items():
            name = f'field_{temperature}'
            found[name] = found.get(name, 0.0) + float(rms) / len(pairs)
    return found
