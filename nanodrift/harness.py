"""
The tasks of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness) on models of this repository, for
`evaluate.py --tasks=...`. The package lm_eval is optional; this file alone imports it.

Causal types answer with log-likelihoods, cut and windowed as the harness does for models of transformers. Diffusion answers
with a lower bound of the log-likelihood, which is minus `objectives.conditional_bound`; `evaluate.py` refuses other types.
"""
import os

import lm_eval
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nanodrift.data import Stream, derive_seed
from nanodrift.machine import autocast
from nanodrift.objectives import conditional_bound, losses_and_argmax
from nanodrift.options import UserError
from nanodrift.refinement import RefineConfig
from nanodrift.tokenizer import encode_prompt


class HarnessModel(TemplateLM):
    """A model in evaluation mode and its tokenizer, as the harness calls them. `draws`: how often diffusion masks each
    continuation anew; its masks depend on the seed, the context and the continuation, and on nothing else."""

    def __init__(self, model, tokenizer, dtype='float32', batch_size=8, draws=32, seed=1337):
        super().__init__()
        self.model, self.own_tokenizer, self.dtype = model, tokenizer, dtype  # `tokenizer` would be one of transformers
        self.batch_size, self.draws, self.seed = batch_size, draws, seed
        self.max_length = model.objective.window(model.config.block_size) - 1  # tokens that can follow one that is given

    @property
    def eot_token_id(self):
        return self.own_tokenizer.eot

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """-> ids. TemplateLM calls this, and moves spaces at the end of a context to the continuation first."""
        return encode_prompt(self.own_tokenizer, string)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """(strings, context ids, continuation ids) of each request -> its log-likelihood, or bound, and whether the
        continuation is what the model itself writes. Contexts are cut on the left; an empty one is end-of-text."""
        pairs = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(f'a continuation of {len(continuation)} tokens is too long: the model predicts at most '
                                f'{self.max_length} after a token that is given')
            context = (context or [self.eot_token_id])[-(self.max_length + 1 - len(continuation)):]
            pairs.append((context, continuation))
        with autocast(self.model.device, self.dtype):
            if self.model.config.causal:
                return self.likelihoods(pairs)
            return [self.bound(*pair) if pair[1] else (0.0, True) for pair in pairs]

    def likelihoods(self, pairs):
        """Log-likelihoods by a causal model, in batches of similar length."""
        results, order = [None] * len(pairs), sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        for start in range(0, len(order), self.batch_size):
            batch = order[start:start + self.batch_size]
            rows = [torch.tensor(pairs[i][0] + pairs[i][1], device=self.model.device) for i in batch]
            X = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[:, :-1]  # no position sees the padding after it
            ends, counts = [len(row) for row in rows], [len(pairs[i][1]) for i in batch]
            x = torch.cat([states[end - n - 1:end - 1] for states, end, n in zip(self.model.trunk(X), ends, counts)])
            Y = torch.cat([row[len(row) - n:] for row, n in zip(rows, counts)])
            losses, top = losses_and_argmax(self.model, x, Y, self.model.config.vocab_size)
            for i, loss, right in zip(batch, losses.split(counts), (top == Y).split(counts)):
                results[i] = -float(loss.cpu().double().sum()), bool(right.all())
        return results

    def bound(self, context, continuation):
        """A diffusion model's bound. What it writes itself: each time the argmax of the most confident position."""
        rng = torch.Generator().manual_seed(derive_seed(self.seed, Stream.EVAL_BATCH, *context, *continuation))
        given, target = torch.tensor(context), torch.tensor(continuation)
        nats = conditional_bound(self.model, given, target, self.draws, rng)
        mask = self.model.config.vocab_size
        canvas = torch.cat((given, torch.full_like(target, mask)))[None].to(self.model.device)
        own = RefineConfig(strategy='confidence', max_steps=len(target), temperature=0.0, top_k=0)
        filled = (step.ids[0, len(given):].cpu() for step in self.model.refine(canvas, own))
        return -float(nats.mean()), all(bool(((ids == target) | (ids == mask)).all()) for ids in filled)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """The sum over a text's windows, each token predicted once, given end-of-text or the tokens before it."""
        windows = [[(None, *make_disjoint_window(window)) for window in get_rolling_token_windows(
            self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1)] for request in requests]
        answers = iter(self._loglikelihood_tokens([window for text in windows for window in text]))
        return [sum(next(answers)[0] for _ in text) for text in windows]

    def generate_until(self, requests, disable_tqdm=False):
        """The text that follows each context, up to one of its stop strings or end-of-text."""
        if not self.model.config.causal:
            raise UserError('tasks that generate text are for causal types: generate_diffusion.py is how diffusion writes')
        return [self.generate(*request.args) for request in requests]

    def generate(self, context, settings):
        settings = normalize_gen_kwargs(settings, 256)
        stops, count = [stop for stop in settings['until'] if stop], settings['max_gen_toks']
        ids, block_size = self.tok_encode(context) or [self.eot_token_id], self.model.config.block_size
        room = block_size - count  # as the harness cuts; where nothing would be left, the window slides instead
        idx = torch.tensor([ids[-(room if room > 0 else block_size):]], device=self.model.device)
        new, text, seed = [], '', derive_seed(self.seed, Stream.SAMPLES, *ids)
        draw = dict(temperature=settings.get('temperature', 0.0), top_k=settings.get('top_k'), top_p=settings.get('top_p'),
                    seed=seed)
        with autocast(self.model.device, self.dtype):
            for column in self.model.generate(idx, count, **draw):
                if int(column) == self.eot_token_id:
                    break
                new.append(int(column))
                text = self.own_tokenizer.decode(new)
                if any(stop in text for stop in stops):
                    return text[:min(text.find(stop) for stop in stops if stop in text)]
        return text


class Tasks(TaskManager):
    """Tasks by the harness's names, or the paths of YAML files. Raises UserError where one cannot be had."""

    def __init__(self, names):
        missing = [name for name in names if name.endswith('.yaml') and not os.path.isfile(name)]
        if missing:
            raise UserError(f'tasks={missing[0]}: there is no such file')
        super().__init__(include_defaults=not all(map(os.path.isfile, names)))  # to list those takes a while
        self.names = names

    def load(self, names):
        try:
            return super().load(names)
        except Exception as e:  # of any kind: no such task, an invalid YAML file, data that cannot be downloaded
            reason = ' '.join(f'{type(e).__name__}: {e}'.split())
            raise UserError(f'tasks={",".join(names)} cannot be loaded: {reason}') from None


def run_tasks(model, tasks, num_fewshot=None, limit=None):
    """What the harness finds of a HarnessModel, in its own form."""
    return lm_eval.simple_evaluate(model, tasks=tasks.names, num_fewshot=num_fewshot, limit=limit, task_manager=tasks,
                                   log_samples=False)
