"""
Text out of a masked diffusion checkpoint, by refinement: from nothing, after a prompt, around given text, or of given text.

    python generate_diffusion.py --out_dir=out-diffusion --max_steps=32 --max_new_tokens=64 --animate=True
    python generate_diffusion.py --start="Once upon a time" --strategy=ancestral --remask=flag
    python generate_diffusion.py --template="Once upon a time [MASK:12] the end." --html=refinement.html
    python generate_diffusion.py --repair=story.txt       what the model flags is written anew, shown as a coloured diff

A model with diffusion_block writes text of any length, and shows a single sample block by block.
"""
import itertools
import os
import re
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console

from nanodrift import player
from nanodrift.checkpoint import FILES
from nanodrift.data import derive_seed
from nanodrift.machine import DTYPES, autocast, exact, limit_threads, pick_device, pick_dtype
from nanodrift.options import UserError, check_options, configure, option, run
from nanodrift.refinement import REMASKS, RefineConfig, Step, check_defined
from nanodrift.system import print_utf8
from nanodrift.tokenizer import encode_prompt
from sample import open_model, read_prompt, stream

SAMPLES_AT_ONCE, NEW_TOKENS = 64, 100
LONGEST = 16384  # tokens, where the model's block_size does not say it
OPEN = re.compile(r'\[MASK(?::(\d+))?\]|_{3,}', re.IGNORECASE)


@dataclass
class GenerateConfig:
    """What to generate, from what, and how it is shown; RefineConfig says how it is refined."""
    out_dir: str = option('out-diffusion', "folder of the run to sample from, or 'hf:NAME_OR_FOLDER' written by export.py")
    ckpt: str = option('best', 'which checkpoint of it', tuple(FILES))
    start: str = option('', 'the prompt, or FILE:path to read it from')
    max_new_tokens: int = option(0, 'tokens to fill in after the prompt; 0 takes 100, or as many as fit', at_least=0)
    template: str = option('', "text with gaps, or FILE:path: [MASK] is a token, [MASK:12] are twelve, ____ one for "
                           'each underscore')
    repair: str = option('', 'a text file: tokens flagged with more than flag_threshold are rewritten, the others stay')
    to: str = option('', 'where --repair writes the repaired text; the differences are printed anyway')
    num_samples: int = option(1, 'how many samples', at_least=1)
    ignore_eot: bool = option(False, 'print what follows end-of-text too')
    animate: bool = option(False, 'play the refinement of the first sample in the terminal')
    html: str = option('', 'write a page that plays the refinement of the first sample, all in one file')
    seed: int = option(1337, 'the same seed and num_samples give the same samples on the same machine', at_least=0,
                       below=2 ** 63)
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = option('auto', 'of matrix products: auto takes the fastest safe one of the device', ('auto', *DTYPES))

    def __post_init__(self):
        check_options(self)
        given = [name for name in ('start', 'template', 'repair') if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f'{" and ".join(given)} contradict each other: give one of them')
        idle = ['max_new_tokens', 'ignore_eot'] * bool(self.template) + \
            ['max_new_tokens', 'ignore_eot', 'animate', 'html', 'num_samples'] * bool(self.repair)
        idle = [name for name in idle if getattr(self, name) != getattr(GenerateConfig, name)]
        if idle:
            raise UserError(f'{" and ".join(idle)} have no meaning for {"--repair" if self.repair else "--template"}')
        if self.to and not self.repair:
            raise UserError('to is where --repair writes: give a text to repair')
        for name in ('html', 'to'):
            path = getattr(self, name)
            if path and not os.path.isdir(os.path.dirname(path) or '.'):
                raise UserError(f'{name}={path}: there is no such folder')


# ---------------------------------------------------------------------------------------------------------------------
# the canvas to start from

def room(model_config):
    """The longest canvas of a model, in tokens, and its name."""
    if model_config.diffusion_block:
        return LONGEST, f'{LONGEST:,} tokens'
    return model_config.block_size, f'block_size={model_config.block_size} of the model'


