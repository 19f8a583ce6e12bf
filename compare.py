"""
Trains model types on one data set under one budget, several seeds of each, evaluates them all, and writes a report.

    python compare.py                                                    every type, on a CPU
    python compare.py --variants="gpt2,heat,heat adaptive" --tokens=2e6 --seeds=1,2,3
    python compare.py --recipe=config/train_wikitext103_gpt2_medium.py --launch="torchrun --standalone --nproc_per_node=8" \\
        --dataset=wikitext-103 --tokens=1e9

Everything is a command of train.py, printed before it runs; what is finished is not run again, what was cut short is
resumed, so that a comparison that was killed goes on where it stopped. In out_dir: report.html, one page with nothing loaded
from elsewhere; results.json; runs/, a folder for each.
"""
import base64
import io
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import jinja2
import torch

import checkpoint
import evaluate
from configurator import UserError, configure, one_of, option, read_config_file, run
from data import derive_seed
from machine import Ranks, pick_device, pick_dtype
from plot_results import plt, reliability
from prepare import load_meta
from train import TrainConfig
from variants import EACH_TYPE, VARIANTS

HERE = os.path.dirname(os.path.abspath(__file__))
JUDGE, ENCODER = 'judge', 'encoder'  # runs of gpt2 beside the compared ones
TRIAL = 15  # iterations that tell how fast a variant is, for a budget in seconds
SHOWN = 3  # samples of each variant in the report


@dataclass
class CompareConfig:
    """What is compared, under which budget."""
    variants: str = option('', f"separated by commas; empty takes one of each type: {', '.join(EACH_TYPE)}")
    seeds: str = option('1,2,3', 'a run of each variant for each seed')
    tokens: float = option(2e6, 'tokens of text that each run trains on')
    seconds: float = option(0.0, 'seconds of training for each run, in place of tokens')
    dataset: str = option('python_bpe1024', 'data set, a folder below data_dir made by prepare.py')
    data_dir: str = option('data', 'where the data sets are')
    recipe: str = option('config/compare_gpt2.py', 'config file of train.py that all variants share')
    launch: str = option('', "what starts train.py in place of python: 'torchrun --standalone --nproc_per_node=8', say")
    samples: int = option(200, 'samples of each run that are judged; 0 judges none')
    length: int = option(64, 'tokens of each sample')
    out_dir: str = option('report', 'folder of the report and of the runs')
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")

    def __post_init__(self):
        for name in self.names:
            one_of('variants', name, VARIANTS)
        if not all(seed.strip().isdigit() for seed in self.seeds.split(',')):
            raise UserError(f'seeds={self.seeds!r} must be whole numbers, separated by commas')
        if min(self.tokens, self.seconds) < 0 or not self.tokens + self.seconds:
            raise UserError(f'tokens={self.tokens} and seconds={self.seconds}: one of them must be above 0')

    @property
    def names(self):
        return [name.strip() for name in self.variants.split(',')] if self.variants else list(EACH_TYPE)


# ---------------------------------------------------------------------------------------------------------------------
# training

def settings_of(config, name, seed, folder):
    """Arguments of train.py for one run, without its length."""
    changes = dict(VARIANTS[name])
    own = os.path.join(HERE, 'config', f'compare_{changes.get("model_type", "gpt2")}.py')
    if changes.get('model_type') in ('diffusion', 'drifting') and config.recipe == CompareConfig.recipe:
        files = [own]  # these have rates of their own
    else:
        files = [config.recipe]
    if changes.get('model_type') == 'drifting':
        changes['encoder'] = os.path.join(config.out_dir, 'runs', ENCODER)
    flags = changes | {'dataset': config.dataset, 'data_dir': config.data_dir, 'device': config.device, 'seed': seed,
                       'out_dir': folder}
    return files + [f'--{key}={value}' for key, value in flags.items()]


def read_lines(folder):
    """The entries of a run's metrics.jsonl; none where it has not begun."""
    try:
        with open(os.path.join(folder, 'metrics.jsonl'), encoding='utf-8') as f:
            return [json.loads(line) for line in f]
    except FileNotFoundError:
        return []


def finished(folder, max_iters):
    """Whether a run has been evaluated after its last iteration."""
    return any('val_loss' in entry and entry['iter'] == max_iters for entry in read_lines(folder))


def call(config, words):
    """Runs train.py with these words, and ends with its exit code if it fails."""
    launcher = shlex.split(config.launch) if config.launch else [sys.executable]
    words = [os.path.join(HERE, 'train.py'), *words]
    print('\n$ ' + shlex.join([*launcher, *words]), flush=True)
    code = subprocess.run([*launcher, *words], check=False).returncode
    if code:
        raise SystemExit(code)
    return shlex.join(words[1:])


