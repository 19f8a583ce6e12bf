"""
The picture of docs/masked_diffusion.md: the loss against the tokens of a block, and samples against tokens per second.

    python -m experiments.block_figures --figure=docs/blocks.png

It draws docs/blocks.json, which says where its numbers come from.
"""
import json
import os
from dataclasses import dataclass

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from nanodrift.options import configure, option, run

HERE = os.path.dirname(os.path.abspath(__file__))
COLOURS = {'gpt2': '#22252a', 'blocks': '#2f6f8f', 'one canvas': '#b5562b', 'drifting': '#6b8e23'}


@dataclass
class FigureConfig:
    """Where the picture goes."""
    figure: str = option('docs/blocks.png', 'the picture, a PNG file')


def draw_losses(axes, losses):
    """losses: {layout: {tokens of a block: losses of the seeds}}, 'gpt2' among the layouts with no such number."""
    for value in losses['gpt2']:
        axes.axhline(value, color=COLOURS['gpt2'], linewidth=1)
    axes.annotate('gpt2', (1, min(losses['gpt2'])), xytext=(0, 4), textcoords='offset points', fontsize=9)
    for (layout, rows), marker in zip(((k, v) for k, v in losses.items() if k != 'gpt2'), 'os'):
        pairs = [(int(size), value) for size, seeds in rows.items() for value in seeds]
        exact = [pair for pair in pairs if pair[0] == 1]
        bounds = [pair for pair in pairs if pair[0] > 1]
        axes.scatter(*zip(*bounds), marker=marker, facecolors='white', edgecolors=COLOURS['blocks'], label=layout, zorder=3)
        if exact:
            axes.scatter(*zip(*exact), marker=marker, color=COLOURS['blocks'], zorder=3)
    axes.set_xscale('log', base=2)
    axes.set(xlabel='tokens in a block; 64 is one canvas', ylabel='validation loss, nats per token',
             title='loss (hollow: an upper bound)')
    axes.xaxis.set_major_formatter('{x:.0f}')
    axes.legend(frameon=False, fontsize=9)


def draw_samples(axes, rows):
    """rows: {name: {'kind', 'classifier', 'tokens_per_s'}}; the kinds are those of COLOURS."""
    for kind, colour in COLOURS.items():
        mine = sorted((row['tokens_per_s'], row['classifier'], name) for name, row in rows.items() if row['kind'] == kind)
        if mine:
            speeds, accuracies, names = zip(*mine)
            axes.plot(speeds, accuracies, marker='o', linestyle=':', color=colour, label=kind)
            for at in zip(names, speeds, accuracies):
                axes.annotate(at[0], at[1:], xytext=(5, 5), textcoords='offset points', fontsize=8, color=colour)
    axes.axhline(0.5, color=COLOURS['gpt2'], linewidth=0.8, linestyle='--')
    axes.set_xscale('log')
    axes.margins(x=0.25)
    axes.set(xlabel='tokens per second, one sample at a time', ylabel='samples told from text; 0.5 is perfect',
             title='quality and speed')
    axes.legend(frameon=False, fontsize=9)


def main(argv):
    config, _ = configure(argv, FigureConfig, description=__doc__)
    with open(os.path.join(HERE, '..', 'docs', 'blocks.json'), encoding='utf-8') as f:
        numbers = json.load(f)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    draw_losses(left, numbers['loss'])
    draw_samples(right, numbers['samples'])
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(config.figure, dpi=110)
    print(config.figure)


if __name__ == '__main__':
    run(main)
