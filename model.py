"""
Every architecture of nanoDrift in one file. `model_type` is branched on at three seams: attention, trunk and output.

gpt2      GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; shapes and names of
          https://github.com/openai/gpt-2/blob/master/src/model.py, logits those of Hugging Face's GPT2LMHeadModel
dd        drift-diffusion attention; rotating: a rotary embedding of its own for every head; parallel: blocks in pairs;
          duo: next-token and fill-in prediction in one pass: BluebrainAI, Parallel Transformer Models, 2025
heat      heat-kernel attention: Curry, "Diffusion Attention: Replacing Softmax with Heat Kernel Dynamics", zenodo 18004600
diffusion masked diffusion: attention looks both ways, masked tokens are filled in and, with the repair objective, wrong ones
          flagged: Sahoo et al., arXiv 2406.07524; refinement.py has the samplers
drifting  noise to text in one forward pass: Deng, Li, Li, Du, He, arXiv 2602.04770; drifting.py has the field it learns from

`published=True` gives a type as it was published where the default mends a flaw of it.
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from configurator import UserError, one_of, option
from drifting import AFFINITY_FLOOR, FEATURES, STYLES, TEMPERATURES, Field, batch, features, residual
from machine import exact, packed_linear
from objectives import LOGITS_PER_CHUNK, OBJECTIVES, get_objective
from refinement import RefineConfig, refine, refuse_undefined

MODEL_TYPES = tuple(OBJECTIVES)
ENCODER_OPTIONS = ('encoder', 'drift_weight', 'drift_features', 'drift_temperatures', 'drift_floor')  # of one objective
OPTIONS = {  # which options a model type has beyond those of all
    'gpt2': (), 'dd': ('apply_drift', 'apply_diffusion', 'baseline_each_head', 'diffusion_std', 'published'),
    'heat': ('heat_form', 'heat_t', 'heat_t_min', 'heat_t_max', 'published'),
    'rotating': ('rotating_head', 'use_norm'), 'parallel': ('parallel_merge',), 'duo': ('duo_fill_weight', 'published'),
    'diffusion': ('diffusion_objective', 'positions', 'penalty_keep_mask', 'penalty_mask_correct', *ENCODER_OPTIONS),
    'drifting': ('encoder', 'drift_features', 'drift_temperatures', 'drift_floor', 'drift_output', 'drift_look',
                 'drift_prefix', 'drift_positives'),
}
# of two dimensions or more, and yet no matrices
NO_DECAY = ('drift_param', 'baseline', 'diffusion_param', 'frequencies', 'codebook', 'look')
LEAST_HEAT_TIME = 1e-6  # below, gradients of the distance form overflow float32
LEAST_FIELD_TEMPERATURE = 1e-6  # likewise distances in its units
PAD_VOCAB_TO = 64  # tensor cores and AMX tiles want round sizes; the padding never leaves the model
LOOK_AROUND = 5.0  # biases of q and k: the score of the places beside is about 3 lower
SHARPNESS = 3.0  # of soft tokens
COLDEST = 1e-30  # a temperature that can still be divided by
PACK_AT_MOST = 2 ** 31  # bytes of weights that generation may hold a second copy of


@dataclass
class GPTConfig:
    """The shape of a model; saved in its checkpoint. Raises UserError on values that contradict each other."""
    model_type: str = option('gpt2', 'which of the model types', MODEL_TYPES)
    block_size: int = option(1024, 'the context, in tokens')
    vocab_size: int = option(50257, 'ids that have text; train.py takes it from the data set')
    n_layer: int = option(12, 'blocks')
    n_head: int = option(12, 'attention heads per block')
    n_embd: int = option(768, 'channels, a multiple of n_head')
    n_inner: int = option(0, 'channels inside the MLP; 0 means 4 * n_embd')
    dropout: float = option(0.0, 'dropout probability; 0 for pretraining, 0.1 and more for small data')
    bias: bool = option(True, 'biases in Linear and LayerNorm, as in GPT-2; False is slightly faster, but not for diffusion')
    # options of one type
    published: bool = option(False, 'dd, adaptive heat, duo: as published, its look into the future included')
    apply_drift: bool = option(True, 'dd: y + d * y on the output y of attention, d learned')
    apply_diffusion: bool = option(True, 'dd: Gaussian noise on the output of attention, in training')
    baseline_each_head: bool = option(True, 'dd: a drift d for each head, or one per layer; published: a baseline or none')
    diffusion_std: float = option(0.1, 'dd: standard deviation of the noise; published: where it starts')
    heat_form: str = option('dot', 'heat: softmax of q.k / 2t, or of -|q-k|^2 / 4t', ('dot', 'distance'))
    heat_t: str = option('depth', "heat: diffusion time, a number; 'depth': 0.28 * sqrt(4 / n_layer); 'adaptive': learned",
                         numeric=True)
    heat_t_min: float = option(0.1, 'heat: shortest adaptive time')
    heat_t_max: float = option(10.0, 'heat: longest adaptive time')
    rotating_head: str = option('lr', 'rotating: learned rates, or fixed ones in a geometric progression', ('lr', 'gp'))
    use_norm: bool = option(False, 'rotating: LayerNorm over the rates of a head')
    parallel_merge: str = option('mean', 'parallel: how two blocks become one', ('mean', 'add', 'concat'))
    duo_fill_weight: float = option(1.0, 'duo: weight of the fill-in loss; 0 trains exactly gpt2')
    diffusion_objective: str = option('repair', 'diffusion: fill, keep and flag; the bound on the likelihood alone; or the '
                                      'bound and the field of drifting', ('repair', 'nelbo', 'drift'))
    positions: str = option('rotary', 'diffusion: what tells the places of tokens apart', ('rotary', 'learned', 'both'))
    penalty_keep_mask: float = option(0.25, 'diffusion, repair: weight of a masked token that is answered with [MASK]')
    penalty_mask_correct: float = option(0.5, 'diffusion, repair: weight of a right token that is answered with [MASK]')
    drift_weight: float = option(1.0, 'diffusion, drift: weight of the field beside the bound')
    encoder: str = option('', "drifting, diffusion with drift: folder of a gpt2 run, or 'hf:NAME_OR_FOLDER', in whose "
                          'features text is compared')
    drift_features: str = option('states', 'drifting, diffusion with drift: what is compared: hidden states of the encoder; '
                                 'embeddings of neighbouring tokens; or both', tuple(FEATURES))
    drift_temperatures: str = option(','.join(map(str, TEMPERATURES)), 'drifting, diffusion with drift: temperatures of the '
                                     'field, in mean distances', numeric=True)
    drift_floor: float = option(AFFINITY_FLOOR, 'drifting, diffusion with drift: least affinity of two samples; 0 for many '
                                'samples, each of whose affinities is smaller')
    drift_output: str = option('embedding', 'drifting: an embedding for each position; a mean of those there are; or the '
                               'likeliest one, with the gradient of the mean', ('embedding', 'soft', 'straight'))
    drift_look: float = option(0.0, 'drifting: how strongly heads look at the places beside them at first; 20 is almost '
                               'nothing else')
    drift_prefix: int = option(0, 'drifting: text starts with up to so many given tokens')
    drift_positives: int = option(0, 'drifting: real examples beyond as many as are generated')

    def __post_init__(self):
        one_of('model_type', self.model_type, MODEL_TYPES)
        for f in fields(self):
            owners = [t for t in MODEL_TYPES if f.name in OPTIONS[t]]
            if owners and self.model_type not in owners and getattr(self, f.name) != f.default:
                raise UserError(f'{f.name} is an option of model_type {" and ".join(owners)}, not of {self.model_type}')
            if f.metadata['choices']:
                one_of(f.name, getattr(self, f.name), f.metadata['choices'])
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise UserError(f'{name}={getattr(self, name)} must be at least 1')
        for name in ('n_inner', 'drift_prefix', 'drift_positives'):
            if getattr(self, name) < 0:
                raise UserError(f'{name}={getattr(self, name)} must be at least 0')
        self._check_drifting()
        if self.n_embd % self.n_head:
            raise UserError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}')
        if not 0 <= self.dropout < 1:
            raise UserError(f'dropout={self.dropout} must be at least 0 and below 1')
        for name in ('diffusion_std', 'duo_fill_weight', 'penalty_keep_mask', 'penalty_mask_correct', 'drift_weight',
                     'drift_floor', 'drift_look'):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f'{name}={getattr(self, name)} must be at least 0')
        if self.heat_t not in ('depth', 'adaptive') and not LEAST_HEAT_TIME <= self.heat_time() < math.inf:
            raise UserError(f'heat_t={self.heat_t} must be at least {LEAST_HEAT_TIME}, and finite')
        if not LEAST_HEAT_TIME <= self.heat_t_min < self.heat_t_max < math.inf:
            raise UserError(f'heat_t_min={self.heat_t_min} must be at least {LEAST_HEAT_TIME} and below heat_t_max='
                            f'{self.heat_t_max}')
        self._refuse_idle_options()
        head = self.n_embd // self.n_head
        if self.has_rotary and head % 2:
            raise UserError(f'rotary positions turn coordinates in pairs: n_embd / n_head = {head} must be even')
        if self.model_type == 'duo' and self.block_size < 2:
            raise UserError(f'duo looks one token ahead: block_size={self.block_size} must be at least 2')
        if self.model_type == 'parallel' and self.n_layer % 2:
            raise UserError(f'parallel runs blocks in pairs: n_layer={self.n_layer} must be even')

    def _refuse_idle_options(self):
        """Raises UserError on an option that another one leaves without effect."""
        fixed = self.model_type == 'heat' and self.heat_t != 'adaptive'
        no_flags = self.diffusion_objective != 'repair'
        for name, idle, needed in (('heat_t_min', fixed, 'heat_t=adaptive'), ('heat_t_max', fixed, 'heat_t=adaptive'),
                                   ('published', fixed, 'heat_t=adaptive'),
                                   ('published', self.model_type == 'duo' and not self.duo_fill_weight, 'a duo_fill_weight'),
                                   ('diffusion_std', not self.apply_diffusion, 'apply_diffusion=True'),
                                   ('baseline_each_head', not self.apply_drift, 'apply_drift=True'),
                                   ('penalty_keep_mask', no_flags, 'diffusion_objective=repair'),
                                   ('penalty_mask_correct', no_flags, 'diffusion_objective=repair')):
            if idle and getattr(self, name) != getattr(type(self), name):
                raise UserError(f'{name}={getattr(self, name)} has no effect without {needed}')

    def _check_drifting(self):
        if self.has_encoder and not self.encoder:
            raise UserError('drifting compares text in the features of a trained model: --encoder=FOLDER of a gpt2 run '
                            'on the same data, or hf:gpt2')
        if self.has_encoder and self.dropout:
            raise UserError(f'dropout={self.dropout}: the field is taken where a first pass was; leave it at 0')
        if self.model_type == 'drifting' and self.n_inner:
            raise UserError(f'n_inner={self.n_inner} has no meaning for drifting: leave it at 0')
        if self.model_type == 'drifting' and self.block_size < 3:
            raise UserError(f'block_size={self.block_size} must be at least 3: drifting is measured by 3-grams')
        self.field_temperatures()
        if self.drift_prefix >= self.block_size:
            raise UserError(f'drift_prefix={self.drift_prefix} must be below block_size={self.block_size}')
        named = [name for name in ENCODER_OPTIONS if getattr(self, name) != getattr(type(self), name)]
        if self.model_type == 'diffusion' and not self.has_encoder and named:
            raise UserError(f'{" and ".join(named)}: for --diffusion_objective=drift, not {self.diffusion_objective}')

    def field_temperatures(self):
        try:
            found = tuple(map(float, self.drift_temperatures.split(',')))
        except ValueError:
            found = ()
        if not found or not all(LEAST_FIELD_TEMPERATURE <= temperature < math.inf for temperature in found):
            raise UserError(f'drift_temperatures={self.drift_temperatures} must be numbers of at least '
                            f'{LEAST_FIELD_TEMPERATURE}, separated by commas')
        return found

    def heat_time(self):
        """The diffusion time t, unless it is adaptive."""
        if self.heat_t == 'depth':
            return 0.28 * math.sqrt(4 / self.n_layer)
        try:
            return float(self.heat_t)
        except ValueError:
            raise UserError(f"heat_t={self.heat_t!r} is neither a number nor one of: depth, adaptive") from None

    @property
    def has_rotary(self):
        return self.model_type in ('rotating', 'drifting') or self.model_type == 'diffusion' and self.positions != 'learned'

    @property
    def has_encoder(self):
        return self.model_type == 'drifting' or self.model_type == 'diffusion' and self.diffusion_objective == 'drift'

    @property
    def textless_ids(self):
        """Ids after vocab_size that the embedding has: the mask of duo and of diffusion."""
        return 1 if self.model_type == 'diffusion' or (self.model_type == 'duo' and self.duo_fill_weight) else 0

    @property
    def n_logits(self):
        """Columns of the logits: every id that has text, and [MASK] where it is an answer."""
        return self.vocab_size + (self.model_type == 'diffusion')


class KVCache:
    """Keys and values of the positions seen so far, for every layer: two tensors (L, B, H, T_max, D)."""

    def __init__(self, config, batch_size, max_len, device, dtype):
        shape = (config.n_layer, batch_size, config.n_head, max_len, config.n_embd // config.n_head)
        self.k, self.v = torch.zeros(2, *shape, device=device, dtype=dtype).unbind(0)
        self.length = 0  # positions held; advanced once per forward pass, after the last layer

    def append(self, layer, k, v):
        """Stores k, v (B, H, T, D) of the next T positions; returns those of all positions so far."""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Linear(nn.Linear):
    """nn.Linear, which a step of generation can lend a faster way to its product."""
    lent = None

    def forward(self, x):
        return super().forward(x) if self.lent is None else self.lent(x)


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
    Of the scores s_ij = q_i . k_j that a query sees, j <= i: their maximum, sum_j softmax(s_i)_j^2, log-sum-exp and argmax.

    q (N, Tq, D), k (N, Tk, D), the queries being the last Tq positions -> four tensors (N, Tq). Memory is linear in T: the
    scores are gone after use and computed again in the backward pass. Gradients flow through the first two. An operator
    of its own, for torch.compile would unroll the loop.
    """
    top, purity, lse = (q.new_empty(q.shape[:2], dtype=torch.float32) for _ in range(3))
    best = torch.empty(q.shape[:2], dtype=torch.int64, device=q.device)
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


