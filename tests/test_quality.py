"""The measures of sample quality, on distributions whose distance is known."""
import math
from collections import Counter

import numpy as np
import pytest
import torch
from test_model import make

from nanodrift import ngrams, quality

rng = np.random.default_rng(0)


def test_the_classifier_is_at_chance_on_equals_and_certain_of_strangers():
    a, b = rng.normal(size=(600, 8)), rng.normal(size=(600, 8))
    assert quality.classifier_accuracy(a, b) == pytest.approx(0.5, abs=0.05)
    assert quality.classifier_accuracy(a, b + 5) > 0.99
    apart = b + np.eye(8)[0]  # one unit apart in one coordinate: the best any classifier can do is Phi(1/2)
    assert quality.classifier_accuracy(a, apart) == pytest.approx(0.691, abs=0.04)


def test_mauve_falls_from_one_to_nothing():
    a, b = rng.normal(size=(500, 8)), rng.normal(size=(500, 8))
    near, far = quality.mauve(a, b), quality.mauve(a, b + 20 * np.eye(8)[0])
    assert near > 0.85 and far < 0.05 and quality.mauve(a, a) == pytest.approx(1, abs=0.01)
    assert far < quality.mauve(a, b + 0.8 * np.eye(8)[0]) < near


def test_the_area_is_that_of_the_published_definition():
    """Against a fine sum over the curve of two points each: p = (1, 0), q = (a, 1-a)."""
    a = 0.3
    p, q = np.array([1.0, 0.0]), np.array([a, 1 - a])
    x, y = [0.0], [1.0]
    for weight in np.linspace(0, 1, 20001)[1:-1]:
        m = weight * p + (1 - weight) * q
        x.append(math.exp(-5 * (q * np.log(q / m)).sum()))
        y.append(math.exp(-5 * math.log(1 / m[0])))
    x, y = np.array(x + [1.0]), np.array(y + [0.0])
    order = np.argsort(x)
    assert quality.area_under_divergences(p, q) == pytest.approx(np.trapezoid(y[order], x[order]), abs=0.01)
    assert quality.area_under_divergences(q, q) == pytest.approx(1)


@pytest.mark.parametrize('n', [1, 2, 3])
def test_the_divergence_of_ngrams_is_that_of_counting(n):
    a, b = rng.integers(4, size=(30, 9)), rng.integers(5, size=(20, 9))
    counts = []
    for samples in (a, b):
        c = Counter(tuple(row[i:i + n]) for row in samples.tolist() for i in range(9 - n + 1))
        counts.append({gram: value / sum(c.values()) for gram, value in c.items()})
    p, q = counts
    wanted = 0.0
    for gram in p.keys() | q.keys():
        m = (p.get(gram, 0) + q.get(gram, 0)) / 2
        wanted += sum(x[gram] * math.log2(x[gram] / m) / 2 for x in counts if x.get(gram))
    assert ngrams.divergence(a, b, n) == pytest.approx(wanted)
    assert ngrams.divergence(a, a, n) == 0 and ngrams.divergence(a, a + 9, n) == pytest.approx(1)


def test_repetition_entropy_and_distinct():
    samples = np.array([[1, 2, 1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5, 6, 7, 8]])
    assert ngrams.repetition(samples) == pytest.approx((3 / 5 + 0) / 2)
    assert ngrams.entropy(samples) == pytest.approx((math.log(2) + math.log(8)) / 2)
    assert ngrams.distinct(samples, 1) == 8 / 16 and ngrams.distinct(samples, 2) == 8 / 14


@pytest.mark.parametrize('n', [1, 2, 3])
def test_ngram_models_say_what_the_text_says(n):
    text = rng.integers(4, size=3000) + np.arange(3000) % 3
    samples = ngrams.from_ngrams(text, n, 400, 40, np.random.default_rng(1))
    real = ngrams.real(text, 400, 40, np.random.default_rng(2))
    known = {tuple(g) for g in ngrams.windows(text[None], n).tolist()}
    assert {tuple(g) for g in ngrams.windows(samples, n).tolist()} <= known
    assert ngrams.divergence(samples, real, n) < 0.02
    if n == 1:
        assert ngrams.divergence(samples, real, 2) > 0.025


def test_spans_are_of_the_text_and_their_order_is_not():
    text = np.arange(500)
    samples = ngrams.shuffled_spans(text, 50, 20, np.random.default_rng(1))
    assert samples.shape == (50, 20)
    steps = np.diff(samples, axis=1) == 1
    assert steps[:, [i for i in range(19) if i % 8 != 7]].all() and not steps[:, 7].all()


def test_the_judges_loss_is_its_cross_entropy_and_its_features_are_averages():
    model = make()
    samples = torch.randint(101, (5, 12))
    features, loss = quality.Judged(model, samples).of(samples, batch_size=2)
    with torch.no_grad():
        _, wanted = model(samples[:, :-1], samples[:, 1:])
        assert np.allclose(features, model.trunk(samples).mean(1).numpy(), atol=1e-5)
    assert loss == pytest.approx(wanted.item(), rel=1e-5)


def test_all_is_described():
    a, b = rng.integers(101, size=(60, 16)), rng.integers(101, size=(60, 16))
    found = quality.describe(a, quality.Judged(make(), b))
    assert set(found) == {'classifier', 'mauve', 'judge_perplexity', 'js_1', 'js_2', 'js_3', 'js_4', 'entropy', 'repetition',
                          'distinct_1', 'distinct_2', 'distinct_3'}
    assert found == quality.describe(a, quality.Judged(make(), b)) and all(map(math.isfinite, found.values()))