def parse_template(text, encode, model_config):
    """Token ids of text with gaps: what is outside the gaps is encoded as it stands, piece by piece. Raises UserError where
    a gap is longer than the model can fill or there is none."""
    mask, (most, limit) = model_config.vocab_size, room(model_config)
    ids, end = [], 0
    for gap in OPEN.finditer(text):
        count = float(gap[1] or 1) if gap[0].startswith('[') else len(gap[0])  # int() refuses thousands of digits
        if not 0 < count <= most:
            raise UserError(f'{gap[0]} must be at least one token, and at most {limit}')
        ids += encode(text[end:gap.start()]) + [mask] * int(count)
        end = gap.end()
    if mask not in ids:
        raise UserError('the template has no gap: write [MASK:12] for twelve tokens, or ____ for four')
    return ids + encode(text[end:])


def template_canvas(text, tokenizer, model_config):
    """Token ids of text with gaps, [MASK] where they are open -> (T,)."""
    ids, (most, limit) = parse_template(text, tokenizer.encode, model_config), room(model_config)
    if len(ids) > most:
        raise UserError(f'the {len(ids)} tokens of the template do not fit {limit}: shorten it')
    return begin(ids, tokenizer, model_config)


def prompt_canvas(text, max_new_tokens, tokenizer, model_config):
    """Token ids of a prompt and as many [MASK]; 0 takes 100, or as many as fit -> (T,)."""
    given, (most, limit) = encode_prompt(tokenizer, text), room(model_config)
    count = max_new_tokens or max(1, min(NEW_TOKENS, most - len(given)))
    if len(given) + count > most:
        raise UserError(f'{len(given)} tokens of the prompt and {count} new ones do not fit {limit}: lower '
                        '--max_new_tokens or shorten the prompt')
    return begin(given + [model_config.vocab_size] * count, tokenizer, model_config)


def begin(ids, tokenizer, c):
    """ids as a tensor (T,). With diffusion_shift the first is given, and is end-of-text where the user gives none."""
    return torch.tensor([tokenizer.eot] * (c.diffusion_shift and ids[0] == c.vocab_size) + ids)


def first_canvas(config, tokenizer, model_config):
    """Token ids (T,) with [MASK] where they are open, of --start or --template."""
    if config.template:
        return template_canvas(read_prompt(config.template), tokenizer, model_config)
    return prompt_canvas(read_prompt(config.start), config.max_new_tokens, tokenizer, model_config)


def unseen(canvas, c):
    """What to say where a gap stands before given text that the model will not look at; '' where there is no such gap."""
    open_ = (canvas == c.vocab_size).nonzero()
    if not c.diffusion_block or (canvas[int(open_[0]):] == c.vocab_size).all():
        return ''
    return (f'this model fills blocks of {c.diffusion_block} tokens from left to right: a gap does not see the text to its '
            'right, except in its own block')


# ---------------------------------------------------------------------------------------------------------------------
# generating

def refine_batch(model, canvas, count, refine_config, seed, last=False):
    """Refines `count` copies of a canvas (T,); yields Steps, the first of them before anything is done. A document may end
    in what is open after the given text, if this is the `last` of it; in a gap before given text it does not."""
    idx = canvas.to(model.device).repeat(count, 1)
    mask = model.config.vocab_size
    inside = torch.ones_like(idx, dtype=torch.bool)
    if last:
        inside = (idx != mask).flip(1).cummax(1).values.flip(1)
    nothing = torch.zeros(idx.shape, dtype=torch.float64)
    yield Step(idx, nothing, nothing.bool(), torch.zeros(count, dtype=torch.long))
    yield from model.refine(idx, refine_config, seed, barred=(mask - 1, inside))  # end-of-text is the last id


def settled(ids, c):
    """How many tokens at the start of ids (B, T) stay as they are, with config.diffusion_block: the blocks before the first
    that has an open position in some row."""
    open_ = (ids == c.vocab_size).any(0).nonzero()
    if not len(open_):
        return ids.size(1)
    first = int(open_[0]) - c.diffusion_shift
    return first - first % c.diffusion_block + c.diffusion_shift


