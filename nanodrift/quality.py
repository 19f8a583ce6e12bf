"""
How close samples are to real text, also for models without a comparable likelihood. Each distance is reported with its
floor: held-out text against other held-out text.

The primary one is the accuracy of a two-sample classifier, fixed in advance: 0.5 is perfect, 1 is told apart every time.
Perplexity under a judge is no measure of quality, even together with entropy: samplers without a model in them beat
published ones on it (arXiv 2606.08417). All samples are token ids (N, T) of one length.
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

from nanodrift import ngrams
from nanodrift.data import derive_seed
from nanodrift.metrics import over_chunks, perplexity, predictions

FOLDS = 5
MAUVE_SEEDS, MAUVE_SCALE, MAUVE_POINTS = 5, 5.0, 100
SAMPLES_PER_CLUSTER = 10
MAUVE_SAMPLES = 50  # with fewer there is none: it would rank n-grams above real text


# ---------------------------------------------------------------------------------------------------------------------
# by way of a judge's features

class Judged:
    """A judge, which is a causal model, and its features of real text (N, T)."""

    def __init__(self, model, reference):
        self.model, self.reference = model, reference
        self.features, _ = self.of(reference)

    @torch.no_grad()
    def of(self, samples, batch_size=64):
        """-> features (N, C) of samples, the last hidden states averaged over positions, and the loss of tokens 2 to T."""
        features, losses = [], 0.0
        for ids in torch.as_tensor(samples).split(batch_size):
            ids = ids.to(self.model.device)
            x = self.model.trunk(ids)
            features.append(x.mean(1).float().cpu())
            losses += float(over_chunks(self.model, x[:, :-1], ids[:, 1:], predictions)['loss'].total)
        return torch.cat(features).numpy(), losses / (len(samples) * (samples.shape[1] - 1))


def classifier_accuracy(features, reference, seed=0):
    """Cross-validated accuracy of a logistic regression that tells features (N, C) from reference (M, C), equally many of
    each."""
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
        points.append((math.exp(-MAUVE_SCALE * ngrams.kl(q, mixture)), math.exp(-MAUVE_SCALE * ngrams.kl(p, mixture))))
    x, y = np.array(sorted(points, key=lambda point: (point[0], -point[1]))).T
    return float(np.trapezoid(y, x))


def describe(samples, judged, seed=0):
    """{name: number} of samples (N, T), compared with the real text of a Judged."""
    features, loss = judged.of(samples)
    numbers = {'classifier': classifier_accuracy(features, judged.features, seed),
               'judge_perplexity': perplexity(loss)}
    if len(samples) >= MAUVE_SAMPLES:
        numbers['mauve'] = mauve(features, judged.features, seed)
    numbers |= {f'js_{n}': ngrams.divergence(samples, judged.reference, n) for n in (1, 2, 3, 4)}
    numbers |= {'entropy': ngrams.entropy(samples), 'repetition': ngrams.repetition(samples)}
    return numbers | {f'distinct_{n}': ngrams.distinct(samples, n) for n in (1, 2, 3)}
