"""
The page of a comparison: what follows, means over seeds, curves, samples and commands, in one file that loads nothing from
elsewhere.
"""
import base64
import io
import json
import math
import os
import platform
import statistics

import jinja2
import matplotlib
import numpy as np
import torch

from nanodrift import checkpoint
from nanodrift.options import UserError
from nanodrift.runs import median_speed, read_lines, settings_of
from nanodrift.system import cores, write_atomically

matplotlib.use('Agg')  # files only: no window
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

HERE = os.path.dirname(os.path.abspath(__file__))
LIKELIHOOD = {'loss': 'loss', 'loss_at_equal_seconds': 'loss at equal seconds', 'stderr': 'standard error',
              'bits_per_byte': 'bits per byte', 'accuracy': 'accuracy', 'ece': 'ECE', 'brier': 'Brier',
              'fill_accuracy': 'fill-in accuracy', 'trained': 'trained tokens/s'}
QUALITY = {'classifier': 'classifier', 'classifier_stderr': 'standard error', 'mauve': 'MAUVE', 'js_1': 'JS 1',
           'js_2': 'JS 2', 'js_3': 'JS 3', 'js_4': 'JS 4', 'judge_perplexity': "judge's perplexity", 'entropy': 'entropy',
           'distinct_1': 'distinct 1', 'distinct_2': 'distinct 2', 'distinct_3': 'distinct 3', 'repetition': 'repeated',
           'nfe': 'NFE', 'tokens_per_s': 'tokens/s'}
# the table at the top of the page: (part of a row, column of it) -> title
SUMMARY = {('likelihood', 'loss'): 'validation loss', ('likelihood', 'loss_at_equal_seconds'): 'at equal seconds',
           ('likelihood', 'accuracy'): 'accuracy', ('quality', 'classifier'): 'samples told from text',
           ('quality', 'nfe'): 'passes for a sample', ('likelihood', 'trained'): 'training tokens/s'}
COMPARED = tuple(SUMMARY)[:2] + tuple(SUMMARY)[3:4]  # about which something is concluded; of all of them less is better
VERDICTS = LOWER, HIGHER, ALIKE, OPEN, SINGLE = (
    'lower, beyond the seeds', 'higher, beyond the seeds', 'no difference beyond the seeds',
    'a bound that is not lower, so nothing follows', 'a single seed, so nothing follows')
BEYOND = 2  # two means differ beyond their seeds if they are further apart than so many spreads of both together

PAPER, INK = ('#fdfcf9', '#17191c'), ('#22252a', '#e6e4de')  # of the page, light and dark
COLOURS = ('#1f77b4', '#d9730d', '#2c9a2c', '#d62728', '#9467bd', '#a5674f', '#d14fa6', '#7f7f7f', '#8a8b12', '#0f94a3')
MARKERS = '.x^'  # of the first ten variants, the second, and the third: dashes are for bounds


# ---------------------------------------------------------------------------------------------------------------------
# files

def write_whole(path, text):
    """Writes a file so that a reader never sees half of it. Raises UserError if it cannot."""
    try:
        # the names of files, in commands, may be no Unicode
        write_atomically(path, text.encode(errors='backslashreplace'))
    except OSError as e:
        raise UserError(f'cannot write {path}: {e.strerror}') from None


def collect(run, command):
    """What the report needs of one trained Run, but for its evaluation."""
    entries = read_lines(run.folder)
    *_, (_, seconds) = with_seconds(entries, run.tokens_per_iter)
    return {'entries': entries, 'tokens_per_iter': run.tokens_per_iter, 'speed': median_speed(entries), 'seconds': seconds,
            'settings': settings_of(run.folder), 'command': command}


def with_seconds(entries, per_iter):
    """Yields each entry of metrics.jsonl with the training seconds before it, from the last measured speed, or the first one
    before any was measured."""
    speed = next((entry['tokens_per_s'] for entry in entries if 'tokens_per_s' in entry), math.inf)
    seconds, last = 0.0, 0
    for entry in entries:
        speed = entry.get('tokens_per_s', speed)
        seconds += (entry['iter'] - last) * per_iter / speed
        last = entry['iter']
        yield entry, seconds


# ---------------------------------------------------------------------------------------------------------------------
# numbers

