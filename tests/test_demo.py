"""`make demo`: the commands it runs are those of a user, and they end in text."""
import glob
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import prepare
from nanodrift.options import read_config_file

pytestmark = pytest.mark.slow
SMALL = '--max_iters=2 --warmup_iters=0 --eval_iters=2'


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """Where a demo finds the data set that it would prepare, but of this repository's source: that is sooner evaluated."""
    folder = tmp_path_factory.mktemp('demo-data')
    texts = []
    for name in sorted(glob.glob(f'{ROOT}/*.py')):
        with open(name, encoding='utf-8') as f:
            texts.append(f.read())
    (folder / 'source.txt').write_text('<|endoftext|>'.join(texts), encoding='utf-8')
    prepare.main([f'--input={folder}/source.txt', '--name=python', '--tokenizer=bpe:1024', '--val_fraction=0.1',
                  '--num_proc=1', f'--data_dir={folder}'])
    return folder


def make_demo(*variables):
    """-> what `make demo` printed, and the scripts it ran, in order; the environment that runs the tests is its own."""
    done = subprocess.run(['make', '-o', '.venv/.installed', 'demo', f'PY={sys.executable}', *variables], cwd=ROOT,
                          capture_output=True, encoding='utf-8', timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, [word for line in done.stdout.splitlines() if line.startswith(sys.executable)
                         for word in line.split()[1:2]]


@pytest.mark.parametrize('model, wanted', [
    ('gpt2', ['train.py', 'evaluate.py', 'sample.py']), ('heat', ['train.py', 'evaluate.py', 'sample.py']),
    ('diffusion', ['train.py', 'evaluate.py', 'generate_diffusion.py']),
    ('drifting', ['train.py', 'train.py', 'sample.py'])])
def test_the_demo_of_a_type_ends_in_text(tmp_path, data_dir, model, wanted):
    said, commands = make_demo(f'MODEL={model}', f'DATA={data_dir}', f'OUT={tmp_path}/out', f'ARGS={SMALL}')
    assert commands == wanted
    if model == 'drifting':
        assert said.count('\n---------------\n') == 16 and os.path.isdir(tmp_path / 'out-encoder')
    else:
        assert '\ndef ' in said and 'xz -9' in said


def test_it_prepares_the_data_set_that_its_recipes_read(tmp_path):
    done = subprocess.run(['make', '-n', 'demo', f'DATA={tmp_path}'], cwd=ROOT, capture_output=True, text=True, check=True)
    prepared, = [line for line in done.stdout.splitlines() if 'prepare.py' in line]
    assert 'prepare.py python --tokenizer=bpe:1024' in prepared
    for recipe in glob.glob(f'{ROOT}/config/train*_python.py'):
        assert read_config_file(recipe)['dataset'] == 'python_bpe1024'
