"""
Lossless drafting: several tokens of a causal model in one forward pass.

A drafter guesses the next tokens, the model reads all of them in one pass, and `verify` keeps as many as its own
distribution allows: speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). The text has
exactly the distribution of plain sampling, whatever the drafter guesses; a good one only makes it faster.

NgramDrafter guesses what followed the last occurrence of the last few tokens (prompt lookup), which needs no training.
OwnDrafter has the guesses of the model itself, trained with draft_block=K, in the pass that checks the guesses before them
(TiDAR: arXiv 2511.08923): K [MASK]s behind each of the K+1 positions that may turn out to be the last one.

In comments B is the batch, K the drafts of a row, V the vocabulary.
"""
import torch
import torch.nn.functional as F

from nanodrift import kernels
from nanodrift.data import derive_seed
from nanodrift.kv_cache import KVCache
from nanodrift.sampling import distribution
from nanodrift.streams import Streams, draft_blocks

LONGEST_NGRAM = 4  # tokens that are looked up; then one less, and so on


def verify(p, q, drafts, counts, rng=None):
    """
    -> accepted (B,) and the token after the accepted ones (B,).

    p (B, K+1, V): the model's distribution before the first of the K drafts (B, K), and after each of them. q (B, K, V): the
    distributions that the drafts were drawn from. counts (B,): how many drafts a row really has. A draft d is accepted with
    probability p(d) / q(d). At the first that is not, the token is drawn from the positive part of p - q; after the last,
    from p. Equation 1 of arXiv 2302.01318.
    """
    B, K = drafts.shape
    rows = torch.arange(B, device=p.device)
    u = torch.rand(B, K, generator=rng, device=p.device)
    there = torch.arange(K, device=p.device) < counts[:, None]
    p_draft, q_draft = (x[:, :K].gather(2, drafts[..., None]).squeeze(2) for x in (p, q))
    accepted = ((u * q_draft < p_draft) & there).long().cumprod(1).sum(1)
    p_next = p[rows, accepted]  # a copy
    refused = (accepted < counts).nonzero().squeeze(1)
    left = (p_next[refused] - q[refused, accepted[refused]]).clamp(min=0)
    p_next[refused] = torch.where(left.sum(1, keepdim=True) > 0, left, p_next[refused])  # rounding may leave nothing
    return accepted, torch.multinomial(p_next, 1, generator=rng).squeeze(1)


class NgramDrafter:
    """Guesses that the text goes on as it did after the last occurrence of its last tokens, for rows of ids alike."""

    def __init__(self, rows, count):
        self.count, self.texts, self.seen = count, [[] for _ in rows], [{} for _ in rows]
        self.add(rows)

    def add(self, rows):
        """Tokens that each row goes on with. `seen` maps the n tokens before a place to that place."""
        for text, seen, tokens in zip(self.texts, self.seen, rows):
            for token in tokens:
                for n in range(1, min(LONGEST_NGRAM, len(text)) + 1):
                    seen[tuple(text[-n:])] = len(text)
                text.append(token)

    def draft(self, rows):
        """Up to `count` guesses for each of these rows, and None: it is sure of them."""
        return [self._draft(self.texts[i], self.seen[i]) for i in rows], None

    def _draft(self, text, seen):
        for n in range(min(LONGEST_NGRAM, len(text)), 0, -1):
            place = seen.get(tuple(text[-n:]))
            if place is not None:
                return text[place:place + self.count]
        return []


class OwnDrafter:
    """The guesses that a model trained with draft_block made in its last pass: the state at the m-th [MASK] behind the last
    accepted token predicts the m-th token after the one that is drawn there."""

    def __init__(self, model, rows, count, rng, how):
        self.model, self.count, self.rng, self.how = model, min(count, model.config.draft_block), rng, how
        self.drafts = torch.zeros(len(rows), 0, dtype=torch.long, device=model.device)
        self.q = torch.zeros(len(rows), 0, model.config.vocab_size, device=model.device)

    def add(self, rows):
        pass

    def draft(self, rows):
        """Guesses for each of these rows, and the distributions (n, K, V) they were drawn from."""
        rows = torch.tensor(rows, device=self.q.device)
        return self.drafts[rows].tolist(), self.q[rows]

    def forget(self, rows):
        """There are no guesses for the next pass."""
        self.drafts, self.q = self.drafts[:, :0], self.q[:, :0]

    def take(self, rows, x):
        """Hidden states x (n, count, C) of the [MASK]s of these rows."""
        q = distribution(self.model.head(x), **self.how)
        drafts = torch.multinomial(q.flatten(0, 1), 1, generator=self.rng).view(q.shape[:2])
        if self.drafts.size(1) != self.count:
            self.drafts = self.drafts.new_zeros(len(self.drafts), self.count)
            self.q = self.q.new_zeros(len(self.q), self.count, q.size(2))
        rows = torch.tensor(rows, device=self.q.device)
        self.drafts[rows], self.q[rows] = drafts, q.to(self.q.dtype)


