"""
One table over any checkpoints: what may be compared, and what may not.

    python evaluate.py --out_dir=out-gpt2,out-duo,out-diffusion
    python evaluate.py --out_dir=out-gpt2,out-diffusion --judge=out-judge --num_samples=1000 --length=64
    python evaluate.py --out_dir=out-diffusion --judge=out-judge --ways='max_steps=8;max_steps=8,remask=flag'
    torchrun --standalone --nproc_per_node=8 evaluate.py --out_dir=...      the same numbers, sooner
    python evaluate.py --out_dir=out-gpt2,out-diffusion --tasks=lambada_openai,arc_easy      tasks of lm-evaluation-harness

Causal types: loss, perplexity, bits per byte, accuracy, calibration. Diffusion: an upper bound of the loss, with its
standard error. With a judge, a causal checkpoint that none of the others is or comes from: how far samples are from held-out
text, for every type alike, together with real text and n-gram models (nanodrift/quality.py). The last line of stdout is
one JSON object.
"""
import io
import json
import math
import os
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from model import load_model
from nanodrift import huggingface, ngrams, quality
from nanodrift.checkpoint import FILES
from nanodrift.data import Stream, Windows, derive_seed, load_meta, read_tokens
from nanodrift.machine import DTYPES, Ranks, pick_dtype, setup_ranks
from nanodrift.metrics import over_windows, perplexity
from nanodrift.objectives import NEXT_TOKEN
from nanodrift.options import UserError, build, check_options, option, read_values, run
from nanodrift.refinement import RefineConfig, check_defined
from nanodrift.runlog import finite
from nanodrift.tokenizer import tokenizer_from_meta

ALONE = Ranks()
SAMPLES_AT_ONCE = 100
FEW_SAMPLES = 200  # with fewer, classifier and MAUVE say little
WIDTH = 150  # of the tables, at least: narrower ones cannot be read
XZ_AT_MOST = 2 ** 24  # bytes of text that xz is asked about: a language model is a compressor, and this one everybody has
NGRAM_TOKENS = 10_000_000  # of the training text, for the n-gram models
OF_TASKS = {'draws': 32}  # default for tasks, whose continuations are short, and are compared by their bounds
TEXT_ONLY = ('data', 'windows', 'stride', 'figure', 'judge', 'ways')  # options that tasks have no use for


@dataclass
class EvalConfig:
    """What is evaluated, on what. Samples are drawn as RefineConfig says, its order and revision for diffusion alone."""
    out_dir: str = option('out', 'folders of runs, separated by commas')
    ckpt: str = option('best', 'which checkpoint of each', tuple(FILES))
    data: str = option('', "folder of a prepared data set whose validation text is used; empty is each run's own")
    windows: int = option(0, 'windows of validation text, spread evenly; 0 takes all', at_least=0)
    stride: int = option(0, 'causal types: predictions per window, with more context before each; 0 counts all', at_least=0)
    figure: str = option('', 'PNG file for a reliability diagram: accuracy against confidence')
    draws: int = option(1, 'diffusion: how often each window is masked anew; each continuation of tasks: 32, unless given',
                        at_least=1)
    batch_size: int = option(0, "windows at once, on which the masks of diffusion depend; 0 takes the run's own", at_least=0)
    judge: str = option('', 'folder of a causal run that judges samples; empty draws none')
    num_samples: int = option(1000, 'samples of each model', at_least=2 * quality.FOLDS)
    length: int = option(64, 'tokens of each sample', at_least=4)
    ways: str = option('', "diffusion: several ways to draw samples, a row each: 'max_steps=8;max_steps=8,remask=flag'")
    tasks: str = option('', 'in place of validation text, tasks of lm-evaluation-harness: names or YAML files, separated by '
                        'commas')
    num_fewshot: int = option(-1, "solved examples in front of each of a task; -1 takes the task's own", at_least=-1)
    limit: int = option(0, 'examples of each task; 0 takes all', at_least=0)
    seed: int = option(1337, "of samples, what they are compared with, and tasks' masks", at_least=0, below=2 ** 63)
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = option('auto', 'of likelihoods: auto takes the fastest safe one; samples take float32 (GPUs: TF32)',
                        ('auto', *DTYPES))
    backend: str = option('auto', 'of torch.distributed: auto is nccl on GPUs, gloo on CPUs', ('auto', 'nccl', 'gloo'))

    def __post_init__(self):
        check_options(self)
        if self.ways and not self.judge:
            raise UserError('ways are ways to draw samples, which need a --judge')
        if not self.tasks and (self.limit or self.num_fewshot != EvalConfig.num_fewshot):
            raise UserError('limit and num_fewshot are those of --tasks')
        idle = [name for name in TEXT_ONLY if self.tasks and getattr(self, name) != getattr(EvalConfig, name)]
        if idle:
            raise UserError(f'{idle[0]} has no meaning for tasks: leave it or --tasks out')
        if self.figure and not self.figure.endswith('.png'):
            raise UserError(f'figure={self.figure} must end in .png')
        if self.figure and not os.path.isdir(os.path.dirname(self.figure) or '.'):
            raise UserError(f'figure={self.figure}: there is no such folder')
        if self.figure and not os.access(os.path.dirname(self.figure) or '.', os.W_OK) or os.path.isdir(self.figure):
            raise UserError(f'figure={self.figure} cannot be written')


