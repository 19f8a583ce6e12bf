"""
What a GPU makes of this repository: is it right there, and how fast is it. Run once on a machine with an NVIDIA GPU:

    make gpu                                                # or: python3 -m experiments.gpu_report --against=../nanoGPT

Needs torch, numpy and tqdm, installs nothing, loads nothing, and makes its own data. First every variant of the model types
is compared with the same computation in float32 on the CPU: losses and gradients in each number type, compiled code,
resuming, generation with and without the cache, refinement, drifting. Then bench.py measures training and generation of
GPT-2's size, on a small card with a smaller batch. Whatever fails or takes too long is a row of the report, with its last
words at the end, and the rest goes on.

On a machine without a GPU everything runs in small, on the CPU; tests/test_gpu.py runs the checks one by one.
"""
import faulthandler
import importlib.metadata
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

import prepare
import train
from model import GPT, GPTConfig, load_model
from nanodrift import checkpoint
from nanodrift.machine import DTYPES, Ranks, autocast, exact, pick_device
from nanodrift.options import UserError, check_options, configure, option, run
from nanodrift.variants import VARIANTS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = {'block_size': 32, 'n_layer': 2, 'n_head': 2, 'n_embd': 64}
CASES = VARIANTS | {'token drift': {'model_type': 'diffusion', 'diffusion_objective': 'drift'}}
WITH_ENCODER = ('drifting', 'drifting straight', 'token drift')
# those of which compiled code is compared too: building it takes most of the time
COMPILED = ('gpt2', 'dd', 'heat', 'heat adaptive', 'rotating lr', 'parallel concat', 'duo', 'diffusion', 'diffusion blocks',
            'drifting', 'token drift')
# how far losses and gradients may be from those in float32 on a CPU, relative to these
BANDS = {'float32': 1e-3, 'bfloat16': 0.03, 'float16': 0.01}
NOT_RUN = 'not run: no time left'
CHECK_SECONDS = 90  # for one check
MEASURE_SECONDS = 180  # for one part of bench.py
KEPT_LINES = 20  # of what a failed check or part has said
BENCH = {
    'cuda': ['--n_layer=12', '--n_head=12', '--n_embd=768', '--block_size=1024', '--rounds=10'],
    'cpu': ['--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=32', '--rounds=2', '--new_tokens=8',
            '--vocab_size=300', '--compile=False'],
}
BATCHES = {'cuda': (12, 6, 3, 1), 'cpu': (2, 1)}  # the first one that fits into the memory, for both sides alike


@dataclass
class ReportConfig:
    """Where the report goes, and how long it may take."""
    out: str = option('gpu_report.md', 'the file that is written')
    against: str = option('', 'path of a nanoGPT checkout to measure side by side')
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1'")
    seconds: float = option(570.0, 'after which what is left is not run', above=0)
    checks: str = option('', 'the checks that a worker runs, as JSON; the report starts its workers with it')
    folder: str = option('', 'of a worker: where data and encoder are')

    def __post_init__(self):
        check_options(self)


# ---------------------------------------------------------------------------------------------------------------------
# the checks: (case, device, folder with the data and an encoder) -> {figure: number}; AssertionError where one fails

def build(case, device):
    """A model of a case, with the same weights on every device; none of them is zero, so that gradients reach all."""
    silent = {'diffusion_std': 0.0} if case in ('dd', 'dd diffusion') else {}  # noise is another on every device
    named = {'encoder': 'the one below'} if case in WITH_ENCODER else {}
    torch.manual_seed(1)
    encoder = GPT(GPTConfig(**SMALL, vocab_size=300)).eval() if named else None
    model = GPT(GPTConfig(**SMALL | CASES[case] | silent | named, vocab_size=300), encoder)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    return model.to(device)


def loss_and_gradients(model, device, dtype, scale=1024.0):
    """The loss of one batch, and all gradients in one vector, in float32 on the CPU."""
    objective, rng = model.objective, torch.Generator().manual_seed(2)
    tokens = torch.randint(model.config.vocab_size, (8, objective.window(model.config.block_size)), generator=rng)
    batches = [[t if t is None else t.to(device) for t in objective.make_batch(tokens, rng)]]
    model.zero_grad()
    with autocast(device, dtype):
        if objective.compute_targets:
            batches = objective.compute_targets(model, batches, Ranks(device=device), rng)
        _, loss = model(*batches[0], return_logits=False)
    (loss * scale).backward()  # as the scaler of float16 does
    return loss.item(), torch.cat([p.grad.float().flatten().cpu() for p in model.parameters()]) / scale