def spread_of(values):
    """Mean and standard deviation over seeds, of those that are numbers; None where there is none. One has no deviation."""
    values = [v for v in values if v is not None and math.isfinite(v)]
    if not values:
        return None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def value_at(points, x):
    """The value at x between points [(x, value)], interpolated linearly; None outside of them: nothing is extrapolated."""
    if not points or not points[0][0] <= x <= points[-1][0]:
        return None
    return float(np.interp(x, *zip(*points)))


def has_loss(run):
    """Whether what val_loss measures is a loss of text, or a bound of it."""
    return not {'loss', 'bound'}.isdisjoint(run['evaluation']['likelihood'])


def add_losses_at_equal_seconds(runs):
    """Gives each run the validation loss that its curve has after as many seconds of training as the fastest of these runs
    took in all; returns those seconds, None where no run has a loss.

    The seconds are the tokens between two lines of the log divided by the speed that was measured there. Between two
    evaluations the loss is interpolated linearly. That of the initial weights is left out, so a run whose first evaluation
    comes later has None. In the middle of a run the learning rate has not fallen yet: a shorter run might end lower."""
    runs = [run for run in runs if has_loss(run)]
    seconds = min((run['seconds'] for run in runs), default=None)
    for run in runs:
        run['loss_at_equal_seconds'] = value_at(curve(run, 'val_loss', 'seconds'), seconds)
    return seconds


def numbers_of(run):
    """{column: number} of one run; missing where its type has none."""
    likely, quality = run['evaluation']['likelihood'], run['evaluation']['quality']
    n, p = run['evaluation']['asked']['samples'], quality.get('classifier')
    likely = likely | {'loss': likely.get('bound', likely.get('loss')), 'stderr': likely.get('nelbo_stderr'),
                       'trained': run['speed'], 'loss_at_equal_seconds': run.get('loss_at_equal_seconds')}
    if p is not None:
        quality = quality | {'classifier_stderr': classifier_stderr(p, n)}
    return {'likelihood': likely, 'quality': quality}


def shown(pair, bound=False):
    """A mean and the spread of its seeds as they are written, with no digits that mean nothing: those of the spread's first
    two, three decimals at most; where there is no spread, three significant digits, two decimals at most."""
    value, spread = pair
    if spread:
        last = min(3, 1 - math.floor(math.log10(spread)))
    else:
        last = 0 if value == round(value) else min(2, 2 - math.floor(math.log10(abs(value))))
    numbers = [f'{round(x, last):,.{max(0, last)}f}' for x in pair if x is not None and (x or x is value)]
    return '≤ ' * bound + ' ± '.join(numbers)


def classifier_stderr(p, n):
    """The standard error of a classifier's accuracy p on n samples and as many texts, not 0 where all are right (Agresti
    and Coull 1998)."""
    p = (2 * n * p + 2) / (2 * n + 4)
    return math.sqrt(p * (1 - p) / (2 * n + 4))


def row_of(name, runs):
    """The means over seeds of one variant: {column: (mean, deviation) or None} in two parts."""
    numbers = [numbers_of(run) for run in runs]
    parts = {part: {key: spread_of([of_run[part].get(key) for of_run in numbers]) for key in columns}
             for part, columns in (('likelihood', LIKELIHOOD), ('quality', QUALITY))}
    return {'variant': name, 'bound': 'bound' in runs[0]['evaluation']['likelihood']} | parts


# ---------------------------------------------------------------------------------------------------------------------
# what follows

def apart(a, b):
    """Whether two (mean, deviation) differ beyond their seeds; None where one of them has a single seed."""
    return None if None in (a[1], b[1]) else abs(a[0] - b[0]) > BEYOND * math.hypot(a[1], b[1])


def verdict(row, base, part, key):
    """Which of VERDICTS the numbers of a row deserve, compared with those of the row `base`."""
    mine, its = row[part][key], base[part][key]
    differs = apart(mine, its)
    if differs is None:
        return SINGLE
    if differs and mine[0] < its[0]:
        return LOWER
    if part == 'likelihood' and row['bound'] and not base['bound']:
        return OPEN  # the loss itself may be lower
    return HIGHER if differs else ALIKE


