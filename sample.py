"""
Text out of a trained checkpoint.

    python sample.py --out_dir=out --start="def main(" --num_samples=3
    python sample.py --out_dir=out --start=FILE:prompt.txt --num_samples=1     streams as it goes
    python sample.py --init_from=hf:gpt2-xl --start="What is the answer?"      published weights, no training

A drifting model writes all of a sample in one forward pass; --temperature=1, its default, takes the nearest tokens.
"""
import codecs
import sys
import time
from dataclasses import dataclass

import torch

from model import load_model
from nanodrift import drafting
from nanodrift.checkpoint import FILES
from nanodrift.data import derive_seed
from nanodrift.huggingface import open_run
from nanodrift.machine import DTYPES, autocast, limit_threads, pick_device, pick_dtype
from nanodrift.options import UserError, build, check_options, option, read_values, run
from nanodrift.system import print_utf8
from nanodrift.tokenizer import encode_prompt, tokenizer_from_meta

SAMPLES_AT_ONCE = 64
ONE_STEP = {'start': '', 'num_samples': 16, 'temperature': 1.0}  # defaults for drifting


@dataclass
class SampleConfig:
    """What to sample, from what, and how."""
    out_dir: str = option('out', 'folder of the run to sample from')
    ckpt: str = option('best', 'which checkpoint of it', tuple(FILES))
    init_from: str = option('resume', "'resume' reads out_dir; 'hf:NAME_OR_FOLDER' reads an exported model or GPT-2")
    start: str = option('\n', 'the prompt, or FILE:path to read it from; empty, or <|endoftext|> in it, starts a new '
                       'document')
    num_samples: int = option(10, 'how many samples; a single one is streamed', at_least=1)
    max_new_tokens: int = option(500, 'most tokens per sample; end-of-text ends one sooner', at_least=1)
    temperature: float = option(0.8, '1 is as learned, lower is safer, 0 always takes the argmax; drifting: 1 takes the '
                                'nearest token, others draw by cosines / temperature', at_least=0)
    top_k: int = option(200, 'draw from the k most likely tokens; 0 from all', at_least=0)
    top_p: float = option(1.0, 'draw from the fewest most likely tokens that have this much probability together', above=0,
                          at_most=1)
    draft: str = option('none', 'guess several tokens per forward pass, which does not change what is drawn: ngram guesses '
                        'that the text repeats itself, own asks a model that has a draft_block', ('none', 'ngram', 'own'))
    draft_tokens: int = option(4, 'guesses per forward pass; for own at most draft_block', at_least=1, at_most=1024)
    ignore_eot: bool = option(False, 'go on past end-of-text')
    seed: int = option(1337, 'the same seed and num_samples give the same samples on the same machine', at_least=0,
                       below=2 ** 63)
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = option('auto', 'of matrix products: auto takes the fastest safe one of the device', ('auto', *DTYPES))

    def __post_init__(self):
        check_options(self)
        if self.draft == 'none' and self.draft_tokens != SampleConfig.draft_tokens:
            raise UserError(f'draft_tokens={self.draft_tokens} has no effect without --draft=ngram or own')


def open_model(name, ckpt, device):
    """The checkpoint of a run's folder or of 'hf:NAME_OR_FOLDER' -> the model in evaluation mode, its tokenizer."""
    state = open_run(name, ckpt)
    if state['tokenizer'] is None:
        raise UserError(f"{name} has a vocabulary of {state['model_args']['vocab_size']}, GPT-2's tokenizer another: only "
                        'models that kept it can be sampled')
    return load_model(state, device), tokenizer_from_meta(state['tokenizer'])


def load(config, device):
    """-> the model in evaluation mode on the device, its tokenizer."""
    if config.init_from != 'resume' and not config.init_from.startswith('hf:'):
        raise UserError(f"init_from={config.init_from!r} is neither 'resume' nor 'hf:NAME_OR_FOLDER'")
    name = config.out_dir if config.init_from == 'resume' else config.init_from
    model, tokenizer = open_model(name, config.ckpt, device)
    if model.config.model_type == 'diffusion':
        raise UserError(f'{name} is a diffusion model, which is not sampled from left to right: use '
                        f'generate_diffusion.py --out_dir={name}')
    return model, tokenizer


def read_prompt(start):
    """The text of --start."""
    if not start.startswith('FILE:'):
        return start
    path = start.removeprefix('FILE:')
    try:
        with open(path, encoding='utf-8-sig', newline='') as f:  # without a byte-order mark
            return f.read()
    except OSError as e:
        raise UserError(f'cannot read the prompt {path}: {e.strerror}') from None
    except UnicodeDecodeError as e:
        raise UserError(f'the prompt {path} is not UTF-8 (byte {e.start})') from None


def unread(prompt, c):
    """What to say of a prompt that is longer than the model reads; '' where all of it is read."""
    long = len(prompt) > c.block_size
    return f'the prompt has {len(prompt)} tokens; the model reads the last block_size={c.block_size} of them' if long else ''


