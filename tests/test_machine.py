"""
Several ranks, here two processes and gloo on a CPU, must compute what one does.
"""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, WAYS, resume
from test_train import HARD, assert_same_run, every_type, lines, load, metrics

import train
from nanodrift import checkpoint, jobs, machine, options
from nanodrift.machine import ROLL_CALL, Ranks, pick_device, setup_ranks
from nanodrift.options import UserError

TWO = dict(gradient_accumulation_steps=2)
CONTINUOUS = ('iter', 'lr', 'loss', 'grad_norm')  # of what is logged of a field


def train_rank(argv):
    return train.main(argv)


def finish(processes, tmp_path, code=0):
    for process in processes:
        process.join(120)
    said = (tmp_path / 'fork.out').read_text()
    assert [process.exitcode for process in processes] == [code] * len(processes), said
    return said


def without_noise(model_type):
    """Each rank draws noise of its own, so that only without it two ranks can be one."""
    return {'model_type': model_type} | ({'apply_diffusion': False} if model_type == 'dd' else {})


def assert_near(weights, others, band=1e-6):
    assert list(weights) == list(others)
    for name, weight in weights.items():
        assert (weight - others[name]).abs().max() < band, name


@pytest.mark.slow
@every_type
@pytest.mark.parametrize('order, grad_clip, more', [('epoch', 0.0, {}), ('random', 0.1, {}),
                                                    ('random', 0.1, {'sharding': 'fsdp', 'ema': 0.5})])
def test_two_ranks_train_as_one(tiny, command_line, fork_ranks, tmp_path, model_type, order, grad_clip, more):
    """The same global batch, 2 micro-batches on one rank or 1 on each of two. The log holds global loss and norm."""
    overrides = TWO | without_noise(model_type) | dict(data_order=order, grad_clip=grad_clip, max_iters=5) | more
    one, model_config = tiny(out_dir='one', **overrides)
    train.train(one, model_config)
    finish(fork_ranks(train_rank, command_line(out_dir='two', **overrides)), tmp_path)
    a, b = load(one.out_dir), load(str(tmp_path / 'two'))
    assert list(a['model']) == list(b['model'])  # no prefixes
    # Sharding adds up gradients in another order, and ranks do so with a field. Where a gradient is near 0, Adam turns the
    # difference into a large step.
    field = model_type in ('drifting', 'token drift')
    band = 1e-4 if more or field else 1e-6
    for weights in ('model', 'ema'):
        assert_near(a[weights], b[weights], band)
    for mine, theirs in zip(metrics(one.out_dir), metrics(tmp_path / 'two'), strict=True):
        assert {k for k, v in mine.items() if v is None} == {k for k, v in theirs.items() if v is None}
        # the field at temperature 0.02 magnifies differences of weights 50 times, and counts of n-grams jump
        known = {k: v for k, v in mine.items() if v is not None and (not field or mine['iter'] == 0 or k in CONTINUOUS)}
        close = {'rel': 1e-5} if band == 1e-6 else {'rel': 1e-2 if field and mine['iter'] else 1e-4, 'abs': 1e-6}
        assert known == pytest.approx({k: theirs[k] for k in known}, **close)


def save_gradients(argv, path):
    """Gradients of one step at the learning rate 0, from rank 0."""
    config, model_config, _ = train.read_settings(argv)
    ranks = setup_ranks('cpu', 'gloo', 60)
    trainer = train.Trainer(config, model_config, ranks)
    trainer.optimizer.zero_grad = lambda set_to_none: None
    trainer._step()
    if ranks.first:
        torch.save({name: p.grad for name, p in trainer.model.named_parameters()}, path)
    torch.distributed.barrier()
    return 0


@every_type
def test_gradients_of_two_ranks_are_those_of_one(tiny, command_line, fork_ranks, tmp_path, model_type):
    """Two micro-batches on each of two ranks: the first is accumulated without an exchange."""
    overrides = dict(gradient_accumulation_steps=4, grad_clip=0) | without_noise(model_type)
    finish(fork_ranks(save_gradients, command_line(out_dir='two', **overrides), str(tmp_path / 'two.pt')), tmp_path)
    two = torch.load(tmp_path / 'two.pt', weights_only=True)
    trainer = train.Trainer(*tiny(out_dir='one', **overrides), Ranks())
    trainer.optimizer.zero_grad = lambda set_to_none: None
    trainer._step()
    for name, p in trainer.model.named_parameters():
        largest = p.grad.abs().max()
        assert (p.grad - two[name]).abs().max() <= min(1e-6 * max(1, largest), largest / 10), name


