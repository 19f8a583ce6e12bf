"""export.py: transformers computes and writes what this repository does; every type comes back as it was."""
import importlib
import json
import os
import re
import shlex

import pytest
import torch
import yaml
from conftest import BLOCKS, TINY, pseudo_text
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

import export
import generate_diffusion
import prepare
import sample
import train
from model import load_model
from nanodrift import checkpoint, huggingface
from nanodrift.options import UserError
from nanodrift.tokenizer import tokenizer_from_meta, tokenizer_from_spec

transformers = pytest.importorskip('transformers', reason='pip install -r requirements-dev.txt')

TEXT = "Héllo  world, it's 3 o'clock;\n\n  def f(x):\treturn x\n"


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A folder with data sets of three tokenizers, which know the characters of TEXT."""
    folder = tmp_path_factory.mktemp('export')
    (folder / 'text.txt').write_text(pseudo_text(60) + TEXT, encoding='utf-8')
    for spec in ('byte', 'char', 'bpe:300'):
        prepare.main([f'--input={folder}/text.txt', '--name=text', f'--tokenizer={spec}', '--num_proc=1',
                      f'--data_dir={folder}'])
    return folder


@pytest.fixture
def trained(data, tmp_path):
    """trained(**settings) -> folder of a run of a few iterations."""
    def make(name='run', dataset='text_bpe300', **settings):
        values = TINY | dict(dataset=dataset, data_dir=data, out_dir=tmp_path / name) | settings
        assert train.main([f'--{key}={value}' for key, value in values.items()]) == 0
        return str(tmp_path / name)
    return make


@pytest.mark.parametrize('dataset', ['text_byte', 'text_char', 'text_bpe300'])
@pytest.mark.parametrize('bias', [True, False])
def test_transformers_has_the_same_logits_and_the_same_ids(trained, tmp_path, dataset, bias):
    out_dir = trained(dataset=dataset, bias=bias, ema=0.5)
    export.main([f'--out_dir={out_dir}', f'--to={tmp_path}/hf'])
    state = checkpoint.load(checkpoint.find(out_dir))
    mine, tokenizer = load_model(state), tokenizer_from_meta(state['tokenizer'])
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'hf').eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    ids = tokenizer.encode(TEXT)
    assert their_tokenizer.encode(TEXT) == ids and their_tokenizer.decode(ids) == TEXT
    assert their_tokenizer.eos_token_id == tokenizer.eot
    X = torch.tensor([ids[:16]])
    with torch.no_grad():
        assert torch.allclose(mine(X, X)[0], theirs(X).logits, atol=1e-5)
    greedy = theirs.generate(X[:, :4], max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eot, eos_token_id=None)
    assert greedy[0, 4:].tolist() == [int(column) for column in mine.generate(X[:, :4], 8, temperature=0)]


@pytest.mark.parametrize('dataset', ['text_byte', 'text_char'])
def test_the_tokenizer_hands_out_what_gpt2_takes_and_maps_no_character_to_another(trained, tmp_path, dataset):
    """Token types would shift the logits of some versions of transformers; an unknown character is end of text."""
    export.main([f"--out_dir={trained('model', dataset=dataset)}", f'--to={tmp_path}/hf'])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    assert set(tokenizer('a')) == {'input_ids', 'attention_mask'}
    if dataset == 'text_char':
        assert tokenizer('\u2603')['input_ids'] == [tokenizer.eos_token_id] != tokenizer('a')['input_ids']


def test_gpt2s_own_tokenizer_goes_along(tmp_path):
    ours = tokenizer_from_spec('gpt2')
    theirs = huggingface.hf_tokenizer(ours)
    assert theirs.encode(TEXT).ids == ours.encode(TEXT) and theirs.get_vocab_size() == 50257


CHANGES = {'dd': {}, 'heat': {'heat_t': 'adaptive'}, 'rotating': {}, 'parallel': {'parallel_merge': 'concat'}, 'duo': {},
           'diffusion': {}}


@pytest.mark.parametrize('model_type', CHANGES)
def test_every_type_comes_back(trained, tmp_path, model_type, capsys):
    out_dir = trained(model_type=model_type, **CHANGES[model_type])
    export.main([f'--out_dir={out_dir}', f'--to={tmp_path}/hf'])
    state = huggingface.open_run(f'hf:{tmp_path}/hf')
    mine = load_model(checkpoint.load(checkpoint.find(out_dir)))
    again = load_model(state)
    assert list(again.state_dict()) == list(mine.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), mine.state_dict().values()))
    assert not [name for name in (tmp_path / 'hf').iterdir() if name.suffix in ('.pt', '.bin', '.pkl')]
    capsys.readouterr()
    if model_type == 'diffusion':
        words = ['--max_new_tokens=8', '--device=cpu']
        generate_diffusion.main([f'--out_dir=hf:{tmp_path}/hf', *words])
        theirs = capsys.readouterr().out
        generate_diffusion.main([f'--out_dir={out_dir}', *words])
    else:
        words = ['--num_samples=1', '--max_new_tokens=8', '--device=cpu']
        sample.main([f'--init_from=hf:{tmp_path}/hf', *words])
        theirs = capsys.readouterr().out
        sample.main([f'--out_dir={out_dir}', *words])
    assert capsys.readouterr().out == theirs
    child = trained('child', model_type=model_type, init_from=f'hf:{tmp_path}/hf', **CHANGES[model_type])
    assert checkpoint.load(checkpoint.find(child))['parents'] == [state['run_id']]


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('model_type', ['gpt2', 'rotating', 'diffusion', 'drifting'])
def test_weights_of_16_bits_are_the_rounded_ones_in_half_the_file(trained, tmp_path, capsys, model_type, dtype):
    """But for the rates of rotary positions, whose rounding would grow with the position."""
    options = {'encoder': trained('encoder')} if model_type == 'drifting' else {}
    out_dir = trained(model_type=model_type, **options)
    for name, words in (('whole', []), ('half', [f'--dtype={dtype}'])):
        export.main([f'--out_dir={out_dir}', f'--to={tmp_path}/{name}', *words])
    whole, half = (load_file(tmp_path / name / 'model.safetensors') for name in ('whole', 'half'))
    exact = {name for name, tensor in half.items() if tensor.dtype == torch.float32}
    assert {tensor.dtype for name, tensor in half.items() if name not in exact} == {getattr(torch, dtype)}
    assert exact == {name for name in whole if 'frequencies' in name} and bool(exact) == (model_type == 'rotating')
    assert all(torch.equal(half[name], whole[name].to(half[name].dtype)) for name in whole)
    assert len({os.stat(tmp_path / 'half' / name).st_mode for name in ('model.safetensors', 'config.json')}) == 1
    model = load_model(huggingface.open_run(f'hf:{tmp_path}/half'))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    if model_type == 'gpt2':
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'half', dtype=torch.float32).eval()
        X = torch.arange(16)[None]
        with torch.no_grad():
            assert torch.allclose(model(X, X)[0], theirs(X).logits, atol=1e-5)
    command = generate_diffusion if model_type == 'diffusion' else sample
    key = 'out_dir' if model_type == 'diffusion' else 'init_from'
    command.main([f'--{key}=hf:{tmp_path}/half', '--max_new_tokens=4', '--device=cpu'])
    assert card_of(tmp_path / 'half')[1]['parameters'].endswith(f' in {dtype}')


def test_weights_beyond_float16_are_refused(trained, tmp_path):
    out_dir = trained()
    state = checkpoint.load(checkpoint.find(out_dir))
    state['model']['transformer.ln_f.weight'][0] = 1e6
    with pytest.raises(UserError, match='dtype=float16 .* --dtype=bfloat16'):
        export.export(state, str(tmp_path / 'hf'), 'float16')
    assert not [name for name in os.listdir(tmp_path) if name.startswith('hf')]


def test_drifting_takes_its_encoder_along(trained, tmp_path, monkeypatch):
    """From disk and from the Hub, where the encoder is a folder of the same repository."""
    encoder = trained('encoder', bias=False)
    out_dir = trained('drifting', model_type='drifting', encoder=encoder)
    mine = load_model(checkpoint.load(checkpoint.find(out_dir)))
    export.main([f'--out_dir={out_dir}', f'--to={tmp_path}/hf'])
    os.rename(encoder, f'{encoder}-elsewhere')
    with pytest.raises(UserError, match='encoder='):
        export.main([f'--out_dir={out_dir}', f'--to={tmp_path}/too-late'])
    os.rename(tmp_path / 'hf', tmp_path / 'moved')

    def download(repository, filename, **_):
        assert repository == 'some/model'
        if not (tmp_path / 'moved' / filename).exists():
            raise EntryNotFoundError('no such file')
        return str(tmp_path / 'moved' / filename)
    monkeypatch.setattr('huggingface_hub.hf_hub_download', download)
    monkeypatch.setattr(huggingface, 'hub_is_reachable', lambda: True)
    for name in (f'hf:{tmp_path}/moved', f'hf:{tmp_path}/moved/', 'hf:some/model'):
        again = load_model(huggingface.open_run(name))
        assert torch.equal(again.generate_at_once(2, seed=1), mine.generate_at_once(2, seed=1))
        assert again.encoder.source == mine.encoder.source
    export.main([f'--out_dir=hf:{tmp_path}/moved', f'--to={tmp_path}/again'])  # and once more
    assert (tmp_path / 'again' / 'encoder' / 'model.safetensors').exists()


@pytest.mark.parametrize('model_type, command', [
    ('gpt2', 'sample.py --init_from=hf:'), ('diffusion', 'generate_diffusion.py --out_dir=hf:')])
def test_the_command_that_is_printed_writes_text(trained, tmp_path, capsys, model_type, command):
    out_dir = trained(model_type=model_type)
    capsys.readouterr()
    export.main([f'--out_dir={out_dir}', f'--to={tmp_path}/hf'])
    assert capsys.readouterr().out == f'{tmp_path}/hf: python {command}{tmp_path}/hf\n'


def card_of(folder):
    """-> front matter, {fact: value} of the table, the fenced blocks of an exported model's README.md."""
    text = (folder / 'README.md').read_text(encoding='utf-8')
    _, front, body = text.split('---\n', 2)
    facts = dict(re.findall(r'^\| (\w.*?) \| (.*) \|$', body, re.MULTILINE))
    return yaml.safe_load(front), facts, re.findall(r'^```\w*\n(.*?)^```', body, re.DOTALL | re.MULTILINE), body


