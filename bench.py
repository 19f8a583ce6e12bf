"""
Speed and memory of training and of generation, alone or side by side with a nanoGPT checkout.

    python bench.py
    python bench.py --against=../nanoGPT --n_layer=12 --n_head=12 --n_embd=768 --batch_size=4
    python bench.py --against=../nanoGPT --part=loss --steps=300 --data=data/tinystories     do both learn the same?
    python bench.py --part=types --vocab_size=256 --block_size=512                           what do the model types cost?
    python bench.py --part=refine --block_size=64                                            refinement, left to right
    python bench.py --part=plan --batch_size=12                                              what large models need

Both sides get the same sizes, the same initial weights and the same batches, and take turns within one run: on a shared
machine only the ratios of such a run mean anything. nanoGPT runs as its README runs it on this kind of device: eager in
float32 on a CPU, compiled in bfloat16 on a GPU. The last line of stdout is one JSON object.
"""
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from model import GPT, TYPES, Generator, GPTConfig
from nanodrift import drifting, kernels, plan
from nanodrift.data import Windows, derive_seed, load_meta
from nanodrift.machine import DTYPES, autocast, compiler_works, limit_threads, pick_device, pick_dtype
from nanodrift.options import UserError, build, check_options, one_of, option, read_values, run, split_numbers
from nanodrift.variants import first_of_each_type, variants_of

