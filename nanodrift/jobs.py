"""
Commands that run side by side: a comparison's runs. A signal that ends the comparison reaches all of them.
"""
import os
import shlex
import signal
import subprocess
import sys
import time

from nanodrift.machine import STOPPING, threads
from nanodrift.options import UserError
from nanodrift.runlog import tell
from nanodrift.runs import divergence

POLL = 0.1  # seconds between two looks at what runs
# POLITE asks a command to save and end. APART keeps it from a terminal's Ctrl-C, which would reach it a second time.
POLITE = signal.SIGTERM if os.name == 'posix' else signal.CTRL_BREAK_EVENT
APART = {'start_new_session': True} if os.name == 'posix' else {'creationflags': subprocess.CREATE_NEW_PROCESS_GROUP}


def run_all(start, ended, count, at_once):
    """Runs `count` commands, `at_once` of them at a time: start(i, slot) starts one of them and returns its Popen, ended(i,
    exit code) is told of its end. No two that run at the same time have the same slot, which is below at_once.

    After a signal of STOPPING nothing is started; what runs is sent POLITE, and when all has ended, SystemExit is raised
    with 128 + the signal. Where start or ended raises, what still runs is ended in the same way."""
    signals, running, waiting = [], {}, list(range(count))
    before = {number: signal.signal(number, lambda number, frame: signals.append((number, time.monotonic())))
              for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN}  # nohup ignores SIGHUP
    try:
        while (running or waiting) and not signals:
            while waiting and not signals and len(running) < at_once:
                i, slot = waiting.pop(0), next(n for n in range(at_once) if n not in running)
                running[slot] = i, start(i, slot)
            for slot, (i, child) in list(running.items()):
                if not signals and child.poll() is not None:
                    del running[slot]
                    ended(i, child.returncode)
            time.sleep(POLL)
    finally:
        end([child for _, child in running.values() if child.poll() is None], signals)
        for number, handler in before.items():
            signal.signal(number, handler)
    if signals:
        raise SystemExit(128 + signals[0][0])


def end(children, signals):
    """Sends POLITE to commands and waits for them; a signal that comes a second later or more kills them. signals:
    [(number, when)], to which signal handlers add."""
    if not children:
        return
    told = time.monotonic()
    for child in children:
        child.send_signal(POLITE)
    tell(f'waiting for {len(children)} of train.py to save; Ctrl-C once more ends them at once', sys.stderr)
    while any([child.poll() is None for child in children]):
        if any(when > told + 1 for _, when in signals):
            for child in children:
                child.kill()
        time.sleep(POLL)


def threads_of_each(at_once):
    """How many threads a run has where so many run at the same time on this CPU."""
    return max(1, threads() // at_once)


def what_it_said(path, begun):
    """The reason that a run gives for its end, or else its last line, in a file that others may have begun."""
    with open(path, encoding='utf-8', errors='replace') as log:
        log.seek(begun)
        lines = [line.strip() for line in log if line.strip()]
    reasons = [line for line in lines if line.startswith('train.py: ')]
    return f'{(reasons or lines or ["it said nothing"])[-1]} (from {path})'


def call_all(calls, program, at_once, device):
    """Runs a program, train.py, with the words of each of calls, (words, folder of the run) -> whether each came to its end:
    False for a run that diverged. Of several at a time each has its share of the CPU cores, or a GPU of its own, and writes
    to a file next to its folder. Ends with the exit code of one that fails otherwise, or with that of a signal."""
    came_to_its_end, earlier = [False] * len(calls), [divergence(folder) for _, folder in calls]
    begun = [0] * len(calls)  # where the output of this time begins in its file

    def start(i, slot):
        words, folder = calls[i]
        command = [*program, *words]
        how = {'stdin': subprocess.DEVNULL} | APART
        try:
            if at_once == 1:
                tell('\n$ ' + shlex.join(command))
                return subprocess.Popen(command, **how)
            if device.startswith('cuda'):
                command.append(f'--device=cuda:{slot}')
            threads = {name: str(threads_of_each(at_once)) for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
            shown = shlex.join([f'{name}={value}' for name, value in threads.items()] + command)
            tell(f'$ {shown} >> {shlex.quote(folder + ".txt")}')
            with open(f'{folder}.txt', 'ab') as log:
                begun[i] = log.tell()
                return subprocess.Popen(command, **how, stdout=log, stderr=log, env=os.environ | threads)
        except OSError as e:
            raise UserError(f'cannot start {folder}: {e.strerror}') from None

    def ended(i, code):
        folder = calls[i][1]
        came_to_its_end[i] = code == 0
        diverged = code and divergence(folder) not in (None, earlier[i])  # torchrun has an exit code of its own
        if at_once > 1:
            result = 'diverged' if diverged else f'exit code {code}' if code else 'done'
            tell(f'{os.path.basename(folder)}: {result}')
        if code and not diverged:
            if at_once > 1:
                tell(f'{os.path.basename(folder)}, {result}: {what_it_said(folder + ".txt", begun[i])}', sys.stderr)
            raise SystemExit(code if code > 0 else 128 - code)
    run_all(start, ended, len(calls), at_once)
    return came_to_its_end
