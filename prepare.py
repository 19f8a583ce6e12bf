"""
Any text -> data/<name>/{train.bin,val.bin,meta.json}. Run once, before training:

    python prepare.py python                                     # the standard library's own source; no download
    python prepare.py tinystories|wikitext-2|wikitext-103|shakespeare [--tokenizer=gpt2|byte|char|bpe:4096]
    python prepare.py --input=PATH --name=NAME [--val_input=PATH]
    python prepare.py --packages=config/packages.txt --name=NAME                the source of Python packages, 31 MB of code

A `.bin` file is a flat row of token ids (little-endian uint16, or uint32 where the vocabulary needs it), the
end-of-text id after every document; meta.json says what they are. The name gets `_<tokenizer>` where that is not gpt2.

PATH is a text file (one document, or several with `<|endoftext|>` between them), a file of rows (`.jsonl`, `.ndjson`,
`.parquet`, `.json`, `.csv`, `.tsv`: one document per row, in the column --text_key), or a folder. A `.gz` of these is
unpacked. Of a folder, files of rows are taken; where there are none, every UTF-8 text file is one document (a `.txt` is
split at `<|endoftext|>`). Hidden files are left out. `.json`, `.csv` and `.tsv` in a folder are rows where --text_key is
given. Text is taken as it is, CR LF included; only a byte-order mark is dropped. Rows that are no text are left out and
counted.
"""
import contextlib
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from nanodrift import corpus
from nanodrift.corpus import DATASETS, TEXT_KEY, make_source, split_stream
from nanodrift.options import UserError, configure, one_of, option, run
from nanodrift.system import cores, move, write_atomically
from nanodrift.tokenizer import EOT_TEXT, check_spec, last_safe_cut, tokenizer_from_spec

BPE_SAMPLE = 20_000_000     # the characters, from the start of the training text, that a bpe tokenizer learns from


@dataclass
class PrepareConfig:
    tokenizer: str = option('gpt2', 'gpt2, byte, char, or bpe:N, which learns N ids from the training text')
    input: str = option('', 'text of your own: a text file, a folder, a .jsonl or a .parquet')
    packages: str = option('', "a list of Python packages in pip's format, pinned by version and hash: their source")
    name: str = option('', 'what to call the data set made from --input or --packages')
    val_input: str = option('', 'validation text for --input; without it, --val_fraction is held out')
    val_fraction: float = option(0.1, 'the part held out where there is no official validation split: documents chosen by '
                                      'a hash of how they begin, or the end of the text where documents are few')
    text_key: str = option('', f"the column that holds the text, in files that have columns; empty is '{TEXT_KEY}'")
    data_dir: str = option('data', 'the folder that data sets are written to')
    num_proc: int = option(0, 'tokenizing threads; 0 is one per CPU core')


# -----------------------------------------------------------------------------
# encoding: (split, text, ends) -> files

def batches(stream, safe_cut):
    """Joins and cuts the stream to lists of (split, text, ends) of about corpus.PIECE characters, for one task each."""
    batch, size, text, searched = [], 0, '', 0
    for split, part, ends in stream:
        text += part
        if not ends and len(text) < corpus.PIECE:
            continue
        cut = len(text) if ends else safe_cut(text, searched)
        if cut or ends:
            batch.append((split, text[:cut], ends))
            size, text, searched = size + cut, text[cut:], 0
        else:
            searched = len(text) - 1    # the last character may yet turn out to come before a space
        if size >= corpus.PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(batch, tokenizer, dtype):
    """One task: {split: (ids as `dtype`, UTF-8 text with an end-of-text literal after every document, documents)}."""
    eot = np.array([tokenizer.eot], dtype=np.uint32)
    ids, texts, documents = defaultdict(list), defaultdict(list), Counter()
    for split, text, ends in batch:
        ids[split] += [tokenizer.encode_to_numpy(text), eot] if ends else [tokenizer.encode_to_numpy(text)]
        texts[split] += [text, EOT_TEXT] if ends else [text]
        documents[split] += ends
    return {split: (np.concatenate(ids[split]).astype(dtype), ''.join(texts[split]).encode('utf-8'), documents[split])
            for split in ids}


