"""Drifting: the field against the formula and its known properties, the generator, the targets of an iteration, one-step
samples."""
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, resume
from test_machine import finish

import generate_diffusion
import sample
import train
from model import GPT, Generator, GPTConfig, load_encoder, load_model
from nanodrift import checkpoint, drifting, ngrams
from nanodrift.drifting import (
    AFFINITY_FLOOR,
    FEATURES,
    SELF_DISTANCE,
    SHARPNESS,
    TEMPERATURES,
    Field,
    compute_drift_targets,
    compute_token_drift_targets,
    device_batch,
    distances,
    drift,
    drift_loss,
    examples,
    feature_depths,
    hidden_states,
    make_batch,
    mean_distance,
    nearest,
    pool,
)
from nanodrift.machine import Ranks, setup_ranks
from nanodrift.metrics import Mean, Rows
from nanodrift.objectives import nelbo_batch
from nanodrift.options import UserError
from train import Trainer


def points(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rng(seed=3):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# the raw field

def raw_field(x, positive, negative, temperature, floor=AFFINITY_FLOOR, self_distance=None):
    """The field at x (N, D). `self_distance` is added to the distance of x_i from negative_i, where both are the same
    samples."""
    away = distances(x, negative)
    if self_distance is not None:
        away = away + self_distance * torch.eye(len(x))
    return drifting.field(away, distances(x, positive), positive, negative, temperature, floor)


def field_in_a_loop(x, positive, negative, temperature, floor, self_distance=0.0):
    """Algorithm 1 of the paper, one pair at a time, in Python floats."""
    targets = [*negative.tolist(), *positive.tolist()]
    n = len(negative)
    logits = [[-(max(1e-4, math.dist(a, b)) + (self_distance if i == j and j < n else 0.0)) / temperature
               for j, b in enumerate(targets)] for i, a in enumerate(x.tolist())]
    rows = [sum(map(math.exp, row)) for row in logits]
    columns = [sum(math.exp(row[j]) for row in logits) for j in range(len(targets))]
    field = []
    for i, row in enumerate(logits):
        A = [max(floor, math.sqrt(math.exp(v) / rows[i] * math.exp(v) / columns[j])) for j, v in enumerate(row)]
        minus, plus = sum(A[:n]), sum(A[n:])
        field.append([minus * sum(A[n + j] * p[d] for j, p in enumerate(positive.tolist()))
                      - plus * sum(A[j] * p[d] for j, p in enumerate(negative.tolist())) for d in range(x.size(1))])
    return torch.tensor(field, dtype=torch.float64)


@pytest.mark.parametrize('floor', [0.0, AFFINITY_FLOOR, 0.1])
@pytest.mark.parametrize('self_distance', [None, 3.0])
def test_the_field_is_its_formula(floor, self_distance):
    x, positive = points(5, 3), points(7, 3, seed=1)
    negative = x if self_distance else points(4, 3, seed=2)
    V = raw_field(x, positive, negative, 0.7, floor, self_distance)
    assert torch.allclose(V, field_in_a_loop(x, positive, negative, 0.7, floor, self_distance or 0.0), atol=1e-9)


def test_exchanging_the_groups_negates_it_and_equal_groups_leave_nothing():
    x, a, b = points(6, 4), points(9, 4, seed=1), points(9, 4, seed=2)
    assert torch.allclose(raw_field(x, a, b, 0.5), -raw_field(x, b, a, 0.5), atol=1e-12)
    assert raw_field(x, a, a, 0.5).abs().max() < 1e-12
    assert raw_field(x, a, b, 0.5).abs().max() > 1e-3


def test_it_moves_turns_and_grows_with_its_points():
    x, a, b = points(6, 4), points(9, 4, seed=1), points(8, 4, seed=2)
    V = raw_field(x, a, b, 0.5)
    shift = points(4, seed=3) * 5
    assert torch.allclose(raw_field(x + shift, a + shift, b + shift, 0.5), V, atol=1e-9)
    assert torch.allclose(raw_field(3 * x, 3 * a, 3 * b, 1.5), 3 * V, atol=1e-9)
    Q, _ = torch.linalg.qr(points(4, 4, seed=4))
    assert torch.allclose(raw_field(x @ Q, a @ Q, b @ Q, 0.5), V @ Q, atol=1e-9)
    order = torch.randperm(6)
    assert torch.allclose(raw_field(x[order], a.flip(0), b.flip(0), 0.5), V[order], atol=1e-9)


def test_coefficients_of_a_row_sum_to_zero():
    """Then a constant added to all targets, and not to x, changes nothing but through the distances: the field of targets
    with a further coordinate that is the same for all has nothing there."""
    x, a, b = points(6, 4), points(9, 4, seed=1), points(8, 4, seed=2)
    further = [torch.cat((p, torch.full((len(p), 1), 7.0, dtype=p.dtype)), 1) for p in (x, a, b)]
    V = raw_field(*further, 0.5)
    assert V[:, -1].abs().max() < 1e-12
    assert torch.allclose(V[:, :-1], raw_field(x, a, b, 0.5), atol=1e-9)


def test_a_sample_hardly_repels_itself():
    x, a = points(6, 4), points(9, 4, seed=1)
    logits = -(torch.cat((distances(x, x) + SELF_DISTANCE * torch.eye(6), distances(x, a)), 1)) / 0.2
    affinity = (logits.softmax(-1) * logits.softmax(-2)).sqrt().clamp(min=AFFINITY_FLOOR)
    assert torch.equal(affinity.diagonal(), torch.full((6,), AFFINITY_FLOOR, dtype=affinity.dtype))
    assert not torch.allclose(raw_field(x, a, x, 0.2, self_distance=SELF_DISTANCE), raw_field(x, a, x, 0.2))


def test_between_samples_of_one_distribution_it_falls_with_their_root():
    def rms(n):
        pairs = [(points(n, 2, seed=10 + s), points(n, 2, seed=50 + s)) for s in range(12)]
        fields = [raw_field(x, real, x, 0.2, 0.0, SELF_DISTANCE) for x, real in pairs]
        return float(torch.stack([V.square().mean() for V in fields]).mean().sqrt())
    small, large = rms(32), rms(512)
    assert 2.5 < small / large < 6.5  # 4 is expected


def test_points_that_it_moves_come_to_stand_as_the_data_do_and_by_attraction_alone_collapse():
    data = points(300, 2)
    both = alone = 0.3 * points(300, 2, seed=1) + 3
    for _ in range(300):
        V = raw_field(both, data, both, 0.5, 0.0, SELF_DISTANCE)
        both = both + 0.1 * V / V.square().mean().sqrt().clamp(min=0.05)
        alone = alone + 0.1 * ((-distances(alone, data) / 0.5).softmax(-1) @ data - alone)
    assert both.mean(0).norm() < 0.2 and both.std(0).numpy() == pytest.approx(data.std(0).numpy(), rel=0.2)
    assert (alone.std(0) < 0.7 * data.std(0)).all()


# ---------------------------------------------------------------------------------------------------------------------
# the normalised drift

def test_one_temperature_gives_a_loss_of_one_and_three_no_more_than_nine():
    x, a = points(2, 30, 8), points(2, 40, 8, seed=1)
    for temperatures in ((0.2,), (0.05,), TEMPERATURES):
        targets, scale, _ = drift(x, a, temperatures)
        loss = (x.float() / scale - targets).square().mean()
        if len(temperatures) == 1:
            assert loss == pytest.approx(1, abs=1e-3)
        assert 0.5 < loss <= len(temperatures) ** 2 + 1e-3


def test_features_ten_times_as_large_have_the_same_drift():
    x, a = points(1, 30, 8), points(1, 40, 8, seed=1)
    (mine, scale, rms), (theirs, larger, rms_10) = drift(x, a), drift(10 * x, 10 * a)
    assert torch.allclose(mine, theirs, atol=1e-3) and larger / scale == pytest.approx(10, rel=1e-4)
    assert all(rms[t] == pytest.approx(float(rms_10[t]), rel=1e-3) for t in TEMPERATURES)
    assert (x / scale).std() == pytest.approx(1 / math.sqrt(2), rel=0.1)  # a mean distance of sqrt(D)


def test_it_is_the_raw_field_of_scaled_features():
    x, a = points(20, 6), points(25, 6, seed=1)
    targets, scale, rms = drift(x[None], a[None], (0.2,))
    mean = torch.cat((distances(x, x), distances(x, a)), 1).mean()
    assert scale == pytest.approx(float(mean / math.sqrt(6)), rel=1e-5)
    y, b, unit = x / float(scale), a / float(scale), math.sqrt(6)
    V = raw_field(y, b, y, 0.2 * unit, self_distance=SELF_DISTANCE * unit)
    assert rms[0.2] == pytest.approx(float(V.square().mean().sqrt()), rel=1e-4)
    assert torch.allclose(targets[0], (y + V / V.square().mean().sqrt()).float(), atol=1e-4)


@pytest.fixture
def loss_of(monkeypatch):
    """loss_of(x, targets, scale) -> the loss of one feature set x (S, N, D), whatever it is a feature of."""
    monkeypatch.setitem(FEATURES, 'given', lambda encoder, x, positions: {'f': x})
    model = SimpleNamespace(config=SimpleNamespace(drift_features='given'), encoder=None)
    return lambda x, targets, scale: drift_loss(model, x, Field({'f': targets}, {'f': scale}, torch.arange(1), None))


def test_no_gradient_reaches_the_targets_or_the_scale(loss_of):
    x = points(1, 10, 4, dtype=torch.float32).requires_grad_()
    targets, scale, _ = drift(x, points(1, 10, 4, seed=1, dtype=torch.float32))
    assert not targets.requires_grad and not scale.requires_grad
    grad, = torch.autograd.grad(loss_of(x, targets, scale), x)
    assert torch.allclose(grad, 2 * (x.detach() / scale - targets) / scale / x.numel(), atol=1e-6)


def test_inside_bfloat16_autocast_it_is_float32(loss_of):
    x, a = points(1, 20, 16, dtype=torch.float32), points(1, 20, 16, seed=1, dtype=torch.float32)
    plain = drift(x, a)[0]
    with torch.autocast('cpu', torch.bfloat16):
        inside, scale, _ = drift(x, a)
        assert inside.dtype == torch.float32 and torch.equal(inside, plain)
        assert loss_of(x.bfloat16(), inside, scale).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# features

def test_pooling_is_that_of_a_loop():
    states = points(3, 18, 5, dtype=torch.float32)
    pooled = pool(states, torch.tensor([0, 7, 17]))
    assert torch.equal(pooled['position'], states[:, [0, 7, 17]].transpose(0, 1))
    assert set(pooled) == {'position', 'mean_18', 'std_18', 'mean_4', 'std_4', 'mean_16', 'std_16'}
    for length in (18, 4, 16):
        for s in range(18 // length):
            window = states[:, s * length:(s + 1) * length]
            assert torch.allclose(pooled[f'mean_{length}'][s], window.mean(1), atol=1e-6)
            assert torch.allclose(pooled[f'std_{length}'][s], (window.var(1, unbiased=False) + 1e-6).sqrt(), atol=1e-6)


def test_depths_are_quarters():
    assert [feature_depths(n) for n in (12, 4, 2, 1)] == [[3, 6, 9, 12], [1, 2, 3, 4], [1, 2], [1]]


def test_ids_and_their_embeddings_have_the_same_features(encoder):
    model = load_encoder(encoder)
    ids = torch.randint(200, (3, 16))
    states = hidden_states(model, model.transformer.wte(ids), [1, 2])
    assert torch.allclose(states[-1], model.trunk(ids), atol=1e-6)
    features = FEATURES['states'](model, model.transformer.wte(ids), torch.arange(4))
    assert {name.split('_')[0] for name in features} == {'1', '2'}
    assert all(values.size(1) == 3 for values in features.values())


def test_embeddings_of_neighbouring_tokens_stand_side_by_side(encoder):
    model = load_encoder(encoder)
    ids, positions = torch.randint(200, (3, 16)), torch.tensor([0, 1, 5, 11, 13])
    features = FEATURES['tokens'](model, model.transformer.wte(ids), positions)
    table, nothing = model.transformer.wte.weight, torch.zeros(16)

    def stack(row, last, k):
        return torch.cat([table[row[i]] if 0 <= i < 16 else nothing for i in range(last - k + 1, last + 1)])
    lasts = {2: [0, 1, 5, 11, 13, 16], 4: [0, 1, 5, 11, 13, 16, 17]}  # which positions their stacks end at
    for k, each in lasts.items():
        sets = [each[:4], each[-4:]]  # four together, and the rest with as many before them as there are to be four
        wanted = [torch.stack([stack(row, last, k) for row in ids for last in some]) for some in sets]
        assert torch.equal(features[f'tokens_{k}'], torch.stack(wanted))
    short = FEATURES['tokens'](model, model.transformer.wte(ids[:, :3]), torch.arange(3))
    assert short['tokens_4'].shape == (2, 12, 64)
    both = FEATURES['both'](model, model.transformer.wte(ids), positions)
    assert set(both) == set(features) | set(FEATURES['states'](model, model.transformer.wte(ids), positions))


def test_every_token_is_in_as_many_stacks(encoder):
    embeddings = torch.randn(1, 16, 16, requires_grad=True)
    FEATURES['tokens'](load_encoder(encoder), embeddings, torch.arange(16))['tokens_4'].sum().backward()
    counts = embeddings.grad[0, :, 0]
    assert counts.min() >= 4


# ---------------------------------------------------------------------------------------------------------------------
# the generator

def make(encoder, **options):
    torch.manual_seed(0)
    sizes = dict(model_type='drifting', encoder=encoder, block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16)
    config = GPTConfig(**sizes | options)
    return GPT(config, load_encoder(config.encoder))


def noise_and_style(count=4, length=16):
    return make_batch(torch.zeros(count, length, dtype=torch.long), rng(1), n_embd=16)[:2]


def test_noise_made_on_a_gpu_is_normal_and_another_for_each_row_and_iteration():
    tokens = torch.zeros(40, 16, dtype=torch.long)
    noise, style, _ = device_batch(tokens, (1, 2, 5), 'cpu', n_embd=64)
    other, other_style, _ = device_batch(tokens, (1, 2, 6), 'cpu', n_embd=64)
    assert abs(noise.mean()) < 0.02 and noise.std() == pytest.approx(1, abs=0.02)
    rows = torch.cat((noise, other)).flatten(1)
    assert (torch.corrcoef(rows) - torch.eye(80)).abs().max() < 0.2  # 1 / sqrt(16 * 64) is 0.03
    assert len(style.unique()) == 64 and not torch.equal(style, other_style) and len(style.unique(dim=0)) == 40


def raw_outputs(generator, noise, style):
    """What a generator without a prefix gives, (B, T, C)."""
    return generator(noise, style, None, generator.h)


@torch.no_grad()
def open_up(model):
    """Gates open; where heads would look no farther than beside them, what comes from afar would be small."""
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)


@pytest.mark.parametrize('C', [16, 768])
def test_it_starts_around_the_mean_embedding_spread_as_the_vocabulary_is(C):
    torch.manual_seed(0)
    config = GPTConfig(model_type='drifting', encoder='x', block_size=64, n_layer=1, n_head=2, n_embd=C)
    generator, vocabulary = Generator(config), torch.randn(300, C) * 0.14 + torch.randn(C)
    generator.start_at(vocabulary)
    off = raw_outputs(generator, torch.randn(4, 64, C), torch.randint(64, (4, 32))) - vocabulary.mean(0)
    assert off.square().mean().sqrt().item() == pytest.approx(0.14, rel=0.3)
    assert off.mean((0, 1)).square().mean().sqrt().item() < 0.08


def test_nearest_is_exact_inside_bfloat16_autocast(encoder):
    model = make(encoder)
    x = torch.randn(5, 16, 16) + 300 * torch.eye(16)[0]
    cosine, ids = nearest(x, model.vocabulary)
    with torch.autocast('cpu', torch.bfloat16):
        inside, same = nearest(x, model.vocabulary)
        apart = mean_distance(x[0])
    assert torch.equal(ids, same) and torch.equal(cosine, inside) and inside.dtype == torch.float32
    exact_distance = torch.pdist(x[0].double()).mean()
    assert apart == pytest.approx(float(exact_distance), rel=0.02)


def test_the_drift_survives_large_offsets():
    """States of a GPT have a few coordinates that are large for every token."""
    x, a = points(1, 30, 64), points(1, 40, 64, seed=1)
    offset = torch.zeros(64, dtype=torch.float64)
    offset[:4] = 1000.0
    plain = drift(x, a)[0] - (x / drift(x, a)[1]).float()
    targets, scale, _ = drift((x + offset).float(), (a + offset).float())
    moved = targets - (x + offset).float() / scale
    assert torch.nn.functional.cosine_similarity(moved.flatten(), plain.flatten(), dim=0) > 0.99


def test_a_changed_encoder_is_noticed(tiny, tmp_path, encoder, data_dir):
    import shutil
    mine = tmp_path / 'encoder'
    shutil.copytree(encoder, mine)
    config, model_config = tiny(model_type='drifting', encoder=str(mine))
    train.train(config, model_config)
    other, gpt2 = tiny(out_dir='other', seed=2)
    train.train(other, gpt2)
    shutil.rmtree(mine)
    shutil.copytree(other.out_dir, mine)
    with pytest.raises(UserError, match='not what this model was trained with'):
        load_model(checkpoint.load(checkpoint.find(config.out_dir)))
    with pytest.raises(UserError, match='not what this model was trained with'):
        resume(config.out_dir, '--max_iters=8')
    with pytest.raises(UserError, match='not what this model was trained with'):  # its outputs would be no embeddings there
        train.train(*tiny(out_dir='third', model_type='drifting', encoder=str(mine), init_from=config.out_dir))
    assert resume(config.out_dir, '--max_iters=8', f'--encoder={encoder}') == 0  # elsewhere, but the same


def test_blocks_are_closed_at_first_and_open_later(encoder):
    model = make(encoder)
    noise, style = noise_and_style()
    before = model.embeddings(noise, style)
    assert torch.equal(model.embeddings(noise, (style + 1) % 64), before)  # nothing of the condition arrives
    open_up(model)
    opened = model.embeddings(noise, style)
    assert not torch.allclose(model.embeddings(noise, (style + 1) % 64), opened, atol=1e-4)
    changed = noise.clone()
    changed[0, 14] -= 1  # the condition sees no more of the noise than its mean, which stays
    changed[0, 15] += 1
    moved = (model.embeddings(changed, style) - opened).abs().amax(-1)
    assert (moved[0] > 1e-5).all() and moved[1:].max() == 0  # every position sees every other, no sample another


def test_heads_start_out_looking_at_their_neighbours(encoder):
    config = GPTConfig(model_type='drifting', encoder='x', block_size=32, n_layer=1, n_head=4, n_embd=128,
                       drift_look=20.0)
    torch.manual_seed(0)
    block, x = Generator(config).h[0], torch.randn(1, 32, 128)
    weights = {}
    for head in range(4):  # one-hot values of one head, and outputs that are its attention
        with torch.no_grad():
            C, D = 128, 32
            block.c_attn.weight[2 * C:] = 0
            block.c_attn.weight[2 * C + head * D] = torch.randn(C)
            block.c_proj.weight.copy_(torch.eye(C))
            block.modulation.weight.zero_()
            block.modulation.weight[2 * C:3 * C] = 1 / C  # gates of attention open
        value = F.linear(F.rms_norm(x, (C,)), block.c_attn.weight[2 * C + head * D])
        y = (block(x, torch.ones(1, C)) - x)[0, :, head * D]
        weights[head] = [torch.corrcoef(torch.stack((y[4:28], value[0, 4 + d:28 + d])))[0, 1] for d in range(-3, 4)]
    assert [max(range(7), key=lambda d: row[d]) - 3 for row in weights.values()] == [-1, 1, -2, 2]
    assert all(max(row) > 0.9 for row in weights.values())


def test_attention_knows_how_far_apart_positions_are(encoder):
    """Without positions a permutation of the noise would permute the outputs, and do nothing else."""
    model = make(encoder)
    open_up(model)
    noise, style = noise_and_style()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    straight, mixed = model.embeddings(noise, style), model.embeddings(noise[:, order], style)
    assert not torch.allclose(mixed, straight[:, order], atol=1e-3)


def test_the_gradient_flows_through_the_encoder_and_not_into_it(encoder):
    model = make(encoder)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    noise, style = noise_and_style()
    ids = torch.randint(200, (4, 16))
    (each,) = compute_drift_targets(model, [(noise, style, ids)], Ranks(), rng())
    model(*each)[1].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert all(p.grad is None for p in model.encoder.parameters())
    own = set(model.state_dict())
    assert own and not any('encoder' in name or name.startswith('transformer') for name in own)
    assert model.num_params() == sum(p.numel() for p in model.generator.parameters())


def test_the_published_size_has_131_million_parameters(encoder):
    with torch.device('meta'):
        config = GPTConfig(model_type='drifting', encoder='x', block_size=256, n_layer=12, n_head=12, n_embd=768)
        count = sum(p.numel() for p in Generator(config).parameters())
    assert count == pytest.approx(131e6, rel=0.01)


def test_soft_output_is_a_mean_of_embeddings(encoder):
    model = make(encoder, drift_output='soft')
    noise, style = noise_and_style()
    x = model.embeddings(noise, style)
    table = model.encoder.transformer.wte.weight[:257]
    middle, raw = table.mean(0), raw_outputs(model.generator, noise, style)
    cosines = F.cosine_similarity((raw - middle)[:, :, None], table - middle, dim=-1)
    weights = (cosines * SHARPNESS * 4).softmax(-1)  # 4: the root of the 16 channels
    assert torch.allclose(x, weights @ table, atol=1e-5)


@pytest.mark.parametrize('how', ['embedding', 'soft', 'straight'])
def test_outputs_are_spread_at_the_start(encoder, how):
    model = make(encoder, drift_output=how)
    x = model.embeddings(*noise_and_style(32))
    table = model.encoder.transformer.wte.weight[:257]
    share = (x - x.mean((0, 1))).square().mean() / (table - table.mean(0)).square().mean()
    assert share > 0.2 and len(nearest(x, table)[1].unique()) > 50


def test_straight_through_writes_tokens_and_has_the_gradient_of_the_mean(encoder):
    straight, soft = make(encoder, drift_output='straight'), make(encoder, drift_output='soft')
    soft.load_state_dict(straight.state_dict())
    noise, style = noise_and_style()
    outputs = [model.embeddings(noise, style) for model in (straight, soft)]
    table = straight.encoder.transformer.wte.weight[:257]
    assert torch.allclose(outputs[0], table[nearest(outputs[0], table)[1]], atol=1e-6)
    raw = raw_outputs(straight.generator, noise, style)
    cosines = F.cosine_similarity((raw - table.mean(0))[:, :, None], table - table.mean(0), dim=-1)
    assert torch.equal(nearest(outputs[0], table)[1], cosines.argmax(-1))
    direction = torch.randn(outputs[0].shape)
    for x in outputs:
        (x * direction).sum().backward()
    for mine, theirs in zip(straight.parameters(), soft.parameters()):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)


