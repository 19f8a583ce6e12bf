"""
Generative modeling via drifting: real samples attract and generated samples repel each other, and a generator is trained
until this field is zero at its samples. Deng, Li, Li, Du, He, arXiv 2602.04770.

Here: the field as a pure function, the features of text that it is computed in, how outputs become embeddings, and the
objective of model_type drifting. Token drift, the same field on a masked diffusion model, is at the end of the targets.
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanodrift import ngrams
from nanodrift.data import derive_seed
from nanodrift.kernels import padded_vocab_size, rows_per_chunk
from nanodrift.machine import Ranks, compute_dtype, exact
from nanodrift.metrics import Mean, Rows
from nanodrift.options import UserError, split_numbers

DEFAULT_TEMPERATURES = '0.02,0.05,0.2'  # in mean distances, as published
TEMPERATURES = split_numbers(DEFAULT_TEMPERATURES, float)
LEAST_TEMPERATURE = 1e-6  # below, distances in its units overflow float32
AFFINITY_FLOOR = 1e-3
LEAST_SCALE = 1e-3
SELF_DISTANCE = 100.0  # added to the distance of a sample from itself
POSITIONS = 32  # positions whose states, or stacks of tokens, are features of their own
WINDOWS = (4, 16)
STACKS = (2, 4)  # neighbouring tokens whose embeddings together are a feature
POSITIONS_PER_SET = 4  # positions whose stacks form one feature set: with four times the points the field is less noisy
QUEUE = 1000  # how many examples before those of an iteration additional positives are drawn from
STYLES, STYLE_INDICES = 64, 32
MEASURED = 256  # samples whose field and distances are measured together: both depend on how many there are
ALONE = Ranks()  # one process
SHARPNESS = 3.0  # of the softmax over the vocabulary: see `nearness`


# ---------------------------------------------------------------------------------------------------------------------
# the field

def distances(x, y):
    """Euclidean distances (..., N, M) of x (..., N, D) and y (..., M, D), the root of at least 1e-8."""
    square = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT
    return square.clamp(min=1e-8).sqrt()


def softmax_over_rows(logits, ranks):
    """The softmax of logits (..., n, M) over dimension -2, of which each rank has n rows."""
    if ranks.world_size == 1:
        return logits.softmax(-2)
    e = (logits - ranks.max(logits.amax(-2, keepdim=True))).exp()
    return e / ranks.sum(e.sum(-2, keepdim=True))


def field(away, toward, positive, negative, temperature, floor, ranks=ALONE):
    """
    V (..., N, D) at N samples: attraction by `positive` (..., P, D), repulsion by `negative` (..., M, D). toward (..., N, P)
    and away (..., N, M): the samples' distances from these. Other ranks have other samples.

    V = S- sum A+ y+ - S+ sum A- y-, where A = sqrt(softmax over columns * softmax over rows) of -distance / temperature over
    [negative | positive] jointly, and S are the row sums of each group (algorithm 1 of the paper). The coefficients of each
    row sum to zero.
    """
    logits = -torch.cat((away, toward), dim=-1) / temperature
    affinity = (logits.softmax(-1) * softmax_over_rows(logits, ranks)).sqrt().clamp(min=floor)
    push, pull = affinity.split((negative.size(-2), positive.size(-2)), dim=-1)
    return push.sum(-1, keepdim=True) * (pull @ positive) - pull.sum(-1, keepdim=True) * (push @ negative)


@torch.no_grad()
def drift(x, positive, temperatures=TEMPERATURES, floor=AFFINITY_FLOOR, ranks=ALONE):
    """
    The field of a feature set at its own samples x (S, n, D), in float32 -> targets (S, n, D) in scaled features, the scale
    that features are divided by, and {temperature: root mean square of the unnormalised field}. A leading dimension G of x
    stacks feature sets of one shape: (G, S, n, D) -> (G, S, n, D), (G,), {temperature: (G,)}.

    The field of each temperature (in units of the mean distance) is divided by its own root mean square. A loss against
    these targets therefore does not measure progress; the unnormalised field does.

    Ranks have one field together. Each knows the samples and positives of all, and computes the rows of its own samples;
    what it takes from the others' rows are means, and maxima and sums of columns.
    """
    with exact(x.device):
        x, start, of_a_set = x.float(), ranks.rank * x.size(-2), (-3, -2, -1)
        everyone, positive = ranks.concatenate(x, dim=-2), ranks.concatenate(positive.float(), dim=-2)  # (..., S, N, D)
        middle = torch.cat((everyone, positive), dim=-2).mean(-2, keepdim=True)  # large offsets would cost digits
        everyone, positive = everyone - middle, positive - middle
        near = everyone.narrow(-2, start, x.size(-2))
        away, toward = distances(near, everyone), distances(near, positive)  # (..., S, n, N) and (..., S, n, P)
        mean = ranks.mean(torch.cat((away, toward), dim=-1).mean(of_a_set, keepdim=True))
        scale = (mean / math.sqrt(x.size(-1))).clamp(min=LEAST_SCALE)
        unit = mean.clamp(min=LEAST_SCALE)
        itself = torch.eye(*away.shape[-2:], device=x.device).roll(start, dims=1)
        away = away + SELF_DISTANCE * unit * itself
        total, rms = torch.zeros_like(x), {}
        for temperature in temperatures:
            raw = field(away, toward, positive, everyone, temperature * unit, floor, ranks) / scale
            square = ranks.mean(raw.square().mean(of_a_set, keepdim=True))
            rms[temperature] = square.sqrt()[..., 0, 0, 0]
            total += raw / square.clamp(min=1e-8).sqrt()
        return x / scale + total, scale[..., 0, 0, 0], rms


# ---------------------------------------------------------------------------------------------------------------------
# features of text

def hidden_states(encoder, embeddings, depths):
    """Hidden states (B, T, C) of a frozen GPT after the blocks numbered in `depths`, in rising order. The encoder adds its
    positions to the input embeddings (B, T, C); the last block's states are taken after the final norm."""
    x, states = embeddings + encoder.transformer.wpe.weight[:embeddings.size(1)], []
    for number, block in enumerate(encoder.layers, start=1):
        x = block(x)
        if number in depths:
            states.append(encoder.transformer.ln_f(x) if number == len(encoder.layers) else x)
    return states