def generate(model, tokenizer, prompt, count, config, seed):
    """Yields, per forward pass, a list of the new token ids of each of `count` samples, end-of-text left out; the list of a
    sample that has ended is empty."""
    idx = torch.tensor([prompt] * count, device=model.device)
    how = dict(temperature=config.temperature, top_k=config.top_k or None, top_p=config.top_p, seed=seed)
    if config.draft == 'none':
        steps = ([[i] for i in column.tolist()] for column in model.generate(idx, config.max_new_tokens, **how))
    else:
        eot = None if config.ignore_eot else tokenizer.eot
        how |= dict(eot=eot, own=config.draft == 'own')
        steps = drafting.generate(model, idx, config.max_new_tokens, config.draft_tokens, **how)
    done = [False] * count
    for rows in steps:
        ended = [tokenizer.eot in ids and not config.ignore_eot for ids in rows]
        yield [[] if d else ids[:-1] if e else ids for d, e, ids in zip(done, ended, rows)]  # end-of-text is the last one
        done = [d or e for d, e in zip(done, ended)]
        if all(done):
            return


def stream(text, tokenizer, steps):
    """Prints one sample while it grows; returns its number of tokens, and of forward passes."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace')  # a token may end inside a character
    print(text, end='', flush=True)
    count = passes = 0
    for (ids,) in steps:
        print(decoder.decode(tokenizer.decode_bytes(ids)), end='', flush=True)
        count, passes = count + len(ids), passes + 1
    print(decoder.decode(b'', final=True), flush=True)
    return count, passes


def print_samples(text, tokenizer, model, prompt, config):
    """Prints all samples, made some at a time; returns their number of tokens, and the forward passes of each, added up."""
    tokens = passes = 0
    for first in range(0, config.num_samples, SAMPLES_AT_ONCE):
        count = min(SAMPLES_AT_ONCE, config.num_samples - first)
        steps = list(generate(model, tokenizer, prompt, count, config, derive_seed(config.seed, first)))
        for row in zip(*steps):
            ids = [token for new in row for token in new]
            tokens, passes = tokens + len(ids), passes + sum(map(bool, row))
            print(text + tokenizer.decode(ids), '---------------', sep='\n', flush=True)
    return tokens, passes


def check_idle(values):
    """Raises UserError for an option that one-step generation has no use for."""
    for name in ('top_k', 'top_p', 'ignore_eot', 'draft', 'draft_tokens'):
        if name in values:
            raise UserError(f'{name} has no meaning for a drifting model, which writes all tokens at once: leave it out')


def generate_at_once(model, prompt, count, config, seed):
    """The new ids (count, T) of samples of a drifting model, all in one forward pass."""
    c = model.config
    if len(prompt) > c.drift_prefix:
        raise UserError(f'the prompt has {len(prompt)} tokens, and the model was trained with at most '
                        f'drift_prefix={c.drift_prefix}: shorten it, or train with a larger --drift_prefix')
    ids = model.generate_at_once(count, config.temperature, seed, torch.tensor(prompt) if prompt else None)
    return ids[:, len(prompt):len(prompt) + config.max_new_tokens]


def print_at_once(text, tokenizer, model, prompt, config):
    """Prints all samples of a drifting model; returns their number of tokens."""
    tokens, passes = 0, 0
    for first in range(0, config.num_samples, SAMPLES_AT_ONCE):
        count = min(SAMPLES_AT_ONCE, config.num_samples - first)
        ids = generate_at_once(model, prompt, count, config, derive_seed(config.seed, first))
        passes += 1
        tokens += ids.numel()
        for row in ids.tolist():
            print(text + tokenizer.decode(row), '---------------', sep='\n', flush=True)
    print(f'1 forward pass (NFE) for each sample, {passes} in all', file=sys.stderr)
    return tokens


def main(argv):
    values, _ = read_values(argv, SampleConfig, description=__doc__)
    config, = build(values, SampleConfig)
    limit_threads()
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    model, tokenizer = load(config, device)
    print_utf8()
    if model.config.model_type == 'drifting':
        check_idle(values)
        config, = build(ONE_STEP | values, SampleConfig)
    if config.draft != 'none' and not model.config.causal:
        raise UserError('a model that sees the future (--published=True) cannot check drafts: leave --draft out')
    if config.draft == 'own' and not model.config.has_drafts:
        raise UserError('the model has not learned to guess ahead, train.py --draft_block=2 does: take --draft=ngram')
    if 'start' not in values and tokenizer.name == 'char' and '\n' not in tokenizer.characters:
        config.start = ''  # the default is a newline
    text = read_prompt(config.start)
    prompt = encode_prompt(tokenizer, text)
    if not prompt and model.config.model_type != 'drifting':
        prompt = [tokenizer.eot]
    if unread(prompt, model.config):
        print(unread(prompt, model.config), file=sys.stderr)
    started = time.perf_counter()
    with autocast(device, dtype):
        if model.config.model_type == 'drifting':
            tokens = print_at_once(text, tokenizer, model, prompt, config)
        elif config.num_samples == 1:
            tokens, passes = stream(text, tokenizer, generate(model, tokenizer, prompt, 1, config, config.seed))
        else:
            tokens, passes = print_samples(text, tokenizer, model, prompt, config)
    seconds = time.perf_counter() - started
    drafted = f', {tokens / max(passes, 1):.2f} tokens per forward pass' if config.draft != 'none' else ''
    print(f'{tokens:,} tokens in {seconds:.2f} s, {tokens / seconds:,.1f} tokens/s{drafted}', file=sys.stderr)


if __name__ == '__main__':
    run(main)
