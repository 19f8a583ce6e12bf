"""
How close samples come to real text, for models that have no likelihood in common: distances of distributions, each to be
read beside its floor (held-out text against other held-out text), and the descriptive numbers that go with them.

The primary one is the accuracy of a two-sample classifier, fixed in advance: 0.5 is perfect, 1 is told apart every time.
Perplexity under a judge is no measure of quality, even beside entropy: samplers without a model in them beat published
ones on it (arXiv 2606.08417). All samples are token ids (N, T) of one length.
"""
import math
import warnings

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from data import derive_seed

FOLDS = 5
MAUVE_SEEDS, MAUVE_SCALE, MAUVE_POINTS = 5, 5.0, 100
SAMPLES_PER_CLUSTER = 10


# ---------------------------------------------------------------------------------------------------------------------
# by way of a judge's features

@torch.no_grad()
def judged(model, samples, batch_size=64):
    """-> features (N, C), a causal model's last hidden states averaged over positions, and its loss on tokens 2 to T."""
    features, losses = [], []
    for ids in torch.as_tensor(samples).split(batch_size):
        ids = ids.to(model.lm_head.weight.device)
        x = model.trunk(ids)
        features.append(x.mean(1).float().cpu())
        log_p = model.head(x[:, :-1]).float().log_softmax(-1)
        losses.append(-log_p.gather(-1, ids[:, 1:, None]).mean((1, 2)).cpu())
    return torch.cat(features).numpy(), float(torch.cat(losses).mean())


def classifier_accuracy(features, reference, seed=0):
    """Accuracy of a logistic regression that tells features (N, C) from reference (M, C), cross-validated; as many of the
    one as of the other."""
    n = min(len(features), len(reference))
    X = np.concatenate((features[:n], reference[:n]))
    y = np.repeat([0, 1], n)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    return float(cross_val_score(model, X, y, cv=StratifiedKFold(FOLDS, shuffle=True, random_state=seed)).mean())


def mauve(features, reference, seed=0):
    """Area under the divergence curve of two histograms over k-means clusters: Pillutla et al., arXiv 2102.01454.

    1 is equal. Mean over k-means seeds; a cluster for every 10 of the fewer samples."""
    both = normalize(np.concatenate((features, reference)))
    both = PCA(n_components=0.9, svd_solver='full').fit_transform(both)
    clusters = max(2, min(len(features), len(reference)) // SAMPLES_PER_CLUSTER)
    areas = []
    for number in range(MAUVE_SEEDS):
        state = derive_seed(seed, number) % 2 ** 31
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # fewer distinct points than clusters: then the clusters are those points
            labels = KMeans(clusters, n_init=1, random_state=state).fit_predict(both)
        p, q = (np.bincount(part, minlength=clusters) / len(part) for part in
                (labels[:len(features)], labels[len(features):]))
        areas.append(area_under_divergences(p, q))
    return float(np.mean(areas))


def area_under_divergences(p, q):
    """The area that mauve is, of two histograms."""
    points = [(0.0, 1.0), (1.0, 0.0)]
    for weight in np.linspace(0, 1, MAUVE_POINTS + 2)[1:-1]:
        mixture = weight * p + (1 - weight) * q
        points.append((math.exp(-MAUVE_SCALE * kl(q, mixture)), math.exp(-MAUVE_SCALE * kl(p, mixture))))
    x, y = np.array(sorted(points, key=lambda point: (point[0], -point[1]))).T
    return float(np.trapezoid(y, x))


def kl(p, q):
    """Kullback-Leibler divergence in nats; q is above 0 wherever p is."""
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())


# ---------------------------------------------------------------------------------------------------------------------
# from the ids alone

def ngrams(samples, n):
    """All n-grams (N * (T-n+1), n) of samples (N, T)."""
    return np.lib.stride_tricks.sliding_window_view(np.asarray(samples), n, axis=1).reshape(-1, n)


