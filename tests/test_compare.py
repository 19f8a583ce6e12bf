"""compare.py: trains what is missing, resumes what was cut short, evaluates all, writes one page."""
import json
import os
import re

import pytest
from conftest import pseudo_text

import checkpoint
import compare
import prepare
from configurator import UserError

RECIPE = '''
n_layer = 2
n_head = 2
n_embd = 16
block_size = 16
batch_size = 8
learning_rate = 1e-2
eval_interval = 4
eval_iters = 2
log_interval = 2
compile = False
'''


@pytest.fixture(scope='module')
def go(tmp_path_factory):
    """go(*args) runs compare.py on a tiny data set; returns its folder."""
    folder = tmp_path_factory.mktemp('compare')
    (folder / 'text.txt').write_text(pseudo_text(300), encoding='utf-8')
    (folder / 'recipe.py').write_text(RECIPE)
    prepare.main([f'--input={folder}/text.txt', '--name=text', '--tokenizer=bpe:280', '--num_proc=1',
                  f'--data_dir={folder}'])

    def start(*args, name='report'):
        compare.main([f'--recipe={folder}/recipe.py', '--dataset=text_bpe280', f'--data_dir={folder}', '--device=cpu',
                      f'--out_dir={folder}/{name}', '--tokens=1024', '--samples=20', '--length=16', *args])
        return folder / name
    return start


def test_a_report_of_several_types(go, monkeypatch, capsys):
    words = ['--variants=gpt2,diffusion,drifting', '--seeds=1']
    folder = go(*words)
    runs = sorted(os.listdir(folder / 'runs'))
    assert runs == ['diffusion_seed1', 'drifting_seed1', 'encoder', 'gpt2_seed1', 'judge']
    page = (folder / 'report.html').read_text(encoding='utf-8')
    assert page.count('<img src="data:image/png;base64,') == 6 and not re.search(r'https?://|src="(?!data:)', page)
    found = json.loads((folder / 'results.json').read_text())
    rows = {row['variant']: row for row in found['rows']}
    assert list(rows) == ['gpt2', 'diffusion', 'drifting'] and 'real text' in found['others']
    assert rows['gpt2']['loss'][1] == 0 and rows['diffusion']['bound'] and rows['drifting']['loss'] is None
    assert '≤' in page and rows['drifting']['nfe'] == [1, 0]
    command = found['commands']['diffusion, seed 1']
    assert command.startswith('train.py') and '--seed=1' in command
    state = checkpoint.load(checkpoint.find(str(folder / 'runs' / 'gpt2_seed1'), 'last'))
    assert state['iter_num'] == 8  # 1,024 tokens

    calls = []
    monkeypatch.setattr(compare, 'call', lambda config, given: calls.append(given))
    capsys.readouterr()
    go(*words)
    assert calls == []  # all is known
    again = json.loads((folder / 'results.json').read_text())
    assert again['rows'] == found['rows']


def test_what_was_cut_short_is_resumed_and_what_is_missing_is_trained(go, monkeypatch):
    folder = go('--variants=duo', '--seeds=3', '--samples=0', name='cut')
    log = folder / 'runs' / 'duo_seed3' / 'metrics.jsonl'
    log.write_text(''.join(line for line in log.read_text().splitlines(True) if '"iter": 8' not in line))
    calls, real = [], compare.call

    def call(config, words):
        calls.append(words)
        return real(config, words)
    monkeypatch.setattr(compare, 'call', call)
    go('--variants=duo', '--seeds=3,4', '--samples=0', name='cut')
    assert [words[0] for words in calls][0] == '--init_from=resume' and len(calls) == 2
    assert any('--seed=4' in word for word in calls[1])
    row, = json.loads((folder / 'results.json').read_text())['rows']
    assert row['loss'][1] > 0 and row['fill_accuracy'][0] >= 0


def test_a_budget_in_seconds_is_measured_first(go, monkeypatch):
    folder = go('--variants=gpt2', '--seeds=5', '--samples=0', '--seconds=0.5', name='seconds')
    assert (folder / 'runs' / 'gpt2_seed5-trial').is_dir()
    assert json.loads((folder / 'results.json').read_text())['facts']['budget'] == '0.5 seconds'


@pytest.mark.parametrize('args, words', [
    (['--variants=gpt3'], 'heat adaptive'), (['--seeds=a'], 'seeds'), (['--tokens=0'], 'tokens'),
    (['--dataset=nowhere'], 'nowhere'),
])
def test_mistakes_are_one_line(go, args, words):
    with pytest.raises(UserError, match=words):
        go(*args, name='wrong')