def conclusions(rows):
    """Sentences on which variants differ from the baseline: gpt2, or else the first variant whose loss is no bound."""
    sentences = []
    for part, key in COMPARED:
        have = [row for row in rows if row[part][key]]
        if len(have) < 2:
            continue
        base = min(have, key=lambda row: (row['variant'] != 'gpt2', row['bound']))
        told = {words: [] for words in VERDICTS}
        for row in have:
            if row is not base:
                words, by = verdict(row, base, part, key), abs(row[part][key][0] - base[part][key][0])
                told[words].append(row['variant'] + (f' (by {shown((by, None))})' if words in (LOWER, HIGHER) else ''))
        of_bounds = part == 'likelihood' and base['bound']  # the baseline is a bound only where all are
        its, measure = shown(base[part][key], of_bounds), ('the bound on the ' if of_bounds else '') + SUMMARY[part, key]
        verdicts = '; '.join(f'{words}: {", ".join(names)}' for words, names in told.items() if names)
        sentences.append(f'{measure[0].upper()}{measure[1:]}, compared with {base["variant"]} ({its}): {verdicts}.')
    if sentences and not any(row[part][key] and row[part][key][1] is not None for row in rows for part, key in COMPARED):
        return ['Each variant has a single seed: nothing can be concluded from the differences between them.']
    return sentences or ['There is nothing to compare.']


def hours(runs):
    return round(sum(run['seconds'] for run in runs) / 3600, 3)


def machine_facts(runs):
    """Where and by what the runs were made."""
    def every(key):
        return ', '.join(sorted({str(run['settings'].get(key)) for run in runs}))
    device = every('device_used')
    if device.startswith('cuda') and torch.cuda.is_available():
        device += f' ({torch.cuda.get_device_name()})'
    return {'machine': f'{platform.machine()}, {cores()} CPUs, {platform.system()}', 'device': device,
            'ranks': every('world_size'), 'threads': every('threads'), 'dtype': every('dtype_used'),
            'torch': every('torch'), 'commit of the runs': every('commit'), 'commit of the report': checkpoint.commit()}


# ---------------------------------------------------------------------------------------------------------------------
# pictures

def picture(title, x, y, draw):
    """-> the addresses of two SVGs in the page itself, for light and for dark, and what they show in words; `draw(axes)`
    puts the data in."""
    inked = ('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color', 'grid.color')
    with plt.rc_context({key: INK[0] for key in inked}):
        fig, axes = plt.subplots(figsize=(6.8, 4), constrained_layout=True)
        draw(axes)
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.2)
        names = axes.get_legend_handles_labels()[1]
        axes.legend(fontsize=9, loc='center left', bbox_to_anchor=(1, 0.5), framealpha=0)
        out = io.BytesIO()
        fig.savefig(out, format='svg', transparent=True)
    plt.close(fig)
    both = [out.getvalue().replace(INK[0].encode(), ink.encode()) for ink in INK]
    addresses = ['data:image/svg+xml;base64,' + base64.b64encode(svg).decode() for svg in both]
    return *addresses, f'{title}: {y} against {x}, of {", ".join(names)}'


def figure(path, title, x, y, draw):
    """Writes one labelled picture to a file; `draw(axes)` puts the data in."""
    fig, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    draw(axes)
    axes.set(title=title, xlabel=x, ylabel=y)
    if x == 'layers':
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    print(path)


