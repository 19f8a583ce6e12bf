"""compare.py: trains what is missing, resumes what was cut short, evaluates all, writes one page."""
import glob
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import compare
import prepare
import train
from model import TYPES
from nanodrift import checkpoint, costs, jobs, report, tuning
from nanodrift.data import load_meta
from nanodrift.options import UserError, read_config_file
from nanodrift.runs import Run, read_lines, settings_of

RECIPE = '''
n_layer = 2
n_head = 2
n_embd = 16
block_size = 16
batch_size = 8
learning_rate = 1e-2
warmup_iters = 50
eval_interval = 4
eval_iters = 2
log_interval = 100
compile = False
'''


@pytest.fixture(scope='module')
def place(place):
    """The same with a recipe, and its text in bytes."""
    (place / 'recipe.py').write_text(RECIPE)
    prepare.main([f'--input={place}/text.txt', '--name=text', '--tokenizer=byte', '--num_proc=1', f'--data_dir={place}'])
    return place


@pytest.fixture(scope='module')
def words(place):
    """words(name, *args) -> arguments of a comparison in the folder `name`."""
    return lambda name, *args: [f'--recipe={place}/recipe.py', '--dataset=text_bpe280', f'--data_dir={place}',
                                f'--out_dir={place}/{name}', '--device=cpu', '--tokens=1024', '--samples=20', '--length=16',
                                *args]


@pytest.fixture
def calls(monkeypatch):
    """The arguments that train.py is given, in this process: a command for each would take most of the time."""
    given = []

    def call(config, calls):
        ended = []
        for arguments, _ in calls:
            given.append(arguments)
            ended.append(train_here(arguments))
        return ended
    monkeypatch.setattr(compare, 'call', call)
    return given


