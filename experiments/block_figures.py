"""
The pictures of docs/masked_diffusion.md: the loss against the tokens of a block, and samples against tokens per second.

    python -m experiments.block_figures --folder=docs

It draws docs/blocks.json, which says where its numbers come from.
"""
import json
import os
from dataclasses import dataclass

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from nanodrift.options import configure, option, run

HERE = os.path.dirname(os.path.abspath(__file__))
INK = '#22252a'
COLOURS = {'gpt2': INK, 'gpt2 with drafts': '#7a5195', 'blocks': '#2f6f8f', 'one canvas': '#b5562b', 'drifting': '#6b8e23'}


@dataclass
class FigureConfig:
    """Where the pictures go."""
    folder: str = option('docs', 'a folder, for block_loss.png and block_samples.png')


def draw_losses(axes, losses):
    """losses: {model: losses of its seeds}, or for block diffusion {layout: {tokens of a block: losses of the seeds}}."""
    for (name, values), style in zip(((k, v) for k, v in losses.items() if isinstance(v, list)), ('-', '--')):
        axes.axhline(sum(values) / len(values), color=INK, linewidth=1, linestyle=style, label=name)
    layouts = {name: rows for name, rows in losses.items() if isinstance(rows, dict)}
    for (name, rows), marker in zip(layouts.items(), 'osD^'):
        points = [(int(size), value) for size, seeds in rows.items() for value in seeds]
        for exact in (True, False):
            shown = [point for point in points if (point[0] == 1) == exact]
            if shown:
                axes.scatter(*zip(*shown), marker=marker, facecolors=COLOURS['blocks'] if exact else 'white',
                             edgecolors=COLOURS['blocks'], zorder=3, label=None if exact else name)
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:.0f}')
    axes.set(xlabel='tokens of a block; 64 is one canvas', ylabel='validation loss, nats per token; hollow: an upper bound')


def draw_samples(axes, rows):
    """rows: {label: {'kind', 'classifier', 'tokens_per_s'}}; the kinds are those of COLOURS."""
    for kind, colour in COLOURS.items():
        mine = {label: row for label, row in rows.items() if row['kind'] == kind}
        points = sorted((row['tokens_per_s'], row['classifier'], label) for label, row in mine.items())
        if points:
            speeds, accuracies, labels = zip(*points)
            axes.plot(speeds, accuracies, marker='o', linestyle=':', color=colour, label=kind)
            for label, *at in zip(labels, speeds, accuracies) if len(points) > 1 else ():  # one alone is in the legend
                axes.annotate(label, at, xytext=(6, 5), textcoords='offset points', fontsize=8, color=colour)
    axes.axhline(0.5, color=INK, linewidth=0.8, linestyle='--')
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter('{x:.0f}')
    axes.xaxis.set_minor_formatter('')
    axes.margins(x=0.2)
    axes.set(xlabel='tokens per second', ylabel='samples told from text; 0.5 is perfect')


def main(argv):
    config, _ = configure(argv, FigureConfig, description=__doc__)
    with open(os.path.join(HERE, '..', 'docs', 'blocks.json'), encoding='utf-8') as f:
        numbers = json.load(f)
    for name, draw in (('loss', draw_losses), ('samples', draw_samples)):
        figure, axes = plt.subplots(figsize=(7, 4.4), constrained_layout=True)
        draw(axes, numbers[name])
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        path = os.path.join(config.folder, f'block_{name}.png')
        figure.savefig(path, dpi=110)
        print(path)


if __name__ == '__main__':
    run(main)