def look(number):
    """How the variant with this number is drawn, in all pictures."""
    return {'color': COLOURS[number % 10], 'marker': MARKERS[number // 10 % 3], 'markersize': 5}


def reliability(axes, named):
    """named: {name: (bins, ECE)}, bins as metrics.Calibration gives them."""
    axes.plot([0, 1], [0, 1], color='gray', linestyle='--', label='calibrated')
    for number, (name, (bins, ece)) in enumerate(named.items()):
        points = [(confidence, accuracy) for n, confidence, accuracy in bins if n]
        if points:
            axes.plot(*zip(*points), **look(number), label=f'{name} (ECE {ece:.3f})')


def curve(run, key, against):
    """Points of a run's evaluations: tokens or seconds of training, and the value. The value of the initial weights is left
    out, because it would squeeze all others together."""
    per_iter = run['tokens_per_iter']
    return [(entry['iter'] * per_iter if against == 'tokens' else seconds, entry[key])
            for entry, seconds in with_seconds(run['entries'], per_iter) if entry.get(key) is not None and entry['iter']]


def band(runs, key, against):
    """Points (x, mean, least, greatest) over the seeds of a variant, at each of their evaluations."""
    for points in zip(*(curve(run, key, against) for run in runs)):
        xs, values = zip(*points)
        yield statistics.mean(xs), statistics.mean(values), min(values), max(values)


def draw_curves(axes, variants, names, key, against):
    """A line for the mean of each of these variants, dashed where it is a bound, in the band of its seeds."""
    for number, (name, runs) in enumerate(variants.items()):
        points = list(band(runs, key, against)) if name in names else []
        if points:
            x, mean, least, greatest = zip(*points)
            bound = key == 'val_loss' and 'bound' in runs[0]['evaluation']['likelihood']
            axes.plot(x, mean, linestyle='--' if bound else '-', linewidth=1.2, label='≤ ' * bound + name, **look(number))
            axes.fill_between(x, least, greatest, color=COLOURS[number % 10], alpha=0.2, linewidth=0)


def draw_scatter(axes, rows):
    for number, row in enumerate(rows):
        speed, classifier = row['quality']['tokens_per_s'], row['quality']['classifier']
        if speed and classifier:
            axes.plot(speed[0], classifier[0], linestyle='', label=row['variant'], **look(number) | {'markersize': 9})
    axes.set_xscale('log')


def pictures(variants, rows):
    first = {name: runs[0]['evaluation']['likelihood'] for name, runs in variants.items()}
    likely = [name for name, runs in variants.items() if has_loss(runs[0])]
    exact = [name for name in likely if 'loss' in first[name]]
    drawn = []
    for key, title, y, names in (('val_loss', 'Validation loss', 'nats per token', likely),
                                 ('val_accuracy', 'Next-token accuracy', 'share of positions', exact)):
        for against in ('tokens', 'seconds') if names else ():
            drawn.append(picture(title, f'{against} of training', y, lambda axes, key=key, names=names, against=against:
                                 draw_curves(axes, variants, names, key, against)))
    if any('bins' in numbers for numbers in first.values()):
        bins = {name: (numbers.get('bins', []), numbers.get('ece')) for name, numbers in first.items()}
        drawn.append(picture('Reliability of the first seed', 'confidence', 'accuracy',
                             lambda axes: reliability(axes, bins)))
    if any(row['quality']['classifier'] for row in rows):
        drawn.append(picture('Speed and quality of sampling', 'tokens per second',
                             'accuracy of the classifier, 0.5 is perfect', lambda axes: draw_scatter(axes, rows)))
    return drawn


# ---------------------------------------------------------------------------------------------------------------------
# the page

def write(out_dir, facts, variants, helpers, tuning, tries):
    """Writes results.json and report.html; returns the page's path and the rows.

    variants: {name: runs, as `collect` gives them, each with its 'evaluation'}; helpers: judge and encoder; tuning:
    {name: the learning rates that were tried}; tries: the runs that tried them."""
    compared = [run for runs in variants.values() for run in runs]
    seconds = add_losses_at_equal_seconds(compared)
    rows = [row_of(name, runs) for name, runs in variants.items()]
    others = next((run['evaluation']['others'] for run in compared if 'others' in run['evaluation']), {})
    n = facts['samples of each run']
    others = {name: row | {'classifier_stderr': classifier_stderr(row['classifier'], n)} for name, row in others.items()}
    facts = facts | {'equal seconds': seconds and round(seconds, 1), 'hours of training': hours(compared),
                     'hours of tuning': hours(tries), 'hours of judge and encoder': hours(helpers),
                     'hours of evaluation': hours([run['evaluation'] for run in compared])}
    facts |= machine_facts(compared + helpers)
    commands = {os.path.basename(run['settings']['out_dir']): {'command': run['command'],
                                                               'commit': run['settings']['commit']}
                for run in helpers + tries + compared}
    results = {'facts': facts, 'rows': rows, 'others': others, 'tuning': tuning, 'commands': commands}
    write_whole(os.path.join(out_dir, 'results.json'), json.dumps(results, indent=1))
    with open(os.path.join(HERE, 'report.html'), encoding='utf-8') as f:
        template = jinja2.Template(f.read(), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    texts = {name: runs[0]['evaluation']['texts'] for name, runs in variants.items()}
    path = os.path.join(out_dir, 'report.html')
    summary = {column: title for column, title in SUMMARY.items() if any(row[column[0]][column[1]] for row in rows)}
    write_whole(path, template.render(results, conclusions=conclusions(rows), pictures=pictures(variants, rows), texts=texts,
                                      samples=n, summary=summary, likelihood=LIKELIHOOD, quality=QUALITY, shown=shown,
                                      beyond=BEYOND, paper=PAPER, ink=INK))
    return path, rows
