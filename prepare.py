"""
Any text -> data/<name>/{train.bin,val.bin,meta.json}. Run once, before training:

    python prepare.py python                                     # the standard library's own source; no download
    python prepare.py tinystories|wikitext-2|wikitext-103|shakespeare [--tokenizer=gpt2|byte|char|bpe:4096]
    python prepare.py --input=PATH --name=NAME [--val_input=PATH]

A `.bin` file is a flat row of token ids (little-endian uint16, or uint32 where the vocabulary needs it), the
end-of-text id after every document; meta.json says what they are. The name gets `_<tokenizer>` where that is not gpt2.

PATH is a text file (one document, or several with `<|endoftext|>` between them), a `.jsonl` or `.parquet` file (one
document per row, in the column --text_key), or a folder (one document per UTF-8 text file below it, hidden ones left
out; a `.txt` is split at `<|endoftext|>`). Text is taken as it is, CR LF included; only a byte-order mark is dropped.

Text streams through in pieces, so that memory stays bounded whatever the size of the corpus or of one document. A piece
is a pair (text, ends): the next part of the current document, and whether the document ends with it.
"""
import codecs
import contextlib
import glob
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import signal
import ssl
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from configurator import UserError, configure, one_of, option, run
from tokenizer import EOT_TEXT, check_spec, download, last_safe_cut, tokenizer_from_spec, write_atomically

PIECE = 1 << 18             # bytes read at a time, and about the characters that one task encodes
KEY = 1 << 14               # the characters at the start of a document that choose its split
BPE_SAMPLE = 20_000_000     # the characters, from the start of the training text, that a bpe tokenizer learns from

SHAKESPEARE_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
HUB = {     # dataset: repository and configuration on the Hugging Face hub, with official splits
    'tinystories': ('roneneldan/TinyStories', 'default'),
    'wikitext-2': ('Salesforce/wikitext', 'wikitext-2-raw-v1'),
    'wikitext-103': ('Salesforce/wikitext', 'wikitext-103-raw-v1'),
}
DATASETS = ('python', *HUB, 'shakespeare')
OFFLINE = '`python prepare.py python` and --input=PATH work offline'

# An article's title in WikiText is ` = Title = `; its sections are ` = = Section = = ` and deeper.
WIKITEXT_TITLE = re.compile(r' = (?!= ).* = \n?')


@dataclass
class PrepareConfig:
    tokenizer: str = option('gpt2', 'gpt2, byte, char, or bpe:N, which learns N ids from the training text')
    input: str = option('', 'text of your own: a text file, a folder, a .jsonl or a .parquet')
    name: str = option('', 'what to call the data set made from --input')
    val_input: str = option('', 'validation text for --input; without it, --val_fraction is held out')
    val_fraction: float = option(0.1, 'the part held out where there is no official validation split: documents '
                                      'chosen by a hash of how they begin, or the end of a single document')
    text_key: str = option('text', 'the column of a .jsonl or .parquet that holds the text')
    data_dir: str = option('data', 'the folder that data sets are written to')
    num_proc: int = option(0, 'tokenizing threads; 0 is one per CPU core')


@dataclass
class Source:
    """Where text comes from. `train` and `val` start a new stream of pieces each time they are called."""
    about: dict                 # for meta.json
    train: callable
    val: callable = None        # None where there is no official validation split
    size: int = None            # bytes on disk, if known, for the progress bar


# -----------------------------------------------------------------------------
# readers: files -> pieces

def read_text(path):
    """Yields the text of a UTF-8 file in parts. Raises UserError naming the offset of what is not UTF-8."""
    with open(path, 'rb') as f:
        data, offset, more = b'', 0, True
        while more:
            more = f.read(PIECE)
            data += more
            try:
                text, used = codecs.utf_8_decode(data, 'strict', not more)
            except UnicodeDecodeError as e:
                raise UserError(f'{path} is not UTF-8: byte {data[e.start]:#04x} at offset {offset + e.start}; convert '
                                'it, for example with `iconv -f latin1 -t utf-8`') from None
            yield text.removeprefix('\ufeff') if offset == 0 else text
            data, offset = data[used:], offset + used