def train_here(arguments):
    """train.py in this process -> whether it did not diverge."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return train.main(arguments) == 0
    except train.Diverged:
        return False
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def results(folder):
    return json.loads((folder / 'results.json').read_text())


def state_of(folder, which='last'):
    return checkpoint.load(checkpoint.find(str(folder), which))


@pytest.mark.slow
def test_a_report_of_several_types(place, words, calls):
    args = words('report', '--variants=gpt2,diffusion,drifting', '--seeds=1')
    compare.main(args)
    folder = place / 'report'
    assert sorted(os.listdir(folder / 'runs')) == ['diffusion_seed1', 'drifting_seed1', 'encoder', 'gpt2_seed1', 'judge']
    page = (folder / 'report.html').read_text(encoding='utf-8')
    for start in ('<img src="', 'srcset="'):  # for light and for dark
        assert page.count(f'{start}data:image/svg+xml;base64,') == 6
    assert not re.search(r'https?://|src(set)?="(?!data:)|url\(|@import', page) and 'nothing can be concluded' in page
    top = page[page.index('<table class="summary">'):page.index('</table>')]
    assert top.count('<th>') == 1 + 6 and '1-grams' in top and 'MAUVE' not in top
    assert page.count('alt="') == 6 and 'alt=""' not in page and '≤' in page and '<pre>&lt;|endoftext|&gt;' not in page
    found = results(folder)
    rows = {row['variant']: row for row in found['rows']}
    assert list(rows) == ['gpt2', 'diffusion', 'drifting'] and 'real text' in found['others']
    assert rows['gpt2']['likelihood']['loss'][1] is None and rows['diffusion']['bound']
    assert rows['diffusion']['likelihood']['stderr'][0] > 0 and rows['drifting']['likelihood']['loss'] is None
    quality = rows['drifting']['quality']
    assert quality['nfe'] == [1, None]
    assert [name for name, pair in quality.items() if pair is None] == ['mauve']  # of 20 samples there is none
    p = quality['classifier'][0]
    p = (40 * p + 2) / 44
    assert quality['classifier_stderr'][0] == pytest.approx((p * (1 - p) / 44) ** 0.5)
    assert report.classifier_stderr(1.0, 10) > 0  # ten of ten are no certainty
    assert all(title in page for title in (*report.LIKELIHOOD.values(), 'MAUVE', 'JS 4', 'distinct 3', 'repeated'))
    facts = found['facts']
    assert '--variants=gpt2,diffusion,drifting' in facts['command'] and facts['device'] == 'cpu' and facts['threads'] == '1'
    assert {'hours of training', 'hours of judge and encoder', 'hours of evaluation', 'machine'} <= set(facts)
    assert '--seed=1' in found['commands']['diffusion_seed1']['command'] and 'commit' in found['commands']['judge']

    assert len(calls) == 5 and state_of(folder / 'runs' / 'gpt2_seed1')['iter_num'] == 8  # 1,024 tokens
    compare.main(args)
    assert len(calls) == 5 and results(folder)['rows'] == found['rows']  # all is known


# ---------------------------------------------------------------------------------------------------------------------
# what is evaluated, and what the page has of it

@pytest.mark.slow
def test_reference_rows_are_computed_once_and_what_is_evaluated_is_said(place, words, calls, monkeypatch, capsys):
    computed, real = [], compare.evaluate.reference_quality
    monkeypatch.setattr(compare.evaluate, 'reference_quality', lambda *args: computed.append(args) or real(*args))

    def compare_seeds(seeds):
        computed.clear()
        compare.main(words('once', '--variants=gpt2,rotating lr', f'--seeds={seeds}'))
        said = re.findall(r'^(.*): validation text, 20 samples, \d+\.\d s$', capsys.readouterr().out, re.MULTILINE)
        return len(computed), said
    assert compare_seeds('1') == (1, ['gpt2, seed 1', 'rotating lr, seed 1'])
    assert compare_seeds('1') == (0, [])  # all is known
    assert compare_seeds('1,2') == (1, ['gpt2, seed 2', 'rotating lr, seed 2'])
    rows = [json.loads(path.read_text())['others'] for path in place.glob('once/runs/*/evaluation.json')]
    assert len(rows) == 4 and all(row == rows[0] for row in rows)
    assert list(rows[0]) == ['real text', '1-grams', '2-grams', '3-grams', 'shuffled spans']
    assert list(results(place / 'once')['others']) == list(rows[0])


@pytest.mark.slow
def test_no_more_text_is_evaluated_than_a_run_trains_on(place, words, calls, capsys):
    validation = load_meta(place / 'text_bpe280')['splits']['val']['tokens']
    assert 1024 < validation < 5120
    for tokens, predictions in ((1024, 1024), (5120, (validation - 1) // 16 * 16)):
        compare.main(words(f'windows{tokens}', '--variants=gpt2', '--seeds=1', '--samples=0', f'--tokens={tokens}'))
        found = json.loads((place / f'windows{tokens}' / 'runs' / 'gpt2_seed1' / 'evaluation.json').read_text())
        assert found['likelihood']['predictions'] == predictions and found['quality'] == {}
        assert found['asked']['dtype'] == settings_of(place / f'windows{tokens}' / 'runs' / 'gpt2_seed1')['dtype_used']
        assert re.search(r'^gpt2, seed 1: validation text, \d+\.\d s$', capsys.readouterr().out, re.MULTILINE)


def test_all_are_evaluated_on_the_text_of_the_shortest_run(place, words, calls, monkeypatch):
    monkeypatch.setattr(compare, 'iterations', lambda config, planned: 4 if planned.variant == 'heat' else 8)
    compare.main(words('shortest', '--variants=gpt2,heat', '--seeds=1', '--samples=0'))
    found = [json.loads((place / 'shortest' / 'runs' / f'{name}_seed1' / 'evaluation.json').read_text())
             for name in ('gpt2', 'heat')]
    assert [evaluation['likelihood']['predictions'] for evaluation in found] == [512, 512]


def test_curves_have_points_and_the_time_counts(place, words, calls):
    compare.main(words('curves', '--variants=gpt2', '--seeds=7', '--samples=0', '--tokens=5120'))
    folder = place / 'curves' / 'runs' / 'gpt2_seed7'
    run = report.collect(Run([], settings_of(folder)), '')
    assert len(run['entries']) > 10 and run['seconds'] > 0 and run['speed'] > 0
    points = report.curve(run, 'val_loss', 'seconds')
    assert len(points) == compare.EVALUATIONS and points == sorted(points) and points[-1][0] == pytest.approx(run['seconds'])
    assert [tokens for tokens, _ in report.curve(run, 'val_loss', 'tokens')] == [512 * i for i in range(1, 11)]


@pytest.mark.slow
@pytest.mark.parametrize('seeds, number', [((3,), signal.SIGTERM), ((3, 4), signal.SIGHUP)])
def test_what_was_stopped_goes_on_as_if_it_had_not_been(place, words, calls, seeds, number):
    """A real signal to the real command: train.py saves in order, and the comparison ends with its exit code. Two seeds are
    trained at the same time, and go on one after the other."""
    count = len(seeds)
    args = ['--variants=duo', f'--seeds={",".join(map(str, seeds))}', '--samples=0', '--tokens=25600']
    cut, whole = words(f'cut{count}', *args), words(f'whole{count}', *args)
    process = subprocess.Popen([sys.executable, 'compare.py', *cut, f'--jobs={count}'], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    runs = place / f'cut{count}' / 'runs'
    folders = [runs / f'duo_seed{seed}' for seed in seeds]
    until = time.monotonic() + 120
    while not all(any(entry['iter'] >= 20 for entry in read_lines(str(folder))) for folder in folders):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number and f'waiting for {count} of train.py' in said, said
    for folder in folders:
        state, said = state_of(folder), said if count == 1 else (runs / f'{folder.name}.txt').read_text()
        assert 20 <= state['iter_num'] < 200 and f'after iteration {state["iter_num"]}' in said
    assert not (place / f'cut{count}' / 'report.html').exists()

    compare.main(cut)
    assert calls == [['--init_from=resume', f'--out_dir={folder}', '--device=cpu'] for folder in folders]
    compare.main(whole)
    for folder in folders:
        weights, others = state_of(folder)['model'], state_of(place / f'whole{count}' / 'runs' / folder.name)['model']
        assert all(torch.equal(weights[name], others[name]) for name in others)
    row, other = (results(place / f'{name}{count}')['rows'][0]['likelihood'] for name in ('cut', 'whole'))
    timed = {'trained': 0, 'loss_at_equal_seconds': 0}
    assert row | timed == other | timed and row['fill_accuracy'][0] >= 0


@pytest.mark.slow
def test_a_second_seed_is_trained_beside_the_first(place, words, calls):
    compare.main(words('seeds', '--variants=gpt2', '--seeds=3', '--samples=0'))
    compare.main(words('seeds', '--variants=gpt2', '--seeds=3,4', '--samples=0'))
    assert len(calls) == 2 and '--seed=4' in calls[1]
    assert results(place / 'seeds')['rows'][0]['likelihood']['loss'][1] > 0


@pytest.mark.slow
def test_a_budget_in_seconds_is_that_of_the_measured_speed(place, words, calls):
    compare.main(words('seconds', '--variants=gpt2', '--seeds=5,6', '--samples=0', '--seconds=0.5'))
    folder = place / 'seconds' / 'runs'
    speeds = sorted(entry['tokens_per_s'] for entry in read_lines(folder / 'gpt2-trial') if 'tokens_per_s' in entry)
    expected = max(1, round(0.5 * speeds[1] / 128))
    assert len(speeds) == 3 and len(calls) == 3
    assert [state_of(folder / f'gpt2_seed{seed}')['iter_num'] for seed in (5, 6)] == [expected] * 2
    assert results(place / 'seconds')['facts']['budget'] == '0.5 seconds a run'
    with pytest.raises(UserError, match='gpt2-trial holds a run with block_size=16, not 8'):
        (place / 'other.py').write_text(RECIPE.replace('block_size = 16', 'block_size = 8'))
        compare.main(words('seconds', '--variants=gpt2', '--seeds=5,6', '--samples=0', '--seconds=0.5', '--length=8',
                           f'--recipe={place}/other.py'))


# ---------------------------------------------------------------------------------------------------------------------
# tuning

@pytest.mark.slow
def test_learning_rates_are_tuned_on_another_seed_and_taken_by_all(place, words, calls, monkeypatch):
    (place / 'floor.py').write_text(RECIPE + 'min_lr = 1e-3\n')
    args = words('tuned', '--variants=gpt2,diffusion blocks', '--seeds=1,2', '--samples=0', '--tune=3',
                 f'--recipe={place}/floor.py')
    real = compare.call

    def stopped(config, given):
        real(config, given[:2])
        raise SystemExit(143)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(compare, 'call', stopped)
        compare.main(args)
    compare.main(args)
    assert len(calls) == 6 + 4  # no try twice
    folder, found = place / 'tuned' / 'runs', results(place / 'tuned')
    for name, dashed in (('gpt2', 'gpt2'), ('diffusion blocks', 'diffusion-blocks')):
        states = [state_of(folder / f'{dashed}_tune_x{factor}') for factor in ('0.5', '1', '2')]
        assert [state['iter_num'] for state in states] == [2] * 3  # a quarter of 8
        assert {state['config']['seed'] for state in states} == {tuning.SEED}
        rates = [(state['config']['learning_rate'], state['config']['min_lr']) for state in states]
        assert rates == [(0.005, 0.0005), (0.01, 0.001), (0.02, 0.002)]
        told = found['tuning'][name]
        assert [tried['learning_rate'] for tried in told['tries']] == [0.005, 0.01, 0.02]
        losses = [read_lines(str(folder / f'{dashed}_tune_x{factor}'))[-1]['val_loss'] for factor in ('0.5', '1', '2')]
        assert [tried['val_loss'] for tried in told['tries']] == losses
        best = rates[losses.index(min(losses))]
        assert told['learning_rate'] == best[0] and told['at_the_edge'] == (best[0] != 0.01)
        for seed in (1, 2):
            config = state_of(folder / f'{dashed}_seed{seed}')['config']
            assert (config['learning_rate'], config['min_lr']) == best
            assert f'--learning_rate={best[0]}' in found['commands'][f'{dashed}_seed{seed}']['command']
    assert found['tuning']['diffusion blocks']['measure'] == 'nelbo'
    assert found['facts']['hours of tuning'] >= 0 and 'gpt2_tune_x0.5' in found['commands']
    page = (place / 'tuned' / 'report.html').read_text(encoding='utf-8')
    assert 'at the edge of the ladder' in page
    compare.main(args)
    assert len(calls) == 10 and results(place / 'tuned')['tuning'] == found['tuning']


def test_tries_that_diverged_are_known_and_no_variant_is_left(place, words, calls):
    (place / 'wild.py').write_text(RECIPE.replace('1e-2', '1e30'))
    args = words('wild', '--variants=gpt2', '--seeds=1', '--samples=0', '--tune=2', f'--recipe={place}/wild.py')
    for _ in range(2):
        with pytest.raises(UserError, match='all runs diverged'):
            compare.main(args)
        assert len(calls) == 2


# ---------------------------------------------------------------------------------------------------------------------
# the estimate

@pytest.mark.parametrize('change', [{'device': 'cuda'}, {'dtype_used': 'float16'}, {'batch_size': 4},
                                    {'threads': 7}])
def test_the_estimate_takes_no_speed_of_other_runs(place, words, calls, tmp_path, change):
    def estimate(*args):
        args = words('none', '--variants=gpt2', '--seeds=1', '--samples=0', f'--out_dir={tmp_path}', *args)
        config, _ = compare.configure(args, compare.CompareConfig)
        here = compare.what_remains(config, compare.plan(config))['gpt2']
        return here.speed and sum(here.seconds(costs.RUNS))
    log, settings = (tmp_path / 'runs' / 'gpt2-trial' / name for name in ('metrics.jsonl', 'config.json'))
    in_time, in_tokens = '--seconds=1', '--tokens=8192'
    assert 0.5 < estimate(in_time) < 3 and len(calls) == 1
    log.write_text(re.sub(r'"tokens_per_s": [0-9.]+', '"tokens_per_s": 128.0', log.read_text()))
    assert 64 <= estimate(in_tokens) <= 128 and len(calls) == 1
    settings.write_text(json.dumps(json.loads(settings.read_text()) | change))
    if 'batch_size' not in change:
        assert estimate(in_time) is None and len(calls) == 1  # the budget remains that of the trial
    assert estimate(in_tokens) < 32 and len(calls) == 2 and '--overwrite=True' in calls[1]
    assert estimate(in_tokens) < 32 and len(calls) == 2


@pytest.mark.slow
def test_the_cost_is_said_before_training_and_again_what_remains(place, words, calls, monkeypatch, capsys):
    args = words('cost', '--variants=gpt2,drifting', '--seeds=1', '--samples=0', '--tokens=8192')

    def stop(config, runs):
        raise SystemExit(143)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(compare, 'train_all', stop)
        compare.main(args)
    assert len(calls) == 2 and all('--learning_rate=0' in words for words in calls)  # trials alone, without an encoder
    assert f'--encoder={place}/cost/runs/gpt2-trial' in calls[1]
    said = capsys.readouterr().out
    assert all(re.search(fr'^  {name} +runs +1, tries +0, tokens +8,192 +\S+ core-hours$', said, re.MULTILINE)
               for name in ('encoder', 'gpt2', 'drifting')), said
    assert ' on 1 core;' in said
    compare.main(args)
    assert len(calls) == 5 and f'--encoder={place}/cost/runs/encoder' in calls[4]
    capsys.readouterr()
    compare.main(args)
    assert len(calls) == 5 and 'nothing is left to train' in capsys.readouterr().out


@pytest.fixture(scope='module')
def judged(place, words):
    """The folder of a finished comparison with a judge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, 'call', lambda config, calls: [train_here(arguments) for arguments, _ in calls])
        compare.main(words('judged', '--variants=gpt2', '--seeds=1'))
    return place / 'judged'


