"""nanodrift/report.py: no more digits than are known, conclusions by a rule, curves, seconds."""
import pytest

from nanodrift import report


@pytest.mark.parametrize('pair, written', [
    ((3.49871, 0.01694), '3.499 ± 0.017'), ((3.49871, 0.17), '3.50 ± 0.17'), ((3.49871, 0.00001), '3.499 ± 0.000'),
    ((3.49871, None), '3.50'), ((0.26712, None), '0.27'), ((63.0, 0.0), '63'), ((15.71, None), '15.7'), ((0, None), '0'),
    ((23362.4, None), '23,400'), ((23362.4, 812.3), '23,360 ± 810'), ((-0.5049, None), '-0.50')])
def test_numbers_have_no_more_digits_than_they_know(pair, written):
    assert report.shown(pair) == written and report.shown(pair, bound=True) == f'≤ {written}'


def row(name, loss, classifier=None, bound=False):
    return {'variant': name, 'bound': bound, 'likelihood': {'loss': loss, 'loss_at_equal_seconds': None},
            'quality': {'classifier': classifier}}


def test_conclusions_are_those_of_the_rule():
    rows = [row('heat', (3.485, 0.026)), row('gpt2', (3.499, 0.017), (0.606, 0.005)), row('rotating lr', (3.312, 0.023)),
            row('duo', (4.068, 0.045)), row('diffusion', (4.963, 0.067), (0.696, 0.012), bound=True),
            row('blocks', (3.2, 0.02), bound=True), row('drifting', None, (0.93, 0.003)), row('dd', (3.1, None))]
    loss, samples = report.conclusions(rows)
    assert loss == (
        'Validation loss, compared with gpt2 (3.499 ± 0.017): lower, beyond the seeds: rotating lr (by 0.19), blocks (by '
        '0.30); higher, beyond the seeds: duo (by 0.57); no difference beyond the seeds: heat; a bound that is not lower, '
        'so nothing follows: diffusion; a single seed, so nothing follows: dd.')
    assert 'told from text, compared with gpt2' in samples and 'higher, beyond the seeds: diffusion (by 0.09), dr' in samples
    two = [row('nelbo', (3.9, 0.02), bound=True), row('blocks', (3.5, 0.02), bound=True)]
    assert report.conclusions(two) == [
        'The bound on the validation loss, compared with nelbo (≤ 3.900 ± 0.020): lower, beyond the seeds: blocks '
        '(by 0.40).']
    single, = report.conclusions([row('gpt2', (3.5, None)), row('duo', (9.0, None), bound=True)])
    assert 'nothing can be concluded' in single
    assert report.conclusions(rows[:1]) == ['There is nothing to compare.']


@pytest.mark.parametrize('paper', report.PAPER)
def test_lines_are_seen_on_light_and_dark_paper(paper):
    """WCAG 2.1 asks of graphics a contrast of 3 to 1."""
    def luminance(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue
    for colour in report.COLOURS:
        darker, lighter = sorted((luminance(colour), luminance(paper)))
        assert (lighter + 0.05) / (darker + 0.05) >= 3


def test_seeds_are_a_band_and_bounds_are_dashed():
    def run(kind, *losses):
        entries = [{'iter': 10 * i, 'tokens_per_s': 100, 'val_loss': loss} for i, loss in enumerate((9.0, *losses))]
        return {'evaluation': {'likelihood': {kind: 0}}, 'entries': entries, 'tokens_per_iter': 10}
    variants = {'drifting': [run('js_2', 1.0)], 'gpt2': [run('loss', 4.0, 2.0), run('loss', 3.0, 3.0)],
                'diffusion': [run('bound', 5.0, 5.0)]}
    assert list(report.band(variants['gpt2'], 'val_loss', 'tokens')) == [(100, 3.5, 3.0, 4.0), (200, 2.5, 2.0, 3.0)]
    fig, axes = report.plt.subplots()
    report.draw_curves(axes, variants, ['gpt2', 'diffusion'], 'val_loss', 'seconds')
    report.plt.close(fig)
    assert [(line.get_label(), line.get_linestyle()) for line in axes.lines] == [('gpt2', '-'), ('≤ diffusion', '--')]
    assert axes.get_legend_handles_labels()[1] == ['gpt2', '≤ diffusion'] and len(axes.collections) == 2
    assert [line.get_color() for line in axes.lines] == list(report.COLOURS[1:3])  # as in the other pictures


def test_seconds_between_measurements():
    entries = [{'iter': 0}, {'iter': 10, 'tokens_per_s': 100}, {'iter': 15}, {'iter': 20, 'tokens_per_s': 50}, {'iter': 23}]
    assert [seconds for _, seconds in report.with_seconds(entries, 100)] == [0, 10, 15, 25, 31]


def test_values_between_points_are_interpolated_and_none_is_extrapolated():
    points = [(1, 4.0), (3, 2.0), (4, 2.0)]
    assert [report.value_at(points, x) for x in (0.9, 1, 2, 3.5, 4, 4.1)] == [None, 4.0, 3.0, 2.0, 2.0, None]
    assert report.value_at([(2, 1.0)], 2) == 1.0 and report.value_at([], 2) is None


def test_losses_at_equal_seconds_are_read_where_the_fastest_run_ends():
    def run(kind, speed):
        entries = [{'iter': 0, 'val_loss': 9.0}, {'iter': 10, 'tokens_per_s': speed}, {'iter': 10, 'val_loss': 4.0},
                   {'iter': 20, 'val_loss': 2.0}]
        return {'evaluation': {'likelihood': {kind: 0}}, 'entries': entries, 'tokens_per_iter': 100, 'seconds': 2000 / speed}
    runs = [run('loss', 100), run('bound', 75), run('js_2', 1000), run('loss', 40)]
    assert report.add_losses_at_equal_seconds(runs) == 20  # drifting has no loss, however fast it is
    assert [r.get('loss_at_equal_seconds') for r in runs] == [2.0, pytest.approx(3.0), None, None]
    assert report.add_losses_at_equal_seconds(runs[2:3]) is None