SIZES = {'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'block_size': 256, 'bias': False}  # where the command line is silent


@dataclass
class BenchConfig:
    """What to measure, and how often."""
    against: str = option('', 'path of a nanoGPT checkout to measure side by side')
    part: str = option('speed', "what to measure: 'speed' is 'train' and 'generate'; 'types' trains all variants; "
                       "'refine' generates by diffusion and by gpt2; 'plan' reckons what large models need",
                       ('speed', 'train', 'generate', 'loss', 'types', 'refine', 'plan'))
    max_steps: str = option('8,16,32,64', '--part=refine: steps of refinement, one measurement for each', items=int,
                           at_least=1)
    blocks: int = option(4, '--part=refine: tokens in a block of block diffusion, which takes 1, 2, 4, ... steps for each',
                         at_least=1)
    batch_size: int = option(16, 'examples per training step', at_least=1)
    streams: str = option('1,8', 'how many samples are generated together, one measurement for each', items=int, at_least=1)
    new_tokens: int = option(256, 'tokens generated per stream', at_least=1)
    rounds: int = option(5, 'times that the sides take turns; medians are reported', at_least=1)
    steps: int = option(300, 'training steps of --part=loss', at_least=1)
    data: str = option('', 'folder of a prepared data set for real batches; empty takes random ids')
    seed: int = option(1337, 'of weights and batches')
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = option('auto', 'auto takes the fastest safe one of the device', ('auto', *DTYPES))
    compile: bool = option(True, 'torch.compile, where it works')
    variants: str = option('', "--part=types, plan: which of them, as 'gpt2,heat adaptive'; empty takes all, or for plan "
                           'the first of each type and two more')
    only: str = option('', 'measure the memory of this side alone; bench.py calls itself with it')

    def __post_init__(self):
        check_options(self)


PRODUCTS = 'products alone'
BENCHED = {name: changes for name, changes in variants_of(TYPES).items() if changes.get('model_type') != 'drifting'}


class Side:
    """One of the models compared: how it takes a training step, and how it generates."""

    def __init__(self, name, model, optimizer, step, generate):
        self.name, self.model, self.optimizer, self.step, self.generate = name, model, optimizer, step, generate


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    if device.type == 'mps':
        torch.mps.synchronize()


def update(model, optimizer, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def our_side(config, model_config, device, dtype):
    """This repository's model, stepped as train.py steps it and sampled as sample.py samples it."""
    torch.manual_seed(config.seed)
    model = GPT(model_config).to(device)
    if config.compile and config.part != 'generate' and compiler_works(device):
        model.compile_blocks()
    optimizer = torch.optim.AdamW(model.decay_groups(0.1), lr=1e-3, betas=(0.9, 0.95), fused=device.type != 'mps')

    def step(X, Y):
        with autocast(device, dtype):
            _, loss = model(X, Y, return_logits=False)
        update(model, optimizer, loss)
        return loss

    def generate(prompt, count):
        with autocast(device, dtype):
            for column in model.generate(prompt, count, temperature=0.8, top_k=200):
                column.tolist()  # sample.py looks at every token

    return Side('ours', model, optimizer, step, generate)


def nanogpt_side(config, model_config, device, dtype):
    """A nanoGPT checkout's own model, with the same initial weights."""
    path = os.path.join(config.against, 'model.py')
    if not os.path.isfile(path):
        raise UserError(f'against={config.against!r} is not a nanoGPT checkout: it has no model.py')
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules['nanogpt_model'] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    c = model_config
    model = module.GPT(module.GPTConfig(block_size=c.block_size, vocab_size=kernels.padded_vocab_size(c.vocab_size),
                                        n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, dropout=c.dropout,
                                        bias=c.bias))
    torch.manual_seed(config.seed)
    model.load_state_dict(GPT(c).state_dict())
    model.to(device)
    on_cpu = device.type == 'cpu'
    network = model if on_cpu else torch.compile(model)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)

    def step(X, Y):
        with autocast(device, 'float32' if on_cpu else dtype):
            _, loss = network(X, Y)
        update(model, optimizer, loss)
        return loss

    def generate(prompt, count):
        with autocast(device, 'float32' if on_cpu else dtype):
            model.generate(prompt, count, 0.8, 200)

    return Side('nanoGPT', model, optimizer, step, generate)


def products_side(model, streams, dtype):
    """Only the matrix products of generation, in the form that they have there: reading the weights is what bounds it."""
    device = model.lm_head.weight.device
    with autocast(device, dtype):
        packed = kernels.pack_weights(model, rows=streams)
    linears = [module for module in model.modules() if isinstance(module, kernels.Linear)]
    calls = [(packed.get(linear, linear), torch.randn(streams, 1, linear.in_features, device=device)) for linear in linears]

    def generate(prompt, count):
        with torch.inference_mode(), autocast(device, dtype):
            for _ in range(count):
                for product, x in calls:
                    product(x)

    return Side(PRODUCTS, model, None, None, generate)


def type_side(name, config, model_config, device, dtype):
    """One of BENCHED, stepped on its own objective's batches."""
    side = our_side(config, replace(model_config, **BENCHED[name]), device, dtype)
    model, optimizer = side.model, side.optimizer

    def step(X, Y):
        tokens = torch.cat((X, Y[:, -1:]), dim=1)[:, :model.objective.window(X.size(1))]
        batch = model.objective.make_batch(tokens.cpu(), torch.Generator())
        with autocast(device, dtype):
            _, loss = model(*(t if t is None else t.to(device) for t in batch), return_logits=False)
        update(model, optimizer, loss)

    return Side(name, model, optimizer, step, None)


def batches(config, model_config, device, split='train'):
    """An endless iterator of the X, Y that both sides get."""
    B, T = config.batch_size, model_config.block_size
    windows = None
    if config.data:
        meta = load_meta(config.data)
        if meta['vocab_size'] > model_config.vocab_size:
            raise UserError(f"data={config.data} has more ids: --vocab_size={meta['vocab_size']}")
        windows = Windows(os.path.join(config.data, f'{split}.bin'), meta['dtype'], T + 1, T, 'random', config.seed,
                          vocab_size=meta['vocab_size'])
    number = 0
    while True:
        rng = torch.Generator().manual_seed(derive_seed(config.seed, number))
        if windows:
            tokens = windows.read(windows.offsets(range(number * B, number * B + B)))
        else:
            tokens = torch.randint(model_config.vocab_size, (B, T + 1), generator=rng)
        yield tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device)
        number += 1


def clock(device, function, *arguments):
    """Seconds that a call takes."""
    synchronize(device)
    started = time.perf_counter()
    function(*arguments)
    synchronize(device)
    return time.perf_counter() - started


def peak_flops(device, dtype, rounds=5):
    """Floating-point operations per second of square matrix products: what this machine can do, as it is now."""
    size = 8192 if device.type == 'cuda' else 2048  # a GPU is done with a small one before the clock is read
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[dtype]).unbind(0)
    times = [clock(device, torch.mm, a, b) for _ in range(rounds + 2)][2:]
    return 2 * size ** 3 / statistics.median(times)


def take_turns(sides, rounds, measure):
    """{side name: [seconds of each round]}, the sides one after the other in every round."""
    times = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            times[side.name].append(measure(side))
    return times


