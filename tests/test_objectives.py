"""Masked diffusion: what is corrupted and how it is scored, the bound against enumeration, the two-way attention."""
import itertools
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from model import GPT, GPTConfig, load_model
from nanodrift import checkpoint
from nanodrift.kernels import cross_entropy, linear_cross_entropy
from nanodrift.machine import Ranks
from nanodrift.metrics import combine, over_windows
from nanodrift.objectives import (
    NOISE_LEVELS,
    count_batch,
    diffusion_loss_function,
    diffusion_metrics,
    diffusion_summary,
    flag_weights,
    nelbo_batch,
    repair_and_count_batch,
    repair_batch,
)
from nanodrift.options import UserError

V, MASK = 11, 11
PENALTIES = dict(penalty_keep_mask=0.25, penalty_mask_correct=0.5)


def make(objective='repair', spread=0.3, **options):
    """A tiny model whose weights are large enough that every part of it shows in the logits."""
    torch.manual_seed(0)
    sizes = dict(block_size=16, vocab_size=V, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**sizes | dict(model_type='diffusion', diffusion_objective=objective) | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * spread)
    return model


def tokens(B=6, T=16, vocab_size=V, seed=0):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# the repair objective

def repair_in_a_loop(clean, generator):
    """One position at a time, from the same random numbers."""
    B, T = clean.shape
    u = torch.rand(2, B, 1, generator=generator).squeeze(-1)
    keys = torch.rand(B, T, generator=generator)
    shifts = torch.randint(1, V, (B, T), generator=generator)
    X, Y = clean.clone(), clean.clone()
    for b in range(B):
        rate_mask = float(torch.tensor(0.99) * u[0, b])
        rate_random = float((torch.tensor(0.99) - rate_mask) * u[1, b])
        order = sorted(range(T), key=lambda i: keys[b, i])
        n_mask, n_random = math.floor(T * rate_mask), math.floor(T * rate_random)
        for i in order[:n_mask]:
            X[b, i] = MASK
        for i in order[n_mask:n_mask + n_random]:
            X[b, i] = (clean[b, i] + shifts[b, i]) % V
            Y[b, i] = MASK
    return X, Y


def test_repair_is_a_loop_over_positions():
    clean = tokens(200, 13)
    X, Y, _ = repair_batch(clean, rng(), mask=MASK, **PENALTIES)
    wanted_X, wanted_Y = repair_in_a_loop(clean, rng())
    assert torch.equal(X, wanted_X) and torch.equal(Y, wanted_Y)


def test_each_position_is_masked_replaced_or_kept():
    clean = tokens(4000, 50)
    X, Y, W = repair_batch(clean, rng(1), mask=MASK, **PENALTIES)
    masked, replaced, kept = X == MASK, Y == MASK, X == Y
    assert (masked.int() + replaced.int() + kept.int() == 1).all()
    assert (Y[masked | kept] == clean[masked | kept]).all()
    assert (X[replaced] != clean[replaced]).all() and X[replaced].max() < V
    assert (W[masked] == 0.25).all() and (W[kept] == 0.5).all() and (W[replaced] == 1).all()
    assert (masked | replaced).float().mean(1).max() <= 0.99
    assert masked.float().mean() == pytest.approx(0.99 / 2, abs=0.02)
    assert replaced.float().mean() == pytest.approx(0.99 / 4, abs=0.02)
    shift = (X - clean)[replaced] % V
    assert set(shift.tolist()) == set(range(1, V))
    for where in (masked, replaced):  # every position alike
        share = where.float().mean(0)
        assert share.max() - share.min() < 0.06


def loss_in_a_loop(logits, Y, X, keep_mask=0.25, mask_correct=0.5):
    total = 0.0
    for row, x, y in zip(logits.flatten(0, 1).double(), X.flatten().tolist(), Y.flatten().tolist()):
        weight = 1.0
        if int(row.argmax()) == MASK:
            weight = keep_mask if x == MASK else mask_correct if x == y else 1.0
        total += weight * -float(row.detach().log_softmax(-1)[y])
    return total / Y.numel()