def split_at_separators(parts):
    """Parts of one text -> pieces of the documents between its separators, the newlines around these dropped.

    A text without a separator is one document and keeps every character."""
    text, opening, separated = '', False, False     # opening: nothing yet of a document that follows a separator
    for part in parts:
        *complete, text = (text + part).split(EOT_TEXT)
        for document in complete:
            yield (document.lstrip('\r\n') if opening else document).rstrip('\r\n'), True
            opening = separated = True
        if opening:
            text = text.lstrip('\r\n')
        # What may be the start of a separator waits for the next part, with the newlines before it.
        end = text.rfind('<', -len(EOT_TEXT))
        end = len(text[:end if end >= 0 and EOT_TEXT.startswith(text[end:]) else None].rstrip('\r\n'))
        if end:
            yield text[:end], False
            text, opening = text[end:], False
    yield text.rstrip('\r\n') if separated else text, True


def one_document(parts):
    """Parts of one text -> pieces of one document."""
    for part in parts:
        yield part, False
    yield '', True


def rows_to_documents(rows):
    """An iterable of str or None -> pieces, one document per row."""
    for text in rows:
        yield from one_document((text or '')[i:i + PIECE] for i in range(0, len(text or ''), PIECE))


def rows_to_articles(rows):
    """The lines of WikiText -> pieces, one document per article."""
    blank = True
    for line in rows:
        if blank and WIKITEXT_TITLE.fullmatch(line):
            yield '', True
        yield line, False
        blank = not line.strip()
    yield '', True


def read_jsonl(path, key):
    """Yields the text of each row. Raises UserError naming the line that is not a JSON object with text under `key`."""
    with open(path, 'rb') as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line.decode('utf-8-sig' if number == 1 else 'utf-8')) if line.strip() else {key: ''}
                row[key].encode('utf-8')
            except UnicodeError as e:
                raise UserError(f'{path}, line {number}: not UTF-8 text ({e.reason})') from None
            except (ValueError, RecursionError) as e:
                raise UserError(f'{path}, line {number}: not JSON ({e})') from None
            except (KeyError, TypeError, AttributeError):
                raise UserError(f'{path}, line {number}: no text under {key!r}; --text_key names the column') from None
            yield row[key]


def read_parquet(path, key):
    """Yields the text of each row, a few at a time. Raises UserError where the column `key` is missing or not text."""
    import pyarrow
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=PIECE) as file:
            schema = file.schema_arrow
            if key not in schema.names or not pyarrow.types.is_string(schema.field(key).type) \
                    and not pyarrow.types.is_large_string(schema.field(key).type):
                raise UserError(f'{path} has no text column {key!r}; --text_key=NAME picks one of: '
                                f'{", ".join(schema.names)}')
            for batch in file.iter_batches(batch_size=256, columns=[key]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as e:
        raise UserError(f'{path} is not a readable parquet file: {str(e).splitlines()[0]}') from None


def read_file(path, text_key):
    """Pieces of a text, .jsonl or .parquet file."""
    if path.endswith('.jsonl'):
        return rows_to_documents(read_jsonl(path, text_key))
    if path.endswith('.parquet'):
        return rows_to_documents(read_parquet(path, text_key))
    return split_at_separators(read_text(path))


def is_text(path):
    """True for a file of UTF-8 without NUL, which is what sets binary files apart."""
    try:
        return os.path.isfile(path) and not any('\0' in part for part in read_text(path))
    except UserError:
        return False


def list_files(folder, skip_folders=(), ending=''):
    """Sorted paths below `folder`: (text files, the others). Hidden files and folders are left out."""
    found = []
    for at, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith('.') and name not in skip_folders]
        found += [os.path.join(at, name) for name in files if not name.startswith('.') and name.endswith(ending)]
    found.sort(key=lambda path: path.split(os.sep))
    texts = [path for path in found if is_text(path)]
    return texts, sorted(set(found) - set(texts))


