"""Rotary positions: by how much, for whom, and what scores know of positions then."""
import pytest
import torch
from test_model import SIZES, make, tokens
from torch import nn

from model import GPTConfig
from nanodrift.rotary import RotaryEmbedding, local_attention_biases, plain_rotate, rotary_rates

H, D = SIZES['n_head'], SIZES['n_embd'] // SIZES['n_head']


def rotate_in_a_loop(x, rates, start=0):
    """Coordinates 2i and 2i+1 of head h at position p, rotated by p * rates[h, i]. x (B, H, T, D)."""
    rotated = torch.zeros_like(x, dtype=torch.float64)
    for h in range(x.size(1)):
        for p in range(x.size(2)):
            for i in range(x.size(3) // 2):
                even, odd = x[:, h, p, 2 * i], x[:, h, p, 2 * i + 1]
                angle = (start + p) * rates[h, i]
                rotated[:, h, p, 2 * i] = even * angle.cos() - odd * angle.sin()
                rotated[:, h, p, 2 * i + 1] = even * angle.sin() + odd * angle.cos()
    return rotated


def embeddings():
    """A RotaryEmbedding of each kind, for 32 positions."""
    torch.manual_seed(0)
    fixed, learned = rotary_rates(GPTConfig(**SIZES)), nn.Parameter(torch.randn(H, D // 2))
    return {'fixed': RotaryEmbedding(fixed, 32), 'learned': RotaryEmbedding(learned, 32),
            'fixed, normalised': RotaryEmbedding(fixed * torch.rand(H, 1), 32, persistent=True, use_norm=True),
            'learned, normalised': RotaryEmbedding(learned, 32, use_norm=True)}


every_kind = pytest.mark.parametrize('kind', embeddings())


def test_rates_are_those_of_roformer_for_every_head():
    rates = rotary_rates(GPTConfig(**SIZES | {'n_embd': 80, 'n_head': 4}))
    for head in rates.tolist():
        assert head == pytest.approx([10000 ** (-2 * i / 20) for i in range(10)], rel=1e-5)
    assert rates.shape == (4, 10)


def test_plain_rotation_is_its_formula():
    x, rates = torch.randn(2, H, 9, D), torch.randn(H, D // 2)
    angle = torch.arange(9)[:, None] * rates[:, None]
    found = plain_rotate(x, torch.stack((angle.cos(), angle.sin()), dim=-1))
    torch.testing.assert_close(found, rotate_in_a_loop(x.double(), rates.double()).float(), atol=1e-5, rtol=1e-5)


@every_kind
@torch.no_grad()
def test_rows_may_have_positions_of_their_own(kind):
    rope = embeddings()[kind]
    q, k = torch.randn(2, 2, H, 3, D)
    positions = torch.tensor([[0, 4, 5], [9, 9, 2]])
    for row in range(2):
        alone = rope(q[row:row + 1], k[row:row + 1], positions[row:row + 1])
        assert all(torch.equal(a[row:row + 1], b) for a, b in zip(rope(q, k, positions), alone))


@every_kind
@pytest.mark.parametrize('start', [0, 20])
@torch.no_grad()
def test_an_embedding_rotates_by_position_times_rate(kind, start):
    rope = embeddings()[kind]
    rates = rope.frequencies if rope.layer_norm is None else rope.layer_norm(rope.frequencies)
    q, k = torch.randn(2, 2, H, 12, D)
    for found, x in zip(rope(q, k, torch.arange(start, start + 12)[None]), (q, k)):
        wanted = rotate_in_a_loop(x.double(), rates.double(), start)
        torch.testing.assert_close(found, wanted.float(), atol=1e-4, rtol=1e-4)


@every_kind
@torch.no_grad()
def test_scores_know_the_distance_alone(kind):
    rope = embeddings()[kind]
    q, k = (x.expand(1, H, 32, D) for x in torch.randn(2, D))  # the same vectors everywhere
    q, k = rope(q, k)
    scores = (q @ k.mT)[0]  # (H, T, T)
    for distance in range(-31, 32):
        along = scores.diagonal(distance, 1, 2)
        torch.testing.assert_close(along, along[:, :1].expand_as(along), atol=1e-4, rtol=1e-4)
    assert scores[:, 0].std(-1).min() > 0.1, 'and do know it'


def test_only_what_is_learned_gets_a_gradient_and_only_what_was_trained_is_saved():
    parameters = {'fixed': set(), 'learned': {'frequencies'}, 'fixed, normalised': {'layer_norm.weight', 'layer_norm.bias'},
                  'learned, normalised': {'frequencies', 'layer_norm.weight', 'layer_norm.bias'}}
    for kind, rope in embeddings().items():
        q, k = torch.randn(2, 2, H, 9, D)
        direction = torch.randn(2, *q.shape)
        if parameters[kind]:
            (direction * torch.stack(rope(q, k))).sum().backward()
        assert {name for name, p in rope.named_parameters() if p.grad.any()} == parameters[kind]
        saved = parameters[kind] | ({'frequencies'} if kind == 'fixed, normalised' else set())  # it was persistent
        assert set(rope.state_dict()) == saved


def test_the_table_of_fixed_rates_is_that_of_the_moment_and_is_not_saved():
    model = make(model_type='rotating', rotating_head='gp')
    assert not [name for name in model.state_dict() if 'table' in name]
    idx = tokens(2, 32)
    before = model(idx, idx)[0]
    for rope in (block.attn.rope for block in model.transformer.h):
        assert torch.equal(rope.table, rope.angles(torch.arange(32)))
        rope.table = None
    assert torch.equal(model(idx, idx)[0], before)


def test_rates_out_of_a_checkpoint_are_those_that_are_used():
    rope = RotaryEmbedding(rotary_rates(GPTConfig(**SIZES)), 32, persistent=True)
    other = RotaryEmbedding(torch.rand(H, D // 2), 32, persistent=True)
    q, k = torch.randn(2, 2, H, 9, D)
    assert not torch.allclose(rope(q, k)[0], other(q, k)[0])
    rope.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(rope(q, k), other(q, k)))


@torch.no_grad()
def test_biases_make_each_head_look_at_a_neighbour_of_its_own():
    """One position back, one ahead, two back, and so on; the more strongly, the more of its attention is there."""
    rates = rotary_rates(GPTConfig(**SIZES | {'n_embd': 256, 'n_head': 8}))
    rope, at_neighbour = RotaryEmbedding(rates, 33), []
    for strength in (5.0, 10.0):
        q, k = (bias[None, :, None].expand(1, 8, 33, 32) for bias in local_attention_biases(rates, strength))
        q, k = rope(q, k)
        weights = (q @ k.mT / 32 ** 0.5).softmax(-1)[0, :, 16]  # of the position in the middle, (H, T)
        assert (weights.argmax(-1) - 16).tolist() == [-1, 1, -2, 2, -3, 3, -4, 4]
        at_neighbour.append(weights.max(-1).values)
    assert (at_neighbour[1] > at_neighbour[0]).all()
    assert not local_attention_biases(rates, 0.0).any()
