"""repair_accuracy.py: what is counted, against loops over single tokens; a model that has learned to flag finds wrong
tokens."""
import json

import pytest
import torch

import train
from experiments import repair_accuracy
from model import load_model
from nanodrift import checkpoint
from nanodrift.objectives import random_order
from nanodrift.options import UserError
from nanodrift.refinement import RefineConfig

WAYS = ('flag', 'confidence, hidden', 'confidence, seen')


@pytest.fixture(scope='module')
def run_dir(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp('repair')
    assert train.main(['--dataset=tiny_byte', f'--data_dir={data_dir}', f'--out_dir={folder}', '--model_type=diffusion',
                       '--max_iters=150', '--eval_interval=150', '--eval_iters=2', '--batch_size=32', '--n_layer=2',
                       '--n_head=2', '--n_embd=32', '--block_size=16', '--device=cpu', '--compile=False',
                       '--learning_rate=1e-2']) == 0
    return str(folder)


@pytest.mark.parametrize('source', repair_accuracy.SOURCES)
def test_the_counts_are_those_of_a_loop(run_dir, source):
    model = load_model(checkpoint.load(checkpoint.find(run_dir)))
    tokens = torch.randint(model.config.vocab_size, (6, 16), generator=torch.Generator().manual_seed(3))
    rng = torch.Generator().manual_seed(1)
    before = repair_accuracy.SOURCES[source](model, tokens, random_order(tokens.shape, rng) < 8, rng)
    assert source == 'by the model' or (before != tokens).sum() == 6 * 8
    seen, refine = [], model.refine

    def watched(ids, *args):
        *_, step = refine(ids, *args)
        seen.append((ids, step.ids))
        yield step
    model.refine = watched
    refine_config = RefineConfig(max_steps=4, flag_threshold=0.3)
    found = repair_accuracy.repair(model, tokens, source, 0.5, refine_config, torch.Generator().manual_seed(1))
    assert tuple(found) == WAYS
    for way, (reopened, after) in zip(found, seen[-3:]):
        counts = dict.fromkeys(found[way], 0)
        for b in range(6):
            for t in range(16):
                hidden, wrong = reopened[b, t] == model.config.vocab_size, before[b, t] != tokens[b, t]
                right_after = after[b, t] == tokens[b, t]
                counts['tokens'] += 1
                counts['wrong'] += int(wrong)
                counts['reopened'] += int(hidden)
                counts['hits'] += int(wrong and hidden)
                counts['fixed'] += int(wrong and right_after)
                counts['broken'] += int(not wrong and not right_after)
                counts['wrong_after'] += int(not right_after)
        assert found[way] == counts
    assert found['flag']['reopened'] > 0 and len({counts['reopened'] for counts in found.values()}) == 1


def test_each_way_opens_what_it_should(run_dir, monkeypatch):
    """What is opened, from probabilities that are looked up one position at a time."""
    model = load_model(checkpoint.load(checkpoint.find(run_dir)))
    V = model.config.vocab_size
    ids = torch.randint(V, (1, 16), generator=torch.Generator().manual_seed(3))
    opened, refine = [], model.refine
    model.refine = lambda canvas, *args: opened.append(canvas == V) or refine(canvas, *args)
    monkeypatch.setitem(repair_accuracy.SOURCES, 'as it is', lambda model, tokens, where, rng: tokens)
    refine_config = RefineConfig(flag_threshold=0.3)
    repair_accuracy.repair(model, ids, 'as it is', 0.5, refine_config, torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids)[0][0].double()
        flag, seen, hidden = logits.softmax(-1)[:, V], logits[:, :V].softmax(-1), []
        for t in range(16):
            canvas = ids.clone()
            canvas[0, t % repair_accuracy.GROUPS::repair_accuracy.GROUPS] = V
            hidden.append(float(model(canvas)[0][0, t, :V].double().softmax(-1)[ids[0, t]]))
    count = int((flag > 0.3).sum())
    assert 0 < count < 16 and opened[0][0].tolist() == (flag > 0.3).tolist()
    own = [float(seen[t, ids[0, t]]) for t in range(16)]
    for mask, p in zip(opened[1:], (hidden, own)):
        least = sorted(range(16), key=lambda t: p[t])[:count]
        assert mask[0].nonzero().flatten().tolist() == sorted(least)


def test_a_trained_model_finds_more_than_chance(run_dir, capsys):
    repair_accuracy.main([f'--out_dir={run_dir}', '--share=0.2', '--windows=32', '--device=cpu', '--max_steps=4'])
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert list(found) == [f'{source}, {way}' for source in repair_accuracy.SOURCES for way in WAYS]
    row = found['by chance, flag']
    assert set(row) == {'wrong', 'reopened', 'precision', 'recall', 'fixed', 'broken', 'wrong_after'}
    assert row['wrong'] == pytest.approx(3 / 16) and row['precision'] > 2 * row['wrong'] and row['recall'] > 0.2
    assert row['wrong_after'] < row['wrong'] and 'of the right broken' in out


def test_mistakes_are_one_line(run_dir, encoder):
    mistakes = {'--share=0': 'share', '--share=0.001': 'is none', f'--out_dir={encoder}': 'only a model',
                '--windows=-1': 'windows'}
    for mistake, words in mistakes.items():
        with pytest.raises(UserError, match=words):
            repair_accuracy.main([f'--out_dir={run_dir}', mistake])
