"""Commands side by side: at most so many at once, signals for all of them, an end for all where one fails."""
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from nanodrift import jobs
from nanodrift.machine import STOPPING
from nanodrift.options import UserError

# writes its start and its end; with 'wait' it ends a while after SIGTERM, with exit code 7, as a run that saves does
CHILD = '''
import signal, sys, time
name, what = sys.argv[1:]
def tell(word):
    open(name, 'a').write(word + '\\n')
def end(number, frame):
    tell('told')
    time.sleep(0.3)
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
tell('begun')
time.sleep({'short': 0.3, 'wait': 60, 'fail': 0.1}[what])
tell('ended')
sys.exit(what == 'fail')
'''


@pytest.fixture
def go(tmp_path):
    """go(whats, at_once) runs commands of these kinds -> [(i, slot, exit code)] in the order of their ends."""
    def words_of(i):
        path = tmp_path / str(i)
        return path.read_text().split() if path.exists() else []

    def go(whats, at_once, ended=lambda i, code: None):
        slots, ends, alive = {}, [], set()

        def start(i, slot):
            assert len(alive) < at_once and slot not in {slots[n] for n in alive} and 0 <= slot < at_once
            slots[i] = slot
            alive.add(i)
            return subprocess.Popen([sys.executable, '-c', CHILD, str(tmp_path / str(i)), whats[i]], start_new_session=True)

        def note(i, code):
            alive.remove(i)
            ends.append((i, slots[i], code))
            ended(i, code)
        jobs.run_all(start, note, len(whats), at_once)
        return ends
    go.words_of = words_of
    return go


@pytest.mark.parametrize('at_once, device', [(1, 'cpu'), (2, 'cpu'), (2, 'cuda:0')])
def test_each_has_its_share_of_the_cores_or_a_gpu(tmp_path, monkeypatch, capfd, at_once, device):
    """Of two, each is told its slot as its GPU, and half of the threads; one alone is told nothing."""
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 6)
    monkeypatch.setenv('OMP_NUM_THREADS', '6')
    told = 'import os, sys, time; print(*sys.argv[1:], os.environ["OMP_NUM_THREADS"], flush=True); time.sleep(0.5)'
    folders = [str(tmp_path / name) for name in 'ab']
    for _ in range(2):  # a second time in the same place is added
        calls = [(['x'], folder) for folder in folders]
        assert jobs.call_all(calls, [sys.executable, '-c', told], at_once, device) == [True] * 2
    if at_once == 1:
        assert os.listdir(tmp_path) == [] and capfd.readouterr().out.count('x 6\n') == 4
        return
    gpus = {'cpu': ['', ''], 'cuda:0': ['--device=cuda:0 ', '--device=cuda:1 ']}[device]
    assert [open(f'{folder}.txt', encoding='utf-8').read() for folder in folders] == [f'x {gpu}3\n' * 2 for gpu in gpus]


def test_so_many_at_once_each_in_a_slot_of_its_own(go):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert [(i, slot) for i, slot, _ in go(['short'] * 3, 1)] == [(0, 0), (1, 0), (2, 0)]
    ends = go(['short', 'fail', 'short', 'short'], 2)
    assert sorted((i, code) for i, _, code in ends) == [(0, 0), (1, 1), (2, 0), (3, 0)]
    assert {slot for _, slot, _ in ends} == {0, 1}
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


@pytest.mark.parametrize('number', STOPPING)
def test_a_signal_reaches_all_once_and_nothing_more_begins(go, number):
    def send():
        while not (go.words_of(0) and go.words_of(1)):
            time.sleep(0.02)
        os.kill(os.getpid(), number)
        time.sleep(0.15)
        os.kill(os.getpid(), number)  # an impatient second one, which is not passed on
    sender = threading.Thread(target=send)
    signal.signal(number, lambda *_: None)  # the second one may come when all have ended
    sender.start()
    with pytest.raises(SystemExit) as e:
        go(['wait', 'wait', 'short'], 2)
    sender.join()
    assert e.value.code == 128 + number
    assert [go.words_of(i) for i in range(3)] == [['begun', 'told'], ['begun', 'told'], []]


def test_where_one_fails_the_others_are_told_and_waited_for(go):
    def ended(i, code):
        while not go.words_of(0):
            time.sleep(0.02)
        raise SystemExit(code)
    with pytest.raises(SystemExit) as e:
        go(['wait', 'fail', 'short'], 2, ended)
    assert e.value.code == 1 and go.words_of(0) == ['begun', 'told'] and go.words_of(2) == []


def test_what_hangs_is_killed_by_a_second_signal(capfd):
    """Here it comes a second after the first; so long what train.py writes is waited for."""
    program = ('import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print("begun", flush=True); '
               'time.sleep(60)')
    children = []

    def start(i, slot):
        children.append(subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, start_new_session=True))
        assert children[i].stdout.readline() == b'begun\n'
        for after in (0.5, 5.0) if i == 1 else ():
            threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
        return children[i]
    with pytest.raises(SystemExit) as e:
        jobs.run_all(start, lambda i, code: None, 2, 2)
    assert e.value.code == 130 and [child.returncode for child in children] == [-signal.SIGKILL] * 2
    assert 'waiting for 2 of train.py to save; Ctrl-C once more' in capfd.readouterr().err


def test_a_signal_that_is_ignored_stays_so(go):
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert [code for *_, code in go(['short'], 1, lambda i, code: os.kill(os.getpid(), signal.SIGHUP))] == [0]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize('said, told', [
    ('print("train.py: the reason"); print("later")', 'train.py: the reason'), ('print("just this")', 'just this'),
    ('pass', 'it said nothing'), (r'import os; os.write(1, b"\xff no Unicode\n")', '\ufffd no Unicode')])
def test_a_failure_is_told_by_what_it_said_this_time(tmp_path, capfd, said, told):
    folder = str(tmp_path / 'run')
    (tmp_path / 'run.txt').write_text('train.py: an earlier reason\n')
    with pytest.raises(SystemExit) as e:
        jobs.call_all([([f'{said}\nraise SystemExit(2)'], folder)], [sys.executable, '-c'], 2, 'cpu')
    assert e.value.code == 2 and capfd.readouterr().err == f'run, exit code 2: {told} (from {folder}.txt)\n'


def test_what_cannot_be_started_is_one_line(tmp_path):
    with pytest.raises(UserError, match='cannot start .*nowhere/run: No such file or directory'):
        jobs.call_all([(['x'], str(tmp_path / 'nowhere' / 'run'))], [sys.executable], 2, 'cpu')
