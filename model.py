"""
All model types in one file: GPT-2 first, then one section per type with only what it changes. The table TYPES at the end
maps `model_type` to classes.

Three words mean several things in this field, and here:
diffusion   the Gaussian noise of `dd`; the time t of `heat` (its "diffusion time"); masking in model_type `diffusion`
drift       the parameter d of `dd`; the field that `drifting` learns from; "token drift", that field on a masked model
time        t of `heat`; the noise level of masked diffusion, from 1 (all masked) to 0

Names and shapes are GPT-2's (Radford et al. 2019; https://github.com/openai/gpt-2/blob/master/src/model.py). In comments
B is the batch, T the sequence, C = n_embd, H = n_head, D = C / H, V = vocab_size. `published=True` selects the published
form of a type, including the flaw that the default corrects.
"""
import math
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanodrift import blocks, checkpoint, drafting, drifting, huggingface, kernels, objectives
from nanodrift.kernels import Linear, padded_vocab_size
from nanodrift.kv_cache import KVCache
from nanodrift.options import UserError, check_options, from_stored, option
from nanodrift.refinement import RefineConfig, check_defined, in_inference_mode, refine
from nanodrift.rotary import RotaryEmbedding, local_attention_biases, rotary_rates
from nanodrift.sampling import sample_logits
from nanodrift.streams import count_in_training

TYPES = {}  # model_type -> ModelType, filled at the end of this file
LEAST_HEAT_TIME = 1e-6  # below, gradients of the distance form overflow float32
ADAPTIVE, DRIFT = {'heat_t': 'adaptive'}, {'diffusion_objective': 'drift'}  # what some options need
REPAIR = {'types': 'diffusion', 'at_least': 0, 'needs': {'diffusion_objective': 'repair'}}
NELBO = {'types': 'diffusion', 'needs': {'diffusion_objective': 'nelbo'}}
FIELD = {'types': ('drifting', 'diffusion'), 'needs': DRIFT}  # options of the field


@dataclass
class GPTConfig:
    """The shape of a model and the options of its type; saved in its checkpoint. Raises UserError on values that contradict
    each other."""
    model_type: str = option('gpt2', 'which of the model types', TYPES)
    block_size: int = option(1024, 'the context, in tokens', at_least=1)
    vocab_size: int = option(50257, 'ids that have text; train.py takes it from the data set', at_least=1)
    n_layer: int = option(12, 'blocks', at_least=1)
    n_head: int = option(12, 'attention heads per block', at_least=1)
    n_embd: int = option(768, 'channels, a multiple of n_head', at_least=1)
    n_inner: int = option(0, 'channels inside the MLP; 0 means 4 * n_embd', at_least=0)
    dropout: float = option(0.0, 'dropout probability; 0 for pretraining, 0.1 and more for small data', at_least=0, below=1)
    bias: bool = option(True, 'biases in Linear and LayerNorm, as in GPT-2; False is slightly faster, but not for diffusion')
    published: bool = option(False, 'the published form; adaptive heat and duo see the future', types=('dd', 'heat', 'duo'))

    # gpt2 and rotating: drafts of their own text
    draft_block: int = option(0, 'tokens that the model learns to guess ahead, for drafts; 0 has none',
                              types=('gpt2', 'rotating'), at_least=0)
    draft_weight: float = option(0.3, 'weight of the loss of these guesses; 0 trains exactly the model without them',
                                 types=('gpt2', 'rotating'), at_least=0)

    # dd: the drift on the output y of attention, and the noise
    apply_drift: bool = option(True, 'y + d * y on the output y of attention, d learned', types='dd')
    apply_diffusion: bool = option(True, 'Gaussian noise on the output of attention, in training', types='dd')
    baseline_each_head: bool = option(True, 'a drift d for each head, or one per layer; published: a baseline or none',
                                      types='dd', needs={'apply_drift': True})
    diffusion_std: float = option(0.1, 'standard deviation of the noise; published: where it starts',
                                  types='dd', at_least=0, needs={'apply_diffusion': True})

    # heat: which kernel, and the diffusion time t
    heat_form: str = option('dot', 'softmax of q.k / 2t, or of -|q-k|^2 / 4t', ('dot', 'distance'), types='heat')
    heat_t: str = option('depth', "diffusion time: a number; 'depth', 0.28 * sqrt(4 / n_layer); or 'adaptive', learned",
                         types='heat', words=('depth', 'adaptive'), at_least=LEAST_HEAT_TIME)
    heat_t_min: float = option(0.1, 'shortest adaptive time', types='heat', at_least=LEAST_HEAT_TIME, needs=ADAPTIVE)
    heat_t_max: float = option(10.0, 'longest adaptive time', types='heat', above=0, needs=ADAPTIVE)

    # rotating, parallel, duo
    rotating_head: str = option('lr', 'rates learned, or in a geometric progression', ('lr', 'gp'), types='rotating')
    use_norm: bool = option(False, 'LayerNorm over the rates of a head', types='rotating')
    parallel_merge: str = option('mean', 'how two blocks become one', ('mean', 'add', 'concat'), types='parallel')
    duo_fill_weight: float = option(1.0, 'weight of the fill-in loss; 0 trains exactly gpt2', types='duo', at_least=0)

    # diffusion: what is learned, and how positions are told apart
    diffusion_objective: str = option('repair', 'fill, keep and flag; the bound on the likelihood; or that and the field of '
                                      'drifting', ('repair', 'nelbo', 'drift'), types='diffusion')
    positions: str = option('rotary', 'what tells positions apart', ('rotary', 'learned', 'both'), types='diffusion')
    diffusion_block: int = option(0, 'block diffusion: tokens in a block, which divide block_size; 0 is one block',
                                  at_least=0, **NELBO)
    diffusion_shift: bool = option(False, 'positions predict the next token, as in gpt2, whose weights can then go on',
                                   types='diffusion')
    diffusion_complement: bool = option(False, 'train on two noisy copies of each block, with complementary masks',
                                        types='diffusion')
    diffusion_t_min: float = option(0.0, 'least masking rate in training; in blocks, rounded up to whole tokens',
                                    at_least=0, below=1, **NELBO)
    diffusion_t_max: float = option(1.0, 'greatest masking rate in training; in blocks, rounded up', above=0, at_most=1,
                                    **NELBO)
    penalty_keep_mask: float = option(0.25, 'weight of a masked token for which [MASK] is predicted', **REPAIR)
    penalty_mask_correct: float = option(0.5, 'weight of a right token for which [MASK] is predicted', **REPAIR)
    drift_weight: float = option(1.0, 'weight of the field; the bound has 1', types='diffusion', at_least=0, needs=DRIFT)

    # drifting, and diffusion with --diffusion_objective=drift: the field, and where it is taken
    encoder: str = option('', "folder of a gpt2 run, or 'hf:NAME_OR_FOLDER', in whose features text is compared", **FIELD)
    drift_features: str = option('states', 'what is compared: hidden states of the encoder, embeddings of neighbouring '
                                 'tokens, or both', tuple(drifting.FEATURES), **FIELD)
    drift_temperatures: str = option(drifting.DEFAULT_TEMPERATURES, 'temperatures of the field, in mean distances', **FIELD,
                                     items=float, at_least=drifting.LEAST_TEMPERATURE)
    drift_floor: float = option(drifting.AFFINITY_FLOOR, 'least affinity of two samples; 0 for many', **FIELD, at_least=0)
    drift_output: str = option('embedding', "outputs: any embedding; a softmax-weighted mean of the vocabulary's; or the "
                               "argmax with that mean's gradient", ('embedding', 'soft', 'straight'), types='drifting')
    drift_look: float = option(0.0, 'local-attention initialisation: how strongly heads prefer neighbouring positions at '
                               'first; 20 is almost nothing else', types='drifting', at_least=0)
    drift_prefix: int = option(0, 'train with given prefixes of 0 to this many tokens', types='drifting', at_least=0)
    drift_positives: int = option(0, 'additional real examples per micro-batch', types='drifting', at_least=0)

    def __post_init__(self):
        check_options(self)
        for message, wrong in contradictions(self).items():
            if wrong:
                raise UserError(message)

    def heat_time(self):
        """The diffusion time t where it is not adaptive."""
        return 0.28 * math.sqrt(4 / self.n_layer) if self.heat_t == 'depth' else float(self.heat_t)

    @property
    def n_positions(self):
        """How many positions a pass can have; with diffusion_shift the first token is given."""
        return self.block_size + self.diffusion_shift

    @property
    def has_rotary(self):
        return self.model_type in ('rotating', 'drifting') or self.model_type == 'diffusion' and self.positions != 'learned'

    @property
    def has_encoder(self):
        return self.model_type == 'drifting' or self.model_type == 'diffusion' and self.diffusion_objective == 'drift'

    @property
    def outputs_embeddings(self):
        """Whether a forward pass returns embeddings, decoded to the nearest of the encoder's, instead of logits."""
        return self.model_type == 'drifting'

    @property
    def causal(self):
        """Whether outputs never depend on later tokens; false for diffusion, drifting and published adaptive heat."""
        return self.model_type not in ('diffusion', 'drifting') and not (self.published and self.heat_t == 'adaptive')

    @property
    def mask_tokens(self):
        """How many ids without text follow vocab_size in the embedding matrix: [MASK] of diffusion, duo and drafts."""
        fills = self.model_type == 'duo' and self.duo_fill_weight > 0
        return int(self.model_type == 'diffusion' or fills or self.has_drafts)

    @property
    def has_drafts(self):
        return bool(self.draft_block and self.draft_weight)

    @property
    def n_logits(self):
        """Columns of the logits: every id that has text, and [MASK] where it can be predicted."""
        return self.vocab_size + (self.model_type == 'diffusion')


