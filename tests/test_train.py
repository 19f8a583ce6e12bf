import itertools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, WAYS, resume, run_script

import train
from nanodrift import checkpoint, options
from nanodrift.data import Windows, load_meta
from nanodrift.machine import Ranks
from nanodrift.options import UserError
from train import Schedule, TrainConfig, Trainer

every_type = pytest.mark.parametrize('model_type', WAYS)


def metrics(out_dir):
    """The lines of metrics.jsonl without what depends on the clock."""
    with open(os.path.join(out_dir, 'metrics.jsonl'), encoding='utf-8') as f:
        return [{k: v for k, v in json.loads(line).items() if k != 'tokens_per_s'} for line in f]


def load(out_dir, which='last'):
    return checkpoint.load(checkpoint.find(out_dir, which))


def assert_same(a, b, where=''):
    """Bit by bit, through dicts, lists and tensors."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f'{where}.{key}')
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f'{where}[{i}]')
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, (where, a, b)


def assert_same_run(one, other, best=True):
    """Two folders hold the same training: log, and all of the state that a further iteration depends on."""
    assert metrics(one) == metrics(other)
    for which in ('last', 'best') if best else ('last',):
        a, b = load(one, which), load(other, which)
        for key in ('model', 'ema', 'optimizer', 'scaler', 'iter_num', 'best_val_loss', 'random_states', 'model_args'):
            assert_same(a[key], b[key], f'{which}.{key}')


@pytest.fixture
def at_iteration(monkeypatch):
    """at_iteration(k, act): calls `act` in the middle of the iteration that leads to iter_num k, once."""
    def install(k, act):
        real = Trainer._batch

        def batch(self, iter_num, *numbers):
            if iter_num == k - 1:
                monkeypatch.setattr(Trainer, '_batch', real)
                act()
            return real(self, iter_num, *numbers)
        monkeypatch.setattr(Trainer, '_batch', batch)
    return install


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


# everything that could go wrong when a run is cut in two
HARD = dict(max_iters=8, eval_interval=4, dropout=0.1, gradient_accumulation_steps=2, grad_clip=0.1, stride=7,
            warmup_iters=3, ema=0.9)


# ---------------------------------------------------------------------------------------------------------------------
# resuming

@every_type
@pytest.mark.parametrize('order, stop', [
    ('epoch', 3), ('epoch', 4), ('epoch', 7), ('epoch', 8), ('random', 4),
    *(pytest.param('random', stop, marks=pytest.mark.slow) for stop in (3, 7, 8))])
def test_resuming_is_exact(tiny, at_iteration, model_type, order, stop):
    overrides = HARD | dict(model_type=model_type, data_order=order)
    straight, *rest = tiny(out_dir='straight', **overrides)
    assert train.train(straight, *rest) == 0
    config, *rest = tiny(out_dir='cut', **overrides)
    at_iteration(stop, interrupt)
    assert train.train(config, *rest) == 130
    assert load(config.out_dir)['iter_num'] == stop
    assert resume(config.out_dir) == 0
    assert_same_run(straight.out_dir, config.out_dir)
    assert load(config.out_dir)['run_id'] != load(straight.out_dir)['run_id']


def test_resuming_twice_in_an_epoch_that_ends_in_between(tiny, at_iteration):
    """58 iterations are an epoch; the order of the next one is another."""
    overrides = dict(max_iters=64, eval_interval=1000, dropout=0.1, n_layer=1)
    straight, *rest = tiny(out_dir='straight', **overrides)
    train.train(straight, *rest)
    config, *rest = tiny(out_dir='cut', **overrides)
    at_iteration(55, interrupt)
    train.train(config, *rest)
    at_iteration(60, interrupt)
    assert resume(config.out_dir) == 130 and resume(config.out_dir) == 0
    assert_same_run(straight.out_dir, config.out_dir)


def train_in_fork(argv):
    return train.main(argv)


def lines(path):
    try:
        with open(path, 'rb') as f:
            return f.read().count(b'\n')
    except FileNotFoundError:
        return 0


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_resuming_after_a_signal_at_any_moment(tiny, command_line, fork, tmp_path, number):
    """After SIGINT and SIGTERM from where it stopped, after kill -9 from the checkpoint of the last evaluation; the log
    has every line once, however many had been written since."""
    overrides = dict(max_iters=400, eval_interval=25, eval_iters=1, dropout=0.1, n_layer=1)
    straight, *rest = tiny(out_dir='straight', **overrides)
    train.train(straight, *rest)
    process = fork(train_in_fork, command_line(out_dir='cut', **overrides))
    moment = random.Random(time.time()).randint(40, 200)
    while lines(tmp_path / 'cut' / 'metrics.jsonl') < moment:
        assert process.is_alive(), (tmp_path / 'fork.out').read_text()
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == (-9 if number == signal.SIGKILL else 128 + number), (tmp_path / 'fork.out').read_text()
    cut = str(tmp_path / 'cut')
    state, written = load(cut), metrics(cut)[-1]['iter']
    assert 0 < state['iter_num'] < 400 and state['iter_num'] <= written
    if number != signal.SIGKILL:
        assert state['iter_num'] == written
        assert signal.Signals(number).name in (tmp_path / 'fork.out').read_text()
    assert resume(cut) == 0
    assert_same_run(straight.out_dir, cut)


def test_a_crash_after_more_lines_than_the_checkpoint_knows(tiny, at_iteration):
    overrides = HARD | dict(eval_interval=3)
    straight, *rest = tiny(out_dir='straight', **overrides)
    train.train(straight, *rest)

    def crash():
        raise ZeroDivisionError
    at_iteration(6, crash)
    config, *rest = tiny(out_dir='cut', **overrides)
    with pytest.raises(ZeroDivisionError):
        train.train(config, *rest)
    with open(f'{config.out_dir}/metrics.jsonl', 'a', encoding='utf-8') as f:
        f.write('{"iter": 6, "lo')
    assert load(config.out_dir)['iter_num'] == 3
    resume(config.out_dir)
    assert_same_run(straight.out_dir, config.out_dir)


def test_a_resumed_run_keeps_its_settings(tiny):
    config, model_config = tiny(max_iters=2, beta2=0.9, dropout=0.1, grad_clip=0.5)
    train.train(config, model_config)
    again, model_again, state = train.read_settings(['--init_from=resume', f'--out_dir={config.out_dir}'])
    config.init_from = 'resume'
    assert again == config and model_again == model_config and state['iter_num'] == 2
    changed, *_ = train.read_settings(['--init_from=resume', f'--out_dir={config.out_dir}', '--beta2=0.8'])
    config.beta2 = 0.8
    assert changed == config


def test_optimizer_settings_given_on_resume_hold(tiny):
    config, model_config = tiny(max_iters=2)
    train.train(config, model_config)
    words = ['--init_from=resume', f'--out_dir={config.out_dir}', '--beta2=0.8', '--weight_decay=0.3']
    again, model_again, state = train.read_settings(words)
    groups = Trainer(again, model_again, Ranks(), state).optimizer.param_groups
    assert [(group['betas'], group['weight_decay']) for group in groups] == [((0.9, 0.8), 0.3), ((0.9, 0.8), 0.0)]


def test_a_run_may_go_on_in_float16(tiny):
    config, model_config = tiny(max_iters=2)
    train.train(config, model_config)
    assert resume(config.out_dir, '--dtype=float16', '--max_iters=4') == 0


def test_a_new_run_forgets_the_best_of_an_old_one(tiny, at_iteration):
    config, model_config = tiny()
    train.train(config, model_config)
    again, model_config = tiny(eval_interval=100, max_iters=4, seed=2, overwrite=True)
    at_iteration(2, lambda: signal.raise_signal(signal.SIGINT))
    assert train.train(again, model_config) == 130
    assert not os.path.exists(f'{config.out_dir}/ckpt_best.pt')


def test_resuming_a_finished_run_changes_nothing(tiny):
    config, model_config = tiny()
    train.train(config, model_config)
    before = load(config.out_dir), metrics(config.out_dir)
    for _ in range(2):
        assert resume(config.out_dir) == 0
        after = load(config.out_dir), metrics(config.out_dir)
        for key in ('model', 'optimizer', 'iter_num', 'best_val_loss', 'random_states', 'run_id'):
            assert_same(before[0][key], after[0][key], key)
        assert before[1] == after[1]


def test_a_finished_run_goes_on_with_more_iterations(tiny):
    overrides = HARD | dict(decay_lr=False, warmup_iters=0)
    straight, *rest = tiny(out_dir='straight', **overrides)
    train.train(straight, *rest)
    config, *rest = tiny(out_dir='cut', **overrides | dict(max_iters=4))
    train.train(config, *rest)
    assert resume(config.out_dir, '--max_iters=8') == 0
    assert_same_run(straight.out_dir, config.out_dir)


def test_stopped_before_the_first_iteration(tiny, monkeypatch):
    """The message says how to go on, so there must be something to go on from."""
    straight, *rest = tiny(out_dir='straight')
    train.train(straight, *rest)
    real = Trainer.evaluate

    def evaluate(self, split):
        monkeypatch.setattr(Trainer, 'evaluate', real)
        interrupt()
        return real(self, split)
    monkeypatch.setattr(Trainer, 'evaluate', evaluate)
    config, *rest = tiny(out_dir='cut')
    assert train.train(config, *rest) == 130
    assert resume(config.out_dir) == 0
    assert_same_run(straight.out_dir, config.out_dir)


def test_a_second_signal_ends_it_at_once(fork, command_line, tmp_path):
    process = fork(train_slowly, command_line(), tmp_path / 'working')
    while not os.path.exists(tmp_path / 'working'):
        assert process.is_alive()
        time.sleep(0.01)
    started = time.time()
    for wait in (0.1, 1.5):  # the second one is a repetition of the first
        process.terminate()
        time.sleep(wait)
        assert process.is_alive()
    process.terminate()
    process.join()
    assert process.exitcode == -signal.SIGTERM and time.time() - started < 10


def train_slowly(argv, working):
    real = Trainer._batch

    def batch(self, *numbers):
        working.touch()
        time.sleep(30)
        return real(self, *numbers)
    Trainer._batch = batch
    return train.main(argv)


@pytest.mark.parametrize('change', ['n_layer', 'n_embd', 'block_size', 'n_head', 'bias'])
def test_resuming_another_architecture_is_refused_by_name(tiny, change):
    config, model_config = tiny()
    train.train(config, model_config)
    before = os.stat(f'{config.out_dir}/ckpt.pt').st_mtime_ns, metrics(config.out_dir)
    value = {'n_layer': 3, 'n_embd': 24, 'block_size': 8, 'n_head': 1, 'bias': False}[change]
    with pytest.raises(UserError, match=f'resume.*{change}.*{value}'):
        resume(config.out_dir, f'--{change}={value}', '--max_iters=9')
    assert (os.stat(f'{config.out_dir}/ckpt.pt').st_mtime_ns, metrics(config.out_dir)) == before


@pytest.fixture
def two_tongues(data_dir, tmp_path):
    """Data sets `one` and `two`, alike but for what the ids of their tokenizers mean."""
    for name, characters in (('one', 'abc'), ('two', 'xyz')):
        folder = tmp_path / 'tongues' / name
        folder.mkdir(parents=True)
        for split in ('train', 'val'):
            with open(f'{data_dir}/tiny_byte/{split}.bin', 'rb') as f:
                (folder / f'{split}.bin').write_bytes(f.read())
        meta = load_meta(f'{data_dir}/tiny_byte')
        meta['tokenizer'] = {'name': 'char', 'identity': characters, 'characters': characters}
        (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    return dict(data_dir=str(tmp_path / 'tongues'))


def test_resuming_with_another_tokenizer_is_refused(tiny, two_tongues):
    config, model_config = tiny(dataset='one', **two_tongues)
    train.train(config, model_config)
    with pytest.raises(UserError, match='tokenizer'):
        resume(config.out_dir, '--dataset=two')


def test_weights_of_another_tokenizer_are_refused(tiny, two_tongues):
    config, model_config = tiny(dataset='one', **two_tongues)
    train.train(config, model_config)
    with pytest.raises(UserError, match='tokenizer'):
        train.train(*tiny(out_dir='next', dataset='two', init_from=config.out_dir, **two_tongues))
    assert not os.path.exists(os.path.dirname(config.out_dir) + '/next')


@every_type
def test_starting_from_another_run(tiny, model_type):
    config, model_config = tiny(model_type=model_type)
    train.train(config, model_config)
    parent = load(config.out_dir, 'best')
    child, child_model = tiny(out_dir='child', model_type=model_type, init_from=config.out_dir, n_layer=6)
    trainer = Trainer(child, child_model, Ranks())
    assert_same(dict(trainer.model.state_dict()), dict(parent['model']))
    assert trainer.iter_num == 0 and not trainer.optimizer.state and trainer.model.config.n_layer == 2
    trainer.train()
    state = load(child.out_dir)
    assert state['parents'] == [parent['run_id'], *parent['parents']] and state['run_id'] != parent['run_id']
    grandchild, model_config = tiny(out_dir='grandchild', model_type=model_type, init_from=child.out_dir)
    train.train(grandchild, model_config)
    assert load(grandchild.out_dir)['parents'] == [state['run_id'], *state['parents']]
    with open(f'{grandchild.out_dir}/config.json', encoding='utf-8') as f:
        assert json.load(f)['parents'] == [state['run_id'], *state['parents']]


# ---------------------------------------------------------------------------------------------------------------------
# stopping before damage is done

def test_a_loss_that_is_not_finite(tiny, capsys):
    config, model_config = tiny(max_iters=2)
    train.train(config, model_config)
    files = {name: open(f'{config.out_dir}/{name}', 'rb').read() for name in ('ckpt.pt', 'ckpt_best.pt')}
    with pytest.raises(SystemExit) as e:
        resume(config.out_dir, '--max_iters=9', '--learning_rate=1e30', '--decay_lr=False', '--eval_interval=100')
    said = str(e.value)
    assert 'gradient norm' in said and 'iteration 3' in said and '\n' not in said and e.value.code == 3
    for name, content in files.items():
        assert open(f'{config.out_dir}/{name}', 'rb').read() == content


def test_a_gradient_that_is_not_finite(tiny, monkeypatch):
    config, model_config = tiny(max_iters=4, eval_interval=2)
    trainer = Trainer(config, model_config, Ranks())

    def poison(gradient):
        return gradient * (math.inf if trainer.iter_num == 3 else 1)
    next(trainer.model.parameters()).register_hook(poison)
    with pytest.raises(SystemExit, match='iteration 3'):
        trainer.train()
    state = load(config.out_dir)
    assert state['iter_num'] == 2 and all(v.isfinite().all() for v in state['model'].values())


@pytest.fixture
def late(monkeypatch):
    """Training as on a GPU: what came of an iteration is read during the next one, batches are made on a thread."""
    begin = Trainer._begin
    monkeypatch.setattr(Trainer, '_begin', lambda self, late: begin(self, True))
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)


@pytest.mark.parametrize('model_type, dtype', [*((name, 'float32') for name in WAYS), ('gpt2', 'float16')])
def test_what_is_read_late_gives_the_same_run(tiny, request, model_type, dtype):
    overrides = HARD | dict(model_type=model_type, dtype=dtype, log_interval=1, keep_every=3)
    straight, *rest = tiny(out_dir='straight', **overrides)
    assert train.train(straight, *rest) == 0
    request.getfixturevalue('late')
    config, *rest = tiny(out_dir='late', **overrides)
    assert train.train(config, *rest) == 0
    assert_same_run(straight.out_dir, config.out_dir)


@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_an_update_that_would_break_the_weights_is_skipped_even_where_that_is_read_late(tiny, late, monkeypatch, what):
    config, model_config = tiny(max_iters=9, eval_interval=2, weight_decay=0.5)
    trainer = Trainer(config, model_config, Ranks())
    if what == 'loss':
        forward = trainer.network.forward

        def poisoned(*args, **options):
            logits, loss = forward(*args, **options)
            return logits, loss * (math.nan if trainer.iter_num == 2 else 1)
        monkeypatch.setattr(trainer.network, 'forward', poisoned)
    else:
        next(trainer.model.parameters()).register_hook(lambda g: g * (math.inf if trainer.iter_num == 2 else 1))
    with pytest.raises(SystemExit, match='iteration 2: stopped before the update') as e:
        trainer.train()
    assert e.value.code == 3 and trainer.iter_num == 3, 'found while the next iteration is computed'
    state = load(config.out_dir)
    assert state['iter_num'] == 2
    assert_same(state['model'], trainer.model.state_dict(), 'nothing has changed since')


def test_a_signal_where_it_is_read_late(tiny, late, at_iteration):
    config, *rest = tiny(max_iters=20, eval_interval=20)
    at_iteration(4, interrupt)
    assert train.train(config, *rest) == 130
    assert 4 <= load(config.out_dir)['iter_num'] <= 6


def test_an_error_while_a_batch_is_made_ahead_reaches_the_user(tiny, late, at_iteration):
    def fail():
        raise UserError('the data are gone')
    config, *rest = tiny(max_iters=20, eval_interval=20)
    at_iteration(4, fail)
    with pytest.raises(UserError, match='the data are gone'):
        train.train(config, *rest)


def test_a_validation_loss_that_is_not_finite_keeps_the_best(tiny):
    config, model_config = tiny(max_iters=2)
    train.train(config, model_config)
    best = open(f'{config.out_dir}/ckpt_best.pt', 'rb').read()
    with pytest.raises(SystemExit, match='validation loss'):
        resume(config.out_dir, '--max_iters=9', '--learning_rate=1e30', '--decay_lr=False', '--eval_interval=1')
    assert open(f'{config.out_dir}/ckpt_best.pt', 'rb').read() == best
    assert open(f'{config.out_dir}/ckpt.pt', 'rb').read() == best, 'the spoiled state is not what resuming finds'
    for line in open(f'{config.out_dir}/metrics.jsonl', encoding='utf-8'):
        json.loads(line, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))


def test_the_command_says_so_in_one_line(command_line):
    done = run_script('train.py', *command_line(learning_rate=1e30, decay_lr=False, eval_interval=100), check=False)
    assert done.returncode == 3 and 'gradient norm' in done.stderr and 'Traceback' not in done.stderr
    assert done.stderr.strip().count('\n') == 0, done.stderr


def mistake(capsys, monkeypatch, *argv):
    """Runs the command in this process; it must fail with one line on stderr, which is returned."""
    monkeypatch.setattr('sys.argv', ['train.py', *argv])
    with pytest.raises(SystemExit) as e:
        options.run(train.main)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1, err
    return err


def test_an_out_dir_that_cannot_be(command_line, tmp_path, capsys, monkeypatch):
    (tmp_path / 'file').write_text('in the way')
    assert 'file/run' in mistake(capsys, monkeypatch, *command_line(out_dir='file/run'))
    (tmp_path / 'run' / 'metrics.jsonl').mkdir(parents=True)
    assert 'run' in mistake(capsys, monkeypatch, *command_line(out_dir='run'))


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_disk_too_full_for_the_log(command_line, tmp_path, capsys, monkeypatch):
    (tmp_path / 'run').mkdir()
    os.symlink('/dev/full', tmp_path / 'run' / 'metrics.jsonl')
    assert 'metrics.jsonl' in mistake(capsys, monkeypatch, *command_line())


def train_on_a_small_disk(argv):
    """Files may not grow beyond 40 kB, as if the disk were full: room for the log, not for a checkpoint."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    sys.argv = ['train.py', *argv]
    options.run(train.main)


