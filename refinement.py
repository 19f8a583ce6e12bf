"""
Masked refinement: a canvas of tokens, some of them [MASK], filled in by a masked diffusion model in any order, and revised.

Which masked positions are committed at a step (strategy):
    naive                        all that the model does not answer with [MASK] (defined for the repair objective)
    ancestral                    each with probability (t - s) / t on a grid of times, MDLM: Sahoo et al., arXiv 2406.07524
    confidence, margin, entropy  the surest, LLaDA: Nie et al., arXiv 2502.09992, and Dream, arXiv 2508.15487
    random                       as many, anywhere
    threshold                    all that are sure enough, and the surest: Fast-dLLM, Wu et al., arXiv 2505.22618
Which committed ones are opened again (remask):
    flag                         those that a model of the repair objective answers with [MASK]
    remdm-cap, -rescale, -conf, -loop    at random, beside `ancestral`: ReMDM, Wang et al., arXiv 2503.00307
"""
import math
from dataclasses import dataclass

import torch

from configurator import UserError, one_of, option
from machine import exact
from objectives import LOGITS_PER_CHUNK

STRATEGIES = ('naive', 'ancestral', 'confidence', 'entropy', 'margin', 'random', 'threshold')
REMASKS = ('none', 'flag', 'remdm-cap', 'remdm-rescale', 'remdm-conf', 'remdm-loop')
ETA = {'remdm-cap': 0.04, 'remdm-rescale': 0.015, 'remdm-conf': 1.0, 'remdm-loop': 0.02}  # as published
LOOP = {'t_on': 0.55, 't_off': 0.05, 'alpha_on': 0.9}  # of remdm-loop, as published


@dataclass
class RefineConfig:
    """In which order a canvas is filled, and what is taken back."""
    strategy: str = option('ancestral', 'which masked positions a step commits', STRATEGIES)
    max_steps: int = option(25, 'steps, over all blocks together; threshold takes what it needs, without flags past these')
    block_length: int = option(0, 'open positions refined at a time, from left to right; 0 takes all')
    threshold: float = option(0.9, 'threshold: the confidence that commits')
    remask: str = option('none', 'which committed tokens are opened again', REMASKS)
    flag_threshold: float = option(0.5, 'remask=flag: the probability of [MASK] that opens a token again')
    eta: float = option(-1.0, 'remask=remdm-*: how much is opened; negative takes what was published')
    temperature: float = option(0.8, '1 is as learned, lower is safer, 0 always takes the likeliest')
    top_k: int = option(200, 'draw from the k likeliest tokens; 0 from all')
    top_p: float = option(1.0, 'draw from the fewest likeliest tokens that have this much probability together')

    def __post_init__(self):
        one_of('strategy', self.strategy, STRATEGIES)
        one_of('remask', self.remask, REMASKS)
        for name, least in {'max_steps': 1, 'block_length': 0, 'threshold': 0, 'flag_threshold': 0, 'temperature': 0,
                            'top_k': 0}.items():
            if not least <= getattr(self, name) < math.inf:
                raise UserError(f'{name}={getattr(self, name)} must be at least {least}, and finite')
        if not 0 < self.top_p <= 1:
            raise UserError(f'top_p={self.top_p} must be above 0 and at most 1')
        if self.remask.startswith('remdm') and self.strategy != 'ancestral':
            raise UserError(f'remask={self.remask} is defined beside --strategy=ancestral only, not {self.strategy}')
        if self.eta >= 0 and not self.remask.startswith('remdm'):
            raise UserError(f'eta={self.eta} is for --remask=remdm-cap, -rescale, -conf or -loop, not {self.remask}')
        if self.strategy != 'threshold' and self.threshold != type(self).threshold:
            raise UserError(f'threshold={self.threshold} is for --strategy=threshold, not {self.strategy}')
        if not self.eta <= 1:
            raise UserError(f'eta={self.eta} must be at most 1')
        if self.remask == 'flag' and self.strategy == 'naive':
            raise UserError('strategy=naive never looks at what it has committed: --remask=flag needs another strategy')

    @property
    def share(self):
        """eta, or what is published where it is negative."""
        return ETA[self.remask] if self.eta < 0 else self.eta