def iterations(config, words, folder):
    """How many iterations the budget gives to a run of these settings."""
    values = {key: value for path in words if not path.startswith('--') for key, value in read_config_file(path).items()}
    batch = values.get('batch_size', TrainConfig.batch_size)
    per_iter = batch * values.get('gradient_accumulation_steps', 1) * values['block_size']
    if not config.seconds:
        return max(1, round(config.tokens / per_iter))
    trial = folder + '-trial'
    if not finished(trial, TRIAL):
        call(config, [*words, f'--out_dir={trial}', f'--max_iters={TRIAL}', f'--eval_interval={TRIAL}', '--eval_iters=1',
                      '--log_interval=5', '--warmup_iters=0'])
    speed = statistics.median(entry['tokens_per_s'] for entry in read_lines(trial) if 'tokens_per_s' in entry)
    return max(1, round(config.seconds * speed / per_iter))


def train_one(config, name, seed, folder):
    """Trains one run, goes on with it, or leaves it as it is; returns the command."""
    words = settings_of(config, name, seed, folder)
    max_iters = iterations(config, words, folder)
    words = [*words, f'--max_iters={max_iters}']
    if not finished(folder, max_iters):
        cut_short = os.path.exists(os.path.join(folder, checkpoint.FILES['last']))
        call(config, ['--init_from=resume', f'--out_dir={folder}', f'--max_iters={max_iters}'] if cut_short else words)
    return 'train.py ' + shlex.join(words)


# ---------------------------------------------------------------------------------------------------------------------
# evaluation

def evaluate_run(config, folder):
    """{name: number} of one run on validation text and of its samples; some texts. Kept in the run's evaluation.json."""
    path = os.path.join(folder, 'evaluation.json')
    asked = {'samples': config.samples, 'length': config.length, 'iter': read_lines(folder)[-1]['iter']}
    if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            known = json.load(f)
        if known['asked'] == asked:
            return known
    c = evaluate.EvalConfig(device=config.device, num_samples=max(config.samples, 10), length=config.length)
    how = evaluate.DrawConfig()
    alone = Ranks(device=pick_device(config.device))
    dtype = pick_dtype('auto', alone.device)
    entry = evaluate.load(c, folder, alone.device)
    found = {'asked': asked, 'likelihood': evaluate.likelihood(c, entry, alone, dtype), 'quality': {}}
    if config.samples:
        judge = evaluate.load(c, os.path.join(config.out_dir, 'runs', JUDGE), alone.device)
        evaluate.refuse_judge(c, judge, [entry])
        rows = evaluate.sample_quality(c, how, [entry], judge, alone)
        found['quality'] = rows.pop(entry.name)
        found['others'] = rows
    few = evaluate.EvalConfig(num_samples=10, length=config.length, seed=derive_seed(c.seed, 10) % 2 ** 31)
    eot = load_meta(os.path.join(config.data_dir, config.dataset))['eot']
    samples, _, _ = evaluate.draw_samples(entry, few, how, [eot] * few.num_samples, alone)
    found['texts'] = [entry.tokenizer.decode(row.tolist()) for row in samples[:SHOWN]]
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(found, f)
    return found


def spread_of(values):
    """Mean and standard deviation over seeds, of those that are numbers; None where there is none."""
    values = [v for v in values if v is not None and math.isfinite(v)]
    if not values:
        return None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def row_of(name, runs):
    """The means over seeds of one variant: {column: (mean, deviation) or None}."""
    def of(part, key):
        return spread_of([r['evaluation'][part].get(key) for r in runs])
    bound = 'bound' in runs[0]['evaluation']['likelihood']
    row = {'variant': name, 'bound': bound, 'loss': of('likelihood', 'bound' if bound else 'loss'),
           'trained tokens/s': spread_of([r['speed'] for r in runs])}
    row |= {key: of('likelihood', key) for key in ('bits_per_byte', 'accuracy', 'ece', 'brier', 'fill_accuracy')}
    measures = ('classifier', 'mauve', 'js_2', 'distinct_2', 'entropy', 'nfe', 'tokens_per_s')
    return row | {key: of('quality', key) for key in measures}


# ---------------------------------------------------------------------------------------------------------------------
# the page

def picture(title, x, y, draw):
    """A figure as the address of a PNG in the page itself; `draw(axes)` puts the data in."""
    fig, axes = plt.subplots(figsize=(7.5, 4.2), constrained_layout=True)
    draw(axes)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    out = io.BytesIO()
    fig.savefig(out, format='png', dpi=130)
    plt.close(fig)
    return 'data:image/png;base64,' + base64.b64encode(out.getvalue()).decode()


def with_seconds(entries, per_iter):
    """Yields the entries of metrics.jsonl, each with the seconds of training before it."""
    seconds, last = 0.0, 0
    for entry in entries:
        if 'tokens_per_s' in entry:
            seconds += (entry['iter'] - last) * per_iter / entry['tokens_per_s']
            last = entry['iter']
        yield entry, seconds


def curve(run_, key, against):
    """Points of a run's evaluations: tokens or seconds of training, and the value."""
    per_iter = run_['tokens_per_iter']
    return [(entry['iter'] * per_iter if against == 'tokens' else seconds, entry[key])
            for entry, seconds in with_seconds(run_['entries'], per_iter) if entry.get(key) is not None]


