"""
Windows of tokens from data/<name>/{train,val}.bin, in an order that is a pure function of the seed and a number.

The position in the data is one integer, the number of examples seen. Resuming needs no other state, and the examples do not
depend on the number of ranks. Random numbers of training, evaluation and drifting come from the streams named here; those of
initialisation and dropout come from torch's global state.
"""
import glob
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from threading import Lock

import numpy as np
import torch

from nanodrift.corpus import DATASETS
from nanodrift.options import UserError, one_of

ORDERS = ('epoch', 'random')


class Stream(IntEnum):
    """The random streams of a seed, for `derive_seed`. Checkpoints and tables depend on their numbers."""
    RANDOM_WINDOWS = 1   # offsets of --data_order=random
    EPOCH_ORDER = 2      # the order of the windows of an epoch
    TRAIN_BATCH = 3      # masks, replaced tokens and noise of a micro-batch of training
    EVAL_BATCH = 4       # the same in evaluation
    SAMPLES = 5          # what evaluate.py draws from models
    HELD_OUT = 6         # which windows of held-out text samples are compared with
    REFERENCE_ROWS = 7   # samples of n-gram models, shuffled spans
    FIRST_TOKENS = 8     # that samples of causal models go on from
    DRIFT_TARGETS = 9    # positions and prefix lengths of an iteration of drifting
    SHOWN_TEXTS = 10     # samples in a report
    ITERATION = 11       # what the micro-batches of an iteration share
    # of experiments/, where numbers may repeat: no seed is used for both
    REPLACED_TOKENS = 9  # of experiments/repair_accuracy.py
    POINTS = 8           # of experiments/drifting_2d.py: its training
    MEASURED_POINTS = 9  # and its measurement


