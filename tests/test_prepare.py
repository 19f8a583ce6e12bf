import glob
import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import string
import subprocess
import sys
import tempfile
import time
import types
import zipfile

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import prepare
from nanodrift import corpus
from nanodrift.data import load_meta
from nanodrift.options import UserError
from nanodrift.tokenizer import EOT_TEXT, tokenizer_from_meta, train_bpe

# Run by every Python that finds it first: the network is gone, and whoever asks for it leaves a trace.
NO_NETWORK = '''
import os, socket
def refuse(*args, **kwargs):
    open(os.environ['NETWORK_TRACE'], 'a').close()
    raise OSError('the network is blocked')
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
'''


@pytest.fixture
def cli(tmp_path):
    """Runs the real command in an empty folder, with the network blocked."""
    (tmp_path / 'block').mkdir()
    (tmp_path / 'block' / 'sitecustomize.py').write_text(NO_NETWORK, encoding='utf-8')
    work = tmp_path / 'work'
    work.mkdir()
    trace = tmp_path / 'network'
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'LOCAL_RANK')}
    env |= {'PYTHONPATH': str(tmp_path / 'block'), 'NETWORK_TRACE': str(trace), 'LC_ALL': 'C',
            'HF_HOME': str(tmp_path / 'hf')}

    def start(*args, **extra):
        return subprocess.Popen([sys.executable, os.path.join(ROOT, 'prepare.py'), *args], cwd=work, env=env | extra,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8')

    def run(*args, **extra):
        process = start(*args, **extra)
        out, err = process.communicate(timeout=60)
        return types.SimpleNamespace(code=process.returncode, out=out, err=err, network=trace.exists())
    return types.SimpleNamespace(run=run, start=start, work=work)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode('utf-8'))
    return str(path)


def read_back(folder):
    """{split: the text that its ids stand for}, having checked that meta.json tells the truth."""
    meta = load_meta(str(folder))
    tokenizer = tokenizer_from_meta(meta['tokenizer'])
    texts = {}
    for split, counts in meta['splits'].items():
        ids = np.fromfile(folder / f'{split}.bin', dtype=np.dtype(meta['dtype']).newbyteorder('<'))
        data = tokenizer.decode_bytes(ids.tolist())
        texts[split] = data.decode('utf-8')
        assert counts['tokens'] == len(ids) and ids[-1] == meta['eot'] == tokenizer.eot
        assert counts['documents'] == np.count_nonzero(ids == meta['eot'])
        assert counts['bytes'] == len(data) - counts['documents'] * len(EOT_TEXT)
        assert counts['sha256'] == hashlib.sha256((folder / f'{split}.bin').read_bytes()).hexdigest()
        assert counts['text_sha256'] == hashlib.sha256(data).hexdigest()
    assert meta['vocab_size'] == tokenizer.vocab_size
    return texts


def documents(text):
    return text.split(EOT_TEXT)[:-1]


def files_below(folder):
    return [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]