def test_a_prefix_stays_and_sees_nothing_that_follows(encoder):
    model = make(encoder, drift_prefix=5)
    open_up(model)
    noise, style = noise_and_style()
    prefix = torch.randint(200, (4, 3))
    x = model.embeddings(noise, style, prefix)
    table = model.encoder.transformer.wte.weight
    assert torch.equal(x[:, :3], table[prefix])
    other = prefix.clone()
    other[:, 1] += 1
    assert ((model.embeddings(noise, style, other) - x)[:, 3:].abs().amax(-1) > 1e-6).all()
    hidden = []
    model.generator.h[-1].register_forward_hook(lambda module, inputs, output: hidden.append(output))
    changed = noise.clone()
    changed[:, 7] += 1
    changed[:, 8] -= 1  # the mean, which every position sees, stays
    for n in (noise, changed):
        model.embeddings(n, style, prefix)
    assert torch.allclose(hidden[0][:, :3], hidden[1][:, :3], atol=1e-4)


@pytest.mark.parametrize('options, words', [
    (dict(encoder=''), '--encoder'), (dict(n_embd=32), 'n_embd=16, not 32'), (dict(vocab_size=300), 'vocab_size'),
    (dict(block_size=64), 'block_size'), (dict(block_size=2), 'at least 3'),
    (dict(drift_temperatures='0.1,a'), 'drift_temperatures'), (dict(drift_temperatures='0.1,0'), 'at least'),
    (dict(drift_temperatures='0.1,nan'), 'at least'), (dict(drift_temperatures='1e-50'), 'at least'),
    (dict(drift_prefix=16), 'drift_prefix'), (dict(drift_floor=-1.0), 'drift_floor'), (dict(encoder='nowhere'), 'nowhere'),
])
def test_what_does_not_fit_is_named(encoder, options, words):
    with pytest.raises(UserError, match=words):
        make(**{'encoder': encoder} | options)


