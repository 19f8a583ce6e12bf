"""Drafts make generation faster and change nothing: by enumeration, and against plain generation."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_model import SIZES, make, tokens
from test_model_types import VARIANTS, every_variant

import sample
import train
from nanodrift import drafting
from nanodrift.kv_cache import KVCache
from nanodrift.options import UserError
from nanodrift.sampling import distribution, sample_logits
from nanodrift.streams import draft_blocks

V, V_MODEL = 3, SIZES['vocab_size']


def table(seed, length):
    """A random next-token distribution for each text of up to `length` tokens, {text: (V,)}."""
    rng = torch.Generator().manual_seed(seed)
    texts = [text for n in range(length) for text in itertools.product(range(V), repeat=n)]
    return {text: torch.rand(V, generator=rng, dtype=torch.float64).softmax(0) for text in texts}


def outcomes_of_verify(monkeypatch, p, q, drafts, count):
    """Yields (probability, accepted, next id) of all that `verify` may do with one row."""
    K = len(drafts)
    ratios = [min(1.0, float(p[k, d] / q[k, d])) for k, d in enumerate(drafts)]
    draws = []
    monkeypatch.setattr(torch, 'multinomial', lambda weights, *_, **__: draws.append(weights[0]) or torch.zeros(1, 1).long())
    for sides in itertools.product((True, False), repeat=K):  # u below the ratio, or above
        weight = 1.0
        for below, ratio in zip(sides, ratios):
            weight *= ratio if below else 1 - ratio
        u = [ratio / 2 if below else (1 + ratio) / 2 for below, ratio in zip(sides, ratios)]
        monkeypatch.setattr(torch, 'rand', lambda *_, u=u, **__: torch.tensor([u], dtype=torch.float64))
        if weight:
            accepted, _ = drafting.verify(p[None], q[None], torch.tensor([drafts]), torch.tensor([count]))
        else:
            continue
        weights = draws.pop()
        for token, share in enumerate(weights / weights.sum()):
            yield weight, int(accepted), token, share


@pytest.mark.parametrize('count', [0, 1, 2])
@pytest.mark.parametrize('certain', [True, False])
def test_the_text_has_the_distribution_of_plain_sampling(monkeypatch, count, certain):
    """The sum over all branches, for V=3, K=2 and texts of 5 tokens: drafts that follow from the text, or that are drawn
    from distributions of their own."""
    K, T = 2, 5
    p, guess = table(1, T + K), table(2, T + K)
    found = {(): 1.0}  # the probability of reaching each text at the end of a pass
    for length in range(T):
        for text in [text for text in found if len(text) == length]:
            weight = found.pop(text)
            sure = torch.eye(V, dtype=torch.float64)[[sum(text) % V, (sum(text) + 1) % V]]
            q = sure if certain else torch.stack([guess[text], guess[text + (0,)]])
            for drafts in itertools.product(range(V), repeat=K):
                drawn = float(q[0, drafts[0]] * q[1, drafts[1]])
                if not drawn:
                    continue
                p_drafts = torch.stack([p[text + drafts[:k]] for k in range(K + 1)])
                for branch, accepted, token, share in outcomes_of_verify(monkeypatch, p_drafts, q, list(drafts), count):
                    grown = text + drafts[:accepted] + (token,)
                    found[grown] = found.get(grown, 0.0) + weight * drawn * branch * float(share)
    whole = dict.fromkeys(itertools.product(range(V), repeat=T), 0.0)
    for text, weight in found.items():
        whole[text[:T]] += weight
    for text, weight in whole.items():
        assert weight == pytest.approx(math.prod(float(p[text[:i]][token]) for i, token in enumerate(text)), abs=1e-9)


class FixedDrafter(drafting.NgramDrafter):
    """Guesses that are often right: the plain text, with a wrong token here and there."""
    truth = None

    def _draft(self, text, seen):
        guess = self.truth[tuple(text[:1])][len(text):len(text) + self.count]
        return [token if i % 3 else (token + 1) % 50 for i, token in enumerate(guess, len(text))]


@every_variant
@pytest.mark.parametrize('prompt, n, certain', [(1, 14, True), (3, 14, False), (20, 20, True)])  # the last past block_size
def test_greedy_text_is_that_of_plain_generation(monkeypatch, variant, prompt, n, certain):
    model = make(spread=0.3, **VARIANTS[variant])
    idx = tokens(3, prompt)
    idx[:, 0] = torch.arange(3)
    plain = torch.cat((idx, torch.stack(list(model.generate(idx, n, temperature=0)), 1)), 1).tolist()
    if certain:
        monkeypatch.setattr(drafting, 'NgramDrafter', FixedDrafter)
        monkeypatch.setattr(FixedDrafter, 'truth', {tuple(row[:1]): row for row in plain})
    steps = list(drafting.generate(model, idx, n, 4, temperature=0))
    assert [row + sum(new, []) for row, new in zip(idx.tolist(), zip(*steps))] == plain
    assert len(steps) < n or not certain


def test_rows_end_with_end_of_text_and_draw_no_more():
    model, idx = make(spread=0.3), tokens(4, 2)
    plain = torch.stack(list(model.generate(idx, 12, temperature=0)), 1).tolist()
    eot = plain[0][5]
    found = [sum(new, []) for new in zip(*drafting.generate(model, idx, 12, 3, temperature=0, eot=eot))]
    assert found == [row[:row.index(eot) + 1] if eot in row else row for row in plain]


def test_ngrams_guess_what_followed_the_last_time():
    drafter = drafting.NgramDrafter([[1, 2, 3, 9, 2, 3], [5, 6], [7, 7, 7]], 3)
    assert drafter.draft([0, 1, 2]) == ([[9, 2, 3], [], [7]], None)
    drafter.add([[4, 2, 3], [5], []])
    assert drafter.draft([0, 1]) == ([[4, 2, 3], [6, 5]], None)


@pytest.mark.parametrize('temperature, top_k, top_p', [(1.0, None, None), (0.7, 5, None), (1.3, None, 0.6), (0.5, 6, 0.8),
                                                       (0, 3, None)])
def test_the_distribution_is_what_is_drawn_from(temperature, top_k, top_p):
    logits = torch.randn(2, 9) * 2
    p = distribution(logits, temperature, top_k, top_p)
    draws = torch.stack([sample_logits(logits, temperature, top_k, top_p) for _ in range(4000)])
    counts = torch.stack([(draws == v).float().mean(0) for v in range(9)], -1)
    torch.testing.assert_close(p.sum(-1), torch.ones(2))
    torch.testing.assert_close(counts, p, atol=0.035, rtol=0)
    assert not counts[p == 0].any()


# ---------------------------------------------------------------------------------------------------------------------
# a model's own drafts

own = pytest.mark.parametrize('options', [{}, {'model_type': 'rotating'}, {'model_type': 'rotating', 'rotating_head': 'gp'}])


def drafts_and_tokens(options, K=3, B=2, seed=0):
    model = make(spread=0.3, draft_block=K, **options)
    text = tokens(B, model.config.block_size + 1)
    return model, text, model.objective.make_batch(text, torch.Generator().manual_seed(seed))


@own
def test_drafts_leave_the_causal_model_as_it_is(options):
    model, text, (X, Y, W) = drafts_and_tokens(options)
    T, n = model.config.block_size, draft_blocks(model.config)
    with torch.no_grad():
        x = model.trunk(X)
        assert torch.allclose(x[:, :T], model.trunk(text[:, :-1]), atol=1e-5)
        logits, loss = model(X, Y, W)
        fused = model(X, Y, W, return_logits=False)[1]
    losses = F.cross_entropy(logits.flatten(0, 1), Y.flatten(), reduction='none').view(Y.shape)
    weight = model.config.draft_weight
    assert loss == pytest.approx(float(losses[:, :T].mean() + weight * losses[:, T:].mean()), rel=1e-5)
    assert fused == pytest.approx(float(loss), rel=1e-5)
    assert X.shape == (2, 2, T + 3 * n) and X[0, 1].max() < T


def test_the_grid_starts_anywhere_and_targets_are_two_ahead():
    starts = set()
    for seed in range(20):
        _, text, (X, Y, _) = drafts_and_tokens({}, seed=seed)
        places = X[0, 1, 32:]
        assert torch.equal(Y[:, 32:], text[:, places + 1]) and X[:, 0, 32:].unique().tolist() == [V_MODEL]
        starts.add(int(places[0]))
    assert starts == {1, 2, 3}


@own
def test_a_draft_sees_its_block_and_the_tokens_before_it(options):
    model, _, (X, _, _) = drafts_and_tokens(options, B=1)
    T, b = model.config.block_size, 2
    place = int(X[0, 1, T + 3 * b])
    with torch.no_grad():
        before = model.trunk(X)[0, T + 3 * b:T + 3 * b + 3]
        seen = []
        for i in range(X.size(2)):
            other = X.clone()
            other[0, 0, i] = (X[0, 0, i] + 1) % V_MODEL
            if (model.trunk(other)[0, T + 3 * b:T + 3 * b + 3] - before).abs().max() > 1e-6:
                seen.append(i)
    assert seen == [*range(place), *range(T + 3 * b, T + 3 * b + 3)]


@own
def test_generation_drafts_as_training_does(options):
    """The states of the masks behind each position of a cached pass, and those of the two streams."""
    model, text, (X, _, _) = drafts_and_tokens(options, B=1)
    T, place = model.config.block_size, int(X[0, 1, 32])
    held, K, causal = 1, 3, T // 2
    cache = KVCache(model, 1, 99)
    with torch.no_grad():
        trained = model.trunk(X)[0, T:].unflatten(0, (-1, 3))
        model.trunk(text[:, :held], cache.begin(held))
        cache.keep(held)
        first = causal - 1 - held - K
        visible, offsets = drafting.draft_layout(first, K, 3)
        ids = F.pad(text[:, held:causal], (0, 3 * (K + 1)), value=V_MODEL)
        x = model.trunk(ids, cache.begin(ids.size(1), visible=visible, offsets=offsets))[0, causal - held:]
    x = x.unflatten(0, (-1, 3))
    found = 0
    for j in range(K + 1):
        behind = held + first + j  # the position of the causal token
        if (behind + 1 - place) % 3 == 0:
            torch.testing.assert_close(x[j], trained[(behind + 1 - place) // 3], atol=1e-5, rtol=1e-4)
            found += 1
    assert found


@own
@pytest.mark.parametrize('prompt, n', [(1, 14), (3, 25), (20, 30)])  # the last past block_size
@pytest.mark.parametrize('K', [1, 3])
def test_greedy_text_with_own_drafts_is_that_of_plain_generation(options, prompt, n, K):
    model, idx = make(spread=0.3, draft_block=K, **options), tokens(3, prompt)
    plain = torch.stack(list(model.generate(idx, n, temperature=0)), 1).tolist()
    steps = list(drafting.generate(model, idx, n, K, temperature=0, own=True))
    assert [sum(new, []) for new in zip(*steps)] == plain


def test_texts_with_own_drafts_are_as_frequent_as_plain_ones():
    model = make(spread=0.6, vocab_size=3, draft_block=2, n_layer=1)
    idx, counts = torch.zeros(6000, 1, dtype=torch.long), []
    for texts in (torch.stack(list(model.generate(idx, 4, seed=1)), 1).tolist(),
                  [sum(new, []) for new in zip(*drafting.generate(model, idx, 4, 2, seed=2, own=True))]):
        code = torch.tensor(texts) @ torch.tensor([27, 9, 3, 1])
        counts.append(code.bincount(minlength=81) / len(idx))
    assert (counts[0] - counts[1]).abs().sum() / 2 < 0.06


def test_a_text_it_has_learned_by_heart_takes_few_passes():
    """A draft is worth something: on a text that repeats itself most drafts are accepted."""
    model = make(draft_block=3, vocab_size=50, n_layer=2)
    text = (torch.arange(33) * 7 % 50)[None].repeat(4, 1)
    text = (text + torch.arange(4)[:, None] * 11) % 50
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        loss = model(*model.objective.make_batch(text, torch.Generator().manual_seed(step)))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    steps = list(drafting.generate(model.eval(), text[:, :2], 24, 3, temperature=0, own=True))
    assert [sum(new, []) for new in zip(*steps)] == text[:, 2:26].tolist() and len(steps) <= 10


def test_weight_0_is_gpt2_to_the_bit():
    with_, without = make(draft_block=3, draft_weight=0.0), make()
    text = tokens(2, 33)
    batches = [m.objective.make_batch(text, torch.Generator().manual_seed(0)) for m in (with_, without)]
    assert all(torch.equal(a, b) for (a, b) in zip(batches[0][:2], batches[1][:2])) and batches[0][2] is None
    with_.load_state_dict(without.state_dict())
    losses = [model(*batch)[1] for model, batch in zip((with_, without), batches)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(with_.parameters(), without.parameters(), strict=True))


def test_the_commands(settings, capsys):
    """Trained from a gpt2 run, sampled with its own drafts; other models have none."""
    for values in (settings(out_dir='gpt2'),
                   settings(out_dir='drafts', model_type='drafts') | {'init_from': settings(out_dir='gpt2')['out_dir']}):
        assert train.main([f'--{key}={value}' for key, value in values.items()]) == 0
    capsys.readouterr()
    args = ['--start=The ', '--max_new_tokens=10', '--device=cpu', '--dtype=float32', '--draft=own', '--temperature=0']
    for more in (['--num_samples=1'], ['--num_samples=2', '--draft_tokens=1']):
        sample.main([f'--out_dir={values["out_dir"]}', *args, *more])
        assert 'tokens per forward pass' in capsys.readouterr().err
    with pytest.raises(UserError, match='--draft_block'):
        sample.main([f'--out_dir={settings(out_dir="gpt2")["out_dir"]}', *args])