def bench_train(config, model_config, sides, device):
    """Milliseconds of a training step (forward, backward, clip, update)."""
    source = batches(config, model_config, device)
    for side in sides:
        for _ in range(3):
            side.step(*next(source))
    drawn = [next(source) for _ in range(config.rounds)]
    turns = {side.name: iter(drawn) for side in sides}
    return take_turns(sides, config.rounds, lambda side: clock(device, side.step, *next(turns[side.name])))


def bench_generate(config, sides, device, streams):
    """Seconds to generate new_tokens for each of so many streams, from a prompt of one token."""
    prompt = torch.zeros(streams, 1, dtype=torch.long, device=device)
    for side in sides:
        side.model.eval()
        side.generate(prompt, 4)
    return take_turns(sides, config.rounds, lambda side: clock(device, side.generate, prompt, config.new_tokens))


def bench_refine(config, model_config, device, dtype, streams):
    """{name: seconds of each round} to fill block_size tokens of so many streams: gpt2 from left to right, and of the same
    size diffusion in so many steps, and block diffusion in so many for each block."""
    torch.manual_seed(config.seed)
    T, N = model_config.block_size, config.blocks
    plain = GPT(model_config).to(device).eval()
    diffusion = GPT(replace(model_config, model_type='diffusion')).to(device).eval()
    in_blocks = GPT(replace(model_config, model_type='diffusion', diffusion_objective='nelbo', diffusion_block=N))
    in_blocks.to(device).eval()
    prompt = torch.zeros(streams, 1, dtype=torch.long, device=device)
    canvas = torch.full((streams, T), model_config.vocab_size, device=device)

    def left_to_right():
        with autocast(device, dtype):
            for column in plain.generate(prompt, T - 1, temperature=0.8, top_k=200):
                column.tolist()

    def refined(model, steps, **options):
        with autocast(device, dtype):
            model.generate_diffusion(canvas, max_steps=steps, **options).tolist()

    ways = {'gpt2': left_to_right}
    ways |= {f'{n} steps': partial(refined, diffusion, n) for n in split_numbers(config.max_steps)}
    ways |= {f'blocks of {N}, {n} steps': partial(refined, in_blocks, n, strategy='random')
             for n in (2 ** i for i in range(N.bit_length()))}
    times = {name: [] for name in ways}
    for number in range(config.rounds + 1):
        for name, way in ways.items():
            seconds = clock(device, way)
            if number:  # the first round only warms up
                times[name].append(seconds)
    return times


def bench_loss(config, model_config, sides, device, held_out=20):
    """{side name: validation loss} after so many steps on the same batches, the rate warmed up over the first tenth."""
    source = batches(config, model_config, device)
    for number in range(config.steps):
        batch = next(source)
        for side in sides:
            for group in side.optimizer.param_groups:
                group['lr'] = 1e-3 * min(1, 10 * (number + 1) / config.steps)
            loss = side.step(*batch).item()
            if (number + 1) % max(1, config.steps // 10) == 0:
                print(f'  step {number + 1}: {side.name} {loss:.4f}', flush=True)
    val = [batch for batch, _ in zip(batches(config, model_config, device, 'val'), range(held_out))]
    losses = {}
    with torch.no_grad():
        for side in sides:
            side.model.eval()
            losses[side.name] = round(sum(side.model(*batch)[1].item() for batch in val) / held_out, 4)
    print('validation loss: ' + ', '.join(f'{name} {loss:.4f}' for name, loss in losses.items()))
    return losses


def report_memory(names, part, device):
    """{side name: MiB that a fresh process with it alone needs at its peak for three training steps, or to generate}."""
    if device.type == 'cuda':
        torch.cuda.empty_cache()  # that process needs the room
    memory = {name: memory_of(name, part, device) for name in names}
    print('  peak memory of a process of its own: ' + ', '.join(f'{name} {mib} MiB' for name, mib in memory.items()))
    return memory


def memory_of(name, part, device):
    words = [sys.executable, *sys.argv, f'--only={name}', f'--part={part}', '--rounds=1']
    words += ['--compile=False'] * (device.type != 'cuda')  # where the compiler's own memory would count
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f'measuring the memory of {name} failed: {done.stderr.strip().splitlines()[-1]}')
    return json.loads(done.stdout.splitlines()[-1])['peak_MiB']