def test_a_disk_too_full_for_a_checkpoint(fork, command_line, tmp_path, tiny):
    config, model_config = tiny()
    train.train(config, model_config)
    before = open(f'{config.out_dir}/ckpt.pt', 'rb').read()
    process = fork(train_on_a_small_disk, ['--init_from=resume', f'--out_dir={config.out_dir}', '--max_iters=9'])
    process.join()
    said = (tmp_path / 'fork.out').read_text()
    assert process.exitcode == 2 and 'cannot write a checkpoint' in said and 'Traceback' not in said, said
    assert open(f'{config.out_dir}/ckpt.pt', 'rb').read() == before


def test_training_visits_every_block_once_an_epoch(tiny, monkeypatch):
    """Through accumulation and iterations, and a stride of its own."""
    trainer = Trainer(*tiny(gradient_accumulation_steps=3, batch_size=2, stride=50), Ranks())
    blocks = len(trainer.windows['train'])
    seen = []
    real = Windows.read
    monkeypatch.setattr(Windows, 'read', lambda self, offsets: seen.extend(offsets.tolist()) or real(self, offsets))
    while len(seen) < blocks:
        trainer._step()
    assert sorted(seen[:blocks]) == list(range(0, blocks * 50, 50))


# ---------------------------------------------------------------------------------------------------------------------
# evaluation