def parameters_of(folder):
    return sum(tensor.numel() for tensor in load_file(folder / 'model.safetensors').values())


KINDS_OF_CARDS = {'gpt2': {}, 'heat': {'heat_t': 'adaptive'}, 'diffusion': {},
                  'blocks': BLOCKS | {'diffusion_shift': True}, 'drifting': {'drift_prefix': 3}}


@pytest.mark.parametrize('name', KINDS_OF_CARDS)
def test_a_model_card_holds_the_numbers_of_the_checkpoint_and_its_commands_run(trained, data, tmp_path, monkeypatch, capsys,
                                                                               name):
    options = {'model_type': name} | KINDS_OF_CARDS[name]
    if name == 'drifting':
        options['encoder'] = trained('encoder')
    out_dir, folder = trained(gradient_accumulation_steps=2, **options), tmp_path / "it's a model"
    export.main([f'--out_dir={out_dir}', f'--to={folder}'])
    state, kind = checkpoint.load(checkpoint.find(out_dir)), options['model_type']
    front, facts, blocks, body = card_of(folder)
    assert front == {'library_name': 'transformers' if kind == 'gpt2' else 'nanodrift', 'pipeline_tag': 'text-generation',
                     'tags': ['nanodrift', kind]}
    meta = json.loads((data / 'text_bpe300' / 'meta.json').read_text())
    train_tokens, val_tokens = (f'{meta["splits"][split]["tokens"]:,}' for split in ('train', 'val'))
    assert facts['data set'] == f'`text_bpe300`: {train_tokens} tokens, and {val_tokens} for validation'
    assert facts['training'] == f'{state["iter_num"] * 4 * 2 * 16:,} tokens, {state["iter_num"]} iterations'
    assert '`learning_rate=0.01`' in facts['settings of the training'] and '`n_embd=16`' in facts['settings of the model']
    assert facts['run_id'] == f'`{state["run_id"]}`' and state['tokenizer']['identity'] in facts['tokenizer']
    assert facts['parents'] == (', '.join(f'`{parent}`' for parent in state['parents']) or 'none')
    figure, said = {'diffusion': ('upper bound of the validation loss', 'no exact likelihood'),
                    'drifting': ('Jensen-Shannon divergence of 2-grams', 'no likelihood')}.get(
                        kind, ('validation loss', 'sees the last 16 tokens'))
    assert facts[figure].startswith(f'{state["best_val_loss"]:.4f} ') and said in body and 'license' not in front
    assert ('validation loss' in facts) == (kind in ('gpt2', 'heat'))
    padding = 320 - 300 if kind == 'gpt2' else 320 - 300 - (kind == 'diffusion')  # rows of the embedding matrix
    exact = parameters_of(folder) - (16 * padding if kind in ('heat', 'diffusion') else 0)
    assert facts['parameters'] == f'{exact:,} in float32'
    monkeypatch.chdir(tmp_path)
    os.mkdir('NANODRIFT')
    os.symlink(data, 'NANODRIFT/data')
    *python, commands = blocks
    assert len(python) == (kind == 'gpt2')
    for code in python:
        exec(compile(code, 'card', 'exec'), {})
    small = {'sample.py': ['--max_new_tokens=4', '--num_samples=1'], 'evaluate.py': ['--windows=2']}
    for line in commands.splitlines():
        _, script, *words = shlex.split(line)
        script = script.removeprefix('NANODRIFT/')
        capsys.readouterr()
        importlib.import_module(script.removesuffix('.py')).main([*words, *small.get(script, ()), '--device=cpu'])
        assert capsys.readouterr().out


