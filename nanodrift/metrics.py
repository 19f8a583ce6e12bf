"""
The metrics of a model, in training and in evaluation alike.

Each metric class defines how several of its values become one: `Mean` adds sums and counts, `Rows` keeps a row of each
example, `Calibration` adds up bins. `combine` joins batches, chunks of logits and ranks, and `summarize` turns metrics into
numbers.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanodrift.data import Stream, derive_seed
from nanodrift.kernels import IGNORE, rows_per_chunk
from nanodrift.machine import autocast

CALIBRATION_BINS = 15


@dataclass
class Mean:
    """A sum over positions or examples, and over how many."""
    total: torch.Tensor
    count: torch.Tensor

    @classmethod
    def of(cls, values, where):
        """Of values (...) over the positions `where` (...)."""
        return cls(_sum(values[where]), _sum(where))

    @classmethod
    def combine(cls, parts):
        return cls(sum(part.total for part in parts), sum(part.count for part in parts))

    def value(self):
        return float(self.total) / float(self.count) if self.count else math.nan


@dataclass
class Rows:
    """A row of each example (N, ...), one batch behind the other."""
    rows: torch.Tensor

    @classmethod
    def combine(cls, parts):
        return cls(torch.cat([part.rows for part in parts]))


@dataclass
class Calibration:
    """
    How far the confidence in the most likely token can be trusted: sums over positions, and bins of equal width in
    confidence, for each the number of positions, their confidences and how many were right. `value` gives

    ece: sum over bins of n_bin / n * |accuracy - confidence| (Guo et al. 2017, arXiv 1706.04599)
    brier: over the whole vocabulary, sum_v (p_v - onehot_v)^2; brier_top1: (confidence - correct)^2
    confidence, accuracy, overconfidence (the one minus the other); entropy in nats: mean, _std, _min, _max
    bins: (positions, mean confidence, accuracy) of each, for a reliability diagram

    `suffix` is put behind each of these names.
    """
    sums: dict
    least_entropy: float
    greatest_entropy: float
    bins: torch.Tensor  # (3, CALIBRATION_BINS)
    suffix: str = ''

    @classmethod
    @torch.no_grad()
    def of(cls, logits, targets, suffix=''):
        """Over the counted positions of logits (N, V) and targets (N,)."""
        counted = targets != IGNORE
        log_p = logits[counted].float().log_softmax(-1)
        targets = targets[counted]
        p = log_p.exp()
        confidence, guess = p.max(-1)
        correct = (guess == targets).float()
        at_target = p.gather(1, targets[:, None]).squeeze(1)
        entropy = -(p * log_p.nan_to_num(neginf=0.0)).sum(-1)
        bin_of = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1  # (0, 1/15], (1/15, 2/15], ...
        bins = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64)
        for row, values in zip(bins, (torch.ones_like(confidence), confidence, correct)):
            row.index_add_(0, bin_of.cpu(), values.cpu().double())
        values = {'count': torch.ones_like(confidence), 'confidence': confidence, 'accuracy': correct,
                  'brier_top1': (confidence - correct).square(), 'brier': p.square().sum(-1) - 2 * at_target + 1,
                  'entropy': entropy, 'entropy_squared': entropy.square()}
        least, greatest = (float(entropy.min()), float(entropy.max())) if len(entropy) else (math.inf, -math.inf)
        return cls({name: _sum(v) for name, v in values.items()}, least, greatest, bins, suffix)

    @classmethod
    def combine(cls, parts):
        sums = {name: sum(part.sums[name] for part in parts) for name in parts[0].sums}
        return cls(sums, min(part.least_entropy for part in parts), max(part.greatest_entropy for part in parts),
                   sum(part.bins for part in parts), parts[0].suffix)

    def value(self):
        n = float(self.sums['count'])
        count, confidence, correct = self.bins
        mean = {name: float(total) / n for name, total in self.sums.items()}
        spread = max(0.0, mean.pop('entropy_squared') - mean['entropy'] ** 2) ** 0.5
        del mean['count']
        bins = [(int(c), float(conf / c) if c else 0.0, float(acc / c) if c else 0.0)
                for c, conf, acc in zip(count, confidence, correct)]
        numbers = mean | {'ece': float((confidence - correct).abs().sum() / n), 'entropy_std': spread,
                          'overconfidence': mean['confidence'] - mean['accuracy'], 'entropy_min': self.least_entropy,
                          'entropy_max': self.greatest_entropy, 'bins': bins}
        return {name + self.suffix: value for name, value in numbers.items()}


def _sum(values):
    return values.cpu().double().sum()  # not every device has float64


def combine(parts):
    """One {name: metric} of several; a name may be missing in some of them."""
    names = dict.fromkeys(name for part in parts for name in part)
    together = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: type(metrics[0]).combine(metrics) for name, metrics in together.items()}


def summarize(metrics):
    """{name: metric} -> {name: number}; a Calibration gives several, by its own names."""
    numbers = {}
    for name, metric in metrics.items():
        value = metric.value()
        numbers |= value if isinstance(value, dict) else {name: value}
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# of logits and hidden states

def predictions(logits, targets):
    """Cross entropy and top-1 accuracy of logits (N, V) and targets (N,), IGNORE left out."""
    counted = targets != IGNORE
    losses = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction='none')
    return {'loss': Mean(_sum(losses), _sum(counted)), 'accuracy': Mean(_sum((logits.argmax(-1) == targets) & counted),
                                                                       _sum(counted))}


def calibrated_predictions(logits, targets):
    """`predictions` and how far they can be trusted."""
    return predictions(logits, targets) | {'calibration': Calibration.of(logits, targets)}


def over_chunks(model, x, targets, measure):
    """What `measure(logits, targets)` finds in the logits of hidden states x (..., C), which are never held all at once."""
    rows = rows_per_chunk(model.config.vocab_size)
    chunks = zip(x.flatten(0, -2).split(rows), targets.flatten().split(rows))
    return combine([measure(model.head(chunk), y) for chunk, y in chunks])


def perplexity(loss):
    """exp(loss), which is infinite where a number cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


