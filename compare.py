"""
Trains model types on one data set under one budget, several seeds of each, evaluates them all, and writes a report.

    python compare.py                                                    every type, on a CPU
    python compare.py --variants="gpt2,heat,heat adaptive" --tokens=2e6 --seeds=1,2,3
    python compare.py --recipe=config/gpt2_medium/gpt2.py --launch="torchrun --standalone --nproc_per_node=8" \\
        --dataset=wikitext-103 --tokens=1e9

Everything is a command of train.py, printed before it runs; what is finished is not run again, what was cut short is
resumed, so that a comparison that was killed goes on where it stopped. In out_dir: report.html, one page with nothing loaded
from elsewhere; results.json; runs/, a folder for each.

With --tune=N the learning rate of each variant is chosen first, on validation text: of N rates around the recipe's, the one
whose run over a quarter of the budget ends with the lowest val_loss.
"""
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields

import evaluate
from model import TYPES, GPTConfig
from nanodrift import checkpoint, report
from nanodrift.data import Stream, Windows, derive_seed, load_meta
from nanodrift.machine import Ranks, pick_device, pick_dtype
from nanodrift.options import UserError, check_options, configure, one_of, option, read_config_file, run, split_numbers
from nanodrift.quality import FOLDS
from nanodrift.variants import first_of_each_type, variants_of
from train import TrainConfig, read_settings

HERE = os.path.dirname(os.path.abspath(__file__))
JUDGE, ENCODER = 'judge', 'encoder'  # runs of gpt2 that are not compared, but needed
HELPER_SEEDS = {JUDGE: 1000, ENCODER: 1001}  # which no other run has: a twin's judgement would be worth nothing
TUNING_SEED = 1002  # of tries of learning rates, so that no compared seed plays a part in the choice, and of trials
TUNING_SHARE = 4  # a try has this part of the budget: a quarter
TRIAL = 15  # iterations that tell how fast a variant is: for the estimate, and for a budget in seconds
WORTH_A_TRIAL = 60  # iterations: what is shorter is over before an estimate helps
EVALUATION_COST = 1 / 3  # of a batch, compared with a batch of training
EVALUATIONS = 10  # of each run, at least: the points of its curve
VARIANTS = variants_of(TYPES)
SHOWN = 3  # samples of each variant in the report
MAY_DIFFER = ('out_dir', 'init_from', 'encoder', 'vocab_size', 'device', 'overwrite')  # may differ in one run