def test_the_encoder_must_be_a_gpt2_of_the_same_tokenizer(tiny, encoder, tmp_path, data_dir):
    with pytest.raises(UserError, match='the weights hold .*, which this model does not have'):
        Trainer(*tiny(model_type='drifting', init_from=encoder), Ranks())
    config, model_config = tiny(out_dir='heat', model_type='heat')
    train.train(config, model_config)
    with pytest.raises(UserError, match='must be gpt2'):
        make(config.out_dir)
    state = checkpoint.load(checkpoint.find(encoder))
    state['tokenizer'] = {'name': 'other', 'identity': 'x'}
    (tmp_path / 'foreign').mkdir()
    torch.save(state, tmp_path / 'foreign' / 'ckpt.pt')
    with pytest.raises(UserError, match='tokenizer'):
        Trainer(*tiny(model_type='drifting', encoder=str(tmp_path / 'foreign')), Ranks())


# ---------------------------------------------------------------------------------------------------------------------
# training

def test_the_field_has_the_temperatures_and_the_floor_asked_for(encoder):
    noise, style = noise_and_style(6)
    ids, targets = torch.randint(200, (6, 16)), []
    for temperatures, floor in (('0.1,0.3', 1e-3), ('0.02,0.05,0.2', 1e-3), ('0.1,0.3', 0.5)):
        model = make(encoder, drift_temperatures=temperatures, drift_floor=floor)
        (_, _, field), = compute_drift_targets(model, [(noise, style, ids)], Ranks(), rng())
        x, real = (FEATURES['states'](model.encoder, embeddings, field.positions)['1_position']
                   for embeddings in (model.embeddings(noise, style), model.encoder.transformer.wte(ids)))
        targets.append(field.targets['1_position'])
        assert torch.allclose(targets[-1], drift(x, real, tuple(map(float, temperatures.split(','))), floor)[0], atol=1e-5)
    assert not any(torch.allclose(targets[0], other, atol=1e-2) for other in targets[1:])