class DiffusionTime(nn.Module):
    """heat_t='adaptive': log t of each query from three statistics of the scores it sees, by an MLP that all heads share."""

    def __init__(self, config):
        super().__init__()
        self.published = config.published
        self.log_min, self.log_max = math.log(config.heat_t_min), math.log(config.heat_t_max)
        self.mlp = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))

    def start(self):
        """t starts at sqrt(t_min t_max), whatever the scores."""
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.constant_(self.mlp[-1].bias, (self.log_min + self.log_max) / 2)

    def forward(self, q, k):
        """q (B, H, Tq, D), k (B, H, Tk, D), the queries being the last positions -> t (B, H, Tq, 1), float32.

        published: the statistics are averaged over all queries, so that one t, (B, H, 1, 1), sees the future."""
        B, H, Tq, D = q.shape
        Tk = k.size(2)
        q = q / math.sqrt(D)
        top, purity, *_ = score_statistics(q.flatten(0, 1), k.flatten(0, 1))
        seen = torch.arange(Tk - Tq + 1, Tk + 1, device=q.device, dtype=torch.float32)  # keys that each query sees
        mean = (q.float() * k.float().cumsum(2)[:, :, -Tq:]).sum(-1) / seen
        variance = purity.view(B, H, Tq) / seen - 1 / seen.square()
        statistics = torch.stack((mean, top.view(B, H, Tq), variance), dim=-1)  # (B, H, Tq, 3)
        if self.published:
            statistics = statistics.mean(2, keepdim=True)
        last = self.mlp[-1]  # not under autocast: a log t of 8 bits would be off by a percent
        log_t = (self.mlp[:-1](statistics).float() * last.weight.float()).sum(-1, keepdim=True) + last.bias.float()
        t = log_t.clamp(self.log_min, self.log_max).exp()
        if not self.training:
            self.last = t.detach().mean()  # for the log
        return t


