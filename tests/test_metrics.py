"""Metrics against slow versions of them, and how chunks, batches and ranks become one."""
import math
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import make

from nanodrift import kernels
from nanodrift import metrics as metrics_module
from nanodrift.data import Stream, derive_seed
from nanodrift.kernels import IGNORE
from nanodrift.machine import Ranks
from nanodrift.metrics import (
    CALIBRATION_BINS,
    Calibration,
    Mean,
    Rows,
    calibrated_predictions,
    combine,
    over_chunks,
    over_windows,
    predictions,
    summarize,
)


def some_logits(sharpness=2.0):
    """Logits (400, 11) and targets (400,), of which some are right and some do not count."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 11, generator=rng) * sharpness
    targets = torch.randint(11, (400,), generator=rng)
    targets[::7] = logits[::7].argmax(-1)
    targets[::13] = IGNORE
    return logits, targets


# ---------------------------------------------------------------------------------------------------------------------
# means and rows

def test_a_mean_is_over_all_positions_and_not_over_the_means_of_its_parts():
    values, where = torch.arange(12.0).view(3, 4), torch.rand(3, 4) < 0.5
    where[0] = False
    whole = Mean.of(values, where)
    assert whole.value() == pytest.approx(values[where].mean().item()) and whole.count == where.sum()
    parts = Mean.combine([Mean.of(v, w) for v, w in zip(values, where)])
    assert parts.value() == whole.value() != np.mean([Mean.of(v, w).value() for v, w in zip(values[1:], where[1:])])
    assert math.isnan(Mean.of(values[0], where[0]).value())


def test_a_mean_counts_in_float64():
    values = torch.full((20,), 2.0 ** 24)
    values[1::2] = 1.0
    parts = Mean.combine([Mean.of(v, torch.ones(1, dtype=torch.bool)) for v in values.split(1)])
    assert parts.total == 10 * 2 ** 24 + 10 and parts.value() == (2 ** 24 + 1) / 2


def test_rows_are_laid_one_behind_the_other():
    rows = torch.rand(7, 3)
    assert torch.equal(Rows.combine([Rows(part) for part in rows.split([2, 4, 1])]).rows, rows)


def test_a_name_may_be_missing_in_some_parts():
    logits, targets = some_logits()
    one, two = predictions(logits[:50], targets[:50]), calibrated_predictions(logits[50:], targets[50:])
    found = combine([one, two | {'rows': Rows(logits)}])
    assert list(found) == ['loss', 'accuracy', 'calibration', 'rows'] and found['rows'].rows is not None
    whole = predictions(logits, targets)
    assert summarize({name: found[name] for name in whole}) == pytest.approx(summarize(whole))
    assert summarize({'calibration': found['calibration']}) == two['calibration'].value()


# ---------------------------------------------------------------------------------------------------------------------
# calibration

def slow_calibration(logits, targets):
    """One position at a time, in Python floats."""
    rows = []
    for row, target in zip(logits.double(), targets.tolist()):
        if target == IGNORE:
            continue
        p = (row - row.max()).exp()
        p = (p / p.sum()).tolist()
        confidence = max(p)
        brier = sum((q - (v == target)) ** 2 for v, q in enumerate(p))
        rows.append((confidence, float(p.index(confidence) == target), brier, -sum(q * math.log(q) for q in p)))
    n, ece = len(rows), 0.0
    for b in range(CALIBRATION_BINS):
        inside = [r for r in rows if b / CALIBRATION_BINS < r[0] <= (b + 1) / CALIBRATION_BINS]
        if inside:
            ece += abs(sum(r[1] for r in inside) - sum(r[0] for r in inside)) / n
    mean = [sum(r[i] for r in rows) / n for i in range(4)]
    return {'ece': ece, 'confidence': mean[0], 'accuracy': mean[1], 'brier': mean[2], 'entropy': mean[3],
            'overconfidence': mean[0] - mean[1], 'brier_top1': sum((r[0] - r[1]) ** 2 for r in rows) / n,
            'entropy_std': math.sqrt(sum((r[3] - mean[3]) ** 2 for r in rows) / n),
            'entropy_min': min(r[3] for r in rows), 'entropy_max': max(r[3] for r in rows)}


@pytest.mark.parametrize('sharpness', [0.3, 2.0, 6.0])
def test_calibration_is_that_of_a_slow_count(sharpness):
    logits, targets = some_logits(sharpness)
    parts = zip(logits.split(90), targets.split(90))
    found = Calibration.combine([Calibration.of(x, y) for x, y in parts]).value()
    for name, wanted in slow_calibration(logits, targets).items():
        assert found[name] == pytest.approx(wanted, abs=1e-5), name
    assert sum(n for n, _, _ in found['bins']) == (targets != IGNORE).sum()


def test_certainty_and_its_opposite():
    sure = torch.full((4, 3), -1e4)
    sure[:, 1] = 0.0
    right, wrong = torch.tensor([1, 1, 1, 1]), torch.tensor([0, 0, 2, 2])
    assert Calibration.of(sure, right).value()['ece'] == 0
    found = Calibration.of(sure, wrong).value()
    assert found['ece'] == 1 and found['brier'] == 2 and found['overconfidence'] == 1 and found['entropy'] == 0


def test_a_part_without_counted_positions_changes_nothing():
    logits, targets = some_logits()
    whole = Calibration.of(logits, targets)
    parts = [Calibration.of(logits[:5], torch.full((5,), IGNORE)), whole]
    assert Calibration.combine(parts).value() == Calibration.combine(parts[::-1]).value() == whole.value()


def test_names_of_several_calibrations_differ_by_their_suffix():
    logits, targets = some_logits()
    plain, level = Calibration.of(logits, targets), Calibration.of(logits, targets, '_at_20')
    found = summarize(combine([{'calibration': plain, 'calibration_at_20': level}] * 2))
    assert {name for name in found if name.endswith('_at_20')} == {f'{name}_at_20' for name in plain.value()}
    assert len(found) == 2 * len(plain.value()) and found['ece'] == found['ece_at_20'] == plain.value()['ece']


# ---------------------------------------------------------------------------------------------------------------------
# of logits and hidden states

def test_predictions_leave_out_what_does_not_count():
    logits, targets = some_logits()
    found = summarize(calibrated_predictions(logits, targets))
    counted = targets != IGNORE
    assert found['loss'] == pytest.approx(F.cross_entropy(logits[counted].double(), targets[counted]).item(), rel=1e-6)
    assert found['accuracy'] == (logits[counted].argmax(-1) == targets[counted]).double().mean()
    assert found == summarize(predictions(logits, targets)) | Calibration.of(logits, targets).value()


def test_chunks_give_what_all_logits_give(monkeypatch):
    model = make()
    x, targets = torch.randn(3, 7, model.config.n_embd), torch.randint(model.config.vocab_size, (3, 7))
    targets[0, :4] = IGNORE
    sizes = []

    def measured(logits, y):
        sizes.append(len(logits))
        return calibrated_predictions(logits, y)
    with torch.no_grad():
        whole = summarize(over_chunks(model, x, targets, measured))
        monkeypatch.setattr(kernels, 'LOGITS_PER_CHUNK', 5 * model.config.vocab_size + 3)
        chunked = summarize(over_chunks(model, x, targets, measured))
    assert sizes == [21, 5, 5, 5, 5, 1]
    assert chunked.pop('bins') == [pytest.approx(row) for row in whole.pop('bins')] and chunked == pytest.approx(whole)


# ---------------------------------------------------------------------------------------------------------------------
# over windows

class OthersToCome(Exception):
    pass


@dataclass
class InTurn(Ranks):
    """Ranks that run one after the other: only the last one has what all have gathered."""
    gathered: list = field(default_factory=list)

    def gather(self, value):
        self.gathered.append(value)
        if len(self.gathered) < self.world_size:
            raise OthersToCome
        return self.gathered


TOKENS = torch.randint(10, (18, 6), generator=torch.Generator().manual_seed(0))


def noisy_batch(tokens, rng):
    return tokens + torch.rand(tokens.shape, generator=rng), tokens.clone(), None


def distance_from_text(X, Y, W):
    return {'distance': Mean.of(X - Y, Y != IGNORE), 'window': Rows(X.mean(1).double())}


def measure_windows(world_size=1, **options):
    """`over_windows` of TOKENS in batches of 4, the last of which is not full."""
    windows, gathered = SimpleNamespace(read=lambda offsets: TOKENS[offsets]), []
    for rank in range(world_size):
        with suppress(OthersToCome):
            return over_windows(windows, np.arange(len(TOKENS)), 4, noisy_batch, distance_from_text,
                                InTurn(rank, world_size, gathered=gathered), 'float32', **options)


def noise_of(draw):
    """The noise (18, 6) of all windows, as it is drawn for the so-many-th time."""
    seeds = [derive_seed(Stream.EVAL_BATCH, i, *[draw] * bool(draw)) for i in range(5)]
    return torch.cat([torch.rand(chunk.shape, generator=torch.Generator().manual_seed(seed))
                      for chunk, seed in zip(TOKENS.split(4), seeds)])


@pytest.mark.parametrize('options', [{}, {'draws': 3}, {'counted': 2}])
def test_any_number_of_ranks_measures_the_same(options):
    before, one = torch.get_rng_state(), measure_windows(**options)
    for world_size in (2, 3, 7, 16):
        found = measure_windows(world_size, **options)
        assert found['distance'].value() == one['distance'].value()
        assert torch.equal(found['window'].rows, one['window'].rows)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_batch_has_noise_of_its_own_in_the_order_of_the_windows():
    found = measure_windows()
    assert found['distance'].value() == pytest.approx(noise_of(0).mean().item(), rel=1e-5)
    assert torch.allclose(found['window'].rows, (TOKENS + noise_of(0)).mean(1).double())


def test_rows_of_several_draws_are_their_mean_for_each_window():
    found, noise = measure_windows(draws=3), torch.stack([noise_of(draw) for draw in range(3)])
    assert found['distance'].count == noise.numel()
    assert found['distance'].value() == pytest.approx(noise.mean().item(), rel=1e-5)
    assert found['window'].rows.shape == (18,)
    assert torch.allclose(found['window'].rows, (TOKENS + noise).mean(2).mean(0).double())
    assert not torch.allclose(found['window'].rows, measure_windows()['window'].rows)


def test_only_the_end_of_a_window_counts_but_all_of_the_first():
    found, noise = measure_windows(counted=2)['distance'], noise_of(0)
    wanted = torch.cat((noise[0], noise[1:, -2:].flatten()))
    assert found.count == len(wanted) and found.value() == pytest.approx(wanted.mean().item(), rel=1e-5)


def test_the_perplexity_of_a_diverged_model_is_infinite():
    assert metrics_module.perplexity(2.0) == pytest.approx(math.exp(2)) and metrics_module.perplexity(1e5) == math.inf
