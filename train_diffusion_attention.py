"""
The heat-kernel attention experiment: does a diffusion time other than the softmax's make a language model better calibrated?

    python train_diffusion_attention.py --model=standard --dataset=wikitext-2 --max_tokens=500000
    python train_diffusion_attention.py --model=diffusion_fixed --fixed_t=0.28 --dataset=data/mine_bpe4096

The command line and the recipe of Curry, "Diffusion Attention" (zenodo 18004600), over the model and the loop of train.py.
A run writes to log_dir/exp_name: config.json, metrics.jsonl, metrics.json, best_model.pt and final_model.pt; sample.py
reads the folder, plot_results.py draws it. `--published=True` brings back the labels shifted twice, and the adaptive time
that sees the future; `--stride=1`, the default, is the published overlap of the training windows.
"""
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from model import LEAST_HEAT_TIME, GPTConfig
from nanodrift import checkpoint
from nanodrift.data import load_meta
from nanodrift.machine import setup_ranks
from nanodrift.metrics import Calibration, Mean, over_chunks, predictions, summarize
from nanodrift.objectives import IGNORE, NEXT_TOKEN, ignoring, sequence_positions
from nanodrift.options import UserError, build, check_options, option, read_values, run
from nanodrift.runs import read_lines
from nanodrift.system import write_atomically
from nanodrift.tokenizer import tokenizer_from_meta
from train import TrainConfig, Trainer

MODELS = ('standard', 'diffusion_fixed', 'diffusion_adaptive')
DATASETS = ('wikitext-2', 'wikitext-103')


@dataclass
class ExperimentConfig:
    """The published command line."""
    model: str = option('standard', 'softmax attention, or heat-kernel attention of a fixed or an adaptive time', MODELS)
    fixed_t: float = option(1.0, 'the diffusion time', at_least=LEAST_HEAT_TIME, needs={'model': 'diffusion_fixed'})
    n_layers: int = option(4, 'blocks', above=0)
    d_model: int = option(256, 'channels', above=0)
    d_ff: int = option(1024, 'channels inside the MLP', above=0)
    n_heads: int = option(4, 'attention heads per block', above=0)
    dropout: float = option(0.1, 'dropout probability')
    t_min: float = option(0.1, 'shortest adaptive time', above=0, needs={'model': 'diffusion_adaptive'})
    t_max: float = option(10.0, 'longest adaptive time', above=0, needs={'model': 'diffusion_adaptive'})
    published: bool = option(False, 'labels shifted twice and an adaptive time that sees the future, as published')
    epochs: float = option(10.0, 'passes over the training windows', above=0)
    max_iters: int = option(0, 'stop after so many steps, the schedule ending there; 0 goes by epochs')
    max_tokens: int = option(0, 'training tokens, a tenth of it for validation; 0 or None uses all')
    stride: int = option(1, 'tokens from one training window to the next; seq_len makes them disjoint', above=0)
    batch_size: int = option(32, 'windows per step', above=0)
    lr: float = option(3e-4, 'highest learning rate; cosine to a tenth of it', above=0)
    seq_len: int = option(256, 'the context, in tokens', above=0)
    dataset: str = option('wikitext-2', 'wikitext-2, wikitext-103, or the folder of a prepared data set')
    data_dir: str = option('data', 'where wikitext-2 and wikitext-103 are')
    ignore_text: str = option('', "leave the tokens of this text, ' <unk>' say, out of loss and metrics")
    eval_interval: int = option(500, 'steps between evaluations')
    eval_iters: int = option(50, 'batches per evaluation; 0 takes all of validation')
    save_every: int = option(0, 'steps between checkpoints that are kept; 0 or None keeps the best and the final one',
                             at_least=0)
    exp_name: str = option('', 'folder of the run below log_dir; empty or None is the model and the time')
    log_dir: str = option('logs', 'where the folders of the runs are')
    resume: str = option('', 'folder of a run to go on with, its settings come from there; empty or None starts anew')
    seed: int = option(1337, 'of weights, dropout and data order')
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    compile: bool = option(True, 'torch.compile, where it works')

    def __post_init__(self):
        check_options(self)
        if not self.t_min < self.t_max:
            raise UserError(f't_max={self.t_max} must be above t_min={self.t_min}')
        if self.d_model % self.n_heads:
            raise UserError(f'd_model={self.d_model} must be a multiple of n_heads={self.n_heads}')