class Interrupted(Exception):
    """An evaluation was left because a rank is to stop."""


@torch.no_grad()
def over_windows(windows, offsets, batch_size, make_batch, measure, ranks, dtype, draws=1, counted=0,
                 stopping=lambda: False, in_step=False):
    """
    {name: metric} of `measure(X, Y, W)` over the windows at these offsets.

    Batches are dealt to the ranks and combined in one order, so that any number of ranks gives the same number; no random
    state moves. With draws > 1 every window is masked anew each time; Rows keep the mean. With `counted`, only the last
    `counted` predictions of a window count, except in the first window. With in_step all ranks measure equally often, as
    models need that are shared out: where batches do not suffice, one is measured twice.
    """
    batches = [offsets[i:i + batch_size] for i in range(0, len(offsets), batch_size)]
    todo = [(draw, i) for draw in range(draws) for i in range(len(batches))]
    mine = {}  # {(draw, number of the batch): {name: metric}}
    dealt = todo[ranks.rank::ranks.world_size]
    if in_step and len(dealt) < math.ceil(len(todo) / ranks.world_size):
        dealt.append(todo[0])
    for draw, i in dealt:
        if stopping():
            break
        rng = torch.Generator().manual_seed(derive_seed(Stream.EVAL_BATCH, i, *[draw] * bool(draw)))
        X, Y, W = make_batch(windows.read(batches[i]), rng)
        if counted:
            Y[torch.tensor(batches[i] > 0), :-counted] = IGNORE
        batch = [t if t is None else t.to(ranks.device) for t in (X, Y, W)]
        with autocast(ranks.device, dtype):
            mine[draw, i] = measure(*batch)
    gathered = ranks.gather((mine, stopping()))
    if any(stopped for _, stopped in gathered):
        raise Interrupted
    all_ranks = {key: metrics for rank, _ in gathered for key, metrics in rank.items()}
    metrics = combine([all_ranks[key] for key in sorted(all_ranks)])
    for metric in metrics.values():
        if isinstance(metric, Rows) and draws > 1:
            metric.rows = metric.rows.view(draws, len(offsets), *metric.rows.shape[1:]).mean(0)
    return metrics
