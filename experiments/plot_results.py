"""
Figures of one or several runs, from their metrics.jsonl.

    python -m experiments.plot_results logs/standard logs/heat --out=figures
    python -m experiments.plot_results out-compare-* --out=figures

Draws what the runs have measured: loss, accuracy and perplexity against steps; and of runs of train_diffusion_attention.py
the training dynamics of calibration, the trade-off between perplexity and calibration, reliability diagrams, and, where the
depths differ, calibration and the learned diffusion time against depth, with the law t = 0.28 * sqrt(4 / L).
"""
import json
import os
from dataclasses import dataclass

from model import GPTConfig
from nanodrift.metrics import perplexity
from nanodrift.options import UserError, configure, option, run
from nanodrift.report import figure, reliability


@dataclass
class PlotConfig:
    """Where the figures go."""
    out: str = option('figures', 'folder for the PNG files')


class Run:
    """The evaluations of one run: lists by name, and its settings, where there is a config.json."""

    def __init__(self, path):
        folder = os.path.dirname(os.path.abspath(path)) if os.path.isfile(path) else path
        self.name, self.config = os.path.basename(os.path.normpath(folder)), {}
        try:
            with open(path if os.path.isfile(path) else os.path.join(path, 'metrics.jsonl'), encoding='utf-8') as f:
                entries = [json.loads(line) for line in f]
            if os.path.exists(os.path.join(folder, 'config.json')):
                with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
                    self.config = json.load(f)
            self.evaluations = [entry for entry in entries if entry.get('val_loss') is not None]
        except (OSError, json.JSONDecodeError, AttributeError) as e:
            raise UserError(f'{path} is neither the folder of a run nor its metrics.jsonl: {e}') from None
        if not self.evaluations:
            raise UserError(f'{path} holds no evaluation yet')
        for entry in self.evaluations:
            if 'val_nelbo_stderr' not in entry and 'val_collapsed' not in entry:  # there val_loss is no cross entropy
                entry.setdefault('val_perplexity', perplexity(entry['val_loss']))

    def curve(self, name):
        """Iterations and values of one metric, where it was measured."""
        pairs = [(e['iter'], e[name]) for e in self.evaluations if e.get(name) is not None]
        return [p[0] for p in pairs], [p[1] for p in pairs]

    def last(self, name):
        return self.evaluations[-1].get(name)

    def kind(self):
        """What sets of runs are grouped by: the model type and its time."""
        c = self.config
        return c['model_type'] + (f" t={c['heat_t']}" if c['model_type'] == 'heat' else '')

    @property
    def layers(self):
        return self.config.get('n_layer')


def curves(runs, name):
    def draw(axes):
        for r in runs:
            axes.plot(*r.curve(name), marker='.', label=r.name)
    return draw


def trade_off(axes, runs):
    for r in runs:
        pairs = [(e['val_perplexity'], e['val_ece']) for e in r.evaluations if e.get('val_ece') is not None and e['iter']]
        axes.plot(*zip(*pairs), marker='o', markersize=3, label=r.name)
    axes.set_xscale('log')


def by_kind_and_depth(runs):
    """{(kind, layers): the ECE of each of its seeds}"""
    groups = {}
    for r in runs:
        groups.setdefault((r.kind(), r.layers), []).append(r.last('val_ece'))
    return groups


def against_depth(axes, runs):
    """Mean over the seeds, with the least and the greatest."""
    groups = by_kind_and_depth(runs)
    for kind in sorted({kind for kind, _ in groups}):
        depths = sorted(depth for k, depth in groups if k == kind)
        seeds = [groups[kind, depth] for depth in depths]
        means = [sum(s) / len(s) for s in seeds]
        spread = [[m - min(s) for m, s in zip(means, seeds)], [max(s) - m for m, s in zip(means, seeds)]]
        axes.errorbar(depths, means, yerr=spread, marker='o', capsize=3, label=kind)


def time_law(axes, runs):
    depths = range(2, 1 + max(4, *(r.layers for r in runs)))
    law = [GPTConfig(model_type='heat', n_layer=depth).heat_time() for depth in depths]
    axes.plot(depths, law, color='gray', linestyle='--', label='0.28 * sqrt(4 / L)')
    for r in runs:
        times = r.last('val_diffusion_times')
        if times:
            axes.scatter([r.layers] * len(times), times, s=12, label=f'{r.name}, each layer')
    best, words = {}, ('depth', 'adaptive')
    fixed = [r for r in runs if r.config['model_type'] == 'heat' and r.config['heat_t'] not in words]
    for (kind, depth), seeds in by_kind_and_depth(fixed).items():
        lowest = sum(seeds) / len(seeds), float(kind.rpartition('=')[2])
        best[depth] = min(best.get(depth, lowest), lowest)
    if best:
        axes.scatter(list(best), [t for _, t in best.values()], marker='*', s=80, label='fixed t of the lowest ECE')


def main(argv):
    positional = ('run', 'folders of runs, or their metrics.jsonl')
    config, folders = configure(argv, PlotConfig, description=__doc__, positional=positional)
    if not folders:
        raise UserError('name the folders of one or more runs')
    runs = [Run(folder) for folder in folders]
    try:
        os.makedirs(config.out, exist_ok=True)
    except OSError as e:
        raise UserError(f'out={config.out} cannot be made: {e.strerror}') from None

    def path(name):
        return os.path.join(config.out, f'{name}.png')

    figure(path('loss'), 'Validation loss', 'iteration', 'nats per token', curves(runs, 'val_loss'))
    figure(path('accuracy'), 'Next-token accuracy', 'iteration', 'share of positions', curves(runs, 'val_accuracy'))
    likely = [r for r in runs if r.last('val_perplexity') is not None]
    if likely:
        figure(path('perplexity'), 'Validation perplexity', 'iteration', 'perplexity', curves(likely, 'val_perplexity'))
    runs = [r for r in runs if r.last('val_ece') is not None]
    if not runs:
        return
    figure(path('dynamics'), 'Calibration during training', 'iteration', 'ECE, 15 bins', curves(runs, 'val_ece'))
    figure(path('trade_off'), 'Perplexity and calibration, one point per evaluation', 'perplexity', 'ECE, 15 bins',
           lambda axes: trade_off(axes, runs))
    figure(path('reliability'), 'Reliability at the end of training', 'confidence', 'accuracy',
           lambda axes: reliability(axes, {r.name: (r.last('val_bins'), r.last('val_ece')) for r in runs}))
    runs = [r for r in runs if r.layers]
    if len({r.layers for r in runs}) > 1:
        figure(path('depth'), 'Calibration against depth', 'layers', 'ECE, 15 bins', lambda axes: against_depth(axes, runs))
    if runs:
        figure(path('time_law'), 'Diffusion time against depth', 'layers', 't', lambda axes: time_law(axes, runs))


if __name__ == '__main__':
    run(main)
