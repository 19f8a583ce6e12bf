"""
The parts of a model that are written for speed: same numbers as the plain definition, less time or memory.

The fused head              loss and gradients of a large vocabulary, its logits never held whole; plain: `cross_entropy`
Score statistics            the statistics of adaptive heat; plain: `plain_score_statistics` in model.py
Rotation                    rotary positions as products of complex numbers; plain: `plain_rotate` in rotary.py
Widened heads               extra coordinates that pass a bias of the scores through the fused attention
Recomputed blocks           activations computed again in the backward pass: less memory, more time
Packed linears              weights in the type and layout that a step of generation reads fastest; plain: nn.Linear

Tests hold each of them equal to its plain definition.
"""
import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanodrift.machine import compute_dtype, cpu_multiplies_bfloat16

IGNORE = -1  # a target with this id is left out of losses and metrics
LOGITS_PER_CHUNK = 2 ** 25  # how many logits are held at once: large enough for fast matrix products
ON_GPUS = 8  # times as many logits in a chunk, each of which costs a dozen launches
PAD_VOCAB_TO = 64  # tensor cores and AMX tiles want round sizes; the padding never leaves the model
PACK_AT_MOST = 2 ** 31  # bytes of weights that generation on a CPU may hold a second copy of


def rows_per_chunk(columns, device=None):
    """How many rows of so many logits are held at once. `device` is given where training overwrites them: a GPU takes larger
    chunks there."""
    times = ON_GPUS if device is not None and device.type == 'cuda' else 1
    return max(1, times * LOGITS_PER_CHUNK // columns)


def padded_vocab_size(vocab_size):
    """Rows of the embedding matrix for so many ids."""
    return math.ceil(vocab_size / PAD_VOCAB_TO) * PAD_VOCAB_TO


# ---------------------------------------------------------------------------------------------------------------------
# the fused head

def cross_entropy(logits, targets, weights=None, flag=None):
    """Mean over the counted positions of weight * cross entropy, in float32. logits (B, T, V), targets (B, T).

    With `flag`, an id, weights apply only at positions whose argmax is this id; elsewhere the weight is 1."""
    logits, targets = logits.float().flatten(0, -2), targets.flatten()
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction='none')
    if weights is not None:
        weights = weights.flatten()
        losses = losses * (weights if flag is None else torch.where(logits.argmax(-1) == flag, weights, 1.0))
    return losses.sum() / (targets != IGNORE).sum().clamp(min=1)


def exponentials(product, targets, vocab_size, flag=None, buffer=None):
    """
    product (n, Vp), the logits, and targets (n,) -> losses (n,); e (n, Vp), in place of the product; s (n, 1); whether the
    argmax is `flag` (n,), None without a flag.

    softmax = e / s; in float16 both are divided by the root of the sum. buffer: float32 (n, Vp) to be used in place of new
    memory.
    """
    logits = product.float() if buffer is None else buffer.copy_(product)
    logits[:, vocab_size:] = -math.inf  # the padding has no text and no probability
    top, at_target = logits.amax(1, keepdim=True), logits.gather(1, targets[:, None])
    flagged = None if flag is None else logits.argmax(1) == flag
    e = logits.sub_(top).exp_()
    s = e.sum(1, keepdim=True)
    losses = (top + s.log() - at_target).squeeze(1)
    if product.dtype == torch.float16:  # 1/s may underflow: e and 1/s each carry 1/sqrt(s)
        s = s.sqrt()
        e.div_(s)
    return losses, e if e.dtype == product.dtype else product.copy_(e), s, flagged


