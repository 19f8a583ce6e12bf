"""
Trains any model type on any prepared data set: a laptop's CPU, one GPU, or many nodes.

    python train.py config/train_python.py --max_iters=500
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py --init_from=auto

A run writes to out_dir: config.json, metrics.jsonl, ckpt.pt (the last state) and ckpt_best.pt (the best so far).
`--init_from=resume --out_dir=DIR` goes on where a run stopped, with its settings, bit for bit on a CPU; with
`--init_from=auto` one command starts a run and resumes it. A folder that holds a run is overwritten only if told.

Below: the options, the loop, then what the loop needs.
"""
import itertools
import math
import os
import signal
import sys
import time
import uuid
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig, load_encoder, with_weights
from nanodrift import checkpoint, huggingface, sharding
from nanodrift.data import ORDERS, Stream, Windows, ahead, derive_seed, load_meta, text_hashes
from nanodrift.machine import DTYPES, STOPPING, autocast, compiler_works, pick_dtype, read_later, setup_ranks
from nanodrift.metrics import Interrupted, over_windows
from nanodrift.options import (
    UserError,
    build,
    check_options,
    from_stored,
    mistake,
    option,
    read_config_file,
    read_values,
    run,
)
from nanodrift.runlog import RunLog, tell

DIVERGED = 3  # the exit code of a run that diverged
SCHEDULES = ('cosine', 'linear', 'constant')


@dataclass
class TrainConfig:
    """Everything about a run that is not the shape of the model."""
    out_dir: str = option('out', 'folder of the run: checkpoints, metrics.jsonl, config.json')
    dataset: str = option('python', 'data set, a folder below data_dir made by prepare.py')
    data_dir: str = option('data', 'where the data sets are')
    init_from: str = option('scratch', "'scratch'; 'resume'; 'auto', which resumes the run in out_dir if there is one, and "
                            "else starts where the config file says; the folder of another run; or 'hf:NAME_OR_FOLDER'")
    overwrite: bool = option(False, 'start anew in a folder that holds a run, whose files are removed')
    # evaluation and log
    eval_interval: int = option(250, 'iterations between evaluations; the checkpoint is saved at each', at_least=1)
    eval_iters: int = option(50, 'batches per evaluation, spread evenly over the split; 0 takes all of validation',
                             at_least=0)
    keep_every: int = option(0, 'iterations between checkpoints that are kept, as ckpt_000500.pt; 0 keeps none', at_least=0)
    eval_only: bool = option(False, 'evaluate once, print, and stop')
    log_interval: int = option(10, 'iterations between lines of the log', at_least=1)
    # data
    batch_size: int = option(12, 'examples per micro-batch, on each rank', at_least=1)
    gradient_accumulation_steps: int = option(1, 'micro-batches per iteration, over all ranks together', at_least=1)
    data_order: str = option('epoch', "'epoch': every block once per epoch; 'random': random windows", ORDERS)
    stride: int = option(0, 'tokens from one block to the next; 0 means block_size, less gives overlapping blocks',
                         at_least=0)
    max_tokens: int = option(0, 'use so many tokens of the training text, and a tenth for validation; 0 uses all',
                             at_least=0)
    seed: int = option(1337, 'of initialisation, dropout and data order', at_least=0, below=2 ** 63)
    # optimizer
    max_iters: int = option(5000, 'iterations of training', at_least=1)
    num_epochs: float = option(0.0, 'epochs of training; if above 0 it takes the place of max_iters', at_least=0,
                               at_most=1e9)
    learning_rate: float = option(6e-4, 'highest learning rate', at_least=0)
    weight_decay: float = option(0.1, 'AdamW weight decay, of matrices and embeddings only', at_least=0)
    beta1: float = option(0.9, 'AdamW beta1', at_least=0, below=1)
    beta2: float = option(0.95, 'AdamW beta2', at_least=0, below=1)
    grad_clip: float = option(1.0, 'gradient norm to clip at; 0 does not clip', at_least=0)
    ema: float = option(0.0, 'decay of a moving average of the weights, which is evaluated and sampled; 0 has none',
                        at_least=0, below=1)
    # learning rate schedule
    decay_lr: bool = option(True, 'False keeps learning_rate throughout, without warmup')
    lr_schedule: str = option('cosine', 'how the rate falls after warmup', SCHEDULES)
    warmup_iters: int = option(0, 'iterations of linear warmup', at_least=0)
    warmup_ratio: float = option(0.0, 'warmup as a share of all iterations, in place of warmup_iters', at_least=0, below=1)
    warmup_epochs: float = option(0.0, 'warmup in epochs, in place of warmup_iters', at_least=0, at_most=1e9)
    lr_decay_iters: int = option(0, 'iteration at which min_lr is reached; 0 means the last one', at_least=0)
    min_lr: float = option(0.0, 'lowest learning rate', at_least=0)
    # machine
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = option('auto', 'auto takes the fastest safe one of the device', ('auto', *DTYPES))
    compile: bool = option(True, 'torch.compile, where it works')
    gradient_checkpointing: bool = option(False, 'recompute activations in the backward pass: less memory, slower')
    sharding: str = option('none', "'fsdp': each rank keeps a share of the weights and optimizer states, for models that do "
                           'not fit one GPU', ('none', 'fsdp'))
    backend: str = option('auto', 'of torch.distributed: auto is nccl on GPUs, gloo on CPUs', ('auto', 'nccl', 'gloo'))
    ddp_timeout: int = option(1800, 'seconds that ranks wait for each other before they give up', at_least=1)
    # wandb
    wandb_log: bool = option(False, 'log to Weights & Biases as well')
    wandb_project: str = option('nanodrift', 'wandb project')
    wandb_run_name: str = option('', 'wandb run name; empty is the name of out_dir')

    def __post_init__(self):
        check_options(self)
        if self.decay_lr and self.min_lr > self.learning_rate:
            raise UserError(f'min_lr={self.min_lr} must be at most learning_rate={self.learning_rate}: lower --min_lr')
        warmups = [n for n in ('warmup_iters', 'warmup_ratio', 'warmup_epochs') if getattr(self, n)]
        if len(warmups) > 1:
            raise UserError(f'{" and ".join(warmups)} contradict each other: set one, and the others to 0')