@dataclass
class DrawConfig(RefineConfig):
    """RefineConfig for samples that are measured: as learned, unless said otherwise."""
    max_steps: int = option(64, 'steps in total; threshold takes as many as it needs', at_least=1)
    temperature: float = option(1.0, '1 is as learned, lower is safer, 0 always takes the argmax', at_least=0)
    top_k: int = option(0, 'draw from the k most likely tokens; 0 from all', at_least=0)


@dataclass
class Entry:
    """A checkpoint under evaluation."""
    name: str
    state: dict
    model: torch.nn.Module
    tokenizer: object

    @property
    def identity(self):
        return self.state['tokenizer']['identity']

    @property
    def relatives(self):
        return {self.state['run_id'], *self.state['parents']}


# ---------------------------------------------------------------------------------------------------------------------
# likelihood and calibration

def data_of(config, entry):
    """The folder of the data set that an Entry is evaluated on, and its meta."""
    settings = entry.state['config']
    if not config.data and not {'data_dir', 'dataset'} <= set(settings):
        raise UserError(f'{entry.name} does not say what it was trained on: --data=FOLDER of a prepared data set')
    folder = config.data or os.path.join(settings['data_dir'], settings['dataset'])
    meta = load_meta(folder)
    if meta['tokenizer']['identity'] != entry.identity:
        raise UserError(f"{entry.name} was trained with tokenizer {entry.state['tokenizer']['name']}, {folder} has "
                        f"{meta['tokenizer']['name']} or another vocabulary of that name: prepare the text with the former")
    return folder, meta


def xz_bits_per_byte(folder, meta, tokenizer):
    """{name: what `xz -9` needs} for a data set's validation text, without its end-of-text tokens: each document by itself,
    and all together, so that it can refer from one to another. Empty where the text is long, or Python has no xz."""
    try:
        import lzma
    except ImportError:
        return {}
    if meta['splits']['val']['bytes'] > XZ_AT_MOST:
        return {}
    ids = read_tokens(folder, 'val', meta)
    ends = np.flatnonzero(ids == meta['eot'])
    documents = [tokenizer.decode_bytes(part[part != meta['eot']].tolist()) for part in np.split(ids, ends)]

    def bits(texts):
        return 8 * sum(len(lzma.compress(text, preset=9)) for text in texts if text) / sum(map(len, documents))
    return {'xz -9, each document': bits(documents), 'xz -9, all together': bits([b''.join(documents)])}


def likelihood(config, entry, ranks, dtype):
    """{name: number} for one checkpoint over validation text; nothing where its type has none."""
    folder, meta = data_of(config, entry)
    model, objective, T = entry.model, entry.model.objective, entry.model.config.block_size
    if config.stride:
        if not model.config.causal or config.stride > T:
            raise UserError(f'stride={config.stride} is for causal types, and at most block_size={T}: not for {entry.name}')
        objective = NEXT_TOKEN
    if objective.val_metric not in ('loss', 'nelbo'):
        return {}
    bound = objective.val_metric == 'nelbo'
    windows = Windows(os.path.join(folder, 'val.bin'), meta['dtype'], objective.window(T), config.stride or T,
                      vocab_size=meta['vocab_size'])
    measured = over_windows(
        windows, windows.spread(config.windows or len(windows)),
        config.batch_size or entry.state['config'].get('batch_size', 8), objective.eval_batch or objective.make_batch,
        partial(objective.metrics, model, calibrated=True), ranks, dtype, config.draws if bound else 1, config.stride)
    numbers = objective.summary(measured)
    loss, val = numbers[objective.val_metric], meta['splits']['val']
    numbers |= {'bound': loss} if bound else {'perplexity': perplexity(loss)}
    return numbers | {'bits_per_byte': loss / math.log(2) * val['tokens'] / val['bytes'],
                      'predictions': float(measured['accuracy'].count)}


