"""Every model type: against slow obvious versions, against gpt2 where both must agree, and for leaks."""
import copy
import inspect
import math
import weakref
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from test_model import SIZES, make, tokens
from test_rotary import rotate_in_a_loop

import train
from model import GPT, TYPES, GPTConfig
from nanodrift import kv_cache
from nanodrift.kernels import score_pieces
from nanodrift.kv_cache import KVCache
from nanodrift.options import UserError

VARIANTS = {  # every causal one, each option off its default at least once
    'gpt2': {},
    'dd': {'model_type': 'dd', 'diffusion_std': 0.2},
    'dd without drift': {'model_type': 'dd', 'apply_drift': False},
    'dd without diffusion': {'model_type': 'dd', 'apply_diffusion': False},
    'dd per layer': {'model_type': 'dd', 'baseline_each_head': False},
    'dd published': {'model_type': 'dd', 'published': True},
    'dd published, no baseline': {'model_type': 'dd', 'published': True, 'baseline_each_head': False},
    'heat': {'model_type': 'heat'},
    'heat number': {'model_type': 'heat', 'heat_t': '1.7'},
    'heat distance': {'model_type': 'heat', 'heat_form': 'distance'},
    'heat adaptive': {'model_type': 'heat', 'heat_t': 'adaptive'},
    'heat adaptive distance': {'model_type': 'heat', 'heat_t': 'adaptive', 'heat_form': 'distance', 'heat_t_min': 0.2,
                               'heat_t_max': 8.0},
    'rotating lr': {'model_type': 'rotating'},
    'rotating lr norm': {'model_type': 'rotating', 'use_norm': True},
    'rotating gp': {'model_type': 'rotating', 'rotating_head': 'gp'},
    'rotating gp norm': {'model_type': 'rotating', 'rotating_head': 'gp', 'use_norm': True},
    'parallel mean': {'model_type': 'parallel'},
    'parallel add': {'model_type': 'parallel', 'parallel_merge': 'add'},
    'parallel concat': {'model_type': 'parallel', 'parallel_merge': 'concat'},
    'duo': {'model_type': 'duo', 'duo_fill_weight': 0.5},
    'duo published': {'model_type': 'duo', 'published': True},
}
V, H, D = SIZES['vocab_size'], SIZES['n_head'], SIZES['n_embd'] // SIZES['n_head']
every_variant = pytest.mark.parametrize('variant', VARIANTS)


def twin(model, **changes):
    """A model of another configuration with the same weights, and with no others than those."""
    other = GPT(replace(model.config, **changes))
    theirs = {name: p for name, p in model.state_dict().items() if name in other.state_dict()}
    other.load_state_dict(theirs)
    return other.train(model.training)


def batch(model, B=2, T=32, seed=1):
    return model.objective.make_batch(tokens(B, T + 1, model.config.vocab_size, seed), torch.Generator())


def token_logits(model, idx):
    """Logits of the tokens alone, (B, T, V), on the way that training takes; the same noise in every call."""
    X, Y, W = model.objective.make_batch(torch.cat((idx, idx[:, :1]), dim=1), torch.Generator())
    torch.manual_seed(0)
    return model(X, Y, W)[0][:, :idx.size(1)]


def gradients(model, X, Y, W=None):
    """{name: gradient} of the loss; the same noise in every call."""
    torch.manual_seed(0)
    model.zero_grad()
    model(X, Y, W, return_logits=False)[1].backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(found, wanted, tolerance=1e-5):
    """Within a fraction of the largest value."""
    wanted = wanted.to(found.dtype)
    torch.testing.assert_close(found, wanted, atol=tolerance * wanted.abs().max().item(), rtol=0)


def assert_same_gradients(found, wanted, tolerance=1e-5):
    largest = max(g.abs().max().item() for g in wanted.values())
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=tolerance * largest, rtol=1e-4, msg=name)


def assert_same_value_and_gradients(found, wanted, *inputs):
    """The gradients of any weighted sum of both, with respect to each of the inputs."""
    assert_close(found, wanted)
    direction = torch.randn_like(found)
    gradients = [torch.autograd.grad((direction * y).sum(), inputs) for y in (found, wanted)]
    for g, e in zip(*gradients):
        assert e.abs().max() > 1e-3
        assert_close(g, e)


def heads_of(attn, x):
    """x (B, T, C) -> q, k, v (B, H, T, D), nanoGPT's way."""
    return [part.view(*x.shape[:2], attn.n_head, -1).transpose(1, 2) for part in attn.c_attn(x).split(x.size(2), dim=2)]


def attended(attn, x):
    """What reaches c_proj, as heads (B, H, T, D)."""
    seen = []
    handle = attn.c_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attn(x)
    handle.remove()
    return seen[0].view(*x.shape[:2], attn.n_head, -1).transpose(1, 2)


def attend_in_a_loop(q, k, v, score=lambda query, keys, where: keys @ query / math.sqrt(len(query))):
    """Causal attention, one query at a time; score(query (D,), keys (i+1, D), (b, h, i)) -> (i+1,)."""
    B, n_head, T, _ = q.shape
    y = [score(q[b, h, i], k[b, h, :i + 1], (b, h, i)).softmax(0) @ v[b, h, :i + 1]
         for b in range(B) for h in range(n_head) for i in range(T)]
    return torch.stack(y).view(v.shape)


def plain_block(block, x, allowed):
    """A gpt2 block with softmax written out; allowed (T, T) tells what each position attends to."""
    q, k, v = heads_of(block.attn, block.ln_1(x))
    scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(~allowed, -math.inf)
    x = x + block.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.ln_2(x))


# ---------------------------------------------------------------------------------------------------------------------
# all types: no leaks, and every path gives the same