@torch.library.custom_op('nanodrift::turn', mutates_args=())
def turn(x: Tensor, table: Tensor) -> Tensor:
    """Turns pairs of coordinates of x (B, H, T, D), taken as complex numbers, by table (H, T, D/2, 2) of cosines and sines.

    An operator of its own: a product of complex numbers is one fast pass, which torch.compile does not generate."""
    return _like(x).copy_(torch.view_as_real(_complex(x) * torch.view_as_complex(table)).flatten(-2))


@torch.library.custom_op('nanodrift::turn_backward', mutates_args=())
def turn_backward(x: Tensor, table: Tensor, grad: Tensor, learned: bool) -> tuple[Tensor, Tensor]:
    grad = _complex(grad)
    dx = _like(x).copy_(torch.view_as_real(grad * torch.view_as_complex(table).conj()).flatten(-2))
    d_table = torch.view_as_real((_complex(x).conj() * grad).sum(0)) if learned else torch.zeros_like(table)
    return dx, d_table


def _complex(x):
    return torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))


def _like(x):
    """An empty (B, H, T, D) in the memory layout (B, T, H, D), which is that of what c_attn gives."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


@turn.register_fake
def _(x, table):
    return _like(x)


@turn_backward.register_fake
def _(x, table, grad, learned):
    return _like(x), torch.empty_like(table)


def _backward_of_turn(ctx, grad):
    learned = ctx.needs_input_grad[1]
    dx, d_table = turn_backward(*ctx.saved_tensors, grad.contiguous(), learned)
    return dx, d_table if learned else None


turn.register_autograd(_backward_of_turn, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def looking_around(rates, strength):
    """Biases of q and k (2, H, D), for rates (H, D/2), which rotary positions turn into a preference for a distance: the
    heads look one place back, one ahead, two back, and so on."""
    head = torch.arange(len(rates))[:, None]
    angle = (1 + head // 2) * (head % 2 * 2 - 1) * rates
    near = strength * (rates > 0.05)  # slower pairs tell no neighbours apart
    q, k = (near, torch.zeros_like(near)), (near * angle.cos(), -near * angle.sin())
    return torch.stack([torch.stack(pair, dim=-1).flatten(1) for pair in (q, k)])


class RotaryEmbedding(nn.Module):
    """Turns the i-th pair of coordinates of head h by position * frequencies[h, i]. RoPE: Su et al., arXiv 2104.09864."""

    def __init__(self, config):
        super().__init__()
        H, D = config.n_head, config.n_embd // config.n_head
        rates = 10000.0 ** (-torch.arange(0, D, 2) / D)
        if config.model_type != 'rotating':
            self.register_buffer('frequencies', rates.repeat(H, 1), persistent=False)  # the same for every head
        elif config.rotating_head == 'lr':
            self.frequencies = nn.Parameter(torch.randn(H, D // 2))
        else:
            self.register_buffer('frequencies', torch.logspace(0, -1, H)[:, None] * rates)  # heads from 1 to 0.1
        self.layer_norm = nn.LayerNorm(D // 2) if config.use_norm else None
        fixed = not config.use_norm and not isinstance(self.frequencies, nn.Parameter)
        self.register_buffer('table', self.angles(0, config.block_size) if fixed else None, persistent=False)
        self.register_load_state_dict_post_hook(RotaryEmbedding._retable)

    def _retable(self, keys):
        """Rates that came out of a checkpoint may be others."""
        if self.table is not None:
            self.table = self.angles(0, self.table.size(1))

    def angles(self, start, end):
        """Cosines and sines for these positions, (H, T, D/2, 2)."""
        f = self.frequencies if self.layer_norm is None else self.layer_norm(self.frequencies)
        angle = torch.arange(start, end, device=f.device)[:, None] * f[:, None].float()
        return torch.stack((angle.cos(), angle.sin()), dim=-1)

    def forward(self, q, k, start):
        """q, k (B, H, T, D), the first of them at position `start`."""
        end = start + q.size(2)
        table = self.angles(start, end) if self.table is None else self.table[:, start:end].contiguous()
        return turn(q, table), turn(k, table)


def widen(x, *columns):
    """x (..., D) with further coordinates, and zeros up to a multiple of eight, which fused attention on GPUs asks for."""
    width = x.size(-1) + len(columns)
    columns = [c.to(x.dtype).expand(*x.shape[:-1], 1) for c in columns]
    return F.pad(torch.cat((x, *columns), dim=-1), (0, -width % 8))


def high_and_low(x, dtype):
    """float32 as two numbers of a shorter type whose sum it is."""
    high = x.to(dtype)
    return high, (x - high.float()).to(dtype)


class CausalSelfAttention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.n_head, self.dropout, self.layer = config, config.n_head, config.dropout, layer
        first_half = 2 * layer < config.n_layer
        self.looks_around = config.model_type == 'diffusion' and config.has_rotary and config.bias and first_half
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.ends_residual = True
        if config.model_type == 'dd':
            self._build_drift_diffusion(config)
        elif config.model_type == 'heat':
            self.time = DiffusionTime(config) if config.heat_t == 'adaptive' else None
        elif config.has_rotary:
            self.rope = RotaryEmbedding(config)

    @torch.no_grad()
    def look_around(self):
        """diffusion: the heads of the first half of the blocks start out looking at their neighbours. All that a [MASK]
        knows is its place. From heads that look everywhere alike, training takes thousands of steps to find the neighbours,
        and until then it learns no more than how often each token occurs (LOG.md)."""
        bias = self.c_attn.bias.view(3, self.n_head, -1)
        bias[:2] = looking_around(self.rope.frequencies, LOOK_AROUND)

    def forward(self, x, cache=None, ahead=None):
        """x (B, T, C) -> (B, T, C). `ahead` is for duo: see `_masks`."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        if self.config.has_rotary:
            q, k = self.rope(q, k, 0 if cache is None else cache.length)
        if cache is not None:
            assert T == 1 or cache.length == 0, 'a cache is filled by one prompt, then by one token at a time'
            k, v = cache.append(self.layer, k, v)
        if ahead is not None:
            y = self._two_streams(q, k, v, ahead)
        elif self.config.model_type == 'heat':
            y = self._heat(q, k, v)
        else:
            y = self._attend(q, k, v)
        y = y.transpose(1, 2)  # (B, T, H, D)
        if self.config.model_type == 'dd':
            y = self._drift_diffusion(y)
        y = y.reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def _attend(self, q, k, v, scale=None):
        """Attention of q (B, H, Tq, D), which are the last of the positions of k, v (B, H, Tk, D), to what comes before;
        with diffusion to everything."""
        dropout = self.dropout if self.training else 0.0
        causal = self.config.model_type != 'diffusion' and q.size(2) > 1
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=scale)

    # -- dd -------------------------------------------------------------------------------------------------------------

    def _build_drift_diffusion(self, config):
        """Parameters by their published names; shapes (H, D) as published, else one number per head or for all."""
        H, D = config.n_head, config.n_embd // config.n_head
        shape = (H, D) if config.published else (H, 1) if config.baseline_each_head else (1, 1)
        if config.apply_drift:
            self.drift_param = nn.Parameter(torch.randn(shape) * 0.02)
            if config.published and config.baseline_each_head:
                self.baseline = nn.Parameter(torch.randn(H, D) * 1e-3)
        if config.apply_diffusion and config.published:
            self.diffusion_param = nn.Parameter(torch.full((H, D), config.diffusion_std))

    def _drift_diffusion(self, y):
        """The output of attention, y (B, T, H, D), drifted, and in training diffused."""
        c = self.config
        if c.apply_drift and c.published:
            y = y + self.drift_param.sigmoid() * (y - self.baseline if c.baseline_each_head else y)
        elif c.apply_drift:
            y = y * (1 + self.drift_param)
        if c.apply_diffusion and self.training:
            y = y + (self.diffusion_param if c.published else c.diffusion_std) * torch.randn_like(y)
        return y

    # -- heat -----------------------------------------------------------------------------------------------------------

    def _heat(self, q, k, v):
        """softmax(q.k / 2t), or softmax(-|q-k|^2 / 4t): |q|^2 is the same for all keys and cancels, and -|k|^2 / 2 is one
        more coordinate of k that meets a 1 in q. The fused attention wants v as wide."""
        D, one = q.size(-1), torch.ones((), device=q.device)
        if self.time is None:
            scale = 1 / (2 * self.config.heat_time())
        else:
            one, scale = (1 / (2 * self.time(q, k))).to(q.dtype), 1.0
            q = q * one
        if self.config.heat_form == 'dot':
            return self._attend(q, k, v, scale)
        halves = high_and_low(-k.float().square().sum(-1, keepdim=True) / 2, k.dtype)
        y = self._attend(widen(q, one, one), widen(k, *halves), F.pad(v, (0, -(D + 2) % 8 + 2)), scale)
        return y[..., :D]

    # -- duo ------------------------------------------------------------------------------------------------------------

    def _two_streams(self, q, k, v, ahead):
        """Tokens and then masks, (B, H, T + T-1, D) -> the same. Tokens never look at masks.

        The mask after token i attends to the tokens before i, to itself and to token i+1. The keys and values of the last
        come from `ahead` (B, T-1, C), the embeddings of the tokens 2 to T through this layer's norm, which know nothing of
        token i; published: from their hidden states, which have seen it.

        The two extra keys of a mask enter the fused causal attention as one key before all others: its score is their
        log-sum-exp, handed over in a further coordinate, and a further coordinate of the values tells the weight that it
        got, which the two then share."""
        B, H, D = q.size(0), q.size(1), q.size(3)
        M = ahead.size(1)
        (q, q_mask), (k, k_mask), (v, v_mask) = (x.split((M + 1, M), dim=2) for x in (q, k, v))
        y = self._attend(q, k, v)
        k_ahead, v_ahead = self._look_ahead(k, v, ahead)
        q_mask = q_mask / math.sqrt(D)
        scores = torch.stack([(q_mask * other).sum(-1, dtype=torch.float32) for other in (k_mask, k_ahead)], dim=-1)
        together = high_and_low(scores.logsumexp(-1, keepdim=True), q.dtype)  # (B, H, T-1, 1)
        shared = scores.softmax(-1).to(v.dtype)
        zero, one = k.new_zeros(B, H, 1, D), torch.ones((), device=q.device)
        keys = torch.cat((widen(zero, one, one), widen(k[:, :, :M - 1], 0 * one, 0 * one)), dim=2)
        values = torch.cat((widen(zero, one, 0 * one), widen(v[:, :, :M - 1], 0 * one, 0 * one)), dim=2)
        found = self._attend(widen(q_mask, *together), keys, values, scale=1.0)
        extra = shared[..., :1] * v_mask + shared[..., 1:] * v_ahead
        return torch.cat((y, found[..., :D] + found[..., D:D + 1] * extra), dim=2)


    def _look_ahead(self, k, v, ahead):
        """Keys and values (B, H, T-1, D) of the next token, for the mask before it."""
        if self.config.published:
            return k[:, :, 1:], v[:, :, 1:]
        B, M, C = ahead.shape
        bias = None if self.c_attn.bias is None else self.c_attn.bias[C:]
        both = F.linear(ahead, self.c_attn.weight[C:], bias)
        return both.view(B, M, 2, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4).unbind(0)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, inner, bias=config.bias)
        self.c_proj = Linear(inner, config.n_embd, bias=config.bias)
        self.c_proj.ends_residual = True

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate='tanh')  # GPT-2's gelu
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, ahead=None):
        x = x + self.attn(self.ln_1(x), cache, None if ahead is None else self.ln_1(ahead))
        x = x + self.mlp(self.ln_2(x))
        return x


