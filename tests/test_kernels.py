"""Each part that is written for speed computes what its plain definition does, in value and gradient."""
import math

import pytest
import torch
import torch.nn.functional as F
from test_model import SIZES, make, tokens

from model import plain_score_statistics
from nanodrift import kernels
from nanodrift.kernels import IGNORE, cross_entropy, linear_cross_entropy, score_statistics
from nanodrift.machine import cpu_multiplies_bfloat16
from nanodrift.rotary import plain_rotate


def assert_close(found, wanted, tolerance=1e-5):
    """Within a fraction of the largest value."""
    torch.testing.assert_close(found, wanted, atol=tolerance * wanted.abs().max().item(), rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# the fused head

@pytest.mark.parametrize('per_chunk', [1, 700, 2 ** 25])
@pytest.mark.parametrize('weighted', [False, True])
def test_fused_head_is_cross_entropy_in_value_and_gradient(monkeypatch, per_chunk, weighted):
    monkeypatch.setattr(kernels, 'LOGITS_PER_CHUNK', per_chunk)
    torch.manual_seed(0)
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    weight = torch.randn(64, 16, dtype=torch.float64)
    y = torch.randint(50, (3, 7))
    y[0, 2], y[2, 6] = IGNORE, IGNORE
    w = torch.rand(3, 7, dtype=torch.float64) if weighted else None
    x64, weight64 = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = cross_entropy_in_float64(x64 @ weight64[:50].t(), y, w)
    (3 * expected).backward()
    x32, weight32 = x.float().requires_grad_(), weight.float().requires_grad_()
    loss = linear_cross_entropy(x32, weight32, 50, y, None if w is None else w.float())
    (3 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(x32.grad.double(), x64.grad, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(weight32.grad.double(), weight64.grad, atol=2e-6, rtol=1e-5)
    plain = cross_entropy(x32 @ weight32[:50].t(), y, None if w is None else w.float())
    assert plain.item() == pytest.approx(expected.item(), rel=1e-6)


def cross_entropy_in_float64(logits, y, w):
    """One position at a time."""
    total, count = 0.0, 0
    for row, target, i in zip(logits.flatten(0, 1), y.flatten().tolist(), range(y.numel())):
        if target != IGNORE:
            total = total - (row[target] - row.logsumexp(0)) * (1 if w is None else w.flatten()[i])
            count += 1
    return total / count


def test_fused_head_survives_logits_that_overflow_exp():
    x = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    loss = linear_cross_entropy(x[None], weight, 3, torch.tensor([[1, 1]]))
    assert loss.item() == pytest.approx(300.0)  # (600 + 0) / 2
    loss.backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(weight.grad).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_fused_head_follows_autocast(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 32, 64, requires_grad=True), (torch.randn(128, 64) * 0.1).requires_grad_()
    y = torch.randint(101, (2, 32))
    linear_cross_entropy(x, weight, 101, y).backward()
    exact = x.grad, weight.grad
    x.grad = weight.grad = None
    with torch.autocast('cpu', dtype):
        loss = linear_cross_entropy(x, weight, 101, y)
    loss.backward()
    assert loss.dtype == torch.float32 and weight.grad.dtype == torch.float32
    for found, wanted in zip((x.grad, weight.grad), exact):
        assert (found - wanted).norm() / wanted.norm() < 0.02


# ---------------------------------------------------------------------------------------------------------------------
# score statistics

@pytest.mark.parametrize('N, T', [(1, 1), (3, 7), (40, 150)])
def test_score_statistics_are_the_plain_ones_in_value_and_gradient(N, T):
    q, k = (torch.randn(N, T, 8, requires_grad=True) for _ in range(2))
    pieces = [(heads.start, rows.start) for heads, rows, *_ in kernels.score_pieces(q, k)]
    assert T < 150 or len({heads for heads, _ in pieces}) > 1 and len({rows for _, rows in pieces}) > 1
    found, wanted = score_statistics(q, k)[:2], plain_score_statistics(q, k, torch.ones(T, T).tril().bool())
    directions = torch.randn(2, N, T)
    for fast, plain in zip(found, wanted):
        assert_close(fast, plain)
    gradients = [torch.autograd.grad(sum((d * s).sum() for d, s in zip(directions, both)), (q, k))
                 for both in (found, wanted)]
    for fast, plain in zip(*gradients):
        assert_close(fast, plain)


def test_score_statistics_of_the_last_queries_are_those_of_all():
    q, k = torch.randn(2, 3, 9, 8)
    top, purity, lse, best = score_statistics(q, k)
    for Tq in (1, 4):
        for last, whole in zip(score_statistics(q[:, -Tq:], k), (top, purity, lse, best)):
            torch.testing.assert_close(last, whole[:, -Tq:])
    scores = (q @ k.mT).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    assert_close(lse, scores.logsumexp(-1))
    assert torch.equal(best, scores.argmax(-1))


# ---------------------------------------------------------------------------------------------------------------------
# rotation

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_rotation_is_the_plain_one_in_value_and_gradient(dtype):
    x = torch.randn(2, 9, 3, 8, dtype=dtype).transpose(1, 2).requires_grad_()  # (B, H, T, D), laid out as c_attn gives it
    angle = torch.randn(3, 9, 4)
    angles = torch.stack((angle.cos(), angle.sin()), dim=-1).requires_grad_()
    found, wanted = kernels.rotate(x, angles), plain_rotate(x, angles)
    assert found.dtype == wanted.dtype == dtype and found.stride() == x.stride()
    direction = torch.randn_like(wanted)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert_close(found, wanted, tolerance)
    for fast, plain in zip(*(torch.autograd.grad(y, (x, angles), direction) for y in (found, wanted))):
        assert_close(fast, plain, tolerance)


def test_fixed_angles_get_no_gradient():
    x, angles = torch.randn(2, 3, 9, 8, requires_grad=True), torch.randn(3, 9, 4, 2)
    kernels.rotate(x, angles).sum().backward()
    assert x.grad is not None and angles.grad is None


# ---------------------------------------------------------------------------------------------------------------------
# around attention

@pytest.mark.parametrize('D', [8, 6, 13])
def test_widened_heads_bring_a_bias_into_attention(D):
    """The score of each key has a bias of its own; a coordinate more of the values gives back the weight of some."""
    q, k, v = torch.randn(3, 2, 3, 9, D)
    bias, one = torch.randn(2, 3, 9, 1) * 5, torch.ones(())
    marked = torch.rand(2, 3, 9, 1).round()
    q_wide, v_wide = kernels.widen(q, one, one), kernels.widen(v, marked, 0 * one)
    k_wide = kernels.widen(k, *kernels.high_and_low(bias, k.dtype))
    assert all(x.size(-1) % 8 == 0 for x in (q_wide, k_wide, v_wide))
    y = F.scaled_dot_product_attention(q_wide, k_wide, v_wide, is_causal=True, scale=0.3)
    future = torch.ones(9, 9).triu(1).bool()
    weights = ((q @ k.mT + bias.mT) * 0.3).masked_fill(future, -math.inf).softmax(-1)
    assert_close(y[..., :D], weights @ v)
    assert_close(y[..., D:D + 1], weights @ marked)


def test_high_and_low_are_more_exact_than_one_number():
    x = torch.randn(1000) * 100
    high, low = kernels.high_and_low(x, torch.bfloat16)
    assert high.dtype == low.dtype == torch.bfloat16
    assert ((high.float() + low.float() - x).abs() <= 2.0 ** -16 * x.abs()).all()
    assert ((high.float() - x).abs() > 2.0 ** -12 * x.abs()).any()


def test_a_recomputed_block_runs_again_in_the_backward_pass_and_only_there():
    model = make(dropout=0.1).train()
    block, calls = model.transformer.h[0], []
    block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed, x = kernels.Recomputed(block), torch.randn(2, 9, SIZES['n_embd'])
    gradients = []
    for network, wanted in ((block, [1, 1]), (recomputed, [1, 2])):
        torch.manual_seed(0)
        calls.clear()
        y = network(x.requires_grad_())
        counted = [len(calls)]
        y.square().sum().backward()
        assert [*counted, len(calls)] == wanted
        gradients.append([y.detach(), x.grad, *(p.grad for p in block.parameters())])
        x = x.detach()
        block.zero_grad(set_to_none=True)
    for plain, again in zip(*gradients):
        assert torch.equal(plain, again)
    calls.clear()
    with torch.no_grad():
        recomputed(x)
    assert len(calls) == 1


# ---------------------------------------------------------------------------------------------------------------------
# packed linears

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('rows', [1, 2, 5])
@torch.no_grad()
def test_packed_linears_compute_the_same_and_are_used_inside_the_with_alone(rows, bias):
    model = make(bias=bias)
    packed = kernels.pack_weights(model, rows)
    assert model.lm_head in packed and model.transformer.h[0].mlp.c_fc in packed
    for linear, product in packed.items():
        x = torch.randn(rows, 1, linear.in_features)
        torch.testing.assert_close(product(x), linear(x), atol=1e-5, rtol=1e-5)
    with kernels.packed_weights({model.lm_head: lambda x: x[..., :7]}):
        assert model.head(torch.zeros(rows, SIZES['n_embd'])).size(-1) == 7
    assert model.head(torch.zeros(rows, SIZES['n_embd'])).size(-1) == model.config.vocab_size


@pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason='this processor does not multiply bfloat16')
@pytest.mark.parametrize('rows', [1, 5])
@torch.no_grad()
def test_packed_linears_in_bfloat16_round_their_results_alone(rows):
    model = make()
    with torch.autocast('cpu', torch.bfloat16):
        packed = kernels.pack_weights(model, rows)
        for linear, product in packed.items():
            x = torch.randn(rows, 1, linear.in_features)
            assert product(x).dtype == torch.bfloat16
            torch.testing.assert_close(product(x), linear(x), atol=1e-2, rtol=1e-2)
    assert len(packed) == sum(isinstance(m, kernels.Linear) for m in model.modules())


def test_packed_linears_are_put_back_after_an_error():
    model = make()
    with pytest.raises(KeyboardInterrupt), kernels.packed_weights({model.lm_head: lambda x: x[..., :7]}):
        raise KeyboardInterrupt
    assert model.lm_head.product is None


def test_nothing_is_packed_where_it_would_not_be_the_same_or_too_large(monkeypatch):
    model = make()
    with torch.autocast('cpu', torch.float16):
        assert kernels.pack_weights(model, 1) == {}
    monkeypatch.setattr(kernels, 'cpu_multiplies_bfloat16', lambda: False)
    with torch.autocast('cpu', torch.bfloat16):
        assert kernels.pack_weights(model, 1) == {}
    bytes_of_linears = sum(m.weight.nbytes for m in model.modules() if isinstance(m, kernels.Linear))
    for limit, some in ((bytes_of_linears, True), (bytes_of_linears - 1, False)):
        monkeypatch.setattr(kernels, 'PACK_AT_MOST', limit)
        assert bool(kernels.pack_weights(model, 1)) == some


def test_weights_that_change_between_two_steps_of_generation_are_seen_by_everyone_else():
    model, idx = make(), tokens(2, 4)
    columns = model.generate(idx, 8, temperature=0)
    next(columns)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
        fresh = make()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(model(idx)[0], fresh(idx)[0])


def test_a_gpu_computes_the_head_in_few_chunks():
    """12 windows of 1,024 tokens and GPT-2's vocabulary: with the chunks of a CPU they would be 19."""
    rows = kernels.rows_per_chunk(50304, torch.device('cuda'))
    assert math.ceil(12 * 1024 / rows) == 3 and rows * 50304 * 2 < 2 ** 30, 'at most 1 GiB of logits in 16 bits'


# ---------------------------------------------------------------------------------------------------------------------
# 16 bits

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_score_statistics_are_float32_under_autocast(dtype):
    """The purity of flat attention is near 1 / keys, from which as much is subtracted: 16 bits would leave nothing of it."""
    q, k = torch.randn(2, 3, 64, 8), 0.1 * torch.randn(3, 64, 8)
    with torch.autocast('cpu', dtype):
        top, purity, *_ = kernels.score_statistics(q[0], k)
    plain_top, plain_purity = plain_score_statistics(q[0], k, torch.ones(q.size(2), q.size(2)).tril().bool())
    torch.testing.assert_close(top, plain_top, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(purity, plain_purity, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_the_compiled_softmax_of_the_head_gives_the_same_loss_and_gradients(monkeypatch, dtype):
    """It is used on GPUs alone, so no training step on a CPU reaches it."""
    monkeypatch.setattr(kernels, 'LOGITS_PER_CHUNK', 24 * 64)  # the last chunk is smaller
    torch.manual_seed(0)
    x, y, w = torch.randn(2, 32, 16), torch.randint(50, (2, 32)), torch.rand(2, 32)
    y[0, :3], found = IGNORE, []
    for softmax in (kernels.exponentials, torch.compile(kernels.exponentials, dynamic=False)):
        inputs = x.clone().requires_grad_(), torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            loss = linear_cross_entropy(*inputs, 50, y, w, softmax, flag=7)
        loss.backward()
        found.append([loss.detach(), *(t.grad for t in inputs)])
    for eager, compiled in zip(*found):
        assert (compiled - eager).norm() <= 1e-3 * eager.norm()


def test_the_head_in_float16_keeps_small_activations():
    """A flat softmax over a large vocabulary weighs each activation by 1/V, which float16 would round to nothing."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 256, 8) * 0.1, torch.randn(50304, 8) * 0.02
    y = torch.randint(50257, (1, 256))
    gradients = []
    for dtype in (torch.float32, torch.float16):
        W = weight.clone().requires_grad_()
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            (256 * kernels.linear_cross_entropy(x, W, 50257, y)).backward()
        gradients.append(W.grad)
    others = torch.ones(50304, dtype=torch.bool)
    others[y] = False  # where nothing but the small part is
    exact, short = (g[others] for g in gradients)
    assert (short - exact).norm() < 1.5e-3 * exact.norm()  # 4.4e-3 where 1/V is one factor
