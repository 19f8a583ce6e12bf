"""
A picture of the README: one canvas at five steps of refinement.

    python -m experiments.refinement_figure --out_dir=out-diffusion --start="Once upon a time"

The text is what a masked diffusion checkpoint writes, unedited.
"""
from dataclasses import dataclass

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from rich.cells import cell_len

from generate_diffusion import GenerateConfig, first_canvas, refine_batch
from model import load_model
from nanodrift.huggingface import open_run
from nanodrift.options import configure, option, run
from nanodrift.player import OPEN, Recording, cells, lines_of, visible
from nanodrift.refinement import RefineConfig
from nanodrift.tokenizer import tokenizer_from_meta

COLUMNS, SHOWN = 68, 5  # characters of a line, steps
INK, FAINT = '#22252a', '#8a8f98'


@dataclass
class FigureConfig:
    """Which model writes what."""
    out_dir: str = option('out-diffusion', 'folder of a masked diffusion run')
    start: str = option('Once upon a time', 'how its text begins')
    seed: int = option(1, 'of the text')
    figure: str = option('docs/refinement.png', 'where the picture goes')


def draw_canvas(axes, recording):
    """Five frames of a Recording under each other: given text bold, committed tokens on a colour that says how confident
    the model was, tokens that were opened again underlined, open positions as dots."""
    widths, last = cells(recording), len(recording.frames) - 1
    lines = lines_of(widths, COLUMNS)
    y, colours = 0.0, matplotlib.colormaps['RdYlGn']
    for number in sorted({round(last * i / (SHOWN - 1)) for i in range(SHOWN)}):
        frame = recording.frames[number]
        axes.text(0, y, f'step {number} of {last}', fontsize=8, color=FAINT, va='center')
        y += 1.05
        for line in lines:
            x = 0
            for n in line:
                token, confidence, revised = frame[n]
                shown = OPEN if token is None else visible(token)
                if token is not None and not recording.fixed[n]:
                    axes.add_patch(plt.Rectangle((x, y - 0.45), cell_len(shown), 0.9, color=colours(0.15 + 0.7 * confidence),
                                                 alpha=0.45, linewidth=0))
                if revised and token is not None:
                    axes.plot([x, x + cell_len(shown)], [y + 0.42] * 2, color=INK, linewidth=1.1)
                for i, character in enumerate(shown):
                    axes.text(x + i + 0.5, y, character, family='monospace', fontsize=10.5, ha='center', va='center',
                              color=FAINT if token is None else INK, weight='bold' if recording.fixed[n] else 'normal')
                x += widths[n]
            y += 1
        y += 0.5
    axes.text(0, y, 'bold: given; colour: confidence, from red to green; underlined: opened again at some step', fontsize=8,
              color=FAINT, va='center')
    axes.set(xlim=(0, COLUMNS), ylim=(y + 0.5, -0.7))
    axes.axis('off')


def main(argv):
    config, refine_config, _ = configure(argv, FigureConfig, RefineConfig, description=__doc__)
    state = open_run(config.out_dir)
    model, tokenizer = load_model(state), tokenizer_from_meta(state['tokenizer'])
    canvas = first_canvas(GenerateConfig(start=config.start), tokenizer, model.config)
    recording = Recording.of(refine_batch(model, canvas, 1, refine_config, config.seed), tokenizer, model.config.vocab_size)
    print(''.join(token for token, _, _ in recording.frames[-1]), f'({recording.passes[-1]} forward passes)', sep='\n')
    figure, axes = plt.subplots(figsize=(7.5, 5.6), constrained_layout=True)
    draw_canvas(axes, recording)
    figure.savefig(config.figure, dpi=110)
    print(config.figure)


if __name__ == '__main__':
    run(main)
