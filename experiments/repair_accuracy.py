"""
How well a masked diffusion model of the repair objective finds wrong tokens in held-out text, and corrects them.

    python -m experiments.repair_accuracy --out_dir=out-diffusion --share=0.1

Wrong tokens are of two kinds: drawn by chance, as in training, and the model's own predictions, drawn all at once where the
text was hidden. They are looked for by the flag, where the model predicts [MASK]; and, as many tokens of each window as the
flag marks, by confidence: those least likely to the model with their position hidden (an eighth of the window at a time),
or, without further passes, as it sees them, for which it was never trained. What is flagged is opened again and refined as
RefineConfig says. The last line of stdout is one JSON object.
"""
import json
import os
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

import evaluate
from nanodrift.checkpoint import FILES
from nanodrift.data import Stream, Windows, derive_seed
from nanodrift.machine import pick_device
from nanodrift.objectives import random_order
from nanodrift.options import UserError, check_options, configure, option, run
from nanodrift.refinement import RefineConfig, top_positions

GROUPS = 8  # parts of a window that are hidden one after the other
COLUMNS = {'wrong': 'wrong before', 'reopened': 'reopened', 'precision': 'precision', 'recall': 'recall',
           'fixed': 'of the wrong fixed', 'broken': 'of the right broken', 'wrong_after': 'wrong after'}


@dataclass
class RepairConfig:
    """Which tokens are replaced, and how many."""
    out_dir: str = option('out-diffusion', 'folder of a run')
    ckpt: str = option('best', 'which checkpoint', tuple(FILES))
    data: str = option('', "folder of a prepared data set whose validation text is used; empty is the run's own")
    windows: int = option(256, 'windows of validation text, spread evenly; 0 takes all', at_least=0)
    share: float = option(0.1, 'of the tokens of each window that are replaced', above=0, at_most=1)
    batch_size: int = option(64, 'windows at once', at_least=1)
    seed: int = option(1337, 'of what is replaced, and by what')
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1'; mps has no float64")

    def __post_init__(self):
        check_options(self)


def by_chance(model, tokens, where, rng):
    """tokens (B, T) with any other token at the positions `where` (B, T)."""
    V = model.config.vocab_size
    return torch.where(where, (tokens + torch.randint(1, V, tokens.shape, generator=rng).to(tokens.device)) % V, tokens)


def by_the_model(model, tokens, where, rng):
    """tokens (B, T) with the model's own predictions at the positions `where` (B, T), each drawn as if it were alone."""
    at_once = RefineConfig(strategy='random', max_steps=1, temperature=1.0, top_k=0)
    seed = int(torch.randint(2 ** 31, (), generator=rng))
    *_, step = model.refine(tokens.masked_fill(where, model.config.vocab_size), at_once, seed)
    return step.ids


SOURCES = {'by chance': by_chance, 'by the model': by_the_model}


def probabilities(model, x, ids):
    """From hidden states x (B, T, C) the probability of [MASK] at each position, and that of the tokens ids (B, T) where the
    prediction is not [MASK]; (B, T) both."""
    rows = []
    for states, row in zip(x, ids):
        logits = model.head(states).double()
        rows.append((logits.softmax(-1)[:, -1], logits[:, :-1].softmax(-1).gather(1, row[:, None]).squeeze(1)))
    return [torch.stack(pieces) for pieces in zip(*rows)]


def hidden_confidence(model, ids):
    """The probability (B, T) of each of the token ids (B, T) where it is hidden, with one in GROUPS of the others."""
    own = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    for group in range(GROUPS):
        hidden = ids.clone()
        hidden[:, group::GROUPS] = model.config.vocab_size
        own[:, group::GROUPS] = probabilities(model, model.trunk(hidden)[:, group::GROUPS], ids[:, group::GROUPS])[1]
    return own


