"""
What a comparison still costs: what its logs lack, in hours by the speed of short trials.
"""
from dataclasses import dataclass

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


def foreign(trial, threads=None):
    """Whether the folder of a trial has one with other settings, or of another device, number type or, on a CPU,
    number of threads (None: not known), so that its speed says nothing about these runs."""
    had, device = settings_of(trial.folder), trial.settings['device']
    dtype = pick_dtype(trial.settings['dtype'], pick_device(device))
    if not had:
        return False
    if threads and device == 'cpu' and had['threads'] != threads:
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
    token_equivalents: float = 0.0  # tokens; evaluations count as the tokens of training that take as long
    seconds: float | None = None  # None where no trial tells
    processors: int = 1  # cores or GPUs that train at once

    def add(self, run, evaluation_share):
        """Adds a Run, as far as its log does not have it yet. Its evaluations cost this share of its training."""
        left, attempt = run.iterations_left(), run.settings['seed'] == tuning.SEED
        tokens = left * run.tokens_per_iter
        self.tries += bool(left) and attempt
        self.runs += bool(left) and not attempt
        self.iterations, self.tokens = self.iterations + left, self.tokens + tokens
        self.token_equivalents += tokens * (1 + evaluation_share)

    def take_time(self, trial):
        """The seconds, by the speed of a trial that has ended."""
        had = settings_of(trial.folder)
        self.seconds = self.token_equivalents / speed_of(trial)
        self.processors = had['world_size'] * (had['threads'] if unit_of(had['device']) == 'core' else 1)


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
    timed = {title: here for title, here in remaining.items() if here.seconds is not None}
    count = next((here.processors for here in timed.values() if here.seconds), 1)

    def hours(seconds):
        return f'{seconds / 3600:,.0f}' if seconds >= 36000 else f'{seconds / 3600:.2g}'

    def line(title, here):
        cost = 'not timed' if here.seconds is None else f'{hours(here.seconds * count)} {unit}-hours'
        return f'  {title:<26} runs {here.runs:>3}, tries {here.tries:>3}, tokens {here.tokens:>16,} {cost:>20}'
    sums = {key: sum(getattr(here, key) for here in remaining.values()) for key in ('runs', 'tries', 'tokens')}
    seconds = sum(here.seconds for here in timed.values()) if timed else None
    lines = ['still to be trained:', *(line(*pair) for pair in remaining.items()),
             line('together', Remaining(**sums, seconds=seconds))]
    if timed:
        used = count * jobs
        lines.append(f'about {hours(seconds / jobs)} hours by the clock on {used} {unit}{"s" * (used > 1)}; a batch of '
                     'evaluation during training is taken for a third of one of training')
    if len(timed) < len(remaining):
        lines.append(f'not in the hours: what is not timed, with fewer than {WORTH_A_TRIAL} iterations, or a trial that '
                     'diverged or ran on another device or with other threads')
    return [*lines, 'not included: the start of each command, the evaluation of finished runs, and their samples']
