"""
The learning rate of a variant, chosen before it is compared: which rates are tried, and which of them is taken.

A try is a run over a part of the budget. The one with the lowest val_loss at its end decides.
"""
import math

SEED = 1002  # of tries, so that no compared seed plays a part in the choice, and of trials
SHARE = 4  # a try has this part of the budget: a quarter


def ladder(n):
    """n factors of a learning rate, each twice the one before: 1/2, 1, 2. An even n has one more below 1 than above: a rate
    that is too high may be lost altogether, one that is too low is only slow."""
    return [2.0 ** (i - n // 2) for i in range(n)]


def losses_of(tries):
    """{factor: Run} -> {factor: val_loss at its end, infinite where it diverged, None where it has not ended}. Raises
    UserError where a try is of another comparison."""
    return {factor: attempt.last_loss() for factor, attempt in tries.items()}


def best_of(losses):
    """The factor with the lowest loss, the lower one of two equals; None where all diverged, or one has not ended."""
    if None in losses.values():
        return None
    return min((factor for factor in losses if losses[factor] < math.inf), key=lambda n: (losses[n], n), default=None)


def undecided(losses, stderrs):
    """Whether the lead of the best of several losses is less than its standard error. Both: {factor: number}."""
    best, *others = sorted(losses, key=losses.get)
    return bool(others) and losses[others[0]] - losses[best] < math.hypot(stderrs[best], stderrs[others[0]])


def told(tries, losses, measure):
    """What the report says of tries that have ended: `measure` is what their losses are."""
    rates, best = {factor: attempt.settings['learning_rate'] for factor, attempt in tries.items()}, best_of(losses)
    return {'measure': measure, 'learning_rate': rates.get(best), 'at_the_edge': best in (min(losses), max(losses)),
            'undecided': undecided(losses, {factor: attempt.last_stderr() for factor, attempt in tries.items()}),
            'tries': [{'learning_rate': rates[factor], 'val_loss': loss if loss < math.inf else None}
                      for factor, loss in losses.items()]}