def assert_near(mine, reference, band):
    """Both as of `loss_and_gradients`. Returns the relative distance of the gradients."""
    distance = float((mine[1] - reference[1]).norm() / reference[1].norm())
    assert abs(mine[0] - reference[0]) <= band * abs(reference[0]), f'loss {mine[0]:.5f}, not {reference[0]:.5f}'
    assert distance <= band, f'gradients are off by {distance:.2%}'
    return distance


def band(case, dtype):
    """Wider with an encoder: the field is normalised, and so are its errors."""
    return BANDS[dtype] * (10 if case in WITH_ENCODER and dtype != 'float32' else 1)


def check_gradients(case, device, folder):
    reference = loss_and_gradients(build(case, torch.device('cpu')), torch.device('cpu'), 'float32')
    figures = {}
    for dtype in DTYPES:
        with exact(device):  # no TF32
            mine = loss_and_gradients(build(case, device), device, dtype)
        figures[f'gradients off, {dtype}'] = assert_near(mine, reference, band(case, dtype))
    return figures


def check_compiled(case, device, folder):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    figures = {}
    for dtype in ('float32', 'bfloat16'):
        eager, compiled = build(case, device), build(case, device)
        compiled.compile_blocks()
        with exact(device):
            distance = assert_near(loss_and_gradients(compiled, device, dtype), loss_and_gradients(eager, device, dtype),
                                   band(case, dtype))
        figures[f'compiled off, {dtype}'] = distance
    graphs = torch._dynamo.utils.counters['stats']['unique_graphs'] / len(figures)  # of one type of numbers
    # all blocks share one; a generator's and an encoder's have one each with gradients and one without. On GPUs the head too
    most = (4 if case in WITH_ENCODER else 1) + (device.type == 'cuda')
    assert graphs <= most, f'{graphs} graphs were compiled, not {most}'
    return figures | {'graphs': graphs}


def check_writing(case, device, folder):
    """Generation with the cache equals that without; refinement and one-step generation equal those of the CPU."""
    model = build(case, device).eval()
    mask, rows = model.config.vocab_size, 4
    if case.startswith('drifting'):
        def write(model):
            return model.generate_at_once(rows, seed=3)
    elif model.config.model_type == 'diffusion':
        def write(model):
            canvas = torch.full((rows, 24), mask, device=model.device)
            canvas[:, 0] = 1
            return model.generate_diffusion(canvas, max_steps=6, temperature=0.0, strategy='confidence')
    else:
        def write(model, **options):
            prompt = torch.arange(2 * rows, device=model.device).view(rows, 2)
            return torch.stack(list(model.generate(prompt, 24, temperature=0.0, **options)), dim=1)
    with exact(device):
        here, there = write(model), write(build(case, torch.device('cpu')).eval())
        if model.config.causal:
            assert torch.equal(here, write(model, use_cache=False)), 'the cache changes what is generated'
    agree = float((here.cpu() == there).float().mean())
    assert here.device.type == device.type and 0 <= int(here.min()) and int(here.max()) < mask
    assert agree > 0.8, f'{agree:.0%} of the tokens are those of the CPU'
    for dtype in DTYPES:
        with autocast(device, dtype):
            write(model)
    return {'same tokens as the CPU': agree}


def settings(case, device, folder, name, **changes):
    """Arguments of train.py for a short run of a case."""
    out = os.path.join(folder, f'{case} {name}'.replace(' ', '_'))
    encoder = {'encoder': os.path.join(folder, 'encoder')} if case in WITH_ENCODER else {}
    values = SMALL | CASES[case] | encoder | dict(
        dataset='tiny_byte', data_dir=folder, out_dir=out, device=str(device), batch_size=4, eval_iters=1, eval_interval=4,
        max_iters=8, log_interval=1, compile=False, learning_rate=1e-3, dtype='float32', overwrite=True,
        dropout=0.0 if encoder else 0.1) | changes
    return [f'--{key}={value}' for key, value in values.items()], out


def losses(out):
    with open(os.path.join(out, 'metrics.jsonl'), encoding='utf-8') as f:
        return [entry['loss'] for entry in map(json.loads, f) if 'loss' in entry]


def check_resume(case, device, folder):
    """Four steps and four more equal eight; with dropout this needs the device's own random state."""
    straight, whole = settings(case, device, folder, 'straight')
    cut, out = settings(case, device, folder, 'cut', max_iters=4, decay_lr=False)
    assert train.main([*straight, '--decay_lr=False']) == 0 and train.main(cut) == 0
    assert train.main(['--init_from=resume', f'--out_dir={out}', '--max_iters=8']) == 0
    a, b = losses(whole), losses(out)
    worst = max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))
    assert worst < (0.05 if case in WITH_ENCODER else 1e-3), f'losses {a}, resumed {b}'
    load_model(checkpoint.load(checkpoint.find(out, 'last')), device)
    return {'losses off after resuming': worst}