def feature_depths(n_layer):
    """After which blocks of the encoder states are taken: a quarter, half, three quarters, all."""
    return sorted({max(1, round(n_layer * share)) for share in (0.25, 0.5, 0.75, 1.0)})


def mean_and_std(x, dim):
    mean = x.mean(dim, keepdim=True)
    return mean.squeeze(dim), ((x - mean).square().mean(dim) + 1e-6).sqrt()  # var() takes several times as long


def take(x, index):
    """x[:, index] of x (B, T, ...) for indices on the CPU, without a wait for the GPU. A non-blocking copy to Metal may run
    after the indices were freed, so there it blocks."""
    return x[:, index.to(x.device, non_blocking=x.device.type != 'mps')]


def pool(states, positions):
    """Hidden states (B, T, C) of one depth -> {name: feature set (S, B, C)}: states at `positions`, mean and deviation over
    the whole and over windows."""
    B, T, C = states.shape
    pooled = {'position': take(states, positions).transpose(0, 1)}
    for length in (T, *(w for w in WINDOWS if w < T)):
        windows = states[:, :T - T % length].view(B, T // length, length, C).transpose(0, 1)
        for name, values in zip(('mean', 'std'), mean_and_std(windows, 2)):
            pooled[f'{name}_{length}'] = values
    return pooled


def state_features(encoder, embeddings, positions):
    """{name: feature set (S, B, C)} of the hidden states that a frozen GPT has for input embeddings (B, T, C)."""
    depths, features = feature_depths(encoder.config.n_layer), {}
    for depth, states in zip(depths, hidden_states(encoder, embeddings, depths)):
        features |= {f'{depth}_{name}': values for name, values in pool(states, positions).items()}
    return features


def token_features(encoder, embeddings, positions):
    """
    Embeddings (B, T, C) -> {name: feature set (S, n*B, k*C)}: stacks, which are the embeddings of k neighbouring tokens side
    by side, at n = POSITIONS_PER_SET positions in a set. A field in them acts on n-grams. Unlike hidden states they are
    linear in the embeddings, so a gradient stays valid as far as the next token.

    The ends are padded with zeros. The stack of a position ends at it; the first k-1 positions also have a stack past the
    end of the text, so every token is in equally many stacks.
    """
    features, T = {}, embeddings.size(1)
    for k in STACKS:
        stacks = F.pad(embeddings, (0, 0, k - 1, k - 1)).unfold(1, k, 1).mT.flatten(2)  # (B, T+k-1, k*C)
        features[f'tokens_{k}'] = group_positions(take(stacks, torch.cat((positions, positions[positions < k - 1] + T))))
    return features


def group_positions(x):
    """Features (B, P, D) at P positions -> sets (S, n*B, D) of n = POSITIONS_PER_SET of them each, or of all where there are
    fewer. Where n does not divide P, the last set shares some with the one before, and these count twice."""
    n = min(POSITIONS_PER_SET, x.size(1))
    starts = torch.tensor([*range(0, x.size(1) - n, n), x.size(1) - n])
    sets = take(x, starts[:, None] + torch.arange(n))  # (B, S, n, D)
    return sets.transpose(0, 1).flatten(1, 2)


def both_features(encoder, embeddings, positions):
    return state_features(encoder, embeddings, positions) | token_features(encoder, embeddings, positions)


# feature_kind -> (encoder, embeddings (B, T, C), positions) -> {name: feature set (S, N, D)}, N being B times the positions
# in a set
FEATURES = {'states': state_features, 'tokens': token_features, 'both': both_features}


# ---------------------------------------------------------------------------------------------------------------------
# outputs of a model as embeddings

def expected_embedding(x, embedding, logits_of):
    """x (N, C), embeddings (V, C') -> mean embeddings (N, C') under the softmax of logits_of(x) (N, V). Logits are large:
    they are computed in chunks, and again in the backward pass."""
    table = embedding.to(compute_dtype(embedding))  # once, where autocast would convert it for every chunk

    def mean(chunk):
        return (logits_of(chunk).float().softmax(-1).to(table.dtype) @ table).to(embedding.dtype)
    chunks = x.split(rows_per_chunk(len(embedding)))
    return torch.cat([checkpoint(mean, chunk, use_reentrant=False) for chunk in chunks])


@torch.no_grad()
def argmax_embedding(x, embedding, logits_of):
    """The embeddings (B, T, C) of the largest logits of outputs x (B, T, C)."""
    chunks = x.flatten(0, 1).split(rows_per_chunk(len(embedding), x.device))
    return embedding[torch.cat([logits_of(chunk).argmax(-1) for chunk in chunks])].view(x.shape)


def nearness(x, middle, directions, padding_bias):
    """Logits (N, V): cosines between outputs x (N, C) and embeddings, both centred on the mean embedding, `middle` (C,),
    scaled so that those of a random direction have standard deviation SHARPNESS. Unscaled, all outputs would start near the
    mean, where the field cannot separate them. directions (V, C) are the embeddings centred and of length 1;
    padding_bias (V,) is -inf in rows that are padding, else 0."""
    cosines = F.linear(F.normalize((x - middle).float(), dim=-1), directions, padding_bias)
    return cosines * SHARPNESS * math.sqrt(directions.size(1))


def output_embeddings(x, vocabulary, output):
    """What drift_output makes of outputs x (B, T, C) and the embeddings (V, C) of the vocabulary -> (B, T, C)."""
    if output == 'embedding':
        return x
    # converted and padded once, and not in every chunk: tensor cores want round sizes
    middle, dtype = vocabulary.mean(0), compute_dtype(vocabulary)
    spare = padded_vocab_size(len(vocabulary)) - len(vocabulary)
    directions = F.pad(F.normalize((vocabulary - middle).float(), dim=-1), (0, 0, 0, spare)).to(dtype)
    padding_bias = F.pad(directions.new_zeros(len(vocabulary)), (0, spare), value=-math.inf)
    vocabulary = F.pad(vocabulary, (0, 0, 0, spare))
    logits_of = partial(nearness, middle=middle, directions=directions, padding_bias=padding_bias)
    soft = expected_embedding(x.flatten(0, 1), vocabulary, logits_of).view(x.shape)
    if output == 'soft':
        return soft
    assert output == 'straight', 'one of the choices of drift_output'
    return argmax_embedding(x, vocabulary, logits_of) + soft - soft.detach()  # value of the argmax, gradient of the mean


def nearest(x, vocabulary, draw=None):
    """For embeddings x (B, T, C): the cosine with the nearest vocabulary embedding and its id, (B, T) each. With `draw`, a
    function cosines (N, V) -> ids (N,) called on the CPU, ids are drawn by it instead."""
    vocabulary = F.normalize(vocabulary.float(), dim=-1)
    chunks = []
    for chunk in F.normalize(x.float(), dim=-1).flatten(0, 1).split(rows_per_chunk(len(vocabulary))):
        with exact(x.device):
            cosines = chunk @ vocabulary.t()
        ids = cosines.argmax(-1) if draw is None else draw(cosines.cpu()).to(x.device)
        chunks.append((cosines.gather(1, ids[:, None]).squeeze(1), ids))
    return [torch.cat(pieces).view(x.shape[:2]) for pieces in zip(*chunks)]


def freeze_encoder(encoder, config):
    """Freezes the encoder of a model of this GPTConfig. Raises UserError where it does not fit."""
    if encoder is None:
        assert not config.has_encoder, 'this type needs GPT(config, encoder): see load_encoder'
        return
    encoder.requires_grad_(False)
    for name in ('n_embd', 'vocab_size') if config.outputs_embeddings else ('vocab_size',):
        theirs, mine = getattr(encoder.config, name), getattr(config, name)
        if theirs != mine:
            raise UserError(f'encoder={config.encoder} has {name}={theirs}, not {mine}: it must have the same')
    if encoder.config.block_size < config.block_size:
        raise UserError(f'encoder={config.encoder} reads {encoder.config.block_size} tokens at most: lower --block_size')


# ---------------------------------------------------------------------------------------------------------------------
# batches and targets

@dataclass
class Field:
    """The targets of one micro-batch: for each feature set the targets (S, N, D) and the scale; the positions, on the CPU,
    whose states or stacks are features; ids: the given prefix (B, P), or for token drift the real text (B, T)."""
    targets: dict
    scales: dict
    positions: torch.Tensor
    ids: torch.Tensor


def drift_loss(model, embeddings, field_):
    """Sum over feature sets of the mean squared distance of the features of embeddings (B, T, C) from the targets of their
    Field; gradients flow through the features alone."""
    features = FEATURES[model.config.drift_features](model.encoder, embeddings, field_.positions)
    return sum((features[name].float() / scale - field_.targets[name]).square().mean()
               for name, scale in field_.scales.items())


def make_batch(tokens, rng, part=(0, 1), *, n_embd, extra=0):
    """tokens (B+extra, T) -> noise (B, T, C), style indices (B, 32), real ids (B+extra, T). Real ids past the first B are
    the additional positives, chosen by `examples`."""
    B = len(tokens) - extra
    noise = torch.randn(B, tokens.size(1), n_embd, generator=rng)
    return noise, torch.randint(STYLES, (B, STYLE_INDICES), generator=rng), tokens


def device_batch(tokens, part, device, *, n_embd, extra=0):
    """`make_batch` for a GPU, where the noise is made: a CPU is slow at it, and the copy would be the largest of a step.

    A row's noise comes from a seed of its own, by its number among the rows of the iteration, so it is the same however
    these are split into micro-batches and ranks. One launch per row is cheaper than drawing the noise of all rows of the
    iteration and slicing, which would be done again for every micro-batch. The style indices are few enough for that."""
    (i, n, seed), B = part, len(tokens) - extra
    noise, generator = torch.empty(B, tokens.size(1), n_embd, device=device), torch.Generator(device)
    for number, row in enumerate(noise, start=i * B):
        row.normal_(generator=generator.manual_seed(derive_seed(seed, number)))
    style = torch.randint(STYLES, (n * B, STYLE_INDICES), generator=torch.Generator().manual_seed(seed))
    return noise, style[i * B:(i + 1) * B], tokens


def examples(own, start, rng, *, extra):
    """Numbers of the examples of a micro-batch: its own (a range), and `extra` drawn from the QUEUE examples before its
    iteration, which starts at `start`; in the first iteration, which has none before it, from those up to its own. This
    replaces the published queue, without state to save."""
    low, high = (max(0, start - QUEUE), start) if start else (0, own[-1] + 1)
    count = high - low
    enough = extra <= count
    more = torch.randperm(count, generator=rng)[:extra] if enough else torch.randint(count, (extra,), generator=rng)
    return [*own, *(low + more).tolist()]


def random_positions(x, rng):
    """Of x (B, T, ...), on the CPU."""
    return torch.randperm(x.size(1), generator=rng)[:POSITIONS].sort().values


def make_fields(generated, real, positions, ids, ranks, config):
    """One Field per micro-batch of this rank. The field is computed over all micro-batches of all ranks. generated, real:
    lists with the features of each micro-batch; ids: the list of their ids."""
    fields = [Field({}, {}, positions, chunk) for chunk in ids]
    together = {}  # names of the feature sets of each shape
    for name, values in generated[0].items():
        together.setdefault(values.shape, []).append(name)
    temperatures = split_numbers(config.drift_temperatures, float)
    for names in together.values():
        x, positive = (torch.stack([torch.cat([features[name] for features in each], dim=1) for name in names])
                       for each in (generated, real))
        targets, scales, _ = drift(x, positive, temperatures, config.drift_floor, ranks)
        for name, of_set, scale in zip(names, targets, scales):
            for field_, chunk in zip(fields, of_set.chunk(len(fields), dim=1)):
                field_.targets[name], field_.scales[name] = chunk, scale
    return fields


@torch.no_grad()
def exchanged_bytes(encoder, config):
    """Bytes that a rank sends to each other rank for one text: its features and those of real text, in float32,
    which `drift` gathers, and for each temperature two all-reduces over columns, which send each number twice."""
    embeddings = torch.empty(1, config.block_size, config.n_embd, device=encoder.device)
    features = FEATURES[config.drift_features](encoder, embeddings, torch.arange(min(POSITIONS, config.block_size)))
    per_point = 4 * len(split_numbers(config.drift_temperatures, float))
    return 2 * 4 * sum(x.size(0) * x.size(1) * (x.size(2) + per_point) for x in features.values())


@torch.no_grad()
def compute_drift_targets(model, batches, ranks, rng):
    """Turns the real ids of each micro-batch of an iteration into its Field, over all micro-batches and ranks together.
    `rng` is the same on all ranks."""
    positions, features = random_positions(batches[0][0], rng), FEATURES[model.config.drift_features]
    length = int(torch.randint(model.config.drift_prefix + 1, (), generator=rng))
    generated, real, prefixes = [], [], []
    for noise, style, ids in batches:
        prefixes.append(ids[:len(noise), :length])
        generated.append(features(model.encoder, model.embeddings(noise, style, prefixes[-1]), positions))
        real.append(features(model.encoder, model.encoder.transformer.wte(ids), positions))
    fields = make_fields(generated, real, positions, prefixes, ranks, model.config)
    return [(noise, style, field_) for (noise, style, _), field_ in zip(batches, fields)]


@torch.no_grad()
def compute_token_drift_targets(model, batches, ranks, rng):
    """Token drift (arXiv 2605.19470): the same for corrupted ids, real ids and weights of the bound."""
    positions, features = random_positions(batches[0][0], rng), FEATURES[model.config.drift_features]
    generated = [features(model.encoder, model.soft_tokens(X, model.trunk(X)), positions) for X, _, _ in batches]
    real = [features(model.encoder, model.encoder.transformer.wte(Y), positions) for _, Y, _ in batches]
    fields = make_fields(generated, real, positions, [Y for _, Y, _ in batches], ranks, model.config)
    return [(X, field_, W) for (X, _, W), field_ in zip(batches, fields)]


# ---------------------------------------------------------------------------------------------------------------------
# what is measured

def measure(model, noise, style, ids, calibrated=False):
    """Samples and real text: their ids and, for each depth, their hidden states averaged over positions."""
    x, position = model.embeddings(noise, style), torch.arange(1)  # any one: only means are used
    metrics = {}
    for name, embeddings in (('samples', x), ('real', model.encoder.transformer.wte(ids))):
        for feature, values in state_features(model.encoder, embeddings, position).items():
            if feature.endswith(f'mean_{noise.size(1)}'):
                metrics[name, feature] = Rows(values[0].float().cpu())
    cosine, ids_of_samples = nearest(x, model.vocabulary)
    distance = (1 - cosine.mean(1)).cpu().double().sum()
    return metrics | {'vocabulary_distance': Mean(distance, torch.tensor(float(len(noise)))),
                      'samples': Rows(ids_of_samples.cpu()), 'real': Rows(ids.cpu())}


def mean_distance(x):
    """Between different samples (N, D)."""
    with exact(x.device):
        return float(distances(x, x).fill_diagonal_(0).sum() / max(1, len(x) * (len(x) - 1)))


def paired_blocks(x, y):
    """Pairs of blocks of MEASURED rows of x and y (N, D), or of all rows where there are fewer."""
    whole = max(1, len(x) // MEASURED) * MEASURED
    return list(zip(x[:whole].split(MEASURED), y[:whole].split(MEASURED)))


def summary(metrics):
    """
    js_1, js_2 (the val_metric), js_3: n-gram divergence from real text. floor: js_2 between two halves of the real text,
        slightly too high because each half is smaller.
    distinct_2: share of different 2-grams; collapsed: whether it is below half of real text's.
    diversity: mean distance between samples, divided by that of real text. field_R: root mean square of the unnormalised
        field at temperature R. Both use hidden states and TEMPERATURES, whatever the model was trained with, and average
        over depths and blocks of samples. The field has no floor here, because a floor makes it grow with the number of
        samples.
    """
    samples, real = metrics['samples'].rows.numpy(), metrics['real'].rows.numpy()
    numbers = {f'js_{k}': ngrams.divergence(samples, real, k) for k in (1, 2, 3)}
    numbers['floor'] = ngrams.divergence(real[::2], real[1::2], 2) if len(real) > 1 else math.nan
    numbers |= {'distinct_2': ngrams.distinct(samples, 2), 'distinct_2_real': ngrams.distinct(real, 2)}
    numbers['collapsed'] = float(numbers['distinct_2'] < numbers['distinct_2_real'] / 2)
    numbers['vocabulary_distance'] = metrics['vocabulary_distance'].value()
    features = [name[1] for name in metrics if isinstance(name, tuple) and name[0] == 'samples']
    pairs = [pair for name in features
             for pair in paired_blocks(metrics['samples', name].rows, metrics['real', name].rows)]
    numbers['diversity'] = sum(mean_distance(x) / max(mean_distance(y), 1e-8) for x, y in pairs) / len(pairs)
    for x, y in pairs:
        for temperature, rms in drift(x[None], y[None], floor=0.0)[2].items():
            name = f'field_{temperature}'
            numbers[name] = numbers.get(name, 0.0) + float(rms) / len(pairs)
    return numbers