@torch.no_grad()
def repair(model, tokens, source, share, refine_config, rng):
    """{way of looking: counts} for text tokens (B, T) of which a share is replaced."""
    count = round(share * tokens.size(1))
    ids = SOURCES[source](model, tokens, (random_order(tokens.shape, rng) < count).to(tokens.device), rng)
    wrong, everywhere = ids != tokens, torch.ones_like(ids, dtype=torch.bool)
    p_mask, p_seen = probabilities(model, model.trunk(ids), ids)
    flagged = p_mask > refine_config.flag_threshold
    ways = {'flag': flagged,
            'confidence, hidden': top_positions(-hidden_confidence(model, ids), everywhere, flagged.sum(1)),
            'confidence, seen': top_positions(-p_seen, everywhere, flagged.sum(1))}
    seed, counts = int(torch.randint(2 ** 31, (), generator=rng)), {}
    for way, reopened in ways.items():
        after = ids  # as they are, where nothing is reopened
        for step in model.refine(ids.masked_fill(reopened, model.config.vocab_size), refine_config, seed):
            after = step.ids
        where = {'tokens': everywhere, 'wrong': wrong, 'reopened': reopened, 'hits': wrong & reopened,
                 'fixed': wrong & (after == tokens), 'broken': ~wrong & (after != tokens), 'wrong_after': after != tokens}
        counts[way] = {name: int(positions.sum()) for name, positions in where.items()}
    return counts


def shares(counts):
    """{name: number} of the counts of `repair`; a share of nothing is None."""
    of = {'wrong': 'tokens', 'reopened': 'tokens', 'fixed': 'wrong', 'wrong_after': 'tokens'}
    pairs = {name: (counts[name], counts[whole]) for name, whole in of.items()}
    pairs |= {'precision': (counts['hits'], counts['reopened']), 'recall': (counts['hits'], counts['wrong']),
              'broken': (counts['broken'], counts['tokens'] - counts['wrong'])}
    return {name: count / whole if whole else None for name, (count, whole) in pairs.items()}


def measure(model, windows, config, refine_config):
    """{(source, way of looking): {name: number}} over windows of text."""
    totals = {}
    for source in SOURCES:
        rng = torch.Generator().manual_seed(derive_seed(config.seed, Stream.REPLACED_TOKENS))
        for offsets in torch.tensor(windows.spread(config.windows or len(windows))).split(config.batch_size):
            tokens = windows.read(offsets.tolist()).to(model.device)
            for way, counts in repair(model, tokens, source, config.share, refine_config, rng).items():
                so_far = totals.setdefault((source, way), dict.fromkeys(counts, 0))
                so_far.update({name: so_far[name] + count for name, count in counts.items()})
    return {row: shares(counts) for row, counts in totals.items()}


def main(argv):
    config, refine_config, _ = configure(argv, RepairConfig, RefineConfig, description=__doc__)
    entry = evaluate.load(config, config.out_dir, pick_device(config.device, float64=True))
    model, T = entry.model, entry.model.config.block_size
    if model.config.model_type != 'diffusion' or model.config.diffusion_objective != 'repair':
        raise UserError('only a model of --model_type=diffusion --diffusion_objective=repair flags wrong tokens')
    if not round(config.share * T):
        raise UserError(f'share={config.share} of {T} tokens is none: at least {1 / T:.3g}')
    folder, meta = evaluate.data_of(config, entry)
    windows = Windows(os.path.join(folder, 'val.bin'), meta['dtype'], T, T, vocab_size=meta['vocab_size'])
    rows = measure(model, windows, config, refine_config)
    table = Table(title=f'replaced tokens in windows of {T}', title_justify='left')
    for name in ('replaced', 'looked for by', *COLUMNS.values()):
        table.add_column(name, justify='right' if name in COLUMNS.values() else 'left')
    for row, values in rows.items():
        table.add_row(*row, *('' if values[key] is None else f'{values[key]:.3f}' for key in COLUMNS))
    Console(width=max(150, Console().width)).print(table)
    print(json.dumps({f'{source}, {way}': values for (source, way), values in rows.items()}))


if __name__ == '__main__':
    run(main)