@every_type
def test_evaluation_repeats_itself_and_moves_nothing(tiny, model_type):
    trainer = Trainer(*tiny(model_type=model_type, dropout=0.3), Ranks())
    before = torch.get_rng_state()
    for split in ('train', 'val'):
        assert trainer.evaluate(split) == trainer.evaluate(split)
    assert torch.equal(torch.get_rng_state(), before) and trainer.model.training


@every_type
def test_training_is_the_same_with_more_evaluation(tiny, model_type):
    states = []
    for interval in (1, 100):
        config, model_config = tiny(**HARD | dict(out_dir=f'every{interval}', model_type=model_type,
                                                  eval_interval=interval))
        train.train(config, model_config)
        states.append(load(config.out_dir))
    for key in ('model', 'optimizer', 'random_states'):
        assert_same(states[0][key], states[1][key], key)


def test_the_whole_split_by_hand(tiny, data_dir):
    """eval_iters=0 against a loop over one window at a time; the last batch is not full."""
    config, model_config = tiny(eval_iters=0, batch_size=4)
    trainer = Trainer(config, model_config, Ranks())
    for _ in range(3):
        trainer._step()
    found = trainer.evaluate('val')
    ids = torch.from_numpy(np.fromfile(f'{data_dir}/tiny_byte/val.bin', '<u2').astype('int64'))
    loss = correct = count = 0
    with torch.no_grad():
        trainer.model.eval()
        for start in range(0, len(ids) - 16, 16):
            X, Y = ids[None, start:start + 16], ids[None, start + 1:start + 17]
            logits, _ = trainer.model(X, Y)
            loss += F.cross_entropy(logits[0].double(), Y[0], reduction='sum').item()
            correct += (logits.argmax(-1) == Y).sum().item()
            count += 16
    assert count // 16 % 4 and found['loss'] == pytest.approx(loss / count, rel=1e-6)
    assert found['accuracy'] == correct / count