@pytest.mark.parametrize('kind', ['states', 'tokens'])
def test_micro_batches_have_one_field_together(encoder, kind):
    """Two micro-batches have the targets and the gradient of one batch of both."""
    model = make(encoder, drift_features=kind)
    open_up(model)  # so that all of it has a gradient
    noise, style = noise_and_style(6)
    ids = torch.randint(200, (6, 16))
    whole = compute_drift_targets(model, [(noise, style, ids)], Ranks(), rng())
    micro_batches = [(noise[:3], style[:3], ids[:3]), (noise[3:], style[3:], ids[3:])]
    halves = compute_drift_targets(model, micro_batches, Ranks(), rng())
    for name, targets in whole[0][-1].targets.items():
        assert torch.allclose(torch.cat([field.targets[name] for *_, field in halves], 1), targets, atol=1e-4)
    losses, gradients = [], []
    for batches in (whole, halves):
        model.zero_grad()
        loss = sum(model(*each)[1] for each in batches) / len(batches)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for one, two in zip(*gradients):
        assert one.abs().max() > 0 and torch.allclose(one, two, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def field_on_a_rank(path, world_size):
    """The field and its gradients at the samples of this rank, and what this rank computed distances between."""
    shapes = []
    real = drifting.distances
    drifting.distances = lambda x, y: shapes.append((tuple(x.shape), tuple(y.shape))) or real(x, y)
    ranks = setup_ranks('cpu', 'gloo', 60) if world_size > 1 else Ranks()
    x, positive = (part.chunk(world_size, dim=1)[ranks.rank] for part in
                   (points(2, 12, 8, dtype=torch.float32), points(2, 20, 8, seed=1, dtype=torch.float32)))
    x = x.clone().requires_grad_()
    found = []
    for floor in (0.0, AFFINITY_FLOOR):
        targets, scale, rms = drift(x, positive, TEMPERATURES, floor, ranks)
        gradient, = torch.autograd.grad((x / scale - targets).square().sum(), x)
        found.append({'targets': targets, 'gradient': gradient, 'scale': scale, 'rms': torch.stack([*rms.values()])})
    torch.save((found, shapes), f'{path}.{ranks.rank}')
    if world_size > 1:
        torch.distributed.barrier()
    return 0


@pytest.mark.slow
def test_each_rank_computes_the_field_at_its_own_samples(fork_ranks, tmp_path):
    """Which together is the field of one process, and so are its gradients."""
    field_on_a_rank(tmp_path / 'whole', 1)
    finish(fork_ranks(field_on_a_rank, tmp_path / 'half', 2), tmp_path)
    wanted, _ = torch.load(tmp_path / 'whole.0')
    halves = [torch.load(tmp_path / f'half.{rank}') for rank in range(2)]
    for _, shapes in halves:
        assert shapes == [((2, 6, 8), (2, 12, 8)), ((2, 6, 8), (2, 20, 8))] * 2
    for one, *two in zip(wanted, *(fields for fields, _ in halves)):
        for name, value in one.items():
            found = torch.cat([half[name] for half in two], dim=1) if value.dim() > 1 else two[0][name]
            assert (found - value).abs().max() <= 2e-6 * value.abs().max(), name
            assert value.dim() > 1 or torch.equal(two[0][name], two[1][name])


def test_further_positives_come_from_the_examples_before():
    generator = rng(0)
    numbers = examples(range(5008, 5016), 5000, generator, extra=300)
    assert numbers[:8] == list(range(5008, 5016)) and len(numbers) == 308
    assert min(numbers[8:]) >= 4000 and max(numbers[8:]) < 5000 and len(set(numbers[8:])) == 300
    assert set(examples(range(0, 8), 0, generator, extra=50)[8:]) <= set(range(8))
    assert min(examples(range(8, 16), 8, generator, extra=50)[8:]) >= 0


def test_a_run_says_what_matters_and_keeps_the_best_by_divergence(tiny, encoder):
    config, model_config = tiny(model_type='drifting', ema=0.9, max_iters=6)
    assert train.train(config, model_config) == 0
    with open(f'{config.out_dir}/metrics.jsonl') as f:
        evaluations = [json.loads(line) for line in f if 'val_loss' in line]
    names = {'val_js_3', 'val_diversity', 'val_vocabulary_distance', 'val_distinct_2', 'val_collapsed', 'val_field_0.02',
             'val_field_0.05', 'val_field_0.2'}
    assert names <= set(evaluations[-1])
    state = checkpoint.load(checkpoint.find(config.out_dir))
    assert state['best_val_loss'] == min(e['val_loss'] for e in evaluations if e['iter'])
    assert state['parents'] == [checkpoint.load(checkpoint.find(encoder))['run_id']]
    assert resume(config.out_dir, '--max_iters=8') == 0


def metrics_of(samples, real, samples_states, real_states, distance=0.0):
    """As `drifting.measure` finds them: of ids (N, T), and of their hidden states (N, C) at one depth."""
    return {('samples', '1_mean_16'): Rows(samples_states), ('real', '1_mean_16'): Rows(real_states),
            'vocabulary_distance': Mean(torch.tensor(distance), torch.tensor(float(len(samples)))),
            'samples': Rows(samples), 'real': Rows(real)}


@torch.no_grad()
def test_the_metrics_are_those_of_each_sample(encoder):
    model = make(encoder)
    noise, style = noise_and_style(6)
    ids = torch.randint(200, (6, 16))
    metrics = drifting.measure(model, noise, style, ids)
    assert set(metrics) == set(metrics_of(ids, ids, noise[:, 0], noise[:, 0])) | {
        (kind, '2_mean_16') for kind in ('samples', 'real')}
    x = model.embeddings(noise, style)
    for kind, embeddings in (('samples', x), ('real', model.encoder.transformer.wte(ids))):
        for depth, states in zip((1, 2), hidden_states(model.encoder, embeddings, [1, 2])):
            assert torch.allclose(metrics[kind, f'{depth}_mean_16'].rows, states.mean(1), atol=1e-6)
    cosines, samples = nearest(x, model.vocabulary)
    assert torch.equal(metrics['samples'].rows, samples) and torch.equal(metrics['real'].rows, ids)
    assert metrics['vocabulary_distance'].value() == pytest.approx(float((1 - cosines).mean()), rel=1e-5)


def test_the_field_of_one_distribution_is_small_however_many_samples_there_are():
    """The equilibrium, as the metrics tell it: with a floor under the affinities it would grow with their number."""
    def measured(count, shift=0.0):
        x, y = torch.randn(count, 16) + shift, torch.randn(count, 16)
        ids = torch.randint(50, (count, 16))
        return drifting.summary(metrics_of(ids, ids, x, y))['field_0.2']
    torch.manual_seed(0)
    few, many, apart = measured(256), measured(2048 + 100), measured(256, shift=1.0)
    assert many == pytest.approx(few, rel=0.2) and apart > 3 * few


def test_checkpointing_reaches_the_encoder(tiny, encoder):
    config, model_config = tiny(model_type='drifting', encoder=encoder, gradient_checkpointing=True)
    trainer, count = Trainer(config, model_config, Ranks()), []
    trainer.model.encoder.transformer.h[0].register_forward_pre_hook(lambda *_: count.append(torch.is_grad_enabled()))
    noise, style = noise_and_style()
    ids = torch.randint(200, (4, 16))
    (each,) = compute_drift_targets(trainer.model, [(noise, style, ids)], Ranks(), rng())
    trainer.model(*each)[1].backward()
    assert count == [False, False, True, True]  # samples and real text for the targets; the loss, and again going back


def test_training_into_the_encoder_is_refused(tiny, encoder):
    config, model_config = tiny(model_type='drifting', encoder=encoder, out_dir=encoder)
    with pytest.raises(UserError, match='is encoder too.*another --out_dir'):
        train.train(config, model_config)


def test_collapse_is_reported():
    real = torch.randint(50, (20, 16))
    same = torch.zeros_like(real)
    states = torch.randn(20, 4)
    collapsed = drifting.summary(metrics_of(same, real, 2 * states, states, distance=3.0))
    flipped = drifting.summary(metrics_of(real.flip(0), real, 2 * states, states, distance=3.0))
    assert collapsed['diversity'] == pytest.approx(2, rel=1e-3)
    assert collapsed['vocabulary_distance'] == pytest.approx(0.15)
    assert collapsed['collapsed'] == 1
    assert flipped['collapsed'] == 0
    assert flipped['js_2'] == 0
    assert collapsed['floor'] == ngrams.divergence(real[::2].numpy(), real[1::2].numpy(), 2) > 0


# ---------------------------------------------------------------------------------------------------------------------
# token drift

def soft_model(encoder, **options):
    torch.manual_seed(0)
    sizes = dict(model_type='diffusion', diffusion_objective='drift', encoder=encoder, block_size=16, vocab_size=257,
                 n_layer=2, n_head=2, n_embd=32)
    config = GPTConfig(**sizes | options)
    return GPT(config, load_encoder(config.encoder) if config.has_encoder else None)


def corrupted(count=6):
    generator = rng(5)
    return nelbo_batch(torch.randint(200, (count, 16), generator=generator), generator, mask=257)


def test_soft_tokens_are_means_of_embeddings_where_a_token_is_masked(encoder):
    model, (X, _, _) = soft_model(encoder), corrupted()
    soft = model.soft_tokens(X, model.trunk(X))
    table = model.encoder.transformer.wte.weight
    logits, _ = model(X)
    assert (X == 257).any() and (X != 257).any()
    for b, t in itertools.product(*map(range, X.shape)):
        wanted = logits[b, t, :257].softmax(-1) @ table[:257] if X[b, t] == 257 else table[X[b, t]]
        assert torch.allclose(soft[b, t], wanted, atol=1e-6)


def test_token_drift_adds_the_field_to_the_bound(encoder):
    model, other = soft_model(encoder, drift_weight=0.5), soft_model('', diffusion_objective='nelbo')
    other.load_state_dict(model.state_dict())
    X, Y, W = corrupted()
    (X, field, W), = compute_token_drift_targets(model, [(X, Y, W)], Ranks(), rng())
    features = FEATURES['states'](model.encoder, model.soft_tokens(X, model.trunk(X)), field.positions)
    squares = [(features[name] / field.scales[name] - targets).square().mean() for name, targets in field.targets.items()]
    loss = model(X, field, W)[1]
    bound = other(X, Y, W)[1]
    assert len(squares) == len(features)
    assert loss.item() == pytest.approx(bound.item() + 0.5 * sum(squares).item() / len(features), rel=1e-5)
    model.config.drift_weight = 0.0
    model(X, field, W)[1].backward()
    bound.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-5), name
        p.grad = None
    model.config.drift_weight = 0.5
    model(X, field, W)[1].backward()
    assert any(not torch.allclose(p.grad, q.grad, atol=1e-3) for p, q in zip(model.parameters(), other.parameters()))
    assert all(p.grad is None for p in model.encoder.parameters())


