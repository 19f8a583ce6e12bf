"""The checks of `make gpu`: on a GPU where there is one, else on the CPU, which shows that the checks themselves are right.
Then the report: what fails is a row of it, and the rest goes on."""
import fcntl
import json
import signal
import time
import warnings

import pytest
import torch

import train
from experiments import gpu_report
from experiments.gpu_report import CASES, COMPILED, WITH_ENCODER
from model import TYPES
from nanodrift.variants import VARIANTS, first_of_each_type

FIRST = first_of_each_type(VARIANTS)


@pytest.fixture
def device():
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


@pytest.fixture(scope='session')
def gpu_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('gpu'))
    handlers = {number: signal.getsignal(number) for number in train.STOPPING}
    gpu_report.check_data('gpt2', torch.device('cpu'), folder)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder


def slow_unless_first(names):
    return [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.gpu
@pytest.mark.parametrize('case', CASES)
def test_gradients_are_those_of_float32_on_a_cpu(device, gpu_folder, case):
    gpu_report.check_gradients(case, device, gpu_folder)


@pytest.mark.gpu
@pytest.mark.parametrize('case', slow_unless_first(CASES))
@pytest.mark.parametrize('check', ['writing', 'step'])
def test_writing_and_a_step_of_train_py(device, gpu_folder, case, check):
    gpu_report.CHECKS[check](case, device, gpu_folder)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_resuming(device, gpu_folder, case):
    gpu_report.check_resume(case, device, gpu_folder)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize('case', COMPILED)
def test_compiled_code(device, gpu_folder, case):
    gpu_report.check_compiled(case, device, gpu_folder)


def test_every_type_is_checked_and_compiled():
    for cases in (CASES, COMPILED, [case for case in CASES if case not in WITH_ENCODER] + ['drifting']):
        assert {CASES[case].get('model_type', 'gpt2') for case in cases} == set(TYPES)


def test_a_wrong_gradient_is_seen(device, gpu_folder, monkeypatch):
    real = gpu_report.loss_and_gradients

    def off(model, device, dtype):
        loss, gradients = real(model, device, dtype)
        return loss, gradients * (1.02 if dtype == 'float16' else 1)
    monkeypatch.setattr(gpu_report, 'loss_and_gradients', off)
    with pytest.raises(AssertionError, match='off by 2'):
        gpu_report.check_gradients('gpt2', device, gpu_folder)


@pytest.mark.slow
def test_a_graph_for_each_layer_is_seen(device, gpu_folder, monkeypatch):
    real = gpu_report.build

    def differing(case, device):
        model = real(case, device)
        model.layers[1].ln_1.eps *= 2  # a number that compiled code knows
        return model
    monkeypatch.setattr(gpu_report, 'build', differing)
    with pytest.raises(AssertionError, match='graphs were compiled, not'):
        gpu_report.check_compiled('gpt2', device, gpu_folder)


def test_waits_for_a_gpu_are_found_by_their_lines(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', lambda mode: None)  # which has torch warn as here

    def step():
        warnings.warn('called a synchronizing CUDA operation', stacklevel=1)
        warnings.warn('this one is about something else', stacklevel=1)
    places = gpu_report.find_waits(step)
    assert len(places) == 1 and places[0].startswith('test_gpu.py:')


# ---------------------------------------------------------------------------------------------------------------------
# the report

def row(check, case, **more):
    return {'check': check, 'case': case, **more}


TODO = [('gradients', 'gpt2'), ('gradients', 'dd'), ('writing', 'gpt2'), ('step', 'gpt2')]


def test_a_check_that_ends_its_process_is_one_row_and_the_next_one_runs():
    started = []

    def start(checks, seconds):
        started.append(list(checks))
        return [row(*check, figures={}) for check in checks[:1]], 134 if len(checks) > 1 else 0, 'Aborted'
    rows = gpu_report.run_checks(TODO, start, float('inf'))
    assert [(r['check'], r['case']) for r in rows] == TODO
    assert ['error' in r for r in rows] == [False, True, False, True] and 'code 134' in rows[1]['error']
    assert rows[1]['last_words'] == 'Aborted'
    assert started == [TODO, TODO[2:]]


def test_when_the_time_is_over_the_rest_is_said_not_to_have_run():
    rows = gpu_report.run_checks(TODO, lambda checks, seconds: ([row(*checks[0], figures={})], None, ''), float('inf'))
    assert 'error' not in rows[0] and [r['error'] for r in rows[1:]] == ['not run: no time left'] * 3
    rows = gpu_report.run_checks(TODO, None, 0.0)
    assert [r['error'] for r in rows] == ['not run: no time left'] * 4


def test_the_report_says_what_failed_first(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, 'all_checks', lambda: TODO)
    monkeypatch.setattr(gpu_report, 'measure', lambda part, *_: f'of {part}: 7 tokens/s')
    monkeypatch.setattr(gpu_report, 'start_worker', lambda device, folder, checks, seconds: (
        [row(*checks[0], figures={'off': 0.25}, seconds=1.0),
         row(*checks[1], error='AssertionError: a | b', last_words='line 7, in attend')], None, ''))
    gpu_report.main(['--device=cpu', f'--out={tmp_path / "report.md"}'])
    text = (tmp_path / 'report.md').read_text()
    assert 'not run on a GPU' in text and torch.__version__ in text and 'of train: 7 tokens/s' in text
    assert '1 of 4 checks passed, 1 failed, 2 not run' in text and 'off: 0.25' in text and 'AssertionError: a / b' in text
    assert text.index('| gradients | dd |') < text.index('| gradients | gpt2 |')
    assert text.endswith('## gradients, dd\n\n```\nline 7, in attend\n```\n')


@pytest.mark.slow
def test_without_data_the_checks_that_need_none_run(tmp_path):
    todo = [('data', 'gpt2'), ('gradients', 'gpt2'), ('step', 'gpt2')]
    rows, code, _ = gpu_report.start_worker(torch.device('cpu'), str(tmp_path / 'missing'), todo, 120)
    assert code == 0 and ['error' in r for r in rows] == [True, False, True]
    assert 'FileNotFoundError' in rows[0]['error'] and 'in check_data' in rows[0]['last_words']
    assert 'the data set' in rows[2]['error']


WORKER = '''
import json, os, sys, time
from experiments import gpu_report
gpu_report.CHECK_SECONDS = 1
def innermost():
    time.sleep(60)
def deep(n):
    deep(n - 1) if n else innermost()
def noisy(*_):
    os.write(1, b"no JSON")
    return {}
gpu_report.CHECKS = {'deep': lambda *_: deep(50), 'abort': lambda *_: os.abort(), 'noisy': noisy}
gpu_report.work(json.loads(sys.argv[1]), None, None)
'''


@pytest.mark.slow
def test_a_check_that_hangs_or_crashes_says_where_it_was():
    def start(checks, seconds):
        code, printed, said = gpu_report.run_python(['-c', WORKER, json.dumps(checks)], seconds)
        return [json.loads(line) for line in printed.splitlines()], code, said
    rows = gpu_report.run_checks([('noisy', 'a'), ('deep', 'b'), ('abort', 'c')], start, time.monotonic() + 60)
    assert 'error' not in rows[0] and rows[1]['error'] == 'took more than 90 s' and 'ended with code -6' in rows[2]['error']
    assert all(len(r['last_words'].splitlines()) <= 20 for r in rows[1:])
    assert 'in innermost' in rows[1]['last_words']
    assert 'Aborted' in rows[2]['last_words'] and '<lambda>' in rows[2]['last_words']


BENCH = '''
import subprocess, sys
batch_size = next(int(word.split('=')[1]) for word in sys.argv if 'batch_size' in word)
print(f'batch {batch_size}: 7 tokens/s')
if batch_size > LARGEST:
    sys.exit('bench.py: there is not enough memory: lower --batch_size')
HOLD = """
import fcntl, time
f = open('lock', 'w')
fcntl.flock(f, fcntl.LOCK_EX)
print('held', flush=True)
time.sleep(60)
"""
if WAIT:
    subprocess.run([sys.executable, '-c', HOLD])
'''


def measured(folder, monkeypatch, seconds, **values):
    """What `measure` makes of a small bench.py."""
    (folder / 'bench.py').write_text('\n'.join([*(f'{name} = {value}' for name, value in values.items()), BENCH]))
    monkeypatch.setattr(gpu_report, 'ROOT', str(folder))
    monkeypatch.setitem(gpu_report.BATCHES, 'cpu', (12, 6, 3))
    return gpu_report.measure('train', gpu_report.ReportConfig(), torch.device('cpu'), seconds)


def test_where_memory_is_short_the_batch_is_smaller(tmp_path, monkeypatch):
    text = measured(tmp_path, monkeypatch, 60, LARGEST=6, WAIT=False)
    assert '--batch_size=12 failed with code 1' in text and text.endswith('batch 6: 7 tokens/s\n')
    text = measured(tmp_path, monkeypatch, 60, LARGEST=1, WAIT=False)
    assert text.count('not enough memory') == 3 and '--batch_size=3 failed' in text


@pytest.mark.slow
def test_figures_printed_before_the_time_is_over_are_kept_and_no_process_stays(tmp_path, monkeypatch):
    started = time.monotonic()
    text = measured(tmp_path, monkeypatch, 3, LARGEST=12, WAIT=True)
    assert 'batch 12: 7 tokens/s\nheld\n--batch_size=12 took more than 3 s' in text and 'batch 6' not in text
    with open(tmp_path / 'lock') as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # waits for whoever has it
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_everything_in_small(tmp_path, monkeypatch):
    """As on a GPU whose memory is short, but for the compiler; one variant."""
    checks = [(check, 'gpt2') for check in gpu_report.CHECKS if check != 'compiled']
    monkeypatch.setattr(gpu_report, 'all_checks', lambda: checks)
    monkeypatch.setitem(gpu_report.BATCHES, 'cpu', (10 ** 12, 2))  # no machine has as much
    assert gpu_report.main(['--device=cpu', f'--out={tmp_path / "report.md"}']) is None
    text = (tmp_path / 'report.md').read_text()
    assert '5 of 5 checks passed' in text and '| passed |' in text
    assert text.count('tokens/s') >= 3 and text.count(f'--batch_size={10 ** 12} failed with code 2') == 1
    assert 'batch 2;' in text and text.count('peak memory') == 2