# ---------------------------------------------------------------------------------------------------------------------
# samples

def draw_samples(entry, config, draw_config, first_tokens, ranks):
    """-> samples (num_samples, length), forward passes for each, seconds; the same on any number of ranks. A causal model
    goes on from the first tokens (num_samples,), since it cannot predict them."""
    model, batches = entry.model, {}  # {number of its first sample: (ids, forward passes)}
    started = time.perf_counter()
    for number in range(ranks.rank * SAMPLES_AT_ONCE, config.num_samples, ranks.world_size * SAMPLES_AT_ONCE):
        first = torch.as_tensor(first_tokens[number:number + SAMPLES_AT_ONCE], device=model.device)[:, None]
        seed = derive_seed(config.seed, Stream.SAMPLES, number)
        if model.config.model_type == 'diffusion':
            canvas = torch.full((len(first), config.length), model.config.vocab_size, device=model.device)
            canvas[:, :int(model.config.diffusion_shift)] = first  # which is given here too
            *_, step = model.refine(canvas, draw_config, seed)
            batches[number] = step.ids.cpu(), float(step.passes.sum())
        elif model.config.model_type == 'drifting':
            ids = model.generate_at_once(len(first), draw_config.temperature, seed)
            batches[number] = ids[:, :config.length].cpu(), len(first)
        else:
            columns = model.generate(first, config.length - 1, draw_config.temperature,
                                     draw_config.top_k or None, draw_config.top_p, seed)
            ids = torch.cat((first, torch.stack(list(columns), dim=1)), dim=1).cpu()
            batches[number] = ids, len(first) * (config.length - 1)
    all_ranks = {number: batch for mine in ranks.gather(batches) for number, batch in mine.items()}
    ids, passes = zip(*(all_ranks[number] for number in sorted(all_ranks)))
    return torch.cat(ids).numpy(), sum(passes) / config.num_samples, time.perf_counter() - started


def ways_to_draw(config, draw_config, entry):
    """{name: DrawConfig} for an Entry: of diffusion each of config.ways, which is draw_config with some settings changed."""
    texts = [way.strip() for way in config.ways.split(';') if way.strip()]
    if entry.model.config.model_type != 'diffusion' or not texts:
        texts = ['']
    settings = {text: [f'--{setting.strip()}' for setting in text.split(',') if setting] for text in texts}
    ways = {text: replace(draw_config, **read_values(given, DrawConfig)[0]) for text, given in settings.items()}
    if entry.model.config.model_type == 'diffusion':
        for way in ways.values():
            check_defined(way, entry.model)
    return ways


def held_out_halves(folder, meta, config):
    """Two sets of disjoint windows (num_samples, length) of the validation text: what samples are compared with, and what
    shows how close real text comes."""
    tokens = read_tokens(folder, 'val', meta)
    n = len(tokens) // config.length
    if n < 2 * config.num_samples:
        raise UserError(f'{folder} has validation text for {n // 2} samples of {config.length} tokens and as many to '
                        f'compare them with: --num_samples={n // 2}')
    order = np.random.default_rng(derive_seed(config.seed, Stream.HELD_OUT)).permutation(n)[:2 * config.num_samples]
    return np.split(tokens[:n * config.length].reshape(n, config.length)[order], 2)


