import json
import os
import resource
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

import train
from nanodrift.data import Stream, Windows, derive_seed, load_meta, permute
from nanodrift.machine import Ranks
from nanodrift.options import UserError


@pytest.fixture
def bin_file(tmp_path):
    """bin_file(count or ids) -> path of a .bin of the ids, by default 0, 1, 2, ..."""
    def write(ids, dtype='uint16'):
        path = tmp_path / 'some.bin'
        np.asarray(range(ids) if isinstance(ids, int) else ids, dtype=dtype).tofile(path)
        return str(path)
    return write


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1000, 1023, 1024, 1025, 4095, 4097])
def test_permute_is_a_bijection(n):
    for seed in range(3):
        assert sorted(permute(np.arange(n), n, seed)) == list(range(n))


def test_permute_differs_by_seed_and_moves_what_it_should():
    n = 1000
    one, other = permute(np.arange(n), n, 1), permute(np.arange(n), n, 2)
    assert (one == other).mean() < 0.02 and (one == np.arange(n)).mean() < 0.02
    assert abs(np.corrcoef(np.arange(n), one)[0, 1]) < 0.1


def test_permute_of_a_huge_range_needs_no_memory():
    n = 10 ** 12
    there = permute(np.arange(10000), n, 5)
    assert there.min() >= 0 and there.max() < n and len(set(there.tolist())) == 10000 and there.max() > n // 2


def test_derived_seeds_differ():
    seeds = {derive_seed(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500 and all(0 <= s < 2 ** 63 for s in seeds)
    assert derive_seed(-1) == derive_seed(2 ** 64 - 1)


def test_the_numbers_of_the_streams_never_change():
    """Checkpoints go on with them, and tables were made with them."""
    numbers = {name: int(stream) for name, stream in Stream.__members__.items()}
    assert numbers == {
        'RANDOM_WINDOWS': 1, 'EPOCH_ORDER': 2, 'TRAIN_BATCH': 3, 'EVAL_BATCH': 4, 'SAMPLES': 5, 'HELD_OUT': 6,
        'REFERENCE_ROWS': 7, 'FIRST_TOKENS': 8, 'DRIFT_TARGETS': 9, 'SHOWN_TEXTS': 10, 'ITERATION': 11, 'REPLACED_TOKENS': 9,
        'POINTS': 8, 'MEASURED_POINTS': 9}
    assert derive_seed(Stream.EVAL_BATCH, 7) == derive_seed(4, 7) == 2427256687203335661


@pytest.mark.parametrize('stride', [1, 3, 10])
def test_an_epoch_visits_every_block_once(bin_file, stride):
    windows = Windows(bin_file(105), 'uint16', 11, stride, seed=3)
    n = len(windows)
    assert n == (105 - 11) // stride + 1
    epochs = [windows.offsets(range(epoch * n, (epoch + 1) * n)).tolist() for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 105 - 11 + 1, stride))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert Windows(bin_file(105), 'uint16', 11, stride, seed=4).offsets(range(n)).tolist() != epochs[0]


@pytest.mark.parametrize('order', ['epoch', 'random'])
def test_offsets_depend_on_the_number_alone(bin_file, order):
    windows = Windows(bin_file(500), 'uint16', 10, 7, order, seed=1)
    together = windows.offsets(range(200))
    assert [int(windows.offsets([i])[0]) for i in range(200)] == together.tolist()


def test_random_windows_reach_both_ends(bin_file):
    windows = Windows(bin_file(60), 'uint16', 11, 11, 'random', seed=9)
    offsets = windows.offsets(range(3000))
    assert set(offsets.tolist()) == set(range(50))
    counts = np.bincount(offsets)
    assert counts.min() > 25 and counts.max() < 110  # about 60 each


@pytest.mark.parametrize('dtype', ['uint16', 'uint32'])
def test_windows_are_slices_of_the_file(bin_file, dtype):
    ids = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 300)
    windows = Windows(bin_file(ids, dtype), dtype, 21, 4)
    offsets = np.array([0, 1, 17, 300 - 21])
    batch = windows.read(offsets)
    assert batch.dtype == torch.int64 and batch.tolist() == [ids[o:o + 21].tolist() for o in offsets]


def test_threads_read_what_they_ask_for(bin_file, request):
    """On a GPU batches are made ahead on a thread, also while an evaluation reads the same file."""
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    windows, starts = Windows(bin_file(np.arange(5000)), 'uint16', 50, 1), np.arange(0, 4900, 7)
    with ThreadPoolExecutor(4) as threads:
        for batch in threads.map(windows.read, [starts] * 12):
            assert batch[:, 0].tolist() == starts.tolist()


