"""models/: what lies in the repository is small, loads, writes code, and predicts code that it has not seen."""
import argparse
import os
import re

import pytest
import torch
from conftest import ROOT

import sample
from model import load_model
from nanodrift import huggingface
from nanodrift.tokenizer import tokenizer_from_meta

FOLDER = os.path.join(ROOT, 'models', 'gpt2-python')


@pytest.fixture(scope='module')
def state():
    return huggingface.open_run(f'hf:{FOLDER}')


def test_it_is_small_and_can_be_read():
    path = os.path.join(FOLDER, 'model.safetensors')
    assert os.path.getsize(path) <= 3e6
    with open(os.path.join(FOLDER, 'README.md'), encoding='utf-8') as f:
        card = f.read()
    for command in re.findall(r'^python (?:NANODRIFT/)?(\S+)', card, re.MULTILINE):
        assert os.path.exists(os.path.join(ROOT, command))
    assert 'No license is claimed' not in card and 'config/train_packages.py' in card


def test_it_predicts_code_that_it_has_not_seen(state):
    """The source of a module of the standard library, which is not among the packages that it learned from."""
    model, tokenizer = load_model(state), tokenizer_from_meta(state['tokenizer'])
    with open(argparse.__file__, encoding='utf-8') as f:
        text = f.read()[:20000]
    T = model.config.block_size
    ids = torch.tensor(tokenizer.encode(text))
    X, Y = (ids[i:i + (len(ids) - 1) // T * T].view(-1, T) for i in (0, 1))
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(X, Y)[0].flatten(0, 1), Y.flatten()).item()
    bits_per_byte = nats / 0.6931 * Y.numel() / len(tokenizer.decode(Y.flatten().tolist()).encode())
    assert 1 < bits_per_byte < 1.8


def test_it_writes_code(capsys):
    sample.main([f'--init_from=hf:{FOLDER}', '--start=def ', '--num_samples=1', '--max_new_tokens=40', '--device=cpu'])
    assert capsys.readouterr().out.startswith('def ')