def check_judge(config, judge, entries):
    """Raises UserError where the judge is one of the models, its parent or its child, or is not causal; and where samples of
    this length or from this text cannot be compared."""
    if not judge.model.config.causal:
        raise UserError(f'{judge.name} cannot judge: its type is not causal')
    for entry in entries:
        writes_on = entry.model.config.causal or entry.model.config.diffusion_block
        if entry.model.config.block_size < config.length and not writes_on:
            raise UserError(f'{entry.name} writes {entry.model.config.block_size} tokens at most: lower --length')
        if data_of(config, entry)[1]['splits'] != data_of(config, entries[0])[1]['splits']:
            raise UserError(f'{entry.name} and {entries[0].name} were trained on different text: name one with --data')
        if judge.relatives & entry.relatives:
            raise UserError(f'{judge.name} cannot judge {entry.name}: the one was trained from the other, or they are the '
                            'same run; train a judge of its own')
        if judge.identity != entry.identity:
            raise UserError(f'{judge.name} cannot judge {entry.name}: they have different tokenizers')
    if judge.model.config.block_size < config.length:
        raise UserError(f'{judge.name} reads {judge.model.config.block_size} tokens at most: lower --length')
    held_out_halves(*data_of(config, entries[0]), config)


def sample_quality(config, draw_config, entries, judge, ranks):
    """{row: {name: number}} of samples of each model, each way of drawing from it."""
    folder, meta = data_of(config, entries[0])
    rng = np.random.default_rng(derive_seed(config.seed, Stream.FIRST_TOKENS))
    first_tokens, drawn = ngrams.real(read_tokens(folder, 'train', meta, NGRAM_TOKENS), config.num_samples, 1, rng)[:, 0], {}
    for entry in entries:
        for name, way in ways_to_draw(config, draw_config, entry).items():
            drawn[f'{entry.name} {name}'.strip()] = draw_samples(entry, config, way, first_tokens, ranks)
    numbers = describe({row: samples for row, (samples, _, _) in drawn.items()}, config, entries[0], judge, ranks)
    for row, (samples, passes, seconds) in drawn.items():
        numbers[row] |= {'nfe': passes, 'tokens_per_s': samples.size / seconds}
    return numbers


def reference_quality(config, entry, judge, ranks=ALONE):
    """{row: {name: number}} of real text, n-gram models and shuffled spans, which samples are to be compared with."""
    folder, meta = data_of(config, entry)
    rng = np.random.default_rng(derive_seed(config.seed, Stream.REFERENCE_ROWS))
    train = read_tokens(folder, 'train', meta, NGRAM_TOKENS)
    n, T = config.num_samples, config.length
    rows = {'real text': held_out_halves(folder, meta, config)[1]}
    rows |= {f'{n_}-grams': ngrams.from_ngrams(train, n_, n, T, rng) for n_ in (1, 2, 3)}
    return describe(rows | {'shuffled spans': ngrams.shuffled_spans(train, n, T, rng)}, config, entry, judge, ranks)


def describe(rows, config, entry, judge, ranks):
    """{row: {name: number}} of samples, compared with held-out text; the rows are dealt to the ranks."""
    judged = quality.Judged(judge.model, held_out_halves(*data_of(config, entry), config)[0])
    mine = {row: quality.describe(rows[row], judged, config.seed) for row in list(rows)[ranks.rank::ranks.world_size]}
    all_ranks = {row: numbers for rank in ranks.gather(mine) for row, numbers in rank.items()}
    return {row: all_ranks[row] for row in rows}


# ---------------------------------------------------------------------------------------------------------------------
# the tables

LIKELIHOOD = {'loss': 'loss', 'perplexity': 'perplexity', 'bits_per_byte': 'bits/byte', 'accuracy': 'accuracy', 'ece': 'ECE',
              'brier': 'Brier', 'brier_top1': 'top-1 Brier', 'entropy': 'entropy', 'fill_accuracy': 'fill accuracy'}
QUALITY = {'classifier': 'classifier', 'mauve': 'MAUVE', 'js_1': 'JS 1', 'js_2': 'JS 2', 'js_3': 'JS 3', 'js_4': 'JS 4',
           'judge_perplexity': 'judge ppl', 'entropy': 'entropy', 'distinct_1': 'dist 1', 'distinct_2': 'dist 2',
           'distinct_3': 'dist 3', 'repetition': 'repeated', 'nfe': 'NFE', 'tokens_per_s': 'tokens/s'}