def test_token_drift_has_one_field_for_all_micro_batches(encoder):
    model, (X, Y, W) = soft_model(encoder), corrupted()
    (_, whole, _), = compute_token_drift_targets(model, [(X, Y, W)], Ranks(), rng())
    micro_batches = [(X[:3], Y[:3], W[:3]), (X[3:], Y[3:], W[3:])]
    halves = compute_token_drift_targets(model, micro_batches, Ranks(), rng())
    for name in whole.targets:
        assert torch.allclose(torch.cat([field.targets[name] for _, field, _ in halves], 1), whole.targets[name], atol=1e-4)


def test_token_drift_goes_on_from_a_diffusion_model_and_samples_without_the_encoder(tiny, encoder, tmp_path, capsys):
    import shutil
    mine = tmp_path / 'encoder'
    shutil.copytree(encoder, mine)
    config, model_config = tiny(out_dir='first', model_type='diffusion')
    train.train(config, model_config)
    drifted, model_config = tiny(model_type='token drift', encoder=str(mine), init_from=config.out_dir)
    train.train(drifted, model_config)
    state = checkpoint.load(checkpoint.find(drifted.out_dir))
    made_from = {checkpoint.load(checkpoint.find(folder))['run_id'] for folder in (encoder, config.out_dir)}
    assert set(state['parents']) == made_from
    shutil.rmtree(mine)
    generate_diffusion.main([f'--out_dir={drifted.out_dir}', '--max_new_tokens=12', '--device=cpu'])
    assert 'forward passes' in capsys.readouterr().err


