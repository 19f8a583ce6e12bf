"""Weights of one model type in another: plain GPT-2 anywhere, and the layouts of the published checkpoints."""
import json

import pytest
import torch
from conftest import TINY

from model import GPT, GPTConfig, load_model
from nanodrift import checkpoint, huggingface
from nanodrift.machine import Ranks
from nanodrift.options import UserError
from nanodrift.tokenizer import BPETokenizer, tokenizer_from_meta, tokenizer_from_spec, train_bpe
from train import Trainer

transformers = pytest.importorskip('transformers', reason='pip install -r requirements-dev.txt')

CHANGES = {
    'dd': {}, 'dd published': {'model_type': 'dd', 'published': True}, 'heat': {'heat_t': 'adaptive'}, 'rotating': {},
    'rotating norm': {'model_type': 'rotating', 'use_norm': True}, 'parallel': {'parallel_merge': 'concat'}, 'duo': {},
}
every_type = pytest.mark.parametrize('name', CHANGES)
SIZES = dict(block_size=16, n_layer=2, n_head=2, n_embd=16)


def options(name):
    return {'model_type': name.split()[0]} | CHANGES[name]


def hf_folder(path, vocab_size, extra=None, drop=()):
    """A Hugging Face GPT-2 folder, with the tensors of `extra` ({name: tensor}) added, as the published checkpoints have."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=vocab_size, n_positions=16, n_layer=2, n_head=2, n_embd=16)
    weights = dict(transformers.GPT2LMHeadModel(config).state_dict())
    config.save_pretrained(path)
    weights = {k: v for k, v in weights.items() if k not in drop}
    torch.save(weights | (extra or {}), path / 'pytorch_model.bin')
    return str(path)


@pytest.fixture
def start(tiny, data_dir, capsys):
    """start(folder, **options) -> the trainer of a run that starts from it, and what it said."""
    def make(folder, **changes):
        config, model_config = tiny(init_from=f'hf:{folder}', **changes)
        trainer = Trainer(config, model_config, Ranks())
        return trainer, capsys.readouterr().out
    return make


@pytest.fixture
def vocab_size(tiny):
    config, model_config = tiny()
    return Trainer(config, model_config, Ranks()).model.config.vocab_size


@every_type
def test_plain_gpt2_starts_any_type_and_only_its_own_weights_are_fresh(tmp_path, start, vocab_size, name):
    folder = hf_folder(tmp_path, vocab_size)
    trainer, said = start(folder, **options(name))
    weights = huggingface.open_run(f'hf:{folder}')['model']
    own = trainer.model.state_dict()
    fresh = [key for key in own if key not in weights]
    for key in weights:
        assert torch.equal(own[key][:vocab_size], weights[key][:vocab_size]), key
    assert fresh or name == 'duo'
    for key in fresh:
        assert key in said, key
    if name == 'duo':
        assert f'transformer.wte.weight[{vocab_size}]' in said
        assert own['transformer.wte.weight'][vocab_size].abs().sum() > 0
    trainer.train()


PUBLISHED = {
    'drift': (dict(model_type='dd', published=True, apply_diffusion=False, baseline_each_head=False),
              {'attn.drift_param': (2, 8)}),
    'drift and baseline': (dict(model_type='dd', published=True, apply_diffusion=False),
                           {'attn.drift_param': (2, 8), 'attn.baseline': (2, 8)}),
    'all of dd': (dict(model_type='dd', published=True),
                  {'attn.drift_param': (2, 8), 'attn.baseline': (2, 8), 'attn.diffusion_param': (2, 8)}),
    'rotating': (dict(model_type='rotating'), {'attn.rope.frequencies': (2, 4)}),
    'rotating norm': (dict(model_type='rotating', use_norm=True),
                      {'attn.rope.frequencies': (2, 4), 'attn.rope.layer_norm.weight': (4,),
                       'attn.rope.layer_norm.bias': (4,)}),
}


def published_extra(shapes):
    return {f'transformer.h.{layer}.{name}': torch.randn(shape) for layer in range(2) for name, shape in shapes.items()}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_layouts_load_whole(tmp_path, start, vocab_size, name):
    changes, shapes = PUBLISHED[name]
    extra = published_extra(shapes)
    trainer, said = start(hf_folder(tmp_path, vocab_size, extra), **changes)
    assert 'starting fresh: nothing' in said
    own = trainer.model.state_dict()
    for key, tensor in extra.items():
        assert torch.equal(own[key], tensor), key


def test_published_weights_come_in_by_their_own_name_and_only_into_a_run(tmp_path, start, vocab_size):
    changes, shapes = PUBLISHED['all of dd']
    folder = hf_folder(tmp_path, vocab_size, published_extra(shapes))
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | {'model_type': 'dd-gpt2'}))
    assert 'starting fresh: nothing' in start(folder, **changes)[1]
    with pytest.raises(UserError, match='dd-gpt2.*--model_type'):
        load_model(huggingface.open_run(f'hf:{folder}'))


@pytest.mark.parametrize('name', CHANGES)
def test_a_weight_that_no_type_has_is_named(tmp_path, start, vocab_size, name):
    folder = hf_folder(tmp_path, vocab_size, {'transformer.h.0.attn.strange': torch.zeros(3)})
    with pytest.raises(UserError, match='attn.strange'):
        start(folder, **options(name))


def test_given_rates_of_rotating_gp_are_used(tmp_path, start, vocab_size):
    extra = published_extra({'attn.rope.frequencies': (2, 4)})
    trainer, _ = start(hf_folder(tmp_path, vocab_size, extra), model_type='rotating', rotating_head='gp')
    for layer, block in enumerate(trainer.model.transformer.h):
        rope = block.attn.rope
        assert torch.equal(rope.frequencies, extra[f'transformer.h.{layer}.attn.rope.frequencies'])
        angle = torch.arange(rope.table.size(1))[:, None] * rope.frequencies[:, None]
        assert torch.allclose(rope.table, torch.stack((angle.cos(), angle.sin()), -1), atol=1e-6)


@pytest.mark.parametrize('change, reason', [
    (lambda c, w: c.update(vocab_size=300), 'vocab_size=300'), (lambda c, w: c.pop('n_positions'), 'lacks n_positions'),
    (lambda c, w: (w.pop('transformer.wte.weight'), w.pop('lm_head.weight')), 'wte.weight is missing'),
    (lambda c, w: w.update({'transformer.a': {}}), 'no tensor'),
    (lambda c, w: w.update({'lm_head.weight': w['lm_head.weight'] + 1}), 'lm_head.weight'),
    (lambda c, w: c.update(model_type='parallel-gpt2'), '--model_type=parallel'),
    (lambda c, w: c.update(model_type='mamba-gpt2'), 'mamba-gpt2'),
])
def test_weights_that_contradict_their_config_are_rejected(tmp_path, start, vocab_size, change, reason):
    folder = hf_folder(tmp_path, vocab_size)
    config = json.loads((tmp_path / 'config.json').read_text())
    weights = torch.load(tmp_path / 'pytorch_model.bin', weights_only=True)
    change(config, weights)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    torch.save(weights, tmp_path / 'pytorch_model.bin')
    with pytest.raises(UserError, match=reason):
        start(folder)


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_damaged_files_are_named(tmp_path, start, vocab_size, name):
    folder = hf_folder(tmp_path, vocab_size)
    (tmp_path / name).write_bytes(b'no such thing')
    with pytest.raises(UserError, match=name):
        start(folder)


def test_the_shared_bottleneck_of_parallel_concat_loads(tmp_path, start, vocab_size):
    extra = {'transformer.bottleneck.weight': torch.randn(16, 32), 'transformer.bottleneck.bias': torch.randn(16)}
    trainer, said = start(hf_folder(tmp_path, vocab_size, extra), model_type='parallel', parallel_merge='concat')
    assert 'starting fresh: nothing' in said
    assert torch.equal(trainer.model.transformer.bottleneck.weight, extra['transformer.bottleneck.weight'])


def test_duos_mask_is_the_last_row_of_an_embedding_matrix_one_longer(tmp_path, start, vocab_size):
    folder = hf_folder(tmp_path, vocab_size + 1)
    trainer, said = start(folder, model_type='duo', published=True)
    assert 'starting fresh: nothing' in said and trainer.model.config.vocab_size == vocab_size
    given = huggingface.open_run(f'hf:{folder}')['model']['transformer.wte.weight']
    assert torch.equal(trainer.model.transformer.wte.weight[:vocab_size + 1], given[:vocab_size + 1])
    with pytest.raises(UserError, match='vocabulary'):
        start(folder, model_type='gpt2')
    with pytest.raises(UserError, match='vocabulary'):
        start(hf_folder(tmp_path, vocab_size + 2), model_type='duo')


def test_folders_that_are_not_gpt2_are_rejected_by_name(tmp_path):
    name = f'hf:{tmp_path}'
    with pytest.raises(UserError, match='config.json'):
        huggingface.open_run(name)
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'llama'}))
    with pytest.raises(UserError, match="'llama'"):
        huggingface.open_run(name)
    config = {'model_type': 'gpt2', 'n_positions': 8, 'vocab_size': 9, 'n_layer': 1, 'n_head': 1, 'n_embd': 4}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match='model.safetensors'):
        huggingface.open_run(name)
    (tmp_path / 'config.json').write_text(json.dumps(config | {'layer_norm_epsilon': 1e-3}))
    with pytest.raises(UserError, match='layer_norm_epsilon'):
        huggingface.open_run(name)


def test_without_a_network_the_error_says_what_to_do():
    with pytest.raises(UserError, match='hf:FOLDER'):
        huggingface.open_run('hf:nobody/no-such-model')


def test_what_is_unknown_missing_or_of_another_shape_is_named(tmp_path, start, vocab_size):
    changes, shapes = PUBLISHED['all of dd']
    extra = published_extra(shapes)
    with pytest.raises(UserError, match='attn.drift_param'):  # unknown to gpt2
        start(hf_folder(tmp_path, vocab_size, extra))
    with pytest.raises(UserError, match=r'drift_param has shape \(2, 8\).*published'):
        start(hf_folder(tmp_path, vocab_size, extra), model_type='dd')
    without = {key: tensor for key, tensor in extra.items() if key != 'transformer.h.1.attn.baseline'}
    with pytest.raises(UserError, match='h.1.attn.baseline'):
        start(hf_folder(tmp_path, vocab_size, without), **changes)
    with pytest.raises(UserError, match='lack transformer.ln_f.weight'):
        start(hf_folder(tmp_path, vocab_size, drop=['transformer.ln_f.weight']))


def test_a_longer_context_and_another_types_run_are_cut_to_fit(tmp_path, tiny, capsys):
    config, model_config = tiny()
    Trainer(config, model_config, Ranks()).train()
    child, child_model = tiny(out_dir='child', init_from=config.out_dir, model_type='duo', block_size=8)
    trainer = Trainer(child, child_model, Ranks())
    assert 'an id without text' in capsys.readouterr().out and trainer.model.config.block_size == 8
    trainer.train()
    grandchild, _ = tiny(out_dir='grandchild', init_from=child.out_dir, model_type='duo')
    again = Trainer(grandchild, GPTConfig(model_type='duo', **{k: TINY[k] for k in SIZES}), Ranks())
    assert 'starting fresh: nothing' in capsys.readouterr().out
    trained = checkpoint.load(checkpoint.find(child.out_dir))['model']['transformer.wte.weight']
    assert torch.equal(again.model.transformer.wte.weight, trained)
    backwards, plain = tiny(out_dir='backwards', init_from=child.out_dir)
    with pytest.raises(UserError, match='mask token.*--model_type=duo'):  # it would become an id with text
        Trainer(backwards, plain, Ranks())


@pytest.mark.parametrize('bias', [True, False])
def test_gpt2_has_no_weights_of_its_own(bias):
    names = list(GPT(GPTConfig(vocab_size=20, bias=bias, **SIZES)).state_dict())
    assert names and all(checkpoint.GPT2_NAMES.fullmatch(name) for name in names)


def test_every_own_weight_is_listed():
    model = GPT(GPTConfig(model_type='heat', heat_t='adaptive', vocab_size=20, **SIZES))
    names = [name for name in model.state_dict() if not checkpoint.GPT2_NAMES.fullmatch(name)]
    assert len(names) == 2 * 6 and all('.attn.time.mlp.' in name for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# other people's tokenizers, and their ways to keep weights

def with_tokenizer(path, vocab_size, tokens, *specials, split=False):
    """A Hugging Face GPT-2 folder with a tokenizer of these tokens (bytes) and, behind end-of-text, special ones."""
    folder = hf_folder(path, vocab_size)
    theirs = huggingface.hf_tokenizer(BPETokenizer(f'bpe:{len(tokens) + 1}', tokens))
    theirs.add_special_tokens(list(specials))
    if split:
        theirs.model.save(folder)
        vocab = json.loads((path / 'vocab.json').read_text())
        (path / 'vocab.json').write_text(json.dumps(vocab | {'<|endoftext|>': len(tokens)}))
    else:
        theirs.save(str(path / 'tokenizer.json'))
    return f'hf:{folder}'


OTHER_TOKENS = train_bpe(280, ['the cat sat on the mat, and there was nothing that a dog could do about it'] * 9).tokens[:-1]


@pytest.mark.parametrize('split', [False, True])
def test_a_tokenizer_beside_weights_is_theirs(tmp_path, split):
    state = huggingface.open_run(with_tokenizer(tmp_path, 280, OTHER_TOKENS, split=split))
    tokenizer = tokenizer_from_meta(state['tokenizer'])
    assert tokenizer.tokens[:-1] == OTHER_TOKENS and tokenizer.vocab_size == 280 == tokenizer.eot + 1
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=huggingface.hf_tokenizer(tokenizer))
    assert tokenizer.encode('the mat, the hat') == theirs.encode('the mat, the hat')


def test_a_tokenizer_of_the_size_of_gpt2s_is_told_from_it(tmp_path):
    gpt2 = tokenizer_from_spec('gpt2').tokens[:-1]
    (tmp_path / 'a').mkdir()
    same = huggingface.open_run(with_tokenizer(tmp_path / 'a', 50257, gpt2))
    assert same['tokenizer']['name'] == 'gpt2'
    (tmp_path / 'b').mkdir()
    other = huggingface.open_run(with_tokenizer(tmp_path / 'b', 50257, gpt2[:-1] + [b' the the']))
    assert other['tokenizer']['name'] == 'bpe:50257'


def test_added_ids_are_neither_drawn_nor_counted(tmp_path):
    state = huggingface.open_run(with_tokenizer(tmp_path, 282, OTHER_TOKENS, '[PAD]', '[SEP]'))
    model = load_model(state)
    assert model.config.vocab_size == 280 and model.head(torch.randn(1, 16)).size(-1) == 280
    ids = [int(i) for column in model.generate(torch.zeros(50, 1).long(), 8, temperature=50.0) for i in column]
    assert max(ids) < 280


@pytest.mark.parametrize('change', [
    lambda c: c['model'].update(type='Unigram', vocab=[['a', 0.0]]), lambda c: c.update(pre_tokenizer={'type': 'Split'}),
    lambda c: c['pre_tokenizer'].update(use_regex=False), lambda c: c['pre_tokenizer'].update(add_prefix_space=True),
    lambda c: c.update(pre_tokenizer={'type': 'Sequence', 'pretokenizers': [{'type': 'Digits'}, c['pre_tokenizer']]}),
    lambda c: c['model'].update(ignore_merges=True), lambda c: c.update(normalizer={'type': 'Lowercase'}),
    lambda c: c['model']['merges'].reverse(), lambda c: c['added_tokens'][0].update(id=0), lambda c: c.update(model=None)])
def test_a_tokenizer_of_another_form_is_refused(tmp_path, change):
    name = with_tokenizer(tmp_path, 280, OTHER_TOKENS)
    content = json.loads((tmp_path / 'tokenizer.json').read_text())
    change(content)
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match='form that GPT-2 has'):
        huggingface.open_run(name)


def test_weights_with_the_head_alone_and_in_several_files(tmp_path):
    folder = hf_folder(tmp_path, 99)
    wanted = huggingface.open_run(f'hf:{folder}')['model']
    weights = torch.load(tmp_path / 'pytorch_model.bin')
    del weights['transformer.wte.weight']
    names = sorted(weights)
    shards = {'a.bin': names[::2], 'b.bin': names[1::2]}
    for file, some in shards.items():
        torch.save({name: weights[name] for name in some}, tmp_path / file)
    (tmp_path / 'pytorch_model.bin').unlink()
    index = {'weight_map': {name: file for file, some in shards.items() for name in some}}
    (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps(index))
    found = huggingface.open_run(f'hf:{folder}')['model']
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize('name', ['/no/such/folder', './none', '../none'])
def test_a_missing_folder_is_no_name_on_the_hub(name):
    with pytest.raises(UserError, match='no such folder'):
        huggingface.open_run(f'hf:{name}')


def test_cached_weights_without_their_tokenizer_still_load_offline(monkeypatch):
    """GPT-2 in the cache of the hub, from before tokenizers were read."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    def missing(*_, **__):
        raise LocalEntryNotFoundError('no network')
    monkeypatch.setattr('huggingface_hub.hf_hub_download', missing)
    monkeypatch.setattr(huggingface, 'hub_is_reachable', lambda: False)
    assert huggingface.read_tokenizer('owner/model', 50257).name == 'gpt2'
    assert huggingface.read_tokenizer('owner/model', 99) is None
    with pytest.raises(UserError, match='neither a local folder'):
        huggingface.open_run('hf:owner/model')
