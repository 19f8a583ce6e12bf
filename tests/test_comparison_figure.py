"""The picture of a comparison."""
import pytest
from matplotlib import pyplot as plt

from experiments import comparison_figure
from nanodrift.options import UserError

ROWS = [{'variant': name, 'bound': bound, 'likelihood': {'loss': loss}} for name, bound, loss in
        (('drifting', False, None), ('diffusion', True, [4.0, 0.1]), ('gpt2', False, [3.0, 0.2]), ('field', False, None))]


def test_the_lowest_loss_comes_first_and_a_bound_is_hollow():
    axes = plt.figure().subplots()
    comparison_figure.draw_losses(axes, ROWS)
    assert [label.get_text() for label in axes.get_yticklabels()] == ['gpt2', 'diffusion', 'drifting', 'field']
    assert [text.get_text() for text in axes.texts] == ['3.00', '≤ 4.00', 'no likelihood', 'no likelihood']
    exact, bound = (container.lines[0] for container in axes.containers)
    assert bound.get_markerfacecolor() == 'white' != exact.get_markerfacecolor()


def test_what_is_no_comparison_is_refused_and_ours_is_drawn(tmp_path):
    with pytest.raises(UserError, match='results.json'):
        comparison_figure.main([f'--results={tmp_path}/none.json'])
    comparison_figure.main([f'--figure={tmp_path}/losses.png'])
    assert (tmp_path / 'losses.png').stat().st_size > 1000