def snapshot(folder):
    return {path: open(path, 'rb').read() for path in files_below(folder)}


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Runs the same inside this process, so that the sizes of pieces can be set."""
    monkeypatch.chdir(tmp_path)

    def run(**settings):
        cfg = prepare.PrepareConfig(name='x', num_proc=2, **settings)
        name = prepare.check_arguments(cfg, [])
        prepare.prepare(cfg, '', name)
        return tmp_path / 'data' / name
    return run


def make_wheel(folder, name, files):
    """A wheel that pip accepts; -> its line in a list of packages."""
    about = f'{name}-1.0.dist-info'
    data = io.BytesIO()
    with zipfile.ZipFile(data, 'w') as archive:
        for path, text in files.items() | {(f'{about}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n'),
                                           (f'{about}/WHEEL', 'Wheel-Version: 1.0\nTag: py3-none-any\n'),
                                           (f'{about}/RECORD', '')}:
            archive.writestr(path, text)
    write(folder / f'{name}-1.0-py3-none-any.whl', data.getvalue())
    return f'{name}==1.0 --hash=sha256:{hashlib.sha256(data.getvalue()).hexdigest()}\n'


# -----------------------------------------------------------------------------
# text in, the same text out

TEXTS = ['plain text', 'ends in a newline\n', '\n\nbegins with newlines', 'a\r\nb\rc\n', 'nul \0 and \x1c', '🙂 中文 é',
         '<|endof', '<|endoftext', '<', 'x' * 5000, ' \n ' * 2000, "it's a 'test'  of\t\tspaces\u00a0\u2003 " * 20]


@pytest.mark.parametrize('piece', [1, 2, 7, 64, 1 << 18])
def test_a_single_document_keeps_every_character(inside, monkeypatch, tmp_path, piece):
    monkeypatch.setattr(corpus, 'PIECE', piece)
    monkeypatch.setattr(corpus, 'KEY', 1)
    text = '\n'.join(TEXTS)
    texts = read_back(inside(input=write(tmp_path / 'in.txt', text), tokenizer='char'))
    cut = int(len(text) * 0.9)      # nanoGPT's split
    assert texts == {'train': text[:cut] + EOT_TEXT, 'val': text[cut:] + EOT_TEXT}


@pytest.mark.parametrize('piece', [1, 3, 16, 1 << 18])
def test_documents_are_what_lies_between_separators(inside, monkeypatch, tmp_path, piece):
    monkeypatch.setattr(corpus, 'PIECE', piece)
    monkeypatch.setattr(corpus, 'KEY', 1)
    rng = random.Random(piece)
    text = ''.join(rng.choice([*'ab <\n', '\r\n', '<|endoftext|', EOT_TEXT]) for _ in range(3000))
    expected = re.split(r'[\r\n]*<\|endoftext\|>[\r\n]*', text)
    expected[-1] = expected[-1].rstrip('\r\n')
    texts = read_back(inside(input=write(tmp_path / 'in.txt', text), val_input=write(tmp_path / 'val.txt', 'v'),
                             tokenizer='byte'))
    assert documents(texts['train']) == [document for document in expected if document]


@pytest.mark.parametrize('tokenizer', ['gpt2', 'bpe:320'])
@pytest.mark.parametrize('piece', [1, 5, 40])
def test_ids_are_those_of_whole_documents(inside, monkeypatch, tmp_path, tokenizer, piece):
    """The smaller the pieces, the more cuts: with 1, documents are cut wherever a cut is allowed."""
    monkeypatch.setattr(corpus, 'PIECE', piece)
    monkeypatch.setattr(corpus, 'KEY', 1)
    rng = random.Random(piece)
    atoms = [*"abZ09\n\t'._! é中🙂\u00a0\u2003\x1c\x85", '\r\n', '\n\n', ' ', '  ', "'s", "n't", '<|']
    texts = ['x' + ''.join(rng.choice(atoms) for _ in range(rng.randrange(300))) + 'x' for _ in range(100)]
    folder = inside(input=write(tmp_path / 'in.txt', EOT_TEXT.join(texts)), tokenizer=tokenizer,
                    val_input=write(tmp_path / 'val.txt', 'validation'))
    encoder = tokenizer_from_meta(load_meta(folder)['tokenizer'])
    expected = [i for text in texts for i in [*encoder.encoding.encode_ordinary(text), encoder.eot]]
    assert np.fromfile(folder / 'train.bin', '<u2').tolist() == expected


@pytest.mark.slow
def test_one_line_of_megabytes(inside, tmp_path):
    rng = random.Random(0)
    text = ' '.join(rng.choice(['alpha', "it's", '42', '  ', 'naïve', '中文字', '🙂']) for _ in range(800_000))
    folder = inside(input=write(tmp_path / 'in.txt', text), val_input=write(tmp_path / 'val.txt', 'v'),
                    tokenizer='bpe:280')
    encoder = tokenizer_from_meta(load_meta(folder)['tokenizer'])
    expected = encoder.encoding.encode_ordinary(text) + [encoder.eot]
    assert len(text) > 4 * corpus.PIECE
    assert np.array_equal(np.fromfile(folder / 'train.bin', '<u2'), expected)


def test_a_byte_order_mark_is_dropped(inside, tmp_path):
    texts = read_back(inside(input=write(tmp_path / 'in.txt', b'\xef\xbb\xbf0123456789'), tokenizer='byte'))
    assert texts == {'train': f'012345678{EOT_TEXT}', 'val': f'9{EOT_TEXT}'}


def test_large_vocabularies_take_uint32(inside, tmp_path):
    text = ''.join(chr(i) for i in range(1, 70_000) if not 0xD800 <= i < 0xE000)
    folder = inside(input=write(tmp_path / 'in.txt', text), tokenizer='char')
    assert load_meta(folder)['dtype'] == 'uint32'
    assert ''.join(documents(t)[0] for t in read_back(folder).values()) == text


def test_the_same_input_gives_the_same_bytes(inside, tmp_path):
    text = EOT_TEXT.join(f'story {i}: the cat and the dog number {i * i}' for i in range(500))
    path = write(tmp_path / 'in.txt', text)
    first = snapshot(inside(input=path, tokenizer='bpe:300'))
    assert snapshot(inside(input=path, tokenizer='bpe:300')) == first


# -----------------------------------------------------------------------------
# splits

def test_split_by_document_is_disjoint_and_stable(inside, tmp_path):
    texts = [f'document {i % 400}' for i in range(500)]     # a hundred come twice
    split = {name: set(documents(text)) for name, text in read_back(
        inside(input=write(tmp_path / 'in.txt', EOT_TEXT.join(texts)), tokenizer='byte')).items()}
    assert split['train'] | split['val'] == set(texts) and not split['train'] & split['val']
    assert 20 <= len(split['val']) <= 60
    shuffled = random.Random(0).sample(texts + ['one more'], 501)
    again = read_back(inside(input=write(tmp_path / 'in.txt', EOT_TEXT.join(shuffled)), tokenizer='byte'))
    assert set(documents(again['val'])) - {'one more'} == split['val']


@pytest.mark.parametrize('start', range(20))
def test_two_documents_give_one_each(inside, tmp_path, start):
    path = write(tmp_path / 'in.txt', f'{start}{EOT_TEXT}{start}b')
    texts = read_back(inside(input=path, tokenizer='byte', val_fraction=0.5))
    assert sorted(documents(texts['train']) + documents(texts['val'])) == [f'{start}', f'{start}b']
    assert len(documents(texts['val'])) == 1


def test_bpe_learns_from_training_text_alone(inside, tmp_path):
    train = 'the cat sat on the mat and looked about. ' * 40
    folder = inside(input=write(tmp_path / 'in.txt', train), val_input=write(tmp_path / 'val.txt', 'xyzzy ' * 1000),
                    tokenizer='bpe:270')
    assert tokenizer_from_meta(load_meta(folder)['tokenizer']).identity == train_bpe(270, [train]).identity


# -----------------------------------------------------------------------------
# kinds of input

def test_folder(inside, tmp_path):
    folder = tmp_path / 'in'
    files = {'b.py': 'print(1)\n', 'a/z.md': f'# z {EOT_TEXT}\n', 'a/two.txt': f'one\n{EOT_TEXT}\ntwo', 'empty.txt': ''}
    for name, text in files.items():
        write(folder / name, text)
    write(folder / '.hidden', 'hidden')
    write(folder / '.git' / 'config', 'hidden')
    write(folder / 'latin.txt', b'caf\xe9')
    write(folder / 'binary.dat', b'\0\1\2')
    made = inside(input=str(folder), val_input=write(tmp_path / 'val.txt', 'v'), tokenizer='byte')
    meta = load_meta(made)
    assert read_back(made)['train'] == EOT_TEXT.join(['one', 'two', files['a/z.md'], files['b.py'], ''])
    assert meta['splits']['train']['documents'] == 4
    assert meta['source']['files'] == 4 and meta['source']['skipped_files'] == 2


def test_jsonl_and_parquet(inside, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq
    monkeypatch.setattr(corpus, 'PIECE', 8)
    texts = [f'row {i}\nwith "quotes" {EOT_TEXT} 🙂 \\ \u2028' for i in range(1000)]
    rows = [json.dumps({'n': i, 'story': text}) for i, text in enumerate(texts)]
    jsonl = inside(input=write(tmp_path / 'a.jsonl', '\n\n'.join(rows) + '\n'), text_key='story', tokenizer='byte',
                   val_input=write(tmp_path / 'v.txt', 'v'))
    expected = ''.join(text + EOT_TEXT for text in texts)
    got = np.fromfile(jsonl / 'train.bin', '<u2')
    assert bytes(got[got < 256].astype(np.uint8)).decode('utf-8') == ''.join(texts)
    pq.write_table(pa.table({'n': range(1001), 'story': texts + [None]}), tmp_path / 'a.parquet', row_group_size=100)
    parquet = inside(input=str(tmp_path / 'a.parquet'), text_key='story', tokenizer='byte',
                     val_input=str(tmp_path / 'v.txt'))
    assert np.array_equal(np.fromfile(parquet / 'train.bin', '<u2'), got)
    assert np.count_nonzero(got == 256) == 1000 and len(expected.encode()) == len(got) + 1000 * (len(EOT_TEXT) - 1)


ROW_FILES = {
    'a.jsonl': lambda rows: '\n'.join(map(json.dumps, rows)), 'a.NDJSON': lambda rows: '\n'.join(map(json.dumps, rows)),
    'a.json': json.dumps, 'b.json': lambda rows: '\n'.join(map(json.dumps, rows)),
    'a.csv': lambda rows: 'n,text\r\n' + ''.join(f'{row["n"]},"{row["text"]}"\r\n' for row in rows),
    'a.tsv': lambda rows: 'n\ttext\n' + ''.join(f'{row["n"]}\t"{row["text"]}"\n' for row in rows),
    'a.jsonl.gz': lambda rows: gzip.compress('\n'.join(map(json.dumps, rows)).encode())}


@pytest.mark.parametrize('name', ROW_FILES)
def test_files_of_rows(inside, tmp_path, name):
    rows = [{'n': i, 'text': f'row {i},\nof é'} for i in range(9)]
    path, val = write(tmp_path / name, ROW_FILES[name](rows)), write(tmp_path / 'v.txt', 'v')
    made = inside(input=path, tokenizer='byte', val_input=val)
    assert documents(read_back(made)['train']) == [row['text'] for row in rows]


def test_a_folder_with_files_of_rows_is_these_rows(inside, tmp_path, capsys):
    """As a snapshot of a data set from the hub: its README is about the data."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    (tmp_path / 'in' / 'data').mkdir(parents=True)
    text = pa.array(['b', 'c', 'c']).dictionary_encode()
    pq.write_table(pa.table({'text': text}), tmp_path / 'in' / 'data' / 'x.parquet')
    write(tmp_path / 'in' / 'README.md', 'about')
    write(tmp_path / 'in' / 'settings.json', '{"text": "no row"}')
    write(tmp_path / 'in' / 'a.JSONL', '{"text": "a"}\n')
    made = inside(input=str(tmp_path / 'in'), tokenizer='byte', val_input=write(tmp_path / 'v.txt', 'v'))
    assert documents(read_back(made)['train']) == ['a', 'b', 'c', 'c']
    assert 'left out 2 files that are not rows' in capsys.readouterr().out
    made = inside(input=str(tmp_path / 'in'), tokenizer='byte', text_key='text', val_input=write(tmp_path / 'v.txt', 'v'))
    assert documents(read_back(made)['train']) == ['a', 'b', 'c', 'c', 'no row']
    (tmp_path / 'code').mkdir()
    write(tmp_path / 'code' / 'package.json', '{"name": 1}')
    made = inside(input=str(tmp_path / 'code'), tokenizer='byte', val_input=write(tmp_path / 'v.txt', 'v'))
    assert documents(read_back(made)['train']) == ['{"name": 1}']