# ---------------------------------------------------------------------------------------------------------------------
# what is there already, and mistakes

@pytest.mark.parametrize('args, differing', [
    (['--tune=2'], 'learning rate is not tuned yet'),
    (['--tokens=2048'], 'max_iters=8, not 16'), (['--dataset=text_byte'], 'dataset=text_bpe280, not text_byte'),
    (['--recipe={place}/faster.py'], 'learning_rate=0.01, not 0.02')])
def test_runs_of_another_comparison_are_refused(place, words, judged, calls, args, differing):
    (place / 'faster.py').write_text(RECIPE.replace('1e-2', '2e-2'))
    before = (judged / 'results.json').read_bytes()
    with pytest.raises(UserError, match=f'{differing}.*--out_dir'):
        compare.main(words('judged', '--variants=gpt2', '--seeds=1,2', *(arg.format(place=place) for arg in args)))
    assert not calls and (judged / 'results.json').read_bytes() == before


def test_runs_on_a_text_that_was_prepared_anew_are_refused(place, words, calls, tmp_path):
    def args(*more):
        return words('anew', '--dataset=mine_byte', f'--data_dir={tmp_path}', '--variants=gpt2', '--samples=0', *more)
    for text in ('one text ' * 400, 'another text ' * 400):
        (tmp_path / 'mine.txt').write_text(text)
        prepare.main([f'--input={tmp_path}/mine.txt', '--name=mine', '--tokenizer=byte', f'--data_dir={tmp_path}'])
        if text.startswith('one'):
            compare.main(args('--seeds=1'))
    before = len(calls)
    with pytest.raises(UserError, match='another text.*prepared anew.*--out_dir'):
        compare.main(args('--seeds=1,2'))
    assert len(calls) == before


