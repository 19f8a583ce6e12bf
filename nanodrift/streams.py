"""
Clean tokens and noisy slots in one pass, in training: of block diffusion (blocks.py) and of drafts (drafting.py).

In comments B is the batch, H the heads, T the tokens of a text, n the blocks of slots, S the slots of a block, D the width
of a head.
"""
import torch
import torch.nn.functional as F

SLOTS_PER_CHUNK = 256  # that attend together: their mask is a short matrix, however long the text is


class Streams:
    """
    Which of `clean` tokens and, behind them, slots in blocks of S sees which, in one pass.

    A slot sees the slots of its block and the clean tokens before the first position of its block. A clean token sees those
    before it and, with clean_block = N, those of its own block of N. Nothing clean sees anything noisy.

    first (n,): the first position of each block; slot i of a block stands at that position + i. Block b starts at position
    b * stride at the earliest, and at most a stride later; `copies` blocks that start at the same position count as one.
    hidden (B, n * S), bool: slots that no position sees. Attention runs over whole blocks, SLOTS_PER_CHUNK slots or more at
    a time, so that memory grows with the length of the text and not with its square.
    """
    static = True  # all passes have one shape

    def __init__(self, clean, first, S, stride, clean_block=1, hidden=None, copies=1):
        device, n = first.device, len(first)
        self.clean, self.reach = clean, (n - 1) // copies * stride + S
        slots = first[:, None] + torch.arange(S, device=device)
        self.positions = torch.cat((torch.arange(clean, device=device), slots.flatten()))[None]
        self.clean_chunks, self.noisy_chunks = [], []  # (rows, how many clean tokens they may see, mask)
        size = clean_block * max(1, SLOTS_PER_CHUNK // clean_block)
        for start in range(0, clean if clean_block > 1 else 0, size):
            end = min(start + size, clean)
            block = torch.arange(end, device=device) // clean_block
            self.clean_chunks.append((slice(start, end), end, block <= block[start:, None]))
        size = max(1, SLOTS_PER_CHUNK // S)
        for start in range(0, n, size):
            chunk = first[start:start + size].repeat_interleave(S)
            block = torch.arange(len(chunk), device=device) // S
            rows, end = slice(start * S, start * S + len(chunk)), start + len(chunk) // S
            seen = min(-(-end // copies) * stride, clean)
            mask = torch.cat((torch.arange(seen, device=device) < chunk[:, None], block == block[:, None]), dim=1)
            if hidden is not None:
                mask = mask & ~F.pad(hidden[:, None, None, rows], (seen, 0))  # (B, 1, slots, seen + slots)
            self.noisy_chunks.append((rows, seen, mask))

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

    def pairs(self):
        """How many pairs of a query and a key `attend` multiplies."""
        clean = sum(mask.numel() for *_, mask in self.clean_chunks) or self.clean ** 2
        return clean + sum(mask.size(-2) * mask.size(-1) for *_, mask in self.noisy_chunks)


def block_streams(c, copies, device, hidden=None):
    """The Streams of block diffusion in training, of a GPTConfig with a diffusion_block."""
    N, shift = c.diffusion_block, c.diffusion_shift
    first = torch.arange(0, c.block_size, N, device=device).repeat_interleave(copies)
    return Streams(c.block_size - N, first, N + shift, N, 1 if shift else N, hidden, copies)


def count_in_training(c):
    """Of the training pass over a text of block_size tokens, of a GPTConfig: how many positions it has, how many of them
    predict a token, and how many pairs of a query and a key attention multiplies, some of which a mask then hides."""
    T, copies = c.block_size, 1 + c.diffusion_complement
    if c.diffusion_block:
        streams = block_streams(c, copies, 'meta')
        return streams.positions.size(1), copies * T, streams.pairs()
    if c.has_drafts:
        streams = Streams(T, torch.arange(draft_blocks(c), device='meta'), c.draft_block, c.draft_block)
        return (streams.positions.size(1),) * 2 + (streams.pairs(),)
    return T, T, T * T


def draft_blocks(c):
    """How many blocks of drafts a text of block_size tokens has, wherever their grid starts."""
    return c.block_size // c.draft_block - 1 if c.has_drafts else 0
