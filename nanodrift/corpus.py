"""
Where text comes from: files, folders, packages, data sets of the hub, the standard library -> a stream of pieces.

Text streams through in pieces, so that memory stays bounded whatever the size of the corpus or of one document. A piece
is a pair (text, ends): the next part of the current document, and whether the document ends with it.
"""
import codecs
import collections
import contextlib
import csv
import glob
import gzip
import hashlib
import http.client
import io
import itertools
import json
import os
import platform
import re
import ssl
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import partial

from nanodrift.options import UserError
from nanodrift.system import write_atomically
from nanodrift.tokenizer import EOT_TEXT, download

PIECE = 1 << 18             # bytes read at a time, and about the characters that one task encodes
TEXT_KEY = 'text'           # the column of text, unless --text_key names another
KEY = 1 << 14               # the characters at the start of a document that choose its split

SHAKESPEARE_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
HUB = {     # dataset: repository and configuration on the Hugging Face hub, with official splits; one document per row, or
            # WikiText's lines, which are joined to articles
    'tinystories': ('roneneldan/TinyStories', 'default', 'rows'),
    'wikitext-2': ('Salesforce/wikitext', 'wikitext-2-raw-v1', 'articles'),
    'wikitext-103': ('Salesforce/wikitext', 'wikitext-103-raw-v1', 'articles'),
}
DATASETS = ('python', *HUB, 'shakespeare')  # that prepare.py knows by name
OFFLINE = '`python prepare.py python` and --input=PATH work offline'

LONE_SURROGATE = re.compile('[\ud800-\udfff]')
# An article's title in WikiText is ` = Title = `; its sections are ` = = Section = = ` and deeper.
WIKITEXT_TITLE = re.compile(r' = (?!= ).* = \n?')


@dataclass
class Source:
    """Where text comes from. `train` and `val` start a new stream of pieces each time they are called."""
    about: dict                 # for meta.json
    train: callable
    val: callable = None        # None where there is no official validation split
    size: int = None            # bytes on disk, if known, for the progress bar
    left_out: dict = field(default_factory=dict)    # how many rows of each file were no text, after a pass
    rows: bool = False          # whether it has columns, one of which is the text


# -----------------------------------------------------------------------------
# readers: files -> pieces

@contextlib.contextmanager
def open_file(path):
    """A binary file for reading, unpacked where its name ends in .gz."""
    try:
        with gzip.open(path, 'rb') if path.lower().endswith('.gz') else open(path, 'rb') as f:
            yield f
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f'{path} cannot be unpacked: {e}') from None


