"""
Where text comes from: files, folders, data sets of the hub, the standard library -> a stream of pieces.

Text streams through in pieces, so that memory stays bounded whatever the size of the corpus or of one document. A piece
is a pair (text, ends): the next part of the current document, and whether the document ends with it.
"""
import codecs
import glob
import hashlib
import itertools
import json
import os
import platform
import re
import ssl
import sysconfig
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import partial

from nanodrift.options import UserError
from nanodrift.tokenizer import EOT_TEXT, download, write_atomically

PIECE = 1 << 18             # bytes read at a time, and about the characters that one task encodes
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

# An article's title in WikiText is ` = Title = `; its sections are ` = = Section = = ` and deeper.
WIKITEXT_TITLE = re.compile(r' = (?!= ).* = \n?')


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
    paths = []
    for at, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith('.') and name not in skip_folders]
        paths += [os.path.join(at, name) for name in files if not name.startswith('.') and name.endswith(ending)]
    paths.sort(key=lambda path: path.split(os.sep))
    texts = [path for path in paths if is_text(path)]
    return texts, sorted(set(paths) - set(texts))


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
    """The running interpreter's standard library. Its tests stay out, since many systems do not install them; so do its
    tables of characters and the help texts of pydoc, which are data and not code, a sixth of what is there."""
    about = {'dataset': 'python', 'version': platform.python_version()}
    skip = {'site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idle_test', 'encodings', 'pydoc_data'}
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
    documents = {'rows': rows_to_documents, 'articles': rows_to_articles}[unit]
    return Source({'dataset': dataset, 'hub': repository, 'configuration': configuration},
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
