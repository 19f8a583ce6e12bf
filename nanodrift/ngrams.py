"""
Statistics of token ids (N, T) alone: n-grams, their divergence, repetition, entropy; and what n-gram models say.
"""
import math

import numpy as np


def kl(p, q):
    """Kullback-Leibler divergence in nats; q is above 0 wherever p is."""
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())


def windows(samples, n):
    """All n-grams (N * (T-n+1), n) of samples (N, T)."""
    return np.lib.stride_tricks.sliding_window_view(np.asarray(samples), n, axis=1).reshape(-1, n)


def divergence(samples, reference, n):
    """Jensen-Shannon divergence of the n-grams of two sets of samples, in bits: 0 is equal, 1 is disjoint."""
    mine, theirs = windows(samples, n), windows(reference, n)
    _, inverse = np.unique(np.concatenate((mine, theirs)), axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    size = inverse.max() + 1
    p = np.bincount(inverse[:len(mine)], minlength=size) / len(mine)
    q = np.bincount(inverse[len(mine):], minlength=size) / len(theirs)
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2 / math.log(2)


def distinct(samples, n):
    """Share of different n-grams among all."""
    all_ngrams = windows(samples, n)
    return len(np.unique(all_ngrams, axis=0)) / len(all_ngrams)


def entropy(samples):
    """Entropy of the tokens of one sample, in nats, averaged over samples."""
    entropies = []
    for row in np.asarray(samples):
        p = np.unique(row, return_counts=True)[1] / len(row)
        entropies.append(-(p * np.log(p)).sum())
    return float(np.mean(entropies))


def repetition(samples, n=4):
    """Share of n-grams that repeat an earlier one of the same sample, averaged over samples."""
    rows = np.asarray(samples)
    return float(np.mean([1 - len(np.unique(windows(row[None], n), axis=0)) / (len(row) - n + 1) for row in rows]))


# ---------------------------------------------------------------------------------------------------------------------
# reference samples

def real(tokens, count, length, rng):
    """Random windows (count, length) of a text's tokens (L,)."""
    starts = rng.integers(len(tokens) - length + 1, size=count)
    return tokens[starts[:, None] + np.arange(length)]


def from_ngrams(tokens, n, count, length, rng):
    """Samples (count, length) of the n-gram model of a text's tokens (L,). Each token is drawn from those that follow the
    same n-1 tokens in the text, or from all tokens if nothing follows them."""
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
