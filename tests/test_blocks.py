"""Block diffusion: its two streams against loops over blocks, against gpt2 and one block, for leaks; what is sampled."""
import itertools
import math

import pytest
import torch
from conftest import resume
from test_train import load, metrics

import evaluate
import generate_diffusion
import train
from model import GPT, GPTConfig, load_model
from nanodrift import refinement, streams
from nanodrift.blocks import BlockTrunk
from nanodrift.objectives import block_batch, count_batch
from nanodrift.options import UserError
from nanodrift.refinement import RefineConfig

V, T = 7, 12
SIZES = dict(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_embd=16)
layouts = pytest.mark.parametrize('shift', [False, True])


def model_of(N, shift=False, **options):
    torch.manual_seed(1)
    model = GPT(GPTConfig(model_type='diffusion', diffusion_objective='nelbo', diffusion_block=N, diffusion_shift=shift,
                          **SIZES | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.2)  # so that everything has an effect
    return model


def text(B, shift, T=T, V=V, seed=0):
    return torch.randint(V, (B, T + shift), generator=torch.Generator().manual_seed(seed))


def batch(model, tokens, seed=0, part=(0, 1)):
    return model.objective.make_batch(tokens, torch.Generator().manual_seed(seed), part)


class Dense:
    """Attention by a mask (n, n) that a test writes out, at the positions (n,) that it says."""
    static = True

    def __init__(self, mask, positions):
        self.mask, self.positions, self.reach = mask, positions[None], 0

    def attend(self, sdpa, layer, q, k, v):
        return sdpa(q, k, v, attn_mask=self.mask)


@torch.no_grad()
def slow_states(model, clean, noisy, b):
    """Hidden states (N, C) that predict the tokens of block b, from a pass over it alone: the clean tokens (n,) that stand
    before it and its tokens (N,), masks written out pair by pair. `clean` holds one token more with diffusion_shift."""
    c = model.config
    N, shift = c.diffusion_block, c.diffusion_shift
    ids, block, positions = [], [], []
    for i, token in enumerate(clean[:len(clean) - shift].tolist()):
        ids.append(token), block.append(i // N), positions.append(i)
    for i, token in enumerate([*clean[len(clean) - shift:].tolist(), *noisy.tolist()]):
        ids.append(token), block.append(b), positions.append(b * N + i)
    n = len(clean) - shift
    mask = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for i, j in itertools.product(range(len(ids)), repeat=2):
        if i < n:
            mask[i, j] = j < n and (j <= i if shift else block[j] <= block[i])
        else:
            last_and_open = shift and j == len(ids) - 1 and ids[j] == c.vocab_size
            mask[i, j] = j < n or not last_and_open
    x = GPT.trunk(model, torch.tensor([ids]), Dense(mask, torch.tensor(positions)))[0, n:]
    return x[:N]


# ---------------------------------------------------------------------------------------------------------------------
# two streams in one pass

@layouts
@pytest.mark.parametrize('positions', ['rotary', 'learned', 'both'])
@pytest.mark.parametrize('N', [1, 3, 4, 12])
def test_two_streams_are_a_loop_over_blocks(shift, positions, N):
    model, tokens = model_of(N, shift, positions=positions), text(2, shift)
    X, Y, W = batch(model, tokens)
    with torch.no_grad():
        x = model.trunk(X)
    noisy = Y.masked_fill(W > 0, V)
    for row, b in itertools.product(range(2), range(T // N)):
        here = slice(b * N, b * N + N)
        slow = slow_states(model, tokens[row, :b * N + shift], noisy[row, here], b)
        assert torch.allclose(x[row, here], slow, atol=1e-5)


@layouts
@pytest.mark.parametrize('N', [2, 3])
def test_two_copies_are_two_passes(shift, N):
    """The second copy masks what the first does not, and one token more; neither sees the other."""
    model, tokens = model_of(N, shift, diffusion_complement=True), text(3, shift)
    X, Y, W = batch(model, tokens)
    n, S = T // N, N + shift
    slots, W, Y = X[:, T - N:].view(3, n, 2, S), W.view(3, n, 2, N), Y.view(3, n, 2, N)
    assert torch.equal(Y[:, :, 0], Y[:, :, 1]) and torch.equal(Y[:, :, 0].flatten(1), tokens[:, int(shift):])
    masked = W > 0
    assert torch.equal(masked, slots[..., -N:] == V) and masked.any(2).all() and (masked.all(2).sum(-1) == 1).all()
    assert torch.equal(W[masked], (N / masked.sum(-1, keepdim=True)).expand(masked.shape)[masked])
    with torch.no_grad():
        states = model.trunk(X).view(3, n, 2, N, -1)
        for copy in range(2):
            alone = model.trunk(torch.cat((X[:, :T - N], slots[:, :, copy].flatten(1)), dim=1)).view(3, n, N, -1)
            assert torch.allclose(states[:, :, copy], alone, atol=1e-5)
    assert model.objective.eval_batch(tokens, torch.Generator())[1].shape == (3, T)


@layouts
@pytest.mark.parametrize('complement', [False, True])
def test_long_texts_attend_in_chunks(shift, complement, monkeypatch):
    model, tokens = model_of(2, shift, diffusion_complement=complement), text(2, shift)
    X, _, _ = batch(model, tokens)
    with torch.no_grad():
        whole = model.trunk(X)
        monkeypatch.setattr(streams, 'SLOTS_PER_CHUNK', 5)
        pieces = model.trunk(X)
    assert torch.allclose(whole, pieces, atol=1e-5)


@torch.no_grad()
def test_blocks_of_one_are_a_chain_of_probabilities():
    """The bound is exact: it is -log p by the chain rule, and two seeds of evaluation give one number."""
    model, tokens = model_of(1), text(3, False)
    bounds = []
    for seed in (0, 1):
        X, Y, W = batch(model, tokens, seed)
        bounds.append(model.objective.metrics(model, X, Y, W)['nelbo'].rows)
    assert torch.equal(*bounds)
    for row, bound in zip(tokens, bounds[0]):
        logp = 0.0
        for i, token in enumerate(row):
            x = slow_states(model, row[:i], torch.tensor([V]), i)
            logp += float(model.head(x)[0, :V].log_softmax(-1)[token])
        assert bound == pytest.approx(-logp / T, rel=1e-5)


def test_shifted_blocks_of_one_are_gpt2():
    """The same weights, the same logits, the same loss."""
    gpt2 = GPT(GPTConfig(**SIZES)).eval()
    model = GPT(GPTConfig(model_type='diffusion', diffusion_objective='nelbo', diffusion_block=1, diffusion_shift=True,
                          positions='learned', **SIZES)).eval()
    weights = gpt2.state_dict()
    known = weights['transformer.wpe.weight']
    model.load_state_dict(weights | {'transformer.wpe.weight': torch.cat((known, known[-1:]))})
    tokens = text(3, True)
    X, Y, W = batch(model, tokens)
    with torch.no_grad():
        logits, loss = model(X, Y, W)
        expected, wanted = gpt2(tokens[:, :-1], tokens[:, 1:])
    assert torch.allclose(logits[..., :V], expected, atol=1e-5) and loss == pytest.approx(float(wanted), rel=1e-5)


def test_one_block_is_masked_diffusion():
    one, blocks_ = model_of(0), model_of(T)
    blocks_.load_state_dict(one.state_dict())
    X, Y, W = count_batch(text(4, False), torch.Generator().manual_seed(3), mask=V)
    with torch.no_grad():
        assert torch.allclose(one.trunk(X), blocks_.trunk(X), atol=1e-6)
    assert torch.equal(batch(blocks_, text(4, False))[0] == V, batch(blocks_, text(4, False))[2] > 0)


@layouts
def test_a_block_sees_no_clean_token_of_its_own_and_no_noisy_one_of_another(shift):
    N, b = 4, 1
    model, tokens = model_of(N, shift), text(1, shift)
    X, Y, W = batch(model, tokens)
    clean, S = T - N, N + shift
    seen = []
    for i in range(X.size(1)):
        other = X.clone()
        other[0, i] = (X[0, i] + 1) % V
        with torch.no_grad():
            changed = (model.trunk(other) - model.trunk(X))[0, b * N:b * N + N].abs().amax() > 1e-6
        if changed:
            seen.append(i)
    own = range(clean + b * S, clean + b * S + S)
    assert set(seen) == set(range(b * N)) | set(own)


def test_an_open_last_slot_is_seen_by_nobody_and_a_known_one_by_all():
    model, tokens = model_of(4, True), text(1, True)
    X, _, _ = batch(model, tokens)
    X[0, T - 4 + 1:T - 4 + 5] = torch.tensor([V, V, V, 2])  # the slots 1 to 4 of the first block
    other = X.clone()
    with torch.no_grad():
        known = model.trunk(X)[0, :4]
        other[0, T - 4 + 4] = 3
        assert not torch.allclose(model.trunk(other)[0, :4], known, atol=1e-4)
        other[0, T - 4 + 4] = V
        hidden = model.trunk(other)[0, :4]
    assert torch.allclose(hidden, slow_states(model, tokens[0, :1], other[0, T - 4 + 1:T - 4 + 5], 0), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# training

@pytest.mark.parametrize('rates, often', [({}, [0, 9, 9, 9, 9]), ({'t_min': 0.25, 't_max': 0.75}, [0, 0, 18, 18, 0])])
@layouts
def test_every_count_is_met_equally_often_over_the_micro_batches(shift, rates, often):
    """3 micro-batches of 4 rows of 3 blocks are 36 blocks of 4 tokens: 9 have one masked, 9 two, and so on; rates between a
    quarter and three quarters mask two or three."""
    counts, places = [], []
    for seed in range(200):
        here = []
        for i in range(3):
            _, _, W = block_batch(text(4, shift, seed=seed), torch.Generator().manual_seed(100 * seed + i), (i, 3, seed),
                                  mask=V, block=4, shift=shift, **rates)
            masked = W.view(4, 3, 4) > 0
            count = masked.sum(-1)
            assert torch.equal(W.view(4, 3, 4)[masked], (4 / count)[..., None].expand(4, 3, 4)[masked])
            here.append(count)
        counts.append(torch.stack(here))
        places.append(counts[-1].double())
    assert all(c.flatten().bincount(minlength=5).tolist() == often for c in counts)
    assert (torch.stack(places).mean(0) - 2.5).abs().max() < 0.35  # no place has its own noise


def test_the_tokens_of_a_shifted_batch():
    tokens = torch.arange(13)[None]
    X, Y, W = block_batch(tokens, torch.Generator().manual_seed(0), mask=99, block=4, shift=True)
    assert X[0, :8].tolist() == list(range(8)) and Y[0].tolist() == list(range(1, 13))
    slots = X[0, 8:].view(3, 5)
    assert slots[:, 0].tolist() == [0, 4, 8]
    assert torch.equal(slots[:, 1:] == 99, (W > 0).view(3, 4))
    assert torch.equal(slots[:, 1:][slots[:, 1:] != 99], Y[W == 0])


@pytest.mark.parametrize('positions', ['learned', 'both'])
def test_training_goes_on_from_gpt2(settings, tmp_path, positions):
    """With blocks of one, the first evaluation is that of the gpt2 model itself."""
    gpt2 = settings(out_dir='gpt2', eval_iters=0)
    assert train.main([f'--{key}={value}' for key, value in gpt2.items()]) == 0
    more = settings(out_dir='blocks', model_type='shifted blocks', eval_iters=0, positions=positions, max_iters=2) | {
        'diffusion_block': 1, 'diffusion_complement': False, 'init_from': gpt2['out_dir']}
    assert train.main([f'--{key}={value}' for key, value in more.items()]) == 0
    first, before = metrics(more['out_dir'])[0], metrics(gpt2['out_dir'])[-1]
    if positions == 'learned':
        assert first['val_loss'] == pytest.approx(before['val_loss'], rel=1e-5)
    assert resume(more['out_dir'], '--max_iters=3') == 0


@pytest.mark.parametrize('options, words', [
    (dict(diffusion_block=5), 'divide block_size'), (dict(diffusion_shift=True), 'diffusion_block'),
    (dict(diffusion_complement=True, diffusion_block=1), 'two tokens'),
    (dict(diffusion_block=4, diffusion_objective='repair'), 'nelbo'),
    (dict(diffusion_block=4, model_type='gpt2'), 'diffusion')])
def test_mistakes_are_named(options, words):
    with pytest.raises(UserError, match=words):
        GPTConfig(**SIZES | dict(model_type='diffusion', diffusion_objective='nelbo') | options)


# ---------------------------------------------------------------------------------------------------------------------
# generation

def canvas_of(B, T, first=None):
    ids = torch.full((B, T), V)
    if first is not None:
        ids[:, 0] = first
    return ids


@layouts
@pytest.mark.parametrize('N', [1, 3, 4])
def test_a_cached_prefix_is_computed_as_without_a_cache(shift, N):
    """Through several passes for a block, rows that pause, blocks that are skipped, a short last block, and a window that
    slides."""
    model, tokens = model_of(N, shift), text(3, shift, T=2 * T)
    trunk = BlockTrunk(model, 3)
    for b in (0, 1, 3, *range(4, 2 * T // N)):
        start = b * N + shift
        trunk.begin(tokens[:, :start])
        past = -(-max(0, start + N - T - shift) // N) * N
        for passes in range(3):
            noisy = tokens[:, start:start + N].masked_fill(torch.rand(3, N) < 0.6, V)
            rows = torch.tensor([True, passes != 1, passes == 1])
            with torch.no_grad():
                x = trunk(noisy, rows)
            slow = [slow_states(model, tokens[r, past:start], noisy[r], b - past // N) for r in range(3) if rows[r]]
            assert torch.allclose(x, torch.stack(slow), atol=1e-5)


def test_a_short_last_block_sees_masks_behind_it():
    model, tokens = model_of(4), text(1, False)
    trunk = BlockTrunk(model, 1)
    trunk.begin(tokens[:, :4])
    with torch.no_grad():
        x = trunk(torch.tensor([[V, 3]]), torch.tensor([True]))
    assert torch.allclose(x[0], slow_states(model, tokens[0, :4], torch.tensor([V, 3, V, V]), 1)[:2], atol=1e-5)


@layouts
@torch.no_grad()
def test_samples_have_the_probabilities_of_the_model(shift):
    """One commit in each step, at a random place of the block: over both orders, by enumeration."""
    sizes = dict(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=8)
    model = model_of(2, shift, **sizes)
    count, first = 20000, 1 if shift else None
    ids = torch.full((count, 4 + shift), 3)
    ids[:, :int(shift)] = 1
    options = dict(strategy='random', max_steps=2, temperature=1.0, top_k=0, seed=0)
    found = model.generate_diffusion(ids, **options)[:, int(shift):]
    code = (found * torch.tensor([27, 9, 3, 1])).sum(1).bincount(minlength=81) / count

    def p(clean, noisy, place, b):
        x = slow_states(model, clean, torch.tensor(noisy), b)
        return model.head(x)[place, :3].softmax(-1)
    wanted = torch.zeros(81)
    for n, x in enumerate(itertools.product(range(3), repeat=4)):
        total, before = 1.0, [first] if shift else []
        for b in (0, 1):
            y, clean = x[2 * b:2 * b + 2], torch.tensor(before)
            left = p(clean, (3, 3), 0, b)[y[0]] * p(clean, (y[0], 3), 1, b)[y[1]]
            right = p(clean, (3, 3), 1, b)[y[1]] * p(clean, (3, y[1]), 0, b)[y[0]]
            total, before = total * float(left + right) / 2, [*before, *y]
        wanted[n] = total
    assert wanted.sum() == pytest.approx(1, abs=1e-5)
    assert (code - wanted).abs().sum() / 2 < 0.5 * math.sqrt(81 / count) + 0.005


@layouts
@pytest.mark.parametrize('options', [
    dict(strategy='confidence', max_steps=4), dict(strategy='confidence', max_steps=2, block_length=2),
    dict(strategy='threshold', threshold=0.3), dict(strategy='ancestral', remask='remdm-cap'), dict(strategy='entropy')])
def test_any_strategy_fills_text_of_any_length_and_keeps_what_is_given(shift, options):
    model, ids = model_of(4, shift), canvas_of(3, 3 * T + 2, first=2)
    ids[:, 9:12], ids[1, 20] = 5, 4
    given = ids != V
    steps = [step for step in model.refine(ids, RefineConfig(**options), seed=1)]
    last = steps[-1]
    assert not (last.ids == V).any() and torch.equal(last.ids[given], ids[given])
    assert all((b.passes >= a.passes).all() for a, b in zip(steps, steps[1:]))
    again = [step.ids for step in model.refine(ids, RefineConfig(**options), seed=1)][-1]
    assert torch.equal(last.ids, again)


def test_forward_passes_are_those_that_are_run(monkeypatch):
    """Prefill and the pass that makes a block clean are part of the first step of the next block."""
    model, rows = model_of(4), 0
    real = GPT.trunk

    def counting(self, idx, cache=None):
        nonlocal rows
        rows += len(idx)
        return real(self, idx, cache)
    monkeypatch.setattr(GPT, 'trunk', counting)
    *_, step = model.refine(canvas_of(2, 3 * T, first=2), RefineConfig(strategy='confidence', max_steps=2), seed=1)
    assert step.passes.tolist() == [2 * 9] * 2 and rows == 2 * 2 * 9


def test_a_shifted_model_wants_a_first_token():
    with pytest.raises(UserError, match='--start'):
        model_of(4, True).generate_diffusion(canvas_of(1, 8))


def test_parts_of_a_block_divide_it():
    with pytest.raises(UserError, match='block_length=3'):
        model_of(4).generate_diffusion(canvas_of(1, 8), block_length=3)


# ---------------------------------------------------------------------------------------------------------------------
# by the commands

@pytest.fixture(scope='module', params=['blocks', 'shifted blocks'])
def run(request, tmp_path_factory, data_dir):
    out_dir = str(tmp_path_factory.mktemp('run') / 'out')
    values = dict(out_dir=out_dir, dataset='tiny_byte', data_dir=data_dir, model_type='diffusion', max_iters=20,
                  batch_size=4, diffusion_objective='nelbo', diffusion_block=4, block_size=16,
                  diffusion_shift=request.param != 'blocks', n_layer=1, n_head=2, n_embd=16, compile=False, device='cpu',
                  dtype='float32', eval_interval=20, eval_iters=2)
    assert train.main([f'--{key}={value}' for key, value in values.items()]) == 0
    return out_dir


def test_text_longer_than_the_context(run, capsys):
    generate_diffusion.main([f'--out_dir={run}', '--start=The ', '--max_new_tokens=50', '--ignore_eot=True', '--device=cpu'])
    said = capsys.readouterr()
    assert said.out.startswith('The ') and 'forward passes' in said.err and '50 tokens' in said.err


def test_end_of_text_ends_the_sample_and_not_the_prompt(run, monkeypatch, capsys):
    """What the user gives is printed whole, end-of-text in it or not; a sample ends at the first that it writes."""
    eot = load(run)['model_args']['vocab_size'] - 1
    real = refinement.gumbel_draw
    monkeypatch.setattr(refinement, 'gumbel_draw', lambda logits, *rest: torch.full_like(real(logits, *rest), ord('x')))
    words = [f'--out_dir={run}', '--device=cpu']
    generate_diffusion.main([*words, '--start=The <|endoftext|>heat', '--max_new_tokens=7'])
    assert capsys.readouterr().out.replace('<|endoftext|>', '') == 'The heatxxxxxxx\n'
    monkeypatch.setattr(refinement, 'gumbel_draw', lambda logits, *rest: torch.full_like(real(logits, *rest), eot))
    generate_diffusion.main([*words, '--start=The ', '--max_new_tokens=40'])
    said = capsys.readouterr()
    assert said.out == 'The \n' and ' 40 tokens' not in said.err  # the rest is not computed


def test_a_template_says_what_is_not_seen(run, capsys):
    generate_diffusion.main([f'--out_dir={run}', '--template=The [MASK:6] heat [MASK:3] cools the drift', '--device=cpu'])
    said = capsys.readouterr()
    assert ' heat ' in said.out and 'blocks of 4' in said.err and 'to its right' in said.err


def test_no_prompt_at_all(run, capsys):
    generate_diffusion.main([f'--out_dir={run}', '--max_new_tokens=9', '--device=cpu'])
    assert '9 tokens' in capsys.readouterr().err


def test_evaluation_repeats(run, capsys):
    args = [f'--out_dir={run}', '--windows=6', '--device=cpu', '--dtype=float32', '--num_samples=16', '--length=24']
    evaluate.main(args)
    first = capsys.readouterr().out
    evaluate.main(args)
    assert capsys.readouterr().out == first and '<=' in first


def test_the_checkpoint_is_the_model(run):
    model = load_model(load(run))
    assert model.config.diffusion_block == 4
    ids = torch.full((1, 30), model.config.vocab_size)
    ids[:, 0] = 65
    assert model.generate_diffusion(ids, seed=1).max() < model.config.vocab_size
