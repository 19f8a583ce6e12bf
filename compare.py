"""
Trains model types on one data set under one budget, several seeds of each, evaluates them all, and writes a report.

    python compare.py                                                    every type, on a CPU
    python compare.py --variants="gpt2,heat,heat adaptive" --tokens=2e6 --seeds=1,2,3
    python compare.py --jobs=4                                           four runs at a time, on the GPUs or on the cores
    python compare.py --recipe=config/gpt2_medium/gpt2.py --launch="torchrun --standalone --nproc_per_node=8" \\
        --dataset=wikitext-103 --tokens=1e9

Everything is a command of train.py, printed before it runs; what is finished is not run again, what was cut short is
resumed, so that a comparison that was killed goes on where it stopped. In out_dir: report.html, one page with nothing loaded
from elsewhere; results.json; runs/, a folder for each.

With --tune=N the learning rate of each variant is chosen first, on validation text: of N rates around the recipe's, the one
whose run over a quarter of the budget ends with the lowest val_loss.
"""
import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields

import torch

import evaluate
from model import TYPES, GPTConfig
from nanodrift import checkpoint, costs, report, tuning
from nanodrift.data import Stream, Windows, derive_seed, load_meta, text_hashes
from nanodrift.jobs import call_all, threads_of_each
from nanodrift.machine import Ranks, limit_threads, pick_device, pick_dtype
from nanodrift.options import UserError, check_options, configure, one_of, option, read_config_file, run, split_numbers
from nanodrift.quality import FOLDS
from nanodrift.runs import Run, read_object
from nanodrift.system import cores
from nanodrift.variants import first_of_each_type, variants_of
from train import TrainConfig, read_settings