@dataclass
class CompareConfig:
    """What is compared, under which budget."""
    variants: str = option('', 'separated by commas; empty takes one of each type: '
                           + ', '.join(first_of_each_type(VARIANTS)))
    seeds: str = option('1,2,3', 'a run of each variant for each seed', items=int, at_least=0)
    tokens: float = option(2e6, 'tokens of text that each run trains on', at_least=0)
    seconds: float = option(0.0, 'seconds of training for each run, in place of tokens', at_least=0)
    tune: int = option(0, 'learning rates that are tried for each variant, each on a quarter of the budget: those of the '
                       'recipe, halved and doubled (3 are half, one and twice); 0 takes those of the recipe', at_least=0,
                       at_most=15)
    dataset: str = option('python_bpe1024', 'data set, a folder below data_dir made by prepare.py')
    data_dir: str = option('data', 'where the data sets are')
    recipe: str = option('config/compare/gpt2.py', 'config file of train.py that all variants share')
    launch: str = option('', "what starts train.py in place of python: 'torchrun --standalone --nproc_per_node=8', say")
    samples: int = option(200, 'samples of each run that are judged; 0 judges none')
    length: int = option(64, 'tokens of each sample', at_least=4)
    out_dir: str = option('report', 'folder of the report and of the runs')
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")

    def __post_init__(self):
        check_options(self)
        for name in self.names:
            one_of('variants', name, VARIANTS)
        for key, values in (('variants', self.names), ('seeds', self.numbers)):
            if len(set(values)) < len(values):
                raise UserError(f'{key}={getattr(self, key)}: one is named twice')
        others = HELPER_SEEDS | {'tries': TUNING_SEED}
        taken = [f'{seed} is that of the {name}' for name, seed in others.items() if seed in self.numbers]
        if taken:
            raise UserError(f'seeds={self.seeds}: {" and ".join(taken)}; name others')
        if self.tune == 1:
            raise UserError('tune=1: one try tunes nothing; --tune=3 tries half, one and twice the rate, --tune=0 none')
        if not self.tokens and not self.seconds:
            raise UserError(f'tokens={self.tokens} and seconds={self.seconds}: one of them must be above 0')
        if self.samples and self.samples < 2 * FOLDS:
            raise UserError(f'samples={self.samples} must be at least {2 * FOLDS}, or 0 to judge none')
        self._check_launcher()

    def _check_launcher(self):
        try:
            program = self.launcher[0]
        except ValueError as e:
            raise UserError(f'launch={self.launch!r} is no command line: {e}') from None
        if not shutil.which(program):
            raise UserError(f'launch={self.launch!r}: there is no program {program!r} here')

    @property
    def names(self):
        return [name.strip() for name in self.variants.split(',')] if self.variants else first_of_each_type(VARIANTS)

    @property
    def numbers(self):
        return split_numbers(self.seeds)

    @property
    def launcher(self):
        return shlex.split(self.launch) or [sys.executable]

    @property
    def data(self):
        return os.path.join(self.data_dir, self.dataset)

    @property
    def runs(self):
        return os.path.join(self.out_dir, 'runs')


# ---------------------------------------------------------------------------------------------------------------------
# the plan