class Diverged(SystemExit):
    """A run whose loss is no number. Ends the process with exit code DIVERGED, by which a script can tell."""

    def __init__(self, message):
        super().__init__(message)
        self.code = DIVERGED


class Trainer:
    """One run: model, optimizer, data and log, and the loop over them.

    `resumed`: the checkpoint that the run goes on from, or None. `objective` replaces the model's own. `experiment`: the
    settings of the script that provides it; only that script can resume the run."""

    def __init__(self, config, model_config, ranks, resumed=None, objective=None, experiment=None):
        self.config, self.ranks, self.experiment = config, ranks, experiment
        steps, number = config.gradient_accumulation_steps, ranks.world_size
        if steps % number:
            raise UserError(f'gradient_accumulation_steps={steps} is shared by all ranks and must be a multiple of their '
                            f'number: --gradient_accumulation_steps={-(-steps // number) * number}')
        self.dtype = pick_dtype(config.dtype, ranks.device)
        self.sharded = config.sharding == 'fsdp' and ranks.world_size > 1
        self.iter_num, self.best_val_loss, self.log_bytes = 0, math.inf, 0
        self.evaluated_iter, self.saved_iter = -1, -1
        self.commit = checkpoint.commit()  # now: by the time of a later save the files may be others
        self.run_id, self.parents = uuid.uuid4().hex, []
        self.meta = load_meta(os.path.join(config.data_dir, config.dataset))
        if any(splits != self.meta['splits'] for splits in ranks.gather(self.meta['splits'])):
            raise UserError(f'the ranks find different data in data_dir={config.data_dir}: copy one prepared folder to all '
                            'machines, or share it')
        torch.manual_seed(derive_seed(config.seed, ranks.rank))
        self.model = self._build_model(model_config, resumed)
        if self.sharded:
            sharding.shard(self.model, ranks.device, ranks.world_size)
        else:
            self.model.to(ranks.device)
        self.objective = objective or self.model.objective
        self.windows = {split: self._windows(split) for split in ('train', 'val')}
        self.examples_per_iter = config.batch_size * config.gradient_accumulation_steps
        self.examples_seen = 0
        self.optimizer = torch.optim.AdamW(self.model.decay_groups(config.weight_decay), lr=config.learning_rate,
                                           betas=(config.beta1, config.beta2), fused=ranks.device.type != 'mps')
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.dtype == 'float16')
        self.ema = EMA(self.model, config.ema) if config.ema else None
        if resumed is not None:
            self._restore(resumed)
        self.schedule = Schedule(config, len(self.windows['train']), self.examples_per_iter, self.iter_num,
                                 self.examples_seen)
        if resumed is not None:
            self._tell_what_changes(resumed)
        self.network = self._wrap(self.model)
        self._begin(late=ranks.device.type == 'cuda')
        if ranks.first and config.overwrite and resumed is None and not config.eval_only:
            checkpoint.remove_run(config.out_dir)  # only now: a mistake in the settings must not cost the old run
        self.log = RunLog(self, self.log_bytes) if ranks.first else None
        self.stop_signal = None
        if resumed is not None:
            resumed.clear()  # its tensors are copied or in use: what is left of them need not stay in memory

    # -- the loop -------------------------------------------------------------------------------------------------------

    def train(self):
        """Runs to the last iteration, or to the end of the iteration in which SIGINT or SIGTERM came."""
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._on_signal)
        while True:
            if self._evaluation_due():
                try:
                    self._checkpoint_and_evaluate()
                except Interrupted:
                    assert self._stopping(), 'an evaluation is interrupted by a signal alone'
                    break
            elif self._keeps() and self.saved_iter != self.iter_num:
                self.save('last')
            if self.iter_num >= self.schedule.max_iters or self.config.eval_only or self._stopping():
                break
            self._step()
        if self.saved_iter != self.iter_num and not self.config.eval_only:
            self.save('last')
        if self.log:
            self.log.close()
        return 0 if self.stop_signal is None else 128 + self.stop_signal

    def _step(self):
        """One iteration: forward and backward over its micro-batches, clip, update."""
        c, ranks = self.config, self.ranks
        if self.since is None:
            self.since = time.perf_counter()
        lr = self.schedule.lr(self.iter_num)
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        here = c.gradient_accumulation_steps // ranks.world_size
        total = torch.zeros((), device=ranks.device)
        batches = itertools.islice(self.batches, here)
        if self.objective.compute_targets:
            rng = torch.Generator().manual_seed(derive_seed(c.seed, Stream.DRIFT_TARGETS, self.iter_num))
            with autocast(ranks.device, self.dtype):
                batches = self.objective.compute_targets(self.model, list(batches), ranks, rng)
        for i, batch in enumerate(batches):
            last = i == here - 1
            with self._exchange(last):
                with autocast(ranks.device, self.dtype):
                    _, loss = self.network(*batch, return_logits=False)
                self.scaler.scale(loss / here).backward()  # DDP takes the mean over ranks
            total += loss.detach() / here
        self.scaler.unscale_(self.optimizer)
        norm = sharding.whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.grad_clip or math.inf))
        self._settle()
        votes = total.new_zeros(len(STOPPING))
        if self.stop_signal:
            votes[STOPPING.index(self.stop_signal)] = 1
        loss_and_votes = ranks.sum(torch.cat((total[None] / ranks.world_size, votes)))
        self.outcome = lr, read_later(torch.cat((norm[None], loss_and_votes)))
        self.iter_num += 1
        self.examples_seen += self.examples_per_iter
        if not self.late:
            self._settle()
        elif not self.scaler.is_enabled():  # which does the same: the fused optimizer skips this update
            self.optimizer.found_inf = (~torch.isfinite(norm + loss_and_votes[0])).float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.iter_num)

    def _settle(self):
        """Reads what came of the last iteration, checks and logs it."""
        if self.outcome is None:
            return
        lr, read = self.outcome
        norm, loss, *votes = read()
        self.outcome = None
        self.voted = max((number for number, vote in zip(STOPPING, votes) if vote), default=0)
        self._check_finite(loss, norm)
        if self.log:
            now = time.perf_counter()
            self.log.step(loss, lr, norm, now - self.since)
            self.since = now

    def _pause(self):
        """Settles the last iteration. Saving and evaluating begin with it, since both need to know what came of it."""
        self._settle()
        self.voted = self.since = None

    def _exchange(self, last):
        """The context of a micro-batch: the ranks exchange gradients after the last one alone."""
        if self.sharded:
            self.network.set_requires_gradient_sync(last)
        return nullcontext() if last or self.sharded or self.ranks.world_size == 1 else self.network.no_sync()

    def _begin(self, late):
        """late: a GPU computes while the CPU prepares. What came of an iteration is read when the next one has been queued,
        and batches are made on a thread."""
        self.late, self.outcome, self.since, self.voted = late, None, None, None
        self.batches = self._batches()
        if late:
            self.batches = ahead(self.batches, partial(torch.cuda.set_device, self.ranks.device))

    def _batches(self):
        """The micro-batches of this rank, without end, from the current iteration on."""
        here = self.config.gradient_accumulation_steps // self.ranks.world_size
        iter_num, seen = self.iter_num, self.examples_seen
        while True:
            for i in range(here):
                yield self._batch(iter_num, seen, self.ranks.rank * here + i)
            iter_num, seen = iter_num + 1, seen + self.examples_per_iter

    def _batch(self, iter_num, examples_seen, micro):
        """The micro-batch with this number among those of an iteration, of all ranks."""
        B, steps = self.config.batch_size, self.config.gradient_accumulation_steps
        windows, start = self.windows['train'], examples_seen + micro * self.config.batch_size
        rng = torch.Generator().manual_seed(derive_seed(self.config.seed, Stream.TRAIN_BATCH, iter_num * steps + micro))
        numbers = range(start, start + B)
        if self.objective.examples:
            numbers = self.objective.examples(numbers, examples_seen, rng)
        tokens = windows.read(windows.offsets(numbers))
        part = (micro, steps, derive_seed(self.config.seed, Stream.ITERATION, iter_num))
        if self.objective.device_batch and self.ranks.device.type != 'cpu':
            return self._to_device(self.objective.device_batch(tokens, part, self.ranks.device))
        return self._to_device(self.objective.make_batch(tokens, rng, part))

    def _to_device(self, tensors):
        device = self.ranks.device
        if device.type == 'cuda':
            return [t if t is None or t.is_cuda else t.pin_memory().to(device, non_blocking=True) for t in tensors]
        return [t if t is None else t.to(device) for t in tensors]

    def _check_finite(self, loss, norm):
        """Ends the run before the update that would break the weights. With float16 an occasional infinite gradient is
        normal: the scaler skips the update and halves its scale. At a scale below 1e-3 it ends the run."""
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled() and self.scaler.get_scale() > 1e-3):
            return
        self._diverge(f'loss {loss}, gradient norm {norm} at iteration {self.iter_num - 1}: stopped before the update, '
                      'checkpoints untouched; try a lower --learning_rate or --dtype=float32')

    def _diverge(self, what):
        """Ends the run with one line. The last one of metrics.jsonl says it too, since torchrun hides the exit code."""
        if self.log:
            self.log.diverged()
            print(f'train.py: {what}', file=sys.stderr)
        raise Diverged(what)

    def _checkpoint_and_evaluate(self):
        """Saves before evaluating, so that a failing evaluation loses nothing; saves again when the loss is the best so
        far."""
        self._pause()
        keep = self.iter_num > 0 and not self.config.eval_only
        if keep:
            self.save('last')
        train, val = self.evaluate('train'), self.evaluate('val')
        metric = self.objective.val_metric
        if self.log:
            others = {f'val_{name}': value for name, value in val.items() if name != metric}
            self.log.evaluation({'train_loss': train[metric], 'val_loss': val[metric], **others})
        if not math.isfinite(val[metric]):
            happened = 'stopped'
            if self.ranks.first and keep:
                happened = checkpoint.fall_back(self.config.out_dir, self.iter_num)
            self._diverge(f'the validation loss is {val[metric]} after iteration {self.iter_num}: {happened}; try a lower '
                          '--learning_rate')
        self.evaluated_iter = self.iter_num
        if keep and val[metric] < self.best_val_loss:
            self.best_val_loss = val[metric]
            self.save('best', 'last')
        elif keep and self.iter_num == self.schedule.max_iters:
            self.save('last')  # its log_bytes have this evaluation's line, which a longer run would cut off otherwise

    def evaluate(self, split):
        """{name: value} of the objective's metrics over fixed windows of a split."""
        c, windows, objective = self.config, self.windows[split], self.objective
        offsets = windows.spread(c.eval_iters * c.batch_size or len(self.windows['val']))
        self.model.eval()
        with self.ema or nullcontext():
            metrics = over_windows(windows, offsets, c.batch_size, objective.eval_batch or objective.make_batch,
                                   partial(objective.metrics, self.model), self.ranks, self.dtype,
                                   stopping=self._agree_to_stop if self.sharded else lambda: self.stop_signal is not None,
                                   in_step=self.sharded)
        if self.sharded:
            self.model.reshard()  # what is still gathered may be averages
        self.model.train()
        return objective.summary(metrics)

    def _evaluation_due(self):
        if self.config.eval_only:
            return True
        at_interval = self.iter_num % self.config.eval_interval == 0 or self.iter_num >= self.schedule.max_iters
        return at_interval and self.evaluated_iter != self.iter_num

    def _keeps(self):
        return self.config.keep_every and self.iter_num and self.iter_num % self.config.keep_every == 0

    def _on_signal(self, number, frame):
        now = time.monotonic()
        if self.stop_signal is None:
            self.stop_signal, self.stopped_at = number, now
        # whoever started it may repeat a signal; a second one of the user's ends it at once
        elif self.ranks.world_size == 1 and now > self.stopped_at + 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _agree_to_stop(self):
        """The number of a signal that a rank has, or 0; ranks agree, since it reaches them at different moments."""
        if self.late and self.voted is not None:
            return self.voted
        agreed = self.stop_signal or 0
        if self.ranks.world_size > 1:
            agreed = int(self.ranks.max(torch.tensor(agreed, device=self.ranks.device)))
        return agreed

    def _stopping(self):
        """Whether to stop now."""
        agreed = self._agree_to_stop()
        if agreed:
            # set here, so that a signal received since is handled one iteration later on all ranks together
            self.stop_signal = agreed
            self.say(f'stopped by {signal.Signals(agreed).name} after iteration {self.iter_num}; go on with '
                     f'{self.resume_with()}')
        return bool(agreed)

    # -- building -------------------------------------------------------------------------------------------------------

    def _windows(self, split):
        c, path = self.config, os.path.join(self.config.data_dir, self.config.dataset, f'{split}.bin')
        block_size = self.model.config.block_size
        stride = c.stride if split == 'train' and c.stride else block_size
        limit = c.max_tokens if split == 'train' else c.max_tokens // 10
        return Windows(path, self.meta['dtype'], self.objective.window(block_size), stride, c.data_order, c.seed, limit,
                       self.meta['vocab_size'])

    def _build_model(self, model_config, resumed):
        """A new model on the CPU: randomly initialised, or with weights copied from init_from, or with those of the
        checkpoint that the run goes on from."""
        c = self.config
        model_config.vocab_size = self.meta['vocab_size']
        if resumed is not None:
            check_same_model(resumed, model_config, self.meta)
            check_same_data(resumed, c, self.meta)
        source, rates = None, (model_config.diffusion_t_min, model_config.diffusion_t_max)
        if resumed is None and model_config.diffusion_complement and not math.isclose(sum(rates), 1):
            raise UserError(f'with diffusion_complement=True the second copy is masked at rate 1 - t: diffusion_t_min='
                            f'{rates[0]} and diffusion_t_max={rates[1]} must add up to 1')
        if c.init_from not in ('scratch', 'resume'):
            source = self._source_of_weights(model_config)
            asked, model_config = model_config, fitted(model_config, source['model_args'])
            changed = [f'{k}={v}' for k, v in asdict(model_config).items() if getattr(asked, k) != v]
            self.say(f'taken from {c.init_from}: {", ".join(changed) or "nothing but weights"}')
        device = self.ranks.device  # manual_seed seeds every GPU, whose stream must stay the rank's own
        with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
            torch.manual_seed(c.seed)  # the same initial weights on every rank
            encoder = load_encoder(model_config.encoder) if model_config.has_encoder else None
            model = with_weights(model_config, resumed['model'], encoder) if resumed else GPT(model_config, encoder)
        if source is not None:
            fresh = checkpoint.start_from(model, source.get('ema') or source['model'], known_ids(source))
            self.say(f'weights from {c.init_from}; starting fresh: {", ".join(fresh) or "nothing"}')
        self._check_sources(source, model.encoder)
        if model.encoder is not None:
            check_tokenizer(f'cannot use encoder={model_config.encoder}', model.encoder.source, self.meta)
            if source is not None and model_config.outputs_embeddings:  # which only the same encoder can decode
                checkpoint.check_encoder(model, source)
            ancestors = [model.encoder.source['run_id'], *model.encoder.source['parents']]
            self.parents = [*self.parents, *(name for name in ancestors if name not in self.parents)]
            if self.dtype != 'float32':
                model.encoder.shorten_linears(DTYPES[self.dtype])
        if c.gradient_checkpointing:
            for network in filter(None, (model, model.encoder)):
                network.recompute_blocks()
        return model

    def _check_sources(self, source, encoder):
        """Raises UserError where the ranks would start from different weights: each reads the folders of its machine."""
        if self.ranks.world_size == 1:
            return
        mine = source and checkpoint.fingerprint(source['model']), encoder and encoder.source['fingerprint']
        for name, found in zip(('init_from', 'encoder'), zip(*self.ranks.gather(mine))):
            if len(set(found)) > 1:
                raise UserError(f'the ranks find different weights in {name}: name one folder that all machines share, or '
                                'copy the same one to all')

    def _source_of_weights(self, model_config):
        """The checkpoint that --init_from=hf:NAME or --init_from=DIR names, of the same vocabulary as the data."""
        c = self.config
        if not c.init_from.startswith('hf:') and not os.path.isdir(c.init_from):
            raise UserError(f"init_from={c.init_from!r} is not 'scratch', not 'resume', not the folder of a run, and not "
                            "'hf:NAME_OR_FOLDER' (hf:gpt2, say)")
        source = huggingface.open_run(c.init_from)
        source['model_args'] = asdict(config_of(source))  # an export may leave defaults out
        if source['tokenizer']:
            check_tokenizer(f'cannot start from {c.init_from}', source, self.meta)
        kind = huggingface.PUBLISHED_TYPES.get(source.get('foreign'), model_config.model_type)
        if kind != model_config.model_type:
            raise UserError(f"{c.init_from} holds {source['foreign']} weights: --model_type={kind}, with their options")
        self.parents = [source['run_id'], *source['parents']]
        rows, known = known_ids(source), self.meta['vocab_size']
        if rows not in (known, known + model_config.mask_tokens):
            theirs = source['model_args']
            if source['tokenizer'] and rows == known + 1:  # that of the data, as was checked
                drafts = f' --draft_block={theirs["draft_block"]}' if theirs['model_type'] == model_config.model_type else ''
                raise UserError(f'{c.init_from} has a mask token, which this model has not: add '
                                f'--model_type={theirs["model_type"]}{drafts}')
            raise UserError(f'{c.init_from} has a vocabulary of {rows}, the data set one of {known}: prepare the data with '
                            'the tokenizer of the weights')
        return source

    def _wrap(self, model):
        if self.config.compile and compiler_works(self.ranks.device):
            (partial(sharding.compile_blocks, model) if self.sharded else model.compile_blocks)()
        if self.ranks.world_size == 1 or self.sharded:
            return model
        ids = [self.ranks.device.index] if self.ranks.device.type == 'cuda' else None
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch 2.13 has another name for broadcast_buffers, which older versions lack
            return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True,
                                           broadcast_buffers=False)  # they are the same on all ranks

    # -- state ----------------------------------------------------------------------------------------------------------

    def state(self, random_states):
        """Everything that resuming needs, as tensors and plain values; on the first rank, but all must call it."""
        tensors = {'model': self.model.state_dict(keep_vars=self.sharded), 'ema': self.ema.state() if self.ema else {},
                   'optimizer': self.optimizer.state_dict()}
        return sharding.gathered(tensors, self.ranks.first) | {
            'scaler': self.scaler.state_dict(), 'model_args': asdict(self.model.config), 'config': self.settings(),
            'tokenizer': self.meta['tokenizer'], 'iter_num': self.iter_num, 'best_val_loss': self.best_val_loss,
            'evaluated_iter': self.evaluated_iter, 'random_states': random_states,
            'log_bytes': self.log.bytes() if self.log else 0,
            'examples_seen': self.examples_seen, 'data': text_hashes(self.meta),
            'run_id': self.run_id, 'parents': self.parents, 'commit': self.commit,
            'encoder': None if self.model.encoder is None else self.model.encoder.source['fingerprint'],
            'experiment': self.experiment,
        }

    def settings(self):
        """Every key of the command line with its value."""
        return asdict(self.config) | asdict(self.model.config)

    def resume_with(self):
        """The arguments that go on with this run."""
        return ('--resume=' if self.experiment else '--init_from=resume --out_dir=') + self.config.out_dir

    def _restore(self, state):
        """`_restore_state`, and a UserError where the checkpoint is not what a run saves."""
        try:
            self._restore_state(state)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            if mistake(e) is not None:  # said already, or too little memory
                raise
            raise UserError(f'cannot resume: {self.config.out_dir} lacks something that a run saves ({e!r:.100}); start a '
                            f'new run from its weights: --init_from={self.config.out_dir} --out_dir=NEW') from None

    def _restore_state(self, state):
        """The rest of a checkpoint, whose weights the model has already; its tensors are copied or taken over."""
        checkpoint.check_encoder(self.model, state)
        if self.ema and state.get('ema'):  # without one it starts at the weights
            self.ema.load(state['ema'])
        settings = [{k: v for k, v in group.items() if k not in ('params', 'lr')} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(sharding.share_optimizer(state['optimizer'], self.optimizer))
        for group, now in zip(self.optimizer.param_groups, settings):
            group.update(now)  # load_state_dict also loaded the old weight_decay and betas
        if state['scaler']:  # empty where the run was not in float16 before
            self.scaler.load_state_dict(state['scaler'])
        self.iter_num, self.best_val_loss = state['iter_num'], state['best_val_loss']
        self.evaluated_iter, self.saved_iter = state['evaluated_iter'], -1 if 'stands_in' in state else state['iter_num']
        self.run_id, self.parents, self.log_bytes = state['run_id'], state['parents'], state['log_bytes']
        before = state['config']  # runs of before did not count examples
        per_iter = before['batch_size'] * before['gradient_accumulation_steps']
        self.examples_seen = state.get('examples_seen', self.iter_num * per_iter)
        if len(state['random_states']) == self.ranks.world_size:
            mine = state['random_states'][self.ranks.rank]
            torch.set_rng_state(mine['cpu'])
            if self.ranks.device.type == 'cuda' and 'cuda' in mine:
                torch.cuda.set_rng_state(mine['cuda'], self.ranks.device)
            if self.ranks.device.type == 'mps' and 'mps' in mine:
                torch.mps.set_rng_state(mine['mps'])
        else:
            self.say('another number of ranks than before: dropout goes on from a new random state')
            torch.manual_seed(derive_seed(self.config.seed, self.ranks.rank, self.iter_num))

    def _tell_what_changes(self, state):
        """Says what a user may not expect of a resumed run: that nothing is left to train, or that the rate jumps."""
        if self.iter_num >= self.schedule.max_iters and not self.config.eval_only:
            self.say(f'nothing left to train: iteration {self.iter_num} of {self.schedule.max_iters}; --max_iters=N or '
                     '--num_epochs=N trains longer')
            return
        before, now = state['optimizer']['param_groups'][0]['lr'], self.schedule.lr(self.iter_num)
        if self.iter_num > self.schedule.warmup and not before / 2 <= now <= before * 2:
            self.say(f'the schedule is another than before: the learning rate goes from {before:.3g} to {now:.3g} here')

    def save(self, *names):
        """Writes one state under each of the names 'last' and 'best'."""
        self._pause()
        mine = {'cpu': torch.get_rng_state()}
        if self.ranks.device.type == 'cuda':
            mine['cuda'] = torch.cuda.get_rng_state(self.ranks.device)
        if self.ranks.device.type == 'mps':
            mine['mps'] = torch.mps.get_rng_state()
        random_states = self.ranks.gather(mine)
        state = self.state(random_states) if self.ranks.first or self.sharded else None
        if self.ranks.first:
            if self.best_val_loss == math.inf:
                checkpoint.forget_best(self.config.out_dir)  # of an earlier run in this folder
            checkpoint.save(self.config.out_dir, state, names)
            if self._keeps():
                checkpoint.keep(self.config.out_dir, self.iter_num)
        self.saved_iter = self.iter_num

    def say(self, line):
        if self.ranks.first:
            tell(line)


class Schedule:
    """How many iterations a run has, and the learning rate of each. `windows` are the examples of an epoch; a run that is
    resumed at `iter_num` has seen `examples_seen` of them, maybe with batches of another size."""

    def __init__(self, config, windows, examples_per_iter, iter_num=0, examples_seen=0):
        self.config = config
        self.max_iters = config.max_iters
        if config.num_epochs and examples_seen == iter_num * examples_per_iter:
            self.max_iters = math.ceil(config.num_epochs * windows / examples_per_iter)
        elif config.num_epochs:
            left = config.num_epochs * windows - examples_seen
            self.max_iters = iter_num + max(0, math.ceil(left / examples_per_iter))
        self.warmup = config.warmup_iters or round(config.warmup_ratio * self.max_iters) or \
            round(config.warmup_epochs * windows / examples_per_iter)
        self.end = config.lr_decay_iters or self.max_iters
        if config.decay_lr and self.warmup > self.end:
            raise UserError(f'warmup of {self.warmup} iterations is longer than the schedule of {self.end}')

    def lr(self, iter_num):
        """Learning rate of the update that follows `iter_num` updates."""
        c = self.config
        if not c.decay_lr:
            return c.learning_rate
        if iter_num < self.warmup:
            return c.learning_rate * (iter_num + 1) / (self.warmup + 1)
        if c.lr_schedule == 'constant':
            return c.learning_rate
        done = min(1.0, (iter_num - self.warmup) / max(1, self.end - self.warmup))
        left = 1 - done if c.lr_schedule == 'linear' else 0.5 * (1 + math.cos(math.pi * done))
        return c.min_lr + left * (c.learning_rate - c.min_lr)


class EMA:
    """An exponential moving average of a model's parameters; inside `with ema:` the model has them for its own."""

    def __init__(self, model, decay):
        self.model, self.decay = model, decay
        self.parameters = [sharding.local(p.detach()) for p in model.parameters()]
        self.values = [p.clone() for p in self.parameters]

    def update(self, iter_num):
        """After each iteration; the first ones count for less, so that the initial weights are soon forgotten."""
        decay = min(self.decay, (1 + iter_num) / (10 + iter_num))
        torch._foreach_lerp_(self.values, self.parameters, 1 - decay)

    def state(self):
        """The model's state dict, as it is with the averages."""
        with self:
            copies = {}  # tied weights are one tensor here too
            return {name: copies.setdefault(id(tensor), tensor.detach().clone())
                    for name, tensor in self.model.state_dict(keep_vars=True).items()}

    def load(self, state):
        with self:
            self.model.load_state_dict(sharding.share_weights(state, self.model))

    def _swap(self, *_):
        for p, value in zip(self.parameters, self.values):  # in place: fully_shard keeps the memory of its shares
            before = p.clone()
            p.copy_(value)
            value.copy_(before)

    __enter__ = __exit__ = _swap


def fitted(config, model_args):
    """A copy of `config` with the sizes of `model_args`; block_size may be smaller, since positions can be cut off."""
    shape = {k: model_args[k] for k in ('n_layer', 'n_head', 'n_embd', 'n_inner', 'bias') if k in model_args}
    return replace(config, **shape, block_size=min(config.block_size, model_args['block_size']))


def config_of(state):
    """The GPTConfig of a checkpoint."""
    return from_stored(GPTConfig, state['model_args'], 'the checkpoint has model arguments')


def known_ids(state):
    """How many ids the weights of a checkpoint know."""
    return state['model_args']['vocab_size'] + config_of(state).mask_tokens


def check_tokenizer(what_fails, state, meta):
    """Raises UserError where a checkpoint's tokenizer is not that of the data set."""
    if state['tokenizer'] is None:
        raise UserError(f'{what_fails}: its tokenizer is unknown here')
    if state['tokenizer'] != meta['tokenizer']:
        raise UserError(f"{what_fails}: the checkpoint was trained with tokenizer {state['tokenizer'].get('name')}, the "
                        f"data set has {meta['tokenizer']['name']} or another vocabulary of that name")


def check_same_data(state, config, meta):
    """Raises UserError where a run would go on with another text than it was trained on."""
    before = state['config']
    fix = f'to train on it start a new run from these weights: --init_from={config.out_dir} --out_dir=NEW'
    if before['dataset'] != config.dataset:
        raise UserError(f"cannot resume: the run was trained on dataset={before['dataset']}, not {config.dataset}; {fix}")
    if state.get('data', text_hashes(meta)) != text_hashes(meta):
        raise UserError(f'cannot resume: the data set {config.dataset} was prepared anew since, from another text; {fix}')


def check_same_model(state, model_config, meta):
    """Raises UserError naming what differs between a checkpoint and the architecture or tokenizer asked for now."""
    check_tokenizer('cannot resume', state, meta)
    may_change = ('dropout', 'encoder')  # the encoder may have moved; `check_encoder` compares its weights
    differing = [f'{k} is {v} in the checkpoint and {getattr(model_config, k)} now'
                 for k, v in asdict(config_of(state)).items()
                 if k not in may_change and getattr(model_config, k) != v]
    if differing:
        raise UserError(f"cannot resume: {'; '.join(differing)}; use --init_from=DIR to start a new run from its weights")


def read_settings(argv):
    """-> TrainConfig, GPTConfig, checkpoint to resume or None. A resumed run keeps its stored settings; settings given now,
    in a file or on the command line, override them. Of max_iters and num_epochs the one that is given last counts."""
    values, files = read_values(argv, TrainConfig, GPTConfig, description=__doc__)
    last = [key for key in values if key in ('max_iters', 'num_epochs')][-1:]
    if last == ['max_iters']:
        values['num_epochs'] = 0.0
    out_dir, state = values.get('out_dir', TrainConfig.out_dir), None
    if values.get('init_from') == 'auto':
        sources = [source for file in files if (source := read_config_file(file).get('init_from', 'auto')) != 'auto']
        values['init_from'] = 'resume' if checkpoint.holds_run(out_dir) else ['scratch', *sources][-1]
    if values.get('init_from') == 'resume':
        state = checkpoint.load_last(out_dir)
        if state.get('experiment'):
            raise UserError(f'{out_dir} is a run of train_diffusion_attention.py: go on with that, --resume={out_dir}')
        # the folder may have been moved or copied since
        values = state['config'] | values | {'out_dir': out_dir}
    return *build(values, TrainConfig, GPTConfig), state


def check_folder(config, model_config, resumed):
    """Raises UserError where a new run would destroy one: that in its own folder, its encoder, or its source of weights; or
    an exported model."""
    start = '' if config.init_from in ('scratch', 'resume') else config.init_from
    for name, folder in (('init_from', start), ('encoder', model_config.encoder)):
        if folder and os.path.realpath(folder.removeprefix('hf:')) == os.path.realpath(config.out_dir):
            raise UserError(f'out_dir={config.out_dir} is {name} too, which would be overwritten: name another --out_dir')
    if resumed is None and not config.eval_only and huggingface.holds_weights(config.out_dir):
        raise UserError(f"{config.out_dir} holds a model in Hugging Face's format: name another --out_dir; "
                        f'--init_from=hf:{config.out_dir} starts from its weights')
    if resumed is None and not config.eval_only and not config.overwrite and checkpoint.holds_run(config.out_dir):
        raise UserError(f'{config.out_dir} holds a run: --init_from=resume goes on with it, another --out_dir keeps it, '
                        '--overwrite=True removes it')


def train(config, model_config, resumed=None):
    """Trains as the two configs say. Returns the exit code: 0, or 128 + the number of the signal that stopped it."""
    with setup_ranks(config.device, config.backend, config.ddp_timeout) as ranks, \
            checkpoint.lock(config.out_dir) if ranks.first and not config.eval_only else nullcontext():
        if ranks.first:
            check_folder(config, model_config, resumed)
        starts = ranks.gather(resumed and (resumed['run_id'], resumed['iter_num']))
        if len(set(starts)) > 1:
            raise UserError(f'the ranks find different checkpoints in out_dir={config.out_dir}: it must be one folder that '
                            'all machines share')
        if not config.eval_only:
            checkpoint.check_shared(config.out_dir, ranks)
        return Trainer(config, model_config, ranks, resumed).train()


def main(argv):
    return train(*read_settings(argv))


if __name__ == '__main__':
    run(main)