def draft_streams(idx, c):
    """Ids and positions (B, 2, T + drafts) of `objectives.draft_batch` -> ids (B, T + drafts), and the Streams of a pass
    over them."""
    clean = idx.size(2) - draft_blocks(c) * c.draft_block
    return idx[:, 0], Streams(clean, idx[0, 1, clean::c.draft_block], c.draft_block, c.draft_block)


def generate(model, idx, max_new_tokens, draft_tokens, temperature=1.0, top_k=None, top_p=None, seed=None, eot=None,
             own=False):
    """
    Yields, per forward pass, a list of the new ids of each row that continues idx (B, T), until each has max_new_tokens or
    the id `eot`: `model.generate`, with up to draft_tokens guesses in each pass, of an OwnDrafter where `own`. Past
    block_size there is no cache and so there are no drafts; the text is the same.
    """
    block_size, rng = model.config.block_size, None if seed is None else torch.Generator(idx.device).manual_seed(seed)
    texts, left = idx[:, -block_size:].tolist(), [max_new_tokens] * len(idx)
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    drafter = OwnDrafter(model, texts, draft_tokens, rng, how) if own else NgramDrafter(texts, draft_tokens)
    positions = (1 + drafter.count) ** (2 if own else 1)  # of a pass, at most
    cache = KVCache(model, len(texts), min(block_size, len(texts[0]) + max_new_tokens) + positions)
    packed = kernels.pack_weights(model, rows=len(texts) * positions)
    fresh = len(texts[0])  # tokens of each row that are not in the cache yet: first the prompt, then one
    while rows := [i for i, text in enumerate(texts) if left[i] and len(text) <= block_size]:
        room = block_size - max(len(texts[i]) for i in rows)  # shorter drafts are padded to the longest
        guesses, q = drafter.draft(rows)
        drafts = [draft[:min(room, left[i] - 1)] for i, draft in zip(rows, guesses)]
        masks = drafter.count if own and room >= 2 * drafter.count else 0
        with torch.inference_mode(), kernels.packed_weights(packed):
            tokens, x = one_pass(model, cache, rows, [texts[i][-fresh:] for i in rows], drafts, q, masks, rng, **how)
            if own:
                drafter.take(rows, x) if masks else drafter.forget(rows)
        new = [[] for _ in texts]
        for i, row in zip(rows, tokens):
            new[i] = row[:row.index(eot) + 1] if eot in row else row
            left[i] = 0 if eot in row else left[i] - len(row)
            texts[i] += new[i]
        drafter.add(new)
        fresh = 1
        yield new
    if rows := [i for i, n in enumerate(left) if n]:
        windows = torch.tensor([texts[i][-block_size:] for i in rows], device=idx.device)
        seed = None if seed is None else derive_seed(seed, 1)
        for step, column in enumerate(model.generate(windows, max(left), temperature, top_k, top_p, seed)):
            token = dict(zip(rows, column.tolist()))
            yield [[token[i]] if step < left[i] else [] for i in range(len(left))]


def one_pass(model, cache, rows, fresh, drafts, q, masks, rng, **how):
    """-> the new tokens of each of these rows of the cache, a list each, after `fresh` tokens (n, F) and maybe drafts, drawn
    from q (n, K, V), or certain where q is None; hidden states (n, masks, C) of the [MASK]s behind the last accepted one."""
    K, device = max(map(len, drafts)), cache.k.device
    ids = torch.tensor([new + draft + [0] * (K - len(draft)) for new, draft in zip(fresh, drafts)], device=device)
    counts, first = torch.tensor([len(draft) for draft in drafts], device=device), len(fresh[0]) - 1
    causal, layout = ids.size(1), {}
    if masks:
        visible, offsets = draft_layout(first, K, masks)
        layout = {'visible': visible.to(device), 'offsets': offsets}
        ids = F.pad(ids, (0, len(offsets) - causal), value=model.config.vocab_size)
    x = model.trunk(ids, cache.begin(ids.size(1), torch.tensor(rows) if len(rows) < len(cache.lengths) else None, **layout))
    p = distribution(model.head(x[:, first:causal]), **how)
    drawn = ids[:, first + 1:causal]
    q = F.one_hot(drawn, p.size(2)).to(p.dtype) if q is None else q[:, :K]
    accepted, after = verify(p, q, drawn, counts, rng=rng)
    cache.keep(first + 1 + accepted.cpu())
    behind = x[:, causal:].unflatten(1, (-1, masks))[torch.arange(len(x), device=device), accepted] if masks else None
    return [draft[:n] + [token] for draft, n, token in zip(drafts, accepted.tolist(), after.tolist())], behind


def draft_layout(first, K, masks):
    """visible (1, n, n) and offsets (n,) of a pass over first+1+K causal positions and, behind each of the last K+1 of
    these, `masks` [MASK]s that see each other and the causal positions up to that one."""
    causal, last = first + 1 + K, torch.arange(first, first + 1 + K)
    offsets = torch.cat((torch.arange(causal), (last[:, None] + 1 + torch.arange(masks)).flatten()))
    block = torch.cat((torch.arange(causal), last.repeat_interleave(masks)))  # the causal position that each stands behind
    is_mask = torch.arange(len(block)) >= causal
    visible = torch.where(is_mask, is_mask[:, None] & (block == block[:, None]), block <= block[:, None])
    return visible[None], offsets
