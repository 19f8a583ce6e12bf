"""
Drifting where it can be seen: one-step generators of points in the plane, and a figure of how they came about.

    python -m experiments.drifting_2d --figure=drifting_2d.png

The same field as for text (drifting.py), with the points themselves for features and no floor under the affinities, which
would drown in it where batches are as large as here. Each generator is measured by the sliced
Wasserstein distance of its points to points of the data, in units of that of a second sample of the data; both are means
over several samples of the data, since that of a single pair varies by a third.
"""
import copy
import json
import math
import os
from dataclasses import dataclass

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
import torch.nn as nn
from matplotlib.backend_bases import FigureCanvasBase

from nanodrift.data import Stream, derive_seed
from nanodrift.drifting import drift
from nanodrift.options import UserError, check_options, configure, one_of, option, run, split_numbers

EVALUATED, COMPARED = 4096, 10
DIRECTIONS = 200


@dataclass
class PlaneConfig:
    """What is learned, and how long."""
    data: str = option('moons,ring,checkerboard', 'which distributions, separated by commas')
    seeds: str = option('1,2,3', 'one generator for each', items=int, at_least=0, below=2 ** 32)
    steps: int = option(2000, 'iterations of training', at_least=10)
    batch_size: int = option(512, 'generated points of an iteration, and as many of the data', at_least=2)
    learning_rate: float = option(2e-3, 'highest learning rate; cosine to zero', above=0)
    ema: float = option(0.99, 'decay of the moving average that is measured', at_least=0, below=1)
    figure: str = option('drifting_2d.png', 'where the figure goes')

    def __post_init__(self):
        check_options(self)
        for name in self.data.split(','):
            one_of('data', name, DATA)
        if not os.path.isdir(os.path.dirname(self.figure) or '.'):
            raise UserError(f'figure={self.figure}: there is no such folder')
        kind = os.path.splitext(self.figure)[1][1:]
        if os.path.isdir(self.figure) or kind not in FigureCanvasBase.get_supported_filetypes():
            raise UserError(f'figure={self.figure} must be a file that ends in .png, .svg or .pdf')


def moons(n, rng):
    """Two interleaved half circles."""
    angle, lower = torch.rand(n, generator=rng) * math.pi, torch.rand(n, generator=rng) < 0.5
    x = torch.where(lower, 1 - angle.cos(), angle.cos())
    y = torch.where(lower, 0.5 - angle.sin(), angle.sin())
    return torch.stack((x, y), dim=1) + 0.05 * torch.randn(n, 2, generator=rng)


def ring(n, rng):
    """Eight Gaussians on a circle."""
    angle = torch.randint(8, (n,), generator=rng) * math.pi / 4
    return torch.stack((angle.cos(), angle.sin()), dim=1) * 2 + 0.1 * torch.randn(n, 2, generator=rng)


def checkerboard(n, rng):
    """The dark squares of a board of 4 x 4."""
    column, row = torch.randint(4, (n,), generator=rng), torch.randint(2, (n,), generator=rng)
    corner = torch.stack((column, 2 * row + column % 2), dim=1)
    return corner + torch.rand(n, 2, generator=rng) - 2.0


DATA = {'moons': moons, 'ring': ring, 'checkerboard': checkerboard}


class PointGenerator(nn.Module):
    """Noise (N, 2) -> points (N, 2), at first nearly the noise itself: from one spot no field spreads them."""

    def __init__(self, width=256):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, noise):
        return noise + self.layers(noise)


def sliced_wasserstein(x, y, rng):
    """Mean over random directions of the Wasserstein-1 distance of the projections of x and y (N, 2)."""
    angle = torch.rand(DIRECTIONS, generator=rng) * math.pi
    directions = torch.stack((angle.cos(), angle.sin()))  # (2, DIRECTIONS)
    return float(((x @ directions).sort(0).values - (y @ directions).sort(0).values).abs().mean())


def measure(points, sample, rng):
    """Mean distances of points (N, 2), and of as many of the data, from samples of the data -> both, one of the samples."""
    mine = floor = 0.0
    for _ in range(COMPARED):
        real, other = sample(len(points), rng), sample(len(points), rng)
        mine += sliced_wasserstein(points, real, rng) / COMPARED
        floor += sliced_wasserstein(other, real, rng) / COMPARED
    return mine, floor, real


def train(sample, config, seed):
    """-> points of the averaged generator: at the start, after a tenth, a third and all of the steps."""
    rng = torch.Generator().manual_seed(derive_seed(seed, Stream.POINTS))
    torch.manual_seed(seed)
    model = PointGenerator()
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    shown, noise = [], torch.randn(EVALUATED, 2, generator=rng)
    for step in range(config.steps + 1):
        if step in (0, config.steps // 10, config.steps // 3, config.steps):
            with torch.no_grad():
                shown.append(ema(noise))
        for group in optimizer.param_groups:
            group['lr'] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        x = model(torch.randn(config.batch_size, 2, generator=rng))
        targets, scale, _ = drift(x.detach()[None], sample(config.batch_size, rng)[None], floor=0.0)
        loss = (x / scale - targets[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    return shown


def main(argv):
    config, _ = configure(argv, PlaneConfig, description=__doc__)
    names, seeds = config.data.split(','), split_numbers(config.seeds)
    figure, axes = plt.subplots(len(names), 5, figsize=(15, 3.1 * len(names)), squeeze=False)
    results = {}
    for row, name in zip(axes, names):
        ratios = []
        for seed in seeds:
            shown = train(DATA[name], config, seed)
            rng = torch.Generator().manual_seed(derive_seed(seed, Stream.MEASURED_POINTS))
            mine, floor, real = measure(shown[-1], DATA[name], rng)
            ratios.append(mine / floor)
            print(f'{name}, seed {seed}: sliced Wasserstein distance {mine:.4f}, of a second sample {floor:.4f}', flush=True)
        results[name] = ratios
        titles = ('start', 'a tenth', 'a third', f'{config.steps} steps', 'data')
        (left, bottom), (right, top) = real.min(0).values - 0.5, real.max(0).values + 0.5
        for axis, title, points in zip(row, titles, [*shown, real]):
            axis.scatter(*points.T, s=1, linewidths=0, color='#222222' if title == 'data' else '#c2410c')
            axis.set(title=f'{name}: {title}', xticks=[], yticks=[], aspect='equal', xlim=(left, right), ylim=(bottom, top))
    print(json.dumps(results), flush=True)
    figure.tight_layout()
    figure.savefig(config.figure, dpi=110)


if __name__ == '__main__':
    run(main)
