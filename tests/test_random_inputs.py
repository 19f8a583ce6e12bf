"""
What a user may write, drawn at random: values of options, templates, meta.json, and whole command lines.

Each gives a result or a UserError, never another exception. RANDOM_COMMANDS=1000 draws more command lines than the suite does.
"""
import json
import os
import shutil
import signal
from dataclasses import fields

import pytest
from conftest import ROOT, TINY, run_here
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import bench
import compare
import evaluate
import export
import generate_diffusion
import prepare
import sample
import train
import train_diffusion_attention
from generate_diffusion import parse_template
from model import TYPES, GPTConfig
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
    'train_diffusion_attention.py': (train_diffusion_attention.ExperimentConfig,)}
FIELDS = {script: {f.name: f for cls in classes for f in fields(cls)} for script, classes in SCRIPTS.items()}
ALL_FIELDS = [f for names in FIELDS.values() for f in names.values()]

strange_text = st.text(st.characters(exclude_characters='\0', exclude_categories=()), max_size=12)
plain_values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
                         st.sampled_from([10 ** 400, 2 ** 63, -2 ** 64]),
                         st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))


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