def test_eval_iters_takes_windows_of_the_whole_split(tiny, monkeypatch):
    trainer = Trainer(*tiny(eval_iters=2, batch_size=3), Ranks())
    seen = []
    real = Windows.read
    monkeypatch.setattr(Windows, 'read', lambda self, offsets: seen.extend(offsets.tolist()) or real(self, offsets))
    trainer.evaluate('train')
    last = (len(trainer.windows['train']) - 1) * 16
    assert len(seen) == 6 and seen[0] == 0 and seen[-1] == last and seen == sorted(seen)


def test_eval_only(tiny):
    config, model_config = tiny()
    train.train(config, model_config)
    expected = metrics(config.out_dir)[-1]
    assert 'val_loss' in expected and 'val_accuracy' in expected and 'train_loss' in expected
    before = open(f'{config.out_dir}/ckpt.pt', 'rb').read()
    described, lines = open(f'{config.out_dir}/config.json').read(), len(metrics(config.out_dir))
    assert resume(config.out_dir, '--eval_only=True') == 0
    assert open(f'{config.out_dir}/config.json').read() == described and len(metrics(config.out_dir)) == lines + 1
    assert metrics(config.out_dir)[-1] == expected and open(f'{config.out_dir}/ckpt.pt', 'rb').read() == before
    fresh, model_config = tiny(out_dir='fresh', eval_only=True)
    assert train.train(fresh, model_config) == 0
    assert [line['iter'] for line in metrics(fresh.out_dir)] == [0] and not os.path.exists(f'{fresh.out_dir}/ckpt.pt')