def test_a_model_card_leaves_out_what_is_not_known(trained, tmp_path, data):
    """Of an export there is no more than its weights; and a data set that was prepared anew is another text."""
    export.main([f"--out_dir={trained(model_type='dd')}", f'--to={tmp_path}/hf'])
    facts = card_of(tmp_path / 'hf')[1]
    export.main([f'--out_dir=hf:{tmp_path}/hf', f'--to={tmp_path}/again'])
    known = card_of(tmp_path / 'again')[1]
    assert set(known) == {'type', 'parameters', 'settings of the model', 'tokenizer', 'run_id', 'parents'}
    assert all(facts[fact] == value for fact, value in known.items())
    state = checkpoint.load(checkpoint.find(trained('other', dataset='text_byte')))
    for name, changes in {'old': {'data': {}}, 'moved': {'config': state['config'] | {'data_dir': 'nowhere'}},
                          'first': {'best_val_loss': float('inf')}}.items():
        export.export(state | changes, str(tmp_path / name))
        facts = card_of(tmp_path / name)[1]
        assert (facts['data set'] == '`text_byte`') == ('validation loss' in facts) == (name != 'first')


def test_a_model_card_of_names_that_are_no_unicode(trained, tmp_path):
    state = checkpoint.load(checkpoint.find(trained()))
    export.export(state | {'config': state['config'] | {'dataset': 'a|`b\n\udcff'}}, str(tmp_path / 'hf'))
    assert card_of(tmp_path / 'hf')[1]['data set'] == "`a/'b ?`"


