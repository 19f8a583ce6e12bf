"""
Block diffusion: blocks of N tokens from left to right, masked diffusion inside each (Arriola et al., arXiv 2503.09573).

In training one pass has two streams, clean tokens and noisy slots in blocks. Of T tokens there are two layouts:

as published          a block is its N noisy tokens, which see each other and the clean tokens of the blocks before; each
                      predicts itself. Clean tokens see their own block and those before.
diffusion_shift=True  a block is N+1 slots, the clean token before it and its N noisy ones; slot j predicts token j+1, as in
                      gpt2, and so the last slot predicts nothing: it is only seen, once it is not [MASK]. Clean tokens see
                      those before them, as in gpt2. The first token of the text is given.

In generation the clean tokens are in a KVCache. In comments B is the batch, T the tokens, N = diffusion_block, S the slots
of a block (N, or N+1), C the width.
"""
from functools import lru_cache

import torch
import torch.nn.functional as F

from nanodrift import kernels
from nanodrift.kv_cache import KVCache
from nanodrift.options import UserError
from nanodrift.refinement import Canvas, Step, refine_canvas

SLOTS_PER_CHUNK = 256  # that attend together: their mask is a short matrix, however long the text is


class Streams:
    """
    Which of `clean` tokens and, behind them, slots in blocks of S sees which, in one pass.

    A slot sees the slots of its block and the clean tokens before the first position of its block. A clean token sees those
    before it and, with clean_block = N, those of its own block of N. Nothing clean sees anything noisy.

    first: the first position of each block, rising; slot i of a block stands at that position + i. Attention runs over whole
    blocks, SLOTS_PER_CHUNK slots or more at a time, so that memory grows with the length of the text and not with its
    square.
    """
    static = True  # all passes have one shape

    def __init__(self, clean, first, S, clean_block, device):
        slots = torch.tensor(first, device=device)[:, None] + torch.arange(S, device=device)
        self.clean, self.end = clean, first[-1] + S
        self.positions = torch.cat((torch.arange(clean, device=device), slots.flatten()))[None]
        self.clean_chunks, self.noisy_chunks = [], []  # (rows, how many clean tokens they may see, mask)
        size = clean_block * max(1, SLOTS_PER_CHUNK // clean_block)
        for start in range(0, clean if clean_block > 1 else 0, size):
            end = min(start + size, clean)
            block = torch.arange(end, device=device) // clean_block
            self.clean_chunks.append((slice(start, end), end, block <= block[start:, None]))
        size = max(1, SLOTS_PER_CHUNK // S)
        for start in range(0, len(first), size):
            chunk = torch.tensor(first[start:start + size], device=device).repeat_interleave(S)
            seen = min(int(chunk[-1]), clean)
            mask = torch.cat((torch.arange(seen, device=device) < chunk[:, None], chunk == chunk[:, None]), dim=1)
            self.noisy_chunks.append((slice(start * S, start * S + len(chunk)), seen, mask))

    def hiding(self, hidden):
        """The same, but for slots (B, n * S) that no position sees."""
        other = object.__new__(Streams)
        other.__dict__.update(self.__dict__)
        other.noisy_chunks = [(rows, seen, mask & ~F.pad(hidden[:, None, None, rows], (seen, 0)))
                              for rows, seen, mask in self.noisy_chunks]
        return other

    def attend(self, sdpa, layer, q, k, v):
        """q, k, v (B, H, clean + n * S, D) -> the same shape."""
        (q, q_noisy), (k, k_noisy), (v, v_noisy) = ((x[:, :, :self.clean], x[:, :, self.clean:]) for x in (q, k, v))
        y = [sdpa(q[:, :, rows], k[:, :, :end], v[:, :, :end], attn_mask=mask) for rows, end, mask in self.clean_chunks]
        if not y and self.clean:
            y = [sdpa(q, k, v, is_causal=True)]
        for rows, seen, mask in self.noisy_chunks:
            keys, values = (torch.cat((clean[:, :, :seen], noisy[:, :, rows]), dim=2)
                            for clean, noisy in ((k, k_noisy), (v, v_noisy)))
            y.append(sdpa(q_noisy[:, :, rows], keys, values, attn_mask=mask))
        return torch.cat(y, dim=2)


@lru_cache(maxsize=8)
def streams_of(clean, T, N, shift, device):
    """The Streams of T tokens in blocks of N."""
    return Streams(clean, range(0, T, N), N + shift, 1 if shift else N, device)


def positions_in_training(c):
    """How many positions a pass over block_size tokens has."""
    T, N = c.block_size, c.diffusion_block
    return T - N + T // N * (N + c.diffusion_shift) if N else T


def slots_of(model, ids, before):
    """Slots (B, S) of a block whose tokens are ids (B, N), and which of them (B, S) no position sees; before (B, 1): the
    token before the block."""
    if not model.config.diffusion_shift:
        return ids, torch.zeros_like(ids, dtype=torch.bool)
    slots = torch.cat((before, ids), dim=1)
    hidden = slots == model.config.vocab_size
    hidden[:, :-1] = False
    return slots, hidden


def noisy_states(model, trunk, idx):
    """Hidden states (B, T, C) that predict the T tokens, from idx (B, clean + slots) as `objectives.block_batch` makes
    them. trunk: ids and Streams -> hidden states of all."""
    c = model.config
    T, N, S = c.block_size, c.diffusion_block, c.diffusion_block + c.diffusion_shift
    clean = idx.size(1) - T // N * S
    streams = streams_of(clean, T, N, c.diffusion_shift, idx.device)
    if c.diffusion_shift:
        hidden = (idx[:, clean:] == c.vocab_size).unflatten(1, (-1, S))
        hidden[..., :-1] = False
        streams = streams.hiding(hidden.flatten(1))
    return trunk(idx, streams)[:, clean:].unflatten(1, (-1, S))[:, :, :N].flatten(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# generation

class BlockTrunk:
    """The forward passes of one block after the other. What is clean is computed once, together with the first pass of the
    block that follows it, and kept in a KVCache."""

    def __init__(self, model, batch_size):
        self.model, self.packed = model, kernels.pack_weights(model, rows=batch_size * (model.config.diffusion_block + 1))
        self.cache = KVCache(model, batch_size, model.config.n_positions)

    def begin(self, before):
        """Goes on to the block after the tokens before (B, P). Past n_positions whole blocks fall off the left, and what is
        left is computed again at its new positions."""
        c = self.model.config
        over = before.size(1) + c.diffusion_block - c.n_positions
        if over > 0:
            before = before[:, -(-over // c.diffusion_block) * c.diffusion_block:]
            self.cache.lengths.zero_()
        self.before, self.clean = before, before[:, :-1] if c.diffusion_shift else before

    def __call__(self, ids, rows):
        """ids (B, n) of the block, n <= N, [MASK] where they are open -> hidden states (R, n, C) of the rows (B,), bool,
        that predict these tokens."""
        c, n = self.model.config, ids.size(1)
        held = int(self.cache.lengths[0])
        new = self.clean[:, held:]
        if not new.size(1):
            ids, new, before = ids[rows], new[rows], self.before[rows, -1:]
        else:
            before = self.before[:, -1:]
        slots, hidden = slots_of(self.model, F.pad(ids, (0, c.diffusion_block - n), value=c.vocab_size), before)
        tokens = torch.cat((new, slots), dim=1)
        visible = self._visible(new.size(1), hidden)
        cache = self.cache.begin(tokens.size(1), None if len(ids) == len(rows) else rows.nonzero()[:, 0].cpu(), visible)
        with kernels.packed_weights(self.packed):
            x = self.model.trunk(tokens, cache)[:, new.size(1):][:, :n]
        cache.keep(new.size(1))
        return x if len(x) < len(rows) else x[rows]

    def _visible(self, new, hidden):
        """(B, new + S, new + S): which of the clean tokens that are new and of the slots, `hidden` (B, S) among them, sees
        which."""
        N = 1 if self.model.config.diffusion_shift else self.model.config.diffusion_block
        block = torch.arange(new, device=hidden.device) // N
        visible = F.pad(block <= block[:, None], (0, hidden.size(1)))
        visible = F.pad(visible, (0, 0, 0, hidden.size(1)), value=True)
        return visible & ~F.pad(hidden, (new, 0))[:, None]


def refine_blocks(model, ids, config, rng=None, barred=None):
    """Fills every [MASK] of ids (B, T), T of any length, block by block; yields a Step after each step."""
    c = model.config
    if c.diffusion_shift and (ids[:, 0] == c.vocab_size).any():
        raise UserError('with diffusion_shift the first token is given: start with one, by --start=TEXT')
    trunk, ids = BlockTrunk(model, len(ids)), ids.clone()
    confidence = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    passes = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    for start in range(int(c.diffusion_shift), ids.size(1), c.diffusion_block):
        here = slice(start, start + c.diffusion_block)
        if not (ids[:, here] == c.vocab_size).any():
            continue
        trunk.begin(ids[:, :start])
        never = None if barred is None else (barred[0], barred[1][:, here])
        canvas = Canvas(trunk, model.head, ids[:, here], c.vocab_size, barred=never)
        for step in refine_canvas(canvas, config, rng):
            ids[:, here], confidence[:, here] = step.ids, step.confidence
            revised = torch.zeros_like(ids, dtype=torch.bool)
            revised[:, here] = step.revised
            yield Step(ids.clone(), confidence.clone(), revised, passes + step.passes)
        passes = passes + canvas.passes