def read_files(paths):
    """Pieces of text files: one document each, but for a .txt, which is split at its separators."""
    for path in paths:
        yield from (split_at_separators if path.endswith('.txt') else one_document)(read_text(path))


# -----------------------------------------------------------------------------
# sources: what the user named -> Source

def folder_source(about, folder, **which):
    paths, skipped = list_files(folder, **which)
    if not paths:
        raise UserError(f'{folder} holds no UTF-8 text file; a .parquet or .jsonl is given by its own path')
    if skipped:
        print(f'skipped {len(skipped)} files that are not UTF-8 text, such as {skipped[0]}')
    about = {**about, 'files': len(paths), 'skipped_files': len(skipped)}
    return Source(about, partial(read_files, paths), size=sum(map(os.path.getsize, paths)))


def python_source():
    """The running interpreter's standard library. Its tests stay out: many systems do not install them."""
    about = {'dataset': 'python', 'version': platform.python_version()}
    skip = {'site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idle_test'}
    return folder_source(about, sysconfig.get_path('stdlib'), skip_folders=skip, ending='.py')


def shakespeare_source(data_dir):
    """Tiny Shakespeare, downloaded once. One document, so that --val_fraction=0.1 gives nanoGPT's split."""
    path = os.path.join(data_dir, 'raw', 'shakespeare', 'input.txt')
    if not os.path.exists(path):
        try:
            text = download(SHAKESPEARE_URL)
        except OSError as e:
            raise UserError(f'cannot download shakespeare ({e}): put {SHAKESPEARE_URL} at {path}; {OFFLINE}') from None
        write_atomically(path, text)
    return Source({'dataset': 'shakespeare', 'url': SHAKESPEARE_URL},
                  lambda: one_document(read_text(path)), size=os.path.getsize(path))


def hub_is_reachable():
    """Whether the Hugging Face hub answers, found out in seconds (`datasets` itself would retry for half a minute)."""
    try:
        url = os.environ.get('HF_ENDPOINT', 'https://huggingface.co')
        urllib.request.urlopen(urllib.request.Request(url, method='HEAD'), timeout=5).close()
    except OSError as e:    # an HTTP error or a certificate that we cannot check is an answer too
        return isinstance(e, urllib.error.HTTPError) or isinstance(getattr(e, 'reason', None), ssl.SSLError)
    return True


def hub_rows(dataset, split, data_dir):
    """A function that starts a new stream of the rows of an official split: from parquet files put in data/raw, from
    the cache of `datasets`, or downloaded. Raises UserError where none of these can be had."""
    repository, configuration = HUB[dataset]
    folder = os.path.join(data_dir, 'raw', dataset)
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), f'{split}*.parquet')))
    if paths:
        return lambda: itertools.chain.from_iterable(read_parquet(path, 'text') for path in paths)
    if not hub_is_reachable():
        os.environ.setdefault('HF_HUB_OFFLINE', '1')    # use the cache or fail at once
    import datasets
    try:
        rows = datasets.load_dataset(repository, configuration, split=split)
    except Exception as e:      # `datasets` lets through whatever its many layers raise
        reason = ' '.join(f'{type(e).__name__}: {e}'.split())
        raise UserError(f'cannot load {dataset} ({reason}): put the {split}*.parquet files of '
                        f'huggingface.co/datasets/{repository}, {configuration}, in {folder}; {OFFLINE}') from None
    return lambda: itertools.chain.from_iterable(batch['text'] for batch in rows.iter(batch_size=1000))


