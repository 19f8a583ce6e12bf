"""What a run needs: what small models keep, counted and extrapolated, and the table."""
import json
import math
import re

import pytest
import torch
from conftest import ROOT
from test_machine import finish
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import train
from model import GPT, TYPES
from nanodrift import drifting, plan, sharding
from nanodrift.machine import Ranks, setup_ranks
from nanodrift.options import UserError
from nanodrift.variants import VARIANTS, first_of_each_type


def test_what_autograd_keeps():
    """Two products keep the input and what is between them; the ReLU keeps its own output, which is that."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with plan.Kept(model) as kept:
        model(torch.zeros(3, 4))
    assert kept.bytes == 4 * (3 * 4 + 3 * 8)


SHOWN = [name for name in VARIANTS if name in (*first_of_each_type(VARIANTS), *plan.ALSO)]  # the rows of docs/scaling.md


def quick(names, all_names):
    """All names, those that are not in `names` as slow cases."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in all_names]


def three_sizes(*sizes):
    """The first is quick."""
    return pytest.mark.parametrize('n_layer, n_head, n_embd, block_size', [
        sizes[0], *(pytest.param(*size, marks=pytest.mark.slow) for size in sizes[1:])])


def model_of(name, vocab_size, **sizes):
    c, encoder = bench.model_of(VARIANTS[name], **sizes, vocab_size=vocab_size)
    return GPT(c, GPT(encoder).eval() if encoder else None)


@pytest.mark.parametrize('name', SHOWN)
@three_sizes((4, 2, 128, 64), (6, 3, 192, 96), (2, 4, 256, 128))
def test_larger_models_keep_what_the_plan_says(name, n_layer, n_head, n_embd, block_size):
    """Within a tenth: of a step over 2 texts more, whatever does not grow with these."""
    model = model_of(name, 128, n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size)
    measured = plan.kept_bytes(model, 4) - plan.kept_bytes(model, 2)
    per_token = bench.kept_per_token(tuple(VARIANTS[name].items()))
    assert per_token.bytes(model.config, 2 * block_size) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize('name', quick(SHOWN, VARIANTS))
@three_sizes((2, 4, 256, 128), (4, 4, 256, 512), (4, 6, 384, 1024))
def test_operations_are_those_that_torch_counts(name, n_layer, n_head, n_embd, block_size):
    """Forward and backward of a step over 2 texts, attention as plain matrix products. heat distance pads its heads. The
    counter does not look into the operator of adaptive heat's statistics."""
    model = model_of(name, 512, n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size)
    objective, rng = model.objective, torch.Generator().manual_seed(0)
    batches = [objective.make_batch(torch.randint(512, (2, objective.window(block_size)), generator=rng), rng)]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if objective.compute_targets:
            batches = objective.compute_targets(model, batches, Ranks(), rng)
        model(*batches[0], return_logits=False)[1].backward()
    band = 0.04 if name == 'heat distance' else 0.02
    assert model.flops_per_token() == pytest.approx(counter.get_total_flops() / (2 * block_size), rel=band)


def count_sent(argv):
    """Bytes that a rank of two sends in a step, by the sizes of what gloo is given, against those of the plan."""
    config, model_config, _ = train.read_settings(argv)
    ranks = setup_ranks('cpu', 'gloo', 60)
    trainer = train.Trainer(config, model_config, ranks)
    trainer._step()  # the first one also broadcasts
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        trainer._step()
    measured = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() in ('gloo:all_gather', 'gloo:all_reduce'):
            shape = event.shapes()[0]
            # gloo all-reduces what fsdp only reduces and scatters, in one dimension: half of that would do
            scattered = event.name() == 'gloo:all_reduce' and len(shape) == 1 and config.sharding == 'fsdp'
            measured += 4 * math.prod(shape) / (2 if scattered else 1)
    model, h = trainer.model, sharding.blocks_of(trainer.model)
    numbers = [sum(math.prod(p.shape) for p in part.parameters()) for part in (model, h[0], h)]
    sent = plan.Weights(*numbers, forward=1 + model.config.outputs_embeddings).sent_bytes(2)[config.sharding == 'fsdp']
    if model.encoder:
        sent += config.batch_size * drifting.exchanged_bytes(model.encoder, model.config)
    torch.distributed.barrier()
    assert measured == pytest.approx(sent, rel=0.02)
    return 0


