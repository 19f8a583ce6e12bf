"""
One draw from logits: what temperature, top-k and top-p leave of them, and an id for each row.

Left to right a draw is by torch.multinomial in float32, over the few ids that are left; in refinement, which draws many
positions at once from all ids, by Gumbel noise in float64.
"""
import math

import torch
import torch.nn.functional as F

COLDEST = 1e-30  # a temperature that can still be divided by


def likely(logits, temperature=1.0, top_k=None, top_p=None):
    """What is drawn from, of logits (..., V), at a temperature above 0: probabilities (..., n) in float32, and the ids
    (..., n) that they belong to, None for all in order. top_k keeps the k best; top_p the smallest set of best ids whose
    probability reaches top_p, the id that crosses it included."""
    k = min(top_k or logits.size(-1), logits.size(-1))
    ids = None
    if k < logits.size(-1):
        logits, ids = logits.topk(k, dim=-1)  # sorted, best first
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    logits = logits.float()
    probs = ((logits - logits.amax(-1, keepdim=True)) / max(temperature, COLDEST)).softmax(-1)
    if top_p is not None and top_p < 1:
        before = probs.cumsum(-1) - probs  # the mass of the better ones
        probs = probs.masked_fill(before >= top_p, 0.0)
    return probs, ids


def sample_logits(logits, temperature=1.0, top_k=None, top_p=None, rng=None):
    """Draws one id per row of logits (B, V) -> (B,), as `likely` says; temperature 0 is the argmax."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, ids = likely(logits, temperature, top_k, top_p)
    choice = torch.multinomial(probs, 1, generator=rng)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)


def distribution(logits, temperature=1.0, top_k=None, top_p=None):
    """The probabilities (..., V) with which `sample_logits` draws each id, from logits (..., V)."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).float()
    probs, ids = likely(logits, temperature, top_k, top_p)
    probs = probs if ids is None else torch.zeros_like(logits, dtype=probs.dtype).scatter_(-1, ids, probs)
    return probs / probs.sum(-1, keepdim=True)


def keep_likely(logits, top_k, top_p):
    """logits (N, V) with -inf but for the top_k best and the best that together have probability top_p, the one that
    crosses it included."""
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        best_first, order = logits.sort(dim=-1, descending=True)
        p = best_first.softmax(-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, p.cumsum(-1) - p >= top_p)
        logits = logits.masked_fill(drop, -math.inf)
    return logits


def gumbel_draw(logits, temperature, top_k=0, top_p=1.0, rng=None):
    """An id for each row of float64 logits (N, V) -> (N,), by Gumbel noise: in float32 its tail is cut, which lowers the
    temperature (Zheng et al., arXiv 2409.02908)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = keep_likely(logits / max(temperature, COLDEST), top_k, top_p)
    u = torch.rand(logits.shape, generator=rng, dtype=torch.float64, device=logits.device).clamp_(1e-300, 1 - 1e-16)
    return u.log_().neg_().log_().neg_().add_(logits).argmax(-1)  # in place: this is most of what a draw costs