def linear_cross_entropy(x, weight, vocab_size, targets, weights=None, softmax=exponentials, flag=None):
    """`cross_entropy` of the logits x @ weight[:vocab_size]^T without ever holding them whole. x (B, T, C), targets (B, T).
    softmax: `exponentials`, or the same compiled.

    Follows autocast: the matrix products run in its type, softmax and sums in float32. torch's own
    F.linear_cross_entropy is slower on CPUs, and rounds the loss to bfloat16 (torch 2.13)."""
    x = x.to(compute_dtype(x))
    targets = targets.flatten()
    weights = None if weights is None else weights.flatten()
    total = _LinearCrossEntropy.apply(x.flatten(0, -2), weight, vocab_size, targets, weights, softmax, flag)
    return total / (targets != IGNORE).sum().clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    """
    Sum of weight * cross entropy of x @ W^T, chunk by chunk, gradients taken in the forward pass.

    The (N, V) logits are by far the largest tensor of a small language model; here a chunk of them is overwritten in place
    (logits, then exponentials). With e = exp(logits - max) and s = sum e, the gradient (e/s - onehot) W is computed as
    (e W)/s - W[y], and its transpose likewise, so that, except in float16, no pass over the chunk is spent on dividing, and
    none on the one-hot.
    """

    @staticmethod
    def forward(ctx, x, weight, vocab_size, targets, weights, softmax, flag):
        """x (N, C) in the compute type, weight (Vp, C) float32, targets (N,), weights (N,) float32 or None; for flag see
        `cross_entropy`."""
        N, Vp = len(x), len(weight)
        n = min(N, rows_per_chunk(Vp, x.device))
        W = weight.to(x.dtype)
        w = (targets != IGNORE).float()
        if weights is not None:
            w = w * weights
        y = targets.clamp(min=0)
        dx, dW = torch.empty_like(x), torch.zeros_like(weight)
        losses = torch.empty_like(w)
        product = x.new_empty(n, Vp)
        # compiled code needs no copy of the logits in float32
        buffer = product.float() if softmax is exponentials and x.dtype != torch.float32 else None
        for i in range(0, N, n):
            chunk = slice(i, min(i + n, N))
            m = chunk.stop - i
            torch.mm(x[chunk], W.t(), out=product[:m])
            held = None if buffer is None else buffer[:m]
            losses[chunk], e, s, flagged = softmax(product[:m], y[chunk], vocab_size, flag, held)
            if flag is not None:
                w[chunk] = torch.where(flagged, w[chunk], (targets[chunk] != IGNORE).float())
            scale = w[chunk, None] / s
            dx[chunk] = (e @ W) * scale
            dW += e.t() @ (x[chunk] * scale).to(x.dtype)
        dx -= W[y] * w[:, None].to(x.dtype)
        dW.index_add_(0, y, x.float() * w[:, None], alpha=-1)
        ctx.save_for_backward(dx, dW)
        return (losses * w).sum()

    @staticmethod
    def backward(ctx, grad):
        dx, dW = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dW * grad, None, None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# score statistics