def check_step(case, device, folder):
    """Steps of train.py in both 16-bit types, and how often one waits for the GPU."""
    figures = {}
    for dtype in ('bfloat16', 'float16'):
        argv, _ = settings(case, device, folder, 'step', dtype=dtype, decay_lr=False)
        config, model_config, _ = train.read_settings(argv)
        trainer = train.Trainer(config, model_config, Ranks(device=device))
        before = [p.detach().clone() for p in trainer.model.parameters()]
        for _ in range(2 if dtype == 'bfloat16' else 12):  # the scaler of float16 skips the first ones
            trainer._step()
        after = list(trainer.model.parameters())
        assert all(p.isfinite().all() for p in after), f'weights are not finite after steps in {dtype}'
        assert not all(map(torch.equal, before, after)), f'steps in {dtype} change no weight'
        if device.type == 'cuda':
            places = find_waits(trainer._step)
            figures[f'waits for the GPU, {dtype}'] = len(places)
            # gpt2 reads what came of a step a step late, through pinned memory and an event, which do not count
            assert not places or case != 'gpt2', f'a step in {dtype} waits for the GPU: {", ".join(places)}'
    return figures


def find_waits(function):
    """The lines of code at which a call waits for the GPU."""
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            function()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return [f'{os.path.basename(w.filename)}:{w.lineno}' for w in caught if 'synchronizing' in str(w.message)]


def check_data(case, device, folder):
    """Makes a data set and an encoder for the checks."""
    rng = random.Random(0)
    words = ['drift', 'noise', 'heat', 'token', 'mask', 'the', 'a', 'of', 'and', 'flows', 'learns', 'cools']
    path = os.path.join(folder, 'tiny.txt')
    with open(path, 'w', encoding='utf-8') as f:
        f.write('\n<|endoftext|>\n'.join(' '.join(rng.choices(words, k=60)) + '.' for _ in range(60)))
    prepare.main([f'--input={path}', '--name=tiny', '--tokenizer=byte', '--num_proc=1', f'--data_dir={folder}'])
    argv, _ = settings(case, device, folder, '', out_dir=os.path.join(folder, 'encoder'))
    assert train.main(argv) == 0
    return {}


CHECKS = {'data': check_data, 'gradients': check_gradients, 'writing': check_writing, 'resume': check_resume,
          'step': check_step, 'compiled': check_compiled}


def all_checks():
    return [(check, case) for check in CHECKS for case in {'data': ['gpt2'], 'compiled': COMPILED}.get(check, CASES)]


# ---------------------------------------------------------------------------------------------------------------------
# workers: a process of their own, for a CUDA error breaks all that follows it in its process

def work(checks, device, folder):
    """Runs (check, case) one after the other; a line of JSON each on stdout, which has nothing else."""
    lines = os.fdopen(os.dup(1), 'w', encoding='utf-8')
    os.dup2(2, 1)
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGALRM, all_threads=False, chain=True)  # says where the check is; then the process ends
    for check, case in checks:
        signal.alarm(CHECK_SECONDS)
        started, row = time.perf_counter(), {'check': check, 'case': case}
        try:
            row['figures'] = CHECKS[check](case, device, folder)
        except (Exception, SystemExit) as e:
            row['error'] = f'{type(e).__name__}: {e}'.splitlines()[0][:300]
            row['last_words'] = last_words(traceback.format_exc())
        row['seconds'] = round(time.perf_counter() - started, 1)
        print(json.dumps(row), file=lines, flush=True)
        signal.alarm(0)


def last_words(said):
    """The last lines of what a process said; where its stack was dumped, the innermost call first, those from there on."""
    lines = said.splitlines()
    dumps = [i for i, line in enumerate(lines) if line.endswith('(most recent call first):')]
    start = dumps[-1] - 5 if dumps else len(lines) - KEPT_LINES
    return '\n'.join(lines[max(0, start):][:KEPT_LINES])