class GeneratorBlock(nn.Module):
    """A DiT block: attention both ways, rotary positions, normalised q and k, SwiGLU; shifted, scaled and gated by a
    condition, the gates closed at first (adaLN-Zero). Peebles and Xie, arXiv 2212.09748.

    No biases but with drift_look those of q and k, which are not in the published generator: its heads look everywhere alike
    at first, noise says nothing of where it stands, and so samples stay independent tokens for long (LOG.md). With q and k
    normalised, some 10 leave the rest of attention its say; at 20 a head is little but a shift by its distance, and stays
    that for hundreds of steps."""

    def __init__(self, config):
        super().__init__()
        C, D = config.n_embd, config.n_embd // config.n_head
        inner = 64 * math.ceil(8 * C / 3 / 64)
        self.n_head = config.n_head
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.q_norm, self.k_norm, self.rope = nn.RMSNorm(D), nn.RMSNorm(D), RotaryEmbedding(config)
        self.look = nn.Parameter(looking_around(self.rope.frequencies, config.drift_look)) if config.drift_look else None
        self.c_fc, self.c_out = nn.Linear(C, 2 * inner, bias=False), nn.Linear(inner, C, bias=False)
        self.modulation = nn.Linear(C, 6 * C, bias=False)

    def forward(self, x, condition, mask=None):
        """x (B, T, C), condition (B, C) -> (B, T, C). mask (T, T) says who may see whom."""
        B, T, C = x.shape
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        h = F.rms_norm(x, (C,)) * (1 + scale_1) + shift_1
        q, k, v = self.c_attn(h).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if self.look is not None:
            q, k = q + self.look[0, :, None], k + self.look[1, :, None]
        q, k = self.rope(q, k, 0)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        x = x + gate_1 * self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        h = F.rms_norm(x, (C,)) * (1 + scale_2) + shift_2
        gate, value = self.c_fc(h).chunk(2, dim=-1)
        return x + gate_2 * self.c_out(F.silu(gate) * value)


