"""
Whether all types keep to the device that they are on, shown without a GPU: see second_device.py. What stands for speed is
counted on the way.
"""
import json
from dataclasses import replace
from functools import partial

import pytest
import second_device
import torch
from conftest import QUICK, WAYS
from test_machine import finish
from test_train import metrics

import play
import train
from nanodrift import drafting, kernels, kv_cache
from nanodrift.machine import Ranks
from nanodrift.refinement import ORDERS, REMASKS, RefineConfig
from nanodrift.tokenizer import ByteTokenizer

# of a training step of the tiny models: operations that are not views, and MB that they read and write. A loop over
# positions or rows, or a chunk that is too small, goes past these. Drifting takes its field in dozens of feature sets.
OPERATIONS = {'drafts': 350, 'rotating': 390, 'duo': 500, 'blocks': 400, 'shifted blocks': 410, 'drifting': 2050,
              'token drift': 1350}
MEGABYTES = {'drafts': 7, 'duo': 8, 'blocks': 6, 'shifted blocks': 12, 'drifting': 23, 'token drift': 13}


every_way = pytest.mark.parametrize('model_type', [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow)
                                                   for way in WAYS])


def on_second_device(function, argv, path, *args):
    """Calls function(trainer, mode, *args) with all of a run on the second device, writes what it returns, as JSON."""
    device = second_device.register()
    config, model_config, _ = train.read_settings(argv)
    with second_device.SecondDevice() as mode:
        trainer = train.Trainer(config, model_config, Ranks(device=device))
        found = function(trainer, mode, *args)
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(found, f)
    return 0


@pytest.fixture
def second(fork, command_line, tmp_path):
    """second(function, *args, **settings) -> what function(trainer, mode, *args) returned in a fork."""
    def call(function, *args, **settings):
        path = tmp_path / 'found.json'
        finish([fork(on_second_device, function, command_line(**settings), str(path), *args)], tmp_path)
        return json.loads(path.read_text())
    return call


def step(trainer, mode):
    """The counts of a second step; before it, the validation loss at the start, and the first loss and norm of gradients."""
    numbers = [trainer.evaluate('val')[trainer.objective.val_metric]]
    trainer._step()
    numbers += first_step(trainer.config.out_dir)
    mode.clear()
    trainer._step()
    assert trainer.model.device.type == second_device.SECOND
    return mode.operations, mode.bytes / 1e6, mode.copied, mode.waits.total(), mode.awaited, numbers


def late_step(trainer, mode):
    """The waits and the awaited copies of a step as on a GPU, where reading what came of the one before is no wait."""
    trainer.late = True
    trainer._step()
    trainer.outcome = None
    mode.clear()
    trainer._step()
    return mode.waits.total(), mode.awaited


def test_a_step_of_gpt2_waits_for_nothing(second):
    """`make gpu` holds it to this on a GPU. The copies are the batch, which is there copied ahead from pinned memory."""
    assert second(late_step) == [0, 2]


def score_statistics(trainer, mode, T):
    """Forward and backward of one head: operations, and how often they read or write T x T floats."""
    q, k = (torch.randn(1, T, 32).to(trainer.ranks.device) for _ in range(2))
    found = []
    mode.operations, mode.bytes = 0, 0
    top, purity, lse, best = kernels.score_statistics._init_fn(q, k)  # the operator itself counts as one operation
    found += mode.operations, mode.bytes / (4 * T * T)
    kernels.score_statistics_backward._init_fn(q, k, best, purity, lse, top, purity)
    return found + [mode.operations - found[0], mode.bytes / (4 * T * T) - found[1]]


def test_what_adaptive_heat_costs(second):
    """The numbers of docs/scaling.md."""
    more = {'model_type': 'heat', 'heat_t': 'adaptive'}
    operations, megabytes, *_ = second(step, **more)
    assert operations <= 416 and megabytes <= 6.5  # gpt2: 244 and 3.5
    forward, reads, backward, reads_back = second(score_statistics, 1024, out_dir='statistics', **more)
    assert (forward, backward) <= (156, 154) and reads < 8 and reads_back < 12.5


def as_there(trainer):
    """Has a trainer on the CPU make its batches as on a GPU."""
    if make := trainer.objective.device_batch:
        trainer.objective = replace(trainer.objective, make_batch=lambda tokens, rng, part: make(tokens, part, 'cpu'))


def first_step(out_dir):
    entry = next(entry for entry in metrics(out_dir) if 'grad_norm' in entry)
    return [entry['loss'], entry['grad_norm']]


@every_way
def test_training_and_evaluation_keep_to_their_device(second, tiny, model_type):
    """And compute there what they compute on the CPU; without dropout and noise, which are others."""
    settings = {'model_type': model_type} | ({'apply_diffusion': False} if model_type == 'dd' else {})
    operations, megabytes, copied, waits, awaited, numbers = second(step, **settings)
    assert copied < 8192  # the ids and places of drifting are half of this, and its noise, 4 x 16 x 16 floats, another half
    assert operations <= OPERATIONS.get(model_type, 300) and megabytes <= MEGABYTES.get(model_type, 4.2)
    assert waits <= 3
    assert awaited <= 3  # the batch, which on a GPU is copied ahead from pinned memory
    trainer = train.Trainer(*tiny(out_dir='cpu', **settings), Ranks())
    as_there(trainer)
    val = trainer.evaluate('val')[trainer.objective.val_metric]
    trainer._step()
    # attention is another function there
    assert numbers == pytest.approx([val, *first_step(trainer.config.out_dir)], rel=1e-3)


