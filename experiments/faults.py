"""
Faults injected into runs, and what became of the runs: the table of docs/reliability.md.

    python -m experiments.faults                                  all of it, in less than an hour
    python -m experiments.faults --only=kill,damage --tries=20

A run has survived where its last and best checkpoint and its log, but for the measured speed, are bit for bit those of a
run without the fault. Linux alone; the disks need root. The output is a table in Markdown, after a line for each loss.
"""
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch

import evaluate
import export
import prepare
import train
from model import TYPES
from nanodrift import checkpoint
from nanodrift.options import UserError, check_options, configure, one_of, option, run
from nanodrift.variants import variants_of

FORKS = multiprocessing.get_context('forkserver')
PRELOAD = ['train', 'evaluate', 'prepare', 'export', 'torch._dynamo']  # the last one AdamW imports, in seconds
WAYS = variants_of(TYPES) | {'token drift': {'model_type': 'diffusion', 'diffusion_objective': 'drift'}}
DRIFTING = {'drift_positives': 2, 'drift_prefix': 3, 'drift_features': 'both'}
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=4, max_iters=40, eval_interval=5, eval_iters=2,
            log_interval=1, keep_every=10, learning_rate=1e-2, ema=0.9, device='cpu', dtype='float32', compile=False,
            dataset='words_byte', init_from='auto')
STATE = ('model', 'ema', 'optimizer', 'scaler', 'iter_num', 'best_val_loss', 'random_states', 'examples_seen')
LONG = 20_000  # iterations


@dataclass
class FaultsConfig:
    """Which faults, and how often."""
    only: str = option('', 'experiments, comma between them; empty runs all')
    tries: int = option(0, 'of each experiment; 0 takes what the table in docs/reliability.md has', at_least=0)
    seed: int = option(1, 'of the random moments and places', at_least=0)

    def __post_init__(self):
        check_options(self)
        for name in self.names:
            one_of('only', name, EXPERIMENTS)

    @property
    def names(self):
        return [name.strip() for name in self.only.split(',')] if self.only else list(EXPERIMENTS)


# ---------------------------------------------------------------------------------------------------------------------
# runs

class Place:
    """A folder with a data set, an encoder, and the runs without a fault that others are compared with."""

    def __init__(self, folder, seed):
        self.folder, self.rng, self.straight = folder, random.Random(seed), {}
        words = ['drift', 'noise', 'heat', 'token', 'mask', 'the', 'a', 'of', 'and', 'flows', 'learns', 'cools']
        self.text = os.path.join(folder, 'words.txt')
        with open(self.text, 'w', encoding='utf-8') as f:
            f.write('\n'.join(' '.join(self.rng.choices(words, k=8)) + '.' for _ in range(120)))
        self.run(prepare.main, [f'--input={self.text}', '--name=words', '--tokenizer=byte', f'--data_dir={folder}'])
        self.run(train.main, self.words('gpt2', 'encoder'))

    def path(self, name):
        return os.path.join(self.folder, name)

    def words(self, way, name, **more):
        """The arguments of train.py for a run of this way in the folder `name`."""
        settings = TINY | dict(data_dir=self.folder, out_dir=self.path(name)) | WAYS[way] | more
        if settings.get('model_type') == 'drifting' or way == 'token drift':
            settings |= {'encoder': self.path('encoder')} | (DRIFTING if way != 'token drift' else {})
        return [f'--{key}={value}' for key, value in settings.items()]

    def start(self, main, words):
        """A process of its own; what it says is in self.said()."""
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.path('said'))
        process = FORKS.Process(target=child, args=(self.path('said'), main, words))
        process.start()
        return process

    def said(self):
        with open(self.path('said'), encoding='utf-8') as f:
            return f.read()

    def run(self, main, words, expected=0):
        """Runs a script to its end. Raises Lost where it ends otherwise, or says more than one line about a mistake."""
        process = self.start(main, words)
        process.join()
        if process.exitcode != expected or 'Traceback' in self.said():
            raise Lost(f'exit code {process.exitcode}: {self.said()[-600:]}')

    def reference(self, way, **more):
        """(folder, seconds) of the run of this way without a fault."""
        key = (way, *more.items())
        if key not in self.straight:
            name, started = f'straight{len(self.straight)}', time.perf_counter()
            self.run(train.main, self.words(way, name, **more))
            self.straight[key] = self.path(name), time.perf_counter() - started
        return self.straight[key]

    def check(self, way, name, **more):
        """Raises Lost where a folder does not hold what the run without a fault has; removes the folder."""
        one, other = self.reference(way, **more)[0], self.path(name)
        if lines(one) != lines(other):
            raise Lost(f'{way}: metrics.jsonl differs')
        for which in checkpoint.FILES:
            a, b = (checkpoint.load(checkpoint.find(folder, which)) for folder in (one, other))
            differing = [key for key in STATE if not same(a[key], b[key])]
            if differing:
                raise Lost(f'{way}: {", ".join(differing)} of the {which} checkpoint differ')
        shutil.rmtree(other)


