"""Every type, variant and objective in 16-bit numbers, which are what a GPU and many CPUs train in by default."""
import pytest
import torch
from conftest import QUICK, WAYS
from test_train import load, metrics

import train
from model import GPT, load_model
from nanodrift import sharding
from nanodrift.machine import DTYPES, Ranks, autocast
from nanodrift.variants import VARIANTS

FURTHER = {
    'dd published': {'model_type': 'dd', 'published': True},
    'heat adaptive distance': {'model_type': 'heat', 'heat_t': 'adaptive', 'heat_form': 'distance'},
    'duo published': {'model_type': 'duo', 'published': True},
    'diffusion both': {'model_type': 'diffusion', 'positions': 'both'},
    'token drift': {'model_type': 'token drift'},
    'token drift tokens': {'model_type': 'token drift', 'drift_features': 'tokens'},
    'blocks': {'model_type': 'blocks'},
    'shifted blocks': {'model_type': 'shifted blocks'},
    'drafts': {'model_type': 'drafts'},
    'drifting soft': {'model_type': 'drifting', 'drift_output': 'soft'},
}
CASES = VARIANTS | FURTHER
# of the float32 loss, after a few steps of a tiny model; in float16 the scaler may skip the first of these
LOSS_BAND = {'bfloat16': 0.02, 'float16': 0.1}
ENCODER_BAND = 0.01  # of the first loss


def losses(out_dir):
    return [entry['loss'] for entry in metrics(out_dir) if 'loss' in entry]


def sampled(out_dir, encoder, dtype):
    """Some ids out of a trained model, under autocast."""
    model = load_model(load(out_dir))
    kind = model.config.model_type
    with autocast(torch.device('cpu'), dtype):
        if kind == 'diffusion':
            canvas = torch.full((2, 8), model.config.vocab_size)
            canvas[:, 0] = 1  # shifted blocks want a first token
            return model.generate_diffusion(canvas, max_steps=3, seed=1)
        if kind == 'drifting':
            return model.generate_at_once(2, seed=1)
        with torch.no_grad():
            return torch.stack(list(model.generate(torch.zeros(2, 1, dtype=torch.long), 6, seed=1)))


@pytest.fixture
def trained(tiny, encoder):
    def run(name, dtype, compile=False):
        config, *rest = tiny(out_dir=f'{dtype}-{compile}', **CASES[name] | {'dtype': dtype, 'compile': compile})
        assert train.train(config, *rest) == 0
        ids = sampled(config.out_dir, encoder, dtype)
        assert ids.min() >= 0 and ids.max() < rest[0].vocab_size
        return losses(config.out_dir)
    return run


def assert_near(short, exact, band):
    assert len(short) == len(exact) == 6
    assert short == pytest.approx(exact, rel=band)


@pytest.mark.parametrize('name, dtype', [
    *((name, 'bfloat16') for name in CASES),
    *(pytest.param(name, 'float16', marks=() if name in QUICK else pytest.mark.slow) for name in CASES)])
def test_every_kind_trains_evaluates_and_writes_in_16_bits(trained, name, dtype):
    band = 0.2 if name.startswith('drifting') else LOSS_BAND[dtype]  # its field is normalised, and so is its noise
    assert_near(trained(name, dtype), trained(name, 'float32'), band)


@pytest.mark.parametrize('dtype', LOSS_BAND)
@pytest.mark.parametrize('name', ['drifting', 'token drift'])
def test_the_encoder_is_in_16_bits_and_gives_the_losses_of_before(tiny, monkeypatch, name, dtype):
    """Exactly those of an encoder that autocast converts at every use. The first loss is near float32's."""
    found = {}
    for kept_as in ('float32', dtype):
        with monkeypatch.context() as patch:
            if kept_as == 'float32':
                patch.setattr(GPT, 'shorten_linears', lambda model, dtype: None)
            trainer = train.Trainer(*tiny(out_dir=kept_as, **CASES[name] | {'dtype': dtype}), Ranks())
        weights = {p.dtype for p in trainer.model.encoder.transformer.h[0].mlp.parameters()}
        others = {p.dtype for p in (trainer.model.vocabulary, *trainer.model.parameters())}
        assert weights == {DTYPES[kept_as]} and others == {torch.float32}
        for _ in range(3):
            trainer._step()
        found[kept_as] = losses(trainer.config.out_dir)
    assert found[dtype] == found['float32']
    exact = train.Trainer(*tiny(out_dir='exact', **CASES[name]), Ranks())
    exact._step()
    assert found[dtype][0] == pytest.approx(losses(exact.config.out_dir)[0], rel=ENCODER_BAND)


@pytest.mark.parametrize('compile_blocks', [GPT.compile_blocks, sharding.compile_blocks])
def test_the_encoder_is_compiled_with_the_model(tiny, monkeypatch, compile_blocks):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda block, **options: compiled.append(block))
    model = train.Trainer(*tiny(model_type='drifting'), Ranks()).model
    compile_blocks(model)
    assert set(model.encoder.layers) <= set(compiled)


@pytest.mark.slow
@pytest.mark.parametrize('name', [*(way for way in WAYS if way in CASES), 'heat adaptive', 'rotating gp', 'parallel concat'])
def test_compiled_code_does_the_same_in_16_bits(trained, name):
    band = 0.2 if name == 'drifting' else LOSS_BAND['bfloat16']
    assert_near(trained(name, 'bfloat16', compile=True), trained(name, 'float32'), band)


def test_every_way_to_train_is_here():
    assert set(WAYS) <= {changes.get('model_type', 'gpt2') for changes in CASES.values()}
