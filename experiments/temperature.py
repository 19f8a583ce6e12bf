"""
How far a model's confidence can be trusted, and what one temperature does about it.

    python -m experiments.temperature --out_dir=logs/standard

scores a checkpoint on the second half of its validation text, as it is and with temperature scaling: its logits divided
by the one number that fits the first half best (Guo et al. 2017, arXiv 1706.04599). metrics.Calibration says what is
measured. The last line of stdout is one JSON object.
"""
import json
import os
from dataclasses import dataclass
from functools import partial

import torch

from model import load_model
from nanodrift import checkpoint, huggingface
from nanodrift.data import Windows, load_meta
from nanodrift.machine import pick_device
from nanodrift.metrics import Mean, calibrated_predictions, combine, over_chunks, summarize
from nanodrift.objectives import IGNORE, NEXT_TOKEN, ignoring
from nanodrift.options import UserError, check_options, configure, option, run
from nanodrift.tokenizer import tokenizer_from_meta


@dataclass
class TemperatureConfig:
    """Which checkpoint is scored, and on what."""
    out_dir: str = option('out', "folder of the run, or 'hf:NAME_OR_FOLDER'")
    ckpt: str = option('best', 'which checkpoint of it', tuple(checkpoint.FILES))
    data: str = option('', "folder of a prepared data set whose validation text is used; empty is the run's own")
    ignore_text: str = option('', "leave the tokens of this text, ' <unk>' say, out")
    windows: int = option(160, 'windows of validation text, spread evenly; 0 takes all', at_least=0)
    batch_size: int = option(8, 'windows at once', at_least=1)
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")

    def __post_init__(self):
        check_options(self)


def slopes(logits, targets, beta):
    """Means over positions of the first and second derivative by beta of the cross entropy of beta * logits (N, V)."""
    counted = targets != IGNORE
    logits, targets = logits[counted].float(), targets[counted]
    p = (beta * logits).softmax(-1)
    mean = (p * logits).sum(-1)
    first = mean - logits.gather(1, targets[:, None]).squeeze(1)
    second = (p * (logits - mean[:, None]).square()).sum(-1)
    count = counted.sum().cpu()
    return {'first': Mean(first.cpu().double().sum(), count), 'second': Mean(second.cpu().double().sum(), count)}


@torch.no_grad()
def fit_temperature(model, batches, steps=50):
    """The temperature that gives the targets the least cross entropy, of `batches`, hidden states (B, T, C) and targets.

    Newton's method on its inverse, in which the cross entropy is convex; a step at most halves or doubles it."""
    beta = 1.0
    for _ in range(steps):
        slope = summarize(combine([over_chunks(model, x, y, partial(slopes, beta=beta)) for x, y in batches]))
        wanted = beta - slope['first'] / max(slope['second'], 1e-12)
        before, beta = beta, min(max(wanted, beta / 2), beta * 2)
        if abs(beta / before - 1) < 1e-5:
            break
    return 1 / beta


@torch.no_grad()
def score(model, batches, temperature=1.0):
    """{name: number} of `batches`, hidden states and targets: calibration, and the loss."""
    def measure(logits, targets):
        return calibrated_predictions(logits / temperature, targets)
    return summarize(combine([over_chunks(model, x, y, measure) for x, y in batches]))


@torch.no_grad()
def main(argv):
    c, _ = configure(argv, TemperatureConfig, description=__doc__)
    device = pick_device(c.device)
    state = huggingface.open_run(c.out_dir, c.ckpt)
    model = load_model(state, device)
    if not model.config.causal:
        raise UserError(f'{c.out_dir} is a {model.config.model_type} model that sees what it is asked for: only causal '
                        'types are scored here; see evaluate.py')
    if not c.data and not state['config']:
        raise UserError(f'{c.out_dir} does not say what it was trained on: --data=FOLDER of a prepared data set')
    folder = c.data or os.path.join(state['config']['data_dir'], state['config']['dataset'])
    meta, T = load_meta(folder), model.config.block_size
    if meta['tokenizer'] != state['tokenizer']:
        raise UserError(f'{folder} was prepared with another tokenizer than the checkpoint was trained with')
    make_batch = NEXT_TOKEN.make_batch
    if c.ignore_text:
        make_batch = ignoring(make_batch, tokenizer_from_meta(meta['tokenizer']).encode(c.ignore_text))
    windows = Windows(os.path.join(folder, 'val.bin'), meta['dtype'], T + 1, T, vocab_size=meta['vocab_size'])
    offsets = torch.tensor(windows.spread(c.windows or len(windows)))
    if len(offsets) < 2:
        raise UserError(f'one window cannot be halved: {folder} needs more validation text, or --windows=2 and more')
    halves = []
    for half in offsets[:len(offsets) // 2], offsets[len(offsets) // 2:]:
        batches = [make_batch(windows.read(part.tolist()), None)[:2] for part in half.split(c.batch_size)]
        halves.append([(model.trunk(X.to(device)), Y.to(device)) for X, Y in batches])
    fitted, scored = halves
    temperature = fit_temperature(model, fitted)
    scores = {'temperature': temperature, 'as_it_is': score(model, scored), 'scaled': score(model, scored, temperature)}
    for name, row in (('as it is', scores['as_it_is']), (f'at temperature {temperature:.3f}', scores['scaled'])):
        print(f'{name:>22}: loss {row["loss"]:.4f}, ECE {row["ece"]:.4f}, Brier {row["brier"]:.4f}, top-1 Brier '
              f'{row["brier_top1"]:.4f}, accuracy {row["accuracy"]:.4f}, confidence {row["confidence"]:.4f}')
    print(json.dumps(scores))


if __name__ == '__main__':
    run(main)
