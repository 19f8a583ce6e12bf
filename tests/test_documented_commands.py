"""
Every command of README.md and docs/: it runs, made small, in a folder where what it names is there, and on every type where
it is not of one type. A command that nothing here knows fails the test, so new documentation is covered.
"""
import contextlib
import glob
import importlib.util
import math
import os
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import BLOCKS, QUICK, ROOT, TINY, local_task
from test_train_diffusion_attention import SMALL as SMALL_EXPERIMENT

import prepare
import train
from model import GPT, TYPES, GPTConfig, load_model
from nanodrift.huggingface import open_run
from nanodrift.options import UserError, configure, read_config_file, read_values
from nanodrift.tokenizer import tokenizer_from_spec

# what train.py is told besides; the number type and the device are the defaults
SMALL = {key: TINY[key] for key in ('eval_iters', 'n_head', 'n_embd', 'compile', 'block_size')} | {
    'n_layer': 2, 'batch_size': 2, 'max_iters': 2, 'eval_interval': 2, 'warmup_iters': 0, 'gradient_accumulation_steps': 1,
    'dataset': 'tiny_byte', 'num_epochs': 0, 'stride': 0}
# the folders that the documents name, and what is in them
RUNS = {'out': 'gpt2', 'out-a': 'gpt2', 'out-b': 'heat', 'out-judge': 'judge', 'out-demo': 'gpt2', 'out-python': 'gpt2',
        'out-shakespeare-char': 'gpt2', 'out-tinystories': 'drafts', 'out-drifting': 'drifting',
        'out-diffusion': 'diffusion', 'out-diffusion-tinystories': 'diffusion', 'out-blocks-tinystories': 'blocks',
        'GPT2_RUN': 'gpt2', 'ENCODER': 'gpt2', 'DIFFUSION_RUN': 'nelbo', 'RUN': 'diffusion', '...': 'diffusion'}
SHIPPED = 'hf:models/gpt2-python'  # which lies in the repository
OF_A_TYPE = ('model_type', 'diffusion_', 'draft_')  # settings by which a command is of one type
DOWNLOADS = ('tinystories', 'wikitext-2', 'wikitext-103', 'shakespeare', 'python')  # data sets; python takes a minute
# scripts that other tests run as a whole, since they take long: their options are read here
LONG = {'bench.py': ['BenchConfig', 'GPTConfig'], 'compare.py': ['CompareConfig'], 'play.py': ['PlayConfig'],
        'experiments.drifting_2d': ['PlaneConfig']}
ELSEWHERE = ('git', 'make demo', 'make gpu', 'python3 -m venv')  # tests of their own, or no command of ours


def documented():
    """(file, command) of every fenced block."""
    for path in [f'{ROOT}/README.md', *sorted(glob.glob(f'{ROOT}/docs/*.md'))]:
        with open(path, encoding='utf-8') as f:
            blocks = re.findall(r'^```\w*\n(.*?)^```', f.read(), re.DOTALL | re.MULTILINE)
        for line in '\n'.join(blocks).replace('\\\n', ' ').splitlines():
            words = shlex.split(line, comments=True) if re.match(r'(python3?|make|torchrun|git) ', line) else []
            if words:
                yield os.path.relpath(path, ROOT), shlex.join(words)


COMMANDS = sorted(set(documented()))


def split(command):
    """-> the script or module, and its arguments."""
    words = shlex.split(command)
    if words[0] == 'torchrun':
        start = next(i for i, word in enumerate(words) if word.endswith('.py'))
        return words[start], words[start + 1:]
    if words[:2] == ['python', '-m']:
        return words[2], words[3:]
    return words[1], words[2:]


def multi_gpu():
    """Every `torchrun ... train.py config/...` of README.md, docs/, and what scripts and configs say of themselves."""
    for path in glob.glob(f'{ROOT}/**/*.*', recursive=True):
        name = os.path.relpath(path, ROOT)
        if re.match(r'(docs/|config/|[^/]*$).*\.(md|py)$', name) and name != 'LOG.md':
            with open(path, encoding='utf-8') as f:
                text = re.sub(r'\\\n[ #]*', ' ', f.read())
            yield from re.findall(r'torchrun [^`\n]*train\.py config/[^`\n]*', text)


