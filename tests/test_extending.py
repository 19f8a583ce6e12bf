"""The example of docs/extending.md, applied to a copy of the repository: everything else picks the new type up by itself."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, pseudo_text

import prepare

pytestmark = pytest.mark.slow


def blocks():
    """The code blocks of docs/extending.md: (file, the anchor that they go before or None, the lines)."""
    with open(os.path.join(ROOT, 'docs', 'extending.md'), encoding='utf-8') as f:
        found = re.findall(r'```python (\S+) (?:before="(.*?)"|new)\n(.*?)```', f.read(), re.S)
    return [(name, anchor.replace('\\n', '\n') or None, lines) for name, anchor, lines in found]


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """A copy of the repository with those lines in it."""
    folder = tmp_path_factory.mktemp('extended')
    names = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.splitlines()
    for name in names:
        if os.path.exists(os.path.join(ROOT, name)):
            os.makedirs(folder / os.path.dirname(name), exist_ok=True)
            shutil.copy(os.path.join(ROOT, name), folder / name)
    for name, anchor, lines in blocks():
        text = (folder / name).read_text(encoding='utf-8') if anchor else ''
        assert not anchor or text.count(anchor) == 1, f'{name} has its anchor {anchor!r} once'
        (folder / name).write_text(text.replace(anchor, lines + anchor) if anchor else lines, encoding='utf-8')
    (folder / 'text.txt').write_text(pseudo_text(300), encoding='utf-8')
    prepare.main([f'--input={folder}/text.txt', '--name=text', '--tokenizer=byte', '--num_proc=1', f'--data_dir={folder}'])
    return folder


def do(copy, *words):
    """Runs python in the copy; returns what it says."""
    env = os.environ | {'PYTHONPATH': os.pathsep.join([os.path.join(ROOT, 'tests', 'offline'), str(copy)])}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=copy, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_type_that_changes_attention_takes_few_lines_and_three_files():
    code = [line for name, _, lines in blocks() for line in lines.splitlines()
            if line.strip() and not line.strip().startswith('#') and not name.startswith('tests/')]
    assert len(code) < 40
    assert len({name for name, _, _ in blocks() if not name.startswith('tests/')}) <= 3


def test_the_tests_take_the_new_type_up(copy):
    kinds = 'local and (later or cache or config or gradients_of_two_ranks or resuming_is_exact)'
    said = do(copy, '-m', 'pytest', '-v', '-p', 'no:cacheprovider', '-k', kinds, *(f'tests/test_{name}.py' for name in (
        'model_types', 'configs', 'train', 'machine')))
    assert int(re.search(r'(\d+) passed', said)[1]) >= 18 and 'failed' not in said


def test_the_commands_take_the_new_type_up(copy):
    (copy / 'recipe.py').write_text('\n'.join(f'{key} = {value!r}' for key, value in TINY.items() if key != 'max_iters'))
    do(copy, 'compare.py', '--recipe=recipe.py', '--dataset=text_byte', f'--data_dir={copy}', '--device=cpu', '--tokens=512',
       '--variants=gpt2,local', '--seeds=1', '--samples=0', '--length=16')
    rows = json.loads((copy / 'report' / 'results.json').read_text())['rows']
    assert [row['variant'] for row in rows] == ['gpt2', 'local']
    said = do(copy, 'evaluate.py', '--out_dir=report/runs/local_seed1', '--judge=report/runs/gpt2_seed1', '--num_samples=10',
              '--length=16', '--windows=4', '--device=cpu')
    assert 'classifier' in json.loads(said.splitlines()[-1])['samples']['report/runs/local_seed1']
    do(copy, 'export.py', '--out_dir=report/runs/local_seed1', '--to=exported')
    assert do(copy, 'sample.py', '--init_from=hf:exported', '--device=cpu', '--max_new_tokens=10', '--num_samples=1')
    said = do(copy, 'bench.py', '--part=types', '--variants=gpt2,local', '--n_layer=2', '--n_head=2', '--n_embd=16',
              '--block_size=16', '--vocab_size=64', '--batch_size=2', '--rounds=1', '--compile=False')
    assert 'local' in said