def hub_source(dataset, data_dir):
    train, val = (hub_rows(dataset, split, data_dir) for split in ('train', 'validation'))
    documents = rows_to_documents if dataset == 'tinystories' else rows_to_articles
    return Source({'dataset': dataset, 'hub': HUB[dataset][0], 'configuration': HUB[dataset][1]},
                  lambda: documents(train()), lambda: documents(val()))


def input_source(cfg):
    """--input, with --val_input where given."""
    paths = [path for path in (cfg.input, cfg.val_input) if path]
    made = []
    for path in paths:
        if os.path.isdir(path):
            made.append(folder_source({}, path))
        elif os.path.isfile(path):
            made.append(Source({}, partial(read_file, path, cfg.text_key), size=os.path.getsize(path)))
        else:
            raise UserError(f'no such file or folder: {path}')
    about = {'input': cfg.input, **made[0].about} | ({'val_input': cfg.val_input} if cfg.val_input else {})
    return Source(about, made[0].train, made[1].train if cfg.val_input else None, sum(source.size for source in made))


def make_source(cfg, dataset):
    if dataset == 'python':
        return python_source()
    if dataset == 'shakespeare':
        return shakespeare_source(cfg.data_dir)
    return hub_source(dataset, cfg.data_dir) if dataset in HUB else input_source(cfg)


# -----------------------------------------------------------------------------
# splits: pieces -> (split, text, ends)

def tag(pieces, choose):
    """Puts `choose(the first characters of the document)` before each piece. Documents without text are dropped."""
    head, chosen = '', None
    for text, ends in pieces:
        if chosen is None:
            head += text
            if not head or len(head) < KEY and not ends:
                continue
            chosen, text, head = choose(head[:KEY]), head, ''
        yield chosen, text, ends
        if ends:
            chosen = None


def hash_key(head):
    """A number in [0, 1) that depends on how a document begins and nothing else: duplicates share a split."""
    return int.from_bytes(hashlib.blake2b(head.encode('utf-8'), digest_size=8).digest(), 'big') / 2**64


def cut_at(pieces, position):
    """Splits a single document: the characters before `position` are for training, the others for validation."""
    at = 0
    for _, text, ends in tag(pieces, len):
        left = max(position - at, 0)
        at += len(text)
        if left:
            yield 'train', text[:left], at >= position
        if at > position or ends:
            yield 'val', text[left:], ends


def split_stream(source, val_fraction):
    """A function that starts a new stream of (split, text, ends). Reads an unsplit source once to choose its split.

    Raises UserError where a split would be empty."""
    if source.val:
        return lambda: itertools.chain(tag(source.train(), lambda head: 'train'), tag(source.val(), lambda head: 'val'))
    documents, characters, lowest, highest = 0, 0, 1.0, 0.0
    for key, text, ends in tag(source.train(), hash_key):
        documents, characters = documents + ends, characters + len(text)
        lowest, highest = min(lowest, key), max(highest, key)
    if documents == 0:
        raise UserError('the input is empty: there is no text to prepare')
    position = int(characters * (1 - val_fraction))
    if documents == 1 and 0 < position < characters:
        return lambda: cut_at(source.train(), position)
    if documents == 1 or lowest == highest:
        raise UserError('the input is too short or too uniform to hold out a validation split; give --val_input=PATH')
    # Few documents may all fall on one side: then the one with the lowest key is held out.
    threshold = val_fraction if lowest <= val_fraction < highest else lowest
    return lambda: tag(source.train(), lambda head: 'val' if hash_key(head) <= threshold else 'train')


# -----------------------------------------------------------------------------
# encoding: (split, text, ends) -> files