@dataclass
class Planned:
    """A run that the comparison needs: the arguments of train.py, except for the length, and the configs that they give."""
    name: str
    variant: str
    folder: str
    words: list
    config: TrainConfig
    model_config: GPTConfig

    @property
    def tokens_per_iter(self):
        return self.config.batch_size * self.config.gradient_accumulation_steps * self.model_config.block_size

    @property
    def helps(self):
        """Whether this is the judge or the encoder, which are not compared."""
        return self.name in HELPER_SEEDS

    def arguments(self, max_iters):
        """All arguments of train.py."""
        return [*self.words, *self.length(max_iters)]

    def length(self, max_iters):
        """Arguments for a run of max_iters iterations. Warmup is kept, but at most a tenth of the run. eval_iters is limited
        so that evaluation takes no longer than training: a batch costs EVALUATION_COST, and is read from both splits."""
        c, often = self.config, max(1, max_iters // EVALUATIONS)
        interval = min(c.eval_interval, often)
        evaluations = max_iters // interval + 1
        limit = max(1, max_iters * c.gradient_accumulation_steps // (evaluations * self.ways_masked))
        asked = self.evaluation_batches(c.eval_iters)
        values = {'num_epochs': 0, 'lr_decay_iters': 0, 'eval_interval': interval,
                  'log_interval': min(c.log_interval, often), 'eval_iters': c.eval_iters if asked <= limit else limit}
        if not c.warmup_ratio:
            per_epoch = self.windows('train').tokens
            warmup = c.warmup_iters or round(c.warmup_epochs * per_epoch / self.tokens_per_iter)
            values |= {'warmup_epochs': 0, 'warmup_iters': min(warmup, max_iters // 10)}
        changed = [f'--{key}={value}' for key, value in values.items() if value != getattr(c, key)]
        return [f'--max_iters={max_iters}', *changed]

    @property
    def ways_masked(self):
        """How many times evaluation reads each row: repair masks it in two ways."""
        return 1 + (self.model_config.model_type == 'diffusion' and self.model_config.diffusion_objective == 'repair')

    def evaluation_batches(self, eval_iters):
        return eval_iters or len(self.windows('val')) // self.config.batch_size + 1

    def evaluation_share(self, max_iters):
        """What the evaluations of a run of max_iters iterations cost, compared with its training."""
        settings, _, _ = read_settings(self.arguments(max_iters))
        batches = 2 * (max_iters // settings.eval_interval + 1) * self.evaluation_batches(settings.eval_iters)
        return EVALUATION_COST * batches * self.ways_masked / (max_iters * settings.gradient_accumulation_steps)

    def windows(self, split):
        """The text of a split as train.py cuts it. Raises UserError where it is too short."""
        c, block_size = self.config, self.model_config.block_size
        folder = os.path.join(c.data_dir, c.dataset)
        return Windows(os.path.join(folder, f'{split}.bin'), load_meta(folder)['dtype'],
                       TYPES[self.model_config.model_type].objective(self.model_config).window(block_size), block_size)


def plan(config):
    """The Planned runs, the judge and the encoder before those that need them, every variant before any has a second seed.
    Raises UserError on what would stop any of them, before hours of work."""
    refines = any(VARIANTS[name].get('model_type') == 'diffusion' for name in config.names)
    device = pick_device(config.device, float64=refines)
    if refines and device.type == 'mps':
        raise UserError('diffusion is refined in float64, which mps has not: use --device=cpu, or leave diffusion out')
    config.device = str(device)
    helpers = [JUDGE] * bool(config.samples) + [ENCODER] * any(needs_encoder(name) for name in config.names)
    runs = [plan_one(config, name, 'gpt2', HELPER_SEEDS[name], name) for name in helpers]
    runs += [plan_one(config, f'{name}, seed {seed}', name, seed, f'{name.replace(" ", "-")}_seed{seed}')
             for seed in config.numbers for name in config.names]
    for run_ in runs:
        block_size = run_.model_config.block_size
        if config.length > block_size:
            raise UserError(f'length={config.length} is more than the {block_size} tokens that {run_.name} reads: lower '
                            '--length')
        for split in ('train', 'val'):
            run_.windows(split)
        if not config.seconds and config.tokens < run_.tokens_per_iter / 2:
            raise UserError(f'tokens={config.tokens:g} are less than one iteration of {run_.name}: '
                            f'--tokens={run_.tokens_per_iter} at least')
        if config.tune and not run_.helps and not run_.config.learning_rate:
            raise UserError(f'tune={config.tune}: {run_.name} has learning_rate=0, which has no half and no double')
    if config.samples:
        wanted = evaluate.EvalConfig(num_samples=config.samples, length=config.length)
        try:
            evaluate.held_out_halves(config.data, load_meta(config.data), wanted)
        except UserError as e:
            raise UserError(str(e).replace('--num_samples', '--samples')) from None
    return runs


def needs_encoder(name):
    return VARIANTS[name].get('model_type') == 'drifting'


def plan_one(config, name, variant, seed, folder, factor=None):
    """A Planned run, at `factor` times the learning rate of its recipe where one is given. If a recipe for all types sets
    options of one type, those of the variant replace them."""
    changes = VARIANTS[variant]
    kind = changes.get('model_type', 'gpt2')
    own = kind in ('diffusion', 'drifting') and config.recipe == CompareConfig.recipe  # these two have a recipe of their own
    recipe = os.path.join(HERE, 'config', 'compare', f'{kind}.py') if own else config.recipe
    values = read_config_file(recipe)
    if values.get('init_from', 'scratch') != 'scratch' or values.get('eval_only'):
        raise UserError(f'recipe={recipe}: a comparison trains from scratch; take one without init_from and eval_only')
    options = {'model_type', *(f.name for f in fields(GPTConfig) if f.metadata['types'])}
    plain = {} if own else {key: getattr(GPTConfig, key) for key in values if key in options}
    if needs_encoder(variant):
        plain |= {'encoder': os.path.join(config.runs, ENCODER)}
        plain |= {key: 0 for key in ('dropout', 'n_inner') if values.get(key)}  # which have no meaning there
    flags = plain | changes | {'dataset': config.dataset, 'data_dir': config.data_dir, 'device': config.device,
                               'seed': seed, 'out_dir': os.path.join(config.runs, folder)}
    if factor is not None:  # min_lr is an absolute rate: it keeps its share, and the schedule its shape
        rates = {key: (values | changes).get(key, getattr(TrainConfig, key)) for key in ('learning_rate', 'min_lr')}
        flags |= {key: factor * rate for key, rate in rates.items() if rate}
    words = [recipe] + [f'--{key}={value}' for key, value in flags.items()]
    train_config, model_config, _ = read_settings(words)
    return Planned(name, variant, flags['out_dir'], words, train_config, model_config)


# ---------------------------------------------------------------------------------------------------------------------
# training

def last_state(folder):
    """The last checkpoint of a run's folder; None where there is none yet."""
    return checkpoint.load_last(folder) if checkpoint.holds_run(folder) else None


def finished(folder, state, max_iters):
    """Whether the run with this last checkpoint, which may be None, has been evaluated after its last iteration. The
    checkpoint records that evaluation only if it was the best; else metrics.jsonl has it."""
    if state is None or state['iter_num'] != max_iters:
        return False
    losses = [entry['val_loss'] for entry in report.read_lines(folder)
              if entry['iter'] == max_iters and entry.get('val_loss') is not None]
    return state['evaluated_iter'] == max_iters or bool(losses) and losses[-1] >= state['best_val_loss']


def differing(had, words):
    """What differs between the settings of a run and those of the run that these words start: 'key=value, not value'."""
    wanted = {key: value for settings in read_settings(words)[:2] for key, value in asdict(settings).items()}
    had = had | {'data_dir': os.path.abspath(had['data_dir'])}
    wanted['data_dir'] = os.path.abspath(wanted['data_dir'])
    return [f'{key}={had[key]}, not {value}' for key, value in wanted.items()
            if key not in MAY_DIFFER and had.get(key, value) != value]


def check_same_settings(folder, state, words):
    """Raises UserError where the checkpoint in a folder, which may be None, is not of the run that these words start."""
    others = differing(state['config'], words) if state is not None else []
    if others:
        raise UserError(f'{folder} holds a run with {"; ".join(others)}: name another folder with --out_dir')


def diverged_before(folder, words):
    """Whether the run that these words start has been here and diverged."""
    return report.divergence(folder) is not None and not differing(report.settings_of(folder), words)


def call(config, words, folder):
    """Runs train.py with these words, passing signals on to it. Returns False if the run in this folder diverged, True after
    success; ends with its exit code if it fails otherwise or was stopped."""
    command, stopped = [*config.launcher, os.path.join(HERE, 'train.py'), *words], []
    earlier = report.divergence(folder)
    print('\n$ ' + shlex.join(command), flush=True)

    def pass_on(number, frame):
        stopped.append(number)
        if child:
            child.terminate() if os.name == 'nt' else child.send_signal(number)  # Windows can send no Ctrl-C
    child, before = None, {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:  # a session of its own: the terminal would send Ctrl-C a second time, which ends train.py without a save
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped and code <= 0:
        code = 128 + stopped[0]
    if code and (stopped or report.divergence(folder) in (None, earlier)):  # torchrun has an exit code of its own
        raise SystemExit(code if code > 0 else 128 - code)
    return code == 0


def trial_folder(config, variant):
    return os.path.join(config.runs, variant.replace(' ', '-') + '-trial')


def speed_of(config, planned, measure=False):
    """Tokens per second of a variant; None where they are not known yet, unless it is to `measure` them, and where even a
    trial diverges.

    The trial is one for all of a variant's runs, so that a budget in seconds is the same for all of its seeds. Its learning
    rate is 0, which is as fast as any other and loses no variant that needs its warmup. As speed does not depend on what an
    encoder has learnt, drifting's is the trial of gpt2."""
    trial = trial_folder(config, planned.variant)
    words = [*planned.words, f'--out_dir={trial}', *planned.length(TRIAL), f'--seed={TUNING_SEED}', '--eval_iters=1',
             f'--eval_interval={TRIAL}', '--log_interval=5', '--warmup_ratio=0', '--warmup_iters=0', '--learning_rate=0',
             '--min_lr=0']
    if not measure and not finished(trial, last_state(trial), TRIAL):
        return None
    if needs_encoder(planned.variant):
        encoder = plan_one(config, ENCODER, 'gpt2', HELPER_SEEDS[ENCODER], ENCODER)
        if not speed_of(config, encoder, measure):
            return None
        words.append(f'--encoder={trial_folder(config, "gpt2")}')
    if not train_one(config, trial, words, TRIAL):
        return None
    return statistics.median(entry['tokens_per_s'] for entry in report.read_lines(trial) if 'tokens_per_s' in entry)


def iterations(config, planned):
    """How many iterations the budget gives to a run; None where it is in seconds and the speed is not known."""
    if not config.seconds:
        return max(1, round(config.tokens / planned.tokens_per_iter))
    speed = speed_of(config, planned)
    return speed and max(1, round(config.seconds * speed / planned.tokens_per_iter))


def train_one(config, folder, words, max_iters):
    """Trains the run that these words start, goes on with it, or leaves it as it is. Returns whether it came to its end:
    False if it diverged, now or before."""
    state = last_state(folder)
    check_same_settings(folder, state, words)
    if finished(folder, state, max_iters):
        return True
    if diverged_before(folder, words):
        return False
    return call(config, words if state is None else ['--init_from=resume', f'--out_dir={folder}'], folder)


def collect(config, planned, max_iters):
    """`report.collect` of a run that was trained for so many iterations."""
    launcher = config.launcher if config.launch else ['python']
    return report.collect(planned.folder, shlex.join([*launcher, 'train.py', *planned.arguments(max_iters)]))


def check_same_runs(config, runs):
    """Raises UserError where a run that is there already is of another comparison."""
    tuned = {}
    for planned in runs:
        max_iters = iterations(config, planned)
        if not max_iters:
            continue
        if config.tune and not planned.helps:
            if planned.variant not in tuned:
                tuned[planned.variant] = known_losses(config, planned.variant, share_of(max_iters))
            losses = tuned[planned.variant]
            if None in losses.values():
                if checkpoint.holds_run(planned.folder):
                    raise UserError(f'{planned.folder} holds a run, and its learning rate is not tuned yet: name another '
                                    'folder with --out_dir')
                continue
            planned = at_rate(config, planned, best_of(losses))
        check_same_settings(planned.folder, last_state(planned.folder), planned.arguments(max_iters))


# ---------------------------------------------------------------------------------------------------------------------
# tuning

def ladder(n):
    """n factors of a learning rate, each twice the one before: 1/2, 1, 2. An even n has one more below 1 than above: a rate
    that is too high may be lost altogether, one that is too low is only slow."""
    return [2.0 ** (i - n // 2) for i in range(n)]


def tries(config, variant):
    """{factor: the Planned run that tries it}"""
    return {factor: plan_one(config, f'{variant}, {factor:g} times the learning rate', variant, TUNING_SEED,
                             f'{variant.replace(" ", "-")}_tune_x{factor:g}', factor) for factor in ladder(config.tune)}


def share_of(max_iters):
    """The iterations of a try, for a run of so many."""
    return max(1, round(max_iters / TUNING_SHARE))


def known_losses(config, variant, max_iters):
    """{factor: val_loss at the end of its try, infinite where it diverged, None where it has not ended}. Raises UserError
    where a try is of another comparison."""
    losses = {}
    for factor, attempt in tries(config, variant).items():
        words, state = attempt.arguments(max_iters), last_state(attempt.folder)
        check_same_settings(attempt.folder, state, words)
        losses[factor] = math.inf if diverged_before(attempt.folder, words) else None
        if finished(attempt.folder, state, max_iters):
            losses[factor] = report.last_loss(attempt.folder)
    return losses


def best_of(losses):
    """The factor with the lowest loss, the lower one of two equals; None where all diverged."""
    best = min(losses, key=lambda factor: (losses[factor], factor))
    return best if losses[best] < math.inf else None


def at_rate(config, planned, factor):
    """This run at so many times its learning rate; as it is where factor is None."""
    if factor is None:
        return planned
    return plan_one(config, planned.name, planned.variant, planned.config.seed, os.path.basename(planned.folder), factor)


def tune(config, variant, max_iters):
    """Trains the tries of a variant -> the best factor, None where all diverged; what the report says of them; the runs."""
    attempts = tries(config, variant)
    for attempt in attempts.values():
        train_one(config, attempt.folder, attempt.arguments(max_iters), max_iters)
    losses = known_losses(config, variant, max_iters)
    best = best_of(losses)
    rates = {factor: attempt.config.learning_rate for factor, attempt in attempts.items()}
    told = {'measure': TYPES[attempt.model_config.model_type].objective(attempt.model_config).val_metric,
            'tries': [{'learning_rate': rates[factor], 'val_loss': loss if loss < math.inf else None}
                      for factor, loss in losses.items()],
            'learning_rate': rates.get(best), 'at_the_edge': best in (min(losses), max(losses))}
    return best, told, [collect(config, attempt, max_iters) for attempt in attempts.values()]


def train_all(config, runs):
    """-> [(Planned, what `report.collect` says of it)]; {variant: what `tune` says}; the names of the runs that diverged.
    Raises UserError where nothing is left to report."""
    trained, tuned, diverged = [], {}, []
    for planned in runs:
        max_iters = iterations(config, planned)
        lost = not max_iters
        if config.tune and not planned.helps and not lost:
            if planned.variant not in tuned:
                tuned[planned.variant] = tune(config, planned.variant, share_of(max_iters))
            factor = tuned[planned.variant][0]
            lost, planned = factor is None, at_rate(config, planned, factor)
        if lost or not train_one(config, planned.folder, planned.arguments(max_iters), max_iters):
            if planned.helps:
                raise UserError(f'the {planned.name} diverged, and others need it: take a recipe with a lower learning_rate')
            diverged.append(planned.name)
        else:
            trained.append((planned, collect(config, planned, max_iters)))
    if all(planned.helps for planned, _ in trained):
        raise UserError('all runs diverged: take a recipe with a lower learning_rate')
    return trained, tuned, diverged


# ---------------------------------------------------------------------------------------------------------------------
# the estimate

@dataclass
class Remaining:
    """What is still to be trained of a variant, or of the judge or encoder."""
    runs: int = 0
    tries: int = 0
    iterations: int = 0
    tokens: int = 0
    steps: float = 0.0  # tokens, and those of training that take as long as the evaluations
    seconds: float | None = None  # None where no trial was worth while

    def add(self, planned, max_iters):
        """Adds a run, as far as its log does not have it yet."""
        entries = report.read_lines(planned.folder) or [{'iter': 0}]
        left = 0 if entries[-1].get('diverged') else max(0, max_iters - entries[-1]['iter'])
        tokens = left * planned.tokens_per_iter
        self.tries += bool(left) and planned.config.seed == TUNING_SEED
        self.runs += bool(left) and planned.config.seed != TUNING_SEED
        self.iterations, self.tokens = self.iterations + left, self.tokens + tokens
        self.steps += tokens * (1 + planned.evaluation_share(max_iters))


def what_remains(config, runs):
    """{variant, or judge or encoder: Remaining}, after trials of those for which an estimate is worth one."""
    groups, remaining = {}, {}
    for planned in runs:
        groups.setdefault(planned.name if planned.helps else planned.variant, []).append(planned)
    for title, group in groups.items():
        if config.seconds:
            speed_of(config, group[0], measure=True)
        max_iters, here = iterations(config, group[0]), Remaining()
        if not max_iters:
            continue
        for attempt in () if group[0].helps else tries(config, title).values():
            here.add(attempt, share_of(max_iters))
        for planned in group:
            here.add(planned, max_iters)
        if here.iterations >= WORTH_A_TRIAL or config.seconds:
            speed = speed_of(config, group[0], measure=True)
            here.seconds = here.steps / speed if speed else None
        if here.iterations:
            remaining[title] = here
    return remaining


def units_of(config, remaining):
    """-> how many cores or GPUs train at once, as the first trial says, and which of the two."""
    unit = 'core' if config.device.startswith('cpu') else 'GPU'
    for title, here in remaining.items():
        if here.seconds:
            run_ = report.settings_of(trial_folder(config, 'gpt2' if title in HELPER_SEEDS else title))
            return run_['world_size'] * (run_['threads'] if unit == 'core' else 1), unit
    return 1, unit


def plan_lines(remaining, count, unit):
    """The plan in words: what remains, and its hours on `count` cores or GPUs at once."""
    if not remaining:
        return ['nothing is left to train']

    def hours(seconds):
        return f'{seconds / 3600:,.0f}' if seconds >= 36000 else f'{seconds / 3600:.2g}'

    def line(title, here):
        cost = 'not timed' if here.seconds is None else f'{hours(here.seconds * count)} {unit}-hours'
        return f'  {title:<26} runs {here.runs:>3}, tries {here.tries:>3}, tokens {here.tokens:>16,} {cost:>20}'
    timed = [here.seconds for here in remaining.values() if here.seconds is not None]
    sums = {key: sum(getattr(here, key) for here in remaining.values()) for key in ('runs', 'tries', 'tokens')}
    lines = ['still to be trained:', *(line(*pair) for pair in remaining.items()),
             line('together', Remaining(**sums, seconds=sum(timed) if timed else None))]
    if timed:
        lines.append(f'about {hours(sum(timed))} hours by the clock on {count} {unit}{"s" * (count > 1)}; a batch of '
                     'evaluation during training is taken for a third of one of training')
    if len(timed) < len(remaining):
        lines.append(f'not timed, and not in the hours: fewer than {WORTH_A_TRIAL} iterations, or a trial that diverged')
    return [*lines, 'not included: the start of each command, the evaluation of finished runs, and their samples']


# ---------------------------------------------------------------------------------------------------------------------
# evaluation

def identity_of(folder):
    """What tells the best checkpoint of a folder from every other."""
    state = checkpoint.load(checkpoint.find(folder))
    return {key: state[key] for key in ('run_id', 'iter_num')}


def evaluate_run(config, planned, reference_rows):
    """{name: number} of one run on validation text and of its samples; some texts. Kept in the run's evaluation.json. No
    more text is evaluated than a run trains on."""
    folder, started = planned.folder, time.perf_counter()
    path, judge = os.path.join(folder, 'evaluation.json'), os.path.join(config.runs, JUDGE)
    meta, tokens = load_meta(config.data), iterations(config, planned) * planned.tokens_per_iter
    windows = 0 if tokens >= meta['splits']['val']['tokens'] else max(1, tokens // planned.model_config.block_size)
    asked = {'samples': config.samples, 'length': config.length, 'checkpoint': identity_of(folder), 'windows': windows,
             'judge': identity_of(judge) if config.samples else None, 'text': meta['splits']['val']['text_sha256']}
    known = read_evaluation(path)
    if known.get('asked') == asked:
        return known
    c = evaluate.EvalConfig(device=config.device, num_samples=max(config.samples, 2 * FOLDS), length=config.length,
                            windows=windows)
    draw_config, alone = evaluate.DrawConfig(), Ranks(device=pick_device(config.device))
    entry = evaluate.load(c, folder, alone.device)
    print(f'{planned.name}: validation text', end='', flush=True)
    likelihood = evaluate.likelihood(c, entry, alone, pick_dtype('auto', alone.device))
    evaluation = {'asked': asked, 'likelihood': likelihood, 'quality': {}}
    if config.samples:
        print(f', {config.samples} samples', end='', flush=True)
        judge = evaluate.load(c, judge, alone.device)
        evaluate.check_judge(c, judge, [entry])
        evaluation['quality'] = evaluate.sample_quality(c, draw_config, [entry], judge, alone)[entry.name]
        evaluation['others'] = reference_rows(c, entry, judge)
    few = evaluate.EvalConfig(num_samples=2 * FOLDS, length=config.length,
                              seed=derive_seed(c.seed, Stream.SHOWN_TEXTS) % 2 ** 31)
    samples, _, _ = evaluate.draw_samples(entry, few, draw_config, [meta['eot']] * few.num_samples, alone)
    texts = [entry.tokenizer.decode(row[int(row[0] == meta['eot']):].tolist()) for row in samples[:SHOWN]]
    seconds = time.perf_counter() - started
    print(f', {seconds:.1f} s', flush=True)
    report.write_whole(path, json.dumps(evaluation | {'texts': texts, 'seconds': seconds}))
    return read_evaluation(path)


def once(function):
    """`function`, which is called the first time only and gives the same ever after."""
    kept = []

    def call(*arguments):
        if not kept:
            kept.append(function(*arguments))
        return kept[0]
    return call


def read_evaluation(path):
    """What an evaluation.json holds; nothing where it is missing or unreadable."""
    try:
        with open(path, encoding='utf-8') as f:
            evaluation = json.load(f)
    except (OSError, ValueError):
        return {}
    return evaluation if isinstance(evaluation, dict) else {}


def main(argv):
    config, _ = configure(argv, CompareConfig, description=__doc__)
    runs = plan(config)
    check_same_runs(config, runs)
    try:
        os.makedirs(config.runs, exist_ok=True)
    except OSError as e:
        raise UserError(f'out_dir={config.out_dir} cannot be made: {e.strerror}') from None
    remaining = what_remains(config, runs)
    print('\n' + '\n'.join(plan_lines(remaining, *units_of(config, remaining))), flush=True)
    started = time.time()
    trained, tuned, diverged = train_all(config, runs)
    print(f'\ntrained, {(time.time() - started) / 60:.1f} minutes; now evaluating', flush=True)
    variants, helpers, reference_rows = {}, [], once(evaluate.reference_quality)
    for planned, run_ in trained:
        if planned.helps:
            helpers.append(run_)
        else:
            evaluation = evaluate_run(config, planned, reference_rows)
            variants.setdefault(planned.variant, []).append(run_ | {'evaluation': evaluation})
    budget = f'{config.seconds:g} seconds' if config.seconds else f'{config.tokens:,.0f} tokens'
    facts = {'command': shlex.join(['python', 'compare.py', *argv]), 'data set': config.dataset, 'seeds': config.seeds,
             'diverged, left out': '; '.join(diverged) or 'none', 'budget': f'{budget} a run',
             'samples of each run': config.samples, 'tokens of each sample': config.length,
             'learning rates tried for each variant': config.tune}
    tuning = {variant: told for variant, (_, told, _) in tuned.items()}
    path, rows = report.write(config.out_dir, facts, variants, helpers, tuning,
                              [run_ for _, _, attempts in tuned.values() for run_ in attempts])
    print(path)
    print(json.dumps(rows))


if __name__ == '__main__':
    run(main)