def test_another_device_goes_on_with_the_comparison(words, judged):
    """Where refinement turns out to be impossible on one, nothing that was trained there is lost."""
    words = words('judged', '--variants=gpt2', '--seeds=1', '--device=auto')
    config, _ = compare.configure(words, compare.CompareConfig)
    compare.check_same_runs(config, compare.plan(config))


@pytest.mark.slow
def test_an_evaluation_is_that_of_its_checkpoint_judge_and_text(words, judged, monkeypatch):
    done, real = [], compare.evaluate.likelihood
    monkeypatch.setattr(compare.evaluate, 'likelihood', lambda *args: done.append(args) or real(*args))

    def evaluations(*args):
        done.clear()
        compare.main(words('judged', '--variants=gpt2', '--seeds=1', *args))
        return len(done)
    assert evaluations() == 0 and evaluations('--length=12') == 1 and evaluations() == 1
    for name in ('judge', 'gpt2_seed1'):
        path = checkpoint.find(str(judged / 'runs' / name))
        torch.save(checkpoint.load(path) | {'run_id': f'another {name}'}, path)
        assert evaluations() == 1 and evaluations() == 0
    path = judged / 'runs' / 'gpt2_seed1' / 'evaluation.json'
    path.write_text(path.read_text()[:100])  # a kill while it was written
    with open(judged / 'runs' / 'gpt2_seed1' / 'metrics.jsonl', 'a') as f:
        f.write('{"iter": 9, "lo')
    assert evaluations() == 1 and evaluations() == 0
    assert not glob.glob(f'{judged}/**/*.tmp', recursive=True)