def test_the_best_checkpoint_is_the_best(tiny, monkeypatch):
    values = iter([5.0, 4.0, 3.0, 3.5, 3.0, 2.9])
    monkeypatch.setattr(Trainer, 'evaluate', lambda self, split: {
        'loss': next(values) if split == 'val' else 9.0, 'accuracy': 0.0})
    config, model_config = tiny(max_iters=4, eval_interval=1)
    train.train(config, model_config)
    best, last = load(config.out_dir, 'best'), load(config.out_dir, 'last')
    assert (best['iter_num'], best['best_val_loss']) == (2, 3.0) == (2, last['best_val_loss'])
    assert last['iter_num'] == 4


# ---------------------------------------------------------------------------------------------------------------------
# schedule

def rates(iters_per_epoch=10, at=(0,), **overrides):
    schedule = Schedule(TrainConfig(**dict(learning_rate=1.0, max_iters=100) | overrides), iters_per_epoch, 1)
    return [round(schedule.lr(i), 12) for i in at]


@pytest.mark.parametrize('expected, at, overrides', [
    ([1.0, 0.55, 0.1, 0.1], [0, 50, 100, 300], dict(lr_schedule='cosine', min_lr=0.1)),
    ([1.0, 0.5 + 0.5 * math.cos(math.pi / 4)], [0, 25], dict(lr_schedule='cosine')),
    ([1.0, 0.75, 0.5, 0.0, 0.0], [0, 25, 50, 100, 101], dict(lr_schedule='linear')),
    ([0.2, 0.6, 1.0, 1.0, 1.0], [0, 2, 4, 50, 99], dict(lr_schedule='constant', warmup_iters=4)),
    ([0.2, 0.8, 1.0, 0.5], [0, 3, 4, 52], dict(lr_schedule='linear', warmup_iters=4)),
    ([1 / 11, 10 / 11, 1.0, 0.5, 0.0], [0, 9, 10, 55, 100], dict(lr_schedule='linear', warmup_ratio=0.1)),
    ([1 / 21, 20 / 21, 1.0, 0.5], [0, 19, 20, 60], dict(lr_schedule='linear', warmup_epochs=2)),
    ([1.0, 0.6, 0.2, 0.2], [0, 20, 40, 99], dict(lr_schedule='linear', lr_decay_iters=40, min_lr=0.2)),
    ([1.0, 1.0, 1.0], [0, 50, 99], dict(decay_lr=False, warmup_iters=10)),
])
def test_learning_rates(expected, at, overrides):
    assert rates(at=at, **overrides) == [round(x, 12) for x in expected]