@pytest.mark.parametrize('sharding', ['none', 'fsdp'])
@pytest.mark.parametrize('model_type', quick(('gpt2',), TYPES))
def test_two_ranks_send_what_the_plan_says(command_line, fork_ranks, tmp_path, model_type, sharding):
    sizes = dict(n_embd=64, n_layer=4, max_iters=2, gradient_accumulation_steps=2)
    more = {'encoder': str(tmp_path / 'encoder'), 'drift_positives': 0} if model_type == 'drifting' else {}
    if more:
        assert train.main(command_line(out_dir='encoder', **sizes)) == 0
    finish(fork_ranks(count_sent, command_line(model_type=model_type, sharding=sharding, **sizes, **more)), tmp_path)


@pytest.mark.parametrize('name', ['gpt2', 'rotating lr', 'diffusion', 'drifting'])
def test_parameters_and_operations_are_those_of_the_model(monkeypatch, name):
    monkeypatch.setattr(plan, 'SIZES', {'tiny': (2, 2, 64)})
    found = bench.plan_row(VARIANTS[name], 'tiny', 1)
    model = model_of(name, 50257, n_layer=2, n_head=2, n_embd=64)
    assert found['parameters'] == sum(p.numel() for p in model.parameters())
    assert found['gflop_per_token'] == pytest.approx(model.flops_per_token() / 1e9)


def test_gpt2_at_124M_by_hand():
    found = bench.plan_row({}, '124M', 12)
    P, C = found['parameters'], 768
    assert P == pytest.approx(124.4e6, rel=0.001)
    assert found['memory_gb_ddp'] == pytest.approx(18 * P / 1e9 + found['kept_gb'] + 5)
    assert found['sent_gb_ddp_8'] == pytest.approx(2 * 7 / 8 * 4 * P / 1e9)
    assert found['sent_ms_ddp_8'] == pytest.approx(found['sent_gb_ddp_8'] / 300 * 1e3)
    assert found['sent_gb_fsdp_16'] == pytest.approx(15 / 16 * 12 * P / 1e9)
    blocks = 12 * (12 * C * C + 13 * C)
    gathered = P - blocks + blocks / 6  # embeddings, and two of twelve blocks
    assert found['memory_gb_fsdp_8'] == pytest.approx((16 * P / 8 + 8 * gathered) / 1e9 + found['kept_gb'] + 5)
    assert found['texts_ddp'] == int((75e9 - 18 * P) / (found['kept_gb'] * 1e9 / 12))


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(plan, 'SIZES', {'tiny': (2, 2, 64), 'small': (4, 2, 128)})
    bench.main(['--part=plan', '--variants=gpt2,diffusion blocks', '--batch_size=2'])
    said = capsys.readouterr().out
    assert 'not run on a GPU' in said
    found = json.loads(said.splitlines()[-1])
    assert set(found) == {'tiny', 'small'} and found['small']['gpt2']['kept_gb'] > found['tiny']['gpt2']['kept_gb'] > 0
    assert found['tiny']['diffusion blocks']['kept_gb'] > 1.5 * found['tiny']['gpt2']['kept_gb']
    with pytest.raises(UserError, match='gpt3'):
        bench.main(['--part=plan', '--variants=gpt3'])


def rows_of(text):
    """(what it is, numbers) of each row of the two tables."""
    number = r'(?<=[ (])\d[\d,]*\.?\d*(?=[ )])'
    rows = re.findall(r'^\| (?:(?:124M|355M|1\.5B) \| `|`[^|]*` \| \d+ /).*$', text, re.MULTILINE)
    return [(re.sub(number, '', row), [float(word.replace(',', '')) for word in re.findall(number, row)]) for row in rows]


@pytest.mark.slow
def test_the_tables_of_the_document_are_those_of_the_command(capsys):
    """Nearly: another version of torch may keep a little more."""
    with open(f'{ROOT}/docs/scaling.md', encoding='utf-8') as f:
        document = f.read()
    bench.main(re.search(r'^python bench.py (--part=plan.*)$', document, re.MULTILINE)[1].split())
    found, shown = rows_of(capsys.readouterr().out), rows_of(document)
    assert len(found) == 4 * len(SHOWN) and [what for what, _ in found] == [what for what, _ in shown]
    for (what, mine), (_, theirs) in zip(found, shown):
        assert mine == pytest.approx(theirs, rel=0.03, abs=0.1), what