# ---------------------------------------------------------------------------------------------------------------------
# what is learned and what is measured

def shifted_batch(tokens, rng, part=(0, 1)):
    """tokens (B, T+2) -> X, Y (B, T) as published: at every position the token after the next one."""
    return tokens[:, :-2].contiguous(), tokens[:, 2:].contiguous(), None


def measure(model, X, Y, W, calibrated=True, *, published, ignored=()):
    """Loss and accuracy of what was learned; calibration against the next token, which as published is another one. Tokens
    that are part of the sequence of ids `ignored` are not scored."""
    x = model.trunk(X)
    metrics = over_chunks(model, x, Y, predictions)
    following = Y
    if published:
        following = X.masked_fill(sequence_positions(X, ignored), IGNORE) if ignored else X
        following = torch.cat((following[:, 1:], torch.full_like(X[:, :1], IGNORE)), dim=1)
    metrics |= over_chunks(model, x, following, lambda logits, y: {'scored': Calibration.of(logits, y)})
    count = metrics['loss'].count
    for block in model.transformer.h:
        if getattr(block.attn, 'time', None) is not None:
            metrics[f't_{block.attn.layer}'] = Mean(block.attn.time.last.cpu().double() * count, count)
    return metrics


def summary(metrics):
    learned = summarize({name: metric for name, metric in metrics.items() if name != 'scored'})
    times = [learned.pop(name) for name in list(learned) if name.startswith('t_')]
    scored = metrics['scored'].value()
    numbers = learned | {'perplexity': float(torch.tensor(learned['loss']).exp())}
    numbers |= {('scored_accuracy' if name == 'accuracy' else name): value for name, value in scored.items()}
    return numbers | ({'diffusion_times': times} if times else {})


def experiment_objective(config, tokenizer):
    make_batch, window = NEXT_TOKEN.make_batch, NEXT_TOKEN.window
    if config.published:
        make_batch, window = shifted_batch, lambda block_size: block_size + 2
    ignored = tokenizer.encode(config.ignore_text) if config.ignore_text else ()
    if ignored:
        make_batch = ignoring(make_batch, ignored)
    return replace(NEXT_TOKEN, make_batch=make_batch, window=window, summary=summary,
                   metrics=partial(measure, published=config.published, ignored=ignored))


# ---------------------------------------------------------------------------------------------------------------------
# the run

def model_config(c):
    """The GPTConfig of an ExperimentConfig."""
    sizes = dict(block_size=c.seq_len, n_layer=c.n_layers, n_head=c.n_heads, n_embd=c.d_model, n_inner=c.d_ff,
                 dropout=c.dropout)
    if c.model == 'standard':
        return GPTConfig(**sizes)
    if c.model == 'diffusion_fixed':
        return GPTConfig(model_type='heat', heat_t=str(c.fixed_t), **sizes)
    assert c.model == 'diffusion_adaptive', 'one of MODELS'
    return GPTConfig(model_type='heat', heat_t='adaptive', heat_t_min=c.t_min, heat_t_max=c.t_max,
                     published=c.published, **sizes)


