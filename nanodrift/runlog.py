"""
What a run says: metrics.jsonl, config.json, the terminal, and wandb when asked.
"""
import json
import math
import os
import sys

import torch
from tqdm import tqdm

from nanodrift import checkpoint
from nanodrift.options import UserError
from nanodrift.system import write_atomically

# of an evaluation, on the terminal; everything is in metrics.jsonl
SHOWN = {'train_loss': 'train loss', 'val_loss': 'val loss', 'val_accuracy': 'accuracy',
         'val_bits_per_byte': 'bits per byte', 'val_bits_per_byte_bound': 'bits per byte', 'val_floor': 'floor',
         'val_diversity': 'diversity'}


def tell(line, file=None):
    """Prints a line above the progress bar, on stdout if no other file is named. Where nobody reads any more (`| head`, a
    terminal that was closed), all further ones are lost."""
    try:
        tqdm.write(line, file=file)
        (file or sys.stdout).flush()
    except OSError:
        name = 'stderr' if file is sys.stderr else 'stdout'
        setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))


class RunLog:
    """metrics.jsonl, the terminal, and wandb when asked. Lives on the first rank."""

    def __init__(self, trainer, keep_bytes):
        self.trainer, self.config = trainer, trainer.config
        try:
            self.file = self._open(keep_bytes)
            self._write_config()
        except OSError as e:
            raise UserError(f'cannot write to out_dir={self.config.out_dir}: {e.strerror}') from None
        tokens = trainer.examples_per_iter * trainer.model.config.block_size
        trainer.say(f'{trainer.model.num_params() / 1e6:.2f}M parameters, {tokens:,} tokens per iteration, '
                    f'{trainer.schedule.max_iters} iterations, {trainer.ranks.device}, {trainer.dtype}')
        self.tokens_per_iter, self.window, self.seconds = tokens, 0, 0.0
        self.bar = tqdm(total=trainer.schedule.max_iters, initial=trainer.iter_num, disable=None, unit='it',
                        dynamic_ncols=True)
        self.wandb = start_wandb(trainer) if self.config.wandb_log else None

    def _open(self, keep_bytes):
        """metrics.jsonl: empty for a new run, else cut to what the checkpoint knows; what came after is done again.
        An evaluation alone only adds its line, for the run may be under way; that of another model leaves no line."""
        os.makedirs(self.config.out_dir, exist_ok=True)
        if self.config.eval_only and self.config.init_from != 'resume' and checkpoint.holds_run(self.config.out_dir):
            return open(os.devnull, 'ab', buffering=0)
        file = open(os.path.join(self.config.out_dir, 'metrics.jsonl'), 'ab', buffering=0)
        if not self.config.eval_only and file.tell() > keep_bytes:
            file.truncate(keep_bytes)
            file.seek(0, os.SEEK_END)
        return file

    def _write_config(self):
        t = self.trainer
        facts = {'run_id': t.run_id, 'parents': t.parents, 'commit': t.commit, 'argv': sys.argv,
                 'torch': torch.__version__, 'device_used': str(t.ranks.device), 'dtype_used': t.dtype,
                 'world_size': t.ranks.world_size, 'threads': torch.get_num_threads(),
                 'max_iters_used': t.schedule.max_iters}
        path = os.path.join(self.config.out_dir, 'config.json')
        if self.config.eval_only and os.path.exists(path):
            return  # it describes the run
        settings = t.settings() | facts | ({'experiment': t.experiment} if t.experiment else {})
        write_atomically(path, json.dumps(settings, indent=2).encode())

    def bytes(self):
        """The length of metrics.jsonl, which is then on disk: it may not lack what a checkpoint says that it has."""
        try:
            os.fsync(self.file.fileno())
        except OSError as e:
            raise self._cannot_write(e) from None
        return self.file.tell()

    def _cannot_write(self, error):
        return UserError(f'cannot write to {self.file.name}: {error.strerror}; the checkpoints are untouched')

    def _write(self, entry):
        entry = {'iter': self.trainer.iter_num, **entry}
        try:
            self.file.write((json.dumps(finite(entry)) + '\n').encode())
        except OSError as e:
            raise self._cannot_write(e) from None
        if self.wandb:
            try:
                self.wandb.log(entry, step=self.trainer.iter_num)
            except Exception as e:
                self.trainer.say(f'wandb stopped logging: {e}')
                self.wandb = None

    def step(self, loss, lr, norm, seconds):
        """After every iteration; every log_interval-th is written, with the mean speed since the last."""
        self.bar.update()
        self.window, self.seconds = self.window + 1, self.seconds + seconds
        if self.trainer.iter_num % self.config.log_interval:
            return
        speed = self.window * self.tokens_per_iter / self.seconds
        self.window, self.seconds = 0, 0.0
        self._write({'loss': loss, 'lr': lr, 'grad_norm': norm, 'tokens_per_s': round(speed, 1)})
        self.bar.set_postfix_str(f'loss {loss:.3f}, {speed:,.0f} tokens/s')
        if self.bar.disable:
            left = (self.trainer.schedule.max_iters - self.trainer.iter_num) * self.tokens_per_iter / speed
            tell(f'iter {self.trainer.iter_num}: loss {loss:.4f}, {speed:,.0f} tokens/s, {left / 60:.1f} min left')

    def evaluation(self, metrics):
        """{name: value} of one evaluation; a loss in nats per token is given in bits per byte as well. A line on the
        terminal has the most important numbers, metrics.jsonl has all."""
        if self.trainer.objective.val_metric in ('loss', 'nelbo'):
            val = self.trainer.meta['splits']['val']
            name = 'val_bits_per_byte' + '_bound' * (self.trainer.objective.val_metric == 'nelbo')
            metrics[name] = metrics['val_loss'] / math.log(2) * val['tokens'] / val['bytes']
        self._write(metrics)
        shown = [f'{title} {metrics[name]:.4f}' for name, title in SHOWN.items() if name in metrics]
        line = f'iter {self.trainer.iter_num}: {", ".join(shown)}'
        if self.trainer.objective.val_metric == 'nelbo':  # it is a bound
            line = line.replace('val loss', 'val loss <=').replace('bits per byte', 'bits per byte <=')
        self.trainer.say(line)
        if metrics.get('val_collapsed'):
            self.trainer.say('the generator has collapsed: fewer than half of the distinct 2-grams of real text')

    def diverged(self):
        self._write({'diverged': True})

    def close(self):
        self.bar.close()
        self.file.close()
        if self.wandb:
            try:
                self.wandb.finish()
            except Exception as e:
                self.trainer.say(f'wandb did not finish: {e}')


def finite(value):
    """`value` with None for what JSON does not know: infinities and what is not a number."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value if math.isfinite(value) else None


def start_wandb(trainer):
    """A wandb run, or None with a line that says why: a logger may never block or break a run."""
    try:
        import wandb
        has_key = 'WANDB_API_KEY' in os.environ or wandb.api.api_key
        mode = os.environ.get('WANDB_MODE') or ('online' if has_key else 'offline')  # never ask for a login
        c = trainer.config
        return wandb.init(project=c.wandb_project, name=c.wandb_run_name or os.path.basename(c.out_dir), mode=mode,
                          dir=c.out_dir, config=trainer.settings(), id=trainer.run_id, resume='allow',
                          settings=wandb.Settings(init_timeout=30, finish_timeout=60))
    except Exception as e:
        trainer.say(f'training without wandb: {type(e).__name__}: {e}')
        return None
