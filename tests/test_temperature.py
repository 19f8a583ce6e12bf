"""Temperature scaling: the fitted temperature is the best one, on one half of a text, and measured on the other."""
import json

import pytest
import torch
from conftest import pseudo_text
from test_train_diffusion_attention import run_experiment

import prepare
from experiments import temperature
from model import GPT, GPTConfig
from nanodrift.kernels import IGNORE
from nanodrift.options import UserError


def slow_loss(logits, targets, divisor):
    """Mean cross entropy over the counted positions, in float64."""
    losses = [(row / divisor).log_softmax(-1)[t].neg().item() for row, t in zip(logits.double(), targets) if t != IGNORE]
    return sum(losses) / len(losses)


def test_the_fitted_temperature_is_the_best_one():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=12, n_layer=1, n_head=1, n_embd=8)).eval()
    batches = []
    for factor in (3.0, 6.0):  # hidden states whose logits are too sure of themselves
        x = torch.randn(5, 8, 8) * factor * 20
        y = torch.distributions.Categorical(logits=model.head(x).detach() / 4).sample()
        y[0, :3] = IGNORE
        batches.append((x, y))
    found = temperature.fit_temperature(model, batches)
    logits = torch.cat([model.head(x).detach().flatten(0, 1) for x, _ in batches])
    targets = torch.cat([y.flatten() for _, y in batches])
    best = min((1 + i / 50 for i in range(300)), key=lambda t: slow_loss(logits, targets, t))
    assert found == pytest.approx(best, abs=0.03) and 2.5 < found < 6
    assert temperature.score(model, batches, found)['loss'] == pytest.approx(slow_loss(logits, targets, found), rel=1e-5)


def test_a_checkpoint_is_scored_on_one_half_and_scaled_by_the_other(data_dir, tmp_path, capsys):
    folder = run_experiment(tmp_path, data_dir, '--max_iters=12', '--lr=1e-2')
    temperature.main([f'--out_dir={folder}', '--device=cpu', '--ckpt=last'])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found['temperature'] > 0 and found['temperature'] != 1
    assert found['as_it_is']['accuracy'] == found['scaled']['accuracy']  # no temperature changes the most likely token
    assert found['as_it_is']['ece'] != found['scaled']['ece']
    before = found['as_it_is']
    for batch in (1, 5, 64):  # the halves are of the windows, whatever the batches
        temperature.main([f'--out_dir={folder}', '--device=cpu', '--ckpt=last', f'--batch_size={batch}'])
        again = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert again['temperature'] == pytest.approx(found['temperature'], rel=1e-3)
    with pytest.raises(UserError, match='halved'):
        temperature.main([f'--out_dir={folder}', '--device=cpu', '--windows=1'])
    temperature.main([f'--out_dir={folder}', '--device=cpu', '--ckpt=last', '--ignore_text=e'])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['as_it_is']['loss'] > before['loss']
    (tmp_path / 'a.txt').write_text(pseudo_text(2000))
    prepare.main([f'--input={tmp_path}/a.txt', '--name=other', '--tokenizer=char', f'--data_dir={tmp_path}'])
    with pytest.raises(UserError, match='tokenizer'):
        temperature.main([f'--out_dir={folder}', f'--data={tmp_path}/other_char'])
