"""The pictures of block diffusion."""
from matplotlib import pyplot as plt

from experiments import block_figures


def test_both_pictures_are_drawn(tmp_path):
    block_figures.main([f'--folder={tmp_path}'])
    assert all((tmp_path / f'block_{name}.png').stat().st_size > 1000 for name in ('loss', 'samples'))


def test_what_is_exact_is_filled_and_a_bound_is_hollow():
    axes = plt.figure().subplots()
    block_figures.draw_losses(axes, {'gpt2': [3.0, 3.2], 'blocks': {'1': [3.1], '4': [3.5, 3.6]}})
    exact, bounds = axes.collections
    assert exact.get_offsets().tolist() == [[1, 3.1]] and bounds.get_offsets().tolist() == [[4, 3.5], [4, 3.6]]
    assert exact.get_facecolors()[0][:3].tolist() != [1, 1, 1] == bounds.get_facecolors()[0][:3].tolist()
    assert axes.lines[0].get_ydata()[0] == 3.1