@every_variant
@pytest.mark.parametrize('path', ['evaluation', 'training', 'recomputing'])
def test_a_later_token_changes_no_earlier_logit(variant, path):
    changes = VARIANTS[variant] | {'dropout': 0.1 if path == 'training' else 0.0}
    model = make(**changes).train(path != 'evaluation')
    if path == 'recomputing':
        model.recompute_blocks()
    for length, positions in ((2, [1]), (6, range(1, 6)), (32, [15, 16, 31])):
        idx = tokens(2, length)
        before = token_logits(model, idx)
        for position in positions:
            changed = idx.clone()
            changed[:, position:] = (changed[:, position:] + 1) % V
            after = token_logits(model, changed)
            assert torch.equal(before[:, :position], after[:, :position])
            assert not torch.allclose(before[:, position], after[:, position])


@pytest.mark.parametrize('variant, backend', [('duo', 'inductor')] + [(variant, 'aot_eager') for variant in (
    'dd', 'dd published', 'heat distance', 'heat adaptive', 'rotating lr', 'rotating gp', 'parallel mean')])
@torch.no_grad()
def test_compiled_blocks_leak_nothing_and_compute_the_same(variant, backend):
    """Of duo, which asks most of it, by the compiler itself; of the others as it traces them."""
    torch.compiler.reset()
    model = make(**{'n_layer': 2} | VARIANTS[variant]).train()
    idx, (X, Y, W) = tokens(2, 9), batch(model, T=9)
    torch.manual_seed(1)
    plain = model(X, Y, W)[0]
    if backend == 'inductor':
        model.compile_blocks()
    else:
        for block in model.layers:
            block.compile(dynamic=False, backend=backend)
    torch.manual_seed(1)
    assert_close(model(X, Y, W)[0], plain)
    before = token_logits(model, idx)
    for position in (1, 5, 8):
        changed = idx.clone()
        changed[:, position:] = (changed[:, position:] + 1) % V
        after = token_logits(model, changed)
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.allclose(before[:, position], after[:, position])


@every_variant
@torch.no_grad()
def test_cached_logits_leak_nothing_and_are_the_full_ones(variant):
    model = make(**VARIANTS[variant])
    idx = tokens(2, 32)

    def cached(idx):
        cache, parts = KVCache(model, 2, 32), []
        for start, end in pairwise((0, 7, *range(8, 28), 32)):
            parts.append(model.trunk(idx[:, start:end], cache.begin(end - start)))
            cache.keep(end - start)
        return model.head(torch.cat(parts, dim=1))
    before = cached(idx)
    assert_close(before, model.head(model.trunk(idx)), 1e-5)
    for position in (4, 7, 20):
        changed = idx.clone()
        changed[:, position:] = (changed[:, position:] + 1) % V
        after = cached(changed)
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.allclose(before[:, position], after[:, position])


@every_variant
@torch.no_grad()
def test_rows_of_a_cache_may_hold_different_numbers_of_positions(variant):
    """As they do after drafts, of which each row keeps some."""
    model = make(**VARIANTS[variant])
    idx = tokens(3, 32)
    whole = model.head(model.trunk(idx))
    cache = KVCache(model, 3, 32)
    model.trunk(idx[:, :5], cache.begin(5))
    cache.keep(torch.tensor([5, 2, 4]))
    for kept in ([3, 1, 0], [4, 4, 4], [0, 2, 3]):
        starts = cache.lengths.tolist()
        fresh = torch.stack([row[start:start + 4] for row, start in zip(idx, starts)])
        logits = model.head(model.trunk(fresh, cache.begin(4)))
        for row, start, full in zip(logits, starts, whole):
            assert_close(row, full[start:start + 4], 1e-5)
        cache.keep(torch.tensor(kept))
    logits = model.head(model.trunk(idx[[2, 0], 11:13], cache.begin(2, rows=torch.tensor([2, 0]))))  # 11 and 12 are held
    assert_close(logits[0], whole[2, 11:13], 1e-5)


@every_variant
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_step_that_is_the_same_work_each_time_gives_the_logits_of_the_cache(monkeypatch, variant, dtype):
    """What a GPU records."""
    model, idx, found = make(spread=0.3, **VARIANTS[variant]), tokens(3, 32), []
    monkeypatch.setattr(kv_cache, 'RECORDED_AFTER', 3)
    first = 1 if dtype == torch.float32 else 5
    for devices in ((), ('cpu',)):
        monkeypatch.setattr(kv_cache, 'RECORDED', devices)
        cache = KVCache(model, 3, 32)
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            parts = [cache.read(model, part) for part in (idx[:, :first], *idx[:, first:].split(1, dim=1))]
        found.append(torch.stack(parts).float())
        assert (cache.step is None) == (not devices)
        freed = weakref.ref(cache)
        del cache
        assert freed() is None  # a GPU's memory does not wait for the garbage collector
    assert_close(found[1], found[0], 1e-5 if dtype == torch.float32 else 0.05)


@every_variant
@pytest.mark.parametrize('prompt, n', [(1, 16), (24, 11)])  # the second past block_size
def test_cached_greedy_tokens_are_the_uncached_ones(variant, prompt, n):
    model = make(spread=0.3, **VARIANTS[variant])
    idx = tokens(3, prompt)
    cached = torch.stack(list(model.generate(idx, n, temperature=0)), 1)
    uncached = torch.stack(list(model.generate(idx, n, temperature=0, use_cache=False)), 1)
    assert torch.equal(cached, uncached)
    assert len(set(cached.flatten().tolist())) > 2, 'a constant output would agree too'


@every_variant
def test_gradient_checkpointing_changes_nothing(variant):
    model = make(dropout=0.1, **VARIANTS[variant]).train()
    plain = gradients(model, *batch(model))
    model.recompute_blocks()
    recomputed = gradients(model, *batch(model))
    assert plain.keys() == recomputed.keys() and all(torch.equal(plain[name], recomputed[name]) for name in plain)


@every_variant
def test_every_parameter_learns(variant):
    model = make(**VARIANTS[variant]).train()
    found = gradients(model, *batch(model))
    assert [name for name, p in model.named_parameters() if p.requires_grad and not found[name].any()] == []
    if model.config.model_type == 'duo':
        assert model.transformer.wte.weight.grad[V].any(), 'the mask id'