def batch_and_step(trainer, mode):
    """The noise and styles of iteration 3 before and after a step, and what came of this step."""
    c = trainer.config
    here = [[t.tolist() for t in trainer._batch(3, 3 * 8, micro)[:2]] for micro in range(c.gradient_accumulation_steps)]
    trainer._step()
    again = [[t.tolist() for t in trainer._batch(3, 3 * 8, micro)[:2]] for micro in range(c.gradient_accumulation_steps)]
    assert here == again, 'a batch depends on its number alone: resuming is exact'
    noise, style = zip(*here)
    return sum(noise, []), sum(style, []), first_step(c.out_dir)


def test_however_an_iteration_is_split_its_noise_is_the_same(second):
    """Each split may also be one of ranks, which take micro-batches in turn."""
    whole, halves, quarters = (
        second(batch_and_step, model_type='drifting', drift_positives=0, out_dir=str(B), batch_size=B,
               gradient_accumulation_steps=8 // B) for B in (8, 4, 2))
    assert len(whole[0]) == 8 and whole[:2] == halves[:2] == quarters[:2]
    assert whole[2] == pytest.approx(halves[2], rel=1e-4) and whole[2] == pytest.approx(quarters[2], rel=1e-4)


def write(trainer, mode, ways):
    """What a model of this type can write, in all of these ways."""
    trainer.objective = replace(trainer.objective, metrics=partial(trainer.objective.metrics, calibrated=True))
    trainer.evaluate('val')  # as evaluate.py does
    model, c = trainer.model.eval(), trainer.model.config
    prompt = torch.arange(6, device=model.device).view(3, 2)
    for way in ways:
        if way == 'refine':
            for strategy in ORDERS:
                refined(model, strategy, 'none')
            for remask in REMASKS:
                refined(model, 'ancestral', remask)
        elif way == 'at once':
            for temperature in (1.0, 0.5):
                ids = model.generate_at_once(2, temperature, seed=1, prefix=torch.arange(2))
        elif way in ('ngram', 'own'):
            for _ in drafting.generate(model, prompt, 6, 2, seed=1, top_k=5, own=way == 'own'):
                pass
        elif way == 'recorded':
            kv_cache.RECORDED, kv_cache.RECORDED_AFTER, waits = (second_device.SECOND,), 0, mode.waits.total()
            kv_cache.RECORDED_FROM = 8
            for _ in model.generate(prompt[:, :1], 12, seed=1):
                pass
            assert mode.waits.total() == waits
        else:
            more = c.block_size if way == 'past the window' else 5
            ids = torch.stack(list(model.generate(prompt, more, top_k=9, top_p=0.9, seed=1, use_cache=way != 'no cache')))
            assert ids.device.type == second_device.SECOND
    return mode.waits.total()


def refined(model, strategy, remask):
    if model.config.diffusion_objective != 'repair' and (strategy == 'naive' or remask == 'flag'):
        return  # not defined
    canvas = torch.full((3, 12), model.config.vocab_size, device=model.device)
    canvas[:, 0] = 1
    options = RefineConfig(strategy=strategy, remask=remask, max_steps=3)
    barred = 2, torch.ones_like(canvas, dtype=torch.bool)
    *_, last = model.refine(canvas, options, seed=1, barred=barred)
    assert last.ids.device.type == second_device.SECOND


CAUSAL = ('cache', 'no cache', 'past the window', 'ngram', 'recorded')


@every_way
def test_generation_and_refinement_keep_to_their_device(second, model_type):
    ways = {'diffusion': ['refine'], 'blocks': ['refine'], 'shifted blocks': ['refine'], 'token drift': ['refine'],
            'drifting': ['at once'], 'drafts': [*CAUSAL, 'own']}.get(model_type, CAUSAL)
    second(write, list(ways), model_type=model_type)


def play_tasks(trainer, mode):
    """The errors of two tasks. Repair is left out: the second device has no inference mode of its own."""
    side = object.__new__(play.Side)
    side.model, side.tokenizer, side.dtype, side.title = trainer.model.eval(), ByteTokenizer(), 'float32', 'a model'
    side.write, side.settings = play.WAYS.get(trainer.model.config.model_type, play.LEFT_TO_RIGHT)
    errors = []
    for task, text in zip((play.CONTINUE, play.GAPS), ('ab', 'a___b')):
        *_, (_, answer) = play.answers([side], task, text, 1, [{}])
        errors.append(answer.error)
    return errors


@pytest.mark.parametrize('model_type', ['gpt2', *(pytest.param(kind, marks=pytest.mark.slow)
                                                  for kind in ('diffusion', 'blocks', 'drifting'))])
def test_the_page_keeps_to_the_device(second, model_type):
    fills_gaps = model_type in ('diffusion', 'blocks')
    assert [not error for error in second(play_tasks, model_type=model_type)] == [True, fills_gaps]


def mix(trainer, mode, what):
    x = torch.ones(4, device=trainer.ranks.device)
    faults = {'tensors': lambda: x + torch.ones(4), 'index': lambda: x[torch.arange(2)],
              'generator': lambda: torch.rand(4, generator=torch.Generator(), device=x.device)}
    with pytest.raises(second_device.Mixed):
        faults[what]()
    assert float((x * 2).sum()) == 8 and x.cpu().device.type == 'cpu'


@pytest.mark.parametrize('what', ['tensors', 'index', 'generator'])
def test_a_mixture_of_devices_is_seen(second, what):
    second(mix, what)
