"""
Masked refinement: a masked diffusion model fills in a canvas of tokens, some of them [MASK], in any order, and revises it.

A step commits some of the open positions, as the strategy says (a row of ORDERS), and may open committed ones again, with
the probability that `remask` gives them (a row of REMASKS). A new order, or a new rule of remasking, is a function and its
row.

strategy  naive                          all for which the model does not predict [MASK] (defined for the repair objective)
          ancestral                      each with probability (t - s) / t on a grid of times, MDLM: arXiv 2406.07524
          confidence, margin, entropy    the most confident: LLaDA, arXiv 2502.09992, and Dream, arXiv 2508.15487
          random                         as many, anywhere
          threshold                      all above a confidence, and the most confident: Fast-dLLM, arXiv 2505.22618
remask    flag                           those for which a model of the repair objective predicts [MASK]
          remdm-cap, -rescale, -conf, -loop    at random, together with `ancestral`: ReMDM, arXiv 2503.00307
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from nanodrift.kernels import rows_per_chunk
from nanodrift.machine import exact
from nanodrift.options import UserError, check_options, option
from nanodrift.sampling import gumbel_draw

ORDERS = {}  # strategy -> order, filled below the orders
REMASKS = {}  # remask -> Remask, filled below the rules


@dataclass
class RefineConfig:
    """In which order a canvas is filled, and what is taken back."""
    strategy: str = option('ancestral', 'which masked positions a step commits', ORDERS)
    max_steps: int = option(25, 'steps in total, or for each block of a model with --diffusion_block; threshold takes as '
                            'many as it needs, and flags nothing after these', at_least=1)
    block_length: int = option(0, 'open positions refined at a time, from left to right; 0 takes all', at_least=0)
    threshold: float = option(0.9, 'the confidence that commits', at_least=0, needs={'strategy': 'threshold'})
    remask: str = option('none', 'which committed tokens are opened again', REMASKS)
    flag_threshold: float = option(0.5, 'remask=flag: the probability of [MASK] that opens a token again', at_least=0)
    eta: float = option(-1.0, 'remask=remdm-*: how much is opened; negative takes what was published', at_most=1)
    temperature: float = option(0.8, '1 is as learned, lower is safer, 0 always takes the argmax', at_least=0)
    top_k: int = option(200, 'draw from the k most likely tokens; 0 from all', at_least=0)
    top_p: float = option(1.0, 'draw from the fewest most likely tokens that have this much probability together', above=0,
                          at_most=1)

    def __post_init__(self):
        check_options(self)
        if REMASKS[self.remask].compensated and self.strategy != 'ancestral':
            raise UserError(f'remask={self.remask} is defined together with --strategy=ancestral only, not {self.strategy}')
        if self.eta >= 0 and not REMASKS[self.remask].compensated:
            raise UserError(f'eta={self.eta} is for --remask=remdm-cap, -rescale, -conf or -loop, not {self.remask}')
        if self.remask == 'flag' and self.strategy == 'naive':
            raise UserError('strategy=naive never looks at what it has committed: --remask=flag needs another strategy')


def check_defined(config, model):
    """Raises UserError where a strategy has no meaning for a model, or cannot be had on its device."""
    if model.config.model_type != 'diffusion':
        raise UserError(f'only model_type diffusion is refined: sample a {model.config.model_type} model with sample.py')
    if model.device.type == 'mps':
        raise UserError('refinement draws in float64, which mps has not: use --device=cpu')
    if model.config.diffusion_objective == 'repair':
        return
    block = model.config.diffusion_block
    if block and config.block_length and block % config.block_length:
        raise UserError(f'block_length={config.block_length} is a part of a block of the model and must divide its {block} '
                        'tokens')
    if config.strategy == 'naive':
        raise UserError('strategy=naive keeps what is not predicted to be [MASK], and a model of the nelbo objective never '
                        'predicts it: for one step use --strategy=random --max_steps=1')
    if config.remask == 'flag':
        raise UserError('remask=flag opens what is predicted to be [MASK], which only the repair objective teaches: use '
                        '--remask=remdm-cap with --strategy=ancestral, or a model trained with '
                        '--diffusion_objective=repair')


@dataclass
class Step:
    """What a step left behind: ids (B, T), the confidence (B, T) with which each was committed, which positions (B, T) were
    opened again, and the forward passes of each row so far (B,)."""
    ids: torch.Tensor
    confidence: torch.Tensor
    revised: torch.Tensor
    passes: torch.Tensor


@dataclass
class Moment:
    """
    Where in a block's schedule a step is, and what orders and remasking share.

    number, steps: the number of this step, of so many. alpha_t, alpha_s: the share committed before and after it.
    reopen (B, T): the probability that a committed token is opened again.
    sigma (B, T): the part of `reopen` that the forward process compensates by committing more: all of it for ReMDM, else 0.
    u (B, T): uniform numbers for `ancestral`; 0 for the other orders, whose `reopen` is 0 or 1.
    """
    number: int
    steps: int
    alpha_t: float
    alpha_s: float
    reopen: torch.Tensor
    sigma: torch.Tensor
    u: torch.Tensor


def refine(trunk, head, ids, mask, config, rng=None, use_cache=True, barred=None):
    """Fills every [MASK] of ids (B, T), in inference mode. Yields a Step after each step; the last one has no [MASK] left.
    trunk: ids (R, T) -> hidden states (R, T, C); for head and barred see Canvas; `rng` is on the device of ids."""
    canvas = Canvas(lambda ids, rows: trunk(ids[rows]), head, ids, mask, use_cache, barred)
    return in_inference_mode(refine_canvas(canvas, config, rng))


def in_inference_mode(steps):
    """What the iterator `steps` yields, each computed in inference mode; what is done with it is not."""
    while True:
        with torch.inference_mode():
            step = next(steps, None)
        if step is None:
            return
        yield step


def refine_canvas(canvas, config, rng):
    """Fills a Canvas, as `refine` says. With block_length every block gets an equal share of max_steps, counted by the row
    with the most blocks."""
    mask = canvas.mask
    blocks = list(split_blocks(canvas.free, config.block_length))
    whole, more = divmod(config.max_steps, max(1, len(blocks)))
    for i, block in enumerate(blocks):
        steps = max(1, whole + (i < more))
        number, changed = 0, False
        while canvas.open(block).any() or (number < steps and may_revise(config, changed)):
            before = canvas.ids.clone()
            if number < steps or config.strategy == 'threshold':
                committed = canvas.committed(block)
                moment = next_moment(canvas, committed, number, steps, config, rng)
                ORDERS[config.strategy](canvas, block, moment, config, rng)
                canvas.reopen(committed & (moment.u < moment.reopen))
            else:
                fill(canvas, canvas.open(block), config, rng)  # what naive never committed
            changed = bool((canvas.ids != before).any())
            number += 1
            revised = (canvas.ids == mask) & (before != mask)
            yield Step(canvas.ids.clone(), canvas.confidence.clone(), revised, canvas.passes.clone())


def next_moment(canvas, committed, number, steps, config, rng):
    """The Moment of step `number` of `steps`, for the committed positions (B, T) of a block."""
    t, s = 1 - number / steps, 1 - (number + 1) / steps
    remask, zero = REMASKS[config.remask], torch.zeros_like(canvas.confidence)
    alpha_t, alpha_s = remask.alphas(t), remask.alphas(s)
    eta = remask.eta if config.eta < 0 else config.eta
    reopen = remask.probability(canvas, committed, config, t, s, alpha_t, alpha_s, eta)
    u = zero
    if config.strategy == 'ancestral':
        u = torch.rand(committed.shape, generator=rng, dtype=torch.float64, device=committed.device)
    return Moment(number, steps, alpha_t, alpha_s, reopen, reopen if remask.compensated else zero, u)


def may_revise(config, changed):
    """Whether another step can open something again, where nothing is open now."""
    return REMASKS[config.remask].compensated or (config.remask == 'flag' and changed)


def split_blocks(free, length):
    """Yields the positions (B, T) of each block: in each row `length` of those that are free (B, T), from left to right."""
    number = (free.cumsum(1) - 1) // (length or free.size(1))
    for i in range(int(number.max()) + 1):
        yield free & (number == i)


# ---------------------------------------------------------------------------------------------------------------------
# the canvas

class Canvas:
    """Token ids (B, T) under refinement, `mask` at open positions. Tokens that are given at the start never change.

    trunk: ids (B, T), rows (B,) bool -> hidden states (R, T, C) of these rows. head: hidden states (N, C) -> logits
    (N, V+1), the last one of [MASK].
    barred: an id and the positions (B, T) where it is never drawn. A row that has not changed since its last forward pass
    is not run again."""

    def __init__(self, trunk, head, ids, mask, use_cache=True, barred=None):
        self.barred = barred
        self.trunk, self.head, self.ids, self.mask, self.use_cache = trunk, head, ids.clone(), mask, use_cache
        self.free = ids == mask
        self.confidence = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
        self.passes = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        self.hidden, self.known = None, torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def open(self, block):
        """The positions (B, T) of a block that hold [MASK]."""
        return (self.ids == self.mask) & self.free & block

    def committed(self, block):
        """The positions (B, T) of a block that were [MASK] once."""
        return (self.ids != self.mask) & self.free & block

    def logits(self, where):
        """Yields float64 logits (n, V+1) of the positions `where` (B, T), a chunk at a time; the head works on no others."""
        if not where.any():
            return
        rows = where.any(1)
        if self.use_cache:
            rows &= ~self.known
        if rows.any():
            states = self.trunk(self.ids, rows)
            if self.hidden is None:
                self.hidden = states.new_zeros(*self.ids.shape, states.size(-1))
            self.hidden[rows] = states
            self.known |= rows
            self.passes += rows
        for chunk in self.hidden[where].split(rows_per_chunk(self.mask + 1)):
            with exact(chunk.device):  # bfloat16 would round the tail away, for which the noise is drawn in float64
                logits = self.head(chunk.float()).double()
            yield logits

    def commit(self, where, ids, confidence):
        """Writes ids (N,) at the positions `where` (B, T)."""
        self.ids[where], self.confidence[where] = ids, confidence
        self.known &= ~where.any(1)

    def reopen(self, where):
        self.ids[where] = self.mask
        self.confidence[where] = 0
        self.known &= ~where.any(1)

    def predict(self, where, config, rng, score=None, columns=0):
        """Draws a token for each position of `where` (B, T) -> ids, confidences and scores (N,). The confidence is the
        model's probability without temperature; the score is `score` of the probabilities (n, V) and confidences (n,).
        [MASK] is excluded unless columns = V+1."""
        chunks = []
        never = [] if self.barred is None else self.barred[1][where].split(rows_per_chunk(self.mask + 1))
        for number, logits in enumerate(self.logits(where)):
            logits = logits[:, :columns or self.mask]
            if self.barred is not None:
                logits[never[number], self.barred[0]] = -math.inf
            ids = gumbel_draw(logits, config.temperature, config.top_k, config.top_p, rng)
            p = logits.softmax(-1)
            confidence = p.gather(1, ids[:, None]).squeeze(1)
            chunks.append((ids, confidence, confidence if score is None else score(p, confidence)))
        return [torch.cat(pieces) for pieces in zip(*chunks)]


def fill(canvas, where, config, rng):
    """Commits a token at every position of `where` (B, T)."""
    if where.any():
        ids, confidence, _ = canvas.predict(where, config, rng)
        canvas.commit(where, ids, confidence)


def at_positions(where, values, elsewhere):
    """values (N,) put where `where` (B, T) is true, `elsewhere` everywhere else -> (B, T)."""
    return torch.full(where.shape, elsewhere, dtype=values.dtype, device=values.device).masked_scatter(where, values)


def top_positions(scores, among, count):
    """Marks the `count` (B,) best of scores (B, T) in each row, of the positions `among` (B, T)."""
    order = scores.masked_fill(~among, -math.inf).argsort(dim=1, descending=True, stable=True)
    return among & (order.argsort(dim=1) < count[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# orders: (canvas, block (B, T), moment, config, rng) -> commits some of the open positions of the block

def naive(canvas, block, moment, config, rng):
    """Draws a token or [MASK] for every open position, and commits those that are not [MASK]."""
    where = canvas.open(block)
    ids, confidence, _ = canvas.predict(where, config, rng, columns=canvas.mask + 1)
    kept = ids != canvas.mask
    canvas.commit(where.masked_scatter(where, kept), ids[kept], confidence[kept])


def ancestral(canvas, block, moment, config, rng):
    """From time t to s: an open position is committed with the probability that the forward process gives it."""
    share = (moment.alpha_s - (1 - moment.sigma) * moment.alpha_t) / (1 - moment.alpha_t)
    fill(canvas, canvas.open(block) & (moment.u < share), config, rng)


def equal_count(open_, moment):
    """How many (B,) of the open positions (B, T) a step commits: what is over goes to the first steps."""
    left = moment.steps - moment.number
    return (open_.sum(1) + left - 1) // left


def at_random(canvas, block, moment, config, rng):
    """Commits an equal share of the open positions, anywhere."""
    where = canvas.open(block)
    scores = torch.rand(where.shape, generator=rng, dtype=torch.float64, device=where.device)
    fill(canvas, top_positions(scores, where, equal_count(where, moment)), config, rng)


def by_score(canvas, block, moment, config, rng, score):
    """Draws a token for every open position, and commits an equal share of them, those with the best scores."""
    where = canvas.open(block)
    if not where.any():
        return
    ids, confidence, scores = canvas.predict(where, config, rng, score)
    chosen = top_positions(at_positions(where, scores, -math.inf), where, equal_count(where, moment))
    canvas.commit(chosen, ids[chosen[where]], confidence[chosen[where]])


def threshold(canvas, block, moment, config, rng):
    """Commits all of enough confidence, and in each row the most confident."""
    where = canvas.open(block)
    if not where.any():
        return
    ids, confidence, _ = canvas.predict(where, config, rng)
    scores = at_positions(where, confidence, -math.inf)
    most = top_positions(scores, where, torch.ones_like(canvas.passes))
    chosen = where & (scores >= config.threshold) | most
    canvas.commit(chosen, ids[chosen[where]], confidence[chosen[where]])


# scores: probabilities (n, V) and confidences (n,) -> (n,), the largest first

def margin(p, confidence):
    first, second = p.topk(2, dim=-1).values.unbind(-1)
    return first - second


def negative_entropy(p, confidence):
    return -torch.special.entr(p).sum(-1)


ORDERS |= {
    'naive': naive,
    'ancestral': ancestral,
    'confidence': partial(by_score, score=lambda p, confidence: confidence),
    'entropy': partial(by_score, score=negative_entropy),
    'margin': partial(by_score, score=margin),
    'random': at_random,
    'threshold': threshold,
}


# ---------------------------------------------------------------------------------------------------------------------
# remasking: (canvas, committed (B, T), config, t, s, alpha_t, alpha_s, eta) -> the probability (B, T) of reopening

@dataclass(frozen=True)
class Remask:
    """
    A rule that opens committed tokens again.

    probability: a function as above. compensated: `ancestral` then commits more, so that the schedule still holds; such a
    rule goes with `ancestral` alone, and its probability is at most `greatest_sigma`. alphas: time -> the share committed
    by then. eta: the default of --eta.
    """
    probability: Callable
    compensated: bool = False
    alphas: Callable = lambda t: 1 - t
    eta: float = 0.0


def nothing(canvas, *_):
    return torch.zeros_like(canvas.confidence)


def flag(canvas, committed, config, t, s, *_):
    """1 where the model predicts [MASK] with more than flag_threshold; never in the last step."""
    p_mask = torch.zeros_like(canvas.confidence)
    if s > 0 and committed.any():
        p_mask[committed] = torch.cat([logits.softmax(-1)[:, canvas.mask] for logits in canvas.logits(committed)])
    return (p_mask > config.flag_threshold).double()


def greatest_sigma(alpha_t, alpha_s):
    """The largest sigma that the forward process allows."""
    return min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0


def capped(canvas, committed, config, t, s, alpha_t, alpha_s, eta):
    return torch.full_like(canvas.confidence, min(eta, greatest_sigma(alpha_t, alpha_s)))


def rescaled(canvas, committed, config, t, s, alpha_t, alpha_s, eta):
    return torch.full_like(canvas.confidence, eta * greatest_sigma(alpha_t, alpha_s))


def by_confidence(canvas, committed, config, t, s, alpha_t, alpha_s, eta):
    """Shared out among the committed tokens of a row, more for those that were committed with less confidence."""
    share = (-canvas.confidence).masked_fill(~committed, -math.inf).softmax(1).nan_to_num(0.0)  # a row may have none
    return eta * greatest_sigma(alpha_t, alpha_s) * share


T_ON, T_OFF, ALPHA_ON = 0.55, 0.05, 0.9  # of remdm-loop, as published


def looped(canvas, committed, config, t, s, alpha_t, alpha_s, eta):
    """Only while alpha stands still."""
    return capped(canvas, committed, config, t, s, alpha_t, alpha_s, eta if T_OFF < t <= T_ON else 0.0)


def loop_alphas(t):
    """remdm-loop: alpha rises to ALPHA_ON, stays there from T_ON to T_OFF, and rises to 1."""
    if t > T_ON:
        return (1 - t) * ALPHA_ON / (1 - T_ON)
    return ALPHA_ON if t > T_OFF else 1 - t * (1 - ALPHA_ON) / T_OFF


REMASKS |= {  # eta as published
    'none': Remask(nothing),
    'flag': Remask(flag),
    'remdm-cap': Remask(capped, compensated=True, eta=0.04),
    'remdm-rescale': Remask(rescaled, compensated=True, eta=0.015),
    'remdm-conf': Remask(by_confidence, compensated=True, eta=1.0),
    'remdm-loop': Remask(looped, compensated=True, eta=0.02, alphas=loop_alphas),
}
