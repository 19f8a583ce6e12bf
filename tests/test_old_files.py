"""What commit 678f902 wrote (old_files.zip; its MAKE.md has the commands) still loads, resumes, samples and exports."""
import json
import os
import shlex
import zipfile

import pytest
import torch
from conftest import ROOT, run_script

import train
import train_diffusion_attention
from model import load_model
from nanodrift import checkpoint, machine
from nanodrift.huggingface import open_run

with zipfile.ZipFile(os.path.join(ROOT, 'tests', 'old_files.zip')) as f:
    EXPECTED = json.loads(f.read('expected.json'))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the old files in it, which is the working directory: their paths are relative."""
    with zipfile.ZipFile(os.path.join(ROOT, 'tests', 'old_files.zip')) as f:
        f.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(run):
    with open(os.path.join(run, 'metrics.jsonl'), encoding='utf-8') as f:
        return [json.loads(line) for line in f]


@pytest.mark.parametrize('run', EXPECTED['runs'])
def test_an_old_checkpoint_loads_and_resumes(place, run, monkeypatch):
    """To the numbers that the old code resumed to; other processors add floats in another order."""
    wanted = EXPECTED['runs'][run]
    state = checkpoint.load(checkpoint.find(run, 'last'))
    weights = load_model(state).state_dict()
    assert all(torch.equal(weights[name], (state.get('ema') or state['model'])[name]) for name in weights)
    monkeypatch.setattr(machine, 'cpu_multiplies_bfloat16', lambda: False)  # nor did the processor that made them
    script, *words = shlex.split(wanted['resume'])
    if script == 'train.py':
        assert train.train(*train.read_settings(words)) == 0
    else:
        assert train_diffusion_attention.main(words) == 0
    resumed = checkpoint.load(checkpoint.find(run, 'last'))
    norms = [float(resumed['model'][name].float().norm()) for name in sorted(resumed['model'])]
    assert resumed['iter_num'] == 8 and norms == pytest.approx(wanted['norms'], rel=1e-4)
    new = lines(run)[-len(wanted['metrics']):]
    for entry, old in zip(new, wanted['metrics']):
        numbers = {name: value for name, value in old.items() if isinstance(value, (int, float))}
        assert {name: entry[name] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-6)
        assert set(old) <= set(entry)


@pytest.mark.slow
@pytest.mark.parametrize('name', [*EXPECTED['runs'], *EXPECTED['exports']])
def test_an_old_run_or_export_writes_the_same_text(place, name):
    row = (EXPECTED['runs'] | EXPECTED['exports'])[name]
    script, *words = shlex.split(row['sample_command'])
    for folder in ('data', 'runs', 'logs', 'exports'):  # the command runs in the repository
        words = [word.replace(f'={folder}/', f'={place}/{folder}/').replace(f'hf:{folder}/', f'hf:{place}/{folder}/')
                 for word in words]
    if name == 'runs/drifting':
        state = checkpoint.load(checkpoint.find(name, 'last'))
        state['model_args']['encoder'] = str(place / 'runs' / 'gpt2')
        torch.save(state, f'{name}/ckpt.pt')
    assert run_script(script, *words).stdout == row['sample']


def test_an_old_export_has_the_weights_of_its_run(place):
    for name in ('gpt2', 'diffusion_repair'):
        ours = load_model(checkpoint.load(checkpoint.find(f'runs/{name}'))).state_dict()
        theirs = load_model(open_run(f'hf:exports/{name}')).state_dict()
        rows = load_model(open_run(f'hf:exports/{name}')).config.vocab_size
        for key, tensor in ours.items():
            cut = rows if key in ('lm_head.weight', 'transformer.wte.weight') else len(tensor)
            assert torch.equal(tensor[:cut], theirs[key][:cut]), key