SHARDED = TWO | {'sharding': 'fsdp', 'max_iters': 2, 'eval_interval': 2, 'decay_lr': False}


@pytest.mark.parametrize('model_type', ['gpt2', *(pytest.param(kind, marks=pytest.mark.slow) for kind in WAYS[1:])])
def test_a_sharded_run_goes_on_in_one_process_and_back(tiny, command_line, fork_ranks, tmp_path, model_type):
    """Its checkpoint is that of one process: 2 ranks, then 1, then 2 unsharded, then 2 take the steps of one."""
    overrides = SHARDED | without_noise(model_type) | {'ema': 0.5}
    finish(fork_ranks(train_rank, command_line(**overrides)), tmp_path)
    run = str(tmp_path / 'run')
    assert resume(run, '--max_iters=4') == 0
    for more in (['--max_iters=6', '--sharding=none'], ['--max_iters=8', '--sharding=fsdp']):
        finish(fork_ranks(train_rank, ['--init_from=resume', f'--out_dir={run}', *more]), tmp_path)
    one, model_config = tiny(out_dir='one', **overrides | {'max_iters': 8})
    train.train(one, model_config)
    a, b = load(one.out_dir), load(run)
    for weights in ('model', 'ema'):
        assert_near(a[weights], b[weights], 1e-4)  # a bias of k has no gradient but rounding, which Adam makes large
    both = [[e['val_loss'] for e in metrics(folder) if 'val_loss' in e] for folder in (run, one.out_dir)]
    assert len(both[0]) == len(both[1]) == 5
    if model_type != 'drifting':  # whose val_loss counts 2-grams
        assert both[0] == pytest.approx(both[1], rel=1e-3 if model_type == 'token drift' else 1e-5)
    if 'lm_head.weight' in b['model']:
        assert b['model']['lm_head.weight'].data_ptr() == b['model']['transformer.wte.weight'].data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize('more', [{'compile': True, 'dtype': 'bfloat16'}, {'dtype': 'float16'},
                                  {'gradient_checkpointing': True, 'gradient_accumulation_steps': 4}])
def test_sharded_compiled_and_recomputed(tiny, command_line, fork_ranks, tmp_path, more):
    finish(fork_ranks(train_rank, command_line(out_dir='sharded', **SHARDED | more)), tmp_path)
    one, model_config = tiny(out_dir='one', **SHARDED | more | {'compile': False, 'gradient_checkpointing': False})
    train.train(one, model_config)
    a, b = ([e['loss'] for e in metrics(out_dir) if 'loss' in e] for out_dir in (one.out_dir, tmp_path / 'sharded'))
    assert a == pytest.approx(b, rel=1e-2 if 'dtype' in more else 1e-6)


def overflow_on_one_rank(argv):
    """In float16, an infinite gradient in the share of rank 1 alone: ends with 0 where both ranks skip the update."""
    config, model_config, _ = train.read_settings(argv)
    trainer = train.Trainer(config, model_config, setup_ranks('cpu', 'gloo', 60))
    real, before = trainer.scaler.unscale_, [p.to_local().clone() for p in trainer.model.parameters()]

    def unscale(optimizer):
        if trainer.ranks.rank == 1:
            next(trainer.model.parameters()).grad.to_local().fill_(float('inf'))
        real(optimizer)
    trainer.scaler.unscale_, scale = unscale, trainer.scaler.get_scale()
    trainer._step()
    same = all(torch.equal(b, p.to_local()) for b, p in zip(before, trainer.model.parameters()))
    return 0 if same and trainer.scaler.get_scale() == scale / 2 else 1


@pytest.mark.slow
def test_an_overflow_on_one_rank_skips_the_update_on_all(command_line, fork_ranks, tmp_path):
    finish(fork_ranks(overflow_on_one_rank, command_line(**SHARDED | {'dtype': 'float16'})), tmp_path)


def train_rank_on_its_own_data(argv):
    """Each rank has a data set of its own in the same place, as machines that share nothing have."""
    real = train.load_meta

    def load_meta(folder):
        meta = real(folder)
        meta['splits']['train']['text_sha256'] += os.environ['RANK']
        return meta
    train.load_meta = load_meta
    return exit_code(argv)