class Generator(nn.Module):
    """drifting: noise (B, T, C), style indices and maybe given embeddings -> embeddings (B, T, C), all in one pass."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.c_in = nn.Linear(C, C)
        self.c_prefix = nn.Linear(C, C) if config.drift_prefix else None
        self.condition = nn.Sequential(nn.Linear(C, C), nn.SiLU(), nn.Linear(C, C))
        self.codebook = nn.Parameter(torch.randn(STYLES, C) * 0.02)
        self.h = nn.ModuleList(GeneratorBlock(config) for _ in range(config.n_layer))
        self.modulation = nn.Linear(C, 2 * C)
        self.c_out = nn.Linear(C, C)

    def start(self, vocabulary):
        """Gates closed; outputs around the mean of the embeddings (V, C), spread as they are: from one spot no field would
        spread them."""
        for block in self.h:
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.modulation.weight)
        mean = vocabulary.mean(0)
        nn.init.normal_(self.c_out.weight, std=float((vocabulary - mean).std()) / math.sqrt(len(mean)))
        with torch.no_grad():
            self.c_out.bias.copy_(mean)

    def forward(self, noise, style, prefix=None, run=lambda block, *inputs: block(*inputs)):
        """prefix (B, P, C): embeddings of given tokens, which see each other only. `run` is how blocks are called."""
        B, T, C = noise.shape
        condition = F.silu(self.condition(noise.mean(1)) + self.codebook[style].mean(1))
        x, mask = self.c_in(noise).float(), None
        if self.c_prefix is not None:  # of no tokens too: under DDP every parameter must have a gradient
            P = prefix.size(1)
            x = torch.cat((self.c_prefix(prefix).float(), x[:, P:]), dim=1)
            mask = torch.ones(T, T, dtype=torch.bool, device=x.device)
            mask[:P, P:] = False
        for block in self.h:
            x = run(block, x, condition, mask)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.c_out(F.rms_norm(x, (C,)) * (1 + scale) + shift)


class GPT(nn.Module):

    encoder = None

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.objective = get_objective(config)
        self.gradient_checkpointing = False
        if config.has_encoder:
            self._attach_encoder(config)
        if config.model_type == 'drifting':
            self.generator = Generator(config)
            self.apply(self._init_weights)
            self.generator.start(self.encoder.transformer.wte.weight[:config.vocab_size])
            return
        padded = self.padded_vocab_size(config.vocab_size + config.textless_ids)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(padded, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = Linear(config.n_embd, padded, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        if config.model_type == 'diffusion' and config.positions == 'rotary':
            del self.transformer['wpe']
        if config.model_type == 'parallel' and config.parallel_merge == 'concat':
            self.transformer.bottleneck = Linear(2 * config.n_embd, config.n_embd)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        """GPT-2: N(0, 0.02), and 1/sqrt(2L) of that where a branch ends in the residual stream."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = 0.02
            if getattr(module, 'ends_residual', False):
                std /= math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, DiffusionTime):  # after its parts: apply goes from the inside out
            module.start()
        if isinstance(module, CausalSelfAttention) and module.looks_around:
            module.look_around()

    def _attach_encoder(self, config):
        """The encoder is frozen and someone else's: not among the parameters, not in the state dict."""
        from checkpoint import load_encoder
        encoder = load_encoder(config.encoder)
        for name in ('n_embd', 'vocab_size') if config.model_type == 'drifting' else ('vocab_size',):
            its, mine = getattr(encoder.config, name), getattr(config, name)
            if its != mine:
                raise UserError(f'encoder={config.encoder} has {name}={its}, not {mine}: it must have the same')
        if encoder.config.block_size < config.block_size:
            raise UserError(f'encoder={config.encoder} reads {encoder.config.block_size} tokens at most: lower --block_size')
        object.__setattr__(self, 'encoder', encoder.requires_grad_(False))

    def _apply(self, fn, recurse=True):
        if self.encoder is not None:
            self.encoder._apply(fn)  # it goes where the model goes
        return super()._apply(fn, recurse)

    @property
    def device(self):
        return next(self.parameters()).device

    @staticmethod
    def padded_vocab_size(vocab_size):
        return math.ceil(vocab_size / PAD_VOCAB_TO) * PAD_VOCAB_TO

    def num_params(self):
        """Parameters, without the position table (nanoGPT's count)."""
        has_table = self.config.model_type != 'drifting' and 'wpe' in self.transformer
        positions = self.transformer.wpe.weight.numel() if has_table else 0
        return sum(p.numel() for p in self.parameters()) - positions

    def flops_per_token(self):
        """Floating-point operations of forward and backward per token of text (PaLM, arXiv 2204.02311, appendix B)."""
        c = self.config
        flops = 6 * self.num_params() + 12 * c.n_layer * c.n_embd * c.block_size
        if c.model_type == 'duo' and c.duo_fill_weight:  # a mask for every token, and keys and values from embeddings
            flops = 2 * flops + (0 if c.published else 6 * c.n_layer * 2 * c.n_embd ** 2)
        return flops

    # -- forward --------------------------------------------------------------------------------------------------------

    def trunk(self, idx, cache=None, fill=False):
        """Token ids (B, T) -> hidden states (B, T, C) after the final norm; with `fill`, which duo alone has, behind them
        those of its masks, (B, T + T-1, C): one after every token but the last."""
        start = 0 if cache is None else cache.length
        T = idx.size(1)
        assert start + T <= self.config.block_size, f'{start + T} tokens do not fit block_size {self.config.block_size}'
        positions = self.transformer.wpe.weight[start:start + T] if 'wpe' in self.transformer else 0
        x = F.dropout(self.transformer.wte(idx) + positions, self.config.dropout, self.training)  # (B, T, C)
        ahead = None
        if fill and T > 1:
            masks = (self.transformer.wte.weight[self.config.vocab_size] + positions[:-1]).expand(len(x), -1, -1)
            ahead = x[:, 1:]
            x = torch.cat((x, F.dropout(masks, self.config.dropout, self.training)), dim=1)
        x = self._blocks(x, cache, ahead)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def _blocks(self, x, cache, ahead):
        h = self.transformer.h
        if self.config.model_type != 'parallel':
            for block in h:
                x = self._run(block, x, cache, ahead)
            return x
        for left, right in zip(h[::2], h[1::2]):
            x = self._merge(self._run(left, x, cache), self._run(right, x, cache))
        return x

    def _merge(self, left, right):
        """parallel: what two blocks made of the same x -> x."""
        how = self.config.parallel_merge
        if how == 'mean':
            return (left + right) / 2
        if how == 'add':
            return left + right
        return self.transformer.bottleneck(torch.cat((left, right), dim=-1))

    def _run(self, block, x, cache=None, ahead=None):
        if cache is not None:
            return block.forward(x, cache)  # never compiled: its lengths change at every step
        if self._recomputes():
            return checkpoint(block, x, None, ahead, use_reentrant=False)
        return block(x, None, ahead)

    def _recomputes(self):
        return self.gradient_checkpointing and torch.is_grad_enabled()  # a frozen encoder, never training, too

    def head(self, x):
        """Hidden states (..., C) -> logits (..., n_logits), the padding cut off."""
        return self.lm_head(x)[..., :self.config.n_logits]

    def forward(self, idx, targets=None, weights=None, return_logits=True):
        """idx, targets, weights (B, T) -> logits, loss.

        With targets the logits are those of every position, (B, T, n_logits); return_logits=False leaves them None
        and is faster by far where the vocabulary is large. Without targets: logits of the last position, (B, 1,
        n_logits), or with diffusion of every one, and None. drifting takes noise (B, T, C), a drifting.Field and style
        indices (B, 32), diffusion with drift ids, a drifting.Field and weights; then there are no logits."""
        if isinstance(targets, Field):
            return None, self._drifting_loss(idx, targets, weights)
        x = self.trunk(idx, fill=targets is not None and targets.size(1) > idx.size(1))
        if targets is None:
            return self.head(x if self.config.model_type == 'diffusion' else x[:, [-1]]), None
        if return_logits:
            logits = self.head(x)
            return logits, self.objective.loss(logits, targets, weights)
        return None, self.objective.head_loss(x, self.lm_head.weight, self.config.n_logits, targets, weights)

    def _drifting_loss(self, idx, field, weights):
        if self.config.model_type == 'drifting':
            embeddings = self.generator_output(idx, weights, field.ids)
            return residual(features(self.encoder, embeddings, field.places, self.config.drift_features), field)
        x = self.trunk(idx)
        bound = self.objective.head_loss(x, self.lm_head.weight, self.config.n_logits, field.ids, weights)
        found = features(self.encoder, self.soft_tokens(idx, x), field.places, self.config.drift_features)
        return bound + self.config.drift_weight * residual(found, field) / len(field.scales)

    def soft_tokens(self, idx, x):
        """diffusion with drift: ids (B, T) and their hidden states (B, T, C) -> embeddings of the encoder (B, T, C'), where
        a token is masked the mean of those there are, weighted by what the model expects."""
        table, masked = self.encoder.transformer.wte.weight[:self.config.vocab_size], idx == self.config.vocab_size

        means = expected(x[masked], table, lambda part: self.head(part)[:, :-1])
        return table[idx.masked_fill(masked, 0)].masked_scatter(masked[..., None], means)

    def states(self, x, depths):
        """Hidden states (B, T, C) after each of so many blocks, in rising order, of input embeddings x (B, T, C), which
        positions are added to; the last block's after the final norm."""
        x, found = x + self.transformer.wpe.weight[:x.size(1)], []
        for number, block in enumerate(self.transformer.h, start=1):
            x = self._run(block, x)
            if number in depths:
                found.append(self.transformer.ln_f(x) if number == len(self.transformer.h) else x)
        return found

    def generator_output(self, noise, style, prefix=None):
        """drifting: noise (B, T, C), style indices (B, 32), ids (B, P) that the text starts with -> embeddings (B, T, C)."""
        table = self.encoder.transformer.wte.weight[:self.config.vocab_size]
        prefix = torch.zeros(len(noise), 0, dtype=torch.long, device=noise.device) if prefix is None else prefix
        given = table[prefix]
        again = {'run': partial(checkpoint, use_reentrant=False)} if self._recomputes() else {}
        x = self.generator(noise, style, given, **again)
        if self.config.drift_output != 'embedding':
            near = partial(nearness, table=table)
            soft = expected(x.flatten(0, 1), table, near).view(x.shape)
            x = soft if self.config.drift_output == 'soft' else likeliest(x, table, near) + soft - soft.detach()
        return torch.cat((given.to(x.dtype), x[:, given.size(1):]), dim=1)

    def nearest(self, x, temperature=1.0, rng=None):
        """For embeddings x (B, T, C): cosines (B, T) with the nearest ones of the vocabulary, and the ids (B, T) of these;
        at temperatures other than 1 ids are drawn, by softmax of cosines / temperature."""
        table = F.normalize(self.encoder.transformer.wte.weight[:self.config.vocab_size].float(), dim=-1)
        found = []
        for part in F.normalize(x.float(), dim=-1).flatten(0, 1).split(max(1, LOGITS_PER_CHUNK // len(table))):
            with exact(x.device):
                cosines = part @ table.t()
            drawn = cosines.argmax(-1) if temperature == 1.0 else sample_logits(cosines.cpu(), temperature, rng=rng)
            drawn = drawn.to(x.device)
            found.append((cosines.gather(1, drawn[:, None]).squeeze(1), drawn))
        return [torch.cat(parts).view(x.shape[:2]) for parts in zip(*found)]

    def compile_blocks(self):
        """torch.compile, block by block: one block is compiled and its code serves all of them, so that it takes
        seconds where the whole model takes a minute, and the head stays free to work in chunks."""
        if self.device.type == 'cpu':  # compiled code draws dd's noise one number at a time
            torch._inductor.config.fallback_random = True
        blocks = self.generator.h if self.config.model_type == 'drifting' else self.transformer.h
        for block in blocks:
            block.compile(dynamic=False)  # few shapes occur, and each is faster for being known

    @property
    def causal(self):
        """Whether a later token changes nothing of an earlier one: diffusion and published adaptive heat look ahead."""
        c = self.config
        looks_ahead = c.model_type == 'heat' and c.heat_t == 'adaptive' and c.published
        return c.model_type not in ('diffusion', 'drifting') and not looks_ahead

    # -- optimizer ------------------------------------------------------------------------------------------------------

    def decay_groups(self, weight_decay):
        """Parameter groups for the optimizer: matrices and tables decay, biases, gains and NO_DECAY do not."""
        trainable = {name: p for name, p in self.named_parameters() if p.requires_grad}
        decay = [p for name, p in trainable.items() if p.dim() >= 2 and name.rpartition('.')[2] not in NO_DECAY]
        no_decay = [p for name, p in trainable.items() if p.dim() < 2 or name.rpartition('.')[2] in NO_DECAY]
        assert len(decay) + len(no_decay) == len(trainable), 'every trainable parameter is in exactly one group'
        return [{'params': decay, 'weight_decay': weight_decay}, {'params': no_decay, 'weight_decay': 0.0}]

    # -- generation -----------------------------------------------------------------------------------------------------

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None, use_cache=True):
        """Yields max_new_tokens columns (B,) of sampled ids that continue idx (B, T).

        Up to block_size positions are read from a cache. Past it the window slides by one, every position changes, and
        so each step reads the last block_size tokens anew: the same function as nanoGPT's cropping."""
        block_size = self.config.block_size
        rng = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        idx = idx[:, -block_size:]
        cache, lent = None, self._packed(len(idx))
        if use_cache and self.causal:
            size = min(block_size, idx.size(1) + max_new_tokens)
            cache = KVCache(self.config, len(idx), size, idx.device, self._compute_dtype())
        fresh = idx
        for _ in range(max_new_tokens):
            if cache is not None and cache.length + fresh.size(1) > block_size:
                cache = None
            with torch.inference_mode(), self._lend(lent):
                x = self.trunk(fresh if cache is not None else idx[:, -block_size:], cache)
                column = sample_logits(self.head(x[:, -1]), temperature, top_k, top_p, rng)  # (B,)
            fresh = column.clone()[:, None]  # an ordinary tensor: no other may meet autograd
            idx = torch.cat((idx, fresh), dim=1)[:, -block_size:]
            yield fresh[:, 0]

    def generate_diffusion(self, idx, max_steps=RefineConfig.max_steps, temperature=RefineConfig.temperature,
                           top_k=RefineConfig.top_k, seed=None, **options):
        """Token ids (B, T), [MASK] (= vocab_size) where they are open -> the same filled in; what is fixed stays as it is.

        `options` are those of RefineConfig; raises UserError where they contradict each other or the objective."""
        config = RefineConfig(max_steps=max_steps, temperature=temperature, top_k=top_k or 0, **options)
        for step in self.refine(idx, config, seed):
            idx = step.ids
        return idx.clone()  # an ordinary tensor, and not the caller's

    def refine(self, idx, config, seed=None):
        """Yields a refinement.Step for each step of filling in idx (B, T)."""
        refuse_undefined(config, self)
        if idx.size(1) > self.config.block_size:
            raise UserError(f'{idx.size(1)} tokens do not fit block_size={self.config.block_size} of the model')
        rng = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        steps = refine(self.trunk, self.head, idx, self.config.vocab_size, config, rng)
        while True:
            with torch.inference_mode():
                step = next(steps, None)
            if step is None:
                return
            yield step

    @torch.no_grad()
    def generate_at_once(self, count, temperature=1.0, seed=None, prefix=None):
        """drifting: ids (count, block_size) in one forward pass, which start with the ids prefix (P,). For temperature see
        `nearest`."""
        rng = None if seed is None else torch.Generator().manual_seed(seed)
        canvas = torch.zeros(count, self.config.block_size, dtype=torch.long)
        noise, _, style = batch(canvas, rng, n_embd=self.config.n_embd)
        given = None if prefix is None else prefix.to(self.device).expand(count, -1)
        x = self.generator_output(noise.to(self.device), style.to(self.device), given)
        _, ids = self.nearest(x, temperature, rng)
        if given is not None:
            ids[:, :given.size(1)] = given
        return ids

    def _packed(self, rows):
        """{linear: a faster way to its product with so many rows}, where there is one: on a CPU, in float32."""
        linears = [m for m in self.modules() if isinstance(m, Linear)]
        weight = self.lm_head.weight
        fits = sum(linear.weight.nbytes for linear in linears) <= PACK_AT_MOST
        if weight.device.type != 'cpu' or self._compute_dtype() != torch.float32 or not fits:
            return {}
        return {linear: packed_linear(linear.weight.detach(), linear.bias, rows) for linear in linears}

    @contextmanager
    def _lend(self, lent):
        """Only while a step runs, so that no one else ever computes with a copy of weights that have changed since."""
        for linear, product in lent.items():
            linear.lent = product
        try:
            yield
        finally:
            for linear in lent:
                linear.lent = None

    def _compute_dtype(self):
        device_type = self.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.lm_head.weight.dtype


def expected(x, table, logits_of):
    """Mean embeddings (N, C') under the softmax of logits_of(x) (N, V), of x (N, C) and embeddings (V, C'): a part at a time
    and not kept for the backward pass, since the logits of all would be large."""
    def mean(part):
        return logits_of(part).float().softmax(-1).to(table.dtype) @ table
    rows = max(1, LOGITS_PER_CHUNK // len(table))
    return torch.cat([checkpoint(mean, part, use_reentrant=False) for part in x.split(rows)])


def nearness(x, table):
    """Logits (N, V) of outputs x (N, C): cosines with embeddings (V, C) around their mean, so large that those of a random
    direction differ by SHARPNESS; else at the start all outputs would be near the mean, and no field would spread them."""
    middle = table.mean(0)
    cosines = F.linear(F.normalize((x - middle).float(), dim=-1), F.normalize((table - middle).float(), dim=-1))
    return cosines * SHARPNESS * math.sqrt(table.size(1))


@torch.no_grad()
def likeliest(x, table, logits_of):
    """Of outputs x (B, T, C) the embeddings (B, T, C) of the largest logits."""
    parts = x.flatten(0, 1).split(max(1, LOGITS_PER_CHUNK // len(table)))
    return table[torch.cat([logits_of(part).argmax(-1) for part in parts])].view(x.shape)


def sample_logits(logits, temperature=1.0, top_k=None, top_p=None, rng=None):
    """Draws one id per row of logits (B, V) -> (B,). temperature 0 is the argmax; top_k keeps the k best; top_p the
    smallest set of best ids whose probability reaches top_p, the id that crosses it included."""
    if temperature == 0:
        return logits.argmax(-1)
    k = min(top_k or logits.size(-1), logits.size(-1))
    ids = None
    if k < logits.size(-1):
        logits, ids = logits.topk(k, dim=-1)  # sorted, best first
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    logits = logits.float()
    probs = ((logits - logits.amax(-1, keepdim=True)) / max(temperature, COLDEST)).softmax(-1)
    if top_p is not None and top_p < 1:
        before = probs.cumsum(-1) - probs  # the mass of the better ones
        probs = probs.masked_fill(before >= top_p, 0.0)
    choice = torch.multinomial(probs, 1, generator=rng)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)
