"""nanodrift/system.py: systems that these tests do not run on, by what they answer."""
import errno
import io
import os
import sys

import pytest

from nanodrift import system


def test_windows_waits_for_whoever_reads_the_file(tmp_path, monkeypatch):
    refusals, real = [PermissionError(13, 'Access is denied')] * 3, os.replace

    def replace(source, target):
        if refusals:
            raise refusals.pop()
        real(source, target)
    (tmp_path / 'new').write_text('new')
    monkeypatch.setattr(system, 'WAITS', [0.0] * 5)
    monkeypatch.setattr(os, 'replace', replace)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'name', 'nt')
        system.move(f'{tmp_path}/new', f'{tmp_path}/old')
    assert (tmp_path / 'old').read_text() == 'new' and not refusals
    refusals += [PermissionError(13, 'Access is denied')]
    with pytest.raises(PermissionError):  # elsewhere it means what it says
        system.move(f'{tmp_path}/old', f'{tmp_path}/new')


@pytest.mark.skipif(os.name != 'posix', reason='flushes folders')
def test_a_folder_that_cannot_be_flushed_is_no_fault(tmp_path, monkeypatch):
    """As on network file systems of Windows."""
    def fsync(fd):
        raise OSError(errno.EINVAL, 'Invalid argument')
    monkeypatch.setattr(os, 'fsync', fsync)
    system.flush_folder(tmp_path)


@pytest.mark.parametrize('files, most', [
    ({}, None), ({'cpu.max': 'max 100000'}, None), ({'cpu.max': '150000 100000'}, 1.5),
    ({'cpu/cpu.cfs_quota_us': '-1', 'cpu/cpu.cfs_period_us': '100000'}, None),
    ({'cpu/cpu.cfs_quota_us': '50000', 'cpu/cpu.cfs_period_us': '100000'}, 0.5)])
def test_the_cores_of_a_container(tmp_path, monkeypatch, files, most):
    (tmp_path / 'cpu').mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(system, 'CGROUP', str(tmp_path))
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(8)), raising=False)
    assert system.quota() == most and system.cores() == {None: 8, 1.5: 2, 0.5: 1}[most]


def test_stdout_of_a_notebook_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, 'stdout', io.StringIO())
    system.print_utf8()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding='ascii'))
    system.print_utf8()
    print('é', flush=True)
    assert sys.stdout.buffer.getvalue().decode('utf-8') == f'é{os.linesep}'
