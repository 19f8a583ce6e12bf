"""experiments/faults.py, a few tries of each: the table in docs/reliability.md has many."""
import os
import subprocess
import sys

import pytest

from experiments import faults

LINUX = pytest.mark.skipif(not os.path.isdir('/proc/self/task'), reason='needs Linux')
TRIES = {'kill': 3, 'damage': 4, 'full': 4, 'read_only': 5, 'data_gone': 2, 'ranks': 1, 'hung': 1, 'long': 1}


def may_mount():
    """Whether a file system can be mounted here, as root can in most places."""
    code = 'import sys, tempfile, os; from subprocess import call; d = tempfile.mkdtemp(); ' \
           'sys.exit(call(["mount", "-t", "tmpfs", "tmpfs", d]) or call(["umount", d]) or os.rmdir(d))'
    return subprocess.run([sys.executable, '-c', code], stderr=subprocess.DEVNULL).returncode == 0


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    faults.FORKS.set_forkserver_preload(['conftest', 'experiments.faults', 'torch._dynamo'])
    return faults.Place(str(tmp_path_factory.mktemp('faults')), int.from_bytes(os.urandom(4), 'big'))


def test_every_experiment_is_tried():
    assert list(TRIES) == list(faults.EXPERIMENTS)


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize('name', TRIES)
def test_runs_survive(place, monkeypatch, capsys, name):
    if name in ('full', 'read_only') and not may_mount():
        pytest.skip('needs the right to mount a file system')
    monkeypatch.setattr(faults, 'LONG', 1200)
    row = faults.attempt(place, name, TRIES[name])
    assert row.split(' | ')[4] == '0', capsys.readouterr().out


@LINUX
@pytest.mark.slow
def test_what_is_lost_is_noticed(place):
    """A line of the log that is missing, and weights that are others."""
    straight, _ = place.reference('gpt2')
    for file, change in (('metrics.jsonl', lambda text: text[text.index(b'\n') + 1:]), ('seed', None)):
        if change:
            faults.shutil.copytree(straight, place.path('run'))
            with open(f'{straight}/{file}', 'rb') as f:
                text = change(f.read())
            with open(place.path(f'run/{file}'), 'wb') as f:
                f.write(text)
        else:
            place.run(faults.train.main, place.words('gpt2', 'run', seed=7))
        with pytest.raises(faults.Lost, match='metrics.jsonl differs'):
            place.check('gpt2', 'run')
        faults.shutil.rmtree(place.path('run'))