@pytest.mark.parametrize('options, words', [
    (dict(encoder=''), '--encoder'), (dict(dropout=0.1), 'dropout'), (dict(diffusion_objective='nelbo'), 'objective=drift'),
    (dict(drift_weight=-1.0), 'drift_weight'), (dict(vocab_size=300), 'vocab_size'), (dict(block_size=64), 'block_size'),
])
def test_what_does_not_fit_token_drift_is_named(encoder, options, words):
    with pytest.raises(UserError, match=words):
        soft_model(**{'encoder': encoder} | options)


# ---------------------------------------------------------------------------------------------------------------------
# samples

@pytest.fixture(scope='module')
def out_dir(tmp_path_factory, data_dir, encoder):
    settings = TINY | {'data_dir': data_dir, 'dataset': 'tiny_byte', 'model_type': 'drifting', 'encoder': encoder,
                       'drift_prefix': 4, 'out_dir': str(tmp_path_factory.mktemp('drifting'))}
    assert train.main([f'--{key}={value}' for key, value in settings.items()]) == 0
    return settings['out_dir']


def test_samples_are_made_in_one_pass(out_dir, capsys):
    sample.main([f'--out_dir={out_dir}', '--device=cpu'])
    said = capsys.readouterr()
    assert said.out.count('---------------') == 16 and '1 forward pass (NFE)' in said.err
    sample.main([f'--out_dir={out_dir}', '--device=cpu', '--start=abc', '--num_samples=2', '--temperature=0.1'])
    texts = capsys.readouterr().out.split('---------------\n')
    assert len(texts) == 3 and all(text.startswith('abc') for text in texts[:2])
    for arg, words in (('--start=abcde', 'drift_prefix=4'), ('--top_k=3', 'top_k'), ('--ignore_eot', 'ignore_eot')):
        with pytest.raises(UserError, match=words):
            sample.main([f'--out_dir={out_dir}', '--device=cpu', arg])


def test_each_position_takes_the_nearest_token(out_dir):
    model = load_model(checkpoint.load(checkpoint.find(out_dir)))
    calls = []
    model.generator.register_forward_hook(lambda *_: calls.append(1))
    ids = model.generate_at_once(3, seed=5)
    assert len(calls) == 1 and ids.shape == (3, 16) and 0 <= ids.min() and ids.max() < 257
    noise, style, _ = make_batch(torch.zeros(3, 16, dtype=torch.long), rng(5), n_embd=16)
    with torch.no_grad():
        x = model.embeddings(noise, style)
    table = model.encoder.transformer.wte.weight[:257].detach().numpy()
    for b in range(3):
        for t in range(16):
            cosines = table @ x[b, t].numpy() / np.linalg.norm(table, axis=1)
            assert int(cosines.argmax()) == int(ids[b, t])
    assert torch.equal(ids, model.generate_at_once(3, seed=5))
    assert not torch.equal(ids, model.generate_at_once(3, seed=6))
    given = model.generate_at_once(3, 0.5, seed=5, prefix=torch.tensor([1, 2]))
    assert given[:, :2].tolist() == [[1, 2]] * 3
