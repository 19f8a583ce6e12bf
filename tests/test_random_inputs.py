"""
What a user may write, drawn at random: values of options, templates, meta.json, and whole command lines.

Each gives a result or a UserError, never another exception. RANDOM_COMMANDS=1000 draws more command lines
than the suite does.
"""
import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import fields

import pytest
from conftest import TINY, run_here
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import bench
import compare
import evaluate
import export
import generate_diffusion
import play
import prepare
import sample
import train
import train_diffusion_attention
from generate_diffusion import parse_template
from model import GPTConfig
from nanodrift.data import load_meta
from nanodrift.options import UserError, build, parse_option, read_values
from nanodrift.refinement import RefineConfig
from nanodrift.tokenizer import ByteTokenizer
from train import TrainConfig

few = settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))

# ---------------------------------------------------------------------------------------------------------------------
# the options of each script

SCRIPTS = {
    'train.py': (TrainConfig, GPTConfig), 'sample.py': (sample.SampleConfig,),
    'generate_diffusion.py': (generate_diffusion.GenerateConfig, RefineConfig),
    'evaluate.py': (evaluate.EvalConfig, evaluate.DrawConfig), 'prepare.py': (prepare.PrepareConfig,),
    'compare.py': (compare.CompareConfig,), 'export.py': (export.ExportConfig,), 'bench.py': (bench.BenchConfig, GPTConfig),
    'train_diffusion_attention.py': (train_diffusion_attention.ExperimentConfig,), 'play.py': (play.PlayConfig,)}
FIELDS = {script: {f.name: f for cls in classes for f in fields(cls)} for script, classes in SCRIPTS.items()}
ALL_FIELDS = [f for names in FIELDS.values() for f in names.values()]

strange_text = st.text(st.characters(exclude_characters='\0', exclude_categories=()), max_size=12)
plain_values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from([10 ** 400, 2 ** 63, -2 ** 64]), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))


@few
@given(st.sampled_from(ALL_FIELDS), plain_values | strange_text)
@example(TrainConfig.__dataclass_fields__['batch_size'], 10 ** 5000)
@example(TrainConfig.__dataclass_fields__['learning_rate'], 10 ** 5000)
@example(TrainConfig.__dataclass_fields__['out_dir'], 'a\0b')
def test_any_value_of_any_option_is_parsed_or_refused(f, value):
    try:
        parsed = parse_option(f, value)
    except UserError as e:
        assert f.name in str(e)
    else:
        assert type(parsed) is f.type
        assert parse_option(f, parsed) is parsed or parsed != parsed or parse_option(f, parsed) == parsed
        on_the_command_line = parse_option(f, str(parsed))
        assert on_the_command_line == parsed or parsed != parsed


@few
@given(st.sampled_from(list(SCRIPTS)), st.lists(strange_text | st.sampled_from(ALL_FIELDS).map(lambda f: f'--{f.name}'),
                                                max_size=4))
@example('train.py', ['--', '--'])
@example('train.py', ['--=3'])
def test_any_words_are_parsed_or_refused(script, words):
    if set(words) & {'-h', '--help'}:
        return
    try:
        build(read_values(words, *SCRIPTS[script])[0], *SCRIPTS[script])
    except UserError:
        pass


# ---------------------------------------------------------------------------------------------------------------------
# templates and meta.json

gaps = st.sampled_from(['[MASK]', '[MASK:3]', '[mask:2]', '____', '[MASK:0]', '[MASK:99]', '[MASK:' + '9' * 5000 + ']', '__',
                        '[MASK:٣]', '[MASK:-1]', '[MASK:'])


@few
@given(st.lists(gaps | st.text(max_size=6), max_size=5))
def test_any_template_is_parsed_or_refused(parts):
    tokenizer, mask, text = ByteTokenizer(), 257, ''.join(parts)
    config = GPTConfig(model_type='diffusion', vocab_size=mask, block_size=16)
    try:
        ids = parse_template(text, tokenizer.encode, config)
    except UserError:
        return
    assert mask in ids
    given = generate_diffusion.OPEN.sub('', text)
    assert tokenizer.decode_bytes([i for i in ids if i != mask]) == given.encode(errors='replace')


broken = st.recursive(plain_values, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
    st.sampled_from(['train', 'val', 'tokens', 'bytes']) | st.text(max_size=3), inner, max_size=2), max_leaves=4)


@pytest.fixture(scope='module')
def scratch(tmp_path_factory, data_dir):
    """A copy of the tiny data set, whose meta.json may be changed."""
    return shutil.copytree(os.path.join(data_dir, 'tiny_byte'), tmp_path_factory.mktemp('scratch') / 'tiny_byte')