def cells(numbers, columns, hide=()):
    """The cells of one row; a bound says that it is one."""
    bound = 'bound' in numbers
    row = []
    for key in columns:
        value = numbers.get('bound' if bound and key == 'loss' else key)
        if bound and key == 'perplexity':
            value = perplexity(numbers['bound'])
        if value is None or key in hide:
            row.append('')
        elif bound and key == 'loss':
            error = numbers['nelbo_stderr']
            row.append(f'<= {value:.4f}' + f' ± {error:.4f}' * math.isfinite(error))
        else:
            text = f'{value:,.1f}' if value >= 100 else f'{value:.4f}' if value < 10 else f'{value:.2f}'
            row.append('<= ' * (bound and key in ('perplexity', 'bits_per_byte')) + text)
    return row


def show(title, rows, columns, console, hide=()):
    table = Table(title=title, title_justify='left')
    table.add_column('')
    for name in columns.values():
        table.add_column(name, justify='right')
    for name, numbers in rows.items():
        table.add_row(name, *cells(numbers, columns, hide))
    console.print(table)


def load(config, out_dir, device):
    state = huggingface.open_run(out_dir, config.ckpt)
    if state['tokenizer'] is None:
        raise UserError(f'{out_dir}: its tokenizer is unknown here')
    facts = {key: state[key] for key in ('config', 'tokenizer', 'run_id', 'parents')}  # the rest is large
    facts['data'] = state.get('data')  # hashes of its text, which older runs did not keep
    facts['published_labels'] = (state.get('experiment') or {}).get('published')
    return Entry(out_dir, facts, load_model(state, device), tokenizer_from_meta(state['tokenizer']))


def evaluate(config, draw_config, ranks):
    """{checkpoint: {name: number}} of likelihood, {row: {name: number}} of samples; printed by the first rank."""
    dtype = pick_dtype(config.dtype, ranks.device)
    entries = [load(config, out_dir, ranks.device) for out_dir in map(str.strip, config.out_dir.split(','))]
    judge = load(config, config.judge, ranks.device) if config.judge else None
    if judge:
        check_judge(config, judge, entries)
        for entry in entries:
            ways_to_draw(config, draw_config, entry)  # a mistake shows before the work
    likelihoods = {entry.name: likelihood(config, entry, ranks, dtype) for entry in entries}
    samples = {}
    if judge:
        samples = reference_quality(config, entries[0], judge, ranks)
        samples |= sample_quality(config, draw_config, entries, judge, ranks)
    if ranks.first:
        tell(config, entries, likelihoods, samples)
    return likelihoods, samples


def tell(config, entries, likelihoods, samples):
    """Prints the tables, and what may not be compared."""
    console = Console(width=max(WIDTH, Console().width))
    texts = {data_of(config, entry)[1]['splits']['val']['text_sha256'] for entry in entries}
    hide = () if len({entry.identity for entry in entries}) == 1 else set(LIKELIHOOD) - {'bits_per_byte'}
    if len(texts) > 1:
        hide = set(LIKELIHOOD)
    contexts = {entry.name: entry.model.config.block_size for entry in entries}
    named = {f'{entry.name} ({entry.model.config.model_type}, context {contexts[entry.name]})': likelihoods[entry.name]
             for entry in entries}
    xz = xz_bits_per_byte(*data_of(config, entries[0]), entries[0].tokenizer) if len(texts) == 1 else {}
    named |= {name: {'bits_per_byte': bits} for name, bits in xz.items()}
    show('validation text', named, LIKELIHOOD, console, hide)
    if len(texts) > 1:
        console.print('different validation texts: nothing here can be compared; name one text with --data')
    elif hide:
        console.print('different tokenizers: what is counted for each token cannot be compared, bits per byte can')
    if config.windows and len(set(contexts.values())) > 1:
        console.print(f'different contexts: {config.windows} windows of each are different parts of the text; --windows=0 '
                      'takes all of it')
    for entry in entries:
        kind = entry.model.config.model_type
        val = data_of(config, entry)[1]['splits']['val']
        if not config.data and (entry.state['data'] or {}).get('val') not in (None, val['text_sha256']):
            console.print(f'{entry.name}: its data set was prepared anew since; this is not the text it was validated on')
        if entry.state.get('published_labels'):
            console.print(f'{entry.name} learned the token after the next one (--published=True), and is scored by the next')
        if not likelihoods[entry.name]:
            console.print(f'{entry.name} ({kind}) has no likelihood: its samples can be judged')
        elif kind == 'diffusion':
            console.print(f'{entry.name} ({kind}): accuracy, ECE, Brier and entropy are those of masked tokens')
        elif not entry.model.config.causal:
            console.print(f'{entry.name} sees the future (--published=True): its loss is no likelihood')
    if samples:
        show(f'{config.num_samples} samples of {config.length} tokens, judged by {config.judge}', samples, QUALITY, console)
        if config.num_samples < FEW_SAMPLES:
            console.print(f'{config.num_samples} samples are too few to tell types apart; take {FEW_SAMPLES} or more')
        for name, row in samples.items():
            if row['distinct_2'] < samples['real text']['distinct_2'] / 2:
                console.print(f'{name} has collapsed: fewer than half of the distinct 2-grams of real text')