@pytest.mark.parametrize('epochs, iters', [(1, 59), (2, 117), (0.5, 30), (0.001, 1)])
def test_epochs_become_iterations(tiny, epochs, iters):
    """234 examples are 58.5 batches of 4."""
    trainer = Trainer(*tiny(num_epochs=epochs, batch_size=2, gradient_accumulation_steps=2), Ranks())
    assert len(trainer.windows['train']) == 234 and trainer.schedule.max_iters == iters
    assert trainer.schedule.end == iters


def test_whole_epochs_take_no_iteration_more():
    for epochs, windows, examples in itertools.product(range(1, 30), (7, 11, 49), (1, 5, 7, 25)):
        iters = Schedule(TrainConfig(num_epochs=epochs, decay_lr=False), windows, examples).max_iters
        assert iters == -(-epochs * windows // examples)


@pytest.mark.parametrize('overrides', [
    dict(warmup_iters=3, warmup_ratio=0.1), dict(warmup_ratio=0.1, warmup_epochs=1), dict(warmup_ratio=1.0),
    dict(learning_rate=-1), dict(max_iters=0), dict(beta1=1), dict(batch_size=0), dict(grad_clip=-1), dict(stride=-1)])
def test_contradictions_are_refused(overrides):
    with pytest.raises(UserError, match=next(iter(overrides))):
        TrainConfig(**overrides)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match='warmup'):
        rates(warmup_iters=101)
    assert rates(warmup_iters=101, decay_lr=False) == [1.0]


def test_exactly_max_iters_updates_at_the_rates_of_the_schedule(tiny):
    config, model_config = tiny(max_iters=5, eval_interval=2, warmup_iters=2)
    train.train(config, model_config)
    state = load(config.out_dir)
    assert {int(s['step']) for s in state['optimizer']['state'].values()} == {5} == {state['iter_num']}
    schedule = Schedule(config, 1, 1)
    written = metrics(config.out_dir)
    steps = [line for line in written if 'loss' in line]
    assert [line['iter'] for line in steps] == [1, 2, 3, 4, 5]
    assert [line['lr'] for line in steps] == [schedule.lr(i) for i in range(5)]
    assert [group['lr'] for group in state['optimizer']['param_groups']] == [schedule.lr(4)] * 2
    assert [line['iter'] for line in written if 'val_loss' in line] == [0, 2, 4, 5]


