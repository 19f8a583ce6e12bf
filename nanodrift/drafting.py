"""
Lossless drafting: several tokens of a causal model in one forward pass.

A drafter guesses the next tokens, the model reads all of them in one pass, and `verify` keeps as many as its own
distribution allows: speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). The text has
exactly the distribution of plain sampling, whatever the drafter guesses; a good one only makes it faster. NgramDrafter
guesses what followed the last occurrence of the last few tokens (prompt lookup), which needs no training.
"""
import torch

from nanodrift import kernels
from nanodrift.data import derive_seed
from nanodrift.kv_cache import KVCache
from nanodrift.sampling import distribution

LONGEST_NGRAM = 4  # tokens that are looked up; then one less, and so on


def verify(p, drafts, counts, rng=None):
    """
    -> accepted (B,) and the token after the accepted ones (B,).

    p (B, K+1, V): the model's distribution before the first of the K drafts (B, K), and after each of them. counts (B,): how
    many drafts a row really has. A draft d is accepted with probability p(d). At the first that is not, the token is drawn
    from p without d; after the last, from p. That is equation 1 of arXiv 2302.01318 for a drafter that is certain.
    """
    B, K = drafts.shape
    rows = torch.arange(B, device=p.device)
    u = torch.rand(B, K, generator=rng, device=p.device)
    there = torch.arange(K, device=p.device) < counts[:, None]
    accepted = ((u < p[:, :K].gather(2, drafts[..., None]).squeeze(2)) & there).long().cumprod(1).sum(1)
    p_next = p[rows, accepted]  # a copy
    refused = (accepted < counts).nonzero().squeeze(1)
    p_next[refused, drafts[refused, accepted[refused]]] = 0
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
        """Up to `count` guesses for each of these rows."""
        return [self._draft(self.texts[i], self.seen[i]) for i in rows]

    def _draft(self, text, seen):
        for n in range(min(LONGEST_NGRAM, len(text)), 0, -1):
            place = seen.get(tuple(text[-n:]))
            if place is not None:
                return text[place:place + self.count]
        return []


def generate(model, idx, max_new_tokens, draft_tokens, temperature=1.0, top_k=None, top_p=None, seed=None, eot=None):
    """
    Yields, per forward pass, a list of the new ids of each row that continues idx (B, T), until each has max_new_tokens or
    the id `eot`: `model.generate`, with up to draft_tokens guesses in each pass. Past block_size there is no cache and so
    there are no drafts; the text is the same.
    """
    block_size, rng = model.config.block_size, None if seed is None else torch.Generator(idx.device).manual_seed(seed)
    texts, left = idx[:, -block_size:].tolist(), [max_new_tokens] * len(idx)
    drafter = NgramDrafter(texts, draft_tokens)
    cache = KVCache(model, len(texts), min(block_size, len(texts[0]) + max_new_tokens + draft_tokens))
    packed = kernels.pack_weights(model, rows=len(texts) * (1 + draft_tokens))
    fresh = len(texts[0])  # tokens of each row that are not in the cache yet: first the prompt, then one
    while rows := [i for i, text in enumerate(texts) if left[i] and len(text) <= block_size]:
        room = block_size - max(len(texts[i]) for i in rows)  # shorter drafts are padded to the longest
        drafts = [draft[:min(room, left[i] - 1)] for i, draft in zip(rows, drafter.draft(rows))]
        with torch.inference_mode(), kernels.packed_weights(packed):
            tokens = one_pass(model, cache, rows, [texts[i][-fresh:] for i in rows], drafts, rng,
                              temperature=temperature, top_k=top_k, top_p=top_p)
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


def one_pass(model, cache, rows, fresh, drafts, rng, **how):
    """The new tokens of each of these rows of the cache, a list each, after `fresh` tokens (n, F) and maybe drafts."""
    K = max(map(len, drafts))
    device = cache.k.device
    ids = torch.tensor([new + draft + [0] * (K - len(draft)) for new, draft in zip(fresh, drafts)], device=device)
    counts = torch.tensor([len(draft) for draft in drafts], device=device)
    F = ids.size(1) - K
    x = model.trunk(ids, cache.begin(F + K, rows=torch.tensor(rows) if len(rows) < len(cache.lengths) else None))
    p = distribution(model.head(x[:, F - 1:]), **how)
    accepted, after = verify(p, ids[:, F:], counts, rng=rng)
    cache.keep(F + accepted.cpu())
    return [draft[:n] + [token] for draft, n, token in zip(drafts, accepted.tolist(), after.tolist())]
