"""What a run needs: what small models keep, counted and extrapolated, and the table."""
import json
from functools import partial

import pytest
import torch
from torch import nn

import bench
from model import GPT
from nanodrift import plan
from nanodrift.options import UserError
from nanodrift.variants import VARIANTS


def test_what_autograd_keeps():
    """Two products keep the input and what is between them; the ReLU keeps its own output, which is that."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with plan.Kept(model) as kept:
        model(torch.zeros(3, 4))
    assert kept.bytes == 4 * (3 * 4 + 3 * 8)


@pytest.mark.parametrize('name', ['gpt2', 'rotating gp', 'heat', 'duo', 'diffusion', 'diffusion blocks', 'drifting'])
@pytest.mark.parametrize('n_layer, n_head, n_embd, block_size', [
    (3, 2, 128, 64), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((6, 3, 192, 96), (2, 4, 256, 128)))])
def test_larger_models_keep_what_the_plan_says(name, n_layer, n_head, n_embd, block_size):
    """Within a tenth: of a step over 2 texts more, whatever does not grow with these."""
    changes = VARIANTS[name]
    per_token = plan.KeptPerToken.of(partial(bench.small_model, changes), 64, 64)
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size)
    c, encoder = bench.model_of(changes, **sizes, vocab_size=128)
    model = GPT(c, GPT(encoder).eval() if encoder else None)
    measured = plan.kept_bytes(model, 4) - plan.kept_bytes(model, 2)
    assert per_token.bytes(c, 2 * block_size) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize('name', ['gpt2', 'rotating lr', 'diffusion', 'drifting'])
def test_parameters_and_operations_are_those_of_the_model(monkeypatch, name):
    monkeypatch.setattr(plan, 'SIZES', {'tiny': (2, 2, 64)})
    found = bench.plan_row(VARIANTS[name], 'tiny', 1024)
    c, encoder = bench.model_of(VARIANTS[name], n_layer=2, n_head=2, n_embd=64)
    model = GPT(c, GPT(encoder).eval() if encoder else None)
    assert found['parameters'] == sum(p.numel() for p in model.parameters())
    if name != 'drifting':
        assert found['gflop_per_token'] == pytest.approx(model.flops_per_token() / 1e9)


def test_gpt2_at_124M_by_hand():
    found = bench.plan_row({}, '124M', 12 * 1024)
    assert found['state_gb'] == pytest.approx(18 * found['parameters'] / 1e9)
    assert found['parameters'] == pytest.approx(124.4e6, rel=0.001)
    assert found['exchange_ms_8'] == pytest.approx(2 * 7 / 8 * 4 * found['parameters'] / 300e9 * 1e3)


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(plan, 'SIZES', {'tiny': (2, 2, 64), 'small': (4, 2, 128)})
    bench.main(['--part=plan', '--variants=gpt2,diffusion blocks', '--batch_size=2'])
    said = capsys.readouterr().out
    assert 'not run on a GPU' in said
    found = json.loads(said.splitlines()[-1])
    assert set(found) == {'tiny', 'small'} and found['small']['gpt2']['kept_gb'] > found['tiny']['gpt2']['kept_gb'] > 0
    assert found['tiny']['diffusion blocks']['kept_gb'] > 1.5 * found['tiny']['gpt2']['kept_gb']
    with pytest.raises(UserError, match='gpt3'):
        bench.main(['--part=plan', '--variants=gpt3'])