@every_variant
def test_decay_groups_cover_every_parameter_once(variant):
    model = make(**VARIANTS[variant])
    decay, rest = model.decay_groups(0.1)
    assert decay['weight_decay'] == 0.1 and rest['weight_decay'] == 0
    ids = [id(p) for group in (decay, rest) for p in group['params']]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    spared = {id(p) for p in rest['params']}
    for name, p in model.named_parameters():
        matrices = ('c_attn', 'c_proj', 'c_fc', 'wte', 'wpe', 'bottleneck')
        matrix = name.endswith(tuple(f'{layer}.weight' for layer in matrices))
        assert (id(p) in spared) != (matrix or '.mlp.' in name and p.dim() == 2), name


def train_on_noise(vocab_size, T, **changes):
    """-> losses of a briefly trained tiny model on held-out noise, (B, targets)."""
    torch.manual_seed(0)
    sizes = {'block_size': T, 'vocab_size': vocab_size, 'n_layer': 2, 'n_head': 2, 'n_embd': 32}
    model = GPT(GPTConfig(**sizes | changes))
    optimizer = torch.optim.AdamW(model.decay_groups(0.0), lr=3e-3)
    rng = torch.Generator().manual_seed(0)
    for step in range(150):
        for group in optimizer.param_groups:
            group['lr'] = 3e-3 * (1 - step / 150)
        X, Y, W = model.objective.make_batch(torch.randint(vocab_size, (192 // T, T + 1), generator=rng), rng)
        model(X, Y, W, return_logits=False)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    X, Y, W = model.objective.make_batch(torch.randint(vocab_size, (4096 // T, T + 1), generator=rng), rng)
    with torch.no_grad():
        logits, _ = model.eval()(X, Y, W)
    return F.cross_entropy(logits.mT, Y, reduction='none')


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['gpt2', 'dd', 'heat', 'heat adaptive distance', 'rotating lr', 'parallel mean', 'duo'])
def test_random_tokens_cannot_be_predicted(variant):
    """Trained on noise, held-out loss stays at log V or above; a leak would fall below."""
    losses = train_on_noise(32, 6, **VARIANTS[variant])
    assert (losses.size(1) == 11) == (variant == 'duo')
    for kind in losses[:, :6], losses[:, 6:]:  # next tokens and, of duo, what the masks hide
        if kind.numel():
            error = kind.std() / math.sqrt(kind.numel())
            assert abs(kind.mean() - math.log(32)) < 3 * error


# ---------------------------------------------------------------------------------------------------------------------
# dd

DD = {'without drift': {'apply_drift': False}, 'per head': {}, 'per layer': {'baseline_each_head': False},
      'published': {'published': True}, 'published, no baseline': {'published': True, 'baseline_each_head': False}}


@pytest.mark.parametrize('published', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_dd_without_its_terms_is_gpt2(published, training):
    dd = make(model_type='dd', apply_drift=False, apply_diffusion=False, published=published, dropout=0.1).train(training)
    gpt2 = twin(dd, model_type='gpt2', apply_drift=True, apply_diffusion=True, published=False)
    idx = tokens(2, 32)
    assert torch.equal(token_logits(dd, idx), token_logits(gpt2, idx))
    found, wanted = gradients(dd, idx, idx), gradients(gpt2, idx, idx)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize('form', DD)
def test_drift_is_its_formula_in_value_and_gradient(form):
    attn = make(model_type='dd', spread=0.5, **DD[form]).transformer.h[1].attn
    parameters = {name: p for name, p in attn.named_parameters() if not name.startswith('c_')}
    x = torch.randn(2, 9, 32, requires_grad=True)
    wanted = list(attend_in_a_loop(*heads_of(attn, x)).unbind(1))
    for h in range(H):
        if form in ('per head', 'per layer'):
            d = parameters['drift_param'].flatten()
            assert len(d) == (H if form == 'per head' else 1)
            wanted[h] = wanted[h] + d[h % len(d)] * wanted[h]
        elif form != 'without drift':
            d, b = parameters['drift_param'][h], parameters['baseline'][h] if form == 'published' else 0
            assert d.shape == (D,)
            wanted[h] = wanted[h] + 1 / (1 + (-d).exp()) * (wanted[h] - b)
    assert_same_value_and_gradients(attended(attn, x), torch.stack(wanted, 1),
                                    x, *(p for name, p in parameters.items() if name != 'diffusion_param'))
    learned = {'without drift': set(), 'per head': {'drift_param'}, 'per layer': {'drift_param'},
               'published': {'drift_param', 'baseline', 'diffusion_param'},
               'published, no baseline': {'drift_param', 'diffusion_param'}}
    assert parameters.keys() == learned[form]


@pytest.mark.parametrize('form', DD)
@pytest.mark.parametrize('std', [0.1, 0.5])
def test_diffusion_is_noise_of_its_own_everywhere_in_training_only(form, std):
    attn = make(model_type='dd', diffusion_std=std, **DD[form]).transformer.h[1].attn
    scale = torch.full((H, 1, D), std)
    if 'published' in form:
        scale = torch.rand(H, 1, D) + std
        attn.diffusion_param.data.copy_(scale[:, 0])
    x = torch.randn(64, 32, 32)
    calm = attended(attn, x)
    assert torch.equal(calm, attended(attn, x))
    y = attended(attn.train(), x)
    noise = ((y - calm) / scale).detach()  # (B, H, T, D)
    assert noise.std().item() == pytest.approx(1, rel=0.03)
    assert noise.std((0, 2)).flatten().tolist() == pytest.approx([1] * H * D, rel=0.08)
    for dim, n in enumerate(noise.shape):  # independent draws: their means over n have a standard deviation of 1/sqrt(n)
        assert noise.mean(dim).std().item() == pytest.approx(1 / math.sqrt(n), rel=0.06)
    if 'published' in form:
        direction = torch.randn_like(y)
        found, = torch.autograd.grad((direction * y).sum(), attn.diffusion_param)
        assert_close(found, (direction * noise).sum((0, 2)), 1e-4)
    attn.config = replace(attn.config, apply_diffusion=False, diffusion_std=GPTConfig.diffusion_std)
    assert torch.equal(calm, attended(attn, x))


def test_dd_starts_as_stated():
    def start(name, **changes):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SIZES | {'n_embd': 256, 'n_head': 16}, model_type='dd', diffusion_std=0.3, **changes))
        return torch.stack([getattr(block.attn, name) for block in model.transformer.h])
    assert start('drift_param').std().item() == pytest.approx(0.02, rel=0.25)  # 64 numbers
    assert start('drift_param', published=True).std().item() == pytest.approx(0.02, rel=0.1)
    assert start('baseline', published=True).std().item() == pytest.approx(1e-3, rel=0.1)
    assert (start('diffusion_param', published=True) == 0.3).all()


# ---------------------------------------------------------------------------------------------------------------------
# heat

def statistics_in_a_loop(q, k):
    """Mean and maximum of q.k / sqrt(D) and variance of its softmax over the keys that each query sees, (B, H, Tq, 3)."""
    B, n_head, T, width = q.shape
    rows = []
    for b, h, i in [(b, h, i) for b in range(B) for h in range(n_head) for i in range(T)]:
        s = k[b, h, :k.size(2) - T + i + 1] @ q[b, h, i] / math.sqrt(width)
        rows.append(torch.stack((s.mean(), s.max(), s.softmax(0).var(correction=0))))
    return torch.stack(rows).view(B, n_head, T, 3)


def times_in_a_loop(time, statistics, t_min=0.1, t_max=10.0):
    log_t = copy.deepcopy(time.mlp).double()(statistics)
    return log_t.clamp(math.log(t_min), math.log(t_max)).exp()


def test_heat_at_its_softmax_time_is_gpt2():
    heat = make(model_type='heat', heat_t=str(math.sqrt(D) / 2)).train()
    gpt2 = twin(heat, model_type='gpt2', heat_t='depth')
    idx = tokens(2, 32)
    assert_close(token_logits(heat, idx), token_logits(gpt2, idx))
    assert_same_gradients(gradients(heat, idx, idx), gradients(gpt2, idx, idx))
    other = twin(heat, heat_t=str(math.sqrt(D)))
    assert not torch.allclose(token_logits(other, idx), token_logits(gpt2, idx), atol=1e-2)


@pytest.mark.parametrize('form', ['dot', 'distance'])
@pytest.mark.parametrize('layers, t', [(4, 'depth'), (2, 'depth'), (16, 'depth'), (4, '0.3'), (4, '5'), (4, 'adaptive')])
def test_heat_is_its_formula_in_value_and_gradient(form, layers, t):
    attn = make(model_type='heat', heat_form=form, heat_t=t, n_layer=layers).transformer.h[1].attn
    x = torch.randn(2, 9, 32)
    q, k, v = (part.double() for part in heads_of(attn, x.requires_grad_()))
    if t == 'adaptive':
        times = times_in_a_loop(attn.time, statistics_in_a_loop(q, k))  # (B, H, T, 1)
        assert 0.1 < times.min() and times.max() < 10 and times.std() > 0.05
    else:
        times = torch.full((2, H, 9, 1), 0.28 * math.sqrt(4 / layers) if t == 'depth' else float(t))

    def score(query, keys, where):
        if form == 'dot':
            return keys @ query / (2 * times[where])
        return -(query - keys).square().sum(1) / (4 * times[where])
    assert_same_value_and_gradients(attended(attn, x), attend_in_a_loop(q, k, v, score), x)


@torch.no_grad()
def test_the_distance_form_is_as_accurate_in_bfloat16_as_the_dot_form():
    """In one bfloat16 coordinate |k|^2 / 2 would cost nearly twice the error."""
    def error(form):
        total = 0
        for seed in range(4):
            torch.manual_seed(seed)
            sizes = {'block_size': 48, 'vocab_size': 9, 'n_layer': 1, 'n_head': 2, 'n_embd': 256}
            attn = GPT(GPTConfig(**sizes, model_type='heat', heat_form=form, heat_t='1')).transformer.h[0].attn
            attn.c_attn.weight.copy_(torch.randn_like(attn.c_attn.weight) / 16)
            x = torch.randn(4, 48, 256)
            exact = attended(attn, x)
            with torch.autocast('cpu', torch.bfloat16):
                total += ((attended(attn, x) - exact).norm() / exact.norm()).item()
        return total
    assert 0 < error('distance') < 1.3 * error('dot')


@pytest.mark.parametrize('B, Tq, Tk', [(2, 9, 9), (2, 1, 9), (2, 1, 1), (2, 4, 9), (7, 150, 150)])
def test_adaptive_time_is_its_formula_in_value_and_gradient(B, Tq, Tk):
    time = make(model_type='heat', heat_t='adaptive').transformer.h[1].attn.time
    q, k = torch.randn(B, H, Tq, D, requires_grad=True), torch.randn(B, H, Tk, D, requires_grad=True)
    if Tk == 150:
        pieces = [(heads, rows) for heads, rows, *_ in score_pieces(q.flatten(0, 1), k.flatten(0, 1))]
        assert len({heads.start for heads, _ in pieces}) > 1 and len({rows.start for _, rows in pieces}) > 1
    seen = []
    handle = time.mlp[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    t = time(q, k)
    handle.remove()
    wanted_statistics = statistics_in_a_loop(q.double(), k.double())
    for i in range(3):
        assert_close(seen[0][..., i], wanted_statistics[..., i])
    wanted = times_in_a_loop(time, wanted_statistics)
    assert t.shape == (B, H, Tq, 1) and t.dtype == torch.float32
    assert_same_value_and_gradients(t, wanted, q, k)


@pytest.mark.parametrize('limits', [(0.1, 10.0), (0.5, 8.0)])
def test_adaptive_time_starts_between_its_limits_and_stays_there(limits):
    model = GPT(GPTConfig(**SIZES, model_type='heat', heat_t='adaptive', heat_t_min=limits[0], heat_t_max=limits[1]))
    q, k = torch.randn(2, 2, H, 9, D) * 5
    for block in model.transformer.h:
        for rounded in (False, True):  # bfloat16 for all that may be
            with torch.autocast('cpu', torch.bfloat16, enabled=rounded):
                torch.testing.assert_close(block.attn.time(q, k), torch.full((2, H, 9, 1), math.sqrt(limits[0] * limits[1])))
    with torch.no_grad():
        block.attn.time.mlp[-1].weight.normal_(std=100.0)
    t = block.attn.time(q, k)
    assert t.min().item() == pytest.approx(limits[0]) and t.max().item() == pytest.approx(limits[1])


def test_adaptive_time_as_published_is_one_per_sequence_and_sees_the_future():
    published = make(model_type='heat', heat_t='adaptive', published=True)
    default = twin(published, published=False)
    assert default.config.causal and not published.config.causal
    time = published.transformer.h[1].attn.time
    q, k = torch.randn(2, 2, H, 9, D)
    wanted = times_in_a_loop(time, statistics_in_a_loop(q.double(), k.double()).mean(2, keepdim=True))
    torch.testing.assert_close(time(q, k), wanted.float(), atol=1e-5, rtol=1e-5)
    idx = tokens(2, 9)
    changed = idx.clone()
    changed[:, -1] = (changed[:, -1] + 1) % V

    def leaks(model):
        return not torch.allclose(token_logits(model, idx)[:, :-1], token_logits(model, changed)[:, :-1])
    assert leaks(published) and not leaks(default)
    for block in published.transformer.h:
        block.attn.time.start()  # as a training starts: one t for all
    assert not leaks(published)
    uncached = [list(published.generate(idx, 5, temperature=0, use_cache=use)) for use in (True, False)]
    assert torch.equal(torch.stack(uncached[0]), torch.stack(uncached[1]))


# ---------------------------------------------------------------------------------------------------------------------
# rotating

ROTATING = {name: changes for name, changes in VARIANTS.items() if name.startswith('rotating')}


def rates_in_a_loop(rope, variant, n_head=H, width=D):
    f = torch.zeros(n_head, width // 2, dtype=torch.float64)
    for h in range(n_head):
        for i in range(width // 2):
            f[h, i] = 0.1 ** (h / (n_head - 1)) * 10000 ** (-2 * i / width)
    f = rope.frequencies.double() if 'lr' in variant else f
    if 'norm' in variant:
        f = (f - f.mean(1, keepdim=True)) / (f.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        f = f * rope.layer_norm.weight.double() + rope.layer_norm.bias.double()
    return f


@pytest.mark.parametrize('variant', ['rotating lr', 'rotating lr norm', 'rotating gp norm'])
def test_rotating_at_zero_rates_is_gpt2(variant):
    model = make(**ROTATING[variant]).train()
    with torch.no_grad():
        for rope in (block.attn.rope for block in model.transformer.h):
            for p in rope.parameters():
                p.zero_()
    gpt2 = twin(model, model_type='gpt2', rotating_head='lr', use_norm=False)
    idx = tokens(2, 32)
    assert_close(token_logits(model, idx), token_logits(gpt2, idx))
    found = gradients(model, idx, idx)
    assert_same_gradients({name: g for name, g in found.items() if 'rope' not in name}, gradients(gpt2, idx, idx))


@pytest.mark.parametrize('variant', ROTATING)
def test_rotation_is_its_formula_in_value_and_gradient(variant):
    attn = make(**ROTATING[variant]).transformer.h[1].attn
    f = rates_in_a_loop(attn.rope, variant)
    x = torch.randn(2, 9, 32, requires_grad=True)
    q, k, v = (part.double() for part in heads_of(attn, x))
    wanted = attend_in_a_loop(rotate_in_a_loop(q, f), rotate_in_a_loop(k, f), v)
    assert_same_value_and_gradients(attended(attn, x), wanted, x, *attn.rope.parameters())


@pytest.mark.parametrize('variant', ROTATING)
@torch.no_grad()
def test_rotated_heads_know_relative_positions_only_each_at_its_own_rates(variant):
    rope = make(**ROTATING[variant]).transformer.h[1].attn.rope
    q, k = (x.expand(1, H, 32, D) for x in torch.randn(2, D))  # the same vectors everywhere
    scores = torch.matmul(*[x if i == 0 else x.mT for i, x in enumerate(rope(q, k))])[0]  # (H, T, T)
    for distance in range(-31, 32):
        along = scores.diagonal(distance, 1, 2)
        torch.testing.assert_close(along, along[:, :1].expand_as(along), atol=1e-4, rtol=1e-4)
    if variant != 'rotating gp norm':  # LayerNorm takes away the scale, all that tells those heads apart
        assert not any(torch.allclose(scores[0], scores[h], atol=0.1) for h in range(1, H))
    later = rope(q[:, :, 20:], k[:, :, 20:], torch.arange(20, q.size(2))[None])
    assert all(torch.equal(part, whole[:, :, 20:]) for part, whole in zip(later, rope(q, k)))


@pytest.mark.parametrize('n_head', [1, 5])
def test_fixed_rates_fall_geometrically_over_the_heads(n_head):
    rope = make(**ROTATING['rotating gp'], n_embd=20 * n_head, n_head=n_head).transformer.h[0].attn.rope
    scales = [1.0] if n_head == 1 else [1.0, 0.1 ** 0.25, 0.1 ** 0.5, 0.1 ** 0.75, 0.1]
    for h, scale in enumerate(scales):
        wanted = [scale * 10000 ** (-2 * i / 20) for i in range(10)]
        assert rope.frequencies[h].tolist() == pytest.approx(wanted, rel=1e-5)
    assert not list(rope.parameters())


def test_learned_rates_start_from_a_normal_distribution():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | {'n_embd': 512}, model_type='rotating'))
    rates = torch.stack([block.attn.rope.frequencies for block in model.transformer.h])
    assert rates.shape == (4, H, 64)
    assert rates.mean().item() == pytest.approx(0, abs=0.1) and rates.std().item() == pytest.approx(1, rel=0.07)


# ---------------------------------------------------------------------------------------------------------------------
# parallel

def test_parallel_with_tied_pairs_is_gpt2_of_half_the_depth():
    half = make(n_layer=2).train()
    parallel = make(model_type='parallel', n_layer=4).train()
    weights = half.state_dict()
    for name, p in parallel.state_dict().items():
        _, h, rest = name.partition('transformer.h.')
        layer, _, rest = rest.partition('.')
        p.copy_(weights[f'{h}{int(layer) // 2}.{rest}' if h else name])
    idx = tokens(2, 32)
    assert_close(token_logits(parallel, idx), token_logits(half, idx))
    found, wanted = gradients(parallel, idx, idx), gradients(half, idx, idx)
    pairs = {name: g for name, g in found.items() if '.h.' not in name}
    for layer in range(2):
        for name in [name for name in wanted if f'.h.{layer}.' in name]:
            left, right = (name.replace(f'.h.{layer}.', f'.h.{2 * layer + side}.') for side in (0, 1))
            pairs[name] = found[left] + found[right]
    assert_same_gradients(pairs, wanted)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_pair_batched_into_one_set_of_matrix_products_computes_the_same():
    """What may be batched: both blocks read the same x and nothing of each other. On a CPU that is slower; see LOG.md."""
    left, right = make(model_type='parallel', n_layer=2).transformer.h
    x = torch.randn(2, 32, SIZES['n_embd'])
    together = {name: torch.stack((p, q)) for (name, p), q in zip(left.named_parameters(), right.parameters())}
    batched = torch.vmap(lambda weights: torch.func.functional_call(left, weights, (x,)))
    assert_same_value_and_gradients(batched(together), torch.stack((left(x), right(x))), *left.parameters(),
                                    *right.parameters())


@pytest.mark.parametrize('merge', ['mean', 'add', 'concat'])
@pytest.mark.parametrize('bias', [True, False])
def test_parallel_is_its_formula_in_value_and_gradient(merge, bias):
    model = make(model_type='parallel', parallel_merge=merge, bias=bias).train()
    names = [name for name, _ in model.named_parameters() if 'bottleneck' in name]
    assert len(names) == (2 if merge == 'concat' else 0), 'one projection, shared by all pairs'
    idx = tokens(2, 9)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    x = model.transformer.wte(idx) + model.transformer.wpe.weight[:9]
    for i in (0, 2):
        left, right = (plain_block(model.transformer.h[j], x, causal) for j in (i, i + 1))
        if merge == 'concat':
            weight, b = model.transformer.bottleneck.weight, model.transformer.bottleneck.bias
            assert weight.shape == (32, 64)
            x = left @ weight[:, :32].t() + right @ weight[:, 32:].t() + b
        else:
            x = (left + right) / (2 if merge == 'mean' else 1)
    wanted = model.head(model.transformer.ln_f(x))
    assert_close(token_logits(model, idx), wanted)
    model.zero_grad()
    F.cross_entropy(wanted.flatten(0, 1), idx.flatten()).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_same_gradients(gradients(model, idx, idx), wanted)


# ---------------------------------------------------------------------------------------------------------------------
# duo

def duo_in_a_loop(model, idx):
    """Logits (T + T-1, V) of one sequence (T,), position by position: the mask after token i attends to the tokens before
    i, to itself, and to the embedding of token i+1."""
    wte, wpe, T = model.transformer.wte.weight, model.transformer.wpe.weight, len(idx)
    embeddings = [wte[idx[i]] + wpe[i] for i in range(T)]
    token, mask = embeddings, [wte[V] + wpe[i] for i in range(T - 1)]

    def output(block, x, me, others):
        """x (C,) attends to `others`; it and each of them q, k, v (3, H, D)."""
        y = []
        for h in range(H):
            scores = torch.stack([me[0, h] @ other[1, h] / math.sqrt(D) for other in others])
            y.append(sum(p * other[2, h] for p, other in zip(scores.softmax(0), others)))
        x = x + block.attn.c_proj(torch.cat(y))
        return x + block.mlp(block.ln_2(x))

    for block in model.transformer.h:
        tokens, masks, ahead = ([block.attn.c_attn(block.ln_1(x)).view(3, H, D) for x in stream]
                                for stream in (token, mask, embeddings))
        token, mask = ([output(block, token[i], tokens[i], tokens[:i + 1]) for i in range(T)],
                       [output(block, mask[i], masks[i], [*tokens[:i], masks[i], ahead[i + 1]]) for i in range(T - 1)])
    return model.head(model.transformer.ln_f(torch.stack(token + mask)))


def duo_interleaved(model, idx):
    """As published: one sequence t1 M t2 M ... tT of length 2T-1 and a mask of what each attends to; tokens come first in
    the result. idx (B, T)."""
    T = idx.size(1)
    allowed = torch.zeros(2 * T - 1, 2 * T - 1, dtype=torch.bool)
    for i in range(T):
        for j in range(i + 1):
            allowed[2 * i, 2 * j] = True
    for i in range(T - 1):
        for j in range(i):
            allowed[2 * i + 1, 2 * j] = True
        allowed[2 * i + 1, 2 * i + 1] = allowed[2 * i + 1, 2 * i + 2] = True
    ids = torch.full((len(idx), 2 * T - 1), V)
    ids[:, ::2] = idx
    x = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(2 * T - 1) // 2)
    for block in model.transformer.h:
        x = plain_block(block, x, allowed)
    logits = model.head(model.transformer.ln_f(x))
    return torch.cat((logits[:, ::2], logits[:, 1::2]), dim=1)


@pytest.mark.parametrize('published', [False, True])
@pytest.mark.parametrize('bias', [True, False])
def test_duo_is_its_formula_in_value_and_gradient(published, bias):
    model = make(model_type='duo', published=published, bias=bias, duo_fill_weight=0.5).train()
    X, Y, W = batch(model, T=6)
    assert Y.tolist() == [[*following, *hidden[:-1]] for hidden, following in zip(X.tolist(), tokens(2, 7)[:, 1:].tolist())]
    wanted = duo_interleaved(model, X) if published else torch.stack([duo_in_a_loop(model, row) for row in X])
    assert_close(model(X, Y, W)[0], wanted)
    losses = F.cross_entropy(wanted.mT, Y, reduction='none')
    model.zero_grad()
    ((losses[:, :6].sum() + 0.5 * losses[:, 6:].sum()) / (2 * 6 + 0.5 * 2 * 5)).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_same_gradients(gradients(model, X, Y, W), wanted)


@pytest.mark.parametrize('layers', [1, 2, 3, 4])
@torch.no_grad()
def test_a_mask_sees_the_next_token_but_not_the_one_it_hides(layers):
    """By default. As published it sees what it hides from the second layer on."""
    default = make(model_type='duo', n_layer=layers)
    X, Y, W = batch(default, T=9)

    def mask_changes(model, k, token):
        """How far the logits of the mask after token k move with another token."""
        changed = X.clone()
        changed[:, token] = (changed[:, token] + 1) % V
        return (model(X, Y, W)[0][:, 9 + k] - model(changed, Y, W)[0][:, 9 + k]).abs().max().item()
    published = twin(default, published=True)
    for k in range(8):
        assert mask_changes(default, k, k) == pytest.approx(0, abs=1e-6)
        assert mask_changes(default, k, k + 1) > 1e-3
        assert all(mask_changes(default, k, before) > 1e-4 for before in range(k))
        assert all(mask_changes(default, k, beyond) == pytest.approx(0, abs=1e-6) for beyond in range(k + 2, 9))
        if layers == 1:
            assert mask_changes(published, k, k) == pytest.approx(0, abs=1e-6)
        else:
            assert mask_changes(published, k, k) > 1e-3


@pytest.mark.parametrize('published', [False, True])
def test_masks_leak_when_published_and_not_by_default(published):
    """Noise again, the shortest of sequences: two layers learn the published leak within seconds."""
    losses = train_on_noise(8, 3, model_type='duo', published=published)
    following, filled = losses[:, :3], losses[:, 3:]
    error = following.std() / math.sqrt(following.numel())
    assert following.mean() > math.log(8) - 3 * error
    if published:
        assert filled.mean() < math.log(8) - 0.3
    else:
        error = filled.std() / math.sqrt(filled.numel())
        assert abs(filled.mean() - math.log(8)) < 3 * error


@pytest.mark.parametrize('published', [False, True])
def test_tokens_do_not_notice_the_masks(published):
    model = make(model_type='duo', published=published)
    X, Y, W = batch(model)
    both, _ = model(X, Y, W)
    alone, _ = model(X, X)
    assert both.shape == (2, 63, V) and alone.shape == (2, 32, V)
    assert_close(both[:, :32], alone)
    gpt2 = twin(model, model_type='gpt2', published=False)
    assert torch.equal(token_logits(gpt2, X), alone)


def test_duo_without_weight_on_its_masks_trains_exactly_gpt2():
    trained = []
    for changes in ({}, {'model_type': 'duo', 'duo_fill_weight': 0.0}):
        model = make(dropout=0.1, **changes).train()
        optimizer = torch.optim.AdamW(model.decay_groups(0.1), lr=1e-2)
        for step in range(3):
            gradients(model, *batch(model, seed=step))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        trained.append(model.state_dict())
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


@pytest.mark.parametrize('weight', [1.0, 0.5])
@torch.no_grad()
def test_the_loss_of_duo_is_a_mean_and_its_metrics_tell_the_kinds_apart(weight):
    model = make(model_type='duo', duo_fill_weight=weight)
    T = 9
    X, Y, W = batch(model, T=T)
    logits, loss = model(X, Y, W)
    losses = F.cross_entropy(logits.mT, Y, reduction='none')
    correct = (logits.argmax(-1) == Y).double()
    wanted = (losses[:, :T].sum() + weight * losses[:, T:].sum()) / (2 * (T + weight * (T - 1)))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert model(X, Y, W, return_logits=False)[1].item() == pytest.approx(wanted.item(), rel=1e-6)
    kinds = {'loss': losses[:, :T], 'accuracy': correct[:, :T], 'fill_loss': losses[:, T:], 'fill_accuracy': correct[:, T:]}
    metrics = model.objective.metrics(model, X, Y, W)
    assert metrics['loss'].count == 2 * T and metrics['fill_loss'].count == 2 * (T - 1)
    summary = model.objective.summary(metrics)
    assert summary == pytest.approx({name: kind.mean().item() for name, kind in kinds.items()}, rel=1e-6)
    assert model.objective.val_metric == 'loss'


def test_no_sample_is_ever_the_mask():
    model = make(model_type='duo')
    with torch.no_grad():
        model.transformer.wte.weight[V:] = 100.0  # would win every argmax
    for use_cache in (True, False):
        columns = list(model.generate(tokens(4, 3), 20, temperature=5.0, seed=0, use_cache=use_cache))
        assert all((column < V).all() for column in columns)


# ---------------------------------------------------------------------------------------------------------------------
# options

ADAPTIVE = {'model_type': 'heat', 'heat_t': 'adaptive'}


@pytest.mark.parametrize('wrong, reason', [
    ({'model_type': 'parallel', 'n_layer': 3}, 'n_layer=3 must be even'),
    ({'model_type': 'heat', 'heat_t': '0'}, 'heat_t=0.0 must be at least 1e-06'),
    ({'model_type': 'heat', 'heat_t': '-1'}, 'heat_t=-1.0 must be at least 1e-06'),
    ({'model_type': 'heat', 'heat_t': 'nan'}, 'heat_t=nan must be at least 1e-06, and finite'),
    ({'model_type': 'heat', 'heat_t': 'inf'}, 'heat_t=inf must be at least 1e-06, and finite'),
    ({'model_type': 'duo', 'block_size': 1}, 'block_size=1'),
    ({'model_type': 'heat', 'heat_t': 'warm'}, "heat_t='warm' is neither a number nor one of: depth, adaptive"),
    (ADAPTIVE | {'heat_t_min': 10.0}, 'heat_t_min=10.0 must be below heat_t_max=10.0'),
    (ADAPTIVE | {'heat_t_min': 0.0}, 'heat_t_min=0.0 must be at least 1e-06, and finite'),
    (ADAPTIVE | {'heat_t_max': 0.05}, 'heat_t_min=0.1 must be below heat_t_max=0.05'),
    (ADAPTIVE | {'heat_t_max': math.inf}, 'heat_t_max=inf must be above 0, and finite'),
    ({'model_type': 'rotating', 'n_embd': 12}, 'n_embd / n_head = 3 must be even'),
    ({'model_type': 'dd', 'diffusion_std': -0.1}, 'diffusion_std=-0.1 must be at least 0'),
    ({'model_type': 'duo', 'duo_fill_weight': -1.0}, 'duo_fill_weight=-1.0 must be at least 0'),
    ({'model_type': 'heat', 'heat_form': 'cold'}, 'heat_form.*not one of: dot, distance'),
    ({'model_type': 'rotating', 'rotating_head': 'x'}, 'rotating_head.*not one of: lr, gp'),
    ({'model_type': 'parallel', 'parallel_merge': 'x'}, 'parallel_merge.*not one of: mean, add, concat'),
    ({'model_type': 'cold'}, 'model_type.*not one of: gpt2, dd, heat, rotating'),
])
def test_options_that_make_no_sense_are_rejected(wrong, reason):
    with pytest.raises(UserError, match=reason):
        GPTConfig(**SIZES | wrong)


@pytest.mark.parametrize('idle', [
    dict(model_type='heat', heat_t_min=0.2), dict(model_type='heat', heat_t_max=5.0),
    dict(model_type='heat', published=True),
    dict(model_type='duo', duo_fill_weight=0.0, published=True),
    dict(model_type='dd', apply_diffusion=False, diffusion_std=0.5),
    dict(model_type='dd', apply_drift=False, baseline_each_head=False),
    dict(model_type='diffusion', diffusion_objective='nelbo', penalty_keep_mask=0.5),
    dict(model_type='diffusion', diffusion_objective='nelbo', penalty_mask_correct=0.1),
])
def test_an_option_that_another_leaves_without_effect_is_rejected(idle):
    with pytest.raises(UserError, match='has no effect without'):
        GPTConfig(**SIZES | idle)


def test_an_option_of_another_type_is_rejected_by_name():
    other = {'heat_form': 'distance', 'heat_t': '1', 'rotating_head': 'gp', 'parallel_merge': 'add',
             'diffusion_objective': 'nelbo', 'positions': 'learned', 'encoder': 'elsewhere', 'drift_output': 'soft',
             'drift_features': 'tokens', 'drift_temperatures': '0.3', 'diffusion_t_min': 0.5}
    needed = {'drifting': {'encoder': 'somewhere'}}
    drift = {'diffusion_objective': 'drift', 'encoder': 'somewhere'}
    of_the_field = [f.name for f in fields(GPTConfig) if f.metadata['needs'].get('diffusion_objective') == 'drift']
    blocks = {'diffusion_objective': 'nelbo', 'diffusion_block': SIZES['block_size']}
    of_blocks = dict.fromkeys(('diffusion_block', 'diffusion_shift', 'diffusion_complement'), blocks)
    of_the_bound = dict.fromkeys(('diffusion_t_min', 'diffusion_t_max'), {'diffusion_objective': 'nelbo'})
    together = {'diffusion': dict.fromkeys(of_the_field, drift) | of_blocks | of_the_bound,
                'heat': {'heat_t_min': ADAPTIVE, 'heat_t_max': ADAPTIVE, 'published': ADAPTIVE}}
    assert len(of_the_field) == 5
    for f in fields(GPTConfig):
        if not f.metadata['types']:
            continue
        name, default = f.name, f.default
        value = other[name] if name in other else not default if isinstance(default, bool) else default / 2 or 1
        for model_type in TYPES:
            given = SIZES | needed.get(model_type, {}) | {'model_type': model_type, name: value}
            if model_type in f.metadata['types']:
                given = together.get(model_type, {}).get(name, {}) | given
                assert getattr(GPTConfig(**given), name) == value
            else:
                with pytest.raises(UserError, match=f'{name} is an option of model_type .*, not of {model_type}'):
                    GPTConfig(**given)


def test_every_type_is_tested_and_every_option_is_of_types_that_there_are():
    causal = {changes.get('model_type', 'gpt2') for changes in VARIANTS.values()}
    assert set(TYPES) == causal | {'diffusion', 'drifting'}
    owners = {model_type for f in fields(GPTConfig) for model_type in f.metadata['types']}
    assert owners <= set(TYPES)  # a type may do without


def test_help_tells_every_option_and_whose_it_is(capsys):
    with pytest.raises(SystemExit) as stop:
        train.read_settings(['--help'])
    assert stop.value.code == 0
    text = ' '.join(capsys.readouterr().out.split()).partition('GPTConfig:')[2]
    assert all(model_type in text for model_type in TYPES)
    for f in fields(GPTConfig):
        meaning = text.partition(f'--{f.name} ')[2].partition(' --')[0]
        for model_type in f.metadata['types']:
            assert model_type in meaning.partition(':')[0], f.name
    for name in inspect.signature(GPTConfig).parameters:
        assert f'--{name} ' in text