@pytest.mark.parametrize('recipe', sorted(glob.glob(f'{ROOT}/config/**/*.py', recursive=True)))
def test_every_recipe_can_be_shared(place, words, recipe):
    args = [f'--recipe={recipe}', '--dataset=text_byte', '--samples=0', '--tokens=1e8']
    if read_config_file(recipe).get('init_from'):
        with pytest.raises(UserError, match='from scratch'):
            compare.plan(compare.configure(words('none', *args), compare.CompareConfig)[0])
        return
    config, _ = compare.configure(words('none', *args), compare.CompareConfig)
    runs = compare.plan(config)
    assert len(runs) == 1 + 3 * len(TYPES)
    for planned in runs:
        max_iters = compare.iterations(config, planned)
        settings, model_config, _ = train.read_settings([*planned.words, *planned.length(max_iters)])
        asked = compare.VARIANTS[planned.variant]
        assert model_config.model_type == asked.get('model_type', 'gpt2') and settings.num_epochs == 0
        tokens = settings.batch_size * settings.gradient_accumulation_steps * model_config.block_size
        assert settings.max_iters == max_iters == round(1e8 / tokens)
        assert train.Schedule(settings, 1000, 1).warmup <= max(max_iters / 10, settings.warmup_ratio * max_iters + 1)
        assert settings.eval_interval <= max(1, max_iters / compare.EVALUATIONS)
        assert train.Schedule(settings, 1000, 1).end == max_iters


