"""
Text out of a masked diffusion checkpoint, by refinement: from nothing, after a prompt, around given text, or of given text.

    python generate_diffusion.py --out_dir=out-diffusion --max_steps=32 --max_new_tokens=64 --animate=True
    python generate_diffusion.py --start="Once upon a time" --strategy=ancestral --remask=flag
    python generate_diffusion.py --template="Once upon a time [MASK:12] the end." --html=refinement.html
    python generate_diffusion.py --repair=story.txt       what the model doubts is written anew, shown as a coloured diff
"""
import re
import sys
import time
from dataclasses import dataclass

import torch
from rich.console import Console

import checkpoint
import watch
from configurator import UserError, configure, option, run
from data import derive_seed
from machine import DTYPES, autocast, pick_device, pick_dtype
from refinement import RefineConfig, Step
from sample import read_prompt
from tokenizer import tokenizer_from_meta

SAMPLES_AT_ONCE = 64
OPEN = re.compile(r'\[MASK:(\d+)\]|_{3,}')


@dataclass
class GenerateConfig:
    """What to generate, from what, and how it is shown; RefineConfig says how it is refined."""
    out_dir: str = option('out-diffusion', "folder of the run to sample from, or 'hf:NAME_OR_FOLDER' written by export.py")
    ckpt: str = option('best', 'which checkpoint of it', tuple(checkpoint.FILES))
    start: str = option('', 'the prompt, or FILE:path to read it from')
    max_new_tokens: int = option(100, 'tokens to fill in after the prompt')
    template: str = option('', "text with gaps, or FILE:path: [MASK:12] is twelve tokens, ____ one for each underscore")
    repair: str = option('', 'a text file: tokens that the model flags are rewritten, the others stay')
    num_samples: int = option(1, 'how many samples')
    animate: bool = option(False, 'play the refinement of the first sample in the terminal')
    html: str = option('', 'write a page that plays the refinement of the first sample, all in one file')
    seed: int = option(1337, 'the same seed gives the same samples on the same machine')
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = option('auto', 'of matrix products: auto is float32 on a CPU, else the fastest safe one', ('auto', *DTYPES))

    def __post_init__(self):
        for name in ('max_new_tokens', 'num_samples'):
            if getattr(self, name) < 1:
                raise UserError(f'{name}={getattr(self, name)} must be at least 1')
        given = [name for name in ('start', 'template', 'repair') if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f'{" and ".join(given)} contradict each other: give one of them')


# ---------------------------------------------------------------------------------------------------------------------
# the canvas to start from

def parse_template(text, encode, mask):
    """Token ids of text with gaps: what is outside the gaps is encoded as it stands, piece by piece."""
    ids, end = [], 0
    for gap in OPEN.finditer(text):
        ids += encode(text[end:gap.start()]) + [mask] * (int(gap[1]) if gap[1] else len(gap[0]))
        end = gap.end()
    if mask not in ids:
        raise UserError('the template has no gap: write [MASK:12] for twelve tokens, or ____ for four')
    return ids + encode(text[end:])


def first_canvas(config, tokenizer, model_config):
    """Token ids (T,) with [MASK] where they are open, of --start or --template."""
    mask, block_size = model_config.vocab_size, model_config.block_size
    if config.template:
        ids = parse_template(read_prompt(config.template), tokenizer.encode, mask)
    else:
        ids = tokenizer.encode(read_prompt(config.start)) + [mask] * config.max_new_tokens
    if len(ids) > block_size:
        raise UserError(f'{len(ids)} tokens, of which {ids.count(mask)} are open, do not fit block_size={block_size} of the '
                        'model: lower --max_new_tokens or shorten the text')
    return torch.tensor(ids)


# ---------------------------------------------------------------------------------------------------------------------
# generating

