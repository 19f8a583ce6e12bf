"""
How far a model's confidence can be trusted: expected calibration error, Brier scores, entropy.

    python calibration.py --out_dir=logs/standard

scores a checkpoint on the second half of its validation text, as it is and with temperature scaling: its logits divided
by the one number that fits the first half best. Confidence is the probability of the most likely token. ECE = sum over
bins of n_bin / n * |accuracy - confidence|, over equal-width bins of confidence (Guo et al. 2017, arXiv 1706.04599).
"""
import json
import os
from dataclasses import dataclass
from functools import partial

import torch

import checkpoint
from configurator import UserError, configure, option, run
from data import Windows
from machine import pick_device
from objectives import IGNORE, NEXT_TOKEN, add, ignoring, means, prediction_sums, sum_in_chunks
from prepare import load_meta
from tokenizer import tokenizer_from_meta

BINS = 15


@dataclass
class CalibrationConfig:
    """Which checkpoint is scored, and on what."""
    out_dir: str = option('out', 'folder of the run')
    ckpt: str = option('best', 'which checkpoint of it', tuple(checkpoint.FILES))
    data: str = option('', "folder of a prepared data set whose validation text is used; empty is the run's own")
    ignore_text: str = option('', "leave the tokens of this text, ' <unk>' say, out")
    windows: int = option(160, 'windows of validation text, spread evenly; 0 takes all')
    batch_size: int = option(8, 'windows at once')
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")

    def __post_init__(self):
        if self.windows < 0 or self.batch_size < 1:
            raise UserError(f'windows={self.windows} must be at least 0, batch_size={self.batch_size} at least 1')


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


# ---------------------------------------------------------------------------------------------------------------------
# a checkpoint

def slopes(logits, targets, beta):
    """Sums over positions of the first and second derivative by beta of the cross entropy of beta * logits (N, V)."""
    counted = targets != IGNORE
    logits, targets = logits[counted].float(), targets[counted]
    p = (beta * logits).softmax(-1)
    mean = (p * logits).sum(-1)
    first = mean - logits.gather(1, targets[:, None]).squeeze(1)
    second = (p * (logits - mean[:, None]).square()).sum(-1)
    return {'first': first.double().sum(), 'second': second.double().sum()}


@torch.no_grad()
def fit_temperature(model, pieces, steps=50):
    """The temperature that gives the targets the least cross entropy, of `pieces`, hidden states (B, T, C) and targets.

    Newton's method on its inverse, in which the cross entropy is convex; a step at most halves or doubles it."""
    beta = 1.0
    for _ in range(steps):
        sums = add([sum_in_chunks(model, x, y, partial(slopes, beta=beta)) for x, y in pieces])
        wanted = beta - float(sums['first'] / sums['second'].clamp(min=1e-12))
        before, beta = beta, min(max(wanted, beta / 2), beta * 2)
        if abs(beta / before - 1) < 1e-5:
            break
    return 1 / beta


@torch.no_grad()
def score(model, pieces, temperature=1.0):
    """{name: number} of `pieces`, hidden states and targets: calibration, and the loss."""
    def measure(logits, targets):
        logits = logits / temperature
        return calibration_sums(logits, targets) | {'loss': prediction_sums(logits, targets)['loss']}
    sums = add([sum_in_chunks(model, x, y, measure) for x, y in pieces])
    return means({name: sums[name] for name in ('loss', 'count')}) | calibration(sums)


@torch.no_grad()
def main(argv):
    c, _ = configure(argv, CalibrationConfig, description=__doc__)
    device = pick_device(c.device)
    state = checkpoint.load(checkpoint.find(c.out_dir, c.ckpt))
    model = checkpoint.load_model(state, device)
    if not model.causal:
        raise UserError(f'{c.out_dir} is a {model.config.model_type} model that sees what it is asked for: only causal '
                        'types are scored here; see evaluate.py')
    folder = c.data or os.path.join(state['config']['data_dir'], state['config']['dataset'])
    meta, T = load_meta(folder), model.config.block_size
    if meta['tokenizer'] != state['tokenizer']:
        raise UserError(f'{folder} was prepared with another tokenizer than the checkpoint was trained with')
    make_batch = NEXT_TOKEN.make_batch
    if c.ignore_text:
        make_batch = ignoring(make_batch, tokenizer_from_meta(meta['tokenizer']).encode(c.ignore_text))
    windows = Windows(os.path.join(folder, 'val.bin'), meta['dtype'], T + 1, T)
    pieces = []
    for offsets in torch.tensor(windows.spread(c.windows or len(windows))).split(c.batch_size):
        X, Y, _ = (t if t is None else t.to(device) for t in make_batch(windows.read(offsets.tolist()), None))
        pieces.append((model.trunk(X), Y))
    fitted, scored = pieces[:len(pieces) // 2], pieces[len(pieces) // 2:]
    if not fitted:
        raise UserError(f'{folder} has too little validation text to be halved: lower --batch_size')
    temperature = fit_temperature(model, fitted)
    found = {'temperature': temperature, 'as_it_is': score(model, scored), 'scaled': score(model, scored, temperature)}
    for name, row in (('as it is', found['as_it_is']), (f'at temperature {temperature:.3f}', found['scaled'])):
        print(f'{name:>22}: loss {row["loss"]:.4f}, ECE {row["ece"]:.4f}, Brier {row["brier"]:.4f}, top-1 Brier '
              f'{row["brier_top1"]:.4f}, accuracy {row["accuracy"]:.4f}, confidence {row["confidence"]:.4f}')
    print(json.dumps(found))


if __name__ == '__main__':
    run(main)