def train_rank_on_other_weights(argv, key):
    """The folder that this key names is another one on the machine of rank 1."""
    return exit_code([word + os.environ['RANK'] * word.startswith(f'--{key}=') for word in argv])


@pytest.mark.parametrize('key', ['init_from', 'encoder'])
def test_ranks_that_find_different_weights(tiny, command_line, fork_ranks, tmp_path, key):
    for rank in '01':
        train.train(*tiny(out_dir=f'weights{rank}', max_iters=1 + int(rank)))
    more = {'model_type': 'drifting'} if key == 'encoder' else {}
    words = command_line(**TWO | more | {key: tmp_path / 'weights'})
    said = finish(fork_ranks(train_rank_on_other_weights, words, key), tmp_path, code=2)
    assert f'different weights in {key}' in said and 'Traceback' not in said


def test_ranks_that_find_different_data(command_line, fork_ranks, tmp_path):
    said = finish(fork_ranks(train_rank_on_its_own_data, command_line(**TWO)), tmp_path, code=2)
    assert 'different data' in said


@pytest.mark.slow
@pytest.mark.parametrize('sharding', ['none', 'fsdp'])
@every_type
def test_two_ranks_evaluate_exactly_as_one(tiny, command_line, fork_ranks, tmp_path, model_type, sharding):
    """An odd number of batches, the last of them not full, and fewer batches than ranks."""
    for name, overrides in (('whole', dict(eval_iters=0, batch_size=2)), ('single', dict(eval_iters=1))):
        overrides = TWO | overrides | dict(eval_only=True, model_type=model_type, sharding=sharding)
        one, model_config = tiny(out_dir=f'{name}1', **overrides)
        train.train(one, model_config)
        finish(fork_ranks(train_rank, command_line(out_dir=f'{name}2', **overrides)), tmp_path)
        assert metrics(one.out_dir) == metrics(tmp_path / f'{name}2')


def train_and_signal_rank_1(argv):
    """Rank 1 gets SIGTERM in iteration 14, and a second time, as torchrun and a job manager may send it each."""
    real = train.Trainer._batch

    def batch(self, iter_num, *numbers):
        if iter_num == 13 and self.ranks.rank == 1:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        return real(self, iter_num, *numbers)
    train.Trainer._batch = batch
    return train.main(argv)


@pytest.mark.slow
@pytest.mark.parametrize('sharding', ['none', 'fsdp'])
@every_type
def test_two_ranks_resume_exactly(command_line, fork_ranks, tmp_path, model_type, sharding):
    """With dropout, that is with a random state for each rank; a signal to one rank alone stops both."""
    overrides = HARD | dict(model_type=model_type, max_iters=22, eval_interval=10, eval_iters=1, n_layer=2,
                            sharding=sharding)
    finish(fork_ranks(train_rank, command_line(out_dir='straight', **overrides)), tmp_path)
    said = finish(fork_ranks(train_and_signal_rank_1, command_line(out_dir='cut', **overrides)), tmp_path, code=143)
    cut = str(tmp_path / 'cut')
    assert said.count('stopped by SIGTERM') == 1 and load(cut)['iter_num'] == 14
    states = load(cut)['random_states']
    assert len(states) == 2 and not torch.equal(states[0]['cpu'], states[1]['cpu'])
    finish(fork_ranks(train_rank, ['--init_from=resume', f'--out_dir={cut}']), tmp_path)
    assert_same_run(str(tmp_path / 'straight'), cut)


def test_another_number_of_ranks_can_go_on(command_line, fork_ranks, tmp_path, capsys):
    finish(fork_ranks(train_rank, command_line(max_iters=4, dropout=0.1, **TWO)), tmp_path)
    assert resume(str(tmp_path / 'run'), '--max_iters=6') == 0
    assert load(str(tmp_path / 'run'))['iter_num'] == 6 and 'number of ranks' in capsys.readouterr().out


def test_ranks_that_find_different_checkpoints(command_line, fork_ranks, tmp_path):
    """Machines without a common folder, say: each would go on from its own."""
    assert train_rank(command_line(max_iters=4, **TWO)) == 0
    said = finish(fork_ranks(train_rank_in_its_own_folder, command_line(max_iters=6, init_from='auto', **TWO)), tmp_path,
                  code=2)
    assert said.count('ranks find different checkpoints') == 2 and 'share' in said
    assert load(str(tmp_path / 'run'))['iter_num'] == 4


