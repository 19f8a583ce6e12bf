"""Checkpoints: plain, complete, never half written; whatever else lies in their place is one clear line."""
import io
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import asdict

import pytest
import torch
from conftest import FORKS, resume
from test_train import assert_same_run
from torch.utils._python_dispatch import TorchDispatchMode

import train
from model import GPT, GPTConfig, load_encoder, load_model
from nanodrift import checkpoint, sharding
from nanodrift.machine import Ranks
from nanodrift.options import UserError
from nanodrift.variants import VARIANTS

KEYS = {'model', 'optimizer', 'scaler', 'model_args', 'config', 'tokenizer', 'iter_num', 'best_val_loss', 'random_states',
        'run_id', 'parents', 'commit'}


def plain(value):
    """Whether there is nothing but tensors and plain Python values in it."""
    if isinstance(value, dict):
        return all(type(k) in (str, int) and plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or type(value) in (torch.Tensor, str, int, float, bool)


def one_line(error):
    text = str(error.value)
    assert '\n' not in text and len(text) < 400
    return text


@pytest.fixture
def trained(tiny):
    config, model_config = tiny(max_iters=4, eval_interval=2)
    assert train.train(config, model_config) == 0
    return config.out_dir


@pytest.mark.parametrize('name', ['ckpt.pt', 'ckpt_best.pt'])
def test_a_checkpoint_is_plain_and_complete(trained, name):
    state = torch.load(f'{trained}/{name}', weights_only=True)
    assert KEYS <= set(state) and plain(state)
    assert state['config']['batch_size'] == 4 and state['config']['n_embd'] == 16
    assert state['model_args']['vocab_size'] == 257 and state['tokenizer']['name'] == 'byte'
    assert state['parents'] == [] and len(state['run_id']) == 32


def test_a_checkpoint_gives_the_model_back(trained):
    state = checkpoint.load(checkpoint.find(trained, 'last'))
    model = load_model(state)
    assert not model.training
    assert all(torch.equal(v, state['model'][k]) for k, v in model.state_dict().items())


def test_weights_of_an_older_model_are_one_clear_line(trained):
    state = torch.load(f'{trained}/ckpt.pt', weights_only=True)
    del state['model']['transformer.h.0.ln_1.bias']
    for name in ('ckpt.pt', 'ckpt_best.pt'):
        torch.save(state, f'{trained}/{name}')
    for load in (lambda: load_model(checkpoint.load(checkpoint.find(trained))), lambda: resume(trained)):
        with pytest.raises(UserError, match='Missing .*ln_1.bias') as e:
            load()
        one_line(e)


def test_find(trained, tmp_path):
    assert checkpoint.find(trained) == f'{trained}/ckpt_best.pt' != checkpoint.find(trained, 'last')
    os.remove(f'{trained}/ckpt_best.pt')
    assert checkpoint.find(trained) == f'{trained}/ckpt.pt'
    with pytest.raises(UserError, match='nowhere'):
        checkpoint.find(str(tmp_path / 'nowhere'))
    with pytest.raises(UserError, match='best, last'):
        checkpoint.find(trained, 'first')


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(UserError, match='no checkpoint') as e:
        checkpoint.load(str(tmp_path / 'ckpt.pt'))
    one_line(e)


def test_truncated_anywhere(trained):
    with open(f'{trained}/ckpt.pt', 'rb') as f:
        whole = f.read()
    for length in [0, 1, 3, 100, len(whole) // 2, len(whole) - 1000, len(whole) - 20, len(whole) - 1]:
        with open(f'{trained}/ckpt.pt', 'wb') as f:
            f.write(whole[:length])
        with pytest.raises(UserError, match='not a readable checkpoint') as e:
            resume(trained)
        one_line(e)


def flip(path, place):
    with open(path, 'r+b') as f:
        f.seek(place)
        byte = f.read(1)[0]
        f.seek(place)
        f.write(bytes([byte ^ 1 << place % 8]))


def same(a, b):
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    """At any place: in the values, in the pickle, in the directory of the file."""
    state = {'iter_num': 7, 'model': {str(k): torch.randn(400) for k in range(3)}, 'model_args': {}, 'config': {},
             'tokenizer': {}, 'run_id': 'a', 'parents': []}
    checkpoint.save(str(tmp_path), state, ['last'])
    path, noticed = str(tmp_path / 'ckpt.pt'), 0
    size = os.path.getsize(path)
    places = random.Random(0).sample(range(size), 300) + list(range(size - 100, size))
    for place in places:
        flip(path, place)
        try:
            assert same(checkpoint.load(path), state), place
        except UserError:
            noticed += 1
        flip(path, place)
    assert noticed > len(places) / 2 and same(checkpoint.load(path), state)


@pytest.mark.parametrize('damage', [lambda path: flip(path, os.path.getsize(path) // 2),
                                    lambda path: os.truncate(path, os.path.getsize(path) // 2), os.remove])
def test_resuming_goes_on_from_the_newest_checkpoint_that_is_whole(tiny, damage, capsys):
    """The log is cut to what that one knows, so that the run ends as if nothing had been."""
    overrides = dict(max_iters=6, eval_interval=3, keep_every=2)
    straight, *rest = tiny(out_dir='straight', **overrides)
    assert train.train(straight, *rest) == 0
    config, *rest = tiny(**overrides)
    assert train.train(config, *rest) == 0
    for name in ('ckpt.pt', 'ckpt_best.pt', 'ckpt_000006.pt'):
        path = f'{config.out_dir}/{name}'
        os.rename(path, path + '.linked')
        shutil.copyfile(path + '.linked', path)  # they may be one file
        damage(path)
    capsys.readouterr()
    assert train.main([f'--out_dir={config.out_dir}', '--init_from=auto', '--max_iters=6']) == 0
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'ckpt_000004.pt, iteration 4' in said and 'ckpt.pt' in said
    assert_same_run(straight.out_dir, config.out_dir)
    os.remove(f'{config.out_dir}/ckpt.pt')  # now the best one is that of the last iteration: nothing is left to train
    assert resume(config.out_dir) == 0
    assert_same_run(straight.out_dir, config.out_dir)


def test_no_checkpoint_that_is_whole(trained):
    for name in ('ckpt.pt', 'ckpt_best.pt'):
        os.truncate(f'{trained}/{name}', 100)
    with pytest.raises(UserError, match='ckpt.pt is not a readable.*ckpt_best.pt') as e:
        resume(trained)
    one_line(e)


def test_a_checkpoint_of_any_name_is_a_run_to_keep(trained, tiny):
    """The last one may have been removed because it was damaged, or only the best one copied."""
    os.remove(f'{trained}/ckpt.pt')
    before = sorted(os.listdir(trained))
    with pytest.raises(UserError, match='holds a run'):
        train.train(*tiny())
    assert sorted(os.listdir(trained)) == before


def garbage():
    """File contents that are no checkpoint, some of them nearly."""
    rng = random.Random(0)
    yield from (b'hello', b'\n\n', b'PK\x03\x04', b'\x80\x02', b'\x80\x04\x95' + bytes(50), b'\x7fELF' + bytes(100))
    yield from (rng.randbytes(1000) for _ in range(20))
    yield from (b'\x80\x02' + rng.randbytes(200) for _ in range(50))
    for value in (3, [1, 2], {}, {'model': {}}, {'model': {}, 'config': 3}):
        f = io.BytesIO()
        torch.save(value, f)
        yield f.getvalue()


def test_garbage(tmp_path):
    for data in garbage():
        (tmp_path / 'ckpt.pt').write_bytes(data)
        with pytest.raises(UserError, match='not a readable checkpoint') as e:
            checkpoint.load(str(tmp_path / 'ckpt.pt'))
        one_line(e)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'evil'),)
    torch.save({'model': Evil()}, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='not a readable checkpoint') as e:
        checkpoint.load(str(tmp_path / 'ckpt.pt'))
    one_line(e)
    assert not (tmp_path / 'evil').exists()


@pytest.mark.parametrize('read', [load_model, train.config_of])
def test_unknown_model_arguments(read):
    with pytest.raises(UserError, match='the checkpoint has model arguments unknown here: n_wings') as e:
        read({'model_args': {'n_layer': 1, 'n_wings': 2}})
    one_line(e)


# ---------------------------------------------------------------------------------------------------------------------
# saving

def state_number(i):
    """A state that cannot pass for another one, nor for a mixture; 400 kB."""
    return dict.fromkeys(KEYS, 0) | {'iter_num': i, 'model': {str(k): torch.full((10000,), float(i)) for k in range(10)}}


def number_of(path):
    state = checkpoint.read(path)
    assert all((t == state['iter_num']).all() and len(t) == 10000 for t in state['model'].values())
    return state['iter_num']


def save_for_ever(folder, first, ready):
    i = first
    while True:
        checkpoint.save(folder, state_number(i), ['best', 'last'] if i % 2 else ['last'])
        i += 1
        ready.send(i)


def test_killed_at_any_moment(fork, tmp_path):
    """Each process goes on in the folder that the one killed before it left behind."""
    rng = random.Random(time.time())
    written = 1  # odd, so that there is a best one from the start
    for kill in range(30):
        reader, writer = FORKS.Pipe(duplex=False)
        process = fork(save_for_ever, str(tmp_path), written, writer)
        writer.close()
        written = reader.recv()
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        while reader.poll():
            try:
                written = reader.recv()
            except EOFError:
                break
        # the one on its way may have arrived or not
        last, best = number_of(tmp_path / 'ckpt.pt'), number_of(tmp_path / 'ckpt_best.pt')
        assert last in (written - 1, written), kill
        assert best % 2 and written - 2 <= best <= written, kill
        written = last + 1


def test_what_a_killed_save_left_behind_cannot_spoil_the_best(tmp_path, monkeypatch):
    """Killed after the best checkpoint got its name, before the last one did: both names then mean one file."""
    checkpoint.save(str(tmp_path), state_number(1), ['best', 'last'])
    os.link(tmp_path / 'ckpt_best.pt', tmp_path / 'ckpt.tmp')

    def killed(state, f):
        f.write(b'half of a checkp')
        f.flush()
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, 'save', killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(str(tmp_path), state_number(2), ['last'])
    assert number_of(tmp_path / 'ckpt_best.pt') == 1 == number_of(tmp_path / 'ckpt.pt')


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='reads the names of open files from /proc')
def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tiny, monkeypatch):
    """And before it the log that it knows of; last the name itself. Without a power cut nothing else shows it."""
    done, fsync, replace = [], os.fsync, os.replace

    def flush(fd):
        done.append(os.path.basename(os.readlink(f'/proc/self/fd/{fd}')))
        fsync(fd)

    def rename(source, target):
        done.append(f'{os.path.basename(target)} appears')
        replace(source, target)
    monkeypatch.setattr(os, 'fsync', flush)
    monkeypatch.setattr(os, 'replace', rename)
    config, *rest = tiny(max_iters=1, eval_interval=1)
    assert train.train(config, *rest) == 0
    first = done.index('ckpt.pt appears')
    assert done[first - 1].endswith('.tmp') and done[first + 1] == os.path.basename(config.out_dir)
    assert 'metrics.jsonl' in done[:first - 1]


def test_two_names_are_two_checkpoints(tmp_path):
    checkpoint.save(str(tmp_path), state_number(1), ['best', 'last'])
    assert number_of(tmp_path / 'ckpt_best.pt') == 1 == number_of(tmp_path / 'ckpt.pt')
    checkpoint.save(str(tmp_path), state_number(2), ['last'])
    assert number_of(tmp_path / 'ckpt_best.pt') == 1 and number_of(tmp_path / 'ckpt.pt') == 2
    checkpoint.save(str(tmp_path), state_number(3), ['best', 'last'])
    assert number_of(tmp_path / 'ckpt_best.pt') == 3 == number_of(tmp_path / 'ckpt.pt')
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'ckpt_best.pt']


def test_without_hard_links(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError('no hard links here')
    monkeypatch.setattr(os, 'link', fail)
    test_two_names_are_two_checkpoints(tmp_path)


def save_with_a_full_disk(folder):
    """A limit on the size of files stands in for a full disk: write() fails in the middle of one."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpoint.save(folder, state_number(2), ['best', 'last'])
    except UserError as e:
        print(e)
        return 2
    return 0


def test_a_full_disk(fork, tmp_path):
    (tmp_path / 'run').mkdir()
    checkpoint.save(str(tmp_path / 'run'), state_number(1), ['best', 'last'])
    process = fork(save_with_a_full_disk, str(tmp_path / 'run'))
    process.join()
    said = (tmp_path / 'fork.out').read_text()
    assert process.exitcode == 2 and said.count('\n') == 1 and 'unchanged' in said, said
    assert number_of(tmp_path / 'run' / 'ckpt.pt') == 1 == number_of(tmp_path / 'run' / 'ckpt_best.pt')
    assert sorted(os.listdir(tmp_path / 'run')) == ['ckpt.pt', 'ckpt_best.pt']


def test_a_full_disk_without_hard_links(tmp_path, monkeypatch):
    """The best checkpoint, or one that is kept, is then a copy, for which there may be no room."""
    checkpoint.save(str(tmp_path), state_number(1), ['best', 'last'])

    def fail(*args):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'link', fail)
    monkeypatch.setattr(shutil, 'copyfile', fail)
    for write in (lambda: checkpoint.save(str(tmp_path), state_number(2), ['best', 'last']),
                  lambda: checkpoint.keep(str(tmp_path), 2)):
        with pytest.raises(UserError, match='cannot write.*No space left'):
            write()
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'ckpt_best.pt'] and number_of(tmp_path / 'ckpt.pt') == 1


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(UserError, match='nowhere') as e:
        checkpoint.save(str(tmp_path / 'nowhere'), state_number(1), ['last'])
    one_line(e)


def test_the_commit_is_the_code_that_runs(trained, tiny, monkeypatch):
    """Whatever the files have become when the run saves."""
    config, model_config = tiny(out_dir='other')
    monkeypatch.setattr(checkpoint, 'commit', lambda: 'at start')
    trainer = train.Trainer(config, model_config, train.setup_ranks('cpu', 'auto', 10))
    monkeypatch.setattr(checkpoint, 'commit', lambda: 'later')
    trainer.train()
    assert torch.load(f'{config.out_dir}/ckpt.pt', weights_only=True)['commit'] == 'at start'


def test_positions_are_cut_and_never_made_up():
    """Only a shifted model has one more than it can be given, which starts as the last one."""
    sizes = dict(vocab_size=11, n_layer=1, n_head=1, n_embd=8)
    weights = GPT(GPTConfig(block_size=8, **sizes)).state_dict()
    with pytest.raises(UserError, match='wpe'):
        checkpoint.start_from(GPT(GPTConfig(block_size=9, **sizes)), weights)
    shifted = GPT(GPTConfig(block_size=8, model_type='diffusion', diffusion_objective='nelbo', diffusion_block=4,
                            diffusion_shift=True, positions='learned', **sizes))
    checkpoint.start_from(shifted, weights, rows=11)
    known = weights['transformer.wpe.weight']
    assert torch.equal(shifted.transformer.wpe.weight, torch.cat((known, known[-1:])))


def test_too_little_memory_on_resume_is_not_taken_for_damage(tiny, monkeypatch):
    config, *rest = tiny(max_iters=1)
    assert train.train(config, *rest) == 0
    fail = RuntimeError('CUDA out of memory')
    monkeypatch.setattr(sharding, 'share_optimizer', lambda *_: (_ for _ in ()).throw(fail))
    with pytest.raises(RuntimeError, match='out of memory'):
        train.main([f'--out_dir={config.out_dir}', '--init_from=resume', '--max_iters=2'])


def test_too_little_memory_for_a_file_is_not_taken_for_damage(trained, monkeypatch):
    fail = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
    monkeypatch.setattr(torch, 'load', lambda *_, **__: (_ for _ in ()).throw(fail))
    with pytest.raises(RuntimeError, match='allocate'):
        checkpoint.load_last(trained)


# ---------------------------------------------------------------------------------------------------------------------
# weights out of a checkpoint: none is drawn first, none copied

class Draws(TorchDispatchMode):
    """While it is on: the operations that draw random numbers into memory."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and out.device.type != 'meta':
            self.seen.append(str(func))
        return out


def memory_of(tensors):
    return {tensor.data_ptr() for tensor in tensors}


def states_of(model):
    """Hidden states, or embeddings, that a model makes of a training batch."""
    rng, c = torch.Generator().manual_seed(1), model.config
    tokens = torch.randint(c.vocab_size, (2, model.objective.window(c.block_size)), generator=rng)
    X, Y, _ = model.objective.make_batch(tokens, rng)
    return model.embeddings(X, Y) if c.outputs_embeddings else model.trunk(X)


@torch.no_grad()
@pytest.mark.parametrize('name', [*VARIANTS, 'token drift', 'drafts', 'shifted blocks'])
def test_a_model_is_made_of_the_tensors_of_its_checkpoint(tiny, name):
    _, config = tiny(**VARIANTS.get(name, {'model_type': name}))
    config.vocab_size = 257
    model = GPT(config, load_encoder(config.encoder) if config.has_encoder else None).eval()
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    state, before = {'model': model.state_dict(), 'model_args': asdict(config)}, torch.get_rng_state()
    with Draws() as draws:
        loaded = load_model(state)
    assert not draws.seen and torch.equal(torch.get_rng_state(), before)
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert memory_of(loaded.parameters()) == memory_of(model.parameters())
    for (_, mine), (_, theirs) in zip(loaded.named_buffers(), model.named_buffers(), strict=True):
        assert mine.device.type == 'cpu' and torch.equal(mine, theirs)
    assert config.outputs_embeddings or loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(states_of(loaded), states_of(model))


def test_a_buffer_that_no_checkpoint_holds_must_name_its_device(monkeypatch):
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8)
    build, weights = GPT.build, GPT(config).state_dict()

    def with_buffer(self, config):
        self.register_buffer('seen', torch.ones(3), persistent=False)
        return build(self, config)
    monkeypatch.setattr(GPT, 'build', with_buffer)
    with pytest.raises(AssertionError, match='seen.*device="cpu"'):
        load_model({'model': weights, 'model_args': asdict(config)})


def test_tensors_of_another_type_or_layout_are_converted():
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8)
    weights = dict(GPT(config).state_dict())
    weights['transformer.wpe.weight'] = weights['transformer.wpe.weight'].bfloat16()
    turned = weights['transformer.h.0.mlp.c_fc.weight'] = weights['transformer.h.0.mlp.c_fc.weight'].t().contiguous().t()
    model = load_model({'model': weights, 'model_args': asdict(config)})
    assert all(p.dtype == torch.float32 and p.is_contiguous() and p.requires_grad for p in model.parameters())
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, turned)


@pytest.mark.parametrize('model_type', ['gpt2', 'rotating', 'drifting'])
def test_a_run_goes_on_in_the_tensors_of_its_checkpoint(tiny, model_type):
    config, model_config = tiny(model_type=model_type, max_iters=2)
    train.train(config, model_config)
    *configs, state = train.read_settings(['--init_from=resume', f'--out_dir={config.out_dir}'])
    memory = memory_of(state['model'].values())
    with Draws() as draws:
        trainer = train.Trainer(*configs, Ranks(), state)
    assert not draws.seen and memory_of(trainer.model.parameters()) == memory
    assert len(trainer.optimizer.state) == len(list(trainer.model.parameters()))