# ---------------------------------------------------------------------------------------------------------------------
# number types, memory, compiler

def losses(out_dir):
    return [line['loss'] for line in metrics(out_dir) if 'loss' in line]


@pytest.fixture
def losses_of(tiny):
    def run(out_dir, **overrides):
        config, model_config = tiny(**dict(out_dir=out_dir, max_iters=5, n_embd=32) | overrides)
        assert train.train(config, model_config) == 0
        return losses(config.out_dir)
    return run


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision_stays_close(losses_of, tmp_path, dtype):
    exact, half = losses_of('exact'), losses_of('half', dtype=dtype)
    assert half != exact and half == pytest.approx(exact, abs=0.02)
    assert exact[-1] < exact[0] - 0.5
    assert all(v.dtype == torch.float32 for v in load(str(tmp_path / 'half'))['model'].values())


def test_an_overflow_in_float16_is_skipped_and_resumed_exactly(tiny, at_iteration, tmp_path):
    """The scaler begins so high that the first updates overflow: it lowers itself, and the checkpoint remembers it."""
    overrides = HARD | dict(dtype='float16')
    results = []
    for name in ('straight', 'cut'):
        config, model_config = tiny(out_dir=name, **overrides)
        trainer = Trainer(config, model_config, Ranks())
        trainer.scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 24)
        before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        if name == 'cut':
            at_iteration(3, interrupt)
        assert trainer.train() == (130 if name == 'cut' else 0)
        results.append(config.out_dir)
    assert load(results[1])['scaler']['scale'] < 2.0 ** 24
    first = metrics(results[0])[1]
    assert first['iter'] == 1 and first['grad_norm'] is None  # infinite, which JSON cannot say
    assert resume(results[1]) == 0
    assert_same_run(*results)
    assert any(not torch.equal(v, before[k]) for k, v in load(results[0])['model'].items())


@every_type
def test_gradient_checkpointing_gives_equal_weights(tiny, model_type):
    states, calls = [], []
    for on in (False, True):
        config, model_config = tiny(**HARD | dict(out_dir=f'{on}', model_type=model_type, gradient_checkpointing=on))
        trainer = Trainer(config, model_config, Ranks())
        inside = ('transformer.h.0.mlp', 'generator.h.0.c_fc')
        module = next(m for name, m in trainer.model.named_modules() if name in inside)
        count = [0]
        module.register_forward_pre_hook(lambda m, args, count=count: count.__setitem__(0, count[0] + m.training))
        trainer.train()
        states.append(dict(load(config.out_dir)['model']))
        calls.append(count[0])
    assert_same(*states)
    # every block is run again in the backward pass; drifting has one pass without gradients before
    assert calls[1] == (1.5 if model_type in ('drifting', 'token drift') else 2) * calls[0]


def test_compiled_training_is_nearly_the_same(losses_of, tmp_path):
    eager = losses_of('eager', n_layer=1)
    compiled = losses_of('compiled', n_layer=1, compile=True)
    assert compiled == pytest.approx(eager, abs=1e-3) and compiled != eager
    assert set(load(str(tmp_path / 'compiled'))['model']) == set(load(str(tmp_path / 'eager'))['model'])


@pytest.mark.slow
def test_without_a_compiler_training_goes_on_with_one_warning(command_line, tmp_path):
    env = dict(CXX='/no/such/compiler', PATH='/nowhere', TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'cache'))
    done = run_script('train.py', *command_line(compile=True), env=env)
    assert done.stderr.count('\n') == 1 and 'torch.compile' in done.stderr, done.stderr
    assert load(str(tmp_path / 'run'))['iter_num'] == 6


# ---------------------------------------------------------------------------------------------------------------------
# log and surroundings

def test_config_json_and_terminal(tiny, capsys):
    config, model_config = tiny(max_iters=2)
    train.train(config, model_config)
    with open(f'{config.out_dir}/config.json', encoding='utf-8') as f:
        written = json.load(f)
    assert written['batch_size'] == 4 and written['n_embd'] == 16 and written['vocab_size'] == 257
    assert written['run_id'] == load(config.out_dir)['run_id'] and written['world_size'] == 1
    out = capsys.readouterr().out
    assert '64 tokens per iteration' in out and 'val loss' in out and 'tokens/s' in out


@every_type
def test_an_evaluation_is_a_short_line_on_the_terminal_and_whole_in_the_log(tiny, capsys, model_type):
    trainer = Trainer(*tiny(model_type=model_type, max_iters=2, eval_interval=1), Ranks())
    numbers, metric = trainer.evaluate('val'), trainer.objective.val_metric
    trainer.train()
    said = [line for line in capsys.readouterr().out.splitlines() if 'val loss' in line]
    logged = [line for line in metrics(trainer.config.out_dir) if 'val_loss' in line]
    assert len(said) == len(logged) == 3
    likely = metric in ('loss', 'nelbo')
    for line, written in zip(said, logged):
        assert len(line) <= 100 - 8  # the rest is for more iterations and for losses above 10
        assert f'train loss {written["train_loss"]:.4f}' in line
        assert ('accuracy' in line) == ('bits per byte' in line) == likely and line.count('<=') == 2 * (metric == 'nelbo')
        assert {f'val_{name}' for name in numbers if name != metric} <= set(written)


