"""Mistakes, broken and hostile files: exit code 2, one line that names the fix, and nothing changes on disk."""
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import OFFLINE, ROOT, TINY, pseudo_text, run_here, run_script
from test_random_inputs import FIELDS, listing, train_here

import bench
import compare
from nanodrift import player
from nanodrift.tokenizer import ByteTokenizer

TRAIN = [f'--{key}={value}' for key, value in (TINY | dict(max_iters=2, eval_interval=2, eval_iters=1)).items()]
DIFFUSION = ['--model_type=diffusion']
SHORT = {'bench.py': ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2', '--rounds=1',
                      '--vocab_size=257', '--compile=False', '--device=cpu', '--part=train'],
         'train_diffusion_attention.py': ['--n_layers=1', '--d_model=16', '--n_heads=2', '--seq_len=16', '--batch_size=2',
                                          '--max_iters=1', '--eval_iters=1', '--exp_name=new', '--device=cpu',
                                          '--compile=False'],
         'train.py': [*TRAIN, '--out_dir=new']}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with data sets and runs, right ones, broken ones and hostile ones."""
    folder = tmp_path_factory.mktemp('place')
    before = os.getcwd()
    os.chdir(folder)
    write('text.txt', pseudo_text())
    write('other.txt', pseudo_text(seed=1))
    for spec in ('byte', 'char'):
        succeed('prepare.py', '--input=text.txt', '--name=tiny', f'--tokenizer={spec}', '--num_proc=1')
    succeed('prepare.py', '--input=other.txt', '--name=other', '--tokenizer=byte', '--num_proc=1')
    for name, words in {'run': [], 'char': ['--dataset=tiny_char'], 'repair': DIFFUSION,
                        'nelbo': [*DIFFUSION, '--diffusion_objective=nelbo'],
                        'drifting': ['--model_type=drifting', '--encoder=run', '--drift_prefix=3']}.items():
        succeed('train.py', *TRAIN, '--dataset=tiny_byte', f'--out_dir={name}', *words)
    succeed('train_diffusion_attention.py', *SHORT['train_diffusion_attention.py'], '--dataset=data/tiny_byte',
            '--log_dir=.',
            '--exp_name=experiment')
    succeed('export.py', '--out_dir=run', '--to=exported')
    break_data()
    break_runs()
    write('broken.py', '1 / 0')
    write('strange.py', 'keep_every = 10 ** 5000')
    write('zero.py', "wandb_project = 'a\\0b'")
    write('resuming.py', "init_from = 'resume'")
    write('recipe.py', '\n'.join(f'{key} = {value!r}' for key, value in TINY.items() if key != 'max_iters'))
    write('latin1.txt', 'Größe'.encode('latin-1'))
    write('empty.txt', '')
    write('rows.jsonl', '{"title": "no text"}\n')
    write('no_json.jsonl', '{"text": \n')
    os.mkdir('empty folder')
    with mock.patch.object(bench, 'peak_flops', lambda *_: 1e9):  # which takes seconds
        yield folder
    os.chdir(before)


def write(path, content):
    with open(path, 'wb') as f:
        f.write(content if isinstance(content, bytes) else content.encode())


def succeed(*words):
    done = run_here(*words)
    assert done.returncode == 0, done.stderr
    return done


def break_data():
    """Data sets that are broken, each in its way."""
    def copy(name):
        shutil.copytree('data/tiny_byte', f'data/{name}')
        with open('data/tiny_byte/train.bin', 'rb') as f, open('data/tiny_byte/meta.json', encoding='utf-8') as g:
            return f.read(), json.load(g)
    train, meta = copy('torn')
    write('data/torn/train.bin', train[:-1])
    copy('empty')
    write('data/empty/train.bin', '')
    copy('oversized')
    write('data/oversized/train.bin', train + train)
    copy('no_val')
    os.remove('data/no_val/val.bin')
    for name, changes in {'no_vocab': {'vocab_size': None}, 'pickled': {'dtype': 'O'}, 'no_splits': {'splits': {}},
                          'no_tokenizer': {'tokenizer': '../../etc/passwd'}}.items():
        copy(name)
        write(f'data/{name}/meta.json', json.dumps(meta | changes))
    for split in ('train', 'val'):
        copy(f'beyond_{split}')
        ids = np.fromfile(f'data/tiny_byte/{split}.bin', dtype='<u2')
        ids[::2] = 300  # which the embedding matrix has, but no text
        ids.tofile(f'data/beyond_{split}/{split}.bin')


class Executed:
    """Unpickling it runs a command."""

    def __reduce__(self):
        return os.system, ('touch executed',)


def break_runs():
    """Folders of runs and of models that are broken or hostile."""
    def folder(name, files):
        os.mkdir(name)
        for file, content in files.items():
            write(os.path.join(name, file), content)
    with open('run/ckpt.pt', 'rb') as f:
        whole = f.read()
    folder('pickle', {'ckpt.pt': pickle.dumps(Executed())})
    torch.save({'model': Executed(), 'model_args': {}}, 'zipped.pt')
    with open('zipped.pt', 'rb') as f:
        folder('zipped', {'ckpt.pt': f.read()})
    folder('torn', {'ckpt.pt': whole[:len(whole) // 2]})
    folder('nothing', {'ckpt.pt': b''})
    folder('text', {'ckpt.pt': b'no checkpoint'})
    folder('no_checkpoint', {'config.json': b'{}'})
    state = torch.load('run/ckpt.pt', weights_only=True)
    for name, changes in {'bare': None, 'no_args': {'model_args': 5}, 'no_weights': {'model': {'a': 'b'}},
                          'no_name': {'tokenizer': {'name': '../../x', 'identity': 'x'}}, 'wings': {'model_args': {5: 1}},
                          'no_config': {'config': {'dataset': 5}}, 'no_parents': {'parents': None}}.items():
        os.mkdir(name)
        torch.save(state['model'] if changes is None else state | changes, f'{name}/ckpt.pt')
    with open('exported/config.json', encoding='utf-8') as f:
        config = f.read()
    folder('hf_pickle', {'config.json': config, 'pytorch_model.bin': pickle.dumps(Executed())})
    folder('hf_torn', {'config.json': config, 'model.safetensors': b'\xff' * 100})
    folder('hf_empty', {'config.json': config})
    folder('hf_deep', {'config.json': '[' * 10 ** 5})
    folder('hf_no_args', {'config.json': '{"model_type": "nanodrift", "model_args": 5}'})
    folder('hf_shards', {'config.json': config, 'model.safetensors.index.json': '{"weight_map": {"a": "../run/ckpt.pt"}}'})


# ---------------------------------------------------------------------------------------------------------------------
# mistakes

def wrong_values(f):
    """Values of a wrong type, out of range, or of no known name, as text."""
    rules = f.metadata
    if rules['choices'] or rules['words']:
        yield 'no such'
    elif rules['items']:
        yield '1,x'
    elif f.type is not str:
        yield {bool: 'maybe', int: '1.5', float: 'fast'}[f.type]
    for word, bound in rules['bounds'].items():
        yield str({'at least': bound - 1, 'above': bound, 'at most': bound + 1, 'below': bound}[word])


EVERY_KEY = [(script, f'--{name}={value}', name) for script, known in FIELDS.items() for name, f in known.items()
             for value in wrong_values(f)]
# For each script: what it is given, and what its line must say.
MISTAKES = {
    'train.py': [
        ('--sise=3', 'unknown key'), ('--max_iter=3', "'max_iters'"), ('no_config.py', 'no config file'),
        ('broken.py', 'broken.py'),
        ('strange.py', 'keep_every=a huge number'), ('zero.py', 'wandb_project'), ('text.txt', 'readable'),
        ('data', 'no config file'),
        ('--n_head=3', 'multiple of n_head'), ('--warmup_iters=1 --warmup_ratio=0.1', 'contradict'),
        ('--warmup_iters=9', 'longer'),
        ('--min_lr=1', 'lower --min_lr'), ('--block_size=100000', 'lower --block_size'), ('--max_tokens=4', 'fewer than'),
        ('--dataset=missing', 'prepare.py --input=PATH --name=missing'), ('--dataset=missing_bpe300', '--tokenizer=bpe:300'),
        ('--dataset=../run', 'incomplete'), ('--dataset=', 'incomplete'), ('--dataset=data/tiny_byte', 'not a path'),
        ('--dataset=a\nb', 'does not exist'), ('--data_dir=no', 'does not exist'),
        ('--dataset=' + 'x' * 300, 'does not exist'),
        ('--out_dir=text.txt', 'cannot write'), ('--out_dir=text.txt/out', 'cannot write'), ('--out_dir=', 'cannot write'),
        ('--out_dir=run', '--overwrite=True'), ('--out_dir=run --init_from=run', 'another --out_dir'),
        ('--out_dir=run --overwrite=True --model_type=drifting --encoder=run', 'another --out_dir'),
        ('--init_from=resume', 'train.py'), ('--init_from=no', 'not the folder of a run'),
        ('--init_from=hf:/no', 'no such folder'),
        ('--init_from=hf:no', 'hf:FOLDER'), ('--init_from=hf:', 'hf:'),
        ('--init_from=resume --out_dir=run --n_layer=3', 'n_layer'),
        ('--init_from=resume --out_dir=run --dataset=other_byte', 'trained on dataset=tiny_byte'),
        ('--init_from=resume --out_dir=experiment', 'train_diffusion_attention.py'), ('--init_from=char', 'tokenizer'),
        ('--init_from=repair --model_type=gpt2', '--model_type=diffusion'), ('--heat_t=adaptive', 'model_type heat'),
        ('--model_type=heat --heat_t=warm', 'depth, adaptive'), ('--model_type=heat --published=True', 'no effect'),
        ('--model_type=heat --heat_t=adaptive --heat_t_min=9 --heat_t_max=1', 'below'),
        ('--model_type=parallel --n_layer=3', 'even'),
        ('--model_type=duo --block_size=1', 'at least 2'), ('--model_type=drifting', '--encoder=FOLDER'),
        ('--model_type=drifting --encoder=no', 'no folder'), ('--model_type=drifting --encoder=repair', 'must be gpt2'),
        ('--model_type=drifting --encoder=char', 'must have the same'),
        ('--model_type=drifting --encoder=run --dropout=0.1', 'dropout'),
        ('--model_type=rotating --n_embd=6', 'must be even'), ('--model_type=diffusion --diffusion_block=4', 'nelbo'),
        ('--model_type=diffusion --diffusion_objective=nelbo --diffusion_block=5', 'divide'),
        ('--model_type=diffusion --diffusion_t_min=0.3', 'nelbo'),
        ('--model_type=diffusion --diffusion_objective=nelbo --diffusion_t_min=0.9 --diffusion_t_max=0.8', 'must be below'),
        ('--model_type=diffusion --diffusion_objective=nelbo --diffusion_block=4 --diffusion_complement=True '
         '--diffusion_t_max=0.8', 'add up to 1'),
        ('--device=cuda:99', '--device=cpu'),
        ('--device=warp', 'cpu, cuda, mps'), ('--num_epochs=1e308', 'at most'), ('--warmup_epochs=1e308', 'at most'),
        ('--n_embd=1000000000', 'not enough memory'),
        ('--seed=' + '9' * 400, 'seed'), ('--learning_rate=nan', 'finite')],
    'sample.py': [
        ('--out_dir=no', 'no folder'), ('--out_dir=no_checkpoint', 'no checkpoint'),
        ('--out_dir=repair', 'generate_diffusion.py'),
        ('--init_from=run', "'resume' nor"), ('--init_from=hf:no', 'hf:FOLDER'), ('--start=FILE:no', 'cannot read'),
        ('--start=FILE:data', 'cannot read'), ('--start=FILE:latin1.txt', 'UTF-8'),
        ('--out_dir=char --start=\u1234', 'no id'),
        ('--out_dir=drifting --start=Once', 'drift_prefix'), ('--out_dir=drifting --top_k=3', 'leave it out'),
        ('--top_p=0', 'top_p'),
        ('--temperature=-1', 'at least 0'), ('--draft=ngram --draft_tokens=0', 'at least'), ('--seed=-1', 'seed')],
    'generate_diffusion.py': [
        ('--out_dir=run', 'sample.py'), ('--start=a --template=b', 'contradict'), ('--template=x', 'no gap'),
        ('--template=[MASK:0]', 'at least one'), ('--template=[MASK:99]', 'at most'),
        ('--template=[MASK:' + '9' * 5000 + ']', 'at most'),
        ('--template=____ --max_new_tokens=3', 'no meaning'), ('--start=' + 'x' * 99, 'shorten'),
        ('--max_new_tokens=99', 'lower'),
        ('--repair=no', 'cannot read'), ('--repair=empty.txt', 'empty'), ('--out_dir=nelbo --repair=text.txt', 'repair'),
        ('--to=x', 'repair'), ('--html=no/x.html', 'no such folder'), ('--html=data', 'cannot write'),
        ('--eta=0.5', 'remdm'),
        ('--flag_threshold=0.1', 'flag'), ('--out_dir=nelbo --strategy=naive', 'random'),
        ('--out_dir=nelbo --remask=flag', 'repair'),
        ('--strategy=confidence --remask=remdm-cap', 'ancestral'), ('--strategy=naive --remask=flag', 'another strategy'),
        ('--threshold=0.5', 'strategy=threshold')],
    'evaluate.py': [
        ('--out_dir=no', 'no folder'), ('--out_dir=run,', 'no folder'), ('--judge=no', 'no folder'),
        ('--judge=run', 'same run'),
        ('--judge=repair --length=8', 'not causal'), ('--judge=char --length=8', 'different tokenizers'),
        ('--ways=max_steps=3', '--judge'),
        ('--figure=x.pdf', '.png'), ('--figure=no/x.png', 'no such folder'), ('--stride=99', 'at most block_size'),
        ('--out_dir=repair --stride=4', 'causal'), ('--out_dir=repair --judge=run', 'lower --length'),
        ('--out_dir=repair --judge=run --length=8', '--num_samples='), ('--data=no', 'does not exist'),
        ('--data=data/tiny_char', 'prepare the text'), ('--out_dir=exported', 'write hf:exported'),
        ('--out_dir=hf:exported', '--data=FOLDER'), ('--limit=3', '--tasks'), ('--num_fewshot=0', '--tasks'),
        ('--tasks=no.yaml', 'windows has no meaning'), ('--tasks=no.yaml --windows=0', 'tasks'),
        ('--out_dir=repair --judge=run --length=8 --num_samples=10 --ways=max_steps=0', 'max_steps'),
        ('--out_dir=repair --judge=run --length=8 --num_samples=10 --ways=x', 'unknown key')],
    'prepare.py': [
        ('', '--input=PATH'), ('no-such', 'tinystories'), ('python shakespeare', 'one data set'),
        ('python --input=text.txt', 'one data set'),
        ('--input=text.txt', '--name=NAME'), ('--input=text.txt --name=../x', '--name=NAME'),
        ('--input=text.txt --name=a/b', '--name=NAME'),
        ('--input=text.txt --name=.x', '--name=NAME'), ('python --name=x', '--input'),
        ('--input=no --name=x', 'no such file'),
        ('--input=text.txt --name=x --tokenizer=gpt3', 'bpe:N'), ('--input=text.txt --name=x --tokenizer=bpe:5', '257'),
        ('--input=text.txt --name=x --tokenizer=bpe:90000', 'or less'),
        ('--input=text.txt --name=x --val_fraction=1', 'val_fraction'),
        ('--input=text.txt --name=x --val_fraction=nan', 'val_fraction'),
        ('--input=text.txt --name=x --num_proc=-1', 'num_proc'),
        ('--input=text.txt --name=x --text_key=t', 'text_key'), ('--input=empty.txt --name=x', 'empty'),
        ('--input=latin1.txt --name=x', 'iconv'), ('--input=rows.jsonl --name=x', '--text_key'),
        ('--input=no_json.jsonl --name=x', 'line 1'),
        ('--input=run/ckpt.pt --name=x', 'not UTF-8'), ('--input=/dev/null --name=x', 'pipe'),
        ('--input=text.txt --name=x --val_input=no', 'no'),
        ('--input=text.txt --name=x --val_input=empty.txt', 'val split is empty'),
        ('--input=text.txt --name=x --data_dir=text.txt', 'text.txt'),
        ('--packages=text.txt', '--packages needs --name=NAME'), ('--packages=no --name=x', 'no such file'),
        ('--packages=text.txt --name=x', 'pip says'), ('shakespeare', 'work offline')],
    'compare.py': [
        ('--variants=gpt3', 'gpt2'), ('--variants=gpt2,gpt2', 'twice'), ('--variants=,', 'variants'),
        ('--seeds=1,1', 'twice'),
        ('--seeds=1000', 'judge'), ('--tune=1', 'tunes nothing'),
        ('--seeds=', 'seeds'), ('--tokens=0', 'above 0'), ('--tokens=3', '--tokens='),
        ('--samples=3', 'at least'),
        ('--launch=no-such-program', 'no program'), ('--launch="', 'no command line'), ('--recipe=no.py', 'no config file'),
        ('--recipe=resuming.py', 'init_from'), ('--recipe=broken.py', 'broken.py'), ('--length=99', 'lower --length'),
        ('--dataset=missing', 'prepare.py'), ('--samples=100000', '--samples='), ('--out_dir=text.txt', 'cannot')],
    'export.py': [
        ('', '--to=FOLDER'), ('--to=run', 'new folder'), ('--to=text.txt', 'new folder'),
        ('--to=text.txt/x', 'cannot write'),
        ('--to=x --out_dir=no', 'no folder'), ('--to=x --out_dir=hf:no', 'hf:FOLDER'),
        ('--to=x --ckpt=first', 'best, last')],
    'play.py': [
        ('--out_dir=no', 'no folder'), ('--out_dir=run,no', 'no folder'), ('--out_dir=run,', 'no folder'),
        ('--out_dir=run,char,repair', 'at most two'), ('--out_dir=hf:no', 'hf:FOLDER'), ('--device=warp', 'cpu, cuda, mps')],
    'bench.py': [
        ('--against=no', 'nanoGPT checkout'), ('--part=types --variants=x', 'variants'), ('--only=x', 'ours, nanoGPT'),
        ('--data=no', 'does not exist'), ('--data=data/tiny_byte --vocab_size=100', '--vocab_size=257'),
        ('--n_head=3', 'multiple'),
        ('--data=data/tiny_byte --block_size=99999', 'lower --block_size'),
        ('--batch_size=1000000000000', 'not enough memory')],
    'train_diffusion_attention.py': [
        ('--model=diffusion_adaptive --t_min=3 --t_max=2', 'above t_min'), ('--n_heads=3', 'multiple of'),
        ('--fixed_t=2', 'no effect'),
        ('--resume=no', 'no folder'), ('--resume=run', 'not made by this script'),
        ('--resume=experiment --n_layers=3', 'n_layers'),
        ('--dataset=data/missing', 'prepare.py'), ('--dataset=wikitext-2', 'prepare.py wikitext-2'),
        ('--dropout=2', 'dropout'),
        ('--seed=-1', 'seed'), ('--max_iters=-1', 'max_iters'), ('--seq_len=99999', '--block_size'),
        ('--log_dir=. --exp_name=run', '--resume'),
        ('--model=published', 'diffusion_fixed')],
}
GIVEN = {'train.py': [*SHORT['train.py'], '--dataset=tiny_byte'], 'sample.py': ['--out_dir=run', '--device=cpu'],
         'generate_diffusion.py': ['--out_dir=repair', '--device=cpu'], 'evaluate.py': ['--out_dir=run', '--windows=2',
         '--device=cpu'],
         'prepare.py': ['--data_dir=data', '--tokenizer=byte', '--num_proc=1'], 'export.py': ['--out_dir=run'],
         'compare.py': ['--recipe=recipe.py', '--dataset=tiny_byte', '--tokens=256', '--length=8', '--variants=gpt2',
         '--samples=0'],
         'bench.py': SHORT['bench.py'], 'play.py': ['--out_dir=run', '--device=cpu'],
         'train_diffusion_attention.py': [*SHORT['train_diffusion_attention.py'], '--dataset=data/tiny_byte']}
BROKEN_DATA = ['torn', 'empty', 'oversized', 'no_val', 'no_vocab', 'pickled', 'no_splits', 'no_tokenizer']
READERS_OF_DATA = {'train.py': '--dataset=NAME', 'evaluate.py': '--data=data/NAME', 'bench.py': '--data=data/NAME',
                   'compare.py': '--dataset=NAME', 'train_diffusion_attention.py': '--dataset=data/NAME'}
BROKEN_RUNS = ['pickle', 'zipped', 'torn', 'nothing', 'text', 'no_checkpoint', 'bare', 'no_args', 'no_weights', 'no_name',
               'wings',
               'no_config', 'no_parents', 'hf:hf_pickle', 'hf:hf_torn', 'hf:hf_empty', 'hf:hf_deep', 'hf:hf_no_args',
               'hf:hf_shards']
READERS_OF_RUNS = ['sample.py --out_dir=NAME', 'evaluate.py --out_dir=NAME --data=data/tiny_byte',
                   'export.py --out_dir=NAME --to=x',
                   'train.py --init_from=NAME', 'train.py --model_type=drifting --encoder=NAME',
                   'evaluate.py --out_dir=run --judge=NAME', 'generate_diffusion.py --out_dir=NAME',
                   'play.py --out_dir=NAME']


def check(script, words, message):
    before = listing('.')
    done = run_here(script, *GIVEN[script], *words)
    assert done.returncode == 2 and done.stderr.startswith(f'{script}: ') and done.stderr.count('\n') == 1, done.stderr
    assert message in done.stderr
    assert listing('.') == before


@pytest.mark.parametrize('script, word, name', EVERY_KEY, ids=[f'{script} {word[:60]}' for script, word, _ in EVERY_KEY])
def test_a_wrong_value_of_any_key(place, script, word, name):
    check(script, [word], name)


@pytest.mark.parametrize('script, words, message', [
    pytest.param(script, words, message, id=f'{script} {words[:60]}') for script, rows in MISTAKES.items()
    for words, message in rows])
def test_a_mistake(place, script, words, message):
    check(script, re.split(r' (?=-)|(?<=python) ', words) if words else [], message)


@pytest.mark.parametrize('name', BROKEN_DATA)
@pytest.mark.parametrize('script', READERS_OF_DATA)
def test_a_broken_data_set(place, script, name):
    check(script, [READERS_OF_DATA[script].replace('NAME', name)], 'incomplete')


@pytest.mark.parametrize('script, split', [('train.py', 'val'), ('train.py', 'train'), ('evaluate.py', 'val'),
                                                                                        ('bench.py', 'train'),
                                           ('train_diffusion_attention.py', 'train')])
def test_ids_beyond_the_vocabulary(place, tmp_path, script, split):
    """Noticed where they are read, so that a run may have begun; the message names the file."""
    words = [*GIVEN[script], READERS_OF_DATA[script].replace('NAME', f'beyond_{split}')]
    words += {'train.py': [f'--out_dir={tmp_path}/run'],
        'train_diffusion_attention.py': [f'--log_dir={tmp_path}']}.get(script, [])
    done = run_here(script, *words)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and f'{split}.bin holds the id 300' in done.stderr
    assert not os.path.exists(tmp_path / 'run' / 'ckpt_best.pt')


@pytest.mark.parametrize('name', BROKEN_RUNS)
@pytest.mark.parametrize('command', READERS_OF_RUNS)
def test_a_broken_or_hostile_run_is_not_run(place, command, name):
    script, *words = command.split()
    check(script, [word.replace('NAME', name) for word in words], '')
    assert not os.path.exists('executed')


# ---------------------------------------------------------------------------------------------------------------------
# what is strange, but right

def test_a_run_that_was_copied_goes_on_in_its_own_folder(place, tmp_path):
    """Its checkpoint says where it was first: a path out of a file is never written to."""
    shutil.copytree('run', tmp_path / 'copied')
    before = listing('.')
    succeed('train.py', '--init_from=resume', f'--out_dir={tmp_path}/copied', '--max_iters=3')
    assert torch.load(tmp_path / 'copied' / 'ckpt.pt', weights_only=True)['iter_num'] == 3
    assert listing('.') == before


@pytest.mark.parametrize('name', ["it's $HOME; `ls` & | > \" 日本", '-x', '\udcff'])
def test_folders_of_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, 'call', train_here)
    os.mkdir(name)
    write(f'{name}/text.txt', pseudo_text())
    succeed('prepare.py', f'--input={name}/text.txt', '--name=tiny', '--tokenizer=byte', '--num_proc=1',
            f'--data_dir={name}/data')
    data = ['--dataset=tiny_byte', f'--data_dir={name}/data']
    succeed('train.py', *TRAIN, *data, f'--out_dir={name}/out')
    succeed('train.py', '--init_from=resume', f'--out_dir={name}/out', '--max_iters=3')
    succeed('evaluate.py', f'--out_dir={name}/out', '--windows=2')
    succeed('export.py', f'--out_dir={name}/out', f'--to={name}/exported')
    done = run_here('sample.py', f'--init_from=hf:./{name}/exported', '--num_samples=1', '--max_new_tokens=2')
    assert done.returncode == (2 if name == '\udcff' else 0)  # safetensors opens no file whose name is no Unicode
    write('recipe.py', '\n'.join(f'{key} = {value!r}' for key, value in TINY.items() if key != 'max_iters'))
    succeed('compare.py', '--recipe=recipe.py', *data, '--variants=gpt2', '--seeds=1', '--tokens=128', '--samples=0',
            '--length=8',
            f'--out_dir={name}/report')


SCRIPT = '</script><script>alert(1)</script><img src=x onerror=alert(1)>'


def test_text_never_becomes_part_of_a_page(tmp_path):
    recording = player.Recording(fixed=[False], passes=[1], steps=[0], frames=[[(SCRIPT, 1.0, False)]])
    player.write_page(recording, str(tmp_path / 'page.html'))
    page = (tmp_path / 'page.html').read_text(encoding='utf-8')
    assert page.count('<script') == 1 == page.count('</script') and '<img' not in page and 'alert(1)' in page
    assert 'innerHTML' not in page


def test_text_never_becomes_part_of_a_report(place, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, 'call', train_here)
    monkeypatch.setattr(ByteTokenizer, 'decode', lambda *_: SCRIPT)
    succeed('compare.py', *GIVEN['compare.py'], f'--out_dir={tmp_path}/<b>', '--seeds=1')
    page = (tmp_path / '<b>' / 'report.html').read_text(encoding='utf-8')
    assert 'alert(1)' in page and not re.search('<script|<img src=x|<b>', page)


@pytest.mark.slow
def test_a_locale_without_unicode(place, tmp_path):
    """What is printed, read and named may be any Unicode, whatever the terminal knows."""
    env = {'LC_ALL': 'C'}
    write(tmp_path / 'Größe.txt', pseudo_text())
    words = [f'--input={tmp_path}/Größe.txt', '--name=Größe', '--tokenizer=byte', '--num_proc=1', f'--data_dir={tmp_path}']
    assert run_script('prepare.py', *words, env=env).returncode == 0
    train = [*TRAIN, '--dataset=Größe_byte', f'--data_dir={tmp_path}', f'--out_dir={tmp_path}/日本']
    assert run_script('train.py', *train, env=env).returncode == 0
    run = f'--out_dir={tmp_path}/日本'
    assert run_script('sample.py', run, '--start=é', '--num_samples=1', '--max_new_tokens=2', env=env).stdout.startswith('é')
    assert 'context 16' in run_script('evaluate.py', run, '--windows=2', env=env).stdout
    done = run_script('train.py', *train, '--sisé=3', env=env, check=False)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'Traceback' not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('words, code, said', [
    (['train.py', b'--dataset=\xff'], 2, b'does not exist'), (['train.py', b'--\xff=3'], 2, b'unknown key'),
    (['train.py', b'\xff.py'], 2, b'no config file'), (['sample.py', b'--out_dir=\xff'], 2, b'no folder'),
    (['sample.py', '--out_dir=run', b'--start=\xff', '--num_samples=1', '--max_new_tokens=2'], 0, b'tokens/s'),
    (['prepare.py', b'--input=a\xffb.txt', '--name=x', '--tokenizer=byte', b'--data_dir=\xff'], 0, b'')])
def test_words_that_are_no_unicode(place, tmp_path, words, code, said):
    """As the system hands them over: bytes of another encoding."""
    shutil.copytree('run', tmp_path / 'run')
    write(os.fsencode(tmp_path) + b'/a\xffb.txt', pseudo_text())
    env = os.environ | {'PYTHONPATH': os.pathsep.join([ROOT, OFFLINE])}
    done = subprocess.run([sys.executable, os.path.join(ROOT, words[0]), *words[1:]], cwd=tmp_path, env=env,
                          capture_output=True, timeout=120, check=False)
    assert done.returncode == code and said in done.stderr and b'Traceback' not in done.stderr, done.stderr
    assert code == 0 or done.stderr.count(b'\n') == 1