@few
@given(st.data())
def test_any_meta_is_read_or_refused(scratch, data_dir, data):
    with open(os.path.join(data_dir, 'tiny_byte', 'meta.json'), encoding='utf-8') as f:
        meta = json.load(f)
    at = meta
    while data.draw(st.booleans()) and any(isinstance(value, dict) for value in at.values()):
        at = data.draw(st.sampled_from([value for value in at.values() if isinstance(value, dict)]))
    key = data.draw(st.sampled_from(sorted(at)))
    at.pop(key)
    if data.draw(st.booleans()):
        at[key] = data.draw(broken | st.sampled_from(['O', 'float32', 'uint8', '(2,)u2', 'u2,u2', 'V2', 'uint32']))
    (scratch / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    check_meta(scratch)


@few
@given(broken | st.sampled_from([[[]] * 3]), st.binary(max_size=8))
def test_any_file_called_meta_json_is_read_or_refused(scratch, value, junk):
    (scratch / 'meta.json').write_bytes(json.dumps(value).encode(errors='replace') + junk)
    check_meta(scratch)


@pytest.mark.parametrize('text', ['[' * 10 ** 5, '{"vocab_size": ' + '9' * 5000 + '}'])
def test_a_meta_json_that_python_cannot_read(scratch, text):
    (scratch / 'meta.json').write_text(text)
    check_meta(scratch)


def check_meta(folder):
    try:
        meta = load_meta(str(folder))
    except UserError as e:
        assert '\n' not in str(e) and 'prepare.py' in str(e)
        return
    assert meta['dtype'] in ('uint16', 'uint32') and meta['vocab_size'] > 0 and isinstance(meta['tokenizer'], dict)
    assert {'train', 'val'} <= set(meta['splits']) and meta['splits']['val']['bytes'] > 0


# ---------------------------------------------------------------------------------------------------------------------
# command lines

# What a command is given first, so that it ends soon; what is drawn comes behind it and counts.
SMALL = ['--device=cpu', '--dtype=float32']
TRAINED = [f'--{key}={value}' for key, value in (TINY | dict(max_iters=2, eval_interval=2, eval_iters=1)).items()]
BASE = {
    'train.py': [*TRAINED, '--dataset=tiny_byte', '--data_dir=DATA'],
    'sample.py': [*SMALL, '--out_dir=run', '--num_samples=2', '--max_new_tokens=4'],
    'generate_diffusion.py': [*SMALL, '--out_dir=run', '--max_steps=3'],
    'evaluate.py': [*SMALL, '--out_dir=run', '--windows=2', '--num_samples=20', '--length=4', '--max_steps=2'],
    'prepare.py': ['--tokenizer=byte', '--num_proc=1', '--data_dir=data'],
    'compare.py': ['--recipe=recipe.py', '--variants=gpt2', '--seeds=1', '--tokens=64', '--samples=0', '--length=4',
                   '--dataset=tiny_byte', '--data_dir=DATA', '--device=cpu'],
    'export.py': ['--out_dir=run', '--to=new'],
    'bench.py': [*SMALL, '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=8', '--vocab_size=64', '--batch_size=2',
                 '--rounds=1', '--steps=2', '--new_tokens=3', '--streams=1', '--max_steps=2', '--compile=False'],
    'train_diffusion_attention.py': [
        '--dataset=DATA/tiny_byte', '--n_layers=1', '--d_model=16', '--d_ff=16', '--n_heads=2', '--seq_len=8',
        '--batch_size=2',
        '--max_iters=2', '--eval_interval=2', '--eval_iters=1', '--exp_name=new', '--device=cpu', '--compile=False']}

# of these a large value would be taken as it is, and take long
COSTLY = {'n_layer', 'n_head', 'n_embd', 'n_inner', 'block_size', 'vocab_size', 'batch_size', 'max_iters', 'num_epochs',
          'gradient_accumulation_steps', 'num_samples', 'max_new_tokens', 'max_steps', 'max_tokens', 'steps', 'rounds',
          'new_tokens', 'streams', 'draws', 'windows', 'samples', 'tokens', 'seconds', 'n_layers', 'd_model', 'd_ff',
          'n_heads',
          'seq_len', 'epochs', 'drift_positives', 'num_proc', 'draft_tokens', 'seeds', 'eval_iters', 'length', 'tune'}
TEXTS = {
    'ckpt': ['best', 'last'], 'dataset': ['tiny_byte', 'missing', '../tiny_byte', 'tiny_byte/', '', 'DATA/tiny_byte'],
    'data_dir': ['DATA', 'DATA/', '.', 'no'], 'data': ['DATA/tiny_byte', 'DATA', 'no', ''], 'log_dir': ['logs', 'a b',
    'text.txt'],
    'out_dir': ['run', 'run', 'hf:exported', 'run,DATA/encoder', 'out', 'a b', 'text.txt', 'text.txt/out', ''],
    'to': ['new', 'a b', 'é', 'text.txt', 'no/such/new', ''], 'html': ['new.html', 'no/new.html', '.'],
    'tasks': ['no.yaml', 'text.txt', ''],
    'figure': ['new.png', 'x.html', 'no/new.png'], 'judge': ['DATA/encoder', 'run', 'no', 'hf:exported'],
    'init_from': ['scratch', 'resume', 'auto', 'DATA/encoder', 'hf:exported', 'run', 'hf:no', 'hf:', 'hf:/no'],
    'encoder': ['DATA/encoder', 'hf:exported', 'run', 'no', 'hf:/no'], 'recipe': ['recipe.py', 'no.py', 'text.txt'],
    'exp_name': ['new', 'a b', '', 'a/b'], 'resume': ['run', 'no', ''], 'against': ['', 'no', '.'],
    'tokenizer': ['byte', 'char', 'bpe:257', 'bpe:258', 'bpe:0', 'bpe:99999', 'gpt3'],
    'start': ['Once', '', '\n', 'FILE:text.txt', 'FILE:no', 'FILE:.', '<|endoftext|>', 'é' * 40, '\udcff'],
    'template': ['[MASK:3]', 'a ____ b', 'no gap', '[MASK:99999]', 'FILE:text.txt', 'a [MASK] b\n', '\udcff____'],
    'repair': ['text.txt', 'FILE:text.txt', 'no', '.', 'rows.jsonl'],
    'ways': ['max_steps=2;max_steps=3,remask=flag', 'max_steps=0', 'x', ';', ',', 'device=cpu', '=', 'top_p=2'],
    'variants': ['gpt2', 'gpt2,heat', 'diffusion', 'gpt2,gpt2', 'x', ',', 'duo', 'parallel add', 'drifting',
    'drifting,gpt2'],
    'launch': ['', 'no-such-program', '"', ' '], 'text_key': ['', 'text', 'title'], 'input': ['text.txt', 'rows.jsonl', '.',
    'no'],
    'val_input': ['text.txt', 'rows.jsonl', 'no'], 'name': ['mine', '../mine', '', 'a b', '.x', 'é'],
    'only': ['ours', 'nanoGPT', 'x'], 'ignore_text': ['', 'the', '\udcff'], 'wandb_project': ['x'], 'wandb_run_name': ['x'],
    'device': ['auto', 'cpu', 'cpu:1', 'cuda', 'cuda:x', 'mps', 'warp', ''], 'seconds': ['0', '0.1', '-1'],
    'wandb_log': ['False'], 'compile': ['False', '0', 'no']}
KINDS = ('gpt2', 'dd', 'heat', 'rotating', 'parallel', 'duo', 'diffusion', 'block diffusion', 'drifting', 'token drift',
         'drafts')


def numbers(f):
    """Whole and other numbers at and around the ends of an option's range, as text."""
    bounds = list(f.metadata['bounds'].values())
    ends = [value for bound in bounds or [0] for value in (bound - 1, bound, bound + 1, bound + 4)]
    ends += [] if f.name in COSTLY else [f.default, 1000, 2 ** 31, 2 ** 62, 1e-30, 1e30, 0.5]
    ends = [value for value in ends if not (f.name in COSTLY and isinstance(value, (int, float)) and value > 16)]
    return [str(value) for value in ends]


def values_of(f):
    """Right, nearly right and wrong values of an option, as text."""
    rules = f.metadata
    wrong = ['nan', 'inf', '-1', 'x', '', '1,2', 'None', '9' * 400, '1.5']
    if f.name in TEXTS:
        right, wrong = TEXTS[f.name], []
    elif rules['choices']:
        right = [str(choice) for choice in rules['choices']]
    elif f.type is bool:
        right = ['True', 'False', '1']
    else:
        right = [*numbers(f), *rules['words'], '1,3', '2']
    return st.sampled_from(right * 10 + wrong)


@st.composite
def command_lines(draw):
    """-> script, the type of the model that it finds, words."""
    script = draw(st.sampled_from(list(BASE)))  # play.py would go on serving its page
    kind = draw(st.sampled_from(KINDS))
    if script == 'generate_diffusion.py' and draw(st.integers(0, 9)) != 7:
        kind = draw(st.sampled_from([kind for kind in KINDS if 'diffusion' in TYPE_WORDS[kind][0]]))
    words = list(BASE[script])
    if script == 'train.py':
        words += TYPE_WORDS[kind]
    strangers = draw(st.integers(0, 19)) == 7  # options of other types are refused, all in the same way
    model_type = TYPE_WORDS[kind][0].removeprefix('--model_type=') if script == 'train.py' else 'gpt2'
    known = [f for f in FIELDS[script].values()
             if strangers or not f.metadata['types'] or model_type in f.metadata['types']]
    for f in draw(st.lists(st.sampled_from(known), max_size=4, unique_by=lambda f: f.name)):
        words.append(f'--{f.name}={draw(values_of(f))}')
    if script == 'prepare.py':
        words += draw(st.sampled_from([['--input=text.txt', '--name=mine']] * 3 + [['shakespeare'], ['x'], []]))
    if draw(st.integers(0, 19)) == 7:
        words.append(draw(st.sampled_from(['--sise=3', 'no_config.py', 'recipe.py', '-x', '--', '--help'])))
    return script, kind, words


TYPE_WORDS = {kind: [f'--model_type={kind}'] for kind in KINDS} | {
    'drafts': ['--model_type=gpt2', '--draft_block=2'],
    'block diffusion': ['--model_type=diffusion', '--diffusion_objective=nelbo', '--diffusion_block=4'],
    'drifting': ['--model_type=drifting', '--encoder=DATA/encoder', '--drift_prefix=3'],
    'token drift': ['--model_type=diffusion', '--diffusion_objective=drift', '--encoder=DATA/encoder']}


@pytest.fixture(scope='module')
def runs(tmp_path_factory, data_dir, encoder):
    """A folder with a tiny run of every type, and two exports."""
    folder = tmp_path_factory.mktemp('runs')
    for kind in KINDS:
        words = [word.replace('DATA', data_dir) for word in BASE['train.py'] + TYPE_WORDS[kind]]
        done = run_here('train.py', *words, f'--out_dir={folder / kind}')
        assert done.returncode == 0, done.stderr
        done = run_here('export.py', f'--out_dir={folder / kind}', f'--to={folder / kind}-exported')
        assert done.returncode == 0, done.stderr
    return folder


def prepare_place(place, runs, kind, data_dir):
    shutil.copytree(runs / kind, place / 'run')
    os.symlink(runs / f'{kind}-exported', place / 'exported')
    (place / 'text.txt').write_text('Once upon a time <|endoftext|> there was a café.\n' * 20, encoding='utf-8')
    (place / 'rows.jsonl').write_text('{"text": "Once upon a time", "title": null}\n' * 30)
    settings = TINY | dict(max_iters=2, eval_iters=1, eval_interval=1)
    (place / 'recipe.py').write_text('\n'.join(f'{key} = {value!r}' for key, value in settings.items()))


def listing(folder):
    """{path: size and time} of the files in a folder."""
    return {path: (os.stat(path).st_size, os.stat(path).st_mtime_ns) for at, _, names in os.walk(folder)
            for path in [os.path.join(at, name) for name in names]}


def train_here(config, calls):
    """compare.call in this process."""
    done = [run_here('train.py', *words) for words, _ in calls]
    for one in done:
        assert one.returncode in (0, train.DIVERGED), one.stderr
    return [one.returncode == 0 for one in done]


@pytest.mark.slow
def test_any_command_line_ends_well_or_in_one_line(runs, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, 'call', train_here)
    monkeypatch.setattr(bench, 'peak_flops', lambda *_: 1e9)
    monkeypatch.setattr(bench, 'memory_of', lambda *_: 1)
    ends = Counter()
    outside, place = {folder: listing(folder) for folder in (runs, data_dir)}, tmp_path / 'place'
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail('it hangs', pytrace=True))

    @settings(few, max_examples=int(os.environ.get('RANDOM_COMMANDS', 100)))
    @given(command_lines())
    def check(command):
        script, kind, words = command
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        prepare_place(place, runs, kind, data_dir)
        monkeypatch.chdir(place)
        before = listing(place)
        signal.alarm(60)
        # what prepare.py makes stays in this place
        shared = 'data' if script == 'prepare.py' else data_dir
        done = run_here(script, *(word.replace('DATA', shared) for word in words))
        signal.alarm(0)
        ends[script, done.returncode] += 1
        trains = script.startswith('train')
        assert done.returncode in (0, 2) or trains and done.returncode == train.DIVERGED, done.stderr
        if done.returncode == 2:
            assert done.stderr.count('\n') == 1 and done.stderr.startswith(f'{script}: '), done.stderr
        if done.returncode == 2 and script != 'compare.py':
            assert listing(place) == before
        assert {folder: listing(folder) for folder in outside} == outside
    check()
    print(dict(ends))  # for the log of a campaign: pytest -s
