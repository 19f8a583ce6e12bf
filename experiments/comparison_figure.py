"""
A picture of the README: the validation loss of each variant of a comparison.

    python -m experiments.comparison_figure --results=docs/comparison_python.json

It draws the results.json that compare.py writes; each says where its numbers come from.
"""
from dataclasses import dataclass

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from nanodrift.options import UserError, configure, option, run
from nanodrift.runs import read_object

INK, FAINT, MARK = '#22252a', '#8a8f98', '#2f6f8f'


@dataclass
class FigureConfig:
    """Which comparison is drawn."""
    results: str = option('docs/comparison_python.json', 'results.json of compare.py')
    figure: str = option('docs/losses.png', 'where the picture goes')


def draw_losses(axes, rows):
    """A line for each of the rows of results.json, lowest loss first: mean and standard deviation over seeds; a hollow mark
    is an upper bound."""
    losses = sorted(((row['likelihood']['loss'], row) for row in rows), key=lambda pair: (pair[0] is None, pair[0]))
    right = max(loss[0] for loss, _ in losses if loss)
    for y, (loss, row) in enumerate(losses):
        if loss is None:
            axes.text(right, y, 'no likelihood', ha='right', va='center', fontsize=9, color=FAINT)
            continue
        mean, spread = loss
        axes.errorbar(mean, y, xerr=spread, marker='o', markersize=6, capsize=3, color=MARK,
                      markerfacecolor='white' if row['bound'] else MARK)
        axes.annotate('≤ ' * row['bound'] + f'{mean:.2f}', (mean, y), xytext=(0, 8), textcoords='offset points', ha='center',
                      fontsize=8, color=INK)
    axes.set_yticks(range(len(losses)), [row['variant'] for _, row in losses])
    axes.set(ylim=(len(losses) - 0.5, -0.8), xlabel='validation loss, nats per token')


def main(argv):
    config, _ = configure(argv, FigureConfig, description=__doc__)
    results = read_object(config.results)
    if not any(row['likelihood']['loss'] for row in results.get('rows', ())):
        raise UserError(f'--results={config.results} has no losses; name the results.json of a comparison by compare.py')
    figure, axes = plt.subplots(figsize=(6, 5.6), constrained_layout=True)
    draw_losses(axes, results['rows'])
    axes.set_title(f"{results['facts']['budget']}, seeds {results['facts']['seeds']}", fontsize=10)
    axes.grid(axis='x', alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(config.figure, dpi=110)
    print(config.figure)


if __name__ == '__main__':
    run(main)