def test_spread_is_fixed_even_and_complete(bin_file):
    windows = Windows(bin_file(1001), 'uint16', 11, 10)
    assert windows.spread(10 ** 6).tolist() == list(range(0, 991, 10)) == windows.spread(100).tolist()
    some = windows.spread(12)
    assert some[0] == 0 and some[-1] == 990 and set(np.diff(some)) <= {80, 90, 100}
    assert windows.spread(1).tolist() == [0]


@pytest.mark.parametrize('tokens', [0, 10])
def test_a_file_shorter_than_a_window(bin_file, tokens):
    with pytest.raises(UserError, match=f'{tokens} tokens.*block_size'):
        Windows(bin_file(tokens), 'uint16', 11, 11)


def test_exactly_one_window(bin_file):
    windows = Windows(bin_file(11), 'uint16', 11, 1)
    assert len(windows) == 1 and windows.read(windows.offsets(range(5))).tolist() == [list(range(11))] * 5


def test_a_missing_file_and_an_unknown_order(tmp_path, bin_file):
    with pytest.raises(UserError, match='missing'):
        Windows(str(tmp_path / 'no.bin'), 'uint16', 4, 4)
    with pytest.raises(UserError, match='epoch, random'):
        Windows(bin_file(50), 'uint16', 4, 4, 'sorted')


def read_all(path, answer):
    """Reads 200 MB through Windows, and writes the growth of this process's memory, in MB, to the file `answer`."""
    windows = Windows(path, 'uint16', 1025, 1024)
    windows.read(windows.offsets(range(64)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(0, len(windows), 64):
        windows.read(windows.offsets(range(i, min(i + 64, len(windows)))))
    with open(answer, 'w', encoding='utf-8') as f:
        f.write(str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10))


def test_memory_does_not_grow_with_what_was_read(fork, tmp_path):
    path = tmp_path / 'sparse.bin'
    with open(path, 'wb') as f:
        f.truncate(200_000_000)
    fork(read_all, str(path), str(tmp_path / 'answer')).join()
    assert int((tmp_path / 'answer').read_text()) < 30


def write_data_set(folder, vocab_size, dtype, tokens=400):
    """A data set made by hand: random ids up to the last of the vocabulary."""
    folder.mkdir(parents=True)
    ids = np.random.default_rng(0).integers(0, vocab_size, tokens).astype(dtype)
    ids[::50] = vocab_size - 1
    for split in ('train', 'val'):
        ids.tofile(folder / f'{split}.bin')
    splits = {split: {'tokens': tokens, 'documents': 1, 'bytes': tokens} for split in ('train', 'val')}
    meta = dict(dtype=dtype, vocab_size=vocab_size, eot=vocab_size - 1, splits=splits, source={},
                tokenizer={'name': 'byte', 'identity': 'by hand'})
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    return ids


def test_a_vocabulary_beyond_uint16(tiny, tmp_path):
    ids = write_data_set(tmp_path / 'wide', 70000, 'uint32')
    assert ids.max() == 69999
    config, model_config = tiny(data_dir=str(tmp_path), dataset='wide', max_iters=2, n_embd=2, n_head=1, n_layer=1)
    trainer = train.Trainer(config, model_config, Ranks())
    X, Y, _ = trainer._batch(0, 0, 0)
    at = trainer.windows['train'].offsets([0])[0]
    assert X[0].tolist() == ids[at:at + 16].tolist() and Y[0].tolist() == ids[at + 1:at + 17].tolist()
    assert trainer.train() == 0


def test_text_too_short_for_the_block(tiny):
    with pytest.raises(UserError, match='val.bin .*block_size'):
        train.train(*tiny(block_size=1000))


def test_load_meta_names_the_command_and_what_exists(data_dir, tmp_path):
    folder = tmp_path / 'data' / 'x_byte'
    shutil.copytree(f'{data_dir}/tiny_byte', folder)
    for name, command in {'tinystories': 'prepare.py tinystories`',
                          'shakespeare_char': 'prepare.py shakespeare --tokenizer=char`',
                          'wikitext-2_bpe512': 'prepare.py wikitext-2 --tokenizer=bpe:512`',
                          'mine': 'prepare.py --input=PATH --name=mine`',
                          'story_char': 'prepare.py --input=PATH --name=story --tokenizer=char`'}.items():
        with pytest.raises(UserError) as e:
            load_meta(tmp_path / 'data' / name)
        assert command in str(e.value) and 'does not exist' in str(e.value)
        assert str(e.value).endswith('prepared so far: x_byte')
    for damage in (lambda: os.truncate(folder / 'val.bin', 8), lambda: os.remove(folder / 'train.bin'),
                   lambda: (folder / 'meta.json').write_text('{'), lambda: os.remove(folder / 'meta.json')):
        load_meta(folder)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        damage()
        with pytest.raises(UserError, match='incomplete'):
            load_meta(folder)
        for path, content in before.items():
            path.write_bytes(content)
