"""
Every architecture of nanoDrift in one file. `model_type` is branched on at three seams: attention, trunk and output.

References:
1) GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; shapes and names of
   https://github.com/openai/gpt-2/blob/master/src/model.py
2) Hugging Face's GPT2LMHeadModel, whose weights load here and whose logits these are.
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import UserError, one_of, option
from machine import packed_linear
from objectives import LOGITS_PER_CHUNK, get_objective

MODEL_TYPES = ('gpt2',)
PAD_VOCAB_TO = 64  # tensor cores and AMX tiles want round sizes; the padding never leaves the model
PACK_AT_MOST = 2 ** 31  # bytes of weights that generation may hold a second copy of


@dataclass
class GPTConfig:
    """The shape of a model; saved in its checkpoint. Raises UserError on values that contradict each other."""
    model_type: str = option('gpt2', 'which of the model types', MODEL_TYPES)
    block_size: int = option(1024, 'the context, in tokens')
    vocab_size: int = option(50257, 'ids that have text; train.py takes it from the data set')
    n_layer: int = option(12, 'blocks')
    n_head: int = option(12, 'attention heads per block')
    n_embd: int = option(768, 'channels, a multiple of n_head')
    dropout: float = option(0.0, 'dropout probability; 0 for pretraining, 0.1 and more for small data')
    bias: bool = option(True, 'biases in Linear and LayerNorm, as in GPT-2; False is slightly faster')

    def __post_init__(self):
        one_of('model_type', self.model_type, MODEL_TYPES)
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise UserError(f'{name}={getattr(self, name)} must be at least 1')
        if self.n_embd % self.n_head:
            raise UserError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}')
        if not 0 <= self.dropout < 1:
            raise UserError(f'dropout={self.dropout} must be at least 0 and below 1')


class KVCache:
    """Keys and values of the positions seen so far, for every layer: two tensors (L, B, H, T_max, D)."""

    def __init__(self, config, batch_size, max_len, device, dtype):
        shape = (config.n_layer, batch_size, config.n_head, max_len, config.n_embd // config.n_head)
        self.k, self.v = torch.zeros(2, *shape, device=device, dtype=dtype).unbind(0)
        self.length = 0  # positions held; advanced once per forward pass, after the last layer

    def append(self, layer, k, v):
        """Stores k, v (B, H, T, D) of the next T positions; returns those of all positions so far."""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Linear(nn.Linear):
    """nn.Linear, which a step of generation can lend a faster way to its product."""
    lent = None

    def forward(self, x):
        return super().forward(x) if self.lent is None else self.lent(x)


class CausalSelfAttention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.ends_residual = True

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        if cache is not None:
            assert T == 1 or cache.length == 0, 'a cache is filled by one prompt, then by one token at a time'
            k, v = cache.append(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.ends_residual = True

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate='tanh')  # GPT-2's gelu
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.objective = get_objective(config)
        self.gradient_checkpointing = False
        padded = self.padded_vocab_size(config.vocab_size)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(padded, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = Linear(config.n_embd, padded, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        self.apply(self._init_weights)

    def _init_weights(self, module):
        """GPT-2: N(0, 0.02), and 1/sqrt(2L) of that where a branch ends in the residual stream."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = 0.02
            if getattr(module, 'ends_residual', False):
                std /= math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @staticmethod
    def padded_vocab_size(vocab_size):
        return math.ceil(vocab_size / PAD_VOCAB_TO) * PAD_VOCAB_TO

    def num_params(self):
        """Parameters, without the position table (nanoGPT's count)."""
        return sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()

    def flops_per_token(self):
        """Floating-point operations of forward and backward per token (PaLM, arXiv 2204.02311, appendix B)."""
        c = self.config
        return 6 * self.num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    # -- forward --------------------------------------------------------------------------------------------------------

    def trunk(self, idx, cache=None):
        """Token ids (B, T) -> hidden states (B, T, C) after the final norm."""
        start = 0 if cache is None else cache.length
        T = idx.size(1)
        assert start + T <= self.config.block_size, f'{start + T} tokens do not fit block_size {self.config.block_size}'
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[start:start + T]  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            if cache is not None:
                x = block.forward(x, cache)  # never compiled: its lengths change at every step
            elif self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def head(self, x):
        """Hidden states (..., C) -> logits (..., vocab_size), the padding cut off."""
        return self.lm_head(x)[..., :self.config.vocab_size]

    def forward(self, idx, targets=None, weights=None, return_logits=True):
        """idx, targets, weights (B, T) -> logits, loss.

        With targets the logits are those of every position, (B, T, vocab_size); return_logits=False leaves them None
        and is faster by far where the vocabulary is large. Without targets: logits of the last position, (B, 1,
        vocab_size), and None."""
        x = self.trunk(idx)
        if targets is None:
            return self.head(x[:, [-1]]), None
        if return_logits:
            logits = self.head(x)
            return logits, self.objective.loss(logits, targets, weights)
        return None, self.objective.head_loss(x, self.lm_head.weight, self.config.vocab_size, targets, weights)

    def metrics(self, idx, targets, weights=None):
        """What evaluation sums over positions, {name: float64 scalar}; the logits are never held all at once."""
        x = self.trunk(idx).flatten(0, -2)  # (N, C)
        rows = max(1, LOGITS_PER_CHUNK // self.config.vocab_size)
        parts = zip(x.split(rows), targets.flatten().split(rows),
                    [None] * len(x) if weights is None else weights.flatten().split(rows))
        found = [self.objective.metrics(self.head(x), y, w) for x, y, w in parts]
        return {name: sum(part[name] for part in found) for name in found[0]}

    def compile_blocks(self):
        """torch.compile, block by block: one block is compiled and its code serves all of them, so that it takes
        seconds where the whole model takes a minute, and the head stays free to work in chunks."""
        for block in self.transformer.h:
            block.compile(dynamic=False)  # few shapes occur, and each is faster for being known

    # -- optimizer ------------------------------------------------------------------------------------------------------

    def decay_groups(self, weight_decay):
        """Parameter groups for the optimizer: matrices and tables decay, biases and gains do not."""
        decay = [p for p in self.parameters() if p.requires_grad and p.dim() >= 2]
        no_decay = [p for p in self.parameters() if p.requires_grad and p.dim() < 2]
        trainable = sum(p.requires_grad for p in self.parameters())
        assert len(decay) + len(no_decay) == trainable, 'every trainable parameter is in exactly one group'
        return [{'params': decay, 'weight_decay': weight_decay}, {'params': no_decay, 'weight_decay': 0.0}]

    # -- generation -----------------------------------------------------------------------------------------------------

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None, use_cache=True):
        """Yields max_new_tokens columns (B,) of sampled ids that continue idx (B, T).

        Up to block_size positions are read from a cache. Past it the window slides by one, every position changes, and
        so each step reads the last block_size tokens anew: the same function as nanoGPT's cropping."""
        block_size = self.config.block_size
        rng = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        idx = idx[:, -block_size:]
        cache, lent = None, self._packed(len(idx))
        if use_cache:
            size = min(block_size, idx.size(1) + max_new_tokens)
            cache = KVCache(self.config, len(idx), size, idx.device, self._compute_dtype())
        fresh = idx
        for _ in range(max_new_tokens):
            if cache is not None and cache.length + fresh.size(1) > block_size:
                cache = None
            with torch.inference_mode(), self._lend(lent):
                x = self.trunk(fresh if cache is not None else idx[:, -block_size:], cache)
                column = sample_logits(self.head(x[:, -1]), temperature, top_k, top_p, rng)  # (B,)
            fresh = column.clone()[:, None]  # an ordinary tensor: no other may meet autograd
            idx = torch.cat((idx, fresh), dim=1)[:, -block_size:]
            yield fresh[:, 0]

    def _packed(self, rows):
        """{linear: a faster way to its product with so many rows}, where there is one: on a CPU, in float32."""
        linears = [m for m in self.modules() if isinstance(m, Linear)]
        weight = self.lm_head.weight
        fits = sum(linear.weight.nbytes for linear in linears) <= PACK_AT_MOST
        if weight.device.type != 'cpu' or self._compute_dtype() != torch.float32 or not fits:
            return {}
        return {linear: packed_linear(linear.weight.detach(), linear.bias, rows) for linear in linears}

    @contextmanager
    def _lend(self, lent):
        """Only while a step runs, so that no one else ever computes with a copy of weights that have changed since."""
        for linear, product in lent.items():
            linear.lent = product
        try:
            yield
        finally:
            for linear in lent:
                linear.lent = None

    def _compute_dtype(self):
        device_type = self.lm_head.weight.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.lm_head.weight.dtype


def sample_logits(logits, temperature=1.0, top_k=None, top_p=None, rng=None):
    """Draws one id per row of logits (B, V) -> (B,). temperature 0 is the argmax; top_k keeps the k best; top_p the
    smallest set of best ids whose probability reaches top_p, the id that crosses it included."""
    if temperature == 0:
        return logits.argmax(-1)
    k = min(top_k or logits.size(-1), logits.size(-1))
    ids = None
    if k < logits.size(-1):
        logits, ids = logits.topk(k, dim=-1)  # sorted, best first
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    probs = (logits.float() / temperature).softmax(-1)
    if top_p is not None and top_p < 1:
        before = probs.cumsum(-1) - probs  # the mass of the better ones
        probs = probs.masked_fill(before >= top_p, 0.0)
    choice = torch.multinomial(probs, 1, generator=rng)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)
