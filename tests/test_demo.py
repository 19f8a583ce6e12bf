"""demo.py: the commands it runs are those of a user, and they end in text."""
import glob

import pytest
from conftest import ROOT, run_script

import demo as script
import prepare
from nanodrift.options import read_config_file


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """Where a demo finds the data set that it would prepare, but of this repository's source: that is sooner evaluated."""
    folder = tmp_path_factory.mktemp('demo-data')
    texts = []
    for name in sorted(glob.glob(f'{ROOT}/*.py')):
        with open(name, encoding='utf-8') as f:
            texts.append(f.read())
    (folder / 'source.txt').write_text('<|endoftext|>'.join(texts), encoding='utf-8')
    prepare.main([f'--input={folder}/source.txt', '--name=python', f'--tokenizer={script.TOKENIZER}', '--val_fraction=0.1',
                  '--num_proc=1', f'--data_dir={folder}'])
    return folder


def demo(model_type, folder, data_dir):
    """-> what `demo.py` printed, and the scripts it ran, in order."""
    args = [f'--model_type={model_type}', '--max_iters=2', f'--out_dir={folder}/out', f'--data_dir={data_dir}']
    said = run_script('demo.py', *args, timeout=300).stdout
    return said, [line.split()[2] for line in said.splitlines() if line.startswith('$ python')]


def test_the_demo_of_masked_refinement(tmp_path, data_dir):
    said, commands = demo('diffusion', tmp_path, data_dir)
    assert commands == ['train.py', 'train.py', 'generate_diffusion.py']
    assert 'the model needs at most' in said and 'step   0,   0 passes' in said and '\ndef ' in said


def test_the_demo_of_one_step_generation(tmp_path, data_dir):
    said, commands = demo('drifting', tmp_path, data_dir)
    assert commands == ['train.py', 'train.py', 'sample.py']
    assert said.count('\n---------------\n') == 16
    assert (tmp_path / 'out-encoder').is_dir()


def test_it_prepares_the_data_set_that_its_recipes_read(tmp_path, monkeypatch):
    def call(*words):
        asked.append(words)
        raise SystemExit
    asked = []
    monkeypatch.setattr(script, 'call', call)
    with pytest.raises(SystemExit):
        script.main([f'--data_dir={tmp_path}'])
    (name, source, tokenizer, *_), = asked
    assert (name, source) == ('prepare.py', 'python')
    for recipe in glob.glob(f'{ROOT}/config/train*_python.py'):
        assert read_config_file(recipe)['dataset'] == f'{source}_{tokenizer.partition("=")[2].replace(":", "")}'
