"""
What the positions of a forward pass attend to, where that is more than the positions before them in the same pass.

KVCache   keys and values of earlier passes, so that generation computes each position once
Streams   clean tokens and noisy ones together, in training: a noisy block sees itself and the clean tokens before it

`Attention.attend` asks either for its result by `attend(sdpa, layer, q, k, v)`. sdpa is
F.scaled_dot_product_attention with the dropout and scale of the caller. In comments B is the batch, H the heads, T the
positions of a pass, D the width of a head.
"""
import torch
import torch.nn.functional as F

from nanodrift.machine import compute_dtype

POSITIONS_PER_CHUNK = 256  # noisy positions that attend together: their mask is a short matrix, however long the text is


class KVCache:
    """
    Keys and values of the positions seen so far, for every layer: two tensors (L, B, H, T_max, D), written in place.

    Each row holds `lengths` positions, an int64 tensor (B,) on the CPU. A pass is prepared by `begin`, writes its T
    positions behind those, and `keep` says how many of them stay; the next pass overwrites the others.
    """

    def __init__(self, model, batch_size, max_len):
        c, weight = model.config, model.lm_head.weight
        shape = (2, c.n_layer, batch_size, c.n_head, max_len, c.n_embd // c.n_head)
        # on CPUs, fused attention with few queries is three to six times as fast in float32 as in bfloat16
        dtype = torch.float32 if weight.device.type == 'cpu' else compute_dtype(weight)
        self.k, self.v = torch.zeros(shape, device=weight.device, dtype=dtype).unbind(0)
        self.lengths, self.block_size = torch.zeros(batch_size, dtype=torch.long), c.block_size

    def begin(self, T, visible=None, offsets=None, rows=None):
        """
        Prepares a pass over T further positions of each row; returns the cache, which then has `positions` (1 or B, T),
        their places in the text.

        visible (T, T) or (B, T, T), bool: which of the new positions each of them sees; None is those up to itself. All see
        everything that is held. offsets (T,): places in the text after those that are held, default 0 to T-1. rows (n,):
        the pass is over these rows alone, and B is n.
        """
        lengths = self.lengths if rows is None else self.lengths[rows]
        first, last = int(lengths.min()), int(lengths.max())
        self.T, self.end, self.rows = T, last + T, rows
        self.start = first if first == last and rows is None else None  # where all rows write, if that is one place
        device = self.k.device
        lengths = (lengths[:1] if first == last else lengths).to(device)[:, None]
        positions = lengths + (torch.arange(T, device=device) if offsets is None else offsets.to(device))
        self.positions = positions.clamp(max=self.block_size - 1)  # what stands behind is padding of a shorter row
        self.slots = lengths + torch.arange(T, device=device)
        self.mask = None
        if first < last or T > 1 and (last > 0 or visible is not None):
            self.mask = self._mask(lengths, visible)
        return self

    def _mask(self, lengths, visible):
        """(1 or B, 1, T, end): whether a new position sees what is stored at a place, for lengths (1 or B, 1)."""
        T, device = self.T, self.k.device
        if visible is None:
            visible = torch.ones(T, T, dtype=torch.bool).tril()
        place = torch.arange(self.end, device=device) - lengths  # below 0: held; then the new positions; then leftovers
        B = max(len(place), visible.size(0) if visible.dim() == 3 else 1)
        new = F.pad(visible.to(device), (0, 1)).expand(B, T, T + 1)  # the column that is added stands for leftovers
        index = place.clamp(0, T)[:, None].expand(B, T, self.end)
        return ((place < 0)[:, None] | new.gather(2, index))[:, None]

    def append(self, layer, k, v):
        """Stores k, v (B, H, T, D) of the new positions; returns those of all positions so far, (B, H, end, D)."""
        k_held, v_held = self.k[layer], self.v[layer]
        if self.start is not None:
            k_held[:, :, self.start:self.end], v_held[:, :, self.start:self.end] = k, v
        else:
            rows = torch.arange(len(k_held)) if self.rows is None else self.rows
            where = rows.to(k.device)[:, None], slice(None), self.slots  # indices in front: (B, T, H, D)
            k_held[where], v_held[where] = k.transpose(1, 2).to(k_held.dtype), v.transpose(1, 2).to(v_held.dtype)
        k_held, v_held = k_held[:, :, :self.end], v_held[:, :, :self.end]
        return (k_held, v_held) if self.rows is None else (k_held[self.rows], v_held[self.rows])

    def attend(self, sdpa, layer, q, k, v):
        """q, k, v (B, H, T, D) -> (B, H, T, D)."""
        k, v = self.append(layer, k, v)
        with torch.autocast(k.device.type, enabled=False):  # which would copy all that is held into 16 bits
            # a single query sees all that is held, and the first pass fills an empty cache in causal order
            return sdpa(q.to(k.dtype), k, v, attn_mask=self.mask, is_causal=self.mask is None and self.T > 1).to(q.dtype)

    def keep(self, count):
        """The first `count` positions of the last pass stay: a number, or one for each row of the pass (B,)."""
        rows = slice(None) if self.rows is None else self.rows
        self.lengths[rows] += count


class Streams:
    """
    T clean tokens, and behind them noisy slots in blocks of S, in one pass.

    A slot sees the slots of its block and the clean tokens before the first position of its block. A clean token sees those
    before it and, with clean_block = N, those of its own block of N. Nothing clean sees anything noisy.

    first (n): the first position of each block, rising; slot i of a block stands at that position + i. hidden (B, n * S),
    bool: slots that no position sees. Attention runs over whole blocks, POSITIONS_PER_CHUNK slots or more at a time, so that
    memory grows with the length of the text and not with its square.
    """

    def __init__(self, T, first, S, clean_block=1, hidden=None, device=None):
        self.T, self.first, self.S, self.clean_block = T, list(first), S, clean_block
        slots = torch.tensor(self.first, device=device)[:, None] + torch.arange(S, device=device)
        self.positions = torch.cat((torch.arange(T, device=device), slots.flatten()))[None]
        self.clean_chunks, self.noisy_chunks = [], []
        if clean_block > 1:
            size = clean_block * max(1, POSITIONS_PER_CHUNK // clean_block)
            self.clean_chunks = [self._clean_chunk(i, min(i + size, T), device) for i in range(0, T, size)]
        size = max(1, POSITIONS_PER_CHUNK // S)
        for i in range(0, len(self.first), size):
            self.noisy_chunks.append(self._noisy_chunk(i, min(i + size, len(self.first)), hidden, device))

    def _clean_chunk(self, start, end, device):
        """The rows of the chunk, and which clean tokens before `end` they see."""
        block = torch.arange(end, device=device) // self.clean_block
        return slice(start, end), block <= block[start:, None]

    def _noisy_chunk(self, start, end, hidden, device):
        """The slots of the blocks from `start` to `end`, how many clean tokens one of them sees, and which of these and of
        the chunk's slots each of them sees."""
        first = torch.tensor(self.first[start:end], device=device).repeat_interleave(self.S)
        rows, seen = slice(start * self.S, end * self.S), self.first[end - 1]
        clean = torch.arange(seen, device=device) < first[:, None]
        mask = torch.cat((clean, first == first[:, None]), dim=1)
        if hidden is not None:
            mask = mask & ~F.pad(hidden[:, None, None, rows], (seen, 0))  # (B, 1, slots, seen + slots)
        return rows, seen, mask

    def attend(self, sdpa, layer, q, k, v):
        """q, k, v (B, H, T + n * S, D) -> the same shape."""
        (q, q_noisy), (k, k_noisy), (v, v_noisy) = ((x[:, :, :self.T], x[:, :, self.T:]) for x in (q, k, v))
        y = [sdpa(q[:, :, rows], k[:, :, :rows.stop], v[:, :, :rows.stop], attn_mask=mask)
             for rows, mask in self.clean_chunks] or [sdpa(q, k, v, is_causal=True)]
        for rows, seen, mask in self.noisy_chunks:
            keys, values = (torch.cat((clean[:, :, :seen], noisy[:, :, rows]), dim=2)
                            for clean, noisy in ((k, k_noisy), (v, v_noisy)))
            y.append(sdpa(q_noisy[:, :, rows], keys, values, attn_mask=mask))
        return torch.cat(y, dim=2)