def test_bits_per_byte(tiny, data_dir):
    config, model_config = tiny()
    train.train(config, model_config)
    val = load_meta(f'{data_dir}/tiny_byte')['splits']['val']
    line = metrics(config.out_dir)[-1]
    assert line['val_bits_per_byte'] == pytest.approx(line['val_loss'] / math.log(2) * val['tokens'] / val['bytes'])


def fake_wandb(broken):
    """A wandb whose function `broken` raises, and that remembers what it was given."""
    seen = []

    def act(name):
        def call(*args, **kwargs):
            seen.append((name, args, kwargs))
            if name == broken:
                raise ConnectionError('no wandb today')
            return fake
        return call
    fake = types.SimpleNamespace(init=act('init'), log=act('log'), finish=act('finish'), Settings=act('settings'),
                                 api=types.SimpleNamespace(api_key=None), seen=seen)
    return fake


@pytest.mark.parametrize('broken', ['', 'init', 'log', 'finish'])
def test_wandb_may_break_but_not_the_run(tiny, monkeypatch, capsys, broken):
    fake = fake_wandb(broken)
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    config, model_config = tiny(wandb_log=True, max_iters=2, eval_interval=1)
    assert train.train(config, model_config) == 0
    assert load(config.out_dir)['iter_num'] == 2 and len(metrics(config.out_dir)) == 5
    assert ('no wandb today' in capsys.readouterr().out) == bool(broken)
    if not broken:
        logged = [call for call in fake.seen if call[0] == 'log']
        assert [call[2]['step'] for call in logged] == [0, 1, 1, 2, 2] and fake.seen[-1][0] == 'finish'
        assert next(call for call in fake.seen if call[0] == 'init')[2]['mode'] == 'offline'


def test_without_wandb_it_trains_with_a_line(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # import wandb now raises ImportError
    assert train.train(*tiny(wandb_log=True)) == 0
    assert capsys.readouterr().out.count('training without wandb') == 1


@pytest.mark.slow
def test_real_wandb_never_asks(command_line, tmp_path):
    pytest.importorskip('wandb')
    env = dict(HOME=str(tmp_path), NETRC=str(tmp_path / 'netrc'), WANDB_CONFIG_DIR=str(tmp_path), PYTHONWARNINGS='ignore')
    done = run_script('train.py', *command_line(wandb_log=True), env=env, timeout=60)
    assert 'Traceback' not in done.stderr and load(str(tmp_path / 'run'))['iter_num'] == 6
    assert any((tmp_path / 'run' / 'wandb').glob('offline-run-*'))


@pytest.mark.slow
def test_the_real_command_in_the_c_locale_without_wandb(command_line, tmp_path):
    """SIGTERM to the command itself, wandb not imported, a folder with an accent, and no UTF-8 around."""
    code = ("import sys, runpy, atexit; sys.argv = sys.argv[1:]; "
            "atexit.register(lambda: print('wandb' in sys.modules, file=sys.stderr)); "
            "runpy.run_path('train.py', run_name='__main__')")
    env = os.environ | dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    argv = command_line(out_dir='café', max_iters=100000, eval_interval=100000)
    process = subprocess.Popen([sys.executable, '-c', code, 'train.py', *argv], cwd=ROOT, env=env, encoding='utf-8',
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while lines(tmp_path / 'café' / 'metrics.jsonl') < 20:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and err == 'False\n', err
    assert 'SIGTERM' in out and load(str(tmp_path / 'café'))['iter_num'] == metrics(tmp_path / 'café')[-1]['iter']


def test_the_initial_weights_depend_on_the_seed_alone(tiny):
    def weights(**overrides):
        torch.rand(3)
        return Trainer(*tiny(**overrides), Ranks()).model.state_dict()['transformer.wte.weight']
    assert torch.equal(weights(), weights(dropout=0.5, batch_size=2)) and not torch.equal(weights(), weights(seed=1))


def test_a_resumed_run_may_change_its_dropout(tiny):
    config, model_config = tiny()
    train.train(config, model_config)
    assert resume(config.out_dir, '--dropout=0.2', '--max_iters=8') == 0
    assert metrics(config.out_dir)[-1]['iter'] == 8


def test_a_path_in_place_of_a_data_sets_name(tiny, data_dir):
    folder = os.path.basename(data_dir)
    with pytest.raises(UserError, match='--dataset=tiny_byte is a name below --data_dir'):
        train.train(*tiny(dataset=f'{folder}/tiny_byte'))