HERE = os.path.dirname(os.path.abspath(__file__))
JUDGE, ENCODER = 'judge', 'encoder'  # runs of gpt2 that are not compared, but needed
HELPER_SEEDS = {JUDGE: 1000, ENCODER: 1001}  # which no other run has: a twin's judgement would be worth nothing
EVALUATIONS = 10  # of each run, at least: the points of its curve
VARIANTS = variants_of(TYPES)
SHOWN = 3  # samples of each variant in the report


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
    jobs: int = option(1, 'runs that train at once, each on its share of the CPU cores, or on a GPU of its own', at_least=1)
    out_dir: str = option('report', 'folder of the report and of the runs')
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")

    def __post_init__(self):
        check_options(self)
        for name in self.names:
            one_of('variants', name, VARIANTS)
        for key, values in (('variants', self.names), ('seeds', self.numbers)):
            if len(set(values)) < len(values):
                raise UserError(f'{key}={getattr(self, key)}: one is named twice')
        others = HELPER_SEEDS | {'tries': tuning.SEED}
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
        if self.launch and self.jobs > 1:
            raise UserError(f'jobs={self.jobs}: with --launch a run has all GPUs, so one trains at a time; leave --jobs out')

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
class Planned(Run):
    """A run that the comparison needs, whose length is not known yet."""
    name: str
    variant: str
    model_config: GPTConfig

    @property
    def helps(self):
        """Whether this is the judge or the encoder, which are not compared."""
        return self.name in HELPER_SEEDS

    def of_length(self, max_iters):
        """The Run of so many iterations."""
        return run_of([*self.words, *self.length(max_iters)])

    def length(self, max_iters):
        """Arguments for a run of max_iters iterations. Warmup is kept, but at most a tenth of the run. eval_iters is limited
        so that evaluation takes no longer than training: a batch costs a third as much, and is read from both splits."""
        c, often = self.settings, max(1, max_iters // EVALUATIONS)
        interval = min(c['eval_interval'], often)
        evaluations = max_iters // interval + 1
        limit = max(1, max_iters * c['gradient_accumulation_steps'] // (evaluations * self.ways_masked))
        asked = self.evaluation_batches(c['eval_iters'])
        values = {'num_epochs': 0, 'lr_decay_iters': 0, 'eval_interval': interval,
                  'log_interval': min(c['log_interval'], often), 'eval_iters': c['eval_iters'] if asked <= limit else limit}
        if not c['warmup_ratio']:
            per_epoch = self.windows('train').tokens
            warmup = c['warmup_iters'] or round(c['warmup_epochs'] * per_epoch / self.tokens_per_iter)
            values |= {'warmup_epochs': 0, 'warmup_iters': min(warmup, max_iters // 10)}
        changed = [f'--{key}={value}' for key, value in values.items() if value != c[key]]
        return [f'--max_iters={max_iters}', *changed]

    @property
    def ways_masked(self):
        """How many times evaluation reads each row: repair masks it in two ways."""
        return 1 + (self.model_config.model_type == 'diffusion' and self.model_config.diffusion_objective == 'repair')

    def evaluation_batches(self, eval_iters):
        return eval_iters or len(self.windows('val')) // self.settings['batch_size'] + 1

    def evaluation_share(self, run_):
        """What the evaluations of one of its Runs cost, compared with its training."""
        had = run_.settings
        batches = 2 * (run_.max_iters // had['eval_interval'] + 1) * self.evaluation_batches(had['eval_iters'])
        return costs.EVALUATION_COST * batches * self.ways_masked / (run_.max_iters * had['gradient_accumulation_steps'])

    def windows(self, split):
        """The text of a split as train.py cuts it. Raises UserError where it is too short."""
        block_size = self.model_config.block_size
        folder = os.path.join(self.settings['data_dir'], self.settings['dataset'])
        return Windows(os.path.join(folder, f'{split}.bin'), load_meta(folder)['dtype'],
                       TYPES[self.model_config.model_type].objective(self.model_config).window(block_size), block_size)


def run_of(words):
    """The Run that these arguments of train.py start."""
    train_config, model_config, _ = read_settings(words)
    return Run(words, asdict(train_config) | asdict(model_config))


def plan(config):
    """The Planned runs, the judge and the encoder before those that need them, every variant before any has a second seed.
    Raises UserError on what would stop any of them, before hours of work."""
    refines = any(VARIANTS[name].get('model_type') == 'diffusion' for name in config.names)
    device = pick_device(config.device, float64=refines)
    if refines and device.type == 'mps':
        raise UserError('diffusion is refined in float64, which mps has not: use --device=cpu, or leave diffusion out')
    if config.jobs > 1 and ':' in config.device:
        raise UserError(f'jobs={config.jobs}: device={config.device} is one GPU, and each run needs one of its own; '
                        '--device=cuda takes the first ones')
    if device.type == 'cpu' and config.jobs > cores():
        raise UserError(f'jobs={config.jobs}: there are {cores()} CPU cores here; --jobs={cores()}')
    gpus = {'cpu': config.jobs, 'cuda': torch.cuda.device_count()}.get(device.type, 1)
    if config.jobs > gpus:
        raise UserError(f'jobs={config.jobs}: each needs a GPU of its own, and there {"is" if gpus == 1 else "are"} {gpus} '
                        f'here; --jobs={gpus}')
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
        if config.tune and not run_.helps and not run_.settings['learning_rate']:
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
    return Planned(words, asdict(train_config) | asdict(model_config), name, variant, model_config)


# ---------------------------------------------------------------------------------------------------------------------
# training

def call(config, calls):
    """Runs train.py for each of calls, (words, folder) -> whether each came to its end, and did not diverge."""
    return call_all(calls, [*config.launcher, os.path.join(HERE, 'train.py')], config.jobs, config.device)


def foreign(config, trial):
    """`costs.foreign`; how many threads a launcher gives to a run is not known."""
    return costs.foreign(trial, None if config.launch else threads_of_each(config.jobs))


def trial_of(config, planned, measure=False):
    """The Run that tells how fast a variant is; None where it has not ended yet, unless it is to `measure`, and where even a
    trial diverges.

    It is one for all of a variant's runs, so that a budget in seconds is the same for all of its seeds, and stays what it is
    on another device; for the estimate alone it is made anew there. As speed does not depend on what an encoder has learnt,
    drifting's is the trial of gpt2."""
    folder = os.path.join(config.runs, planned.variant.replace(' ', '-') + '-trial')
    words = [*planned.words, f'--out_dir={folder}', *planned.length(costs.TRIAL), *costs.TRIAL_WORDS]
    if needs_encoder(planned.variant):
        encoder = trial_of(config, plan_one(config, ENCODER, 'gpt2', HELPER_SEEDS[ENCODER], ENCODER), measure)
        if not encoder:
            return None
        words.append(f'--encoder={encoder.folder}')
    trial = run_of(words)
    if not measure and not trial.finished(trial.state()):
        return None
    anew = measure and not config.seconds and foreign(config, trial)
    ended, = call(config, [([*words, '--overwrite=True'], folder)]) if anew else train_each(config, [trial])
    return trial if ended else None


def iterations(config, planned):
    """How many iterations the budget gives to a run; None where it is in seconds and the speed is not known."""
    if not config.seconds:
        return max(1, round(config.tokens / planned.tokens_per_iter))
    trial = trial_of(config, planned)
    return trial and max(1, round(config.seconds * costs.speed_of(trial) / planned.tokens_per_iter))


def train_each(config, runs):
    """Trains each Run, goes on with it, or leaves it as it is -> whether each came to its end: False if it diverged, now or
    before."""
    ended, calls = [], []
    for run_ in runs:
        state = run_.state()
        ended.append(True if run_.finished(state) else False if run_.diverged() else None)
        if ended[-1] is None:
            words = run_.words if state is None else [
                '--init_from=resume', f'--out_dir={run_.folder}', f'--device={config.device}']
            calls.append((words, run_.folder))
    called = iter(call(config, calls))
    return [next(called) if done is None else done for done in ended]


def collect(config, run_):
    """`report.collect` of a Run that was trained."""
    launcher = config.launcher if config.launch else ['python']
    return report.collect(run_, shlex.join([*launcher, 'train.py', *run_.words]))


def tries(config, planned, max_iters):
    """{factor: the Run that tries it} for runs of so many iterations; none for judge and encoder."""
    name, share = planned.variant, max(1, round(max_iters / tuning.SHARE))
    folder = name.replace(' ', '-') + '_tune_x'
    return {factor: plan_one(config, name, name, tuning.SEED, f'{folder}{factor:g}', factor).of_length(share)
            for factor in tuning.ladder(0 if planned.helps else config.tune)}


def at_rate(config, planned, factor):
    """This run at so many times its learning rate; as it is where factor is None."""
    seed, folder = planned.settings['seed'], os.path.basename(planned.folder)
    return plan_one(config, planned.name, planned.variant, seed, folder, factor)


def known_runs(config, runs, measure=False):
    """Yields, for the runs of each variant, for judge and for encoder: the name; the first as Planned; the tries, {factor:
    Run}; the losses of these, {factor: val_loss}; and themselves as Runs, at the best rate where that is known already.
    Where the budget is in seconds, only those whose trial has ended, unless it is to `measure`."""
    groups = {}
    for planned in runs:
        groups.setdefault(planned.name if planned.helps else planned.variant, []).append(planned)
    for title, group in groups.items():
        if config.seconds and not trial_of(config, group[0], measure):
            continue
        max_iters = iterations(config, group[0])
        attempts = tries(config, group[0], max_iters)
        losses = tuning.losses_of(attempts)
        tuned = [at_rate(config, planned, tuning.best_of(losses)) for planned in group]
        yield title, group[0], attempts, losses, [planned.of_length(max_iters) for planned in tuned]


def check_same_runs(config, runs):
    """Raises UserError where a run that is there already is of another comparison."""
    for _, _, _, losses, known in known_runs(config, runs):
        for run_ in known:
            if None in losses.values() and checkpoint.holds_run(run_.folder):
                raise UserError(f'{run_.folder} holds a run, and its learning rate is not tuned yet: name another folder '
                                'with --out_dir')
            run_.state()


def what_remains(config, runs):
    """{variant, or judge or encoder: Remaining}, after trials of those for which an estimate is worth one."""
    remaining = {}
    for title, planned, attempts, _, known in known_runs(config, runs, measure=True):
        here = costs.Remaining()
        for run_ in (*attempts.values(), *known):
            here.add(run_, planned.evaluation_share(run_), costs.HELPERS if planned.helps else None)
        worth = config.seconds or here.iterations >= costs.WORTH_A_TRIAL
        if worth and (trial := trial_of(config, planned, measure=True)) and not foreign(config, trial):
            here.take_time(trial)
        if here.iterations:
            remaining[title] = here
    return remaining


def train_all(config, runs):
    """Trains judge and encoder, then the tries of every variant, then the runs -> [(Planned, what `report.collect` says of
    it)]; {variant: what the report says of its tries}; what `collect` says of these; the names of the runs that diverged.
    Raises UserError where nothing is left to report."""
    lengths = {planned.name: iterations(config, planned) for planned in runs}
    able = [planned for planned in runs if lengths[planned.name]]  # the trial of the others diverged

    def train(group):
        ended = train_each(config, [planned.of_length(lengths[planned.name]) for planned in group])
        return [planned for planned, done in zip(group, ended) if done]
    trained = train([planned for planned in able if planned.helps])
    for planned in runs:
        if planned.helps and planned not in trained:
            raise UserError(f'the {planned.name} diverged, and others need it: take a recipe with a lower learning_rate')
    compared = [planned for planned in able if not planned.helps]
    attempts = {planned.variant: tries(config, planned, lengths[planned.name]) for planned in compared if config.tune}
    train_each(config, [attempt for of_one in attempts.values() for attempt in of_one.values()])
    losses = {variant: tuning.losses_of(of_one) for variant, of_one in attempts.items()}
    best = {variant: tuning.best_of(of_one) for variant, of_one in losses.items()}
    lost = {variant for variant, factor in best.items() if factor is None}  # all of its tries diverged
    trained += train([at_rate(config, planned, best.get(planned.variant)) for planned in compared
                      if planned.variant not in lost])
    names = {planned.name for planned in trained}
    if all(planned.helps for planned in trained):
        raise UserError('all runs diverged: take a recipe with a lower learning_rate')
    measures = {planned.variant: TYPES[planned.model_config.model_type].objective(planned.model_config).val_metric
                for planned in compared}
    return ([(planned, collect(config, planned.of_length(lengths[planned.name]))) for planned in trained],
            {variant: tuning.told(of_one, losses[variant], measures[variant]) for variant, of_one in attempts.items()},
            [collect(config, attempt) for of_one in attempts.values() for attempt in of_one.values()],
            [planned.name for planned in runs if planned.name not in names])


# ---------------------------------------------------------------------------------------------------------------------
# evaluation

def identity_of(folder):
    """What tells the best checkpoint of a folder from every other."""
    state = checkpoint.load(checkpoint.find(folder))
    return {key: state[key] for key in ('run_id', 'iter_num')}


def evaluate_run(config, planned, tokens, others):
    """{name: number} of one run on at most `tokens` tokens of validation text, and of its samples; some texts. Kept in the
    run's evaluation.json. `others`, of real text and n-gram models, are the same for all runs: the first one that needs
    them fills them in."""
    folder, started = planned.folder, time.perf_counter()
    path, judge = os.path.join(folder, 'evaluation.json'), os.path.join(config.runs, JUDGE)
    meta, device = load_meta(config.data), pick_device(config.device)
    dtype = pick_dtype(planned.settings['dtype'], device)
    windows = 0 if tokens >= meta['splits']['val']['tokens'] else max(1, tokens // planned.model_config.block_size)
    asked = {'samples': config.samples, 'length': config.length, 'checkpoint': identity_of(folder), 'windows': windows,
             'judge': identity_of(judge) if config.samples else None, 'text': text_hashes(meta), 'dtype': dtype}
    known = read_object(path)
    if known.get('asked') == asked:
        return known
    c = evaluate.EvalConfig(device=config.device, num_samples=max(config.samples, 2 * FOLDS), length=config.length,
                            windows=windows)
    draw_config, alone = evaluate.DrawConfig(), Ranks(device=device)
    entry = evaluate.load(c, folder, alone.device)
    print(f'{planned.name}: validation text', end='', flush=True)
    evaluation = {'asked': asked, 'likelihood': evaluate.likelihood(c, entry, alone, dtype), 'quality': {}}
    if config.samples:
        print(f', {config.samples} samples', end='', flush=True)
        judge = evaluate.load(c, judge, alone.device)
        evaluate.check_judge(c, judge, [entry])
        evaluation['quality'] = evaluate.sample_quality(c, draw_config, [entry], judge, alone)[entry.name]
        if not others:
            others |= evaluate.reference_quality(c, entry, judge)
        evaluation['others'] = others
    few = evaluate.EvalConfig(num_samples=2 * FOLDS, length=config.length,
                              seed=derive_seed(c.seed, Stream.SHOWN_TEXTS) % 2 ** 31)
    samples, _, _ = evaluate.draw_samples(entry, few, draw_config, [meta['eot']] * few.num_samples, alone)
    texts = [entry.tokenizer.decode(row[int(row[0] == meta['eot']):].tolist()) for row in samples[:SHOWN]]
    seconds = time.perf_counter() - started
    print(f', {seconds:.1f} s', flush=True)
    report.write_whole(path, json.dumps(evaluation | {'texts': texts, 'seconds': seconds}))
    return read_object(path)


def main(argv):
    config, _ = configure(argv, CompareConfig, description=__doc__)
    limit_threads()
    runs = plan(config)
    check_same_runs(config, runs)
    try:
        os.makedirs(config.runs, exist_ok=True)
    except OSError as e:
        raise UserError(f'out_dir={config.out_dir} cannot be made: {e.strerror}') from None
    remaining = what_remains(config, runs)
    print('\n' + '\n'.join(costs.plan_lines(remaining, costs.unit_of(config.device), config.jobs)), flush=True)
    started = time.time()
    trained, tuned, attempts, diverged = train_all(config, runs)
    print(f'\ntrained, {(time.time() - started) / 60:.1f} minutes; now evaluating', flush=True)
    variants, helpers, others = {}, [], {}
    # validation text for all runs: as much as the shortest one trained on, since losses on different text do not compare
    tokens = min((iterations(config, planned) * planned.tokens_per_iter for planned, _ in trained if not planned.helps),
                 default=0)
    for planned, run_ in trained:
        if planned.helps:
            helpers.append(run_)
        else:
            evaluation = evaluate_run(config, planned, tokens, others)
            variants.setdefault(planned.variant, []).append(run_ | {'evaluation': evaluation})
    budget = f'{config.seconds:g} seconds' if config.seconds else f'{config.tokens:,.0f} tokens'
    facts = {'command': shlex.join(['python', 'compare.py', *argv]), 'data set': config.dataset, 'seeds': config.seeds,
             'diverged, left out': '; '.join(diverged) or 'none', 'budget': f'{budget} a run',
             'samples of each run': config.samples, 'tokens of each sample': config.length,
             'learning rates tried for each variant': config.tune}
    path, rows = report.write(config.out_dir, facts, variants, helpers, tuned, attempts)
    print(path)
    print(json.dumps(rows))


if __name__ == '__main__':
    run(main)
