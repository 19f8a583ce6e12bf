"""
What drafts save in generation, and the most that they could.

    python -m experiments.drafts --out_dir=out-drafts --temperature=1 --top_k=0

continues held-out prompts without drafts, with n-gram drafts and, where the model has learned them, with its own; prints the
tokens per forward pass, the seconds (interleaved, medians), and the distinct 2-grams of the samples, so that loops do not
count as speed. The ceiling is that of one draft which has not seen the token r drawn before it: the best such guess is drawn
from q = E_r p(. | r), and is accepted with probability E_r sum min(p(. | r), q). Both expectations run over the `branches`
likeliest r. The last line of stdout is one JSON object.
"""
import json
import os
import time
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

import evaluate
from nanodrift import checkpoint, drafting, ngrams
from nanodrift.data import Windows
from nanodrift.machine import DTYPES, autocast, pick_device, pick_dtype
from nanodrift.options import UserError, check_options, configure, option, run
from nanodrift.sampling import distribution


@dataclass
class DraftsConfig:
    """Which checkpoint goes on with which prompts, and how."""
    out_dir: str = option('out', "folder of the run, or 'hf:NAME_OR_FOLDER'")
    ckpt: str = option('best', 'which checkpoint of it', tuple(checkpoint.FILES))
    data: str = option('', "folder of a prepared data set whose validation text is used; empty is the run's own")
    prompts: int = option(64, 'prompts, from windows spread evenly over the validation text', at_least=1)
    prompt_tokens: int = option(16, 'tokens of a prompt', at_least=1)
    new_tokens: int = option(40, 'tokens that each is continued by', at_least=1)
    at_once: int = option(1, 'prompts that are continued together', at_least=1)
    draft_tokens: int = option(1, 'guesses per forward pass', at_least=1)
    temperature: float = option(1.0, '0 always takes the argmax', at_least=0)
    top_k: int = option(0, 'draw from the k most likely tokens; 0 from all', at_least=0)
    branches: int = option(64, 'of the ceiling: how many of the likeliest tokens are looked at', at_least=1)
    rounds: int = option(3, 'how often each way is timed', at_least=1)
    seed: int = option(1337, 'of the samples', at_least=0, below=2 ** 63)
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = option('auto', 'of matrix products', ('auto', *DTYPES))

    def __post_init__(self):
        check_options(self)


@torch.inference_mode()
def ceiling(model, prompts, branches, **how):
    """Tokens per forward pass of the best single draft behind each of prompts (n, T)."""
    accepted = []
    for prompt in prompts:
        p, r = distribution(model(prompt[None])[0][0, -1], **how).topk(min(branches, model.config.vocab_size))
        p = p / p.sum()
        after = distribution(model(torch.cat((prompt.expand(len(r), -1), r[:, None]), dim=1))[0][:, -1], **how)  # p(. | r)
        q = (p[:, None] * after).sum(0)
        accepted.append(float((p * torch.minimum(after, q).sum(1)).sum()))
    return 1 + sum(accepted) / len(accepted)


def continued(model, prompts, c, way, seed):
    """The new tokens (n, new_tokens) of prompts (n, T), and the forward passes of each row, added up."""
    how = dict(temperature=c.temperature, top_k=c.top_k or None, seed=seed)
    if way == 'plain':
        return torch.stack(list(model.generate(prompts, c.new_tokens, **how)), dim=1), prompts.size(0) * c.new_tokens
    steps = list(drafting.generate(model, prompts, c.new_tokens, c.draft_tokens, own=way == 'own', **how))
    return torch.tensor([sum(new, []) for new in zip(*steps)]), sum(bool(new) for step in steps for new in step)


def main(argv):
    c, _ = configure(argv, DraftsConfig, description=__doc__)
    device = pick_device(c.device)
    entry = evaluate.load(c, c.out_dir, device)
    model = entry.model
    if not model.config.causal:
        raise UserError(f'{c.out_dir} is a {model.config.model_type} model: only causal ones check drafts')
    if c.prompt_tokens + c.new_tokens > model.config.block_size:
        raise UserError(f'prompt_tokens + new_tokens must be at most block_size={model.config.block_size} of the model')
    folder, meta = evaluate.data_of(c, entry)
    windows = Windows(os.path.join(folder, 'val.bin'), meta['dtype'], c.prompt_tokens, model.config.block_size,
                      vocab_size=meta['vocab_size'])
    prompts = windows.read(windows.spread(c.prompts)).to(device)
    ways = ['plain', 'ngram'] + ['own'] * model.config.has_drafts
    seconds, found = {way: [] for way in ways}, {way: [[], 0] for way in ways}
    with autocast(device, pick_dtype(c.dtype, device)):
        most = ceiling(model, prompts, c.branches, temperature=c.temperature, top_k=c.top_k or None)
        for number in range(c.rounds):
            for way in ways:
                started = time.perf_counter()
                for i, chunk in enumerate(prompts.split(c.at_once)):
                    ids, passes = continued(model, chunk, c, way, c.seed + number * len(prompts) + i)
                    found[way][0].append(ids)
                    found[way][1] += passes
                seconds[way].append(time.perf_counter() - started)
    rows = {}
    for way in ways:
        samples, passes = torch.cat(found[way][0]).cpu().numpy(), found[way][1]
        rows[way] = {'tokens_per_pass': samples.size / passes, 'seconds': median(seconds[way]),
                     'distinct_2': ngrams.distinct(np.asarray(samples), 2)}
        print(f'{way:>6}: {rows[way]["tokens_per_pass"]:.3f} tokens per forward pass, {rows[way]["seconds"]:.2f} s, '
              f'distinct 2-grams {rows[way]["distinct_2"]:.3f}')
    print(f'the most that one draft gives: {most:.3f} tokens per forward pass')
    print(json.dumps(rows | {'ceiling': most}))


if __name__ == '__main__':
    run(main)