def mix(x):
    """splitmix64: a well-mixed uint64 for every uint64 (Steele, Lea, Flood 2014)."""
    x = np.asarray(x, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_seed(*numbers):
    """One 63-bit seed from several whole numbers; near inputs give unrelated seeds."""
    with np.errstate(over='ignore'):
        seed = np.uint64(0)
        for n in numbers:
            seed = mix(seed ^ np.uint64(int(n) % 2 ** 64))
    return int(seed >> np.uint64(1))


def permute(k, n, seed):
    """The position of element k (uint64 array, k < n) in a pseudo-random permutation of range(n), computed without storing
    it.

    A four-round Feistel network over the next even power of two, walked along its cycle until it lands below n
    (Black and Rogaway 2002); an epoch of a corpus at stride 1 would not fit in memory as a list."""
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    x = np.asarray(k, dtype=np.uint64).copy()
    todo = np.ones(x.shape, dtype=bool)
    with np.errstate(over='ignore'):
        while todo.any():
            left, right = x[todo] >> half, x[todo] & mask
            for r in range(4):
                left, right = right, left ^ (mix(right + np.uint64(derive_seed(seed, r))) & mask)
            x[todo] = (left << half) | right
            todo = x >= np.uint64(n)
    return x.astype(np.int64)


class Windows:
    """
    Examples of `window` tokens of one .bin file, `stride` apart.

    order 'epoch': every example once per epoch, each epoch in a seeded order of its own. 'random': uniform offsets.
    `limit`, where it is not 0, is how many tokens of the file are used.
    Raises UserError where the file holds less than one window, and where an id that is read is not below `vocab_size`.
    """

    def __init__(self, path, dtype, window, stride, order='epoch', seed=0, limit=0, vocab_size=2 ** 32):
        self.dtype, self.window, self.stride, self.seed = np.dtype(dtype).newbyteorder('<'), window, stride, seed
        self.order, self.vocab_size = one_of('data_order', order, ORDERS), vocab_size
        if not os.path.isfile(path):
            raise UserError(f'{path} is missing: prepare the data set again')
        self.lock = Lock()
        self.file = open(path, 'rb', buffering=0)  # read piece by piece: a mapping would count as memory in use
        self.tokens = os.path.getsize(path) // self.dtype.itemsize
        if limit:
            self.tokens = min(self.tokens, limit)
        if self.tokens < window:
            raise UserError(f'{path} gives {self.tokens} tokens, fewer than one window of {window}: '
                            'lower --block_size, or take or prepare more text')

    def __len__(self):
        return (self.tokens - self.window) // self.stride + 1

    def offsets(self, numbers):
        """Token offsets of the examples with these running numbers, counted from the start of training."""
        numbers = np.asarray(numbers, dtype=np.uint64)
        if self.order == 'random':
            with np.errstate(over='ignore'):
                draws = mix(mix(numbers) ^ np.uint64(derive_seed(self.seed, Stream.RANDOM_WINDOWS)))
            return (draws % np.uint64(self.tokens - self.window + 1)).astype(np.int64)
        epochs, numbers = np.divmod(numbers, np.uint64(len(self)))
        index = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index[here] = permute(numbers[here], len(self), derive_seed(self.seed, Stream.EPOCH_ORDER, int(epoch)))
        return index * self.stride

    def read(self, offsets):
        """The windows at these token offsets, (B, window) int64."""
        batch = np.empty((len(offsets), self.window), dtype=self.dtype)
        for row, offset in zip(batch, offsets):
            with self.lock:  # batches are made ahead on a thread, while an evaluation reads the same file
                self.file.seek(int(offset) * self.dtype.itemsize)
                count = self.file.readinto(row)
            if count != row.nbytes:
                raise UserError(f'{self.file.name} ended early: was it changed while it was read?')
        check_ids(batch, self.vocab_size, self.file.name)
        return torch.from_numpy(batch.astype(np.int64))

    def spread(self, count):
        """Offsets of `count` windows, or of all if there are fewer, spread evenly over the file and always the same."""
        count = min(count, len(self))
        return np.linspace(0, len(self) - 1, count).round().astype(np.int64) * self.stride


def read_tokens(folder, split, meta, count=-1):
    """The first `count` token ids of a split, or all of them, as an int64 array."""
    dtype, path = np.dtype(meta['dtype']).newbyteorder('<'), os.path.join(folder, f'{split}.bin')
    ids = np.fromfile(path, dtype=dtype, count=count)
    check_ids(ids, meta['vocab_size'], path)
    return ids.astype(np.int64)


def check_ids(ids, vocab_size, path):
    """Raises UserError where a file holds an id beyond the vocabulary: it would crash, or train what has no text."""
    if ids.size and ids.max() >= vocab_size:
        raise UserError(f'{path} holds the id {ids.max()}, and the vocabulary has {vocab_size}: prepare the data set again')


# ---------------------------------------------------------------------------------------------------------------------
# meta.json

def prepare_command(name):
    """The command that makes the data set `name`."""
    dataset, tokenizer, size = re.fullmatch(r'(?s)(.*?)(?:_(byte|char|bpe(?=\d))(\d*))?', name).groups()
    text = dataset if dataset in DATASETS else f'--input=PATH --name={dataset}'
    return f'python prepare.py {text}' + (f' --tokenizer={tokenizer}{":" * bool(size)}{size}' if tokenizer else '')


def is_complete(meta, folder):
    """Whether a meta.json says what it should, and the files are as long as it says. Raises KeyError or TypeError where it
    is of another form."""
    splits = [meta['splits'][split] for split in ('train', 'val')]
    numbers = [meta['vocab_size'], meta['eot'], splits[1]['bytes'], *(split['tokens'] for split in splits)]
    sizes = [os.path.getsize(os.path.join(folder, f'{split}.bin')) for split in ('train', 'val')]
    return meta['dtype'] in ('uint16', 'uint32') and isinstance(meta['tokenizer'], dict) and \
        all(type(number) is int and number > 0 for number in numbers) and \
        sizes == [split['tokens'] * np.dtype(meta['dtype']).itemsize for split in splits]


def ahead(items, begin):
    """The items of an endless iterator, each made on a thread while the one before it is in use; `begin` runs there
    first."""
    thread = ThreadPoolExecutor(1, initializer=begin)
    waiting = thread.submit(next, items)
    while True:
        item, waiting = waiting.result(), thread.submit(next, items)
        yield item


def load_meta(folder):
    """The meta.json of a data set, as a dict. Raises UserError, with the command that makes it, where the data set is
    missing or incomplete."""
    data_dir, name = os.path.split(os.path.abspath(folder))
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            meta = json.load(f)
        complete = is_complete(meta, folder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        complete = False
    if not complete:
        there = sorted(os.path.basename(os.path.dirname(path)) for path in
                       glob.glob(os.path.join(glob.escape(data_dir), '[!.]*', 'meta.json')))
        state = 'is incomplete' if os.path.isdir(folder) else 'does not exist'
        above = os.path.join(os.path.dirname(data_dir), name)
        if not there and os.path.isfile(os.path.join(above, 'meta.json')):
            raise UserError(f'the data set {folder} {state}, {os.path.relpath(above)} does: --dataset={name} is a name '
                            'below --data_dir, not a path')
        raise UserError(f'the data set {folder} {state}: run `{prepare_command(name)}` first; '
                        f'prepared so far: {", ".join(there) or "none"}')
    return meta


def text_hashes(meta):
    """{split: hash of its text} of a data set."""
    return {split: counts.get('text_sha256') for split, counts in meta['splits'].items()}