def score_pieces(q, k, queries=128, scores=2 ** 19):
    """Yields (heads, queries, keys, s): slices and their scores (n, queries, keys), -inf where a key is not seen yet: a
    cache-sized piece at a time on a CPU; all heads at once on accelerators, which are slow at many small products."""
    N, Tq, Tk = q.size(0), q.size(1), k.size(1)
    n = max(1, scores // (min(queries, Tq) * Tk)) if q.device.type == 'cpu' else N
    for start in range(0, Tq, queries):
        rows = slice(start, min(start + queries, Tq))
        R, end = rows.stop - start, Tk - Tq + rows.stop
        future = torch.ones(R, R, dtype=torch.bool, device=q.device).triu_(1)
        for i in range(0, N, n):
            s = (q[i:i + n, rows] @ k[i:i + n, :end].mT).float()  # (n, R, end)
            s[..., end - R:].masked_fill_(future, -math.inf)
            yield slice(i, i + n), rows, slice(0, end), s


@torch.library.custom_op('nanodrift::score_statistics', mutates_args=())
def score_statistics(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    For each query i, over its scores s_ij = q_i . k_j, j <= i: maximum, sum_j softmax(s_i)_j^2, log-sum-exp and argmax.

    q (N, Tq, D), k (N, Tk, D) -> four tensors (N, Tq); the queries are the last Tq of the Tk positions. Gradients flow
    through the first two. Scores are recomputed in the backward pass, so memory is linear in T. A custom operator, because
    torch.compile would unroll the loop.
    """
    top, purity, lse = (q.new_empty(q.shape[:2], dtype=torch.float32) for _ in range(3))
    best = torch.empty(q.shape[:2], dtype=torch.int64, device=q.device)
    with torch.autocast(q.device.type, enabled=False):  # which would compute vecdot in 16 bits
        for heads, rows, _, s in score_pieces(q, k):
            m, best[heads, rows] = s.max(-1)
            e = s.sub_(m[..., None]).exp_()
            z = e.sum(-1)
            top[heads, rows], lse[heads, rows] = m, m + z.log()
            purity[heads, rows] = torch.linalg.vecdot(e, e) / z.square()
    return top, purity, lse, best


@torch.library.custom_op('nanodrift::score_statistics_backward', mutates_args=())
def score_statistics_backward(q: Tensor, k: Tensor, best: Tensor, purity: Tensor, lse: Tensor, d_top: Tensor,
                              d_purity: Tensor) -> tuple[Tensor, Tensor]:
    """With p = softmax(s): d top / d s is one-hot, d sum p^2 / d s_j = 2 p_j (p_j - sum p^2)."""
    dq, dk = torch.empty_like(q), torch.zeros_like(k)
    for heads, rows, keys, s in score_pieces(q, k):
        p = s.sub_(lse[heads, rows, None]).exp_()
        ds = (p - purity[heads, rows, None]).mul_(p).mul_(2 * d_purity[heads, rows, None])
        ds = ds.scatter_add_(-1, best[heads, rows, None], d_top[heads, rows, None]).to(q.dtype)
        dq[heads, rows] = ds @ k[heads, keys]
        dk[heads, keys] += ds.mT @ q[heads, rows]
    return dq, dk


@score_statistics.register_fake
def _(q, k):
    numbers = q.new_empty(q.shape[:2], dtype=torch.float32)
    return numbers, torch.empty_like(numbers), torch.empty_like(numbers), torch.empty_like(numbers, dtype=torch.int64)


@score_statistics_backward.register_fake
def _(q, k, best, purity, lse, d_top, d_purity):
    return torch.empty_like(q), torch.empty_like(k)


def _keep_for_backward(ctx, inputs, output):
    _, purity, lse, best = output
    ctx.save_for_backward(*inputs, best, purity, lse)


def _backward(ctx, d_top, d_purity, *_):
    return score_statistics_backward(*ctx.saved_tensors, d_top.contiguous(), d_purity.contiguous())


score_statistics.register_autograd(_backward, setup_context=_keep_for_backward)


# ---------------------------------------------------------------------------------------------------------------------
# rotation

@torch.library.custom_op('nanodrift::rotate', mutates_args=())
def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates pairs of coordinates of x (B, H, T, D) by angles (H, T, D/2, 2), which are cosines and sines. In generation,
    without gradients, rows may have angles of their own: (B, H, T, D/2, 2).

    An operator of its own: a product of complex numbers is one fast pass, which torch.compile does not generate."""
    return _like(x).copy_(torch.view_as_real(_complex(x) * torch.view_as_complex(angles)).flatten(-2))


@torch.library.custom_op('nanodrift::rotate_backward', mutates_args=())
def rotate_backward(x: Tensor, angles: Tensor, grad: Tensor, learned: bool) -> tuple[Tensor, Tensor]:
    grad = _complex(grad)
    dx = _like(x).copy_(torch.view_as_real(grad * torch.view_as_complex(angles).conj()).flatten(-2))
    d_angles = torch.view_as_real((_complex(x).conj() * grad).sum(0)) if learned else torch.zeros_like(angles)
    return dx, d_angles


def _complex(x):
    return torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))