def test_ranks_that_do_not_share_a_new_folder(command_line, fork_ranks, tmp_path):
    said = finish(fork_ranks(train_rank_in_its_own_folder, command_line(**TWO)), tmp_path, code=2)
    assert 'some ranks do not see out_dir' in said and not (tmp_path / 'run').exists()
    (tmp_path / 'run-1').mkdir()  # of the same name, on another machine
    said = finish(fork_ranks(train_rank_in_its_own_folder, command_line(**TWO)), tmp_path, code=2)
    assert 'some ranks do not see out_dir' in said


def train_rank_in_its_own_folder(argv):
    machine_name = f'-{os.environ["RANK"]}' * (os.environ['RANK'] != '0')
    return exit_code([word + machine_name * word.startswith('--out_dir') for word in argv])


def exit_code(argv, script=train):
    """What a script ends with, and says, as a command."""
    sys.argv = [f'{script.__name__}.py', *argv]
    options.OTHER_RANKS_WAIT = checkpoint.SHOWN_WITHIN = 0
    options.run(script.main)


def test_ranks_that_do_not_meet(command_line, fork_ranks, tmp_path):
    alone, missing = fork_ranks(exit_code, command_line(ddp_timeout=1))
    missing.kill()
    said = finish([alone], tmp_path, code=2)
    assert 'did not meet' in said and 'start all 2 within 1 seconds' in said and 'Traceback' not in said, said


def test_a_rank_without_the_others_addresses_is_one_line(monkeypatch):
    for name in ('WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(UserError, match='WORLD_SIZE.*unset RANK'), setup_ranks('cpu', 'gloo', 5):
        pass


def test_a_container_has_no_more_threads_than_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(machine, 'cores', lambda: 2)
    try:
        torch.set_num_threads(3)
        assert machine.threads() == 2 and jobs.threads_of_each(2) == 1
        setup_ranks('cpu', 'gloo', 5)
        assert torch.get_num_threads() == 2
        monkeypatch.setenv('OMP_NUM_THREADS', '3')
        torch.set_num_threads(3)
        setup_ranks('cpu', 'gloo', 5)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_number_of_micro_batches_is_rounded_up(tiny):
    with pytest.raises(UserError, match='--gradient_accumulation_steps=48'):
        train.Trainer(*tiny(gradient_accumulation_steps=40), Ranks(world_size=16))


def stop_rank_1(argv):
    """Rank 1 stops in the middle of iteration 4, as if it hung."""
    real = train.Trainer._batch

    def batch(self, iter_num, *numbers):
        if iter_num == 3 and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(self, iter_num, *numbers)
    train.Trainer._batch = batch
    return exit_code(argv)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(command_line, fork_ranks, tmp_path):
    words = command_line(ddp_timeout=2, max_iters=100, **TWO)
    started = time.monotonic()
    well, _ = fork_ranks(stop_rank_1, words)
    said = finish([well], tmp_path, code=1)
    assert time.monotonic() - started < 2 + ROLL_CALL + 15
    ours = [line for line in said.splitlines() if line.startswith('train.py: ')]
    assert len(ours) == 1 and 'rank 0: rank 1 did not answer' in ours[0] and 'Traceback' not in said, said


def torchrun(*args):
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                             'train.py', *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            encoding='utf-8')


@pytest.mark.slow
def test_torchrun_saves_when_it_is_told_to_stop(command_line, tmp_path):
    process = torchrun(*command_line(max_iters=100000, eval_interval=100000, ddp_timeout=60, **TWO))
    while lines(tmp_path / 'run' / 'metrics.jsonl') < 20:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and 'stopped by SIGTERM' in out, out + err
    state = load(str(tmp_path / 'run'))
    assert state['iter_num'] == metrics(tmp_path / 'run')[-1]['iter'] and state['config']['ddp_timeout'] == 60


@pytest.mark.slow
def test_accumulation_that_ranks_cannot_share(command_line, tmp_path):
    process = torchrun(*command_line(gradient_accumulation_steps=3))
    _, err = process.communicate(timeout=60)
    ours = [line for line in err.splitlines() if line.startswith('train.py: ')]
    assert process.returncode != 0 and len(ours) == 1 and 'gradient_accumulation_steps=3' in ours[0], err
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('name, number', [('auto', 0), ('cuda', 0), ('cuda:1', 1)])
def test_a_gpu_has_a_number(monkeypatch, name, number):
    """torch.cuda.set_device, with which the thread that makes batches begins, refuses a device without one."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert pick_device(name) == torch.device('cuda', number)