def run_python(words, seconds):
    """-> the exit code, None where the time was over; what was printed; what was said on stderr. Whatever the process has
    started ends with it: it would disturb what runs next."""
    with tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as out, \
            tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as err:
        process = subprocess.Popen([sys.executable, '-u', *words], stdout=out, stderr=err, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


def start_worker(device, folder, checks, seconds):
    """-> the rows that a worker has printed; its exit code, None where its time was over; what it said on stderr."""
    code, printed, said = run_python(['-m', 'experiments.gpu_report', f'--checks={json.dumps(checks)}', f'--device={device}',
                                      f'--folder={folder}'], seconds)
    return [json.loads(line) for line in printed.split('\n')[:-1]], code, said


def run_checks(checks, start, deadline):
    """The rows of all checks. start(checks, seconds) as `start_worker`; where a worker ends early, the check that it was at
    has failed, and another worker goes on with the next."""
    rows = []
    while len(rows) < len(checks):
        left, code = deadline - time.monotonic(), None
        if left > 0:
            found, code, said = start(checks[len(rows):], left)
            rows += found
        missing = [{'check': check, 'case': case} for check, case in checks[len(rows):]]
        if code is None:
            return rows + [row | {'error': NOT_RUN} for row in missing]
        if missing:
            why = f'took more than {CHECK_SECONDS} s' if code == -signal.SIGALRM else f'its process ended with code {code}'
            rows.append(missing[0] | {'error': why, 'last_words': last_words(said)})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# the report

def facts(device):
    """{what: value} of this machine."""
    known = {'date': time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime()), 'commit': checkpoint.commit() or 'unknown',
             'python': platform.python_version(), 'torch': torch.__version__, 'CUDA of torch': str(torch.version.cuda),
             'system': platform.platform(), 'CPU cores': str(os.cpu_count())}
    for package in ('numpy', 'triton', 'pytest'):
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            known[package] = 'not there'
    if device.type == 'cuda':
        card = torch.cuda.get_device_properties(device)
        known |= {'card': f'{card.name}, {card.total_memory / 2 ** 30:.0f} GiB, {card.multi_processor_count} processors, '
                  f'capability {card.major}.{card.minor}', 'cards': str(torch.cuda.device_count())}
    else:
        known['card'] = 'none: not run on a GPU'
    return known


def measure(part, config, device, seconds):
    """What bench.py prints for a part, with a smaller batch where memory is short; and why it stops, if it does."""
    end, text = time.monotonic() + seconds, ''
    for batch_size in BATCHES[device.type]:
        words = ['bench.py', f'--part={part}', f'--device={device}', f'--batch_size={batch_size}', *BENCH[device.type]]
        words += [f'--against={os.path.abspath(config.against)}'] * bool(config.against)
        code, printed, said = run_python(words, end - time.monotonic())
        text += printed
        if code == 0:
            break
        why = f'took more than {seconds:.0f} s' if code is None else f'failed with code {code}'
        text += f'--batch_size={batch_size} {why}:\n{last_words(said)}\n'
        if 'not enough memory' not in said:
            break
    return text


def summary(rows):
    late = sum(row.get('error') == NOT_RUN for row in rows)
    failed = sum('error' in row for row in rows) - late
    return f'{len(rows) - failed - late} of {len(rows)} checks passed, {failed} failed, {late} not run'


def write_report(config, known, rows, measured):
    failed = [row for row in rows if 'error' in row]
    lines = ['# What a GPU makes of nanoDrift', '', '| | |', '| --- | --- |', *(f'| {k} | {v} |' for k, v in known.items()),
             '', summary(rows), '', '## Speed', '']
    for part, text in measured.items():
        lines += [f'`bench.py --part={part}`', '', '```', text.strip(), '```', '']
    lines += ['## Checks', '', '| check | variant | outcome | seconds | figures |', '| --- | --- | --- | --- | --- |']
    for row in [*failed, *(row for row in rows if 'error' not in row)]:
        figures = ', '.join(f'{name}: {value:.3g}' for name, value in row.get('figures', {}).items())
        outcome = row.get('error', 'passed').replace('|', '/')
        lines.append(f'| {row["check"]} | {row["case"]} | {outcome} | {row.get("seconds", "")} | {figures} |')
    for row in failed:
        if 'last_words' in row:
            lines += ['', f'## {row["check"]}, {row["case"]}', '', '```', row['last_words'], '```']
    with open(config.out, 'w', encoding='utf-8') as f:
        f.write('\n'.join(lines) + '\n')


def main(argv):
    config = configure(argv, ReportConfig, description=__doc__)[0]
    device = pick_device(config.device)
    if device.type == 'mps':
        raise UserError('this report is about NVIDIA GPUs: use --device=cpu')
    if config.checks:
        work(json.loads(config.checks), device, config.folder)
        return
    end = time.monotonic() + config.seconds
    known, rows, measured = facts(device), [], {}
    print('\n'.join(f'{name}: {value}' for name, value in known.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for part in ('train', 'generate', 'checks'):
            print(f'{part} ...', flush=True)
            if part == 'checks':
                rows = run_checks(all_checks(), partial(start_worker, device, folder), end)
            else:
                measured[part] = measure(part, config, device, max(1, min(MEASURE_SECONDS, end - time.monotonic())))
            write_report(config, known, rows, measured)  # what there is so far
    print(f'{summary(rows)}; {config.out} is written: please send it back')


if __name__ == '__main__':
    run(main)
