"""Every file in config/ runs, shrunken; and says how it is run and what comes of it."""
import glob
import json
import os
from dataclasses import fields

import pytest
from conftest import ROOT

from model import GPTConfig
from nanodrift.options import build, read_config_file, read_values
from train import TrainConfig, main

CONFIGS = sorted(glob.glob('**/*.py', root_dir=os.path.join(ROOT, 'config'), recursive=True))
SMALLER = {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': 16, 'batch_size': 2, 'gradient_accumulation_steps': 2,
           'max_iters': 2, 'num_epochs': 0, 'warmup_iters': 0, 'warmup_ratio': 0, 'eval_interval': 2, 'eval_iters': 1,
           'log_interval': 1, 'compile': False, 'device': 'cpu'}


def path_of(name):
    return os.path.join(ROOT, 'config', name)


@pytest.mark.parametrize('name', CONFIGS)
def test_config_runs_two_iterations(name, tmp_path, data_dir, encoder):
    path = path_of(name)
    settings = read_config_file(path)
    small = [f'--{key}={value}' for key, value in SMALLER.items()]
    here = [f'--data_dir={data_dir}', '--dataset=tiny_byte', f'--out_dir={tmp_path / "out"}']
    here += [f'--{key}={encoder}' for key in ('encoder', 'init_from') if key in settings]
    assert main([path, *small, *here]) == 0
    lines = [json.loads(line) for line in (tmp_path / 'out' / 'metrics.jsonl').read_text().splitlines()]
    assert [entry['iter'] for entry in lines if 'loss' in entry] == [1, 2]
    assert (tmp_path / 'out' / 'ckpt.pt').exists()


@pytest.mark.parametrize('name', [name for name in CONFIGS if name.startswith('gpt2_medium')])
def test_gpt2_medium_is_the_published_recipe_whichever_file_is_named(name):
    path = path_of(name)
    values, _ = read_values([path], TrainConfig, GPTConfig)
    c, model = build(values, TrainConfig, GPTConfig)
    assert (model.n_layer, model.n_head, model.n_embd) == (24, 16, 1024)
    assert model.block_size == (512 if model.model_type == 'duo' else 1024)
    assert (c.dataset, c.num_epochs, c.learning_rate, c.lr_schedule) == ('wikitext-103', 5, 1e-4, 'linear')
    assert not c.gradient_checkpointing  # by the plan a GPU of 80 GB does not need it
    assert (c.weight_decay, c.warmup_ratio) == (0.01, 0.1) and c.batch_size * c.gradient_accumulation_steps == 64
    with open(path, encoding='utf-8') as f:
        assert 'Not run here' in f.read()


@pytest.mark.parametrize('name', CONFIGS)
def test_config_is_headed_by_its_command_and_result(name):
    with open(path_of(name), encoding='utf-8') as f:
        head = [line for line in f if line.startswith('#')]
    text = ''.join(head)
    assert f'config/{name}' in text, 'the command'
    assert 'loss' in text, 'what comes of it'


@pytest.mark.parametrize('name', CONFIGS)
def test_config_holds_only_what_differs_from_the_defaults(name):
    defaults = {f.name: f.default for cls in (TrainConfig, GPTConfig) for f in fields(cls)}
    assert [key for key, value in read_config_file(path_of(name)).items() if defaults[key] == value] == []