@pytest.mark.parametrize('command', sorted(set(multi_gpu())))
def test_the_ranks_share_the_micro_batches(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    ranks = math.prod(int(number) for number in re.findall(r'--(?:nnodes|nproc_per_node)=(\d+)', command))
    args = shlex.split(command.partition('train.py ')[2].replace('...', ''), comments=True)
    values, _ = read_values(args, train.TrainConfig, train.GPTConfig)
    micro_batches = values.get('gradient_accumulation_steps', train.TrainConfig.gradient_accumulation_steps)
    assert ranks > 1 and micro_batches % ranks == 0


def of_one_type(args):
    """Whether settings, or a config file, make a command of train.py one of a single type."""
    keys = [word[2:].split('=')[0] for word in args if word.startswith('--')]
    keys += [key for word in args if word.endswith('.py') for key in read_config_file(f'{ROOT}/{word}')]
    return any(key.startswith(OF_A_TYPE) for key in keys)


@pytest.fixture(scope='module')
def trained(tmp_path_factory, data_dir):
    """{type: folder of a small run}."""
    folders = {}
    for name in dict.fromkeys(('gpt2', *TYPES, *RUNS.values())):
        more = {'blocks': BLOCKS,
                'nelbo': {'model_type': 'diffusion', 'diffusion_objective': 'nelbo'}, 'drafts': {'draft_block': 2},
                'judge': {},
                'drifting': {'model_type': 'drifting', 'encoder': folders.get('gpt2'), 'drift_prefix': 3},
                }.get(name, {'model_type': name})
        folders[name] = str(tmp_path_factory.mktemp(name) / 'run')
        values = TINY | {'block_size': 48, 'dataset': 'tiny_byte', 'data_dir': data_dir, 'out_dir': folders[name]} | more
        assert train.main([f'--{key}={value}' for key, value in values.items()]) == 0
    return folders


@pytest.fixture
def place(tmp_path, monkeypatch, trained, data_dir):
    """A folder that holds what the commands name; the commands run in it."""
    monkeypatch.chdir(tmp_path)
    for name, kind in RUNS.items():
        if name != '...':
            shutil.copytree(trained[kind], name)
    os.symlink(data_dir, 'data')
    for name in ('config', 'models'):
        os.symlink(f'{ROOT}/{name}', name)
    for name in ('my.txt', 'story.txt'):
        with open(name, 'w', encoding='utf-8') as f:
            f.write('The drift cools the token. ' * 200)
    return tmp_path


def run_small(script, args, **small):
    """Runs a script's main in this process with further settings; returns what it returns."""
    module = importlib.import_module(script.removesuffix('.py'))
    return module.main([*args, *(f'--{key}={value}' for key, value in small.items())])


def run_training(args, model_type):
    args = [re.sub('hf:gpt2|out-gpt2-tinystories', 'GPT2_RUN', word) for word in args
            if word != '...' and not word.startswith('--dataset')]
    small = SMALL | ({} if of_one_type(args) else {'model_type': model_type})
    named = {name: value for name, _, value in (word[2:].partition('=') for word in args)}
    if named.get('init_from') == 'resume':
        return run_small('train.py', [word for word in args if 'max_iters' not in word], max_iters=8)
    if model_type == 'drifting' or 'drifting' in str(args):
        small |= {'encoder': named.get('encoder', 'ENCODER'), 'drift_positives': 2}
    if named.get('diffusion_objective') == 'drift':
        small |= {'dropout': 0}
    if named.get('init_from', 'auto') != 'auto' or 'drifting' in str(args):
        small |= {'block_size': 48}
    return run_small('train.py', args, **small, out_dir='out-new')


TRAINING = sorted({c for _, c in COMMANDS if 'train.py' in c})
READERS = ('sample.py', 'generate_diffusion.py', 'evaluate.py', 'export.py')
READING = sorted({c for _, c in COMMANDS if c.split()[1] in READERS})
OTHERS = sorted({c for _, c in COMMANDS} - {*TRAINING, *READING})


def of_every_type(command):
    """Cases of a command; most types take long together."""
    return [pytest.param(command, name, marks=() if name in QUICK else pytest.mark.slow) for name in TYPES]


@pytest.mark.parametrize('command, model_type', [
    case for command in TRAINING
    for case in ([(command, 'gpt2')] if of_one_type(split(command)[1]) else of_every_type(command))])
def test_training(place, command, model_type):
    assert run_training(split(command)[1], model_type) == 0


def settings_of(args):
    return dict(word[2:].split('=', 1) for word in args if word.startswith('--'))


def type_of(command):
    names = settings_of(split(command)[1])
    return SHIPPED if names.get('init_from') == SHIPPED else RUNS[names['out_dir'].split(',')[0]]


@pytest.mark.parametrize('command, model_type', [
    case for command in READING
    for case in ([(command, type_of(command))] if type_of(command) not in TYPES else of_every_type(command))])
def test_reading_a_run(place, trained, command, model_type, capsys):
    """What reads a run, on that run and on one of every type; what a type has no use for is one line that says so."""
    script, args = split(command)
    names, own = settings_of(args), type_of(command)
    if own != model_type:
        shutil.copytree(trained[model_type], 'out-other')
        names['out_dir'] = 'out-other' + ',out-b' * (',' in names['out_dir'])
    args = [f'--out_dir={names["out_dir"].replace("...", "RUN")}' if word.startswith('--out_dir') else word for word in args]
    small = {'sample.py': {'num_samples': 2, 'max_new_tokens': 4}, 'generate_diffusion.py': {}, 'export.py': {},
             'evaluate.py': {'windows': 4, 'num_samples': 10, 'length': 8}}[script]
    if 'tasks' in names:
        local_task('.', 'multiple_choice', 'my_task')
        args, small = [*args, '--tasks=my_task.yaml'], {'limit': 1}
    if script == 'generate_diffusion.py' and 'max_new_tokens' in names:
        small = {'max_new_tokens': 8}
    left_to_right = model_type != 'diffusion' and (model_type != 'drifting' or 'start' not in names)
    fits = model_type == own or script in READERS[2:] or script == 'sample.py' and left_to_right
    fits = fits and ('tasks' not in names or importlib.util.find_spec('lm_eval'))
    with contextlib.nullcontext() if fits else contextlib.suppress(UserError):
        run_small(script, args, **small)
    assert 'Traceback' not in capsys.readouterr().err


@pytest.mark.parametrize('command', OTHERS)
def test_the_others(place, data_dir, command):
    if command.startswith(ELSEWHERE):
        return
    script, args = split(command)
    if script in LONG:
        module = importlib.import_module(script.removesuffix('.py'))
        args = [word for word in args if not word.startswith('--against')]
        configure(args, *(getattr(module, name) for name in LONG[script]))
    elif script == 'prepare.py':
        if args[0] in DOWNLOADS or args[0].startswith('--packages'):
            configure(args, prepare.PrepareConfig, positional=('dataset', ''))
        else:
            run_small(script, args, data_dir='prepared', num_proc=1)
            assert glob.glob('prepared/mine*/meta.json')
    elif script == 'train_diffusion_attention.py':
        run_attention_experiment(args, data_dir)
    elif script in ('experiments.temperature', 'experiments.plot_results'):
        for name in ('RUN', 'OTHER'):
            run_attention_experiment([f'--exp_name={name}', '--model=standard', '--epochs=1'], data_dir)
        run_small(script, args)
    elif script == 'experiments.repair_accuracy':
        run_small(script, args, windows=4, max_steps=2)
    elif script == 'experiments.drafts':
        run_small(script, [word.replace('=RUN', '=out-tinystories') for word in args], prompts=2, new_tokens=8, rounds=1)
    else:
        pytest.fail(f'{command}: a new kind of command; say here how it is made small')


def run_attention_experiment(args, data_dir):
    args = [word for word in args if not word.startswith(('--dataset', '--max_tokens'))]
    run_small('train_diffusion_attention.py', [*SMALL_EXPERIMENT, *args, '--max_iters=12', '--lr=1e-2'],
              dataset=f'{data_dir}/tiny_byte')


def test_the_scripts_for_nanogpts_files_run(tmp_path, monkeypatch):
    """A checkpoint and data as nanoGPT leaves them, with GPT-2's tokenizer."""
    with open(f'{ROOT}/docs/migrating.md', encoding='utf-8') as f:
        convert, add_meta = re.findall(r'^```python\n(.*?)^```', f.read(), re.DOTALL | re.MULTILINE)
    sizes = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, bias=False)
    model = GPT(GPTConfig(vocab_size=50257, **sizes))
    weights = {f'_orig_mod.{name}': tensor for name, tensor in model.state_dict().items()}
    torch.save({'model': weights, 'model_args': sizes | {'vocab_size': 50304, 'dropout': 0.0}}, tmp_path / 'ckpt.pt')
    (tmp_path / 'old').mkdir()
    text = np.array(tokenizer_from_spec('gpt2').encode('the cat sat on the mat. ' * 20) + [50256], dtype='<u2')
    for split in ('train', 'val'):
        text.tofile(tmp_path / 'old' / f'{split}.bin')
    for code, *words in ((convert, 'ckpt.pt', 'new'), (add_meta, 'old')):
        monkeypatch.setattr(sys, 'argv', ['script.py', *(str(tmp_path / word) for word in words)])
        exec(compile(code, words[0], 'exec'), {})
    ids = torch.arange(32).reshape(2, 16)
    assert torch.equal(load_model(open_run(str(tmp_path / 'new')))(ids)[0], model.eval()(ids)[0])
    assert train.main([f'--init_from={tmp_path}/new', '--dataset=old', f'--data_dir={tmp_path}', f'--out_dir={tmp_path}/run',
                       '--max_iters=1', '--batch_size=1', '--eval_iters=1', '--device=cpu', '--compile=False']) == 0