def test_a_readme_that_is_there_stays(trained, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'README.md').write_text('my own words')
    with pytest.raises(UserError, match='exists'):
        export.main([f'--out_dir={trained()}', f'--to={tmp_path}/mine'])
    assert [path.read_text() for path in (tmp_path / 'mine').iterdir()] == ['my own words']


def test_a_killed_export_is_not_in_the_way(trained, tmp_path, monkeypatch):
    args = [f'--out_dir={trained()}', f'--to={tmp_path}/hf/']

    def killed(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(huggingface, 'write_tokenizer', killed)
        export.main(args)
    assert not [name for name in os.listdir(tmp_path) if name.startswith('hf')]
    (tmp_path / 'hf.tmp-export' / 'left').mkdir(parents=True)  # as kill -9 leaves it
    export.main(args)
    assert [name for name in os.listdir(tmp_path) if name.startswith('hf')] == ['hf']
    assert (tmp_path / 'hf' / 'tokenizer.json').exists() and not (tmp_path / 'hf' / 'left').exists()


@pytest.mark.parametrize('model_type', ['gpt2', 'heat'])
def test_a_spoilt_folder_is_one_line(trained, tmp_path, model_type):
    out_dir = trained(model_type=model_type)
    export.main([f'--out_dir={out_dir}', f'--to={tmp_path}/hf'])
    path, weights = tmp_path / 'hf' / 'config.json', tmp_path / 'hf' / 'model.safetensors'
    config, ours = json.loads(path.read_text()), model_type != 'gpt2'
    args, facts = (config['model_args'], config) if ours else (config, config['nanodrift'])
    changes = [(args, 'n_layer', 1), (args, 'n_layer', 3), (args, 'n_layer', 'two'), (args, 'n_layer', [2]),
               (args, 'n_embd', None), (args, 'n_head', {}), (facts, 'parents', 'x'), (facts, 'run_id', 5),
               (facts, 'tokenizer', []), (facts, 'tokenizer', {'name': 'byte', 'identity': 'x'})]
    for where, key, value in changes:
        before, where[key] = where[key], value
        path.write_text(json.dumps(config))
        with pytest.raises(UserError) as found:
            sample.main([f'--init_from=hf:{tmp_path}/hf', '--num_samples=1', '--max_new_tokens=2', '--device=cpu'])
        assert '\n' not in str(found.value) and len(str(found.value)) < 400, (key, value)
        where[key] = before
    path.write_text(json.dumps(config))
    tensors = load_file(weights)
    tensors.pop('transformer.h.1.ln_1.weight')
    save_file(tensors, weights)
    with pytest.raises(UserError, match='transformer.h.1.ln_1.weight'):
        sample.main([f'--init_from=hf:{tmp_path}/hf', '--device=cpu'])


def test_model_arguments_in_a_folder_may_be_text_and_those_that_are_missing_have_their_defaults(trained, tmp_path):
    export.main([f'--out_dir={trained(model_type="heat")}', f'--to={tmp_path}/hf'])
    path = tmp_path / 'hf' / 'config.json'
    config = json.loads(path.read_text())
    whole = dict(config['model_args'])
    numbers = ('vocab_size', 'block_size', 'n_layer', 'n_head')
    for kind in (str, float):
        config['model_args'] = whole | {key: kind(whole[key]) for key in numbers}
        path.write_text(json.dumps(config))
        trained(kind.__name__, model_type='heat', init_from=f'hf:{tmp_path}/hf')
        export.main([f'--out_dir=hf:{tmp_path}/hf', f'--to={tmp_path}/again-{kind.__name__}'])
    for key, reason in (('vocab_size', 'vocabulary of 50257'), ('n_layer', 'the weights lack transformer.h.2')):
        config['model_args'] = {name: value for name, value in whole.items() if name != key}
        path.write_text(json.dumps(config))
        with pytest.raises(UserError, match=reason):
            trained(key, model_type='heat', init_from=f'hf:{tmp_path}/hf')


def test_mistakes_are_one_line(trained, tmp_path, data):
    out_dir = trained()
    with pytest.raises(UserError, match='--to'):
        export.main([f'--out_dir={out_dir}'])
    with pytest.raises(UserError, match='exists'):
        export.main([f'--out_dir={out_dir}', f'--to={tmp_path}'])
    with pytest.raises(UserError, match='cannot write to='):
        export.main([f'--out_dir={out_dir}', f'--to={out_dir}/ckpt.pt/hf'])
    with pytest.raises(UserError, match='nowhere'):
        export.main(['--out_dir=nowhere', f'--to={tmp_path}/x'])
    with pytest.raises(UserError, match='tokenizer'):
        export.main([f'--out_dir={out_dir}', f'--to={tmp_path}/hf'])
        train.main([f'--init_from=hf:{tmp_path}/hf', '--dataset=text_char', f'--out_dir={tmp_path}/y',
                    f'--data_dir={data}'])