def _like(x):
    """An empty (B, H, T, D) in the memory layout (B, T, H, D), as the output of c_attn has it."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


@rotate.register_fake
def _(x, angles):
    return _like(x)


@rotate_backward.register_fake
def _(x, angles, grad, learned):
    return _like(x), torch.empty_like(angles)


def _backward_of_rotate(ctx, grad):
    learned = ctx.needs_input_grad[1]
    dx, d_angles = rotate_backward(*ctx.saved_tensors, grad.contiguous(), learned)
    return dx, d_angles if learned else None


rotate.register_autograd(_backward_of_rotate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


# ---------------------------------------------------------------------------------------------------------------------
# around attention

def widen(x, *columns):
    """x (..., D) with further coordinates, and zeros up to a multiple of eight, which fused attention on GPUs asks for."""
    width = x.size(-1) + len(columns)
    columns = [c.to(x.dtype).expand(*x.shape[:-1], 1) for c in columns]
    return F.pad(torch.cat((x, *columns), dim=-1), (0, -width % 8))


def high_and_low(x, dtype):
    """A float32 tensor as two tensors of a shorter type, whose sum is equal to it up to rounding."""
    high = x.to(dtype)
    return high, (x - high.float()).to(dtype)


class Recomputed:
    """A block that keeps only its inputs for the backward pass."""

    def __init__(self, block):
        self.block, self.forward, self.compile = block, block.forward, block.compile

    def __call__(self, *inputs):
        if torch.is_grad_enabled():
            return checkpoint(self.block, *inputs, use_reentrant=False)
        return self.block(*inputs)


# ---------------------------------------------------------------------------------------------------------------------
# packed linears

class Linear(nn.Linear):
    """nn.Linear, whose product a step of generation can replace by a faster one: see `packed_weights`."""
    product = None

    def forward(self, x):
        return super().forward(x) if self.product is None else self.product(x)


def pack_weights(model, rows):
    """{Linear: a faster function for its product with so many rows}, where there is one: on a CPU in float32 or, where the
    processor multiplies it, in bfloat16, for a model of at most PACK_AT_MOST bytes; on other devices in 16 bits."""
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    weight = linears[0].weight
    dtype = compute_dtype(weight)
    if weight.device.type == 'cpu':
        fast = sum(linear.weight.nbytes for linear in linears) <= PACK_AT_MOST and (
            dtype == torch.float32 or dtype == torch.bfloat16 and cpu_multiplies_bfloat16())
    else:
        fast = dtype != torch.float32  # autocast would make the copy for every token
    if not fast:
        return {}
    return {linear: packed_linear(linear.weight.detach().to(dtype), linear.bias, rows) for linear in linears}


def packed_linear(weight, bias, rows):
    """Returns x (..., K) -> x @ weight^T + bias (..., N) in the type of weight (N, K); on a CPU with a copy of it in the
    layout that is fastest to read for this many rows of x, since reading weights dominates the time."""
    bias = None if bias is None else bias.detach().to(weight.dtype)
    on_cpu = weight.device.type == 'cpu'
    if on_cpu and rows == 1 and len(weight) > weight.size(1) and bias is None and weight.dtype == torch.float32:
        columns = weight.t().contiguous()  # MKL adds long columns faster than it sums short rows
        return lambda x: x @ columns
    if not on_cpu or not torch.backends.mkldnn.is_available():
        return lambda x: F.linear(x.to(weight.dtype), weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), packed, bias, 'none', [], '')


@contextmanager
def packed_weights(packed):
    """Uses the packed copies of `pack_weights` only inside the `with`, so that copies of outdated weights are never used."""
    for linear, product in packed.items():
        linear.product = product
    try:
        yield
    finally:
        for linear in packed:
            linear.product = None
