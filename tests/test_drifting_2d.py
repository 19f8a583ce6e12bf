"""drifting_2d.py: its measure, its data, and that the field moves points to where the data are."""
import json

import pytest
import torch

from experiments.drifting_2d import DATA, EVALUATED, PlaneConfig, main, measure, sliced_wasserstein, train
from nanodrift.options import UserError


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_distance_of_shifted_points_is_the_mean_projection_of_the_shift():
    x = DATA['moons'](500, rng())
    assert sliced_wasserstein(x, x[torch.randperm(500)], rng()) == pytest.approx(0, abs=1e-6)
    found = sliced_wasserstein(x, x + torch.tensor([3.0, 4.0]), rng())
    assert found == pytest.approx(5 * 2 / torch.pi, rel=0.1)  # mean |cos|, over 200 random directions


@pytest.mark.parametrize('name', DATA)
def test_a_second_sample_is_as_far_as_itself_and_noise_is_further(name):
    mine, floor, real = measure(DATA[name](1000, rng(1)), DATA[name], rng(2))
    assert mine / floor == pytest.approx(1, abs=0.5) and real.shape == (1000, 2)
    noise, _, _ = measure(torch.randn(1000, 2, generator=rng(1)), DATA[name], rng(2))
    assert noise > 2 * floor


def test_dark_squares_alone_have_points():
    corner = DATA['checkerboard'](2000, rng()).add(2).floor()
    assert ((corner.sum(1) % 2) == 0).all() and len(corner.unique(dim=0)) == 8


@pytest.mark.slow
def test_points_drift_to_the_data():
    shown = train(DATA['ring'], PlaneConfig(steps=150, batch_size=128, ema=0.9), seed=1)
    far = [measure(points, DATA['ring'], rng(3))[0] for points in shown]
    assert [len(points) for points in shown] == [EVALUATED] * 4
    assert far[-1] < far[0] / 3, far


@pytest.mark.slow
def test_the_figure_is_drawn_and_the_last_line_is_json(tmp_path, capsys):
    main(['--data=moons', '--seeds=1,2', '--steps=10', '--batch_size=16', f'--figure={tmp_path}/plane.png'])
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])['moons']) == 2
    assert (tmp_path / 'plane.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize('arg, word', [('--data=moon', 'checkerboard'), ('--seeds=1,x', 'seeds'), ('--steps=1', 'steps'),
                                       ('--figure=nowhere/x.png', 'nowhere'), ('--figure=x.xyz', 'png'),
                                       ('--seeds=²', 'seeds'), ('--seeds=99999999999', 'seeds'), ('--seeds=-1', 'seeds'),
                                       ('--batch_size=1', 'batch_size'), ('--ema=1', 'ema'),
                                       ('--learning_rate=nan', 'learning_rate')])
def test_mistakes_are_one_line(arg, word):
    with pytest.raises(UserError, match=word):
        main([arg])
