"""
The README.md of an exported model: a model card in Hugging Face's format. Its figures and settings are those that the
checkpoint holds; what it does not hold is left out.
"""
import json
import math
import os
import shlex
from dataclasses import fields

from nanodrift.checkpoint import EMBEDDING
from nanodrift.data import load_meta
from nanodrift.options import UserError

SIZES = ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')
TRAINING = ('batch_size', 'gradient_accumulation_steps', 'learning_rate', 'lr_schedule', 'warmup_iters', 'weight_decay',
            'ema', 'max_tokens', 'dtype', 'seed', 'eval_iters')
FIGURES = {'loss': ('validation loss', 'nats per token'), 'js_2': ('Jensen-Shannon divergence of 2-grams', 'bits'),
           'nelbo': ('upper bound of the validation loss', 'nats per token, and no exact loss')}
CARD = '''---
library_name: {library}
pipeline_tag: text-generation
tags: {tags}
---

# {title}

A `{model_type}` model, exported with nanoDrift. No license is claimed here: before publishing, name the licenses of the
weights and of their training text.

| | |
| --- | --- |
{facts}

## How to load it

From the folder that holds this one{transformers} with nanoDrift, whose folder is NANODRIFT here; its data set has to be
prepared first:

```
{commands}
```

## What it cannot do

{limits}
'''
TRANSFORMERS = ''', with transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name!a})
tokenizer = AutoTokenizer.from_pretrained({name!a})
start = tokenizer(tokenizer.eos_token, return_tensors='pt')  # end-of-text starts a new document; your own text is continued
print(tokenizer.decode(model.generate(**start, max_new_tokens={count}, do_sample=True)[0]))
```

or'''


def writing_command(model_type, folder):
    """The words of the command that writes text with an exported model of this type."""
    script, key = ('generate_diffusion.py', 'out_dir') if model_type == 'diffusion' else ('sample.py', 'init_from')
    return ['python', script, f'--{key}=hf:{folder}']


def code(value):
    """Any value as code in a line or table of Markdown."""
    return '`' + ' '.join(str(value).split()).replace('`', "'").replace('|', '/') + '`'


def model_card(state, c, model, folder, dtype):
    """The card's text, from a checkpoint, its GPTConfig, its model, the new folder and the number type of its weights."""
    name = os.path.basename(os.path.abspath(folder))
    gpt2, run = c.model_type == 'gpt2', state.get('config') or {}
    parameters = count_parameters(model, c)
    facts = {'type': code(c.model_type), 'parameters': f'{parameters:,} in {dtype}', **model_facts(c),
             **data_facts(state, run), **training_facts(state, c, run, model.objective.val_metric), **origin(state)}
    data = os.path.join('NANODRIFT', 'data', os.path.basename(os.path.normpath(run.get('dataset') or 'NAME')))
    _, script, *words = writing_command(c.model_type, name)
    commands = [['python', f'NANODRIFT/{script}', *words],
                ['python', 'NANODRIFT/evaluate.py', f'--out_dir=hf:{name}', f'--data={data}']]
    text = CARD.format(
        library='transformers' if gpt2 else 'nanodrift', model_type=c.model_type, title=code(name)[1:-1],
        tags=json.dumps(['nanodrift', c.model_type]), commands='\n'.join(map(shlex.join, commands)),
        facts='\n'.join(f'| {fact} | {value} |' for fact, value in facts.items()),
        transformers=TRANSFORMERS.format(name=name, count=min(50, c.block_size)) if gpt2 else ',',
        limits='\n'.join(f'- {limit}' for limit in limits(state, c, parameters)))
    return text.encode('utf-8', errors='replace').decode('utf-8')  # names of folders may be no Unicode


def count_parameters(model, c):
    """What is exported: without the padding of the embedding matrix; transformers has no rows for ids without text."""
    rows = c.vocab_size + (c.mask_tokens if c.model_type != 'gpt2' else 0)
    return sum(rows * p.size(1) if name == EMBEDDING else p.numel() for name, p in model.named_parameters())


def model_facts(c):
    others = [f for f in fields(c) if f.name not in ('model_type', 'encoder', *SIZES)]
    changed = [f.name for f in others if getattr(c, f.name) != f.default]
    return {'settings of the model': ', '.join(code(f'{name}={getattr(c, name)}') for name in (*SIZES, *changed))}


def data_facts(state, run):
    """The data set, and its sizes where the very text that the model learned from is still there."""
    facts = {'tokenizer': f'{code(state["tokenizer"]["name"])}, identity {code(state["tokenizer"]["identity"])}'}
    if 'dataset' not in run:
        return facts
    facts['data set'] = code(run['dataset'])
    try:
        splits = load_meta(os.path.join(run.get('data_dir', ''), run['dataset']))['splits']
    except UserError:
        return facts
    if state.get('data') == {split: counts.get('text_sha256') for split, counts in splits.items()}:
        facts['data set'] += f': {splits["train"]["tokens"]:,} tokens, and {splits["val"]["tokens"]:,} for validation'
    return facts


def training_facts(state, c, run, val_metric):
    facts, best = {}, state.get('best_val_loss', math.inf)
    if 'batch_size' in run:
        batch = run['batch_size'] * run['gradient_accumulation_steps']
        seen = state.get('examples_seen', state['iter_num'] * batch) * c.block_size
        facts['training'] = f'{seen:,} tokens, {state["iter_num"]:,} iterations'
        facts['settings of the training'] = ', '.join(code(f'{key}={run[key]}') for key in TRAINING if key in run)
    if math.isfinite(best):
        figure, unit = FIGURES.get(val_metric, (f'validation {val_metric}', 'smaller is better'))
        facts[figure] = f'{best:.4f} ({unit}), the best of this run'
    return facts


def origin(state):
    """Which run this is, and whose weights or features it started from."""
    parents = ', '.join(map(code, state['parents'])) or 'none'
    return {'run_id': code(state['run_id']), 'parents': parents} | (
        {'commit of nanoDrift': code(state['commit'])} if state.get('commit') else {})


def limits(state, c, parameters):
    """A sentence or two about each thing that a reader must not expect."""
    yield (f'It is small, {parameters:,} parameters, and continues text like that which it learned from. It follows no '
           'instructions, and was not tested here for truth, bias or harm.')
    if c.model_type != 'gpt2':
        yield 'transformers does not know this type; nanoDrift loads it.'
    if c.model_type == 'drifting':
        yield 'It has no likelihood, so it has no perplexity either.'
        prompts = f'a prompt of at most {c.drift_prefix} tokens is part of it' if c.drift_prefix else 'it takes no prompt'
        yield f'A sample has at most {c.block_size} tokens (`block_size`), written in one pass; {prompts}.'
    elif c.model_type == 'diffusion':
        yield ('It has no exact likelihood: every loss and every perplexity is an upper bound, not to be compared '
               'with exact ones.')
        yield (f'It sees the last {c.block_size} tokens (`block_size`) and fills {c.diffusion_block} at a time.'
               if c.diffusion_block else
               f'Given and new text together have at most {c.block_size} tokens (`block_size`).')
    else:
        yield f'It sees the last {c.block_size} tokens (`block_size`) and nothing before them.'
    if not c.causal and c.model_type == 'heat':
        yield 'It sees the future in training and evaluation (`published=True`): its loss is no likelihood.'
    if (state.get('experiment') or {}).get('published'):
        yield 'It learned the token after the next one, as published.'
    if c.model_type == 'gpt2' and c.has_drafts:
        yield 'The drafts that it learned to make are not part of this format.'