def draw_curves(axes, variants, key, against):
    for number, (name, runs) in enumerate(variants.items()):
        for i, run_ in enumerate(runs):
            points = curve(run_, key, against)
            if points:
                axes.plot(*zip(*points), color=f'C{number % 10}', linestyle='-' if number < 10 else '--', linewidth=1,
                          marker='.', label=None if i else name)


def draw_scatter(axes, rows):
    for number, row in enumerate(rows):
        if row['tokens_per_s'] and row['classifier']:
            axes.scatter(row['tokens_per_s'][0], row['classifier'][0], color=f'C{number % 10}', label=row['variant'])
    axes.set_xscale('log')


def pictures(variants, rows):
    likely = {name: runs for name, runs in variants.items() if 'loss' in runs[0]['evaluation']['likelihood']}
    found = []
    for key, title, y in (('val_loss', 'Validation loss, causal types', 'nats per token'),
                          ('val_accuracy', 'Next-token accuracy', 'share of positions')):
        for against in ('tokens', 'seconds'):
            found.append(picture(title, f'{against} of training', y,
                                 lambda axes, key=key, against=against: draw_curves(axes, likely, key, against)))
    first = {name: runs[0]['evaluation']['likelihood'] for name, runs in variants.items()}
    bins = {name: (its['bins'], its['ece']) for name, its in first.items() if 'bins' in its}
    found.append(picture('Reliability of the first seed', 'confidence', 'accuracy', lambda axes: reliability(axes, bins)))
    if any(row['classifier'] for row in rows):
        found.append(picture('Speed and quality of sampling', 'tokens per second',
                             'accuracy of the classifier, 0.5 is perfect', lambda axes: draw_scatter(axes, rows)))
    return found


def write_report(config, variants, commands, seconds):
    """Writes results.json and report.html into out_dir."""
    rows = [row_of(name, runs) for name, runs in variants.items()]
    every = [r['evaluation'] for runs in variants.values() for r in runs]
    others = next((found['others'] for found in every if 'others' in found), {})
    facts = {'commit': checkpoint.commit(), 'torch': torch.__version__, 'dataset': config.dataset, 'seeds': config.seeds,
             'hours of training': round(seconds / 3600, 2),
             'budget': f'{config.seconds:g} seconds' if config.seconds else f'{config.tokens:,.0f} tokens a run'}
    with open(os.path.join(config.out_dir, 'results.json'), 'w', encoding='utf-8') as f:
        json.dump({'facts': facts, 'rows': rows, 'others': others, 'commands': commands}, f, indent=1)
    with open(os.path.join(HERE, 'report.html'), encoding='utf-8') as f:
        template = jinja2.Template(f.read(), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    texts = {name: runs[0]['evaluation']['texts'] for name, runs in variants.items()}
    page = template.render(rows=rows, others=others, facts=facts, pictures=pictures(variants, rows), commands=commands,
                           texts=texts, samples=config.samples)
    path = os.path.join(config.out_dir, 'report.html')
    with open(path, 'w', encoding='utf-8') as f:
        f.write(page)
    return path, rows


def collect(config, folder):
    """What the report needs of one run."""
    entries = read_lines(folder)
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
        c = json.load(f)
    per_iter = c['batch_size'] * c['gradient_accumulation_steps'] * c['block_size']
    speeds = [entry['tokens_per_s'] for entry in entries if 'tokens_per_s' in entry]
    *_, (_, seconds) = with_seconds(entries, per_iter)
    return {'entries': entries, 'tokens_per_iter': per_iter, 'speed': statistics.median(speeds) if speeds else None,
            'seconds': seconds, 'evaluation': evaluate_run(config, folder)}


def main(argv):
    config, _ = configure(argv, CompareConfig, description=__doc__)
    load_meta(os.path.join(config.data_dir, config.dataset))  # or a clear error, before hours of work
    runs = os.path.join(config.out_dir, 'runs')
    started, commands = time.time(), {}
    beside = [JUDGE] * bool(config.samples)
    if any(VARIANTS[name].get('model_type') == 'drifting' for name in config.names):
        beside.append(ENCODER)
    for number, name in enumerate(beside):  # seeds of their own
        commands[name] = train_one(config, 'gpt2', 1000 + number, os.path.join(runs, name))
    folders = {}
    for seed in config.seeds.split(','):  # so that every variant has one run before any has two
        for name in config.names:
            folder = os.path.join(runs, f'{name.replace(" ", "-")}_seed{seed.strip()}')
            commands[f'{name}, seed {seed.strip()}'] = train_one(config, name, int(seed), folder)
            folders.setdefault(name, []).append(folder)
    print(f'\ntrained, {(time.time() - started) / 60:.1f} minutes; now evaluating', flush=True)
    variants = {name: [collect(config, folder) for folder in its] for name, its in folders.items()}
    seconds = sum(r['seconds'] for its in variants.values() for r in its)
    path, rows = write_report(config, variants, commands, seconds)
    print(path)
    print(json.dumps(rows))


if __name__ == '__main__':
    run(main)