def in_order(function, items, num_proc):
    """map() on threads (the tokenizers release the GIL), a few items ahead so that memory stays bounded."""
    with ThreadPoolExecutor(num_proc) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class SplitWriter:
    """Writes one .bin file and counts what goes into it."""

    def __init__(self, path):
        self.file = open(path, 'wb')
        self.tokens = self.documents = self.bytes = 0
        self.sha256, self.text_sha256 = hashlib.sha256(), hashlib.sha256()

    def write(self, ids, text, documents):
        data = ids.tobytes()
        self.file.write(data)
        self.sha256.update(data)
        self.text_sha256.update(text)
        self.tokens += len(ids)
        self.documents += documents
        self.bytes += len(text) - documents * len(EOT_TEXT)

    def close(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def to_meta(self):
        return {'tokens': self.tokens, 'documents': self.documents, 'bytes': self.bytes,
                'sha256': self.sha256.hexdigest(), 'text_sha256': self.text_sha256.hexdigest()}


def write_splits(folder, stream, tokenizer, dtype, num_proc, size):
    """Writes train.bin and val.bin; returns what meta.json says of each. Raises UserError where one would be empty."""
    from tqdm import tqdm
    with contextlib.ExitStack() as stack:
        writers = {split: SplitWriter(os.path.join(folder, f'{split}.bin')) for split in ('train', 'val')}
        for writer in writers.values():
            stack.callback(writer.close)
        # Only where a person watches: a log, or an error in it, stays one line.
        bar = stack.enter_context(tqdm(total=size, unit='B', unit_scale=True, leave=False, disable=None))
        work = partial(encode, tokenizer=tokenizer, dtype=dtype)
        for result in in_order(work, batches(stream, tokenizer.safe_cut), num_proc):
            for split, (ids, text, documents) in result.items():
                writers[split].write(ids, text, documents)
                bar.update(len(text))
    for split, writer in writers.items():
        if not writer.documents:
            raise UserError(f'the {split} split is empty: there is no text to prepare')
    return {split: writer.to_meta() for split, writer in writers.items()}


def training_sample(stream):
    """The training texts, up to BPE_SAMPLE characters, that a bpe tokenizer learns from."""
    size = 0
    for batch in batches(stream, last_safe_cut):
        for split, text, _ in batch:
            if split == 'train':
                size += len(text)
                yield text
        if size >= BPE_SAMPLE:
            return


# -----------------------------------------------------------------------------
# the data set on disk

@contextlib.contextmanager
def temporary_folder(folder):
    """A hidden folder next to the data set's, removed at the end, whatever happens. Where the data set's folder is a link,
    it lies next to the link's target, because a rename works on one disk only."""
    data_dir, name = os.path.split(os.path.realpath(folder))
    prefix = f'.{name}.tmp-'
    os.makedirs(data_dir, exist_ok=True)
    for left in glob.glob(os.path.join(glob.escape(data_dir), glob.escape(prefix) + '*')):
        # Only a killed run leaves one behind; one that is still written to belongs to another run.
        if time.time() - max(map(os.path.getmtime, [left, *glob.glob(os.path.join(glob.escape(left), '*'))])) > 3600:
            shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=prefix, dir=data_dir)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(temporary, folder):
    """Moves a finished data set into place. Without meta.json, which is removed first and moved in last, it counts as
    incomplete, so that no reader sees old and new files together. Signals are held off meanwhile."""
    os.makedirs(folder, exist_ok=True)
    files, put_aside = ('train.bin', 'val.bin', 'meta.json'), []
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            for path in [path for file in files[::-1] if os.path.exists(path := os.path.join(folder, file))]:
                os.replace(path, f'{path}.old')
                put_aside.append(path)
            for file in files:
                move(os.path.join(temporary, file), os.path.join(folder, file))
        except OSError:  # Windows does not move a file that somebody reads: the old data set stays
            for path in put_aside[::-1]:
                move(f'{path}.old', path)
            raise
        for file in files:  # those too that a killed process has left
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, f'{file}.old'))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def versions(*packages):
    """{name: version} of Python and of those packages that are installed."""
    installed = {'python': platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def report(meta, data_dir, name):
    """Prints what was made, and the command that trains on it."""
    print(f"{'split':<6}{'tokens':>15}{'documents':>12}{'bytes':>16}  dtype   path")
    for split, counts in meta['splits'].items():
        print(f"{split:<6}{counts['tokens']:>15,}{counts['documents']:>12,}{counts['bytes']:>16,}  {meta['dtype']:<6}  "
              f"{os.path.join(data_dir, name, split + '.bin')}")
    elsewhere = '' if data_dir == PrepareConfig.data_dir else f' --data_dir={data_dir}'
    print(f'next: python train.py --dataset={name}{elsewhere}')


def check_arguments(cfg, datasets):
    """Raises UserError for whatever can be seen to be wrong before any text is read. Returns the data set's name."""
    if 'RANK' in os.environ or 'LOCAL_RANK' in os.environ:
        raise UserError('prepare.py does not run inside torchrun: run `python prepare.py ...` once beforehand')
    check_spec(cfg.tokenizer)
    if bool(cfg.input) + bool(cfg.packages) + len(datasets) != 1:
        raise UserError(f"give either one data set ({', '.join(DATASETS)}), --input=PATH --name=NAME or --packages=FILE "
                        '--name=NAME')
    if cfg.packages and (cfg.val_input or cfg.text_key):
        raise UserError('--val_input and --text_key go with --input, not with --packages')
    for dataset in datasets:
        one_of('dataset', dataset, DATASETS)
        if cfg.name or cfg.val_input or cfg.text_key:
            raise UserError(f'--name, --val_input and --text_key go with --input, not with {dataset}')
    if not datasets and not re.fullmatch(r'[^./\\:\s][^/\\:\s]*', cfg.name):
        raise UserError(f'--{"packages" if cfg.packages else "input"} needs --name=NAME without separators or spaces, and '
                        f'not starting in a dot; got {cfg.name!r}')
    if not 0 < cfg.val_fraction < 1:
        raise UserError(f'val_fraction={cfg.val_fraction} is not between 0 and 1')
    if cfg.num_proc < 0:
        raise UserError(f'num_proc={cfg.num_proc} is negative; 0 is one thread per CPU core')
    suffix = '' if cfg.tokenizer == 'gpt2' else '_' + cfg.tokenizer.replace(':', '')
    return (datasets[0] if datasets else cfg.name) + suffix


def prepare(cfg, dataset, name):
    """Makes the data set `name` from `dataset`, or from --input where that is ''."""
    folder = os.path.join(cfg.data_dir, name)
    print(f'preparing {folder}', flush=True)
    source = make_source(cfg, dataset)
    stream = split_stream(source, cfg.val_fraction)
    tokenizer = tokenizer_from_spec(cfg.tokenizer, (text for _, text, _ in stream()),
                                    training_sample(stream()))
    dtype = np.dtype('<u2' if tokenizer.vocab_size <= 65536 else '<u4')
    with temporary_folder(folder) as temporary:
        splits = write_splits(temporary, stream(), tokenizer, dtype, cfg.num_proc or cores(), source.size)
        meta = {'dtype': dtype.name, 'vocab_size': tokenizer.vocab_size, 'eot': tokenizer.eot,
                'tokenizer': tokenizer.to_meta(), 'splits': splits, 'source': source.about,
                'versions': versions('numpy', 'tiktoken', 'tokenizers', 'datasets', 'pyarrow')}
        write_atomically(os.path.join(temporary, 'meta.json'), json.dumps(meta, indent=1).encode())
        publish(temporary, folder)
    if sum(source.left_out.values()):
        print(f'left out {sum(source.left_out.values())} rows that hold no text (null, or not valid Unicode)')
    report(meta, cfg.data_dir, name)


def main(argv):
    cfg, datasets = configure(argv, PrepareConfig, description=__doc__, positional=('dataset', ', '.join(DATASETS)))
    name = check_arguments(cfg, datasets)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # so that a polite kill cleans up as Ctrl-C does
    try:
        prepare(cfg, datasets[0] if datasets else '', name)
    except OSError as e:
        raise UserError(f'{e.filename or cfg.data_dir}: {e.strerror or e}') from None
    except ImportError as e:
        raise UserError(f'{e}; `pip install {e.name}`') from None


if __name__ == '__main__':
    run(main)
