"""
The KV cache: keys and values of earlier passes, so that generation computes each position once.

`Attention.attend` asks it for its result by `attend(sdpa, layer, q, k, v)`. sdpa is F.scaled_dot_product_attention with the
dropout and scale of the caller. In comments B is the batch, H the heads, T the positions of a pass, D the width of a head.
"""
import sys
import weakref

import torch
import torch.nn.functional as F

from nanodrift.machine import compute_dtype

RECORDED = ('cuda',)  # devices on which a step is recorded once and then repeated
RECORDED_AFTER = 8  # steps without a record, since many texts end early
RECORDED_FROM = 16  # tokens to go, at least: fewer are written sooner than a step is recorded


class KVCache:
    """
    Keys and values of the positions seen so far, for every layer: two tensors (L, B, H, T_max, D), written in place.

    Each row holds `lengths` positions, an int64 tensor (B,) on the CPU. A pass is prepared by `begin`, writes its T
    positions after those, and `keep` says how many of them stay; the next pass overwrites the others.
    """
    static = False  # passes differ in shape, for each of which blocks would be compiled again

    def __init__(self, model, batch_size, max_len):
        c, weight = model.config, model.lm_head.weight
        shape = (2, c.n_layer, batch_size, c.n_head, max_len, c.n_embd // c.n_head)
        # on CPUs, fused attention with one query is faster in float32 than in bfloat16 (LOG.md)
        dtype = torch.float32 if weight.device.type == 'cpu' else compute_dtype(weight)
        self.k, self.v = torch.zeros(shape, device=weight.device, dtype=dtype).unbind(0)
        self.lengths = torch.zeros(batch_size, dtype=torch.long)
        self.step, self.single_steps = None, 0

    def read(self, model, ids):
        """Reads further tokens (B, T) of all rows, which hold equally many; returns the logits (B, n_logits) of the next."""
        T, held = ids.size(1), int(self.lengths[0])
        self.single_steps += T == 1
        if self.single_steps > RECORDED_AFTER and self.step is None and ids.device.type in RECORDED:
            self.step = Step(model, self) if self.k.size(3) - held >= RECORDED_FROM else None
        if T == 1 and self.step is not None:
            self.rows, logits = None, self.step(ids, held)
        else:
            logits = model.head(model.trunk(ids, self.begin(T))[:, -1])
        self.keep(T)
        return logits

    def begin(self, T, rows=None, visible=None, offsets=None):
        """
        Prepares a pass over T further positions of each row, or of these rows (n,) alone; returns the cache, which then has
        `positions` (1 or B, T), their places in the text.

        visible (1 or B, T, T), bool: which new positions each one sees, besides all held ones; None: those up to itself.
        offsets (T,): how many positions of the text are between the last held one and each new one, 0 to T-1 unless given.
        """
        lengths = self.lengths if rows is None else self.lengths[rows]
        first, last = int(lengths.min()), int(lengths.max())
        offsets = torch.arange(T) if offsets is None else offsets
        self.T, self.end, self.rows, self.reach = T, last + T, rows, last + 1 + int(offsets.max())
        self.rows_there = None if rows is None else rows.to(self.k.device)  # once, not in every layer
        self.start = first if first == last and rows is None else None  # where all rows write, if that is one place
        device = self.k.device
        lengths = (lengths[:1] if first == last else lengths).to(device)[:, None]
        self.positions, self.slots = lengths + offsets.to(device), lengths + torch.arange(T, device=device)
        self.mask = None
        if visible is not None:
            self.mask = self._mask(lengths, visible)
        elif first < last or T > 1 and last > 0:
            # (1 or B, 1, T, end): a position sees the slots up to its own; after these is stale data
            self.mask = (torch.arange(self.end, device=device) <= self.slots[..., None])[:, None]
        return self

    def _mask(self, lengths, visible):
        """(1 or B, 1, T, end): whether a new position sees what is stored at a place, for lengths (1 or B, 1)."""
        place = torch.arange(self.end, device=lengths.device) - lengths  # below 0: held; then the new ones; then stale data
        B, T = max(len(place), len(visible)), self.T
        new = F.pad(visible, (0, 1)).expand(B, T, T + 1)  # the column that is added stands for stale data
        index = place.clamp(0, T)[:, None].expand(B, T, self.end)
        return ((place < 0)[:, None] | new.gather(2, index))[:, None]

    def append(self, layer, k, v):
        """Stores k, v (B, H, T, D) of the new positions; returns those of all positions so far, (B, H, end, D)."""
        k_held, v_held = self.k[layer], self.v[layer]
        if self.start is not None:
            k_held[:, :, self.start:self.end], v_held[:, :, self.start:self.end] = k, v
        else:
            rows = torch.arange(len(k_held), device=k.device) if self.rows is None else self.rows_there
            where = rows[:, None], slice(None), self.slots  # indices in front: (B, T, H, D)
            k_held[where], v_held[where] = k.transpose(1, 2).to(k_held.dtype), v.transpose(1, 2).to(v_held.dtype)
        k_held, v_held = k_held[:, :, :self.end], v_held[:, :, :self.end]
        return (k_held, v_held) if self.rows is None else (k_held[self.rows_there], v_held[self.rows_there])

    def attend(self, sdpa, layer, q, k, v):
        """q, k, v (B, H, T, D) -> (B, H, T, D)."""
        k, v = self.append(layer, k, v)
        with torch.autocast(k.device.type, enabled=False):  # autocast would copy the whole cache into 16 bits
            # a single query sees all that is held, and the first pass fills an empty cache in causal order
            return sdpa(q.to(k.dtype), k, v, attn_mask=self.mask, is_causal=self.mask is None and self.T > 1).to(q.dtype)

    def keep(self, count):
        """The first `count` positions of the last pass stay: a number, or one for each row of the pass (B,)."""
        rows = slice(None) if self.rows is None else self.rows
        self.lengths[rows] += count


class NextToken(KVCache):
    """A pass over one token of each row, whose place is a number on the device: the same work on the same memory, however
    many positions are held. So attention reads all that the cache has room for."""

    def __init__(self, cache, place):
        """place (1,): how many positions each row of the cache holds."""
        self.k, self.v, self.end = cache.k, cache.v, cache.k.size(3)
        self.T, self.rows, self.start, self.reach = 1, None, None, self.end
        self.positions = self.slots = place[None]  # (1, 1)
        self.mask = (torch.arange(self.end, device=place.device) <= place)[None, None, None]  # (1, 1, 1, end)


class Step:
    """
    A step of generation that is the same work on the same memory each time. On a GPU it is recorded as a CUDA graph, which
    starts hundreds of short operations at once; one by one they take longer to start than to run.
    """

    def __init__(self, model, cache):
        # the cache holds this step: it would not be freed when nothing else holds it
        self.model, self.cache, device = model, weakref.proxy(cache), cache.k.device
        self.ids = torch.zeros(len(cache.lengths), 1, dtype=torch.long, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.repeat = None

    def __call__(self, ids, held):
        """ids (B, 1), the next token of each row, which holds so many -> logits (B, n_logits)."""
        self.ids.copy_(ids)
        self.place.fill_(held)
        if ids.device.type != 'cuda':
            self.compute()
        else:
            with torch.cuda.device(ids.device):
                self.repeat = self.repeat or recorded(self.compute)
                self.repeat()
        return self.logits.clone()  # the next step overwrites them

    def compute(self):
        device_type = self.ids.device.type
        # a cached copy of a weight in 16 bits would be freed while the graph still reads it
        with torch.autocast(device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type),
                            cache_enabled=False):
            self.logits = self.model.head(self.model.trunk(self.ids, NextToken(self.cache, self.place))[:, -1])


def recorded(function):
    """`function` recorded as a CUDA graph, or `function` itself if recording fails. It must not wait for the GPU."""
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries allocate and choose at first
            function()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode='thread_local'):
            function()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:
        torch.cuda.set_stream(before)
        print(f'warning: CUDA graphs do not work here, going on without them ({str(e).splitlines()[0]})', file=sys.stderr)
        return function
    return graph.replay