# ---------------------------------------------------------------------------------------------------------------------
# tasks

def evaluate_tasks(config, ranks):
    """{checkpoint: what lm-evaluation-harness finds, and whether by a bound}, printed as the harness prints it."""
    try:
        from lm_eval.utils import make_table

        from nanodrift.harness import HarnessModel, Tasks, run_tasks
    except ImportError as e:
        raise UserError(f'tasks are those of lm-evaluation-harness: pip install lm_eval==0.4.13 ({e})') from None
    if ranks.world_size > 1:
        raise UserError('tasks are evaluated by one process: start evaluate.py without torchrun')
    entries = [load(config, out_dir, ranks.device) for out_dir in map(str.strip, config.out_dir.split(','))]
    tasks, found = Tasks([name.strip() for name in config.tasks.split(',')]), {}
    dtype, shots = pick_dtype(config.dtype, ranks.device), None if config.num_fewshot < 0 else config.num_fewshot
    for entry in entries:
        c, rows = entry.model.config, config.batch_size or entry.state['config'].get('batch_size', 8)
        how = {'bound': c.model_type == 'diffusion'}
        if not how['bound'] and not c.causal:
            print(f'{entry.name} ({c.model_type}) has no likelihood: tasks cannot be evaluated')
            continue
        model = HarnessModel(entry.model, entry.tokenizer, dtype, rows, config.draws, config.seed)
        results = run_tasks(model, tasks, shots, config.limit or None)
        print(f'{entry.name} ({c.model_type}, context {c.block_size})')
        if how['bound']:
            how |= {'draws': config.draws, 'seed': config.seed}
            print(f'  every loss is an upper bound, from {config.draws} draws of masks with seed {config.seed}; so is a '
                  'perplexity, and a choice is the one of the lowest bound')
        print(make_table(results) + (make_table(results, 'groups') if results.get('groups') else ''))
        found[entry.name] = how | {'results': {
            task: {name: value for name, value in numbers.items() if isinstance(value, (int, float))}
            for task, numbers in results['results'].items()}}
    return found


def draw_reliability(config, likelihoods):
    bins = {name: (numbers['bins'], numbers['ece']) for name, numbers in likelihoods.items() if 'bins' in numbers}
    if config.figure and not bins:
        print('no reliability to draw: none of these has a likelihood')
    elif config.figure:
        from nanodrift.report import figure, reliability
        try:
            figure(config.figure, 'Reliability', 'confidence', 'accuracy', lambda axes: reliability(axes, bins))
        except OSError as e:
            raise UserError(f'figure={config.figure} cannot be written: {e.strerror}') from None


def main(argv):
    values, _ = read_values(argv, EvalConfig, DrawConfig, description=__doc__)
    config, draw_config = build((OF_TASKS if values.get('tasks') else {}) | values, EvalConfig, DrawConfig)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='replace')  # rather a ? than no table where the terminal knows no ±
    with setup_ranks(config.device, config.backend, timeout=1800) as ranks:
        if config.tasks:
            print(json.dumps(finite({'tasks': evaluate_tasks(config, ranks)})), flush=True)
            return
        likelihoods, samples = evaluate(config, draw_config, ranks)
        if ranks.first:
            print(json.dumps(finite({'likelihood': likelihoods, 'samples': samples})), flush=True)
            with redirect_stdout(sys.stderr):  # the last line of stdout is what scripts read
                draw_reliability(config, likelihoods)


if __name__ == '__main__':
    run(main)
