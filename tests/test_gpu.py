"""The checks of `make gpu`: on a GPU where there is one, else on the CPU, which shows that the checks themselves are right.
Then the report: what fails is a row of it, and the rest goes on."""
import signal

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
    gpu_report.make_data(folder, torch.device('cpu'))
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


# ---------------------------------------------------------------------------------------------------------------------
# the report

def row(check, case, **more):
    return {'check': check, 'case': case, **more}


TODO = [('gradients', 'gpt2'), ('gradients', 'dd'), ('writing', 'gpt2'), ('step', 'gpt2')]


def test_a_check_that_ends_its_process_is_one_row_and_the_next_one_runs():
    started = []

    def start(checks, seconds):
        started.append(list(checks))
        return [row(*check, figures={}) for check in checks[:1]], 134 if len(checks) > 1 else 0
    rows = gpu_report.run_checks(TODO, start, float('inf'))
    assert [(r['check'], r['case']) for r in rows] == TODO
    assert ['error' in r for r in rows] == [False, True, False, True] and 'code 134' in rows[1]['error']
    assert started == [TODO, TODO[2:]]


def test_when_the_time_is_over_the_rest_is_said_not_to_have_run():
    rows = gpu_report.run_checks(TODO, lambda checks, seconds: ([row(*checks[0], figures={})], None), float('inf'))
    assert 'error' not in rows[0] and [r['error'] for r in rows[1:]] == ['not run: no time left'] * 3
    rows = gpu_report.run_checks(TODO, None, 0.0)
    assert [r['error'] for r in rows] == ['not run: no time left'] * 4


def test_the_report_says_what_failed_first(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, 'make_data', lambda *_: None)
    monkeypatch.setattr(gpu_report, 'all_checks', lambda: TODO)
    monkeypatch.setattr(gpu_report, 'measure', lambda part, *_: f'of {part}: 7 tokens/s')
    monkeypatch.setattr(gpu_report, 'start_worker', lambda config, device, folder, checks, seconds: (
        [row(*checks[0], figures={'off': 0.25}, seconds=1.0), row(*checks[1], error='AssertionError: a | b')], None))
    gpu_report.main(['--device=cpu', f'--out={tmp_path / "report.md"}'])
    text = (tmp_path / 'report.md').read_text()
    assert 'not run on a GPU' in text and torch.__version__ in text and 'of train: 7 tokens/s' in text
    assert '1 of 4 checks passed, 1 failed, 2 not run' in text and 'off: 0.25' in text and 'AssertionError: a / b' in text
    assert text.index('| gradients | dd |') < text.index('| gradients | gpt2 |')


@pytest.mark.slow
def test_a_real_worker_goes_on_after_a_failing_check(gpu_folder):
    config = gpu_report.ReportConfig()
    todo = [('gradients', 'gpt2'), ('gradients', 'no such case'), ('step', 'heat')]
    rows, code = gpu_report.start_worker(config, torch.device('cpu'), gpu_folder, todo, 120)
    assert code == 0 and ['error' in r for r in rows] == [False, True, False]


@pytest.mark.slow
def test_everything_in_small(tmp_path):
    """As on a GPU, but for the compiler, whose time is over."""
    assert gpu_report.main(['--device=cpu', f'--out={tmp_path / "report.md"}', '--seconds=30']) is None
    text = (tmp_path / 'report.md').read_text()
    assert text.count('tokens/s') >= 3 and '| passed |' in text