def refuse_undefined(config, model):
    """Raises UserError where a strategy has no meaning for a model, or cannot be had on its device."""
    if model.config.model_type != 'diffusion':
        raise UserError(f'only model_type diffusion is refined: sample a {model.config.model_type} model with sample.py')
    if model.device.type == 'mps':
        raise UserError('refinement draws in float64, which mps has not: use --device=cpu')
    if model.config.diffusion_objective == 'repair':
        return
    if config.strategy == 'naive':
        raise UserError('strategy=naive keeps what is not answered with [MASK], and a model of the nelbo objective never '
                        'answers so: for one step use --strategy=random --max_steps=1')
    if config.remask == 'flag':
        raise UserError('remask=flag opens what is answered with [MASK], which only the repair objective teaches: use '
                        '--remask=remdm-cap beside --strategy=ancestral, or a model trained with '
                        '--diffusion_objective=repair')


@dataclass
class Step:
    """What a step left behind: ids (B, T), the confidence (B, T) with which each was committed, which positions (B, T) were
    opened again, and the forward passes of each row so far (B,)."""
    ids: torch.Tensor
    confidence: torch.Tensor
    revised: torch.Tensor
    passes: torch.Tensor


# ---------------------------------------------------------------------------------------------------------------------
# one draw

def keep_likely(logits, top_k, top_p):
    """logits (N, V) with -inf but for the top_k best and the best that together have probability top_p, the one that
    crosses it included."""
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        best_first, order = logits.sort(dim=-1, descending=True)
        p = best_first.softmax(-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, p.cumsum(-1) - p >= top_p)
        logits = logits.masked_fill(drop, -math.inf)
    return logits


def draw(logits, config, rng=None):
    """An id for each row of float64 logits (N, V) -> (N,), by Gumbel noise: in float32 its tail is cut, which lowers the
    temperature (Zheng et al., arXiv 2409.02908)."""
    if config.temperature == 0:
        return logits.argmax(-1)
    logits = keep_likely(logits / config.temperature, config.top_k, config.top_p)
    u = torch.rand(logits.shape, generator=rng, dtype=torch.float64, device=logits.device).clamp_(1e-300, 1 - 1e-16)
    return u.log_().neg_().log_().neg_().add_(logits).argmax(-1)  # in place: this is most of what a draw costs


def place(where, values, fill):
    """values (N,) put where `where` (B, T) is true, `fill` elsewhere -> (B, T)."""
    return torch.full(where.shape, fill, dtype=values.dtype, device=values.device).masked_scatter(where, values)