def advice(data):
    """How to make UTF-8 of a file that begins with these bytes."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return 'it is UTF-16: `iconv -f utf-16 -t utf-8 OLD > NEW`'
    for magic, unpack in ((b'\x1f\x8b', 'gunzip'), (b'PK\x03\x04', 'unzip'), (b'\x28\xb5\x2f\xfd', 'unzstd'),
                          (b'BZh', 'bunzip2'), (b'\xfd7zXZ', 'unxz')):
        if data.startswith(magic):
            return f'it is compressed: `{unpack}` first'
    even, odd = data[::2].count(0), data[1::2].count(0)
    if max(even, odd) > len(data) / 8 > 4 * min(even, odd):
        return f'it seems to be UTF-16: `iconv -f utf-16{"le" if odd > even else "be"} -t utf-8 OLD > NEW`'
    if even + odd:
        return 'it is binary'
    return 'convert it, for example with `iconv -f latin1 -t utf-8 OLD > NEW`'


def read_text(path):
    """Yields the text of a UTF-8 file in parts. Raises UserError naming the offset of what is not UTF-8 text."""
    with open_file(path) as f:
        data, offset, more, start = b'', 0, True, b''
        while more:
            more = f.read(PIECE)
            start, data = start or more[:4096], data + more
            try:
                text, used = codecs.utf_8_decode(data, 'strict', not more)
            except UnicodeDecodeError as e:
                raise UserError(f'{path} is not UTF-8: byte {data[e.start]:#04x} at offset {offset + e.start}; '
                                + advice(start)) from None
            if start.count(0) > len(start) / 8:
                raise UserError(f'{path} is not text, for it has many NUL characters: {advice(start)}')
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


def rows_to_documents(rows, path, left_out):
    """An iterable of rows -> pieces, one document per row. left_out[path] becomes the number of rows that are no text: null,
    or with a lone surrogate, which has no UTF-8."""
    left_out[path] = 0
    for text in rows:
        if is_unicode(text):
            yield from one_document(text[i:i + PIECE] for i in range(0, len(text), PIECE))
        else:
            left_out[path] += 1


def is_unicode(text):
    """Whether this is text, and not null or a string with a lone surrogate."""
    return text is not None and not LONE_SURROGATE.search(text)


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
    """Yields the text of each row, one JSON object per line, or None where it is null. Raises UserError naming the line that
    is not a JSON object with `key`."""
    with open_file(path) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield text_of(line, path, f'{path}, line {number}', key)


def text_of(line, path, where, key):
    """What a line of JSON, as bytes, has under `key`."""
    try:
        return column(json.loads(line.decode('utf-8-sig')), where, key)
    except UnicodeError as e:
        raise UserError(f'{where}: not UTF-8 text ({e.reason})') from None
    except (ValueError, RecursionError) as e:
        raise UserError(f'{where}: not JSON ({e})') from None


def column(row, where, key):
    """What a row, a dict, has under `key`: text or None."""
    if not isinstance(row, dict) or not isinstance(row.get(key, 0), str | None):
        known = f'; it has: {", ".join(map(str, row))}' if isinstance(row, dict) else ''
        raise UserError(f'{where}: no text under {key!r}; --text_key names the column{known}')
    return row[key]


def read_json(path, key):
    """Yields the text of each row of a JSON file that is one list of objects; any other is read as .jsonl."""
    with open_file(path) as f:
        if not f.read(PIECE).lstrip(b'\xef\xbb\xbf \t\r\n').startswith(b'['):
            return read_jsonl(path, key)
        f.seek(0)
        try:
            rows = json.loads(f.read().decode('utf-8-sig'))
        except (ValueError, RecursionError) as e:
            raise UserError(f'{path} is not JSON: {e}') from None
    return (column(row, f'{path}, row {number}', key) for number, row in enumerate(rows, 1))


def read_csv(path, key):
    """Yields the text of each row of a comma-separated file with a header; tabs in a .tsv."""
    csv.field_size_limit(2**31 - 1)  # what a C long holds on every system
    with open_file(path) as f:
        text = io.TextIOWrapper(f, 'utf-8-sig', newline='')
        rows = csv.DictReader(text, delimiter='\t' if ending(path) == '.tsv' else ',', strict=True)
        try:
            if key not in (rows.fieldnames or ()):
                raise UserError(f'{path} has no column {key!r}; --text_key=NAME picks one of: '
                                f'{", ".join(rows.fieldnames or ())}')
            for row in rows:
                if any(row.get(None, ())):
                    raise UserError(f'{path}, line {rows.line_num}: more cells than the header has; text that holds the '
                                    'separator must stand in double quotes')
                yield row[key]
        except UnicodeDecodeError as e:
            raise UserError(f'{path}, line {rows.line_num + 1}: {e}') from None
        except csv.Error as e:
            raise UserError(f'{path}, line {rows.line_num + 1}: {str(e)!r}; a cell with quotes in it must stand in quotes, '
                            'and have each of its own twice') from None


def read_parquet(path, key):
    """Yields the text of each row, a few at a time. Raises UserError where the column `key` is missing or not text."""
    import pyarrow
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=PIECE) as file:
            texts = [field.name for field in file.schema_arrow if holds_text(field.type)]
            if key not in texts:
                raise UserError(f'{path} has no text column {key!r}; --text_key=NAME picks one of: '
                                f'{", ".join(texts) or "none, for it holds no text"}')
            for batch in file.iter_batches(batch_size=256, columns=[key]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as e:
        raise UserError(f'{path} is not a readable parquet file: {str(e).splitlines()[0]}') from None


def holds_text(kind):
    """Whether a column of this Arrow type holds text, as it is or as numbers of a dictionary."""
    from pyarrow import types
    if types.is_dictionary(kind):
        return holds_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


# Files of rows. In a folder, files of code and settings may be .json and .csv too: there these are rows only if --text_key
# is given.
ROWS = {'.jsonl': read_jsonl, '.ndjson': read_jsonl, '.parquet': read_parquet}
MAYBE_ROWS = {'.json': read_json, '.csv': read_csv, '.tsv': read_csv}


def ending(path):
    """The ending of a file's name in small letters, without that of compression."""
    return os.path.splitext(path.lower().removesuffix('.gz'))[1]