def measured_rows(planned, words):
    """How many sequences go through a model in the evaluations of a run; in training one costs about three times as much."""
    settings, model_config, _ = train.read_settings(words)
    objective = TYPES[model_config.model_type].objective(model_config)
    tokens = torch.zeros(settings.batch_size, objective.window(model_config.block_size), dtype=torch.long)
    X, _, _ = (objective.eval_batch or objective.make_batch)(tokens, torch.Generator())
    batches = settings.eval_iters or math.ceil(len(planned.windows('val')) / settings.batch_size)
    evaluations = settings.max_iters // settings.eval_interval + 1
    return 2 * batches * evaluations * len(X)


@pytest.mark.parametrize('asked, max_iters', [
    (80, 100_000), (2, 100), (80, 1000), (80, 100), (80, 8), (0, 100_000), (0, 200), (0, 10)])
def test_evaluations_of_a_short_run_take_no_longer_than_its_training(place, words, asked, max_iters):
    (place / 'evaluated.py').write_text(RECIPE.replace('eval_iters = 2', f'eval_iters = {asked}')
                                        .replace('eval_interval = 4', 'eval_interval = 1000'))
    variants = 'gpt2,duo,diffusion' if max_iters >= 100 else 'gpt2'  # one batch is the least
    args = words('none', f'--recipe={place}/evaluated.py', f'--variants={variants}', '--seeds=1', '--samples=0')
    for planned in compare.plan(compare.configure(args, compare.CompareConfig)[0]):
        given = [*planned.words, *planned.length(max_iters)]
        settings, _, _ = train.read_settings(given)
        most = 3 * max_iters * settings.batch_size
        assert measured_rows(planned, given) <= most and planned.evaluation_share(compare.run_of(given)) <= 1
        if 4 * measured_rows(planned, [*given, f'--eval_iters={asked}']) <= most:  # there is time for what the recipe asks
            assert settings.eval_iters == asked
        elif asked:
            assert 1 <= settings.eval_iters <= asked


