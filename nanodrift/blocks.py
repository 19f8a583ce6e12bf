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
import torch
import torch.nn.functional as F

from nanodrift import kernels
from nanodrift.kv_cache import KVCache
from nanodrift.options import UserError
from nanodrift.refinement import Canvas, Step, refine_canvas
from nanodrift.streams import block_streams


def hidden_slots(slots, c):
    """Which slots (..., S) of a block no position sees: with diffusion_shift the last one, while it is [MASK]."""
    hidden = slots == c.vocab_size
    hidden[..., :c.diffusion_block] = False
    return hidden


def noisy_states(model, trunk, idx):
    """Hidden states (B, T, C) that predict the T tokens, or (B, 2T, C) for two noisy copies, from idx (B, clean + slots) as
    `objectives.block_batch` makes them. trunk: ids and Streams -> hidden states of all."""
    c = model.config
    N, shift = c.diffusion_block, c.diffusion_shift
    clean, S = c.block_size - N, N + shift
    copies = (idx.size(1) - clean) // (c.block_size // N * S)
    hidden = hidden_slots(idx[:, clean:].unflatten(1, (-1, S)), c).flatten(1) if shift else None
    streams = block_streams(c, copies, idx.device, hidden)
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
        slots = F.pad(ids, (0, c.diffusion_block - n), value=c.vocab_size)
        if c.diffusion_shift:
            slots = torch.cat((before, slots), dim=1)
        tokens = torch.cat((new, slots), dim=1)
        visible = self._visible(new.size(1), hidden_slots(slots, c))
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
