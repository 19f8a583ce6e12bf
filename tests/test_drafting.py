"""Drafts make generation faster and change nothing: by enumeration, and against plain generation."""
import itertools
import math

import pytest
import torch
from test_model import make, tokens
from test_model_types import VARIANTS, every_variant

from nanodrift import drafting
from nanodrift.sampling import distribution, sample_logits

V = 3


def table(seed, length):
    """A random next-token distribution for each text of up to `length` tokens, {text: (V,)}."""
    rng = torch.Generator().manual_seed(seed)
    texts = [text for n in range(length) for text in itertools.product(range(V), repeat=n)]
    return {text: torch.rand(V, generator=rng, dtype=torch.float64).softmax(0) for text in texts}


def outcomes_of_verify(monkeypatch, p, drafts, count):
    """Yields (probability, accepted, next id) of all that `verify` may do with one row."""
    K = len(drafts)
    ratios = [float(p[k, d]) for k, d in enumerate(drafts)]
    draws = []
    monkeypatch.setattr(torch, 'multinomial', lambda weights, *_, **__: draws.append(weights[0]) or torch.zeros(1, 1).long())
    for sides in itertools.product((True, False), repeat=K):  # u below the ratio, or above
        weight = 1.0
        for below, ratio in zip(sides, ratios):
            weight *= ratio if below else 1 - ratio
        u = [ratio / 2 if below else (1 + ratio) / 2 for below, ratio in zip(sides, ratios)]
        monkeypatch.setattr(torch, 'rand', lambda *_, u=u, **__: torch.tensor([u], dtype=torch.float64))
        accepted, _ = drafting.verify(p[None], torch.tensor([drafts]), torch.tensor([count]))
        weights = draws.pop()
        for token, share in enumerate(weights / weights.sum()):
            yield weight, int(accepted), token, share


@pytest.mark.parametrize('count', [0, 1, 2])
def test_the_text_has_the_distribution_of_plain_sampling(monkeypatch, count):
    """The sum over all branches, for V=3, K=2 and texts of 5 tokens, whose drafts follow from the text."""
    K, T = 2, 5
    p = table(1, T + K)
    found = {(): 1.0}  # the probability of reaching each text at the end of a pass
    for length in range(T):
        for text in [text for text in found if len(text) == length]:
            weight = found.pop(text)
            drafts = [sum(text) % V, (sum(text) + 1) % V]
            p_drafts = torch.stack([p[text + tuple(drafts[:k])] for k in range(K + 1)])
            for branch, accepted, token, share in outcomes_of_verify(monkeypatch, p_drafts, drafts, count):
                grown = text + tuple(drafts[:accepted]) + (token,)
                found[grown] = found.get(grown, 0.0) + weight * branch * float(share)
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
    assert drafter.draft([0, 1, 2]) == [[9, 2, 3], [], [7]]
    drafter.add([[4, 2, 3], [5], []])
    assert drafter.draft([0, 1]) == [[4, 2, 3], [6, 5]]


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