def best(scores, among, count):
    """Marks the `count` (B,) best of scores (B, T) in each row, of the positions `among` (B, T)."""
    order = scores.masked_fill(~among, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return among & (rank < count[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# the canvas

class Canvas:
    """Token ids (B, T) under refinement; `mask` where they are open. What stands in them at first never changes.

    trunk: ids (B, T) -> hidden states (B, T, C); head: hidden states (N, C) -> logits (N, V+1), the last one of [MASK].
    A row that has not changed since its last forward pass is not run again."""

    def __init__(self, trunk, head, ids, mask, use_cache=True):
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
        """Yields float64 logits (n, V+1) of the positions `where` (B, T), a part at a time; the head works on no others."""
        if not where.any():
            return
        rows = where.any(1)
        if self.use_cache:
            rows &= ~self.known
        if rows.any():
            found = self.trunk(self.ids[rows])
            if self.hidden is None:
                self.hidden = found.new_zeros(*self.ids.shape, found.size(-1))
            self.hidden[rows] = found
            self.known |= rows
            self.passes += rows
        for part in self.hidden[where].split(max(1, LOGITS_PER_CHUNK // (self.mask + 1))):
            with exact(part.device):  # bfloat16 would round the tail away that the noise is drawn in float64 for
                logits = self.head(part.float()).double()
            yield logits

    def commit(self, where, ids, confidence):
        """Writes ids (N,) at the positions `where` (B, T)."""
        self.ids[where], self.confidence[where] = ids, confidence
        self.known &= ~where.any(1)

    def reopen(self, where):
        self.ids[where] = self.mask
        self.confidence[where] = 0
        self.known &= ~where.any(1)

    def answer(self, where, config, rng, score=None, columns=0):
        """Draws a token for each position of `where` (B, T) -> ids, confidences and scores (N,). The confidence is the
        model's own probability, whatever the temperature; the score what `score` makes of its probabilities (n, V) and
        confidences (n,). [MASK] has no part in it, unless `columns` asks for V+1."""
        found = []
        for logits in self.logits(where):
            logits = logits[:, :columns or self.mask]
            ids, p = draw(logits, config, rng), logits.softmax(-1)
            confidence = p.gather(1, ids[:, None]).squeeze(1)
            found.append((ids, confidence, confidence if score is None else score(p, confidence)))
        return [torch.cat(parts) for parts in zip(*found)]


def fill(canvas, where, config, rng):
    """Commits a token at every position of `where` (B, T)."""
    if where.any():
        ids, confidence, _ = canvas.answer(where, config, rng)
        canvas.commit(where, ids, confidence)


# ---------------------------------------------------------------------------------------------------------------------
# the steps

def blocks(free, length):
    """Yields the positions (B, T) of each block: in each row `length` of those that are free (B, T), from left to right."""
    number = (free.cumsum(1) - 1) // (length or free.size(1))
    for i in range(int(number.max()) + 1):
        yield free & (number == i)


def refine(trunk, head, ids, mask, config, rng=None, use_cache=True):
    """Fills every [MASK] of ids (B, T); yields a Step after each step, the last of which holds none. For trunk and head see
    Canvas; `rng` is on the device of ids."""
    canvas = Canvas(trunk, head, ids, mask, use_cache)
    parts = list(blocks(canvas.free, config.block_length))
    whole, more = divmod(config.max_steps, max(1, len(parts)))
    take = {'naive': naive, 'ancestral': ancestral, 'threshold': threshold}.get(config.strategy, quota)
    for i, block in enumerate(parts):
        steps = max(1, whole + (i < more))
        number, changed = 0, False
        while canvas.open(block).any() or (number < steps and may_revise(config, changed)):
            before = canvas.ids.clone()
            if number < steps or config.strategy == 'threshold':
                doubted = flagged(canvas, block, config) if number < steps - 1 else torch.zeros_like(canvas.free)
                take(canvas, block, number, steps, config, rng)
                canvas.reopen(doubted)
            else:
                fill(canvas, canvas.open(block), config, rng)  # what naive was never answered
            changed = bool((canvas.ids != before).any())
            number += 1
            revised = (canvas.ids == mask) & (before != mask)
            yield Step(canvas.ids.clone(), canvas.confidence.clone(), revised, canvas.passes.clone())


def may_revise(config, changed):
    """Whether another step can open something again, where nothing is open now."""
    return config.remask.startswith('remdm') or (config.remask == 'flag' and changed)


def flagged(canvas, block, config):
    """The committed positions (B, T) of a block that the model answers with [MASK]."""
    none = torch.zeros_like(canvas.free)
    committed = canvas.committed(block)
    if config.remask != 'flag' or not committed.any():
        return none
    p_mask = torch.cat([logits.softmax(-1)[:, canvas.mask] for logits in canvas.logits(committed)])
    return none.masked_scatter(committed, p_mask > config.flag_threshold)


def naive(canvas, block, number, steps, config, rng):
    """Draws at all open positions, [MASK] among the answers; keeps what is not."""
    where = canvas.open(block)
    ids, confidence, _ = canvas.answer(where, config, rng, columns=canvas.mask + 1)
    kept = ids != canvas.mask
    canvas.commit(where.masked_scatter(where, kept), ids[kept], confidence[kept])


def margin(p, confidence):
    first, second = p.topk(2, dim=-1).values.unbind(-1)
    return first - second


SCORES = {'confidence': lambda p, confidence: confidence, 'margin': margin,
          'entropy': lambda p, confidence: -torch.special.entr(p).sum(-1)}


def quota(canvas, block, number, steps, config, rng):
    """Commits an equal share of the open positions: the surest, or at random."""
    where = canvas.open(block)
    left = steps - number
    count = (where.sum(1) + left - 1) // left  # with what is over going to the first steps
    if config.strategy == 'random':
        scores = torch.rand(where.shape, generator=rng, dtype=torch.float64, device=where.device)
        fill(canvas, best(scores, where, count), config, rng)
        return
    if not where.any():
        return
    ids, confidence, scores = canvas.answer(where, config, rng, SCORES[config.strategy])
    chosen = best(place(where, scores, -math.inf), where, count)
    canvas.commit(chosen, ids[chosen[where]], confidence[chosen[where]])


def threshold(canvas, block, number, steps, config, rng):
    """Commits all that are sure enough, and in each row the surest."""
    where = canvas.open(block)
    if not where.any():
        return
    ids, confidence, _ = canvas.answer(where, config, rng)
    sure = place(where, confidence, -math.inf)
    chosen = (where & (sure >= config.threshold)) | best(sure, where, torch.ones_like(canvas.passes))
    canvas.commit(chosen, ids[chosen[where]], confidence[chosen[where]])


def ancestral(canvas, block, number, steps, config, rng):
    """From time t to s: an open position is committed with the probability that the forward process gives it; with
    remask=remdm-*, a committed one is opened again with probability sigma."""
    t, s = 1 - number / steps, 1 - (number + 1) / steps
    where, committed = canvas.open(block), canvas.committed(block)
    u = torch.rand(where.shape, generator=rng, dtype=torch.float64, device=where.device)
    alpha_t, alpha_s = 1 - t, 1 - s
    sigma = torch.zeros_like(u)
    if config.remask.startswith('remdm'):
        alpha_t, alpha_s, sigma = remdm(t, s, canvas.confidence, committed, config)
    take = where & (u < (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t))
    fill(canvas, take, config, rng)
    canvas.reopen(committed & (u < sigma))


def remdm(t, s, confidence, committed, config):
    """alpha_t, alpha_s and sigma (B, T) of ReMDM from time t to s."""
    kind, eta = config.remask, config.share
    alpha_t, alpha_s = (loop_alpha(t), loop_alpha(s)) if kind == 'remdm-loop' else (1 - t, 1 - s)
    greatest = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
    if kind == 'remdm-cap':
        sigma = min(eta, greatest)
    elif kind == 'remdm-rescale':
        sigma = eta * greatest
    elif kind == 'remdm-loop':
        sigma = min(eta, greatest) if LOOP['t_off'] < t <= LOOP['t_on'] else 0.0
    elif kind == 'remdm-conf':
        share = (-confidence).masked_fill(~committed, -math.inf).softmax(1).nan_to_num(0.0)  # a row may have none
        return alpha_t, alpha_s, eta * greatest * share
    else:
        raise ValueError(f'remask={kind!r} is not one of: {", ".join(REMASKS)}')
    return alpha_t, alpha_s, torch.full_like(confidence, sigma)


def loop_alpha(t):
    """remdm-loop: alpha rises to alpha_on, stays there from t_on to t_off, and rises to 1."""
    t_on, t_off, alpha_on = LOOP['t_on'], LOOP['t_off'], LOOP['alpha_on']
    if t > t_on:
        return (1 - t) * alpha_on / (1 - t_on)
    return alpha_on if t > t_off else 1 - t * (1 - alpha_on) / t_off