def test_a_type_with_a_recipe_of_its_own_keeps_the_options_in_it(place, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = words('none', '--dataset=text_byte', '--samples=0', '--tokens=1e8', '--variants=gpt2,drifting,drifting straight',
                 '--seeds=1')
    found = {}
    for given in (args[1:], args):  # without and with a recipe for all
        config, _ = compare.configure(given, compare.CompareConfig)
        runs = {planned.variant: planned.model_config for planned in compare.plan(config)}
        found[len(found)] = [(runs[name].drift_features, runs[name].drift_output) for name in runs if name != 'gpt2']
    assert found == {0: [('tokens', 'soft'), ('tokens', 'straight')], 1: [('states', 'embedding'), ('states', 'straight')]}


@pytest.mark.parametrize('args, message', [
    (['--variants=gpt3'], 'heat adaptive'), (['--seeds=a'], 'seeds'), (['--tokens=0'], 'tokens'),
    (['--dataset=nowhere'], 'nowhere'), (['--tokens=nan'], 'finite'), (['--tokens=inf'], 'finite'),
    (['--seconds=nan'], 'finite'),
    (['--launch=nothing-of-the-sort'], 'no program'), (["--launch='"], 'no command line'), (['--length=1'], 'at least 4'),
    (['--length=17'], '16 tokens'), (['--samples=-1'], 'samples'), (['--samples=9'], 'at least 10'),
    (['--samples=100000'], '--samples='), (['--variants=gpt2,heat,gpt2'], 'twice'), (['--seeds=1,2,01'], 'twice'),
    (['--seeds=1,1000'], 'judge'), (['--tune=1'], '--tune=3'), (['--tune=16'], 'at most 15'),
    (['--tune=2', '--seeds=1002'], '1002 is that of the tries'), (['--jobs=0'], 'at least 1'),
    (['--jobs=100000'], 'CPU cores here; --jobs='), (['--jobs=2', '--launch=env'], 'leave --jobs out'),
    (['--seeds=1001'], 'encoder'), (['--tokens=10'], '--tokens=128'),
    (['--recipe=nowhere.py'], 'nowhere.py'), (['--device=abacus'], 'device'), (['--seeds=9223372036854775808'], 'seed='),
])
def test_mistakes_are_one_line_and_nothing_is_written(place, words, calls, args, message):
    with pytest.raises(UserError, match=message):
        compare.main(words('wrong', *args))
    assert not calls and not (place / 'wrong').exists()


def test_each_run_has_a_gpu_of_its_own(place, words, calls, monkeypatch):
    monkeypatch.setattr(compare, 'pick_device', lambda device, float64=False: torch.device('cuda:0'))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(UserError, match='jobs=3: .* there are 2 here; --jobs=2'):
        compare.main(words('wrong', '--jobs=3', '--device=cuda'))
    with pytest.raises(UserError, match='device=cuda:1 is one GPU.*--device=cuda '):
        compare.main(words('wrong', '--jobs=2', '--device=cuda:1'))


def test_a_folder_that_cannot_be_written_is_one_line(place, words, calls):
    with pytest.raises(UserError, match='out_dir='):
        compare.main(words('text.txt'))
    assert not calls


def test_a_variant_that_diverges_is_left_out_and_the_others_go_on(place, words, monkeypatch):
    monkeypatch.setattr(compare, 'call', lambda config, calls: [
        not any('heat_seed1' in word for word in arguments) and train_here(arguments) for arguments, _ in calls])
    compare.main(words('diverging', '--variants=gpt2,heat', '--seeds=1', '--samples=0'))
    found = results(place / 'diverging')
    assert [row['variant'] for row in found['rows']] == ['gpt2'] and found['facts']['diverged, left out'] == 'heat, seed 1'
    with pytest.raises(UserError, match='all runs diverged'):
        compare.main(words('nothing', '--variants=heat', '--seeds=1', '--samples=0'))


@pytest.mark.slow
def test_runs_side_by_side_are_those_one_after_the_other(place, words, calls, capfd):
    """With the real commands, of which one diverges and one has no text."""
    args = ['--variants=gpt2,duo', '--seeds=1,2', '--samples=0']
    compare.main(words('in_turn', *args))
    config, _ = compare.configure(words('at_once', *args, '--jobs=2'), compare.CompareConfig)
    os.makedirs(config.runs)
    runs = [planned.of_length(8) for planned in compare.plan(config)]
    program = [sys.executable, os.path.join(ROOT, 'train.py')]
    assert jobs.call_all([(run.words, run.folder) for run in runs], program, 2, 'cpu') == [True] * 4
    said = capfd.readouterr().out
    for run in runs:
        name = os.path.basename(run.folder)
        assert f'>> {run.folder}.txt' in said and f'{name}: done' in said
        assert 'iter 8: ' in open(f'{run.folder}.txt', encoding='utf-8').read()
        weights, others = (state_of(place / folder / 'runs' / name)['model'] for folder in ('at_once', 'in_turn'))
        assert all(torch.equal(weights[key], others[key]) for key in others)
    wild, lost = str(place / 'at_once' / 'wild'), str(place / 'at_once' / 'lost')
    several = [([*runs[0].words, f'--out_dir={wild}', '--learning_rate=1e30', '--warmup_iters=0', '--max_iters=8'], wild),
               ([*runs[0].words, f'--out_dir={lost}', '--dataset=nothing'], lost)]
    assert jobs.call_all(several[:1], program, 2, 'cpu') == [False] and 'wild: diverged' in capfd.readouterr().out
    with pytest.raises(SystemExit) as e:
        jobs.call_all(several[1:], program, 2, 'cpu')
    assert e.value.code == 2 and re.search(fr"nothing.*\(from {lost}\.txt\)", capfd.readouterr().err)


@pytest.mark.slow
def test_torchrun_does_not_hide_that_a_run_diverged(place, words):
    """Its exit code is its own. What fails for another reason ends the comparison."""
    launch = f'{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2'
    config, _ = compare.configure(words('torchrun', f'--launch={launch}'), compare.CompareConfig)
    folder = str(place / 'torchrun' / 'run')
    arguments = [f'{place}/recipe.py', '--dataset=text_bpe280', f'--data_dir={place}', '--device=cpu', '--max_iters=8',
                 '--gradient_accumulation_steps=2', f'--out_dir={folder}']
    assert compare.call(config, [([*arguments, '--learning_rate=1e30', '--warmup_iters=0'], folder)]) == [False]
    assert json.loads(open(f'{folder}/metrics.jsonl', encoding='utf-8').readlines()[-1])['diverged']
    with pytest.raises(SystemExit):
        compare.call(config, [([*arguments, '--gradient_accumulation_steps=3', '--overwrite=True'], folder)])
