"""sample.py as a user runs it."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run_here, run_script

import prepare
import sample
from model import load_model
from nanodrift import checkpoint
from train import main


@pytest.fixture(scope='module')
def out_dir(tmp_path_factory, data_dir):
    """A run of a few iterations."""
    settings = TINY | {'data_dir': data_dir, 'dataset': 'tiny_byte', 'max_iters': 20, 'eval_interval': 20,
                       'out_dir': str(tmp_path_factory.mktemp('sample') / 'out')}
    assert main([f'--{key}={value}' for key, value in settings.items()]) == 0
    return settings['out_dir']


@pytest.mark.slow
def test_samples_are_reproducible_by_seed_and_count_their_speed(out_dir):
    words = ['sample.py', f'--out_dir={out_dir}', '--num_samples=3', '--max_new_tokens=12', '--start=ab']
    first, again, other = run_script(*words), run_here(*words), run_here(*words, '--seed=1')
    assert first.stdout == again.stdout != other.stdout
    samples = first.stdout.split('---------------\n')[:-1]
    assert len(samples) == 3 and all(s.startswith('ab') for s in samples)
    assert 'tokens/s' in first.stderr


def test_one_sample_streams_the_text_that_a_batch_prints(out_dir):
    words = ['sample.py', f'--out_dir={out_dir}', '--temperature=0', '--max_new_tokens=30', '--start=the ',
             '--dtype=float32']
    one, two = run_here(*words, '--num_samples=1'), run_here(*words, '--num_samples=2')
    assert one.stdout.rstrip('\n') == two.stdout.split('\n---------------\n')[0].rstrip('\n')


def test_prompts_from_a_file_and_an_empty_one(out_dir, tmp_path):
    (tmp_path / 'p.txt').write_text('héllo', encoding='utf-8')
    words = ['sample.py', f'--out_dir={out_dir}', '--num_samples=1', '--max_new_tokens=3']
    assert run_here(*words, f'--start=FILE:{tmp_path / "p.txt"}').stdout.startswith('héllo')
    assert run_here(*words, '--start=').returncode == 0
    long = tmp_path / 'long.txt'
    long.write_text('abc ' * 500, encoding='utf-8')  # far past block_size
    assert run_here(*words, f'--start=FILE:{long}').stdout.startswith('abc abc')


def test_generation_stops_at_end_of_text(out_dir):
    state = checkpoint.load(checkpoint.find(out_dir))
    model, tokenizer = load_model(state), sample.tokenizer_from_meta(state['tokenizer'])
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.transformer.wte.weight[tokenizer.eot] = 100  # the most likely token, always
    config = sample.SampleConfig(max_new_tokens=10, top_k=0)
    assert list(sample.generate(model, tokenizer, [1, 2], 2, config, 0)) == [[[], []]]
    config.draft = 'ngram'
    assert list(sample.generate(model, tokenizer, [1, 2], 2, config, 0)) == [[[], []]]
    config.draft = 'none'
    config.ignore_eot = True
    assert len(list(sample.generate(model, tokenizer, [1, 2], 2, config, 0))) == 10


def test_streaming_never_splits_a_character(capsys):
    from nanodrift.tokenizer import ByteTokenizer
    ids = list('né€🙂'.encode())
    assert sample.stream('', ByteTokenizer(), ([[i]] for i in ids)) == (len(ids), len(ids))
    assert capsys.readouterr().out == 'né€🙂\n'


@pytest.mark.parametrize('wrong, fix', [
    (['--out_dir=nowhere'], 'train.py'),
    (['--ckpt=newest'], 'best, last'),
    (['--start=FILE:missing.txt'], 'missing.txt'),
    (['--top_p=0'], 'top_p'),
    (['--temperature=-1'], 'temperature'),
    (['--num_sample=2'], 'num_samples'),
    (['--device=tpu'], 'cuda'),
    (['--init_from=gpt2'], 'hf:'),
])
def test_mistakes_get_one_line_and_exit_code_2(out_dir, wrong, fix):
    done = run_here('sample.py', f'--out_dir={out_dir}', *wrong)
    assert done.returncode == 2 and fix in done.stderr and done.stderr.count('\n') == 1, done.stderr


def test_hugging_face_weights_are_sampled_without_training(tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(n_positions=32, n_layer=1, n_head=2, n_embd=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    done = run_here('sample.py', f'--init_from=hf:{tmp_path}', '--num_samples=1', '--max_new_tokens=5', '--start=Hello')
    assert done.stdout.startswith('Hello')


@pytest.mark.slow
def test_output_is_utf8_whatever_the_locale(out_dir, tmp_path):
    (tmp_path / 'p.txt').write_text('é€🙂', encoding='utf-8')
    words = [sys.executable, 'sample.py', f'--out_dir={out_dir}', f'--start=FILE:{tmp_path / "p.txt"}', '--num_samples=1',
             '--max_new_tokens=2']
    done = subprocess.run(words, capture_output=True, env={'LC_ALL': 'C', 'PYTHONUTF8': '0'}, check=True, cwd=ROOT)
    assert done.stdout.startswith('é€🙂'.encode())


def test_a_byte_order_mark_is_no_part_of_the_prompt(tmp_path):
    (tmp_path / 'prompt.txt').write_bytes('\ufeffabc\r\n'.encode())
    assert sample.read_prompt(f'FILE:{tmp_path}/prompt.txt') == 'abc\r\n'


def test_drafts_are_counted_and_change_nothing(out_dir):
    words = ['sample.py', f'--out_dir={out_dir}', '--temperature=0', '--num_samples=1', '--max_new_tokens=12',
             '--dtype=float32']
    plain, drafted = run_here(*words), run_here(*words, '--draft=ngram')
    assert drafted.stdout == plain.stdout and 'tokens per forward pass' in drafted.stderr


def test_end_of_text_in_a_prompt_is_its_id_and_long_prompts_are_cut_aloud(out_dir):
    tokenizer = sample.tokenizer_from_meta(checkpoint.load(checkpoint.find(out_dir))['tokenizer'])
    assert sample.encode_prompt(tokenizer, 'a<|endoftext|>b<|endoftext|>') == [97, 256, 98, 256]
    done = run_here('sample.py', f'--out_dir={out_dir}', '--num_samples=1', '--max_new_tokens=2', '--start=' + 'ab' * 20)
    assert 'the prompt has 40 tokens; the model reads the last block_size=16' in done.stderr
    assert done.stdout.startswith('ab' * 20)


def test_the_default_prompt_needs_no_newline_in_the_vocabulary(tmp_path, capsys):
    (tmp_path / 'dna.txt').write_text('ACGT' * 300)
    prepare.main([f'--input={tmp_path}/dna.txt', '--name=dna', '--tokenizer=char', f'--data_dir={tmp_path}'])
    settings = TINY | {'data_dir': str(tmp_path), 'dataset': 'dna_char', 'max_iters': 2, 'out_dir': str(tmp_path / 'out')}
    main([f'--{key}={value}' for key, value in settings.items()])
    done = run_here('sample.py', f'--out_dir={tmp_path}/out', '--num_samples=1', '--max_new_tokens=8')
    assert set(done.stdout.strip()) <= set('ACGT')
    wrong = run_here('sample.py', f'--out_dir={tmp_path}/out', '--start=x')
    assert wrong.returncode == 2 and 'no id' in wrong.stderr


def test_drafts_of_what_cannot_check_them_are_refused(tmp_path, data_dir, out_dir):
    settings = TINY | {'data_dir': data_dir, 'dataset': 'tiny_byte', 'max_iters': 2, 'out_dir': str(tmp_path / 'out'),
                       'model_type': 'heat', 'heat_t': 'adaptive', 'published': True}
    main([f'--{key}={value}' for key, value in settings.items()])
    done = run_here('sample.py', f'--out_dir={tmp_path}/out', '--draft=ngram')
    assert done.returncode == 2 and 'sees the future' in done.stderr
    done = run_here('sample.py', f'--out_dir={out_dir}', '--draft_tokens=3')
    assert done.returncode == 2 and 'draft=ngram' in done.stderr
