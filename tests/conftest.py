"""
What the tests share: no network, one thread, a tiny data set, tiny runs.

Runs start in three ways: in this process (`tiny`, `resume`), which is fastest; in a fork of a process that has imported
train.py (`fork`), for signals, kills and ranks; as a command (`run_script`), where the command itself is the point.
"""
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from types import SimpleNamespace
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OFFLINE = os.path.join(ROOT, 'tests', 'offline')
os.environ['OMP_NUM_THREADS'] = '1'  # before torch comes in: sums of floats depend on the number of threads
os.environ['PYTHONPATH'] = os.pathsep.join([OFFLINE, ROOT, os.path.dirname(__file__)])  # of child processes
for name in ('WANDB_API_KEY', 'WANDB_MODE', 'RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
    os.environ.pop(name, None)
sys.path[:0] = [ROOT]
_spec = importlib.util.spec_from_file_location('offline', os.path.join(OFFLINE, 'sitecustomize.py'))
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))

import pytest
import torch

import prepare
import train
from model import TYPES, GPTConfig
from nanodrift import options

FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['train', 'conftest', 'torch._dynamo'])  # which AdamW imports, in seconds

TINY = dict(data_order='epoch', batch_size=4, max_iters=6, eval_interval=3, eval_iters=2, log_interval=1, device='cpu',
            dtype='float32', compile=False, block_size=16, n_layer=2, n_head=2, n_embd=16, learning_rate=1e-2)

# to train: an objective that couples the batch is a way of its own, and so are two streams in one pass
WAYS = (*TYPES, 'token drift', 'blocks', 'shifted blocks', 'drafts')
QUICK = ('gpt2', 'diffusion', 'drifting')  # where every type takes long, the others are `slow`
BLOCKS = {'model_type': 'diffusion', 'diffusion_objective': 'nelbo', 'diffusion_block': 4}

# a shell's background job ignores Ctrl-C, and so would every process that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)


def pseudo_text(documents=40, seed=0):
    """Text with something to learn: words of a small vocabulary, in sentences, in documents."""
    rng = random.Random(seed)
    words = ['drift', 'noise', 'heat', 'token', 'mask', 'the', 'a', 'of', 'and', 'flows', 'learns', 'cools', 'café']
    sentences = [' '.join(rng.choices(words, k=rng.randint(3, 7))).capitalize() + '.' for _ in range(documents * 4)]
    return '\n<|endoftext|>\n'.join(' '.join(sentences[i::documents]) for i in range(documents))


# tasks of lm-evaluation-harness: what each asks of a model, and how it is scored
TASKS = {'multiple_choice': 'doc_to_choice: choices\ndoc_to_target: answer\n'
                            'metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]',
         'loglikelihood_rolling': 'doc_to_target: "{{q}}"\nmetric_list: [{metric: word_perplexity}]',
         'generate_until': 'doc_to_target: "{{q}}"\nmetric_list: [{metric: exact_match}]'}


def local_task(folder, kind, name=None):
    """Writes a task of two questions and their data into a folder: NAME.yaml, which needs no network."""
    docs = [{'q': 'The token', 'choices': ['drifts', 'cools'], 'answer': 0}, {'q': 'Heat ', 'choices': ['flows', 'a'],
                                                                             'answer': 1}]
    for file, text in {'docs.jsonl': '\n'.join(map(json.dumps, docs)), f'{name or kind}.yaml': (
            f'task: {name or kind}\noutput_type: {kind}\ndataset_path: json\ntest_split: test\ndoc_to_text: "{{{{q}}}}"\n'
            f'dataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}, cache_dir: {folder}/cache}}\n{TASKS[kind]}\n'
            )}.items():
        with open(os.path.join(folder, file), 'w', encoding='utf-8') as f:
            f.write(text)


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A folder with the data set `tiny_byte`, made by prepare.py; about 5,000 tokens in 40 documents."""
    folder = tmp_path_factory.mktemp('data')
    (folder / 'tiny.txt').write_text(pseudo_text(), encoding='utf-8')
    handler = signal.getsignal(signal.SIGTERM)
    prepare.main([f'--input={folder / "tiny.txt"}', '--name=tiny', '--tokenizer=byte', '--num_proc=1',
                  f'--data_dir={folder}'])
    signal.signal(signal.SIGTERM, handler)
    return str(folder)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with the data set `text_bpe280`, which has enough validation text for samples; one for each file of tests."""
    folder = tmp_path_factory.mktemp('place')
    (folder / 'text.txt').write_text(pseudo_text(300), encoding='utf-8')
    prepare.main([f'--input={folder}/text.txt', '--name=text', '--tokenizer=bpe:280', '--num_proc=1',
                  f'--data_dir={folder}'])
    return folder


