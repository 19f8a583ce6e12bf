"""
How well a masked diffusion model of the repair objective finds wrong tokens in held-out text, and puts them right.

    python mending.py --out_dir=out-diffusion --share=0.1

Wrong tokens are of two kinds: drawn by chance, as in training, and the model's own, drawn all at once where the text was
hidden. They are looked for by the flag, what the model answers with [MASK]; and, as many tokens of each window as the flag
marks, by confidence: those least likely to the model with their place hidden (an eighth of the window at a time), or,
without further passes, as it sees them, for which it was never trained. What is found is opened again and refined as
RefineConfig says. The last line of stdout is one JSON object.
"""
import json
import os
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

import checkpoint
import evaluate
from configurator import UserError, configure, option, run
from data import Windows, derive_seed
from machine import pick_device
from objectives import ranks
from refinement import RefineConfig, best

GROUPS = 8  # parts of a window that are hidden one after the other
COLUMNS = {'wrong': 'wrong before', 'found': 'reopened', 'precision': 'precision', 'recall': 'recall',
           'mended': 'of the wrong mended', 'spoiled': 'of the right spoiled', 'wrong_after': 'wrong after'}


@dataclass
class MendingConfig:
    """What is spoiled, and how much of it."""
    out_dir: str = option('out-diffusion', 'folder of a run')
    ckpt: str = option('best', 'which checkpoint', tuple(checkpoint.FILES))
    data: str = option('', "folder of a prepared data set whose validation text is used; empty is the run's own")
    windows: int = option(256, 'windows of validation text, spread evenly; 0 takes all')
    share: float = option(0.1, 'of the tokens of each window that are replaced')
    batch_size: int = option(64, 'windows at once')
    seed: int = option(1337, 'of what is replaced, and by what')
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1'; mps has no float64")

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise UserError(f'share={self.share} must be above 0 and at most 1')
        if self.windows < 0 or self.batch_size < 1:
            raise UserError(f'windows={self.windows} must be at least 0 and batch_size={self.batch_size} at least 1')


def by_chance(model, tokens, where, rng):
    """tokens (B, T) with any other token in each place of `where` (B, T)."""
    V = model.config.vocab_size
    return torch.where(where, (tokens + torch.randint(1, V, tokens.shape, generator=rng).to(tokens.device)) % V, tokens)


def by_the_model(model, tokens, where, rng):
    """tokens (B, T) with the model's own answers in the places `where` (B, T), each drawn as if it were the only one."""
    at_once = RefineConfig(strategy='random', max_steps=1, temperature=1.0, top_k=0)
    seed = int(torch.randint(2 ** 31, (), generator=rng))
    *_, step = model.refine(tokens.masked_fill(where, model.config.vocab_size), at_once, seed)
    return step.ids


SOURCES = {'by chance': by_chance, 'by the model': by_the_model}


def doubts(model, x, ids):
    """From hidden states x (B, T, C) the probability of [MASK] at each place, and that of the tokens ids (B, T) where the
    answer is not [MASK]; (B, T) both."""
    found = []
    for states, row in zip(x, ids):
        logits = model.head(states).double()
        found.append((logits.softmax(-1)[:, -1], logits[:, :-1].softmax(-1).gather(1, row[:, None]).squeeze(1)))
    return [torch.stack(part) for part in zip(*found)]


def hidden_confidence(model, ids):
    """The probability (B, T) of each of the token ids (B, T) where it is hidden, with one in GROUPS of the others."""
    own = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    for group in range(GROUPS):
        hidden = ids.clone()
        hidden[:, group::GROUPS] = model.config.vocab_size
        own[:, group::GROUPS] = doubts(model, model.trunk(hidden)[:, group::GROUPS], ids[:, group::GROUPS])[1]
    return own


@torch.no_grad()
def mend(model, tokens, source, share, how, rng):
    """{way of looking: sums} for text tokens (B, T) of which a share is replaced."""
    count = round(share * tokens.size(1))
    ids = SOURCES[source](model, tokens, (ranks(tokens.shape, rng) < count).to(tokens.device), rng)
    wrong, every = ids != tokens, torch.ones_like(ids, dtype=torch.bool)
    flag, seen = doubts(model, model.trunk(ids), ids)
    flagged = flag > how.flag_threshold
    ways = {'flag': flagged, 'confidence, hidden': best(-hidden_confidence(model, ids), every, flagged.sum(1)),
            'confidence, seen': best(-seen, every, flagged.sum(1))}
    seed, sums = int(torch.randint(2 ** 31, (), generator=rng)), {}
    for way, found in ways.items():
        after = ids  # as they are, where nothing is found
        for step in model.refine(ids.masked_fill(found, model.config.vocab_size), how, seed):
            after = step.ids
        counts = {'tokens': torch.ones_like(wrong), 'wrong': wrong, 'found': found, 'hits': wrong & found,
                  'mended': wrong & (after == tokens), 'spoiled': ~wrong & (after != tokens), 'wrong_after': after != tokens}
        sums[way] = {name: int(where.sum()) for name, where in counts.items()}
    return sums


def shares(sums):
    """{name: number} of the sums of `mend`; a share of nothing is None."""
    of = {'wrong': 'tokens', 'found': 'tokens', 'mended': 'wrong', 'wrong_after': 'tokens'}
    parts = {name: (sums[name], sums[whole]) for name, whole in of.items()}
    parts |= {'precision': (sums['hits'], sums['found']), 'recall': (sums['hits'], sums['wrong']),
              'spoiled': (sums['spoiled'], sums['tokens'] - sums['wrong'])}
    return {name: part / whole if whole else None for name, (part, whole) in parts.items()}


def measure(model, windows, config, how):
    """{(source, way of looking): {name: number}} over windows of text."""
    totals = {}
    for source in SOURCES:
        rng = torch.Generator().manual_seed(derive_seed(config.seed, 9))
        for offsets in torch.tensor(windows.spread(config.windows or len(windows))).split(config.batch_size):
            tokens = windows.read(offsets.tolist()).to(model.device)
            for way, sums in mend(model, tokens, source, config.share, how, rng).items():
                so_far = totals.setdefault((source, way), dict.fromkeys(sums, 0))
                so_far.update({name: so_far[name] + count for name, count in sums.items()})
    return {row: shares(sums) for row, sums in totals.items()}


def main(argv):
    config, how, _ = configure(argv, MendingConfig, RefineConfig, description=__doc__)
    entry = evaluate.load(config, config.out_dir, pick_device(config.device, float64=True))
    model, T = entry.model, entry.model.config.block_size
    if model.config.model_type != 'diffusion' or model.config.diffusion_objective != 'repair':
        raise UserError('only a model of --model_type=diffusion --diffusion_objective=repair flags wrong tokens')
    if not round(config.share * T):
        raise UserError(f'share={config.share} of {T} tokens is none: at least {1 / T:.3g}')
    folder, meta = evaluate.data_of(config, entry)
    found = measure(model, Windows(os.path.join(folder, 'val.bin'), meta['dtype'], T, T), config, how)
    table = Table(title=f'replaced tokens in windows of {T}', title_justify='left')
    for name in ('replaced', 'looked for by', *COLUMNS.values()):
        table.add_column(name, justify='right' if name in COLUMNS.values() else 'left')
    for row, values in found.items():
        table.add_row(*row, *('' if values[key] is None else f'{values[key]:.3f}' for key in COLUMNS))
    Console(width=max(150, Console().width)).print(table)
    print(json.dumps({f'{source}, {way}': values for (source, way), values in found.items()}))


if __name__ == '__main__':
    run(main)