def all_ended(ids, c, refine_config, given, eot):
    """Whether all samples (B, T) of a model with diffusion_block have an end-of-text, `eot`, behind the given tokens that no
    step takes back."""
    if eot is None or not c.diffusion_block:
        return False
    in_work = c.diffusion_block if REMASKS[refine_config.remask].compensated else 0  # a full block may be opened again
    return bool((ids[:, given:max(given, settled(ids, c) - in_work)] == eot).any(1).all())


def ends(canvas, config, tokenizer, c):
    """Of a first canvas (T,): how many tokens at its start are given, how many of those not by the user, and the id that
    ends a sample, None where nothing does."""
    given = 0 if config.template else int((canvas != c.vocab_size).sum())
    lead = int(c.diffusion_shift and canvas[0] == tokenizer.eot)
    return given, lead, None if config.ignore_eot or config.template else tokenizer.eot


def up_to_end(row, given, eot):
    """A sample's ids (a list) without an `eot` behind the given tokens and what follows it."""
    return row[:given + row[given:].index(eot)] if eot in row[given:] else row


def finished_tokens(steps, c, start, given, eot):
    """Yields, for each Step of a single canvas of a model with diffusion_block, the tokens (a list) from `start` on that are
    finished since the one before, up to an `eot` behind the given tokens."""
    for step in steps:
        row = up_to_end(step.ids[0, :settled(step.ids, c)].tolist(), given, eot)
        yield row[start:]
        start = max(start, len(row))


class Tally:
    """Tokens filled in, forward passes of each canvas, and the seconds that they took."""

    def __init__(self):
        self.tokens, self.passes, self.seconds = 0, [], 0.0

    def refine(self, model, canvas, count, refine_config, seed, last=True, ended=lambda ids: False):
        """Yields the Steps of `refine_batch`. Where the samples have `ended`, by their ids, the rest stays open. `committed`
        then has how many tokens each Step but the first has committed, over all samples."""
        started, mask, open_before, self.committed = time.perf_counter(), model.config.vocab_size, None, []
        for step in refine_batch(model, canvas, count, refine_config, seed, last):
            open_now = int((step.ids == mask).sum())
            if open_before is not None:
                self.committed.append(open_before - open_now)
            open_before = open_now
            yield step
            if ended(step.ids):
                break
        self.seconds += time.perf_counter() - started
        self.tokens += sum(self.committed)
        self.passes += step.passes.tolist()


def generate(model, tokenizer, canvas, config, refine_config, console):
    """Prints all samples of a canvas (T,); returns the Tally. A single sample of a model with diffusion_block is printed
    while it grows, if nothing is played and no step takes back the blocks before."""
    c, tally, totals = model.config, Tally(), []
    given, lead, eot = ends(canvas, config, tokenizer, c)
    plays = config.animate or config.html
    grows = c.diffusion_block and config.num_samples == 1 and not plays and not REMASKS[refine_config.remask].compensated
    for first in range(0, config.num_samples, SAMPLES_AT_ONCE):
        count, recorder = min(SAMPLES_AT_ONCE, config.num_samples - first), player.Recorder()
        steps = tally.refine(model, canvas, count, refine_config, derive_seed(config.seed, first),
                             ended=partial(all_ended, c=c, refine_config=refine_config, given=given, eot=eot))
        if grows:
            stream('', tokenizer, ([ids] for ids in finished_tokens(steps, c, lead, given, eot)))
            continue
        for last in steps:
            if plays and first == 0:
                recorder.add(last)
        totals = [sum(pair) for pair in itertools.zip_longest(totals, tally.committed, fillvalue=0)]
        if plays and first == 0:
            show(recorder.recording(tokenizer, c.vocab_size), config, console)
        for row in last.ids.tolist():
            text = tokenizer.decode(up_to_end(row, given, eot)[lead:])
            print(text, *['---------------'] * (config.num_samples > 1), sep='\n', flush=True)
    if refine_config.strategy == 'naive':
        print(f'committed in each step, over all samples: {", ".join(map(str, totals))}', file=sys.stderr)
    return tally


def show(recording, config, console):
    if config.animate:  # FORCE_COLOR makes rich take a pipe for a terminal, but there the cursor cannot move
        player.play(recording, console if sys.stdout.isatty() else Console(force_terminal=False))
    if config.html:
        player.write_page(recording, config.html)