def read_file(path, text_key, left_out, readers):
    """Pieces of a file: of its rows, where its ending has a reader, or else of its text. A .txt has several documents."""
    reader = readers.get(ending(path))
    if reader:
        return rows_to_documents(reader(path, text_key or TEXT_KEY), path, left_out)
    return (split_at_separators if ending(path) == '.txt' else one_document)(read_text(path))


def is_text(path):
    """True for a file of UTF-8 without NUL, which is what sets binary files apart."""
    try:
        return os.path.isfile(path) and not any('\0' in part for part in read_text(path))
    except UserError:
        return False


def list_files(folder, skip_folders=(), ending=''):
    """Sorted paths of the files below `folder`, through links too, each folder once. Hidden ones are left out."""
    paths, seen = [], set()
    for at, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith('.') and name not in skip_folders]
        paths += [os.path.join(at, name) for name in files if not name.startswith('.') and name.endswith(ending)]
    return sorted(paths, key=lambda path: path.split(os.sep))


# -----------------------------------------------------------------------------
# sources: what the user named -> Source

def folder_source(about, folder, text_key='', **which):
    """The files of rows below a folder; where there are none, its text files."""
    readers = ROWS | MAYBE_ROWS if text_key else ROWS
    paths = list_files(folder, **which)
    taken = [path for path in paths if ending(path) in readers]
    kind = 'rows' if taken else 'UTF-8 text'
    taken = taken or [path for path in paths if is_text(path)]
    if not taken:
        raise UserError(f'{folder} holds no UTF-8 text file, and no .jsonl or .parquet')
    skipped = [path for path in paths if path not in set(taken)]
    if skipped:
        print(f'left out {len(skipped)} files that are not {kind}, such as {skipped[0]}')
    left_out = {}

    def read():
        return itertools.chain.from_iterable(read_file(path, text_key, left_out, readers) for path in taken)
    about = {**about, 'files': len(taken), 'skipped_files': len(skipped)}
    return Source(about, read, None, sum(map(os.path.getsize, taken)), left_out, kind == 'rows')


def python_source():
    """The running interpreter's standard library. Its tests stay out, since many systems do not install them; so do its
    tables of characters and the help texts of pydoc, which are data and not code, a sixth of what is there."""
    about = {'dataset': 'python', 'version': platform.python_version()}
    skip = {'site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idle_test', 'encodings', 'pydoc_data'}
    return folder_source(about, sysconfig.get_path('stdlib'), skip_folders=skip, ending='.py')


def download_packages(path, folder):
    """Lets pip put the wheels of a list, pinned by version and SHA-256, into a folder; it refuses what differs."""
    pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps',
           '--only-binary=:all:', '--require-hashes', f'--requirement={path}', f'--dest={folder}']
    for where in (['--no-index', f'--find-links={folder}'], []):    # what is there already needs no network
        done = subprocess.run(pip + where, capture_output=True, encoding='utf-8', check=False)
        if not done.returncode:
            return
    raise UserError(f"packages={path}: pip says {' '.join(done.stderr.split())}")


def packages_source(path, data_dir):
    """The Python files, except tests, of the wheels in a list of pip's format, downloaded once to data/raw/packages."""
    if not os.path.isfile(path):
        raise UserError(f'packages={path}: no such file; its lines are NAME==VERSION --hash=sha256:HASH')
    folder = os.path.join(data_dir, 'raw', 'packages')
    download_packages(path, folder)
    with open(path, encoding='utf-8') as f:
        pinned = set(re.findall('sha256:([0-9a-f]{64})', f.read()))
    wheels = []
    for wheel in sorted(glob.glob(os.path.join(glob.escape(folder), '*.whl'))):
        with open(wheel, 'rb') as f:
            if hashlib.sha256(f.read()).hexdigest() in pinned:
                wheels.append(wheel)

    def read():
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(archive.namelist()):
                    if name.endswith('.py') and not {'test', 'tests'} & set(name.split('/')):
                        with contextlib.suppress(UnicodeDecodeError):
                            yield archive.read(name).decode('utf-8-sig'), True
    return Source({'packages': [os.path.basename(wheel) for wheel in wheels]}, read)


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
    except (ValueError, http.client.HTTPException):  # HF_ENDPOINT without https://, a reply that is not HTTP
        return False
    except OSError as e:    # an HTTP error or a certificate that we cannot check is a reply too
        return isinstance(e, urllib.error.HTTPError) or isinstance(getattr(e, 'reason', None), ssl.SSLError)
    return True


