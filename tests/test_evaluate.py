"""evaluate.py: the numbers of training's own validation, one table, and who may judge whom."""
import json
import lzma
import math
import re
import sys

import numpy as np
import pytest
import torch
from conftest import run_script

import evaluate
import prepare
import train
from model import load_model
from nanodrift import checkpoint
from nanodrift.data import Stream, Windows, derive_seed, load_meta
from nanodrift.options import UserError, configure


@pytest.fixture(scope='module')
def runs(place):
    """{name: folder} of small runs."""
    common = ['--dataset=text_bpe280', f'--data_dir={place}', '--max_iters=12', '--eval_interval=6', '--eval_iters=0',
              '--batch_size=4', '--block_size=16', '--n_layer=2', '--n_head=2', '--n_embd=16', '--device=cpu',
              '--compile=False', '--learning_rate=1e-2']
    made = {}
    for name, options in {'gpt2': [], 'judge': ['--seed=2'], 'duo': ['--model_type=duo'], 'ema': ['--ema=0.5'],
                          'repair': ['--model_type=diffusion'],
                          'nelbo': ['--model_type=diffusion', '--diffusion_objective=nelbo'],
                          'child': [f'--init_from={place}/gpt2'], 'encoder': ['--seed=3'], 'short': ['--block_size=8'],
                          'drifting': ['--model_type=drifting', f'--encoder={place}/encoder']}.items():
        made[name] = str(place / name)
        assert train.main([*common, f'--out_dir={made[name]}', *options]) == 0
    return made


@pytest.fixture
def go(runs, capsys):
    """go('gpt2,duo', *args) -> stdout, the JSON object of evaluate.py."""
    def start(names, *args):
        folders = ','.join(runs.get(name, name) for name in names.split(','))
        evaluate.main([f'--out_dir={folders}', '--device=cpu', '--batch_size=4', *args])
        out = capsys.readouterr().out
        return out, json.loads(out.splitlines()[-1])
    return start


