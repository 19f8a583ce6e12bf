"""GPT-2 is GPT-2: against transformers, against slow obvious versions, and against itself on every path."""
import math

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from nanodrift import checkpoint, huggingface, kernels
from nanodrift.kernels import IGNORE
from nanodrift.options import UserError
from nanodrift.sampling import sample_logits

transformers = pytest.importorskip('transformers', reason='pip install -r requirements-dev.txt')

SIZES = {'block_size': 32, 'vocab_size': 101, 'n_layer': 4, 'n_head': 4, 'n_embd': 32}


def make(seed=0, spread=0.2, **changes):
    """A tiny model whose weights are large enough that every part of it shows in the logits."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SIZES | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * spread)
    return model.eval()


def tokens(B, T, vocab_size=SIZES['vocab_size'], seed=1):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face

@pytest.fixture(scope='module')
def hf_model():
    torch.manual_seed(3)
    config = transformers.GPT2Config(n_positions=32, vocab_size=101, n_layer=3, n_head=4, n_embd=32, n_inner=96,
                                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


@pytest.mark.parametrize('form', ['safetensors', 'sharded', 'bin', 'no_prefix'])
def test_logits_loss_and_gradients_agree_with_hugging_face(hf_model, tmp_path, form):
    if form == 'bin':
        hf_model.config.save_pretrained(tmp_path)
        torch.save(hf_model.state_dict(), tmp_path / 'pytorch_model.bin')
    elif form == 'no_prefix':  # the layout of the published gpt2 repositories
        from safetensors.torch import save_file
        hf_model.config.save_pretrained(tmp_path)
        weights = {k: v.contiguous().clone() for k, v in hf_model.transformer.state_dict().items()}
        weights['h.0.attn.bias'] = torch.ones(1, 1, 32, 32)
        save_file(weights, tmp_path / 'model.safetensors')
    else:
        hf_model.save_pretrained(tmp_path, max_shard_size='40KB' if form == 'sharded' else '1GB')
    if form == 'sharded':
        assert (tmp_path / 'model.safetensors.index.json').exists()
    state = huggingface.open_run(f'hf:{tmp_path}')
    model = GPT(GPTConfig(**state['model_args'])).eval()
    assert checkpoint.start_from(model, state['model']) == []
    idx = tokens(2, 32)
    theirs = hf_model(idx, labels=idx)
    ours, _ = model(idx, idx)
    torch.testing.assert_close(ours, theirs.logits, atol=1e-5, rtol=0)
    _, loss = model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous(), return_logits=False)
    torch.testing.assert_close(loss, theirs.loss, atol=1e-5, rtol=0)
    hf_model.zero_grad()
    theirs.loss.backward()
    loss.backward()
    wte = hf_model.transformer.wte.weight.grad
    torch.testing.assert_close(model.transformer.wte.weight.grad[:101], wte, atol=1e-5, rtol=1e-4)
    c_fc = hf_model.transformer.h[1].mlp.c_fc.weight.grad.t()
    torch.testing.assert_close(model.transformer.h[1].mlp.c_fc.weight.grad, c_fc, atol=1e-5, rtol=1e-4)


def test_weights_that_do_not_fit_are_named():
    model, other = make(), make(n_embd=16)
    with pytest.raises(UserError, match='wte.weight has shape'):
        checkpoint.start_from(model, other.state_dict())
    with pytest.raises(UserError, match='stranger'):
        checkpoint.start_from(model, model.state_dict() | {'stranger': torch.zeros(1)})


# ---------------------------------------------------------------------------------------------------------------------
# initialisation, parameters, vocabulary

def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=4, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith('c_proj.weight'):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05), name
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith('bias'):
            assert (p == 0).all(), name
        else:
            assert (p == 1).all(), name


def test_gpt2_has_124_million_parameters():
    with torch.device('meta'):
        model = GPT(GPTConfig())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(p.numel() for p in model.parameters()) - (50304 - 50257) * 768 == 124_439_808


@pytest.mark.parametrize('bias', [True, False])
def test_decay_groups_cover_every_parameter_once(bias):
    model = make(bias=bias)
    decay, rest = model.decay_groups(0.1)
    ids = [id(p) for group in (decay, rest) for p in group['params']]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert decay['weight_decay'] == 0.1 and rest['weight_decay'] == 0
    assert {p.dim() for p in rest['params']} == {1}


def test_padding_has_no_probability_and_gets_no_gradient():
    model = make()
    wte = model.transformer.wte.weight
    assert len(wte) == 128
    with torch.no_grad():
        wte[101:] = 100.0  # would win every argmax
    idx = tokens(4, 32)
    logits, loss = model(idx, idx)
    assert logits.shape == (4, 32, 101) and model(idx)[0].shape == (4, 1, 101)
    loss.backward()
    assert (wte.grad[101:] == 0).all()
    wte.grad = None
    _, fused = model(idx, idx, return_logits=False)
    torch.testing.assert_close(fused, loss)
    fused.backward()
    assert (wte.grad[101:] == 0).all()
    assert all((column < 101).all() for column in model.generate(idx, 20, temperature=5.0, seed=0))


def test_contradicting_sizes_are_rejected():
    for wrong in ({'n_head': 3}, {'dropout': 1.0}, {'n_layer': 0}, {'model_type': 'gpt3'}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            GPTConfig(**SIZES | wrong)


# ---------------------------------------------------------------------------------------------------------------------
# causality (more of it in test_model_types.py), and every path gives the same

def test_random_tokens_cannot_be_predicted():
    """Trained on noise, held-out loss stays at log V or above; a leak would fall below."""
    torch.manual_seed(0)
    V = 32
    model = GPT(GPTConfig(block_size=16, vocab_size=V, n_layer=2, n_head=2, n_embd=32))
    optimizer = torch.optim.AdamW(model.decay_groups(0.0), lr=3e-3)
    rng = torch.Generator().manual_seed(0)
    for _ in range(150):
        noise = torch.randint(V, (32, 17), generator=rng)
        model(noise[:, :-1].contiguous(), noise[:, 1:].contiguous(), return_logits=False)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    noise = torch.randint(V, (256, 17), generator=rng)
    with torch.no_grad():
        logits, _ = model.eval()(noise[:, :-1], noise[:, 1:])
    losses = F.cross_entropy(logits.flatten(0, 1), noise[:, 1:].flatten(), reduction='none')
    error = losses.std() / math.sqrt(losses.numel())
    assert abs(losses.mean() - math.log(V)) < 3 * error + 0.02


@pytest.mark.parametrize('prompt', [1, 5, 31, 32, 40])
def test_cached_greedy_tokens_are_the_uncached_ones(prompt):
    model = make(spread=0.3)
    idx = tokens(3, prompt)
    cached = torch.stack(list(model.generate(idx, 50, temperature=0)), 1)
    uncached = torch.stack(list(model.generate(idx, 50, temperature=0, use_cache=False)), 1)
    assert torch.equal(cached, uncached)
    slow = idx  # nanoGPT's way: crop, forward, append
    for _ in range(50):
        slow = torch.cat((slow, model(slow[:, -32:])[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(cached, slow[:, prompt:])
    assert len(set(cached.flatten().tolist())) > 5, 'a constant output would agree too'


def test_gradient_checkpointing_and_compilation_change_nothing():
    idx = tokens(2, 32)
    grads = []
    for change in ('plain', 'recomputed', 'compiled'):
        model = make().train()
        if change == 'recomputed':
            model.recompute_blocks()
        if change == 'compiled':
            model.compile_blocks()
        model(idx, idx, return_logits=False)[1].backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed, compiled in zip(*grads):
        assert torch.equal(plain, recomputed)
        torch.testing.assert_close(plain, compiled, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_metrics_are_those_of_the_logits(monkeypatch):
    monkeypatch.setattr(kernels, 'LOGITS_PER_CHUNK', 700)  # several chunks
    model = make()
    idx, y = tokens(2, 32), tokens(2, 32, seed=2)
    y[0, :5] = IGNORE
    found = model.objective.metrics(model, idx, y)
    logits, loss = model(idx, y)
    keep = y != IGNORE
    assert found['loss'].count == found['accuracy'].count == keep.sum()
    assert found['loss'].value() == pytest.approx(loss.item(), rel=1e-6)
    assert found['accuracy'].total == (logits.argmax(-1) == y)[keep].sum()


# ---------------------------------------------------------------------------------------------------------------------
# drawing

def frequencies(logits, n=200_000, **options):
    rng = torch.Generator().manual_seed(0)
    ids = sample_logits(logits.expand(n, -1), rng=rng, **options)
    return torch.bincount(ids, minlength=logits.size(-1)) / n


def test_drawing_follows_the_distribution():
    p = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    logits = p.log()
    torch.testing.assert_close(frequencies(logits), p, atol=0.005, rtol=0)
    warm = (logits / 2).softmax(-1)
    torch.testing.assert_close(frequencies(logits, temperature=2.0), warm, atol=0.005, rtol=0)
    top2 = torch.tensor([2 / 3, 1 / 3, 0, 0, 0])
    torch.testing.assert_close(frequencies(logits, top_k=2), top2, atol=0.005, rtol=0)
    torch.testing.assert_close(frequencies(logits, top_p=0.7), top2, atol=0.005, rtol=0)  # the crossing id stays in
    torch.testing.assert_close(frequencies(logits, top_p=0.5), torch.eye(5)[0], atol=0, rtol=0)
    torch.testing.assert_close(frequencies(logits, top_k=4, top_p=0.5), torch.eye(5)[0], atol=0, rtol=0)
    torch.testing.assert_close(frequencies(logits, top_k=9), p, atol=0.005, rtol=0)
    torch.testing.assert_close(frequencies(logits, temperature=0), torch.eye(5)[0], atol=0, rtol=0)
    torch.testing.assert_close(frequencies(logits, temperature=1e-40), torch.eye(5)[0], atol=0, rtol=0)


def test_the_same_seed_draws_the_same():
    model = make()
    draw = [torch.stack(list(model.generate(tokens(2, 4), 12, seed=seed))) for seed in (7, 7, 8)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
