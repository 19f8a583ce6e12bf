"""The figures of several runs."""
import os
from functools import partial

import pytest
from test_train_diffusion_attention import run_experiment

import train
from experiments import plot_results
from nanodrift.options import UserError
from nanodrift.report import plt


@pytest.fixture
def drawn(monkeypatch):
    """{file name: the axes that were saved in it}"""
    found, real = {}, plt.Figure.savefig
    monkeypatch.setattr(plt.Figure, 'savefig', lambda fig, path, **k: (found.update({os.path.basename(path): fig.axes[0]}),
                                                                       real(fig, path, **k)))
    return found


@pytest.mark.slow
def test_the_figures(data_dir, tiny, tmp_path, drawn):
    go = partial(run_experiment, tmp_path, data_dir)
    folders = [go(name='standard'), go('--model=diffusion_fixed', '--n_layers=1', name='heat'),
               go('--model=diffusion_adaptive', name='adaptive')]
    out = tmp_path / 'figures'
    plot_results.main([*map(str, folders), f'--out={out}'])
    names = {p.name for p in out.iterdir()}
    assert names == {f'{n}.png' for n in ('loss', 'accuracy', 'perplexity', 'dynamics', 'trade_off', 'reliability', 'depth',
                                          'time_law')}
    assert all((out / name).read_bytes().startswith(b'\x89PNG') for name in names)
    for name in ('loss', 'accuracy', 'perplexity', 'dynamics', 'trade_off'):
        axes = drawn[f'{name}.png']
        assert [line.get_label() for line in axes.lines] == ['standard', 'heat', 'adaptive'], name
        assert all(len(line.get_xdata()) == (2 if name == 'trade_off' else 3) for line in axes.lines), name
    ece = [plot_results.Run(str(folder)).last('val_ece') for folder in folders]
    assert [line.get_ydata()[-1] for line in drawn['dynamics.png'].lines] == ece
    assert len(drawn['reliability.png'].lines) == 4 and len(drawn['depth.png'].containers) == 3
    labels = drawn['time_law.png'].get_legend_handles_labels()[1]
    assert labels == ['0.28 * sqrt(4 / L)', 'adaptive, each layer', 'fixed t of the lowest ECE']
    config, model_config = tiny(out_dir='plain')
    train.train(config, model_config)
    plot_results.main([str(folders[0]), f'{config.out_dir}/metrics.jsonl', f'--out={tmp_path}/more'])
    assert [line.get_label() for line in drawn['perplexity.png'].lines] == ['standard', 'plain']
    for wrong in ([], [str(tmp_path)]):
        with pytest.raises(UserError, match='folder'):
            plot_results.main(wrong)