@pytest.fixture(scope='session')
def encoder(data_dir):
    """The folder of a tiny gpt2 run on `tiny_byte`, which a drifting model takes its features from."""
    values = TINY | dict(dataset='tiny_byte', data_dir=data_dir, out_dir=os.path.join(data_dir, 'encoder'), max_iters=20)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert train.main([f'--{key}={value}' for key, value in values.items()]) == 0
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)
    return values['out_dir']


@pytest.fixture
def settings(tmp_path, data_dir, encoder):
    """settings(**overrides) -> {key: value} of a tiny run; out_dir=NAME is a folder below tmp_path; a model_type may be
    one of WAYS."""
    def make(out_dir='run', **overrides):
        more = {'drifting': {'encoder': encoder, 'drift_positives': 2, 'drift_prefix': 3, 'drift_features': 'both',
                            'drift_look': 5.0},
                'token drift': {'encoder': encoder, 'diffusion_objective': 'drift'}}.get(overrides.get('model_type'))
        if more is not None:
            overrides = more | overrides
            overrides.pop('dropout', None)
        if overrides.get('model_type') == 'token drift':
            overrides['model_type'] = 'diffusion'
        if overrides.get('model_type') == 'drafts':
            overrides = overrides | {'model_type': 'gpt2', 'draft_block': 2}
        if 'blocks' in overrides.get('model_type', ''):
            shifted = overrides['model_type'] == 'shifted blocks'
            overrides = overrides | BLOCKS | {'diffusion_shift': shifted, 'diffusion_complement': shifted}
        return TINY | dict(dataset='tiny_byte', data_dir=data_dir, out_dir=str(tmp_path / out_dir)) | overrides
    return make


@pytest.fixture
def tiny(settings):
    """tiny(**overrides) -> (TrainConfig, GPTConfig), for train.train and train.Trainer."""
    def make(**overrides):
        values = settings(**overrides)
        return [cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
                for cls in (train.TrainConfig, GPTConfig)]
    return make


@pytest.fixture
def command_line(settings):
    """command_line(**overrides) -> the same settings as arguments of train.py."""
    return lambda **overrides: [f'--{key}={value}' for key, value in settings(**overrides).items()]


def resume(out_dir, *args):
    """Goes on with the run in `out_dir`, in this process, as `train.py --init_from=resume --out_dir=...` does."""
    return train.train(*train.read_settings(['--init_from=resume', f'--out_dir={out_dir}', *args]))


def run_script(name, *args, check=True, env=None, timeout=300):
    """Runs `python NAME ARGS` in the repository -> CompletedProcess with text; check=True asks for exit code 0."""
    done = subprocess.run([sys.executable, name, *map(str, args)], cwd=ROOT, env=os.environ | (env or {}),
                          stdin=subprocess.DEVNULL, capture_output=True, encoding='utf-8', timeout=timeout)
    assert not check or done.returncode == 0, done.stderr
    return done


def run_here(name, *args):
    """Runs the same command in this process, which is much faster -> its returncode, stdout and stderr."""
    module = importlib.import_module(name.removesuffix('.py'))
    streams = [io.TextIOWrapper(io.BytesIO(), encoding='utf-8', errors='backslashreplace', write_through=True)
               for _ in range(2)]
    handlers = {number: signal.getsignal(number) for number in train.STOPPING}
    try:
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]), mock.patch('sys.argv', [name, *args]):
            options.run(module.main)
    except SystemExit as e:
        code = e.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out, err = (stream.buffer.getvalue().decode('utf-8', errors='replace') for stream in streams)
    return SimpleNamespace(returncode=code, stdout=out, stderr=err)


def forked(output, env, function, args):
    """The body of a fork: output to a file, then the function, whose value is the exit code."""
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(env)
    torch.set_num_threads(1)
    try:
        sys.exit(function(*args))
    except Exception:
        traceback.print_exc()
        os._exit(1)


@pytest.fixture
def fork(tmp_path):
    """fork(function, *args, env={}) -> a started process of its own; its output goes to tmp_path/fork.out."""
    started = []

    def start(function, *args, env=None):
        process = FORKS.Process(target=forked, args=(str(tmp_path / 'fork.out'), env or {}, function, args))
        process.start()
        started.append(process)
        return process
    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def fork_ranks(fork):
    """fork_ranks(function, *args) -> two started processes, each with the environment that torchrun gives a rank."""
    def start(function, *args, world_size=2):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        shared = dict(WORLD_SIZE=str(world_size), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        return [fork(function, *args, env=shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)))
                for rank in range(world_size)]
    return start


@pytest.fixture(autouse=True)
def leave_no_trace():
    """A run takes over the signals and the random stream; the next test and pytest's own Ctrl-C want them back."""
    handlers = {number: signal.getsignal(number) for number in train.STOPPING}
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