# ---------------------------------------------------------------------------------------------------------------------
# gpt2

class Attention(nn.Module):
    """Multi-head attention. Other types override `attend`, and keep the names of the parameters."""
    causal = True  # diffusion sets False

    def __init__(self, config, layer):
        super().__init__()
        # layer: this block's index in the cache
        self.config, self.n_head, self.dropout, self.layer = config, config.n_head, config.dropout, layer
        # an nn.Linear whose matrix product kernels.py can swap for a faster one during generation
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v of all heads in one product
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.ends_residual = True  # read by GPT._init_weights

    def forward(self, x, cache=None):
        """x (B, T, C) -> (B, T, C). cache: a KVCache of earlier positions, in generation."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = self.attend(q, k, v, cache)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def attend(self, q, k, v, cache=None, scale=None):
        """q, k, v (B, H, T, D) -> (B, H, T, D): each position attends to itself and to what comes before it. scale: factor
        of the scores, None for 1 / sqrt(D)."""
        sdpa = partial(F.scaled_dot_product_attention, dropout_p=self.dropout if self.training else 0.0, scale=scale)
        if cache is not None:
            return cache.attend(sdpa, self.layer, q, k, v)
        return sdpa(q, k, v, is_causal=self.causal)


class MLP(nn.Sequential):
    """(B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, inner, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh')  # the approximation that GPT-2 was trained with
        self.c_proj = Linear(inner, config.n_embd, bias=config.bias)
        self.c_proj.ends_residual = True
        self.dropout = nn.Dropout(config.dropout)


class Block(nn.Module):
    """Pre-norm: attention and MLP each read a normalised copy and add to the residual stream x (B, T, C)."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = TYPES[config.model_type].attention(config, layer)  # TYPES is filled at the end of the file
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2, and what all model types share. `GPT(config)` is a model of the class that TYPES has for config.model_type;
    `encoder`: a trained gpt2 model, in whose features types with config.has_encoder compare text."""

    def __new__(cls, config=None, encoder=None):
        # there is no config when a model is copied or unpickled
        model = cls if config is None else TYPES[config.model_type].model
        # a subclass made elsewhere stays what it is
        return super().__new__(model if issubclass(model, cls) else cls)

    def __init__(self, config, encoder=None):
        super().__init__()
        self.config, self.objective = config, TYPES[config.model_type].objective(config)
        # bypass nn.Module: the encoder is frozen, so it is kept out of parameters() and state_dict()
        object.__setattr__(self, 'encoder', encoder)
        # what trunk runs; a plain list, so that nn.Module does not register it again: transformer.h holds these modules
        self.layers = self.build(config)
        self.softmax = kernels.exponentials  # of the head in training
        self.apply(self._init_weights)

    def build(self, config):
        # rounded up for fast matrix products; the padding is cut off the logits
        padded = padded_vocab_size(config.vocab_size + config.mask_tokens)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(padded, config.n_embd),
            wpe=nn.Embedding(config.n_positions, config.n_embd),
            h=nn.ModuleList(TYPES[config.model_type].block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = Linear(config.n_embd, padded, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # one matrix turns ids into vectors and vectors into logits
        return list(self.transformer.h)

    def _init_weights(self, module):
        """Normal with standard deviation 0.02, divided by sqrt(2L) where a branch ends in the residual stream (GPT-2).
        Modules with a `start` method initialise themselves after their children."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            branches = 2 * self.config.n_layer if getattr(module, 'ends_residual', False) else 1
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(branches))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if hasattr(module, 'start'):
            module.start()

    def forward(self, idx, targets=None, weights=None, return_logits=True, **trunk_options):
        """
        idx, targets, weights (B, T) -> logits, loss.

        With targets: logits of every position, (B, T, n_logits); return_logits=False leaves them None and is faster by far
        where the vocabulary is large. Without targets: logits of the last position, (B, 1, n_logits), and None.
        trunk_options: for subclasses, such as `fill` of duo.
        """
        x, n_logits = self.trunk(idx, **trunk_options), self.config.n_logits
        if targets is None:
            return self.lm_head(x[:, [-1]])[..., :n_logits], None  # [-1] in a list keeps the dimension
        if return_logits:
            logits = self.lm_head(x)[..., :n_logits]
            return logits, self.objective.loss(logits, targets, weights)
        return None, self.head_loss(x, targets, weights)

    def trunk(self, idx, cache=None):
        """Token ids (B, T) -> hidden states (B, T, C) after the final norm. cache: a KVCache, or Streams. In training with
        draft_block: ids and positions (B, 2, T + drafts) of `objectives.draft_batch` -> (B, T + drafts, C)."""
        if idx.dim() == 3:  # in training with drafts
            idx, cache = drafting.draft_streams(idx, self.config)
        T, reach = idx.size(1), idx.size(1) if cache is None else cache.reach
        assert reach <= self.config.n_positions, f'{reach} tokens do not fit block_size {self.config.block_size}'
        positions = self.transformer.wpe.weight[:T] if cache is None else self.transformer.wpe(cache.positions)
        x = F.dropout(self.transformer.wte(idx) + positions, self.config.dropout, self.training)  # (B, T, C)
        for block in self.layers:
            # block.forward bypasses torch.compile, which would recompile for every cache length
            x = block(x) if cache is None else block(x, cache) if cache.static else block.forward(x, cache)
        return self.transformer.ln_f(x)

    def head(self, x):
        """Hidden states (..., C) -> logits (..., n_logits), the padding cut off."""
        return self.lm_head(x)[..., :self.config.n_logits]

    def head_loss(self, x, targets, weights=None):
        """The mean loss of hidden states (B, T, C), logits never held all at once."""
        return self.objective.head_loss(x, self.lm_head.weight, self.config.n_logits, targets, weights, self.softmax)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None, use_cache=True,
                 return_logits=False):
        """
        Yields max_new_tokens columns (B,) of sampled ids that continue idx (B, T); with return_logits pairs of a column and
        the logits (B, V) that it was drawn from.

        Up to block_size positions use a KV cache. After that the window slides, all positions change, and each step
        recomputes the last block_size tokens, as nanoGPT does.
        """
        block_size = self.config.block_size
        rng = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        idx = idx[:, -block_size:]
        packed = kernels.pack_weights(self, rows=len(idx))
        cache = None
        if use_cache and self.config.causal:
            cache = KVCache(self, len(idx), min(block_size, idx.size(1) + max_new_tokens))
        held, fresh = 0, idx  # tokens in the cache; tokens not yet in it: first the prompt, then one token
        for _ in range(max_new_tokens):
            if held + fresh.size(1) > block_size:
                cache = None  # the window is full: from here on recompute it
            with torch.inference_mode(), kernels.packed_weights(packed):
                if cache is None:
                    logits = self.head(self.trunk(idx[:, -block_size:])[:, -1])
                else:
                    held += fresh.size(1)
                    logits = cache.read(self, fresh)
                column = sample_logits(logits, temperature, top_k, top_p, rng)  # (B,)
            fresh = column.clone()[:, None]  # a normal tensor: inference tensors cannot be used in autograd
            idx = torch.cat((idx, fresh), dim=1)[:, -block_size:]
            yield (fresh[:, 0], logits) if return_logits else fresh[:, 0]

    def compile_blocks(self):
        """torch.compile, block by block: the code of one serves all, and so compiling takes seconds and not the minute of
        a whole model."""
        if self.device.type == 'cpu':  # otherwise compiled code would draw dd's noise one number at a time
            torch._inductor.config.fallback_random = True
        if self.device.type == 'mps':
            torch._dynamo.config.suppress_errors = True  # what Metal's compiler cannot build runs uncompiled
        torch._dynamo.config.optimize_ddp = False  # DDP's buckets would cut the one graph of all blocks in two
        self.compile_head()
        for block in self.layers:
            block.compile(dynamic=False)  # few shapes occur, and each is faster for being known
        if self.encoder is not None:
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(16, limit)  # both models compile the same code
            self.encoder.compile_blocks()

    def shorten_linears(self, dtype):
        """For a frozen model under autocast to a 16-bit type: its linear layers keep their weights in it. Autocast converts
        weights that are not trained at every use, to the same numbers."""
        for module in self.transformer.h.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)

    def compile_head(self):
        """On GPUs alone: on CPUs compiled code takes longer in float32 than what it replaces."""
        if self.device.type == 'cuda':
            self.softmax = torch.compile(kernels.exponentials, dynamic=False)

    def recompute_blocks(self):
        """Gradient checkpointing: less memory, slower."""
        # wrappers, not modules: parameter names stay
        self.layers = [kernels.Recomputed(block) for block in self.layers]

    def decay_groups(self, weight_decay):
        """Parameter groups for the optimizer. Parameters called `weight` that have two dimensions decay: matrices and
        embeddings. All others do not, whatever their shape."""
        trainable = {name: p for name, p in self.named_parameters() if p.requires_grad}
        matrices = {name for name, p in trainable.items() if p.dim() >= 2 and name.endswith('.weight')}
        return [{'params': [p for name, p in trainable.items() if name in matrices], 'weight_decay': weight_decay},
                {'params': [p for name, p in trainable.items() if name not in matrices], 'weight_decay': 0.0}]

    def num_params(self):
        """Parameters, without those of positions (nanoGPT's count)."""
        return sum(p.numel() for name, p in self.named_parameters() if name != 'transformer.wpe.weight')

    def flops_per_token(self):
        """Floating-point operations of forward and backward per token of text (PaLM, arXiv 2204.02311, appendix B)."""
        c, head = self.config, 6 * self.config.vocab_size * self.config.n_embd
        positions, predictions, pairs = count_in_training(c)
        attention = 12 * c.n_layer * c.n_embd * pairs  # q.k and the weighted sum of v, forward and backward
        return ((6 * self.num_params() - head) * positions + attention + head * predictions) / c.block_size

    @property
    def device(self):
        return next(self.parameters()).device


# ---------------------------------------------------------------------------------------------------------------------
# dd: drift-diffusion attention (BluebrainAI, Parallel Transformer Models, 2025). A learned drift on the output of
# attention, and in training Gaussian noise.

class DriftDiffusionAttention(Attention):

    def __init__(self, config, layer):
        """Parameters by their published names; shapes (H, D) as published, else one number per head or for all."""
        super().__init__(config, layer)
        H, D = config.n_head, config.n_embd // config.n_head
        shape = (H, D) if config.published else (H, 1) if config.baseline_each_head else (1, 1)
        if config.apply_drift:
            self.drift_param = nn.Parameter(torch.randn(shape) * 0.02)
            if config.published and config.baseline_each_head:
                self.baseline = nn.Parameter(torch.randn(H, D) * 1e-3)
        if config.apply_diffusion and config.published:
            self.diffusion_param = nn.Parameter(torch.full((H, D), config.diffusion_std))

    def attend(self, q, k, v, cache=None):
        c = self.config
        y = super().attend(q, k, v, cache).transpose(1, 2)  # (B, T, H, D)
        if c.apply_drift and c.published:
            y = y + self.drift_param.sigmoid() * (y - self.baseline if c.baseline_each_head else y)
        elif c.apply_drift:
            y = y * (1 + self.drift_param)
        if c.apply_diffusion and self.training:
            y = y + (self.diffusion_param if c.published else c.diffusion_std) * torch.randn_like(y)
        return y.transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# heat: heat-kernel attention (Curry, "Diffusion Attention: Replacing Softmax with Heat Kernel Dynamics", zenodo 18004600).
# Another temperature of the softmax, the diffusion time t: fixed, scaled with depth, or learned for each query.

class HeatAttention(Attention):

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.time = DiffusionTime(config) if config.heat_t == 'adaptive' else None

    def attend(self, q, k, v, cache=None):
        if cache is not None:
            return cache.attend(self.heat_kernel, self.layer, q, k, v)
        return self.heat_kernel(q, k, v, is_causal=self.causal)

    def heat_kernel(self, q, k, v, attn_mask=None, is_causal=False):
        """softmax(q.k / 2t) or softmax(-|q-k|^2 / 4t). In the second form |q|^2 is the same for all keys and cancels;
        -|k|^2 / 2 becomes an extra coordinate of k, multiplied by a 1 in q. v is padded because fused attention needs q, k
        and v of equal width."""
        D, one = q.size(-1), torch.ones((), device=q.device)
        sdpa = partial(F.scaled_dot_product_attention, attn_mask=attn_mask, is_causal=is_causal,
                       dropout_p=self.dropout if self.training else 0.0)
        if self.time is None:
            scale = 1 / (2 * self.config.heat_time())
        else:
            one, scale = (1 / (2 * self.time(q, k, attn_mask))).to(q.dtype), 1.0
            q = q * one
        if self.config.heat_form == 'dot':
            return sdpa(q, k, v, scale=scale)
        halves = kernels.high_and_low(-k.float().square().sum(-1, keepdim=True) / 2, k.dtype)
        q, k, v = kernels.widen(q, one, one), kernels.widen(k, *halves), F.pad(v, (0, -(D + 2) % 8 + 2))
        return sdpa(q, k, v, scale=scale)[..., :D]


class DiffusionTime(nn.Module):
    """heat_t='adaptive': log t of each query, by an MLP that all heads share, from the mean and maximum of the scores that
    the query sees and the variance of their softmax."""

    def __init__(self, config):
        super().__init__()
        self.published = config.published
        self.log_min, self.log_max = math.log(config.heat_t_min), math.log(config.heat_t_max)
        self.mlp = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))

    def start(self):
        """t starts at sqrt(t_min t_max), whatever the scores."""
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.constant_(self.mlp[-1].bias, (self.log_min + self.log_max) / 2)

    def forward(self, q, k, mask=None):
        """q (B, H, Tq, D), k (B, H, Tk, D) -> t (B, H, Tq, 1), float32. mask (1 or B, 1, Tq, Tk): which keys a query sees;
        None: the queries are the last positions, and see those before them.

        published: the statistics are averaged over all queries, so that one t, (B, H, 1, 1), sees the future."""
        (B, H, Tq, D), Tk = q.shape, k.size(2)
        q = q / math.sqrt(D)
        if mask is None:
            top, purity, *_ = kernels.score_statistics(q.flatten(0, 1), k.flatten(0, 1))
            seen = torch.arange(Tk - Tq + 1, Tk + 1, device=q.device, dtype=torch.float32)  # keys that each query sees
            total = k.float().cumsum(2)[:, :, -Tq:]
        else:
            top, purity = plain_score_statistics(q, k, mask)
            seen, total = mask.sum(-1).float(), mask.float() @ k.float()
        mean = (q.float() * total).sum(-1) / seen
        variance = purity.view(B, H, Tq) / seen - 1 / seen.square()
        statistics = torch.stack((mean, top.view(B, H, Tq), variance), dim=-1)  # (B, H, Tq, 3)
        if self.published:
            statistics = statistics.mean(2, keepdim=True)
        last = self.mlp[-1]  # not under autocast: a log t of 8 bits would be off by a percent
        log_t = (self.mlp[:-1](statistics).float() * last.weight.float()).sum(-1, keepdim=True) + last.bias.float()
        t = log_t.clamp(self.log_min, self.log_max).exp()
        if not self.training and mask is None:
            self.last = t.detach().mean()  # for the log
        return t


def plain_score_statistics(q, k, mask):
    """Of the scores q_i . k_j that a query sees: their maximum, and sum_j softmax(s_i)_j^2. q (..., Tq, D), k (..., Tk, D),
    mask (..., Tq, Tk); kernels.score_statistics computes the same for j <= i."""
    scores = (q.float() @ k.float().mT).masked_fill(~mask, -math.inf)
    return scores.amax(-1), scores.softmax(-1).square().sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# rotating: a rotary embedding (nanodrift/rotary.py) of its own for every head, its rates learned or in a geometric
# progression (BluebrainAI, Parallel Transformer Models, 2025). The learned positions stay, as published.

class RotatingAttention(Attention):

    def __init__(self, config, layer):
        super().__init__(config, layer)
        if config.rotating_head == 'lr':
            rates = nn.Parameter(torch.randn(config.n_head, config.n_embd // config.n_head // 2))
        else:
            rates = torch.logspace(0, -1, config.n_head, device='cpu')[:, None] * rotary_rates(config)  # heads from 1 to 0.1
        self.rope = RotaryEmbedding(rates, config.block_size, persistent=True, use_norm=config.use_norm)

    def attend(self, q, k, v, cache=None):
        q, k = self.rope(q, k, None if cache is None else cache.positions)
        return super().attend(q, k, v, cache)


# ---------------------------------------------------------------------------------------------------------------------
# parallel: blocks in pairs on the same input (BluebrainAI, Parallel Transformer Models, 2025).

class Pair(nn.Module):
    """Two blocks that read the same x (B, T, C), and how their outputs are merged."""

    def __init__(self, left, right, config, bottleneck=None):
        super().__init__()
        self.left, self.right, self.merge, self.bottleneck = left, right, config.parallel_merge, bottleneck

    def forward(self, x, cache=None):
        left, right = self.left(x, cache), self.right(x, cache)
        if self.merge == 'mean':
            return (left + right) / 2
        if self.merge == 'add':
            return left + right
        return self.bottleneck(torch.cat((left, right), dim=-1))  # one projection for all pairs, as published


class ParallelGPT(GPT):

    def build(self, config):
        h, bottleneck = super().build(config), None
        if config.parallel_merge == 'concat':
            self.transformer.bottleneck = bottleneck = Linear(2 * config.n_embd, config.n_embd)
        return [Pair(left, right, config, bottleneck) for left, right in zip(h[::2], h[1::2])]

    def flops_per_token(self):
        """The one projection runs once for each pair."""
        again = len(self.layers) - 1 if self.config.parallel_merge == 'concat' else 0
        return super().flops_per_token() + again * 6 * 2 * self.config.n_embd ** 2


# ---------------------------------------------------------------------------------------------------------------------
# duo: the next token, and the token that a mask stands for (BluebrainAI, Parallel Transformer Models, 2025). Tokens never
# look at masks, so they are gpt2; the T-1 masks, one after every token but the last, run together with them.

class DuoAttention(Attention):

    def two_streams(self, x, ahead):
        """
        x (B, T + T-1, C), tokens and then masks -> the same shape.

        The mask after token i attends to the tokens before i, to itself and to token i+1. The key and value of token i+1
        are computed from its embedding, which contains nothing of token i; in the published form from its hidden state,
        which does. `ahead` (B, T-1, C): the embeddings of tokens 2 to T, through this layer's norm.

        The two extra keys are passed to the fused causal attention as one key in front of all others, whose score is the
        log-sum-exp of the two. An extra coordinate of the values returns the weight of that key; the two values then share
        it by their softmax.
        """
        (B, N, C), M = x.shape, ahead.size(1)
        D = C // self.n_head
        q, k, v = self.c_attn(x).view(B, N, 3, self.n_head, D).permute(2, 0, 3, 1, 4)  # (B, H, T + T-1, D) each
        (q, q_mask), (k, k_mask), (v, v_mask) = (part.split((M + 1, M), dim=2) for part in (q, k, v))
        y = self.attend(q, k, v)
        k_ahead, v_ahead = self.look_ahead(k, v, ahead)
        q_mask = q_mask / math.sqrt(D)
        scores = torch.stack([(q_mask * other).sum(-1, dtype=torch.float32) for other in (k_mask, k_ahead)], dim=-1)
        together = kernels.high_and_low(scores.logsumexp(-1, keepdim=True), q.dtype)  # (B, H, T-1, 1)
        shared = scores.softmax(-1).to(v.dtype)
        zero, one = k.new_zeros(B, self.n_head, 1, D), torch.ones((), device=q.device)
        keys = torch.cat((kernels.widen(zero, one, one), kernels.widen(k[:, :, :M - 1], 0 * one, 0 * one)), dim=2)
        values = torch.cat((kernels.widen(zero, one, 0 * one), kernels.widen(v[:, :, :M - 1], 0 * one, 0 * one)), dim=2)
        wide = self.attend(kernels.widen(q_mask, *together), keys, values, scale=1.0)
        extra = shared[..., :1] * v_mask + shared[..., 1:] * v_ahead
        y = torch.cat((y, wide[..., :D] + wide[..., D:D + 1] * extra), dim=2)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, N, C)), self.dropout, self.training)

    def look_ahead(self, k, v, ahead):
        """Keys and values (B, H, T-1, D) of the next token, for the mask before it."""
        if self.config.published:
            return k[:, :, 1:], v[:, :, 1:]
        B, M, C = ahead.shape
        bias = None if self.c_attn.bias is None else self.c_attn.bias[C:]
        both = F.linear(ahead, self.c_attn.weight[C:], bias)
        return both.view(B, M, 2, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4).unbind(0)


class DuoBlock(Block):

    def forward(self, x, cache=None, ahead=None):
        """`ahead` (B, T-1, C): the embeddings that masks look ahead to, where x holds masks too."""
        if ahead is None:
            return super().forward(x, cache)
        x = x + self.attn.two_streams(self.ln_1(x), self.ln_1(ahead))
        return x + self.mlp(self.ln_2(x))


class DuoGPT(GPT):

    def forward(self, idx, targets=None, weights=None, return_logits=True):
        """As for gpt2. Targets and weights may be (B, T + T-1): those of the tokens, then those of the masks."""
        fill = targets is not None and targets.size(1) > idx.size(1)
        return super().forward(idx, targets, weights, return_logits, fill=fill)

    def trunk(self, idx, cache=None, fill=False):
        """As for gpt2; with `fill` the hidden states of the masks come behind those of the tokens, (B, T + T-1, C)."""
        T = idx.size(1)
        if not fill or T == 1:
            return super().trunk(idx, cache)
        positions = self.transformer.wpe.weight[:T]
        x = F.dropout(self.transformer.wte(idx) + positions, self.config.dropout, self.training)
        masks = (self.transformer.wte.weight[self.config.vocab_size] + positions[:-1]).expand(len(x), -1, -1)
        ahead = x[:, 1:]
        x = torch.cat((x, F.dropout(masks, self.config.dropout, self.training)), dim=1)
        for block in self.layers:
            x = block(x, None, ahead)
        return self.transformer.ln_f(x)

    def flops_per_token(self):
        """A mask for every token, and keys and values from embeddings."""
        ahead = 0 if self.config.published else 12 * self.config.n_layer * self.config.n_embd ** 2
        return (1 + self.config.mask_tokens) * super().flops_per_token() + self.config.mask_tokens * ahead


# ---------------------------------------------------------------------------------------------------------------------
# diffusion: masked refinement (Sahoo et al., arXiv 2406.07524). Attention looks both ways; [MASK] = vocab_size is one more
# id. nanodrift/refinement.py has the orders and what is taken back.

class DiffusionAttention(Attention):
    causal = False

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.rope = RotaryEmbedding(rotary_rates(config), config.n_positions) if config.has_rotary else None

    @torch.no_grad()
    def start(self):
        """Local-attention initialisation: at the start, the heads of the first half of the blocks attend to neighbouring
        positions. A [MASK] knows nothing but its position. With heads that start with uniform attention, training takes
        thousands of steps to find the neighbours; until then it learns only how often each token occurs (LOG.md)."""
        if self.rope is not None and self.config.bias and 2 * self.layer < self.config.n_layer:
            bias = self.c_attn.bias.view(3, self.n_head, -1)
            bias[:2] = local_attention_biases(self.rope.frequencies, 5.0)  # others score about 3 lower

    def attend(self, q, k, v, cache=None):
        if self.rope is not None:
            q, k = self.rope(q, k, None if cache is None else cache.positions)
        return super().attend(q, k, v, cache)


class NoPositions(nn.Module):
    """In place of wpe where rotary positions are all there is."""

    def __init__(self, n_positions):
        super().__init__()
        self.register_buffer('weight', torch.zeros(n_positions, 1, device='cpu'), persistent=False)

    def forward(self, positions):
        return self.weight[positions]


class EncodedGPT(GPT):
    """What types with a frozen encoder share: the encoder must fit the model, and moves to a device together with it."""

    def __init__(self, config, encoder=None):
        drifting.freeze_encoder(encoder, config)
        super().__init__(config, encoder)

    @property
    def vocabulary(self):
        """The encoder's embeddings (V, C') of ids that have text."""
        return self.encoder.transformer.wte.weight[:self.config.vocab_size]

    def _apply(self, fn, recurse=True):
        if self.encoder is not None:
            self.encoder._apply(fn)
        return super()._apply(fn, recurse)


class DiffusionGPT(EncodedGPT):

    def build(self, config):
        h = super().build(config)
        if config.positions == 'rotary':
            self.transformer.wpe = NoPositions(config.n_positions)
        return h

    def trunk(self, idx, cache=None):
        """As for gpt2. In training with diffusion_block: clean tokens, noisy slots -> the states that predict the text."""
        if cache is None and self.config.diffusion_block:
            return blocks.noisy_states(self, super().trunk, idx)
        return super().trunk(idx, cache)

    def forward(self, idx, targets=None, weights=None, return_logits=True):
        """As for gpt2, except that the logits without targets are those of every position. With token drift, targets are a
        drifting.Field and logits are None."""
        if targets is None:
            return self.head(self.trunk(idx)), None
        if not isinstance(targets, drifting.Field):
            return super().forward(idx, targets, weights, return_logits)
        x = self.trunk(idx)
        bound = self.head_loss(x, targets.ids, weights)
        field_loss = drifting.drift_loss(self, self.soft_tokens(idx, x), targets)
        return None, bound + self.config.drift_weight * field_loss / len(targets.scales)

    def soft_tokens(self, idx, x):
        """Embeddings of the encoder (B, T, C') for ids (B, T) and hidden states (B, T, C). At a masked position: the
        vocabulary mean weighted by the predicted probabilities."""
        masked = idx == self.config.vocab_size
        means = drifting.expected_embedding(x[masked], self.vocabulary, lambda chunk: self.head(chunk)[:, :-1])
        return self.vocabulary[idx.masked_fill(masked, 0)].masked_scatter(masked[..., None], means)

    def generate_diffusion(self, idx, max_steps=RefineConfig.max_steps, temperature=RefineConfig.temperature,
                           top_k=RefineConfig.top_k, seed=None, **options):
        """Token ids (B, T), [MASK] (= vocab_size) where they are open -> the same filled in; what is fixed stays as it is.

        `options` are those of RefineConfig; raises UserError where they contradict each other or the objective."""
        config = RefineConfig(max_steps=max_steps, temperature=temperature, top_k=top_k or 0, **options)
        for step in self.refine(idx, config, seed):
            idx = step.ids
        return idx.clone()  # an ordinary tensor, and not the caller's

    def refine(self, idx, refine_config, seed=None, barred=None):
        """An iterator over a refinement.Step for each step of filling in idx (B, T). barred: an id, and the positions (B, T)
        where it is never drawn."""
        check_defined(refine_config, self)
        rng = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        if self.config.diffusion_block:
            return in_inference_mode(blocks.refine_blocks(self, idx, refine_config, rng, barred))
        if idx.size(1) > self.config.block_size:
            raise UserError(f'{idx.size(1)} tokens do not fit block_size={self.config.block_size} of the model')
        return refine(self.trunk, self.head, idx, self.config.vocab_size, refine_config, rng, barred=barred)


# every GPT has these: on other types they raise a UserError that says what to use
GPT.generate_diffusion, GPT.refine = DiffusionGPT.generate_diffusion, DiffusionGPT.refine


# ---------------------------------------------------------------------------------------------------------------------
# drifting: noise to text in one forward pass (Deng, Li, Li, Du, He, arXiv 2602.04770). A generator, a model of its own;
# nanodrift/drifting.py has the field it learns from. Its blocks are those of DiT (Peebles and Xie, arXiv 2212.09748).

class GeneratorBlock(nn.Module):
    """
    Attention both ways, rotary positions, normalised q and k, SwiGLU; shifted, scaled and gated by a condition, with gates
    that start at zero (adaLN-Zero).

    There are no biases, except those of q and k with drift_look, which the published generator does not have. Without them
    all heads start with uniform attention, noise carries no position, and samples stay independent tokens for a long time
    (LOG.md). A strength of 10 leaves room for learned attention; at 20 a head only shifts by its distance for hundreds of
    steps.
    """

    def __init__(self, config):
        super().__init__()
        C, D = config.n_embd, config.n_embd // config.n_head
        inner = 64 * math.ceil(8 * C / 3 / 64)
        self.n_head, rates = config.n_head, rotary_rates(config)
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.q_norm, self.k_norm, self.rope = nn.RMSNorm(D), nn.RMSNorm(D), RotaryEmbedding(rates, config.block_size)
        self.look = nn.Parameter(local_attention_biases(rates, config.drift_look)) if config.drift_look else None
        self.c_fc, self.c_out = nn.Linear(C, 2 * inner, bias=False), nn.Linear(inner, C, bias=False)
        self.modulation = nn.Linear(C, 6 * C, bias=False)

    def forward(self, x, condition, mask=None):
        """x (B, T, C), condition (B, C) -> (B, T, C). mask (T, T) says who may see whom."""
        B, T, C = x.shape
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        h = F.rms_norm(x, (C,)) * (1 + scale_1) + shift_1
        q, k, v = self.c_attn(h).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if self.look is not None:
            q, k = q + self.look[0, :, None], k + self.look[1, :, None]
        q, k = self.rope(q, k)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        x = x + gate_1 * self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        h = F.rms_norm(x, (C,)) * (1 + scale_2) + shift_2
        gate, value = self.c_fc(h).chunk(2, dim=-1)
        return x + gate_2 * self.c_out(F.silu(gate) * value)


class Generator(nn.Module):
    """Noise (B, T, C), style indices and maybe given embeddings -> embeddings (B, T, C), all in one pass."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.c_in = nn.Linear(C, C)
        self.c_prefix = nn.Linear(C, C) if config.drift_prefix else None
        self.condition = nn.Sequential(nn.Linear(C, C), nn.SiLU(), nn.Linear(C, C))
        self.codebook = nn.Parameter(torch.randn(drifting.STYLES, C) * 0.02)
        self.h = nn.ModuleList(GeneratorBlock(config) for _ in range(config.n_layer))
        self.modulation = nn.Linear(C, 2 * C)
        self.c_out = nn.Linear(C, C)

    def start_at(self, vocabulary):
        """Gates start at zero. Outputs start around the mean embedding with the spread of the vocabulary (V, C); if all
        started equal, the field could not separate them."""
        for block in self.h:
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.modulation.weight)
        mean = vocabulary.mean(0)
        nn.init.normal_(self.c_out.weight, std=float((vocabulary - mean).std()) / math.sqrt(len(mean)))
        with torch.no_grad():
            self.c_out.bias.copy_(mean)

    def forward(self, noise, style, prefix, layers):
        """prefix (B, P, C): embeddings of given tokens, which see only each other. layers: the blocks to run, self.h or
        their recomputing wrappers."""
        B, T, C = noise.shape
        condition = F.silu(self.condition(noise.mean(1)) + self.codebook[style].mean(1))
        x, mask = self.c_in(noise).float(), None
        if self.c_prefix is not None:  # even if P is 0: under DDP every parameter must have a gradient
            P = prefix.size(1)
            x = torch.cat((self.c_prefix(prefix).float(), x[:, P:]), dim=1)
            mask = torch.ones(T, T, dtype=torch.bool, device=x.device)
            mask[:P, P:] = False
        for block in layers:
            x = block(x, condition, mask)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.c_out(F.rms_norm(x, (C,)) * (1 + scale) + shift)

    def flops_per_token(self, c, encoder):
        """As for gpt2. The generator runs forward twice, the first time for the targets, and back once. The encoder runs
        forward on real text and on both samples, and back to its inputs. Left out: condition and modulation, of which there
        is one for each text, and the field, whose work grows with the batch."""
        h = [layer for block in self.h for layer in (block.c_attn, block.c_proj, block.c_fc, block.c_out)]
        frozen = [layer for layer in encoder.transformer.h.modules() if isinstance(layer, nn.Linear)]
        linears = sum(layer.weight.numel() for layer in (self.c_in, *h, self.c_out, *frozen))
        attention = 4 * c.block_size * c.n_embd  # of a layer, forward; back it is twice that
        # for each logit of a softmax over the vocabulary: two products forward twice, once more and back; and one for argmax
        decoding = {'embedding': 0, 'soft': 16, 'straight': 20}[c.drift_output] * c.vocab_size * c.n_embd
        return 8 * linears + (4 * len(self.h) + 5 * len(encoder.layers)) * attention + decoding


class DriftingGPT(EncodedGPT):

    def __init__(self, config, encoder):
        super().__init__(config, encoder)
        self.generator.start_at(self.vocabulary)

    def build(self, config):
        self.generator = Generator(config)
        return list(self.generator.h)

    def flops_per_token(self):
        return self.generator.flops_per_token(self.config, self.encoder)

    def forward(self, noise, style, targets, return_logits=False):
        """noise (B, T, C), style indices (B, 32), a drifting.Field -> None (there are no logits), loss."""
        return None, drifting.drift_loss(self, self.embeddings(noise, style, targets.ids), targets)

    def embeddings(self, noise, style, prefix=None):
        """noise (B, T, C), style indices (B, 32), ids (B, P) that the text starts with -> embeddings (B, T, C)."""
        prefix = torch.zeros(len(noise), 0, dtype=torch.long, device=noise.device) if prefix is None else prefix
        given = self.vocabulary[prefix]
        x = self.generator(noise, style, given, self.layers)
        x = drifting.output_embeddings(x, self.vocabulary, self.config.drift_output)
        return torch.cat((given.to(x.dtype), x[:, given.size(1):]), dim=1)

    @torch.no_grad()
    def generate_at_once(self, count, temperature=1.0, seed=None, prefix=None):
        """Ids (count, block_size) in one forward pass; each row starts with the ids prefix (P,). Temperature 1, as
        published, takes the nearest embedding; any other draws ids by softmax of cosines / temperature."""
        rng = None if seed is None else torch.Generator().manual_seed(seed)
        canvas = torch.zeros(count, self.config.block_size, dtype=torch.long)
        noise, style, _ = drifting.make_batch(canvas, rng, n_embd=self.config.n_embd)
        given = None if prefix is None else prefix.to(self.device).expand(count, -1)
        x = self.embeddings(noise.to(self.device), style.to(self.device), given)

        draw = partial(sample_logits, temperature=temperature, rng=rng)
        _, ids = drifting.nearest(x, self.vocabulary, None if temperature == 1.0 else draw)
        if given is not None:
            ids[:, :given.size(1)] = given
        return ids


# ---------------------------------------------------------------------------------------------------------------------
# the table of types

@dataclass(frozen=True)
class ModelType:
    """What a model type differs in from gpt2."""
    attention: type = Attention
    block: type = Block
    model: type = GPT
    objective: object = objectives.next_token  # GPTConfig -> Objective


TYPES |= {
    'gpt2': ModelType(),
    'dd': ModelType(attention=DriftDiffusionAttention),
    'heat': ModelType(attention=HeatAttention),
    'rotating': ModelType(attention=RotatingAttention),
    'parallel': ModelType(model=ParallelGPT),
    'duo': ModelType(attention=DuoAttention, block=DuoBlock, model=DuoGPT, objective=objectives.duo),
    'diffusion': ModelType(attention=DiffusionAttention, model=DiffusionGPT, objective=objectives.diffusion),
    'drifting': ModelType(block=GeneratorBlock, model=DriftingGPT, objective=objectives.one_step),
}


def contradictions(c):
    """{message: whether it applies} for options of a GPTConfig that are valid one by one, but not together."""
    pair = c.n_embd // c.n_head
    idle = {'heat': c.heat_t != 'adaptive' and 'heat_t=adaptive', 'duo': not c.duo_fill_weight and 'a duo_fill_weight'}
    kind, without = c.model_type, c.published and idle.get(c.model_type)
    return {
        f'n_embd={c.n_embd} must be a multiple of n_head={c.n_head}': c.n_embd % c.n_head,
        f'rotary positions turn coordinates in pairs: n_embd / n_head = {pair} must be even': c.has_rotary and pair % 2,
        f'published=True has no effect without {without}': without,
        f'heat_t_min={c.heat_t_min} must be below heat_t_max={c.heat_t_max}': c.heat_t_min >= c.heat_t_max,
        f'diffusion_t_min={c.diffusion_t_min} must be below diffusion_t_max={c.diffusion_t_max}':
            c.diffusion_t_min >= c.diffusion_t_max,
        f'parallel runs blocks in pairs: n_layer={c.n_layer} must be even': kind == 'parallel' and c.n_layer % 2,
        f'duo looks one token ahead: block_size={c.block_size} must be at least 2': kind == 'duo' and c.block_size < 2,
        f'drifting is measured by 3-grams: block_size={c.block_size} must be at least 3':
            kind == 'drifting' and c.block_size < 3,
        f'diffusion_block={c.diffusion_block} must divide block_size={c.block_size}':
            c.diffusion_block and c.block_size % c.diffusion_block,
        f'draft_block={c.draft_block} needs twice that as block_size, not {c.block_size}': 2 * c.draft_block > c.block_size,
        'diffusion_shift=True has no effect without a diffusion_block': c.diffusion_shift and not c.diffusion_block,
        'diffusion_complement=True needs blocks of two tokens or more: --diffusion_block=4':
            c.diffusion_complement and c.diffusion_block < 2,
        f'n_inner={c.n_inner} has no meaning for drifting: leave it at 0': kind == 'drifting' and c.n_inner,
        f'drift_prefix={c.drift_prefix} must be below block_size={c.block_size}': c.drift_prefix >= c.block_size,
        'drifting compares text in the features of a trained model: --encoder=FOLDER of a gpt2 run on the same data, or '
        'hf:gpt2': c.has_encoder and not c.encoder,
        f'dropout={c.dropout}: the field is taken where a first pass was; leave it at 0': c.has_encoder and c.dropout,
    }


# ---------------------------------------------------------------------------------------------------------------------
# models out of checkpoints

def with_weights(config, weights, encoder=None):
    """The model whose parameters are the tensors of a state dict. It is built on `meta`, without memory, so that no random
    weights are made first. Buffers that no checkpoint holds are computed from the config: these name the CPU."""
    with torch.device('meta'):
        model = GPT(config, encoder)
    checkpoint.load_weights(model, weights)
    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not empty, f'{empty}: what is computed from the config is made with device="cpu"'
    return model


def load_model(state, device='cpu'):
    """The trained model in a checkpoint, in evaluation mode, with averaged weights if the checkpoint has them. A token-drift
    model loads as `nelbo`, because it needs its encoder only for training."""
    huggingface.check_complete(state)
    config = from_stored(GPTConfig, state['model_args'], 'the checkpoint has model arguments')
    if config.diffusion_objective == 'drift':
        defaults = {f.name: f.default for f in fields(config) if f.metadata['needs'] == DRIFT}
        config = replace(config, **defaults, diffusion_objective='nelbo')
    encoder = load_encoder(config.encoder) if config.has_encoder else None
    if state.get('foreign'):
        model = GPT(config, encoder)
        checkpoint.start_from(model, state['model'])
    else:
        model = with_weights(config, state.get('ema') or state['model'], encoder)
    checkpoint.check_encoder(model, state)
    return model.to(device).eval()


def load_encoder(name):
    """The gpt2 model of a run's folder, or of 'hf:NAME_OR_FOLDER', in evaluation mode. Its `source` says whose it is:
    run_id, parents, tokenizer, fingerprint. Raises UserError if it is of another type."""
    try:
        state = huggingface.open_run(name)
    except UserError as e:
        raise UserError(f'encoder={name}: {e}') from None
    kind = state['model_args'].get('model_type', 'gpt2')
    if kind != 'gpt2':
        raise UserError(f'encoder={name} is a {kind} model, it must be gpt2')
    model = load_model(state)
    known = {key: state[key] for key in ('run_id', 'parents', 'tokenizer')}
    model.source = known | {'fingerprint': checkpoint.fingerprint(model.state_dict())}
    return model