class Lost(Exception):
    """What a fault has cost."""


def child(said, main, words):
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    sys.argv = ['script', *words]
    run(main)


def lines(folder):
    """The lines of metrics.jsonl, each of which must be whole, but for what depends on the clock."""
    with open(os.path.join(folder, 'metrics.jsonl'), encoding='utf-8') as f:
        return [{key: value for key, value in json.loads(line).items() if key != 'tokens_per_s'} for line in f]


def iterations(folder):
    """How many lines a run has written so far."""
    with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, 'metrics.jsonl'), 'rb') as f:
        return f.read().count(b'\n')
    return 0


def same(a, b):
    """Bit by bit."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---------------------------------------------------------------------------------------------------------------------
# faults: each function is one try

def kill(place, i):
    """kill -9 at a random moment, twice"""
    way = list(WAYS)[i % len(WAYS)]
    _, seconds = place.reference(way)
    for _ in range(2):
        process = place.start(train.main, place.words(way, 'run'))
        process.join(place.rng.uniform(0, seconds))
        process.kill()
        process.join()
    place.run(train.main, place.words(way, 'run'))
    place.check(way, 'run')


def damage(place, i):
    """the last checkpoint with a flipped bit (every other try: cut short) at a random place"""
    shutil.copytree(place.reference('gpt2')[0], place.path('run'))
    path = place.path('run/ckpt.pt')
    at = place.rng.randrange(os.path.getsize(path))
    if i % 2:
        os.truncate(path, at)
    else:
        with open(path, 'r+b') as f:
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 1 << place.rng.randrange(8)]))
    place.run(train.main, place.words('gpt2', 'run'))
    if i % 2 and 'going on from' not in place.said():
        raise Lost('not a word of the damage')
    place.check('gpt2', 'run')


@contextlib.contextmanager
def small_disk(place):
    """A file system of 4 MiB at place/disk."""
    folder = place.path('disk')
    os.makedirs(folder, exist_ok=True)
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(['umount', '-l', folder], check=True)


def full(place, i):
    """disk full after a random number of bytes, then room again"""
    script, room = (train, train, prepare, export)[i % 4], place.rng.randrange(4096, 2_000_000)
    straight, _ = place.reference('gpt2')
    with small_disk(place) as disk:
        words = {train: place.words('gpt2', 'disk/run'), export: [f'--out_dir={straight}', f'--to={disk}/run'],
                 prepare: [f'--input={place.text}', '--name=run', '--tokenizer=byte', f'--data_dir={disk}']}[script]
        if script is not train:
            room = place.rng.randrange(4096, 100_000)
        with open(f'{disk}/filler', 'wb') as f:
            f.write(bytes(4 * 2 ** 20 - room))
        process = place.start(script.main, words)
        process.join()
        said = place.said()
        if process.exitcode not in (0, 2) or 'Traceback' in said:
            raise Lost(f'exit code {process.exitcode}: {said[-600:]}')
        if process.exitcode and script is not train and os.listdir(disk) != ['filler']:
            raise Lost(f'left behind: {os.listdir(disk)}')
        os.remove(f'{disk}/filler')
        if process.exitcode or script is train:
            place.run(script.main, words)
        if script is train:
            place.check('gpt2', 'disk/run')


def read_only(place, i):
    """folder read-only, in turn for a start, a resume, an evaluation, a data set, an export; then writable again"""
    straight, _ = place.reference('gpt2')
    with small_disk(place) as disk:
        place.run(train.main, place.words('gpt2', 'disk/run', max_iters=10, lr_decay_iters=40))
        subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
        attempts = [(train.main, place.words('gpt2', 'disk/new'), 2), (train.main, place.words('gpt2', 'disk/run'), 2),
                    (evaluate.main, [f'--out_dir={disk}/run', '--device=cpu'], 0),
                    (prepare.main, [f'--input={place.text}', '--name=new', '--tokenizer=byte', f'--data_dir={disk}'], 2),
                    (export.main, [f'--out_dir={straight}', f'--to={disk}/new'], 2)]
        place.run(*attempts[i % len(attempts)])
        subprocess.run(['mount', '-o', 'remount,rw', disk], check=True)
        place.run(train.main, place.words('gpt2', 'disk/run', lr_decay_iters=40))
        place.check('gpt2', 'disk/run')


def data_gone(place, i):
    """the data set removed (every other try: emptied) at a random moment of a run, then back"""
    _, seconds = place.reference('gpt2')
    folder, kept = place.path('words_byte'), place.path('kept')
    shutil.copytree(folder, kept, dirs_exist_ok=True)
    process = place.start(train.main, place.words('gpt2', 'run'))
    process.join(place.rng.uniform(0, seconds))
    if i % 2:
        os.truncate(f'{folder}/train.bin', 0)
    else:
        shutil.rmtree(folder)
    process.join()
    said = place.said()
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    if process.exitcode not in (0, 2) or 'Traceback' in said:
        raise Lost(f'exit code {process.exitcode}: {said[-600:]}')
    place.run(train.main, place.words('gpt2', 'run'))
    place.check('gpt2', 'run')


def torchrun(place, name, way='gpt2', **more):
    words = place.words(way, name, **more)
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                             '--max-restarts=3', train.__file__, *words], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, encoding='utf-8', env=os.environ | {'OMP_NUM_THREADS': '1'})


def find(process, rank, but=None):
    """The process id of a rank that torchrun has started, other than `but`; None where torchrun has ended."""
    while process.poll() is None:
        with contextlib.suppress(OSError):  # they may end meanwhile
            with open(f'/proc/{process.pid}/task/{process.pid}/children', encoding='utf-8') as f:
                children = map(int, f.read().split())
            for pid in children:
                with open(f'/proc/{pid}/environ', 'rb') as f:
                    if pid != but and f'RANK={rank}'.encode() in f.read().split(b'\0'):
                        return pid
        time.sleep(0.01)


def ranks(place, i):
    """torchrun with 2 ranks: one killed with kill -9 at a random moment, then the other"""
    way = ('gpt2', 'diffusion', 'drifting', 'token drift', 'dd')[i % 5]
    more = dict(max_iters=60, gradient_accumulation_steps=2, ddp_timeout=60)
    name = f'ranks-{way}'
    if not os.path.isdir(place.path(name)):  # two ranks add up in another order than one
        assert torchrun(place, name, way, **more).wait() == 0
        place.straight[way, *more.items()] = place.path(name), 0.0
    process, numbers = torchrun(place, 'run', way, **more), [0, 1]
    place.rng.shuffle(numbers)
    for rank, after in zip(numbers, (place.rng.randint(1, 30), place.rng.randint(31, 65))):
        while iterations(place.path('run')) < after and process.poll() is None:
            time.sleep(0.002)
        if (pid := find(process, rank)) is None:
            break  # the run has ended by itself
        os.kill(pid, signal.SIGKILL)
        find(process, rank, but=pid)  # it is started again
    _, said = process.communicate()
    if process.returncode:
        raise Lost(f'exit code {process.returncode}: {said[-600:]}')
    place.check(way, 'run', **more)


def hung(place, i):
    """torchrun with 2 ranks: one stopped with SIGSTOP; the other names it, and torchrun starts both again"""
    more = dict(max_iters=60, gradient_accumulation_steps=2, ddp_timeout=5)
    if not os.path.isdir(place.path('ranks-hung')):
        assert torchrun(place, 'ranks-hung', **more).wait() == 0
        place.straight['gpt2', *more.items()] = place.path('ranks-hung'), 0.0
    process, rank = torchrun(place, 'run', **more), i % 2
    after = place.rng.randint(1, 50)
    while iterations(place.path('run')) < after:
        time.sleep(0.002)
    os.kill(find(process, rank), signal.SIGSTOP)
    _, said = process.communicate()
    if f'rank {1 - rank}: rank {rank} did not answer' not in said or process.returncode:
        raise Lost(f'exit code {process.returncode}: {said[-600:]}')
    place.check('gpt2', 'run', **more)


def handles_of(process):
    time.sleep(0.005)
    return len(os.listdir(f'/proc/{process.pid}/fd'))


def long(place, i):
    """20,000 iterations, saved and evaluated 400 times: memory and file handles"""
    process = place.start(train.main, place.words('gpt2', 'run', max_iters=LONG, eval_interval=LONG // 400, keep_every=0))
    seen = []
    for part in (0.1, 0.9):
        while iterations(place.path('run')) < part * LONG and process.exitcode is None:
            time.sleep(0.05)
        with open(f'/proc/{process.pid}/status', encoding='utf-8') as f:
            memory = int(next(line for line in f if line.startswith('VmRSS')).split()[1])
        # the fewest of some looks: while a checkpoint is written, its file is open too, and a leak stays
        seen.append((memory, min(handles_of(process) for _ in range(20))))
    process.join()
    (before, handles), (after, handles_after) = seen
    print(f'memory {before / 1024:.1f} MiB after a tenth of {LONG:,} iterations, {after / 1024:.1f} after nine tenths; '
          f'{handles} and {handles_after} file handles')
    shutil.rmtree(place.path('run'))
    if after > before + 2048 or handles_after > handles:
        raise Lost(f'memory {before} and {after} kB, {handles} and {handles_after} handles')


EXPERIMENTS = {kill: 100, damage: 100, full: 60, read_only: 10, data_gone: 40, ranks: 10, hung: 4, long: 1}
EXPERIMENTS = {function.__name__: (function, tries) for function, tries in EXPERIMENTS.items()}


def attempt(place, name, tries):
    """A row of the table."""
    function, usual = EXPERIMENTS[name]
    lost, tries, started = 0, tries or usual, time.perf_counter()
    for i in range(tries):
        try:
            function(place, i)
        except Lost as e:
            lost += 1
            print(f'{name} {i}: {e}', flush=True)
            shutil.rmtree(place.path('run'), ignore_errors=True)
    seconds = time.perf_counter() - started
    return f'| `{name}` | {function.__doc__} | {tries} | {tries - lost} | {lost} | {seconds:.0f} |'


def main(argv):
    config, _ = configure(argv, FaultsConfig, description=__doc__)
    if not os.path.isdir('/proc/self/task'):
        raise UserError('this needs Linux')
    FORKS.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(folder, config.seed)
        rows = [attempt(place, name, config.tries) for name in config.names]
    print('| `--only=` | fault | tries | survived | lost | seconds |', '| --- ' * 6 + '|', *rows, sep='\n')


if __name__ == '__main__':
    run(main)