def hub_rows(dataset, split, data_dir):
    """A function that starts a new stream of the rows of an official split: from parquet files put in data/raw, from
    the cache of `datasets`, or downloaded. Raises UserError where none of these can be had."""
    repository, configuration, _ = HUB[dataset]
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
    repository, configuration, unit = HUB[dataset]
    left_out = {}

    def documents(rows, split):
        return rows_to_articles(rows) if unit == 'articles' else rows_to_documents(rows, split, left_out)
    return Source({'dataset': dataset, 'hub': repository, 'configuration': configuration},
                  lambda: documents(train(), 'train'), lambda: documents(val(), 'validation'), left_out=left_out)


def file_source(path, text_key):
    readers, left_out = ROWS | MAYBE_ROWS, {}
    if ending(path) in readers:
        return Source({}, partial(read_file, path, text_key, left_out, readers), None, os.path.getsize(path), left_out, True)
    return Source({}, lambda: split_at_separators(read_text(path)), size=os.path.getsize(path))


def input_source(cfg):
    """--input, with --val_input where given."""
    made = []
    paths = list(filter(None, (cfg.input, cfg.val_input)))
    for path in paths:
        if os.path.isdir(path):
            made.append(folder_source({}, path, cfg.text_key))
        elif os.path.isfile(path):
            made.append(file_source(path, cfg.text_key))
        elif os.path.exists(path):
            raise UserError(f'{path} is a pipe or a device, which cannot be read twice: write it to a file first')
        else:
            raise UserError(f'no such file or folder: {path}')
    if cfg.text_key and not any(source.rows for source in made):
        raise UserError(f'text_key={cfg.text_key} names a column, and {" and ".join(paths)} has none: leave it out')
    about = {'input': cfg.input, **made[0].about} | ({'val_input': cfg.val_input} if cfg.val_input else {})
    train, val = made[0], made[1] if cfg.val_input else None
    left_out = collections.ChainMap(*(source.left_out for source in made))
    return Source(about, train.train, val and val.train, sum(source.size for source in made), left_out)


def make_source(cfg, dataset):
    if dataset == 'python':
        return python_source()
    if dataset == 'shakespeare':
        return shakespeare_source(cfg.data_dir)
    if cfg.packages:
        return packages_source(cfg.packages, cfg.data_dir)
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
    """The characters before `position` are for training, the others for validation."""
    at = 0
    for _, text, ends in tag(pieces, len):
        left = max(position - at, 0)
        at += len(text)
        if left:
            yield 'train', text[:left], ends or at >= position
        if at > position or ends and not left:
            yield 'val', text[left:], ends


def split_stream(source, val_fraction):
    """A function that starts a new stream of (split, text, ends). Reads an unsplit source once to choose its split: by a
    hash of how documents begin, or, where that would hold out less than half of val_fraction or more than twice as much, at
    a place in the text. Raises UserError where a split would be empty."""
    if source.val:
        return lambda: itertools.chain(tag(source.train(), lambda head: 'train'), tag(source.val(), lambda head: 'val'))
    characters = held_out = 0
    for key, text, _ in tag(source.train(), hash_key):
        characters, held_out = characters + len(text), held_out + len(text) * (key <= val_fraction)
    if not characters:
        raise UserError('the input is empty: there is no text to prepare')
    held_out /= characters
    if val_fraction / 2 <= held_out <= min(2 * val_fraction, (1 + val_fraction) / 2):
        return lambda: tag(source.train(), lambda head: 'val' if hash_key(head) <= val_fraction else 'train')
    position = int(characters * (1 - val_fraction))  # few documents, or very unequal ones
    if not 0 < position < characters:
        raise UserError('the input is too short to hold out a validation split; give --val_input=PATH')
    return lambda: cut_at(source.train(), position)