@torch.inference_mode()
def flagged_tokens(model, ids, threshold):
    """For which of the token ids (T,) the model predicts [MASK], block by block -> (T,) bool."""
    chunks = []
    for block in ids.split(model.config.block_size):
        x = model.trunk(block[None].to(model.device))[0]
        with exact(x.device):
            chunks.append((model.head(x.float()).double().softmax(-1)[:, -1] > threshold).cpu())
    return torch.cat(chunks)


def check_repairs(model):
    if model.config.diffusion_objective != 'repair':
        raise UserError('only a model of --diffusion_objective=repair flags wrong tokens')


def rewrite(model, ids, refine_config, seed):
    """Rewrites which of a text's token ids (T,) the model flags, block by block -> the new ids (a list), flagged (T,) bool,
    the Tally."""
    mask, tally, repaired = model.config.vocab_size, Tally(), []
    started = time.perf_counter()
    flagged = flagged_tokens(model, ids, refine_config.flag_threshold)
    tally.seconds += time.perf_counter() - started
    for number, block in enumerate(ids.masked_fill(flagged, mask).split(model.config.block_size)):
        *_, last = tally.refine(model, block, 1, refine_config, derive_seed(seed, number), last=False)
        repaired += last.ids[0].tolist()
    tally.passes = [1 + passes for passes in tally.passes]  # the one that flagged
    return repaired, flagged, tally


def repair(model, tokenizer, config, refine_config, console):
    """Repairs a text and prints the differences. Returns the Tally."""
    check_repairs(model)
    ids = torch.tensor(tokenizer.encode(read_prompt(f'FILE:{config.repair.removeprefix("FILE:")}')))
    if not len(ids):
        raise UserError(f'{config.repair} is empty')
    repaired, flagged, tally = rewrite(model, ids, refine_config, config.seed)
    if config.to:
        write(config.to, tokenizer.decode_bytes(repaired))
    differences = player.diff(tokenizer, ids.tolist(), repaired, flagged.tolist(), console.is_terminal)
    sys.stdout.write(differences + '\n' * (not differences.endswith('\n')))
    return tally


def write(path, data):
    try:
        with open(path, 'wb') as f:
            f.write(data)
    except OSError as e:
        raise UserError(f'cannot write {path}: {e.strerror}') from None


def check_flagging(refine_config, repairing):
    if refine_config.flag_threshold != RefineConfig.flag_threshold and refine_config.remask != 'flag' and not repairing:
        raise UserError(f'flag_threshold={refine_config.flag_threshold} is for --remask=flag and --repair')


def main(argv):
    config, refine_config, _ = configure(argv, GenerateConfig, RefineConfig, description=__doc__)
    check_flagging(refine_config, config.repair)
    limit_threads()
    device = pick_device(config.device, float64=True)
    dtype = pick_dtype(config.dtype, device)
    model, tokenizer = open_model(config.out_dir, config.ckpt, device)
    check_defined(refine_config, model)
    print_utf8(newline='')  # line ends as they are
    console = Console()
    with autocast(device, dtype):
        if config.repair:
            tally = repair(model, tokenizer, config, refine_config, console)
        else:
            canvas = first_canvas(config, tokenizer, model.config)
            if unseen(canvas, model.config):
                print(unseen(canvas, model.config), file=sys.stderr)
            tally = generate(model, tokenizer, canvas, config, refine_config, console)
    if refine_config.block_length and not model.config.diffusion_block and max(tally.passes) > refine_config.max_steps:
        print(f'a block takes at least one step, so --block_length={refine_config.block_length} took more than '
              f'--max_steps={refine_config.max_steps}', file=sys.stderr)
    mean, speed = sum(tally.passes) / len(tally.passes), tally.tokens / max(tally.seconds, 1e-9)
    print(f'{mean:.1f} forward passes (NFE) for each of {len(tally.passes)}, {tally.tokens} tokens in {tally.seconds:.2f} '
          f's, {speed:,.1f} tokens/s', file=sys.stderr)


if __name__ == '__main__':
    run(main)
