"""
Commands that run side by side: a comparison's runs. Ctrl-C and SIGTERM reach all of them.
"""
import os
import shlex
import signal
import subprocess
import sys
import time

import torch

from nanodrift.runs import divergence

POLL = 0.1  # seconds between two looks at what runs


def run_all(start, ended, count, at_once):
    """Runs `count` commands, `at_once` of them at a time: start(i, slot) starts one of them and returns its Popen, ended(i,
    exit code) is told of its end. No two that run at the same time have the same slot, which is below at_once.

    Ctrl-C and SIGTERM are passed on to what runs, and nothing is started after them; when all has ended, SystemExit is
    raised with 128 + the signal. If `ended` raises, the commands that still run are sent SIGTERM and waited for."""
    stopped, running, waiting = [], {}, list(range(count))
    before = {number: signal.signal(number, lambda number, frame: stopped.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        passed_on = False
        while running or waiting and not stopped:
            while waiting and not stopped and len(running) < at_once:
                i, slot = waiting.pop(0), next(n for n in range(at_once) if n not in running)
                running[slot] = i, start(i, slot)
            if stopped and not passed_on:  # once: a second signal would end train.py without a save
                passed_on = True
                for _, child in running.values():
                    tell(child, stopped[0])
            for slot, (i, child) in list(running.items()):
                if child.poll() is not None:
                    del running[slot]
                    if not stopped:
                        ended(i, child.returncode)
            time.sleep(POLL)
        if stopped:
            raise SystemExit(128 + stopped[0])
    finally:
        for _, child in running.values():
            tell(child, signal.SIGTERM)
        for _, child in running.values():
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def tell(child, number):
    """Sends a signal; on Windows, which can send no Ctrl-C, it ends the command."""
    child.terminate() if os.name == 'nt' else child.send_signal(number)


def threads_of_each(at_once):
    """How many threads a run has where so many run at the same time on this CPU."""
    return max(1, torch.get_num_threads() // at_once)


def call_all(calls, program, at_once, device):
    """Runs a program, train.py, with the words of each of calls, (words, folder of the run) -> whether each came to its end:
    False for a run that diverged. Of several at a time each has its share of the CPU cores, or a GPU of its own, and writes
    to a file next to its folder. Ends with the exit code of one that fails otherwise, or with that of a signal."""
    came_to_its_end, earlier = [False] * len(calls), [divergence(folder) for _, folder in calls]

    def start(i, slot):
        words, folder = calls[i]
        command = [*program, *words]
        # a session of its own: the terminal would send Ctrl-C a second time, which ends train.py without a save
        how = {'stdin': subprocess.DEVNULL, 'start_new_session': True}
        if at_once == 1:
            print('\n$ ' + shlex.join(command), flush=True)
            return subprocess.Popen(command, **how)
        if device.startswith('cuda'):
            command.append(f'--device=cuda:{slot}')
        print(f'$ {shlex.join(command)} >> {folder}.txt', flush=True)
        with open(f'{folder}.txt', 'a', encoding='utf-8') as log:
            return subprocess.Popen(command, **how, stdout=log, stderr=log,
                                    env=os.environ | {'OMP_NUM_THREADS': str(threads_of_each(at_once))})

    def ended(i, code):
        folder = calls[i][1]
        came_to_its_end[i] = code == 0
        diverged = code and divergence(folder) not in (None, earlier[i])  # torchrun has an exit code of its own
        if at_once > 1:
            result = 'diverged' if diverged else f'exit code {code}' if code else 'done'
            print(f'{os.path.basename(folder)}: {result}', flush=True)
        if code and not diverged:
            if at_once > 1:
                with open(f'{folder}.txt', encoding='utf-8') as log:
                    sys.stderr.write(f'{(log.readlines() or [""])[-1].strip()} (from {folder}.txt)\n')
            raise SystemExit(code if code > 0 else 128 - code)
    run_all(start, ended, len(calls), at_once)
    return came_to_its_end
