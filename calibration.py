"""
How far a model's confidence can be trusted: expected calibration error, Brier scores, entropy.

Confidence is the probability of the most likely token. ECE = sum over bins of n_bin / n * |accuracy - confidence|, over
equal-width bins of confidence (Guo et al. 2017, arXiv 1706.04599).
"""
import torch

from objectives import IGNORE

BINS = 15


@torch.no_grad()
def calibration_sums(logits, targets):
    """What `calibration` needs, over the counted positions: sums, and entropy's extremes. logits (N, V), targets (N,)."""
    counted = targets != IGNORE
    log_p = logits[counted].float().log_softmax(-1)
    targets = targets[counted]
    p = log_p.exp()
    confidence, guess = p.max(-1)
    correct = (guess == targets).float()
    at_target = p.gather(1, targets[:, None]).squeeze(1)
    entropy = -(p * log_p.nan_to_num(neginf=0.0)).sum(-1)
    bin_of = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # (0, 1/15], (1/15, 2/15], ...
    bins = torch.zeros(3, BINS, dtype=torch.float64)
    for row, values in zip(bins, (torch.ones_like(confidence), confidence, correct)):
        row.index_add_(0, bin_of.cpu(), values.cpu().double())
    sums = {'count': torch.ones_like(confidence), 'confidence': confidence, 'accuracy': correct,
            'brier_top1': (confidence - correct).square(), 'brier': p.square().sum(-1) - 2 * at_target + 1,
            'entropy': entropy, 'entropy_squared': entropy.square()}
    found = {name: values.cpu().double().sum() for name, values in sums.items()}
    extremes = {'entropy_min': entropy.min().cpu(), 'entropy_max': entropy.max().cpu()} if len(entropy) else {}
    return found | {'bins': bins} | extremes


def calibration(sums):
    """{name: number} of such sums. Brier is over the whole vocabulary, brier_top1 (confidence - correct)^2.

    `bins` is a list of (positions, mean confidence, accuracy) for a reliability diagram."""
    n = float(sums['count'])
    count, confidence, correct = sums['bins']
    gap = (confidence - correct).abs().sum() / n
    mean = {name: float(sums[name]) / n for name in ('confidence', 'accuracy', 'brier_top1', 'brier', 'entropy')}
    spread = max(0.0, float(sums['entropy_squared']) / n - mean['entropy'] ** 2) ** 0.5
    bins = [(int(c), float(conf / c) if c else 0.0, float(acc / c) if c else 0.0)
            for c, conf, acc in zip(count, confidence, correct)]
    return mean | {'ece': float(gap), 'overconfidence': mean['confidence'] - mean['accuracy'], 'entropy_std': spread,
                   'entropy_min': float(sums['entropy_min']), 'entropy_max': float(sums['entropy_max']), 'bins': bins}
