"""
What a training run needs, by arithmetic: memory, operations, and the bytes that GPUs exchange. No GPU is needed for it, and
none has confirmed it.

A parameter takes STATE_BYTES, or with --sharding=fsdp a share of SHARED_BYTES, and WEIGHT + GRADIENT while it is gathered.
What a forward pass keeps for the backward pass is counted on small models, by autograd's own hooks; it grows with the
tokens, the layers and the channels, and compiled code keeps less.
"""
from dataclasses import dataclass

import torch

from nanodrift.machine import Ranks, autocast

SIZES = {'124M': (12, 12, 768), '355M': (24, 16, 1024), '1.5B': (48, 25, 1600)}  # n_layer, n_head, n_embd of GPT-2
SHARED_BYTES = 4 + 4 + 8  # float32: itself, its gradient, two moments
STATE_BYTES = SHARED_BYTES + 2  # and a copy in 16 bits
WEIGHT, GRADIENT = 4, 4  # of float32, as fsdp gathers and reduces them
H100_FLOPS, SHARE = 989e12, 0.4  # dense bfloat16, as published; the share of it that is taken for granted
MEMORY, WORK = 80e9, 5e9  # bytes of a GPU; of logits and work space on it, taken for granted
NVLINK, NETWORK = 300e9, 40e9  # bytes per second that a GPU sends in one node, and between two nodes, taken for granted
MACHINES = {8: NVLINK, 16: NETWORK}  # GPUs: bytes per second
ALSO = ('heat adaptive', 'diffusion blocks')  # shown besides the first variant of each type: they cost more


class Kept:
    """After `with Kept(model) as kept:`, kept.bytes are those that autograd saved for the backward pass, no parameters."""

    def __init__(self, model):
        self.own, self.seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._see, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)
        self.bytes = sum(map(len, self.seen.values()))

    def _see(self, x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.seen[storage.data_ptr()] = storage  # held, so that no other tensor takes its place
        return x


def kept_bytes(model, batch_size):
    """Bytes that one forward pass over a batch keeps in bfloat16, on a CPU."""
    objective, rng, c = model.objective, torch.Generator().manual_seed(0), model.config
    tokens = torch.randint(c.vocab_size, (batch_size, objective.window(c.block_size)), generator=rng)
    batches = [objective.make_batch(tokens, rng)]
    with autocast(torch.device('cpu'), 'bfloat16'):
        if objective.compute_targets:
            batches = objective.compute_targets(model, batches, Ranks(), rng)
        with Kept(model) as kept:
            model(*batches[0], return_logits=False)
    return kept.bytes


@dataclass
class KeptPerToken:
    """Bytes kept for each token and channel: by a layer, and by the rest of a model."""
    layer: float
    rest: float

    @classmethod
    def of(cls, make, n_embd, block_size):
        """By running small models, make(n_layer). What does not grow with the tokens, such as weights in 16 bits, cancels
        out between two batches."""
        two, four = ((kept_bytes(make(n), 4) - kept_bytes(make(n), 2)) / (2 * block_size * n_embd) for n in (2, 4))
        return cls((four - two) / 2, two - (four - two))

    def bytes(self, c, tokens):
        return (self.layer * c.n_layer + self.rest) * c.n_embd * tokens


@dataclass
class Weights:
    """Numbers of parameters: of all, of one block, and of all blocks. `forward`: forward passes of the blocks in a step."""
    all: int
    block: int
    blocks: int
    forward: int = 1

    def sharded_bytes(self, n):
        """On each of n GPUs with fsdp: its share, embeddings and head gathered, and two blocks, in use and in advance."""
        return SHARED_BYTES * self.all / n + (WEIGHT + GRADIENT) * (self.all - self.blocks + 2 * self.block)

    def sent_bytes(self, n):
        """By each of n GPUs in a step of one micro-batch, with DDP and with fsdp. In a ring each sends (n - 1) / n of what
        is gathered, or reduced and scattered; an all-reduce does both. Blocks are gathered in each pass, forward and back,
        and the rest once for all forward passes and once for the backward pass."""
        gathered = WEIGHT * (2 * self.all + (self.forward - 1) * self.blocks)
        return [(n - 1) / n * total for total in (2 * GRADIENT * self.all, gathered + GRADIENT * self.all)]


def row(weights, encoder_bytes, feature_bytes, flops, kept, c, batch_size):
    """{what: number} of a model: bytes of its encoder, and of the features of a text that all GPUs exchange; the step has
    batch_size texts on each GPU. kept: a KeptPerToken."""
    tokens, kept_by_text = batch_size * c.block_size, kept.bytes(c, c.block_size)
    numbers = {'parameters': weights.all, 'gflop_per_token': flops / 1e9, 'tokens_per_s': SHARE * H100_FLOPS / flops,
               'step_ms': tokens * flops / (SHARE * H100_FLOPS) * 1e3, 'kept_gb': batch_size * kept_by_text / 1e9}
    states = {'ddp': STATE_BYTES * weights.all, **{f'fsdp_{n}': weights.sharded_bytes(n) for n in MACHINES}}
    for name, state in states.items():
        fixed = WORK + encoder_bytes + state  # a frozen encoder has no gradient and no moments, and is whole on every GPU
        numbers |= {f'memory_gb_{name}': (fixed + batch_size * kept_by_text) / 1e9,
                    f'texts_{name}': max(0, int((MEMORY - fixed) / kept_by_text))}
    for n, speed in MACHINES.items():
        numbers[f'features_gb_{n}'] = n * batch_size * feature_bytes / 1e9
        for name, sent in zip(('ddp', 'fsdp'), weights.sent_bytes(n)):
            sent += (n - 1) * batch_size * feature_bytes
            numbers |= {f'sent_gb_{name}_{n}': sent / 1e9, f'sent_ms_{name}_{n}': sent / speed * 1e3}
    return numbers


COLUMNS = ('size', 'type', 'GFLOP', '1,000 tokens/s', 'step, ms', 'kept', 'memory', 'fsdp 8', 'fsdp 16', 'sent, 8',
           'sent, 16', 'sent, fsdp 8', 'sent, fsdp 16')
HEAD = f'| {" | ".join(COLUMNS)} |\n|{" --- |" * len(COLUMNS)}'


def line(size, name, n):
    memory = [f'{n[key]:.0f}' for key in n if key.startswith('memory_gb')]
    sent = [f'{n[f"sent_gb_{way}_{gpus}"]:.1f} ({n[f"sent_ms_{way}_{gpus}"]:.0f})' for way in ('ddp', 'fsdp')
            for gpus in MACHINES]
    return '| ' + ' | '.join((size, f'`{name}`', f'{n["gflop_per_token"]:.2f}', f'{n["tokens_per_s"] / 1e3:.0f}',
                              f'{n["step_ms"]:.0f}', f'{n["kept_gb"]:.1f}', *memory, *sent)) + ' |'


def fits(result):
    """A table of how many texts fit on a GPU, of {size: {name: numbers}}."""
    yield from ('| type | ' + ' | '.join(result) + ' |', '| --- |' + ' --- |' * len(result))
    for name in next(iter(result.values())):
        cells = (' / '.join(str(count) for key, count in rows[name].items() if key.startswith('texts'))
                 for rows in result.values())
        yield f'| `{name}` | ' + ' | '.join(cells) + ' |'
