"""nanodrift/tuning.py: which learning rates are tried, and which one is taken. Trainings of tries: test_compare.py."""
import math

from nanodrift import tuning


def test_a_ladder_is_geometric_and_has_the_rate_of_the_recipe():
    assert [tuning.ladder(n) for n in (0, 2, 3, 4)] == [[], [0.5, 1], [0.5, 1, 2], [0.25, 0.5, 1, 2]]


def test_a_lead_within_the_error_of_a_bound_decides_nothing():
    stderrs = {0.5: 0.03, 1.0: 0.03, 2.0: 9.0}
    assert tuning.undecided({0.5: 5.68, 1.0: 5.72, 2.0: 5.75}, stderrs)
    assert not tuning.undecided({0.5: 5.68, 1.0: 5.73, 2.0: 5.75}, stderrs) and not tuning.undecided({1.0: 3.0}, stderrs)
    assert not tuning.undecided({0.5: 3.01, 1.0: 3.0}, {0.5: 0.0, 1.0: 0.0})
    assert not tuning.undecided({0.5: math.inf, 1.0: 3.0}, stderrs)


def test_the_best_try_has_the_lowest_loss():
    assert tuning.best_of({0.5: 3.0, 1.0: 2.0, 2.0: math.inf}) == 1.0
    assert tuning.best_of({0.5: 2.0, 1.0: 2.0}) == 0.5
    assert tuning.best_of({0.5: math.inf, 1.0: math.inf}) is None
    assert tuning.best_of({0.5: 3.0, 1.0: None}) is None and tuning.best_of({}) is None