def batches(stream, safe_cut):
    """Joins and cuts the stream to lists of (split, text, ends) of about PIECE characters, for one task each."""
    batch, size, text, searched = [], 0, '', 0
    for split, part, ends in stream:
        text += part
        if not ends and len(text) < PIECE:
            continue
        cut = len(text) if ends else safe_cut(text, searched)
        if cut or ends:
            batch.append((split, text[:cut], ends))
            size, text, searched = size + cut, text[cut:], 0
        else:
            searched = len(text) - 1    # the last character may yet turn out to come before a space
        if size >= PIECE:
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
def temporary_folder(data_dir, name):
    """A hidden folder beside the data set, removed at the end, whatever happens."""
    prefix = f'.{name}.tmp-'
    os.makedirs(data_dir, exist_ok=True)
    for left in glob.glob(os.path.join(glob.escape(data_dir), glob.escape(prefix) + '*')):
        # Only a killed run leaves one behind; one that is still written to belongs to a run beside this one.
        if time.time() - max(map(os.path.getmtime, [left, *glob.glob(os.path.join(glob.escape(left), '*'))])) > 3600:
            shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=prefix, dir=data_dir)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(temporary, folder):
    """Moves a finished data set into place. Without meta.json, which goes first and comes last, it counts as
    incomplete, so that no reader sees an old file beside a new one. Signals are held off meanwhile."""
    os.makedirs(folder, exist_ok=True)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, 'meta.json'))
        for file in ('train.bin', 'val.bin', 'meta.json'):
            os.replace(os.path.join(temporary, file), os.path.join(folder, file))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def prepare_command(name):
    """The command that makes the data set `name`."""
    known = re.fullmatch(rf"({'|'.join(DATASETS)})(?:_(byte|char|bpe(?=\d))(\d*))?", name)
    if not known:
        return f'python prepare.py --input=PATH --name={name}'
    dataset, tokenizer, size = known.groups()
    return f'python prepare.py {dataset}' + (f' --tokenizer={tokenizer}{":" * bool(size)}{size}' if tokenizer else '')


def load_meta(folder):
    """The meta.json of a data set, as a dict. Raises UserError, with the command that makes it, where the data set is
    missing or incomplete."""
    data_dir, name = os.path.split(os.path.abspath(folder))
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            meta = json.load(f)
        complete = all(os.path.getsize(os.path.join(folder, f'{split}.bin')) ==
                       counts['tokens'] * np.dtype(meta['dtype']).itemsize for split, counts in meta['splits'].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        there = sorted(os.path.basename(os.path.dirname(path)) for path in
                       glob.glob(os.path.join(glob.escape(data_dir), '[!.]*', 'meta.json')))
        state = 'is incomplete' if os.path.isdir(folder) else 'does not exist'
        raise UserError(f'the data set {folder} {state}: run `{prepare_command(name)}` first; '
                        f'prepared so far: {", ".join(there) or "none"}')
    return meta


def versions(*packages):
    """{name: version} of Python and of those packages that are installed."""
    found = {'python': platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


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
    if bool(cfg.input) == bool(datasets) or len(datasets) > 1:
        raise UserError(f"give either one data set ({', '.join(DATASETS)}) or --input=PATH --name=NAME")
    for dataset in datasets:
        one_of('dataset', dataset, DATASETS)
        if cfg.name or cfg.val_input:
            raise UserError(f'--name and --val_input go with --input, not with {dataset}')
    if cfg.input and not re.fullmatch(r'[^./\\:\s][^/\\:\s]*', cfg.name):
        raise UserError(f'--input needs --name=NAME without separators or spaces, and not starting in a dot; got '
                        f'{cfg.name!r}')
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
    with temporary_folder(cfg.data_dir, name) as temporary:
        splits = write_splits(temporary, stream(), tokenizer, dtype, cfg.num_proc or os.cpu_count(), source.size)
        meta = {'dtype': dtype.name, 'vocab_size': tokenizer.vocab_size, 'eot': tokenizer.eot,
                'tokenizer': tokenizer.to_meta(), 'splits': splits, 'source': source.about,
                'versions': versions('numpy', 'tiktoken', 'tokenizers', 'datasets', 'pyarrow')}
        write_atomically(os.path.join(temporary, 'meta.json'), json.dumps(meta, indent=1).encode())
        publish(temporary, folder)
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