def train_config(c):
    """The TrainConfig of an ExperimentConfig: the published recipe."""
    folder = os.path.join(c.data_dir, c.dataset) if c.dataset in DATASETS else os.path.normpath(c.dataset)
    name = c.exp_name or f'{c.model}_{time.strftime("%Y%m%d_%H%M%S")}'
    length = dict(max_iters=c.max_iters) if c.max_iters else dict(num_epochs=c.epochs)
    out_dir = c.resume or os.path.join(c.log_dir, name)
    if not c.resume and checkpoint.holds_run(out_dir):
        raise UserError(f'{out_dir} holds a run: --resume={out_dir} goes on with it, another --exp_name starts a new one')
    return TrainConfig(
        out_dir=out_dir, init_from='resume' if c.resume else 'scratch',
        data_dir=os.path.dirname(folder) or '.', dataset=os.path.basename(folder), **length, max_tokens=c.max_tokens,
        stride=c.stride, batch_size=c.batch_size, learning_rate=c.lr, min_lr=c.lr / 10, weight_decay=0.01, beta2=0.999,
        grad_clip=1.0, eval_interval=c.eval_interval, eval_iters=c.eval_iters, keep_every=c.save_every, seed=c.seed,
        device=c.device, compile=c.compile)


def finish(out_dir):
    """The files that the published experiment leaves, from those of the loop."""
    evaluations = [entry for entry in read_lines(out_dir) if 'val_loss' in entry]
    names = dict.fromkeys(name for entry in evaluations for name in entry)
    path, columns = os.path.join(out_dir, 'metrics.json'), {name: [e.get(name) for e in evaluations] for name in names}
    try:
        write_atomically(path, json.dumps(columns, indent=1).encode())
    except OSError as e:
        raise UserError(f'cannot write {path}: {e.strerror}') from None
    checkpoint.hard_link(checkpoint.find(out_dir, 'best'), os.path.join(out_dir, 'best_model.pt'))
    checkpoint.hard_link(checkpoint.find(out_dir, 'last'), os.path.join(out_dir, 'final_model.pt'))


def with_none(argv):
    """Arguments in which None, as some published defaults are written, is what it means here."""
    meant = {'max_tokens': '0', 'save_every': '0', 'exp_name': '', 'resume': ''}
    argv = list(argv)
    for i, word in enumerate(argv):
        name, separate, value = word.removeprefix('--').partition('=')
        if name in meant and value == 'None':
            argv[i] = f'--{name}={meant[name]}'
        elif name in meant and not separate and argv[i + 1:i + 2] == ['None']:
            argv[i + 1] = meant[name]
    return argv


def read_settings(argv):
    """-> ExperimentConfig, and the checkpoint to resume or None. With --resume the settings are those of the run, but for
    what is given now, which may not change what is learned."""
    values, _ = read_values(with_none(argv), ExperimentConfig, description=__doc__)
    if not values.get('resume'):
        return build(values, ExperimentConfig)[0], None
    state = checkpoint.load_last(values['resume'])
    before = state.get('experiment')
    if not before:
        raise UserError(f"resume={values['resume']!r} was not made by this script, or by an older one of it")
    for name in ('model', 'fixed_t', 'n_layers', 'd_model', 'd_ff', 'n_heads', 't_min', 't_max', 'seq_len', 'published',
                 'dataset', 'max_tokens', 'stride', 'ignore_text', 'exp_name', 'log_dir'):
        if values.get(name, before[name]) != before[name]:
            raise UserError(f'{name}={values[name]}: a resumed run keeps {name}={before[name]!r}')
    return build(before | values, ExperimentConfig)[0], state


def main(argv):
    c, resumed = read_settings(argv)
    config = train_config(c)
    meta = load_meta(os.path.join(config.data_dir, config.dataset))
    objective = experiment_objective(c, tokenizer_from_meta(meta['tokenizer']))
    with setup_ranks(config.device, config.backend, config.ddp_timeout) as ranks:
        if ranks.world_size > 1:
            raise UserError('this experiment trains in one process: start it without torchrun')
        with checkpoint.lock(config.out_dir):
            code = Trainer(config, model_config(c), ranks, resumed, objective, asdict(c) | {'resume': ''}).train()
            finish(config.out_dir)
    return code


if __name__ == '__main__':
    run(main)