def peak_memory(device):
    """MiB that this process has needed at its peak, on its device; None where the system does not tell."""
    if device.type == 'cuda':
        return round(torch.cuda.max_memory_allocated(device) / 2 ** 20)
    try:
        with open('/proc/self/status', encoding='utf-8') as f:  # getrusage would start from the parent's peak
            return next(int(line.split()[1]) // 1024 for line in f if line.startswith('VmHWM'))
    except OSError:
        return None


def report(title, times, tokens, unit_flops=None, peak=None):
    """Prints a table of one measurement and returns it as a dict."""
    print(f'\n{title}')
    rows = {}
    for name, seconds in times.items():
        median = statistics.median(seconds)
        row = {'ms': round(median * 1e3, 2), 'ms_min': round(min(seconds) * 1e3, 2), 'ms_max': round(max(seconds) * 1e3, 2),
               'tokens_per_s': round(tokens / median, 1)}
        line = f'  {name:<20} {row["ms"]:>10,.1f} ms [{row["ms_min"]:,.1f} to {row["ms_max"]:,.1f}] ' \
               f'{row["tokens_per_s"]:>11,.1f} tokens/s'
        if peak:
            row['of_peak'] = round(unit_flops * tokens / median / peak, 3)
            line += f'  {row["of_peak"]:6.1%} of the matrix-product peak'
        print(line, flush=True)
        rows[name] = row
    if 'gpt2' in times:
        for name, seconds in times.items():
            ratios = [mine / base for mine, base in zip(seconds, times['gpt2'])]
            rows[name]['ratio'] = round(statistics.median(ratios), 3)
            print(f'  {name:<20} takes {rows[name]["ratio"]:.3f} times the time of gpt2 '
                  f'[{min(ratios):.3f} to {max(ratios):.3f}, round by round]', flush=True)
    elif 'nanoGPT' in times:
        ratios = [theirs / ours for ours, theirs in zip(times['ours'], times['nanoGPT'])]
        rows['ratio'] = round(statistics.median(ratios), 2)
        print(f'  ours is {rows["ratio"]:.2f} times as fast [{min(ratios):.2f} to {max(ratios):.2f}, round by round]')
    if PRODUCTS in times:
        shares = [alone / ours for ours, alone in zip(times['ours'], times[PRODUCTS])]
        rows['share_of_products'] = round(statistics.median(shares), 3)
        print(f'  the matrix products are {rows["share_of_products"]:.1%} of the time of ours')
    return rows


def model_of(changes, **sizes):
    """The GPTConfig of a variant, and the GPTConfig of its encoder."""
    encoder = GPTConfig(**sizes)
    c = replace(encoder, **changes, **{'encoder': 'planned'} if changes.get('model_type') == 'drifting' else {})
    return c, encoder if c.has_encoder else None


@cache
def kept_per_token(changes):
    """What a variant keeps, whatever its size; changes: its settings, as pairs."""
    return plan.KeptPerToken.of(partial(small_model, dict(changes)), 64, 64)


def small_model(changes, n_layer):
    """A model of a variant that is run to see what it keeps."""
    c, encoder = model_of(changes, n_layer=n_layer, n_head=1, n_embd=64, block_size=64, vocab_size=128)
    return GPT(c, GPT(encoder).eval() if encoder else None)


def plan_row(changes, size, batch_size):
    """What a variant needs at a size of GPT-2, with steps of so many texts on each GPU."""
    n_layer, n_head, n_embd = plan.SIZES[size]
    c, encoder = model_of(changes, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    encoder_bytes = feature_bytes = 0
    with torch.device('meta'):
        model, frozen = Generator(c) if encoder else GPT(c), GPT(encoder) if encoder else None
    h = model.h if encoder else model.transformer.h
    flops = model.flops_per_token(c, frozen) if encoder else model.flops_per_token()
    if encoder:
        feature_bytes = drifting.exchanged_bytes(frozen, c)
        frozen.shorten_linears(torch.bfloat16)
        encoder_bytes = sum(p.nbytes for p in frozen.parameters())
    total, block, blocks = (sum(p.numel() for p in part.parameters()) for part in (model, h[0], h))
    weights = plan.Weights(total, block, blocks, forward=2 if encoder else 1)  # targets need a pass of their own
    return plan.row(weights, encoder_bytes, feature_bytes, flops, kept_per_token(tuple(changes.items())), c, batch_size)


def report_plan(config):
    """Prints what each type needs at the sizes of GPT-2; returns {size: {type: numbers}}."""
    variants = variants_of(TYPES)
    shown = [name for name in variants if name in (*first_of_each_type(variants), *plan.ALSO)]
    names = config.variants.split(',') if config.variants else shown
    result = {size: {name: plan_row(variants[one_of('variants', name, variants)], size, config.batch_size) for name in names}
              for size in plan.SIZES}
    print(f'texts of {GPTConfig.block_size:,} tokens that fit on a GPU; arithmetic, not run on a GPU\n')
    print(*plan.fits(result), sep='\n')
    print(f'\n{config.batch_size} texts on each GPU in a step; arithmetic, not run on a GPU\n\n{plan.HEAD}')
    print(*(plan.line(size, name, rows[name]) for size, rows in result.items() for name in rows), sep='\n')
    return result


def side_names(config):
    """Which sides take part."""
    if config.part == 'refine':
        return []
    if config.part == 'types':
        return config.variants.split(',') if config.variants else list(BENCHED)
    return ['ours'] + ['nanoGPT'] * bool(config.against)


def make_side(name, config, model_config, device, dtype):
    if config.part == 'types':
        return type_side(one_of('variants', name, BENCHED), config, model_config, device, dtype)
    makers = {'ours': our_side, 'nanoGPT': nanogpt_side}
    return makers[one_of('only', name, makers)](config, model_config, device, dtype)


def measure(config, c, sides, device, dtype, peak):
    """{what: numbers} for one part; c is the GPTConfig of all sides."""
    names, tokens, streams = [side.name for side in sides], config.batch_size * c.block_size, split_numbers(config.streams)
    result = {}
    if config.part == 'loss':
        result['loss'] = bench_loss(config, c, sides, device)
    if config.part == 'types':
        result['types'] = report('training step, in time per token of text', bench_train(config, c, sides, device), tokens)
        result['peak_MiB'] = report_memory(names, 'types', device)
    if config.part == 'refine':
        for n in streams:
            times = bench_refine(config, replace(c, model_type='gpt2'), device, dtype, n)
            result[f'refine_{n}'] = report(f'{c.block_size} tokens for each of {n} stream(s)', times, n * c.block_size)
    if config.part in ('speed', 'train'):
        times = bench_train(config, c, sides, device)
        result['train'] = report('training step', times, tokens, sides[0].model.flops_per_token(), peak)
        result['peak_MiB'] = report_memory(names, 'train', device)
    if config.part in ('speed', 'generate'):
        for n in streams:
            title = f'generation, {n} stream(s) of {config.new_tokens} tokens'
            title += '; the time of ours includes recording its CUDA graph' * (device.type == 'cuda')
            # on a GPU ours is a recorded graph, and products that are started one by one take longer than all of it
            alone = [] if device.type == 'cuda' else [products_side(sides[0].model, n, dtype)]
            times = bench_generate(config, [*sides, *alone], device, n)
            result[f'generate_{n}'] = report(title, times, n * config.new_tokens)
        result['generate_peak_MiB'] = report_memory(names, 'generate', device)
    return result


def main(argv):
    values, _ = read_values(argv, BenchConfig, GPTConfig, description=__doc__)
    config, c = build(SIZES | values, BenchConfig, GPTConfig)
    if config.part == 'plan':
        print(json.dumps(report_plan(config)))
        return
    limit_threads()
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    torch._dynamo.config.recompile_limit = 8 * len(BENCHED)  # all types compile the same code
    names = [config.only] if config.only else side_names(config)
    sides = [make_side(name, config, c, device, dtype) for name in names]
    if config.only:
        if config.part == 'generate':
            bench_generate(config, sides, device, streams=1)
        else:
            bench_train(config, c, sides, device)
        print(json.dumps({'peak_MiB': peak_memory(device)}))
        return
    peak = peak_flops(device, dtype)
    print(f'{c.n_layer} layers x {c.n_head} heads x {c.n_embd}, block {c.block_size}, vocabulary {c.vocab_size}, batch '
          f'{config.batch_size}; {device}, {torch.get_num_threads()} threads, ours in {dtype}; matrix products at '
          f'{peak / 1e9:,.0f} GFLOP/s; torch {torch.__version__}')
    result = {'peak_gflops': round(peak / 1e9, 1), 'dtype': dtype, 'device': str(device)}
    print(json.dumps(result | measure(config, c, sides, device, dtype, peak)))


if __name__ == '__main__':
    run(main)