@pytest.mark.slow
def test_a_reliability_figure(go, tmp_path, monkeypatch, runs, capsys):
    go('gpt2,repair', f'--figure={tmp_path}/reliability.png')
    assert (tmp_path / 'reliability.png').read_bytes().startswith(b'\x89PNG')
    (tmp_path / 'folder.png').mkdir()
    with pytest.raises(UserError, match='cannot be written'):
        go('gpt2', f'--figure={tmp_path}/folder.png')

    def full(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('nanodrift.report.figure', full)
    with pytest.raises(UserError, match='No space left'):
        go('gpt2', f'--figure={tmp_path}/reliability.png')
    assert runs['gpt2'] in json.loads(capsys.readouterr().out.splitlines()[-1])['likelihood']  # the numbers come first
    with pytest.raises(UserError, match='no such folder'):
        go('gpt2', '--figure=/nowhere/at/all.png')
    with pytest.raises(UserError, match='must end in .png'):
        go('gpt2', f'--figure={tmp_path}/all.txt')


def last_validation(folder):
    with open(f'{folder}/metrics.jsonl') as f:
        entries = [json.loads(line) for line in f if 'val_loss' in line]
    return min(entries, key=lambda entry: entry['val_loss'])


@pytest.mark.parametrize('name', ['gpt2', 'duo', 'repair', 'nelbo', 'ema'])
def test_the_numbers_are_those_of_trainings_own_validation(go, runs, name):
    out, found = go(name)
    mine, theirs = found['likelihood'][runs[name]], last_validation(runs[name])
    assert mine['bound' if 'bound' in mine else 'loss'] == pytest.approx(theirs['val_loss'], rel=1e-6)
    assert mine['accuracy'] == pytest.approx(theirs['val_accuracy'], rel=1e-6)
    if name == 'duo':
        assert mine['fill_accuracy'] == pytest.approx(theirs['val_fill_accuracy'])
    if 'bound' in mine:
        assert mine['nelbo_stderr'] == pytest.approx(theirs['val_nelbo_stderr'], rel=1e-5) and '<= ' in out
        assert mine['bits_per_byte'] == pytest.approx(theirs['val_bits_per_byte_bound'], rel=1e-6)
        assert {'ece', 'ece_at_60', 'brier_at_100'} <= set(mine)
    else:
        assert mine['bits_per_byte'] == pytest.approx(theirs['val_bits_per_byte'], rel=1e-6) and '<= ' not in out
        assert 0 < mine['ece'] < 1 and mine['perplexity'] == pytest.approx(math.exp(mine['loss']))


@pytest.mark.slow
def test_more_draws_of_a_window_are_one_better_term(go, runs, place):
    """The standard error is over windows: of the average over draws, drawn here one by one."""
    one, four = (go('nelbo', f'--draws={n}', '--dtype=float32')[1]['likelihood'][runs['nelbo']] for n in (1, 4))
    model = load_model(checkpoint.load(checkpoint.find(runs['nelbo'])))
    windows, draws = Windows(f'{place}/text_bpe280/val.bin', 'uint16', 16, 16), []
    for draw in range(4):
        bounds = []
        for i, offsets in enumerate(torch.tensor(windows.spread(len(windows))).split(4)):
            rng = torch.Generator().manual_seed(derive_seed(Stream.EVAL_BATCH, i, *[draw] * bool(draw)))
            X, Y, W = model.objective.eval_batch(windows.read(offsets.tolist()), rng)
            with torch.no_grad():
                ce = -model(X)[0][..., :-1].log_softmax(-1).gather(-1, Y[..., None]).squeeze(-1)
            bounds += (ce * W).mean(1).tolist()
        draws.append(bounds)
    for found, terms in ((one, np.array(draws[0])), (four, np.mean(draws, axis=0))):
        assert found['bound'] == pytest.approx(terms.mean(), rel=1e-5)
        assert found['nelbo_stderr'] == pytest.approx(terms.std() / len(terms) ** 0.5, rel=1e-4)
    assert abs(four['bound'] - one['bound']) < 4 * one['nelbo_stderr'] and four['bound'] != one['bound']


@pytest.mark.slow
def test_a_stride_gives_each_prediction_its_context(go, runs, place):
    """Against one forward pass for each token, over as much of the context before it as fits."""
    found = go('gpt2', '--stride=1', '--windows=0', '--dtype=float32')[1]['likelihood'][runs['gpt2']]
    model = load_model(checkpoint.load(checkpoint.find(runs['gpt2'])))
    tokens = torch.from_numpy(np.fromfile(place / 'text_bpe280/val.bin', dtype='uint16').astype(np.int64))
    losses = []
    with torch.no_grad():
        for i in range(1, len(tokens)):
            context = tokens[max(0, i - 16):i][None]
            losses.append(-model(context)[0][0, -1].log_softmax(-1)[tokens[i]].item())
    assert found['loss'] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found['loss'] != pytest.approx(go('gpt2')[1]['likelihood'][runs['gpt2']]['loss'], rel=1e-5)
    with pytest.raises(UserError, match='causal'):
        go('nelbo', '--stride=4')


@pytest.mark.slow
def test_two_ranks_find_the_same(runs, fork_ranks, tmp_path):
    argv = [f'--out_dir={runs["gpt2"]},{runs["repair"]}', '--device=cpu', '--batch_size=4', '--windows=30',
            f'--judge={runs["judge"]}', '--num_samples=120', '--length=8', '--max_steps=2']
    for process in (ranks := fork_ranks(evaluate_quietly, argv)):
        process.join(120)
    said = (tmp_path / 'fork.out').read_text()
    assert [p.exitcode for p in ranks] == [0, 0], said
    two = json.loads(said.splitlines()[-1])
    config, draw_config, _ = configure(argv, evaluate.EvalConfig, evaluate.DrawConfig)
    one, samples = evaluate.evaluate(config, draw_config, evaluate.setup_ranks('cpu', 'gloo', 60))
    assert json.dumps(two['likelihood']) == json.dumps(evaluate.finite(one))
    for row in [*two['samples'].values(), *samples.values()]:
        row.pop('tokens_per_s', None)
    assert two['samples'] == samples


def evaluate_quietly(argv):
    evaluate.main(argv)
    return 0


def test_samples_of_every_type_stand_beside_real_text_and_ngrams(go, runs):
    args = [f'--judge={runs["judge"]}', '--num_samples=40', '--length=16', '--strategy=random', '--max_steps=8']
    out, found = go('gpt2,repair', *args)
    rows = found['samples']
    assert list(rows) == ['real text', '1-grams', '2-grams', '3-grams', 'shuffled spans', runs['gpt2'], runs['repair']]
    assert rows[runs['gpt2']]['nfe'] == 15 and rows[runs['repair']]['nfe'] == 8
    assert rows['real text']['js_1'] < rows['1-grams']['js_1'] + 0.1 and rows['1-grams']['js_3'] > rows['3-grams']['js_3']
    assert 'judged by' in out
    config = evaluate.EvalConfig(num_samples=40, length=16)
    entry, judge = (evaluate.load(config, runs[name], torch.device('cpu')) for name in ('duo', 'judge'))
    reference = evaluate.reference_quality(config, entry, judge)  # which does not depend on the models beside it
    assert reference == {row: rows[row] for row in list(rows)[:5]}
    again = go('gpt2,repair', *args)[1]['samples']
    for row in rows.values():
        row.pop('tokens_per_s', None)
    for row in again.values():
        row.pop('tokens_per_s', None)
    assert again == rows


def test_ways_are_rows(go, runs):
    args = [f'--judge={runs["judge"]}', '--num_samples=20', '--length=16', '--windows=4', '--max_steps=4']
    ways = 'strategy=random; max_steps=2,remask=flag'
    found = go('gpt2,repair', *args, f'--ways={ways}')[1]['samples']
    named = [f'{runs["repair"]} {way}' for way in ways.split('; ')]
    assert list(found)[5:] == [runs['gpt2'], *named]
    alone = go('repair', *args, '--max_steps=2', '--remask=flag')[1]['samples'][runs['repair']]
    together = found[f'{runs["repair"]} max_steps=2,remask=flag']
    assert {**alone, 'tokens_per_s': 0} == {**together, 'tokens_per_s': 0}
    assert found[f'{runs["repair"]} strategy=random'] != together
    with pytest.raises(UserError, match='only the repair objective'):
        go('repair,nelbo', *args, f'--ways={ways}')
    with pytest.raises(UserError, match='temperatur'):
        go('repair', *args, '--ways=temperatur=1')
    with pytest.raises(UserError, match='--judge'):
        go('repair', f'--ways={ways}')


def test_real_text_is_not_compared_with_itself(runs, place):
    config = evaluate.EvalConfig(num_samples=60, length=16)
    folder = f'{place}/text_bpe280'
    reference, rest = evaluate.held_out_halves(folder, load_meta(folder), config)
    windows = Windows(f'{folder}/val.bin', 'uint16', 16, 16)
    every = windows.read(windows.offsets(range(len(windows)))).tolist()
    mine = reference.tolist() + rest.tolist()
    assert len(mine) == 120 and all(row in every for row in mine)
    assert sorted(mine) == sorted(every.pop(every.index(row)) for row in mine)  # no window twice
    with pytest.raises(UserError, match='num_samples='):
        evaluate.held_out_halves(folder, load_meta(folder), evaluate.EvalConfig(num_samples=100000, length=16))


@pytest.mark.parametrize('judge, judged', [('gpt2', 'gpt2'), ('gpt2', 'child'), ('child', 'gpt2'), ('gpt2', 'duo,child')])
def test_kin_cannot_judge(go, runs, judge, judged):
    with pytest.raises(UserError, match='cannot judge'):
        go(judged, f'--judge={runs[judge]}', '--num_samples=10')


def test_drifting_has_samples_and_no_likelihood(go, runs):
    """Nor can its encoder judge it, in whose features it learned to look like text."""
    args = ['--num_samples=20', '--length=16', '--windows=4']
    out, found = go('drifting,gpt2', f'--judge={runs["judge"]}', *args)
    assert f'{runs["drifting"]} (drifting) has no likelihood' in out.replace('\n', ' ')
    assert found['likelihood'][runs['drifting']] == {} and found['samples'][runs['drifting']]['nfe'] == 1
    _, cold = go('drifting', f'--judge={runs["judge"]}', *args, '--temperature=0.1')
    assert cold['samples'][runs['drifting']]['js_1'] != found['samples'][runs['drifting']]['js_1']
    with pytest.raises(UserError, match='cannot judge'):
        go('drifting', f'--judge={runs["encoder"]}', *args)


@pytest.mark.slow
def test_contexts_are_shown_and_windows_of_different_ones_are_said_to_be(go):
    out, _ = go('gpt2,short')
    assert 'context 16' in out and 'context 8' in out and 'different contexts' not in out
    assert 'different contexts: 5 windows' in go('gpt2,short', '--windows=5')[0]
    assert 'different contexts' not in go('gpt2,judge', '--windows=5')[0]


@pytest.mark.slow
def test_a_terminal_without_the_sign_gets_a_table(runs):
    done = run_script('evaluate.py', f'--out_dir={runs["nelbo"]}', '--device=cpu', '--windows=4',
                      env={'PYTHONIOENCODING': 'ascii'})
    assert '<= ' in done.stdout and ' ? ' in done.stdout


def test_a_judge_is_causal_and_reads_the_same_tokens(go, runs, tmp_path, data_dir):
    with pytest.raises(UserError, match='not causal'):
        go('gpt2', f'--judge={runs["repair"]}', '--num_samples=10')
    other = tmp_path / 'bytes'
    assert train.main(['--dataset=tiny_byte', f'--data_dir={data_dir}', f'--out_dir={other}', '--max_iters=2', '--n_layer=1',
                       '--n_head=1', '--n_embd=8', '--block_size=16', '--device=cpu', '--compile=False']) == 0
    with pytest.raises(UserError, match='different tokenizers'):
        go('gpt2', f'--judge={other}', '--num_samples=10')
    with pytest.raises(UserError, match='tokenizer'):
        go('gpt2', f'--data={data_dir}/tiny_byte')
    out, found = go(f'gpt2,{other}')
    table = out.split('different validation texts')[0].split('validation text')[-1]
    for key in ('perplexity', 'bits_per_byte'):
        assert f'{found["likelihood"][str(other)][key]:.4f}'[:5] not in table


def test_different_tokenizers_of_one_text_meet_in_bits_per_byte_with_xz(go, runs, place, monkeypatch):
    prepare.main([f'--input={place}/text.txt', '--name=text', '--tokenizer=byte', '--num_proc=1', f'--data_dir={place}'])
    other = place / 'bytes'
    assert train.main(['--dataset=text_byte', f'--data_dir={place}', f'--out_dir={other}', '--max_iters=2', '--n_layer=1',
                       '--n_head=1', '--n_embd=8', '--block_size=16', '--device=cpu', '--compile=False']) == 0
    out, found = go(f'gpt2,{other}')
    table = out.split('different tokenizers')[0].split('validation text')[-1]
    shown = [found['likelihood'][name]['bits_per_byte'] for name in (runs['gpt2'], str(other))]
    documents, text = [[]], b''
    for byte in np.fromfile(place / 'text_byte/val.bin', dtype='uint16').tolist():
        documents[-1].append(byte) if byte < 256 else documents.append([])
    text = b''.join(map(bytes, documents))
    for texts in (map(bytes, filter(None, documents)), [text]):  # which no tokenizer changes
        shown.append(8 * sum(len(lzma.compress(part, preset=9)) for part in texts) / len(text))
    numbers = list(map(float, re.findall(r'\d+\.\d+', table)))
    assert numbers == pytest.approx(shown, abs=5e-3)  # and nothing that is counted for each token
    monkeypatch.setattr(evaluate, 'XZ_AT_MOST', len(text) - 1)
    assert 'xz -9' in table and 'xz -9' not in go('gpt2')[0]


MISTAKES = [(['--out_dir=nowhere'], 'nowhere'), (['--draws=0'], 'draws'), (['--length=1'], 'length')]


@pytest.mark.parametrize('args, words', MISTAKES)
def test_mistakes_are_one_line(args, words):
    with pytest.raises(UserError, match=words):
        evaluate.main(args)


def test_without_the_harness_tasks_name_the_package(runs, monkeypatch):
    for name in ('lm_eval', 'lm_eval.utils'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match='pip install lm_eval=='):
        evaluate.main([f"--out_dir={runs['gpt2']}", '--tasks=arc_easy', '--device=cpu'])