def test_the_loss_of_repair_is_a_loop_over_positions_on_every_way():
    model, clean = make(), tokens(60)
    with torch.no_grad():
        model.transformer.ln_f.bias.add_(1.5 * model.transformer.wte.weight[MASK])  # often the prediction
    X, Y, W = model.objective.make_batch(clean, rng())
    logits, loss = model(X, Y, W)
    flagged = logits.argmax(-1) == MASK
    assert min((flagged & where).sum() for where in (X == MASK, Y == MASK, X == Y)) > 3
    wanted = loss_in_a_loop(logits, Y, X)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert model(X, Y, W, return_logits=False)[1].item() == pytest.approx(wanted, rel=1e-5)
    assert diffusion_loss_function(logits, Y, X, MASK, 0.25, 0.5).item() == pytest.approx(wanted, rel=1e-5)
    assert diffusion_loss_function(logits, Y, X, MASK, 0.1, 0.9).item() == pytest.approx(
        loss_in_a_loop(logits, Y, X, 0.1, 0.9), rel=1e-5)


def test_the_fused_head_has_the_gradient_of_the_plain_one():
    torch.manual_seed(0)
    x, weight = torch.randn(40, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    Y, W = torch.randint(V + 1, (40,)), torch.rand(40)
    with torch.no_grad():
        weight[MASK] += 1.0
    plain = cross_entropy(x @ weight[:V + 1].t(), Y, W, flag=MASK)
    fused = linear_cross_entropy(x, weight, V + 1, Y, W, flag=MASK)
    assert fused.item() == pytest.approx(plain.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(fused, (x, weight)), torch.autograd.grad(plain, (x, weight))):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_flags_are_scored_in_the_metrics():
    """A model made by hand: it predicts [MASK] for every replaced token but one, and for one right token."""
    model, clean = make(), tokens(8)
    X, Y, W = repair_and_count_batch(clean, rng(), repair=lambda *a: repair_batch(*a, mask=MASK, **PENALTIES),
                                     count=lambda *a: count_batch(*a, mask=MASK))
    replaced, kept = (Y == MASK)[:8].nonzero(), ((X == Y) & (X != MASK))[:8].nonzero()
    logits = F.one_hot(Y, V + 1).float() * 30
    (i, j), (k, m) = replaced[0].tolist(), kept[0].tolist()
    logits[i, j] = F.one_hot(torch.tensor(3), V + 1) * 30.0
    logits[k, m] = F.one_hot(torch.tensor(MASK), V + 1) * 30.0
    model.trunk, model.head = (lambda idx: logits), (lambda x: x)
    numbers = diffusion_summary(diffusion_metrics(model, X, Y, W, repair=True))
    n = len(replaced)
    assert numbers['flag_recall'] == pytest.approx((n - 1) / n)
    assert numbers['flag_precision'] == pytest.approx((n - 1) / n)
    assert numbers['flag_loss'] == pytest.approx(30 / n, rel=1e-3)
    assert numbers['keep_loss'] == pytest.approx(30 / len(kept), rel=1e-3)
    assert numbers['accuracy'] == 1 and numbers['nelbo'] == pytest.approx(0, abs=1e-5)
    assert numbers['fill_loss'] == pytest.approx(0, abs=1e-5)
    assert NOISE_LEVELS == (20, 40, 60, 80, 100)
    recalls = [numbers[f'flag_{level}_recall'] for level in NOISE_LEVELS]
    assert min(r for r in recalls if not math.isnan(r)) < 1
    of_each_level = ('masked_{}loss', 'fill_{}loss', 'flag_{}loss', 'keep_{}loss', 'flag_{}recall', 'flag_{}precision')
    levels = ('', *(f'{level}_' for level in NOISE_LEVELS))
    assert set(numbers) == {name.format(level) for name in of_each_level for level in levels} | {
        'accuracy', 'nelbo', 'nelbo_stderr', 'repair_loss'}


# ---------------------------------------------------------------------------------------------------------------------
# the bound

@pytest.mark.parametrize('least, most', [(1e-3, 1.0), (0.3, 0.8)])
def test_times_are_stratified_over_all_micro_batches_of_an_iteration(least, most):
    B, parts, T = 4, 3, 4000
    strata, rates = [], {} if most == 1 else {'t_min': least, 't_max': most}
    for i in range(parts):
        X, Y, W = nelbo_batch(tokens(B, T), rng(i), (i, parts), mask=MASK, **rates)
        assert torch.equal((X == MASK), W > 0) and torch.equal(Y, tokens(B, T))
        t = 1 / W.max(1).values
        assert torch.allclose((X == MASK).float().mean(1), t, atol=0.05)
        strata += ((t - least) / (most - least) * B * parts).floor().int().tolist()
    assert strata == list(range(B * parts))


def test_as_many_are_masked_as_were_drawn_each_number_equally_often():
    X, Y, W = count_batch(tokens(6000, 5), rng(), mask=MASK)
    count = (X == MASK).sum(1)
    assert torch.equal(Y, tokens(6000, 5)) and torch.allclose(W, (X == MASK) * 5 / count[:, None])
    assert count.bincount().tolist() == [0] + [1200] * 5
    single = torch.cat([count_batch(tokens(1, 5), rng(i), mask=MASK)[0] for i in range(3000)])
    assert (single == MASK).sum(1).bincount().float()[1:].div(3000).sub(0.2).abs().max() < 0.03


def log_p_masked(model, X):
    """log p of each token at each position of X (N, T), [MASK] excluded, float64."""
    with torch.no_grad():
        return model(X)[0][..., :model.config.vocab_size].double().log_softmax(-1)


def exact(model, word):
    """Of one word: the exact expectation of the bound, over all sets of masked positions, and the exact -log p over all
    orders of filling in, one position at a time. Both in nats per token."""
    T, mask = len(word), model.config.vocab_size
    word, sets = torch.tensor(word), list(itertools.product([False, True], repeat=T))
    X = torch.stack([word.masked_fill(torch.tensor(s), mask) for s in sets])
    at_word = log_p_masked(model, X).gather(-1, word.expand(len(sets), T)[..., None]).squeeze(-1)
    of_set = dict(zip(sets, at_word))
    bound = sum(-float(of_set[s][torch.tensor(s)].sum()) / sum(s) / math.comb(T, sum(s)) for s in sets if any(s)) / T
    orders = []
    for order in itertools.permutations(range(T)):
        masked, total = [True] * T, 0.0
        for i in order:
            total += float(of_set[tuple(masked)][i])
            masked[i] = False
        orders.append(total)
    return bound, -(torch.tensor(orders).double().logsumexp(0) - math.log(len(orders))).item() / T


def nelbo(model, tokens, draws):
    """The bound on -log p of token ids (N, T), in nats per token, and its standard error over the N sequences."""
    windows = SimpleNamespace(read=lambda rows: tokens[rows])
    metrics = over_windows(windows, list(range(len(tokens))), 50, partial(count_batch, mask=model.config.vocab_size),
                           partial(diffusion_metrics, model, repair=False), Ranks(), 'float32', draws)
    numbers = diffusion_summary(metrics)
    return numbers['nelbo'], numbers['nelbo_stderr']


@pytest.mark.parametrize('objective', ['repair', 'nelbo'])
def test_the_bound_is_its_expectation_and_never_below_the_exact_likelihood(objective):
    model = make(objective, spread=0.6, vocab_size=3, block_size=4)
    words = list(itertools.product(range(3), repeat=4))
    pairs = [exact(model, word) for word in words]
    assert all(bound >= nll - 1e-6 for bound, nll in pairs)
    assert max(bound - nll for bound, nll in pairs) > 0.05
    mean, stderr = nelbo(model, torch.tensor(words), draws=200)
    bounds = torch.tensor([bound for bound, _ in pairs])
    assert abs(mean - float(bounds.mean())) < 0.1
    assert stderr == pytest.approx(float(bounds.std(correction=0)) / len(bounds) ** 0.5, rel=0.1)


def test_the_loss_of_training_has_the_expectation_of_the_bound():
    model = make('nelbo', spread=0.6, vocab_size=3, block_size=4)
    words = torch.tensor(list(itertools.product(range(3), repeat=4)))
    wanted = sum(exact(model, word)[0] for word in words.tolist()) / len(words)
    generator, losses = rng(), []
    for _ in range(400):
        X, Y, W = model.objective.make_batch(words[torch.randperm(len(words), generator=generator)], generator)
        with torch.no_grad():
            losses.append(model(X, Y, W, return_logits=False)[1].item())
    losses = torch.tensor(losses)
    assert abs(losses.mean() - wanted) < 4 * losses.std() / 20 + 2e-3  # the times end at 0.001


@pytest.mark.parametrize('objective', ['repair', 'nelbo'])
@torch.no_grad()
def test_a_model_that_knows_nothing_needs_log_v(objective):
    model = make(objective)
    torch.nn.init.zeros_(model.transformer.wte.weight)
    assert nelbo(model, tokens(), draws=3) == pytest.approx((math.log(V), 0), abs=1e-5)
    X, Y, W = model.objective.eval_batch(tokens(), rng())
    assert diffusion_summary(model.objective.metrics(model, X, Y, W))['nelbo'] == pytest.approx(math.log(V), abs=1e-5)


def test_the_logit_of_the_mask_has_no_part_in_the_bound():
    model = make('nelbo')
    X, Y, W = model.objective.make_batch(tokens(), rng())
    before = model(X, Y, W)[1], model(X, Y, W, return_logits=False)[1]
    assert before[0].item() == pytest.approx(before[1].item(), rel=1e-5)
    logits = model(X)[0]
    logits[..., MASK] += 50.0
    assert model.objective.loss(logits, Y, W).item() == pytest.approx(before[0].item(), rel=1e-6)


def test_metrics_of_parts_combined_are_those_of_the_whole():
    model, clean = make(), tokens(12)
    X, Y, W = model.objective.eval_batch(clean, rng())
    whole = diffusion_summary(model.objective.metrics(model, X, Y, W))
    halves = [torch.tensor([*range(0, 5), *range(12, 17)]), torch.tensor([*range(5, 12), *range(17, 24)])]
    parts = diffusion_summary(combine([model.objective.metrics(model, X[h], Y[h], W[h]) for h in halves]))
    assert parts == pytest.approx(whole, rel=1e-5, nan_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# the architecture

@pytest.mark.parametrize('positions', ['rotary', 'learned', 'both'])
@pytest.mark.parametrize('training', [False, True])
def test_every_position_sees_every_other(positions, training):
    model = make(positions=positions).train(training)
    X = tokens(1)
    logits = model(X)[0]
    assert logits.shape == (1, 16, V + 1)
    for position in (0, 9, 15):
        changed = X.clone()
        changed[0, position] = (changed[0, position] + 1) % V
        assert ((model(changed)[0] - logits).abs().amax(-1) > 1e-6).all()
    for names in (dict(model.named_parameters()), model.state_dict()):
        assert ('transformer.wpe.weight' in names) == (positions != 'rotary')
    assert bool(model.transformer.wpe.weight.any()) == (positions != 'rotary')


@pytest.mark.parametrize('n_embd', [64, 256])
def test_heads_start_out_looking_at_their_neighbours(n_embd):
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=4, n_embd=n_embd, block_size=32, vocab_size=V)
    model = GPT(GPTConfig(model_type='diffusion', **sizes))
    x = model.transformer.wte(torch.full((1, 32), MASK))
    weights = []
    for block in model.transformer.h:
        q, k, _ = block.attn.c_attn(block.ln_1(x)).view(1, 32, 3, 4, n_embd // 4).permute(2, 0, 3, 1, 4)
        q, k = block.attn.rope(q, k)
        weights.append((q @ k.mT / math.sqrt(n_embd // 4)).softmax(-1)[0, :, 16])  # of position 16, (H, T)
    assert (weights[0].argmax(-1) - 16).tolist() == [-1, 1, -2, 2] and weights[0].max(-1).values.min() > 0.8
    assert weights[1].max() < 2 / 32  # the second half looks everywhere


def test_what_follows_from_a_neighbour_is_soon_learned():
    """Each token follows from the one before. Heads that start out looking everywhere alike stay at what is frequent."""
    losses = {}
    for around in (True, False):
        rng = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        sizes = dict(n_layer=2, n_head=4, n_embd=32, block_size=24, vocab_size=16)
        model = GPT(GPTConfig(model_type='diffusion', diffusion_objective='nelbo', **sizes))
        if not around:
            torch.nn.init.zeros_(model.transformer.h[0].attn.c_attn.bias)
        optimizer, following, recent = torch.optim.AdamW(model.parameters(), lr=5e-3), torch.randperm(16, generator=rng), []
        for _ in range(100):
            columns = [torch.randint(16, (32,), generator=rng)]
            while len(columns) < 24:
                columns.append(following[columns[-1]])
            X, Y, W = model.objective.make_batch(torch.stack(columns, dim=1), rng)
            loss = model(X, Y, W, return_logits=False)[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recent.append(loss.item())
        losses[around] = sum(recent[-25:]) / 25
    assert losses[True] < 0.8 and losses[False] > 1.2


@pytest.mark.parametrize('positions', ['rotary', 'learned', 'both'])
def test_positions_can_be_told_apart(positions):
    model = make(positions=positions)
    X = tokens(1)
    assert (model(X.flip(1))[0].flip(1) - model(X)[0]).abs().max() > 1e-4


def test_a_causal_checkpoint_opened_up_keeps_its_weights(tiny, capsys):
    config, model_config = tiny(ema=0.9)
    train.Trainer(config, model_config, Ranks()).train()
    with pytest.raises(UserError, match='positions=both'):
        train.Trainer(*tiny(out_dir='child', init_from=config.out_dir, model_type='diffusion'), Ranks())
    child = tiny(out_dir='child', init_from=config.out_dir, model_type='diffusion', positions='learned')
    trainer = train.Trainer(*child, Ranks())
    n = trainer.model.config.vocab_size
    assert f'transformer.wte.weight[{n}] (an id without text)' in capsys.readouterr().out
    parent, mine = checkpoint.load(checkpoint.find(config.out_dir)), trainer.model.state_dict()
    for name, tensor in parent['ema'].items():
        assert torch.equal(mine[name][:n], tensor[:n]), name
    assert torch.allclose(mine['transformer.wte.weight'][n], parent['ema']['transformer.wte.weight'][:n].mean(0), atol=1e-6)
    X = torch.randint(n, (1, 8))
    parent = load_model(parent)
    assert torch.allclose(trainer.model.eval()(X[:, :1])[0][0, 0, :n], parent(X[:, :1])[0][0, 0], atol=1e-5)
    assert not torch.allclose(trainer.model(X)[0][0, 0, :n], parent(X[:, :1])[0][0, 0], atol=1e-3)
    assert trainer.train() == 0


# ---------------------------------------------------------------------------------------------------------------------
# training

@pytest.mark.parametrize('objective', ['repair', 'nelbo'])
def test_a_run_tells_the_bound_and_what_it_is_made_of(tiny, objective):
    config, model_config = tiny(model_type='diffusion', diffusion_objective=objective)
    train.train(config, model_config)
    with open(f'{config.out_dir}/metrics.jsonl') as f:
        last = [json.loads(line) for line in f if 'val_loss' in line][-1]
    wanted = {'val_accuracy', 'val_nelbo_stderr', 'val_masked_loss', 'val_masked_60_loss', 'val_bits_per_byte_bound'}
    assert wanted <= set(last)
    assert ('val_flag_recall' in last) == (objective == 'repair')
    assert 'val_bits_per_byte' not in last


@pytest.mark.slow
@pytest.mark.parametrize('objective', ['repair', 'nelbo'])
def test_it_learns_what_can_be_learned(objective):
    """The second half of each sequence is the first: a masked token can be read off its twin, a wrong one be seen."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(model_type='diffusion', diffusion_objective=objective, block_size=8, vocab_size=5, n_layer=2,
                          n_head=4, n_embd=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = rng()
    for _ in range(600):
        half = torch.randint(5, (64, 4), generator=generator)
        X, Y, W = model.objective.make_batch(torch.cat((half, half), 1), generator)
        model(X, Y, W, return_logits=False)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    half = torch.randint(5, (2000, 4), generator=generator)
    batch = model.objective.eval_batch(torch.cat((half, half), 1), generator)
    with torch.no_grad():
        numbers = diffusion_summary(model.objective.metrics(model, *batch))
    exact_bound = math.log(5) / 2  # half of the tokens are free
    assert exact_bound - 0.02 < numbers['nelbo'] < exact_bound + 0.25
    if objective == 'repair':
        assert numbers['flag_20_recall'] > 0.3 and numbers['flag_20_precision'] > 0.25


def test_the_moving_average_is_that_of_the_steps_and_is_what_evaluation_sees(tiny):
    config, model_config = tiny(model_type='diffusion', ema=0.6, max_iters=3, eval_interval=3)
    trainer = train.Trainer(config, model_config, Ranks())
    wanted = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for step in range(1, 4):
        trainer._step()
        decay = min(0.6, (1 + step) / (10 + step))
        for name, p in trainer.model.named_parameters():
            wanted[name] = decay * wanted[name] + (1 - decay) * p.detach()
    raw = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    averaged = trainer.ema.state()
    for name in wanted:
        assert torch.allclose(averaged[name], wanted[name], atol=1e-7)
        assert torch.equal(dict(trainer.model.named_parameters())[name], raw[name])
    numbers = trainer.evaluate('val')
    trainer.ema = None
    assert numbers != trainer.evaluate('val')
    trainer.model.load_state_dict(averaged)
    assert numbers == pytest.approx(trainer.evaluate('val'), nan_ok=True)


def test_flag_weights_need_no_text():
    W = flag_weights(torch.tensor([[MASK, 1, 2]]), torch.tensor([[4, MASK, 2]]), MASK, 0.25, 0.5)
    assert W.tolist() == [[0.25, 1, 0.5]]