def refine_batch(model, canvas, count, config, seed):
    """Refines `count` copies of a canvas (T,) -> the list of Steps, the first of them before anything was done."""
    idx = canvas.to(model.device).repeat(count, 1)
    nothing = torch.zeros(idx.shape, dtype=torch.float64)
    first = Step(idx, nothing, nothing.bool(), torch.zeros(count, dtype=torch.long))
    return [first, *model.refine(idx, config, seed)]


def generate(model, tokenizer, canvas, config, how, console):
    """Prints all samples of a canvas (T,); returns tokens filled in and forward passes of each sample."""
    passes = []
    for first in range(0, config.num_samples, SAMPLES_AT_ONCE):
        count = min(SAMPLES_AT_ONCE, config.num_samples - first)
        steps = refine_batch(model, canvas, count, how, derive_seed(config.seed, first))
        if first == 0:
            show(steps, tokenizer, model.config.vocab_size, config, how, console)
        passes += steps[-1].passes.tolist()
        for row in steps[-1].ids.tolist():
            print(tokenizer.decode(row), *['---------------'] * (config.num_samples > 1), sep='\n', flush=True)
    return int((canvas == model.config.vocab_size).sum()), passes


def show(steps, tokenizer, mask, config, how, console):
    """Plays the refinement of the first sample, and writes its page."""
    film = watch.Film.of(steps, tokenizer, mask)
    if how.strategy == 'naive':
        counts = ', '.join(str(int((frame.ids != mask).sum())) for frame in steps[1:])
        print(f'committed after each step, over all samples: {counts}', file=sys.stderr)
    if config.animate:
        watch.play(film, console)
    if config.html:
        watch.write_page(film, config.html)


@torch.inference_mode()
def doubted(model, ids, threshold):
    """Which of the token ids (T,) the model answers with [MASK], block by block -> (T,) bool."""
    found = []
    for block in ids.split(model.config.block_size):
        logits, _ = model(block[None].to(model.device))
        found.append((logits[0].double().softmax(-1)[:, -1] > threshold).cpu())
    return torch.cat(found)


def repair(model, tokenizer, config, how, console):
    """Rewrites what the model doubts in a text, block by block; prints the differences. Returns tokens and passes."""
    if model.config.diffusion_objective != 'repair':
        raise UserError('only a model of --diffusion_objective=repair flags wrong tokens')
    ids, mask = torch.tensor(tokenizer.encode(read_prompt(f'FILE:{config.repair}'))), model.config.vocab_size
    if not len(ids):
        raise UserError(f'{config.repair} is empty')
    wrong, passes, parts = doubted(model, ids, how.flag_threshold), [], []
    for number, block in enumerate(ids.masked_fill(wrong, mask).split(model.config.block_size)):
        steps = refine_batch(model, block, 1, how, derive_seed(config.seed, number))
        parts.append(steps[-1].ids[0].cpu())
        passes.append(1 + int(steps[-1].passes))
    watch.print_diff(tokenizer, ids, torch.cat(parts), wrong, console)
    return int(wrong.sum()), passes


def main(argv):
    config, how, _ = configure(argv, GenerateConfig, RefineConfig, description=__doc__)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device) if config.dtype != 'auto' or device.type != 'cpu' else 'float32'
    state = checkpoint.open_run(config.out_dir, config.ckpt)
    model, tokenizer = checkpoint.load_model(state, device), tokenizer_from_meta(state['tokenizer'])
    sys.stdout.reconfigure(encoding='utf-8')  # whatever the locale
    console = Console()
    started = time.perf_counter()
    with autocast(device, dtype):
        if config.repair:
            tokens, passes = repair(model, tokenizer, config, how, console)
        else:
            canvas = first_canvas(config, tokenizer, model.config)
            tokens, passes = generate(model, tokenizer, canvas, config, how, console)
    seconds = time.perf_counter() - started
    print(f'{sum(passes) / len(passes):.1f} forward passes (NFE) for {tokens} tokens, {len(passes)} at a time; '
          f'{tokens * len(passes) / seconds:,.1f} tokens/s', file=sys.stderr)


if __name__ == '__main__':
    run(main)