def ngram_divergence(samples, reference, n):
    """Jensen-Shannon divergence of the n-grams of two sets of samples, in bits: 0 is equal, 1 is disjoint."""
    mine, theirs = ngrams(samples, n), ngrams(reference, n)
    _, inverse = np.unique(np.concatenate((mine, theirs)), axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    size = inverse.max() + 1
    p = np.bincount(inverse[:len(mine)], minlength=size) / len(mine)
    q = np.bincount(inverse[len(mine):], minlength=size) / len(theirs)
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2 / math.log(2)


def distinct(samples, n):
    """Share of different n-grams among all."""
    found = ngrams(samples, n)
    return len(np.unique(found, axis=0)) / len(found)


def entropy(samples):
    """Entropy of the tokens of one sample, in nats, averaged over samples."""
    found = []
    for row in np.asarray(samples):
        p = np.unique(row, return_counts=True)[1] / len(row)
        found.append(-(p * np.log(p)).sum())
    return float(np.mean(found))


def repetition(samples, n=4):
    """Share of the n-grams of a sample that it had before, averaged over samples."""
    rows = np.asarray(samples)
    return float(np.mean([1 - len(np.unique(ngrams(row[None], n), axis=0)) / (len(row) - n + 1) for row in rows]))


def describe(samples, reference, judge=None, seed=0):
    """{name: number} of samples (N, T) beside reference (M, T); with a judge, a causal model, also what needs features."""
    found = {}
    if judge is not None:
        mine, loss = judged(judge, samples)
        theirs, _ = judged(judge, reference)
        found = {'classifier': classifier_accuracy(mine, theirs, seed), 'mauve': mauve(mine, theirs, seed),
                 'judge_perplexity': math.exp(loss)}
    found |= {f'js_{n}': ngram_divergence(samples, reference, n) for n in (1, 2, 3, 4)}
    found |= {'entropy': entropy(samples), 'repetition': repetition(samples)}
    return found | {f'distinct_{n}': distinct(samples, n) for n in (1, 2, 3)}


# ---------------------------------------------------------------------------------------------------------------------
# what keeps everyone honest

def real(tokens, count, length, rng):
    """Random windows (count, length) of a text's tokens (L,)."""
    starts = rng.integers(len(tokens) - length + 1, size=count)
    return tokens[starts[:, None] + np.arange(length)]


def from_ngrams(tokens, n, count, length, rng):
    """Samples (count, length) of the n-gram model of a text's tokens (L,): each token follows the n-1 before it as it does
    somewhere in the text; where they stand at its very end only, a random one."""
    tokens = np.asarray(tokens, dtype=np.int64)
    if n == 1:
        return tokens[rng.integers(len(tokens), size=(count, length))]
    base = int(tokens.max()) + 1
    weights = base ** np.arange(n - 1)[::-1]
    keys = np.lib.stride_tricks.sliding_window_view(tokens[:-1], n - 1) @ weights
    order = np.argsort(keys, kind='stable')
    keys = keys[order]
    samples = np.empty((count, length), dtype=np.int64)
    samples[:, :n - 1] = real(tokens, count, n - 1, rng)
    for i in range(n - 1, length):
        key = samples[:, i - n + 1:i] @ weights
        first, last = np.searchsorted(keys, key, 'left'), np.searchsorted(keys, key, 'right')
        pick = order[np.minimum(first + (rng.random(count) * (last - first)).astype(np.int64), len(order) - 1)]
        samples[:, i] = np.where(first < last, tokens[pick + n - 1], tokens[rng.integers(len(tokens), size=count)])
    return samples


def shuffled_spans(tokens, count, length, rng, span=8):
    """Samples (count, length) made of spans of the text's tokens from anywhere, one after the other."""
    pieces = real(tokens, count * math.ceil(length / span), span, rng)
    return pieces.reshape(count, -1)[:, :length]