def test_rows_without_text_are_left_out_and_counted(inside, tmp_path, capsys):
    rows = '{"text": "a"}\n{"text": null}\n{"text": "\\ud800"}\n{"text": "b"}\n'
    made = inside(input=write(tmp_path / 'a.jsonl', rows), tokenizer='byte', val_input=write(tmp_path / 'v.txt', 'v'))
    assert documents(read_back(made)['train']) == ['a', 'b']
    assert 'left out 2 rows' in capsys.readouterr().out


def test_string_views_and_gz_text(inside, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    schema = pa.schema([pa.field('text', pa.string_view())])
    pq.write_table(pa.table({'text': pa.array(['a', 'b'], pa.string_view())}, schema=schema), tmp_path / 'a.parquet')
    packed = write(tmp_path / 'v.txt.gz', gzip.compress('v é'.encode()))
    made = read_back(inside(input=str(tmp_path / 'a.parquet'), tokenizer='byte', val_input=packed))
    assert documents(made['train']) == ['a', 'b'] and documents(made['val']) == ['v é']


def test_linked_folders_are_followed_once(inside, tmp_path):
    write(tmp_path / 'elsewhere' / 'b.txt', 'b')
    write(tmp_path / 'in' / 'a.txt', 'a')
    os.symlink(tmp_path / 'elsewhere', tmp_path / 'in' / 'link')
    os.symlink(tmp_path / 'in', tmp_path / 'elsewhere' / 'back')
    made = inside(input=str(tmp_path / 'in'), tokenizer='byte', val_input=write(tmp_path / 'v.txt', 'v'))
    assert documents(read_back(made)['train']) == ['a', 'b']


@pytest.mark.parametrize('first, second', [(10, 20_000), (20_000, 10), (5000, 5000)])
def test_the_held_out_share_is_bounded_where_documents_are_unequal(inside, tmp_path, first, second):
    for start in 'abc':
        text = start * first + EOT_TEXT + 'x' + start * second
        counts = load_meta(inside(input=write(tmp_path / 'in.txt', text), tokenizer='byte'))['splits']
        share = counts['val']['bytes'] / (counts['val']['bytes'] + counts['train']['bytes'])
        assert 0.05 <= share <= 0.2, share
        texts = read_back(tmp_path / 'data' / 'x_byte')
        assert ''.join(documents(texts['train']) + documents(texts['val'])) == text.replace(EOT_TEXT, '')


def test_learning_from_text_without_spaces_takes_no_longer():
    """Not timed: a pre-token of 10,000 letters is cut where no pair may cross."""
    rng = random.Random(0)
    text = ''.join(rng.choice('ACGT') for _ in range(10_000))
    pieces = [text[i:i + 512] for i in range(0, len(text), 512)]
    assert train_bpe(300, [text]).tokens == train_bpe(300, pieces).tokens


WIKITEXT = ['', ' = First = \n', '', ' Text . \n', ' = not a title , no blank line = \n', '', ' = = Section = = \n', '',
            ' More text . \n', '', ' = Second = \n', '', ' Text . \n']


@pytest.mark.parametrize('dataset', ['tinystories', 'wikitext-2', 'wikitext-103'])
def test_hub_data_sets(cli, dataset):
    """From parquet files in data/raw, as they lie on the hub."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    folder = cli.work / 'data' / 'raw' / dataset
    folder.mkdir(parents=True)
    pq.write_table(pa.table({'text': WIKITEXT[:5]}), folder / 'train-00000-of-00002.parquet')
    pq.write_table(pa.table({'text': WIKITEXT[5:]}), folder / 'train-00001-of-00002.parquet')
    pq.write_table(pa.table({'text': WIKITEXT}), folder / 'validation-00000-of-00001.parquet')
    result = cli.run(dataset, '--tokenizer=char')
    assert result.code == 0 and not result.network, result.err
    texts = read_back(cli.work / 'data' / f'{dataset}_char')
    rows = [row for row in WIKITEXT if row]
    articles = [''.join(WIKITEXT[:10]), ''.join(WIKITEXT[10:])]
    expected = rows if dataset == 'tinystories' else articles
    assert documents(texts['train']) == documents(texts['val']) == expected
    assert f'train.py --dataset={dataset}_char' in result.out.splitlines()[-1]


def test_hub_data_sets_are_named_as_datasets_wants(monkeypatch, tmp_path):
    """What datasets>=4 takes: repositories with a namespace, their official splits, nothing else."""
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return types.SimpleNamespace(iter=lambda batch_size: [{'text': ['a', 'b']}, {'text': ['c']}])
    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(corpus, 'hub_is_reachable', lambda: True)
    source = corpus.make_source(prepare.PrepareConfig(data_dir=str(tmp_path)), 'tinystories')
    assert [text for text, _ in source.train() if text] == ['a', 'b', 'c']
    corpus.make_source(prepare.PrepareConfig(data_dir=str(tmp_path)), 'wikitext-103')
    assert calls == [((repository, configuration), {'split': split})
                     for repository, configuration in (('roneneldan/TinyStories', 'default'),
                                                       ('Salesforce/wikitext', 'wikitext-103-raw-v1'))
                     for split in ('train', 'validation')]


def test_shakespeare_from_its_file(cli):
    text = 'First Citizen:\nBefore we proceed any further, hear me speak.\n' * 50
    write(cli.work / 'data' / 'raw' / 'shakespeare' / 'input.txt', text)
    assert cli.run('shakespeare', '--tokenizer=char').code == 0
    cut = int(len(text) * 0.9)
    texts = read_back(cli.work / 'data' / 'shakespeare_char')
    assert texts == {'train': text[:cut] + EOT_TEXT, 'val': text[cut:] + EOT_TEXT}


@pytest.mark.slow
def test_python_needs_no_network(cli):
    result = cli.run('python', '--tokenizer=byte')
    assert result.code == 0 and not result.network and result.err == '', result.err
    texts = read_back(cli.work / 'data' / 'python_byte')
    assert 5_000_000 < sum(map(len, texts.values())) < 30_000_000
    with open(os.path.join(os.path.dirname(os.__file__), 'heapq.py'), encoding='utf-8', newline='') as f:
        assert f.read() in texts['train'] + texts['val']


def test_packages_are_those_of_the_list(cli, tmp_path):
    """The Python files of the wheels that are listed, without tests; what lies there already is not downloaded."""
    raw = cli.work / 'data' / 'raw' / 'packages'
    lines = [make_wheel(raw, name, {f'{name}/code.py': f'{name} = 1\n' * 200, f'{name}/data.txt': 'no code',
                                    f'{name}/latin.py': b'\xe9', f'{name}/tests/x.py': 'test = 1\n'})
             for name in ('one', 'two', 'other')]
    listed = write(tmp_path / 'list.txt', '# a comment\n' + ''.join(lines[:2]))
    result = cli.run(f'--packages={listed}', '--name=p', '--tokenizer=byte', '--val_fraction=0.5')
    assert result.code == 0 and not result.network and result.err == '', result.err
    texts = read_back(cli.work / 'data' / 'p_byte')
    assert sorted(documents(texts['train']) + documents(texts['val'])) == ['one = 1\n' * 200, 'two = 1\n' * 200]
    with open(cli.work / 'data' / 'p_byte' / 'meta.json', encoding='utf-8') as f:
        assert json.load(f)['source'] == {'packages': ['one-1.0-py3-none-any.whl', 'two-1.0-py3-none-any.whl']}


@pytest.mark.parametrize('change, message', [
    (lambda line: line[:-2] + ('0' if line[-2] != '0' else '1') + '\n', 'HASHES'), (lambda line: 'one==1.0\n', 'hash'),
    (lambda line: line.replace('1.0', '2.0', 1), '2.0'), (lambda line: '???', 'Invalid')])
def test_a_package_that_differs_from_the_list_is_refused(cli, tmp_path, change, message):
    raw = tmp_path / 'raw'      # what pip downloads from, here
    listed = write(tmp_path / 'list.txt', change(make_wheel(raw, 'one', {'one/code.py': 'one = 1\n' * 200})))
    result = cli.run(f'--packages={listed}', '--name=p', '--tokenizer=byte', PIP_NO_INDEX='1', PIP_FIND_LINKS=str(raw))
    check_refused(result, cli.work, message)


@pytest.mark.parametrize('tokenizer', ['gpt2', 'byte', 'char', 'bpe:260'])
def test_input_needs_no_network(cli, tmp_path, tokenizer):
    try:
        prepare.tokenizer_from_spec('gpt2')
    except UserError:
        pytest.skip('the GPT-2 files are not on this machine')
    path = write(tmp_path / 'in.txt', 'naïve text \r\n' * 100)
    result = cli.run(f'--input={path}', '--name=mine', f'--tokenizer={tokenizer}')
    assert result.code == 0 and not result.network and result.err == '', result.err
    name = 'mine' if tokenizer == 'gpt2' else f'mine_{tokenizer.replace(":", "")}'
    assert os.listdir(cli.work / 'data') == [name]
    assert sorted(os.listdir(cli.work / 'data' / name)) == ['meta.json', 'train.bin', 'val.bin']
    assert ''.join(documents(t)[0] for t in read_back(cli.work / 'data' / name).values()) == 'naïve text \r\n' * 100


# -----------------------------------------------------------------------------
# the user's mistakes: one line, exit code 2, nothing written

def bad_input(tmp_path, name):
    import pyarrow as pa
    import pyarrow.parquet as pq
    files = {'missing.txt': None, 'empty.txt': '', 'blank.txt': f'\n{EOT_TEXT}\n\n{EOT_TEXT}\n', 'short.txt': 'x',
             'latin.txt': b'x' * 300_000 + b'caf\xe9 au lait',
             'cut.txt': 'é'.encode()[:1], 'bad.jsonl': '{"text": "a"}\n{"text": ',
             'key.jsonl': '{"text": "a"}\n{"body": "b"}',
             'list.jsonl': '["text"]', 'number.jsonl': '{"text": 1}', 'latin.jsonl': b'{"text": "a"}\n{"text": "\xe9"}',
             'utf16.txt': 'text'.encode('utf-16'), 'le.txt': ('text' * 99).encode('utf-16-le'),
             'be.txt': ('text' * 99).encode('utf-16-be'), 'packed.txt': gzip.compress(b'text'),
             'torn.txt.gz': gzip.compress(b'text' * 999)[:30], 'head.csv': 'a,b\n1,2\n', 'bad.json': '[{"text": "a"}',
             'cells.csv': 'id,text\n1,"a, b"\n2,Hello, world\n', 'quote.tsv': 'text\tn\n"Yes," she said\t1\n',
             'rows.json': '[{"text": "a"}, {"body": "b"}]', 'fifo': None,
             'surrogate.jsonl': '{"text": "\\ud800"}', 'empty.jsonl': '', 'text.parquet': 'not a parquet file',
             'good.txt': 'some text\n' * 100}
    path = tmp_path / name
    if name == 'column.parquet':
        pq.write_table(pa.table({'story': ['a', 'b']}), path)
    elif name == 'number.parquet':
        pq.write_table(pa.table({'text': [1, 2]}), path)
    elif name == 'folder':
        write(path / 'binary.dat', b'\0\xff')
    elif name == 'fifo':
        os.mkfifo(path)
    elif files[name] is not None:
        write(path, files[name])
    return path


BAD_INPUTS = {
    'missing.txt': 'no such file', 'empty.txt': 'empty', 'blank.txt': 'empty', 'short.txt': 'too short',
    'latin.txt': 'latin.txt is not UTF-8: byte 0xe9 at offset 300003',
    'cut.txt': 'not UTF-8: byte 0xc3 at offset 0', 'bad.jsonl': 'bad.jsonl, line 2: not JSON',
    'key.jsonl': "line 2: no text under 'text'", 'list.jsonl': "line 1: no text under 'text'",
    'number.jsonl': "line 1: no text under 'text'", 'latin.jsonl': 'line 2: not UTF-8',
    'surrogate.jsonl': 'empty', 'utf16.txt': 'iconv -f utf-16 -t', 'le.txt': 'iconv -f utf-16le',
    'be.txt': 'iconv -f utf-16be',
    'packed.txt': 'gunzip', 'torn.txt.gz': 'cannot be unpacked', 'head.csv': 'picks one of: a, b', 'bad.json': 'is not JSON',
    'cells.csv': 'cells.csv, line 3: more cells than the header', 'quote.tsv': 'quote.tsv, line 2',
    'rows.json': 'row 2: no text', 'fifo': 'cannot be read twice',
    'empty.jsonl': 'empty', 'text.parquet': 'not a readable parquet', 'column.parquet': 'one of: story',
    'number.parquet': "no text column 'text'", 'folder': 'no UTF-8 text file'}


def check_refused(result, work, message):
    assert result.code == 2, result
    assert message in result.err and result.err.startswith('prepare.py: '), result.err
    assert result.err.count('\n') == 1 and 'Traceback' not in result.err + result.out
    assert not [path for path in files_below(f'{work}/data') if path.endswith('.bin')]
    assert not glob.glob(f'{work}/data/.*'), 'temporary files are left'


@pytest.mark.parametrize('name', BAD_INPUTS)
def test_bad_input(cli, tmp_path, name):
    result = cli.run(f'--input={bad_input(tmp_path, name)}', '--name=x', '--tokenizer=byte')
    check_refused(result, cli.work, BAD_INPUTS[name])


def test_bad_validation_input(cli, tmp_path):
    """Found out while writing, not before."""
    good = bad_input(tmp_path, 'good.txt')
    messages = {'latin.txt': 'offset 300003', 'empty.txt': 'val split is empty', 'missing.txt': 'no such'}
    for name, message in messages.items():
        result = cli.run(f'--input={good}', f'--val_input={bad_input(tmp_path, name)}', '--name=x', '--tokenizer=byte')
        check_refused(result, cli.work, message)


@pytest.mark.parametrize('args, message', [
    ([], 'python, tinystories, wikitext-2, wikitext-103, shakespeare'),
    (['wikitext'], 'python, tinystories, wikitext-2, wikitext-103, shakespeare'),
    (['python', 'shakespeare'], 'give either one data set'),
    (['python', '--input=GOOD', '--name=x'], 'give either one data set'),
    (['python', '--name=x'], 'go with --input'),
    (['--val_input=GOOD'], 'give either one data set'),
    (['python', '--tokenizer=word'], 'gpt2, byte, char, bpe:N'),
    (['python', '--tokenizer=bpe:256'], '257 or more'),
    (['--input=GOOD', '--name=x', '--tokenizer=bpe:5000'], 'gives only'),
    (['python', '--val_fraction=0'], 'between 0 and 1'),
    (['python', '--val_fraction=x'], 'expected a number'),
    (['python', '--num_proc=-1'], 'negative'),
    (['python', '--tokeniser=byte'], "'tokenizer'"),
    (['--input=GOOD'], 'needs --name'),
    (['--packages=GOOD'], '--packages needs --name'),
    (['--packages=missing', '--name=x'], 'no such file'),
    (['--packages=GOOD', '--name=x', '--text_key=text'], 'not with --packages'),
    (['--packages=GOOD', '--name=x', '--input=GOOD'], 'give either one data set'),
    (['--input=GOOD', '--name=a/b'], 'needs --name'),
    (['--input=GOOD', '--name=..'], 'needs --name'),
    (['--input=GOOD', '--name=x', '--tokenizer=byte', '--data_dir=GOOD'], 'good.txt: '),
    (['--input=GOOD', '--name=x', '--tokenizer=byte', '--data_dir=GOOD/data'], 'Not a directory'),
])
def test_bad_arguments(cli, tmp_path, args, message):
    good = str(bad_input(tmp_path, 'good.txt'))
    result = cli.run(*[arg.replace('GOOD', good) for arg in args])
    check_refused(result, cli.work, message)
    assert not result.network


def test_torchrun_is_refused(cli):
    check_refused(cli.run('python', '--tokenizer=byte', RANK='0', LOCAL_RANK='0'), cli.work, 'once beforehand')


@pytest.mark.parametrize('dataset', ['shakespeare', 'tinystories', 'wikitext-2'])
def test_download_without_a_network(cli, dataset):
    started = time.monotonic()
    result = cli.run(dataset, '--tokenizer=byte')
    check_refused(result, cli.work, os.path.join('data', 'raw', dataset))
    assert '`python prepare.py python` and --input=PATH work offline' in result.err and result.network
    assert time.monotonic() - started < 15


# -----------------------------------------------------------------------------
# interruptions

@pytest.mark.skipif(os.name == 'nt', reason='POSIX signals')
@pytest.mark.parametrize('name, code', [('SIGINT', 130), ('SIGTERM', 143), ('SIGKILL', -9)])
def test_interrupted(cli, tmp_path, name, code):
    small, large = write(tmp_path / 'small.txt', 'old text\n' * 100), tmp_path / 'large.txt'
    large.write_text('new text of many lines\n' * 2_000_000, encoding='utf-8')
    write(cli.work / 'data' / 'x' / 'notes.txt', "the user's own")
    assert cli.run(f'--input={small}', '--name=x').code == 0
    before = snapshot(cli.work)
    process = cli.start(f'--input={large}', '--name=x', f'--val_input={small}')
    while not any(map(os.path.getsize, glob.glob(f'{cli.work}/data/.*/train.bin'))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and 'Traceback' not in err
    after = snapshot(cli.work)
    assert {path: after.get(path) for path in before} == before     # the old data set is there, whole
    left = glob.glob(f'{cli.work}/data/.*')
    assert bool(left) == (name == 'SIGKILL')
    for folder in left:     # an hour later
        for path in (*glob.glob(f'{folder}/*'), folder):
            os.utime(path, (0, 0))
    assert cli.run(f'--input={small}', '--name=x').code == 0
    assert snapshot(cli.work) == before


def learn(started):
    """Learns bpe for many seconds, with the handler of prepare.py."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rng = random.Random(0)
    texts = [' '.join(''.join(rng.choices('abcdefghijklmnop', k=9)) for _ in range(20000)) for _ in range(20)]
    write(started, '')
    train_bpe(60000, texts)


@pytest.mark.skipif(os.name == 'nt', reason='POSIX signals')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_learning_of_bpe_at_once(fork, tmp_path, number):
    process = fork(learn, tmp_path / 'started')
    while not (tmp_path / 'started').exists():
        time.sleep(0.01)
    time.sleep(0.5)
    assert process.is_alive()
    os.kill(process.pid, number)
    process.join(timeout=5)
    assert process.exitcode == -number


def test_publish_never_shows_a_mixture(tmp_path, monkeypatch):
    """Killed between any two steps, the folder counts as whole only where all of its files belong together."""
    def build(folder, ids):
        for split in ('train', 'val'):
            write(folder / f'{split}.bin', bytes(ids))
        splits = {split: {'tokens': len(ids) // 2, 'bytes': 1} for split in ('train', 'val')}
        write(folder / 'meta.json', json.dumps({'dtype': 'uint16', 'vocab_size': 300, 'eot': 299, 'tokenizer': {},
                                                'splits': splits}))
    for steps in range(7):
        old, new = tmp_path / f'old{steps}', tmp_path / f'new{steps}'
        build(old, [0, 0]), build(new, [1, 1])
        done = []

        def killed(*args, done=done, steps=steps, replace=os.replace):
            if len(done) == steps:
                raise KeyboardInterrupt
            done.append(replace(*args))
        with monkeypatch.context() as patch:
            patch.setattr(os, 'replace', killed)
            if steps < 6:
                with pytest.raises(KeyboardInterrupt):
                    prepare.publish(new, old)
            else:
                prepare.publish(new, old)
        if 0 < steps < 6:
            with pytest.raises(UserError, match='incomplete'):
                load_meta(old)
        else:
            load_meta(old)
            assert (old / 'train.bin').read_bytes() == (old / 'val.bin').read_bytes() == bytes([steps // 6] * 2)
    left = tmp_path / 'old2'  # killed in the middle, and made again
    build(tmp_path / 'again', [1, 1])
    prepare.publish(tmp_path / 'again', left)
    assert sorted(os.listdir(left)) == ['meta.json', 'train.bin', 'val.bin'] and load_meta(left)


@pytest.mark.parametrize('name', ['train.bin', 'val.bin', 'meta.json'])
def test_a_file_that_cannot_be_replaced_leaves_the_old_data_set_whole(cli, tmp_path, monkeypatch, name):
    """Windows refuses while a training run or an evaluation reads it."""
    assert cli.run(f'--input={write(tmp_path / "a.txt", "old text " * 99)}', '--name=x', '--tokenizer=byte').code == 0
    before = snapshot(cli.work)

    def refused(source, target, replace=os.replace):
        if os.path.basename(source) == name and str(target).endswith('.old'):
            raise PermissionError(13, 'Permission denied', source, None, target)
        replace(source, target)
    monkeypatch.setattr(os, 'replace', refused)
    with pytest.raises(UserError, match='Permission denied'):
        prepare.main([f'--input={write(tmp_path / "b.txt", "new text " * 99)}', '--name=x', '--tokenizer=byte',
                      f'--data_dir={cli.work}/data'])
    assert snapshot(cli.work) == before


@pytest.mark.skipif(not os.path.isdir('/dev/shm') or os.name == 'nt', reason='needs a second file system')
def test_a_data_set_may_be_a_link_to_another_disk(cli, tmp_path):
    with tempfile.TemporaryDirectory(dir='/dev/shm') as disk:
        os.makedirs(cli.work / 'data')
        os.symlink(disk, cli.work / 'data' / 'x_byte')
        for text in ('old text ', 'new text '):
            made = cli.run(f'--input={write(tmp_path / "a.txt", text * 99)}', '--name=x', '--tokenizer=byte')
            assert made.code == 0, made.err
            load_meta(cli.work / 'data' / 'x_byte')
            with open(f'{disk}/train.bin', 'rb') as f:
                assert text.encode() in f.read()[::2]
        assert os.path.islink(cli.work / 'data' / 'x_byte')
        assert sorted(os.listdir(disk)) == ['meta.json', 'train.bin', 'val.bin']


# -----------------------------------------------------------------------------
# memory

PEAK = '''
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name='__main__')
except SystemExit as e:
    assert not e.code, e.code
print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])
'''


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads the peak from /proc')
@pytest.mark.parametrize('separator, tokenizer', [('', 'byte'), (EOT_TEXT, 'char')])
def test_memory_is_bounded(tmp_path, separator, tokenizer):
    """100 MB, as one document or as many, in less memory than the text alone takes."""
    path = tmp_path / 'in.txt'
    with open(path, 'w', encoding='utf-8') as f:
        for i in range(100):
            f.write((f'{string.ascii_letters} ' * 41 + separator) * (1_000_000 // (2200 + len(separator))) + str(i))
    command = [sys.executable, '-c', PEAK, os.path.join(ROOT, 'prepare.py'), f'--input={path}', '--name=x',
               '--num_proc=2', f'--tokenizer={tokenizer}', f'--data_dir={tmp_path}']
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding='utf-8',
                         env=os.environ | {'PYTHONPATH': ROOT}).stdout
    assert int(out.splitlines()[-1]) < 90_000       # KiB, of which Python with numpy is about 40,000
