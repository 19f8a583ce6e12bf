"""
What a comparison still costs: what its logs lack, in hours by the speed of short trials.
"""
from dataclasses import dataclass, field

from nanodrift import tuning
from nanodrift.machine import pick_device, pick_dtype
from nanodrift.options import UserError
from nanodrift.runs import median_speed, settings_of

TRIAL = 15  # iterations that tell how fast a variant is: for the estimate, and for a budget in seconds
# a rate of 0 is as fast as any other, and loses no variant that needs its warmup
TRIAL_WORDS = (f'--seed={tuning.SEED}', '--eval_iters=1', f'--eval_interval={TRIAL}', '--log_interval=5', '--warmup_ratio=0',
               '--warmup_iters=0', '--learning_rate=0', '--min_lr=0')
WORTH_A_TRIAL = 60  # iterations: what is shorter is over before an estimate helps
EVALUATION_COST = 1 / 3  # of a batch, compared with a batch of training
HELPERS, TRIES, RUNS = range(3)  # what is trained one after the other: judge and encoder, then the tries, then the runs


def foreign(trial, threads=None):
    """Whether the folder of a trial has one with other settings, or of another device, number type or, on a CPU,
    number of threads (None: not known), so that its speed says nothing about these runs."""
    had, device = settings_of(trial.folder), trial.settings['device']
    dtype = pick_dtype(trial.settings['dtype'], pick_device(device))
    if not had:
        return False
    if threads and device == 'cpu' and had.get('threads') != threads:
        return True
    return bool(trial.differing(had)) or (numbered(had['device']), had['dtype_used']) != (numbered(device), dtype)


def numbered(device):
    """Older folders say 'cuda' for the first GPU."""
    return 'cuda:0' if device == 'cuda' else device


@dataclass
class Remaining:
    """What is still to be trained of a variant, or of the judge or encoder."""
    runs: int = 0
    tries: int = 0
    iterations: int = 0
    tokens: int = 0
    # (of HELPERS, TRIES or RUNS; tokens of one, its evaluations as the tokens of training that take as long)
    parts: list = field(default_factory=list)
    speed: float | None = None  # tokens per second; None where no trial tells
    processors: int = 1  # cores or GPUs that train at once

    def add(self, run, evaluation_share, kind=None):
        """Adds a Run, as far as its log does not have it yet. Its evaluations cost this share of its training."""
        left, attempt = run.iterations_left(), run.settings['seed'] == tuning.SEED
        tokens = left * run.tokens_per_iter
        self.tries += bool(left) and attempt
        self.runs += bool(left) and not attempt
        self.iterations, self.tokens = self.iterations + left, self.tokens + tokens
        self.parts.append(((TRIES if attempt else RUNS) if kind is None else kind, tokens * (1 + evaluation_share)))

    def take_time(self, trial):
        """The speed of a trial that has ended."""
        had = settings_of(trial.folder)
        self.speed = speed_of(trial)
        self.processors = had['world_size'] * (had['threads'] if unit_of(had['device']) == 'core' else 1)

    def seconds(self, *kinds):
        """Those of each part of these kinds."""
        return [tokens / self.speed for kind, tokens in self.parts if kind in kinds]


def seconds_by_the_clock(timed, jobs):
    """For some Remaining, if so many runs train at once: no kind begins before the one before it is done, and a run is never
    faster than alone."""
    of_each = [[s for here in timed for s in here.seconds(kind)] for kind in (HELPERS, TRIES, RUNS)]
    return sum(max(max(seconds), sum(seconds) / jobs) for seconds in of_each if seconds)


def speed_of(trial):
    """Tokens per second of a trial that has ended. Raises UserError where its log is gone."""
    speed = median_speed(trial.log())
    if speed is None:
        raise UserError(f'{trial.folder} does not say how fast it was: remove it, and start again')
    return speed


def unit_of(device):
    return 'core' if device.startswith('cpu') else 'GPU'


def plan_lines(remaining, unit, jobs=1):
    """The plan in words: {variant, or judge or encoder: Remaining}, with its hours if `jobs` runs train at once, each on as
    many cores or GPUs as the first trial had."""
    if not remaining:
        return ['nothing is left to train']
    timed = {title: here for title, here in remaining.items() if here.speed is not None}
    count = next((here.processors for here in timed.values()), 1)
    seconds = {title: sum(here.seconds(HELPERS, TRIES, RUNS)) for title, here in timed.items()}

    def hours(seconds):
        return f'{seconds / 3600:,.0f}' if seconds >= 36000 else f'{seconds / 3600:.2g}'

    def line(title, here, seconds):
        cost = 'not timed' if seconds is None else f'{hours(seconds * count)} {unit}-hours'
        return f'  {title:<26} runs {here.runs:>3}, tries {here.tries:>3}, tokens {here.tokens:>16,} {cost:>20}'
    sums = {key: sum(getattr(here, key) for here in remaining.values()) for key in ('runs', 'tries', 'tokens')}
    lines = ['still to be trained:', *(line(title, here, seconds.get(title)) for title, here in remaining.items()),
             line('together', Remaining(**sums), sum(seconds.values()) if timed else None)]
    if timed:
        used, clock = count * jobs, seconds_by_the_clock(timed.values(), jobs)
        lines.append(f'about {hours(clock)} hours by the clock on {used} {unit}{"s" * (used > 1)}; a batch of evaluation '
                     'during training is taken for a third of one of training')
    if len(timed) < len(remaining):
        lines.append(f'not in the hours: what is not timed, with fewer than {WORTH_A_TRIAL} iterations, or a trial that '
                     'diverged or ran on another device or with other threads')
    slower = ', what runs at the same time lose to each other' * (jobs > 1)
    return [*lines, f'not included: the start of each command{slower}, the evaluation of finished runs, and their samples']
