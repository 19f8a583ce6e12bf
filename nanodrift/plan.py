"""
What a training run needs, by arithmetic: memory, operations, and the bytes that GPUs exchange. No GPU is needed for it, and
none has confirmed it.

A parameter takes STATE_BYTES. What a forward pass keeps for the backward pass is counted on small models, by autograd's own
hooks; it grows with the tokens, the layers and the channels, and compiled code keeps less.
"""
from dataclasses import dataclass

import torch

from nanodrift.machine import Ranks, autocast

SIZES = {'124M': (12, 12, 768), '355M': (24, 16, 1024), '1.5B': (48, 25, 1600)}  # n_layer, n_head, n_embd of GPT-2
STATE_BYTES = 4 + 4 + 8 + 2  # float32: itself, its gradient, two moments; a copy in 16 bits
H100_FLOPS, SHARE = 989e12, 0.4  # dense bfloat16, as published; the share of it that is taken for granted
NVLINK, NETWORK = 300e9, 40e9  # bytes per second that a GPU sends in one node, and between two nodes, taken for granted


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


def row(params, encoder_bytes, flops, kept, c, tokens):
    """{what: number} of a model with so many parameters, an encoder of so many bytes, and a step over so many tokens on each
    GPU."""
    gradients = 4 * params  # float32, all-reduced: each GPU sends them nearly twice
    state = STATE_BYTES * params + encoder_bytes  # a frozen encoder has no gradient and no moments
    return {'parameters': params, 'gflop_per_token': flops / 1e9, 'state_gb': state / 1e9,
            'kept_gb': kept.bytes(c, tokens) / 1e9, 'tokens_per_s': SHARE * H100_FLOPS / flops,
            'step_ms': tokens * flops / (SHARE * H100_FLOPS) * 1e3,
            **{f'exchange_ms_{n}': 2 * (n - 1) / n * gradients / speed * 1e3 for n, speed in ((8, NVLINK), (16, NETWORK))}}


def line(name, numbers):
    n = numbers
    return (f'  {name:<26} {n["parameters"] / 1e6:>8,.0f}M {n["gflop_per_token"]:>9.2f} {n["state_gb"]:>8.1f} '
            f'{n["kept_gb"]:>8.1f} {n["tokens_per_s"]:>10,.0f} {n["step_ms"]:>8.0f} {n["exchange_ms_8"]:>8.1f} '
            f'{n["exchange_ms_16"]:>8.0f}')


HEAD = (f'  {"":<26} {"params":>9} {"GFLOP/tok":>8} {"state GB":>8} {"kept GB":>8} {"tokens/s":>10} {"step ms":>8} '
        f'{"8 GPUs":>8} {"2 nodes":>8}')
