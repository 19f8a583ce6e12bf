"""
The whole path in one command: prepare the embedded corpus, train a few minutes on a CPU, weigh the result against xz,
print three samples. Everything in it is a command that you can run yourself; each is printed before it runs.

    make demo
    make demo MODEL=diffusion        masked refinement, played in the terminal
    make demo MODEL=drifting         one-step generation, in the features of a gpt2 model that is trained first
    python demo.py --max_iters=50
"""
import json
import lzma
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np

from model import MODEL_TYPES
from nanodrift.data import load_meta
from nanodrift.options import configure, option, run
from nanodrift.tokenizer import tokenizer_from_meta

DATASET, TOKENIZER = 'python', 'bpe:1024'
VAL_FRACTION = 0.03


@dataclass
class DemoConfig:
    """The demo's few choices; the rest is in its config file."""
    model_type: str = option('gpt2', 'which of the model types', MODEL_TYPES)
    out_dir: str = option('', 'folder of the run; empty is out-demo, of other types than gpt2 out-demo-TYPE')
    data_dir: str = option('data', 'where the data sets are')
    max_iters: int = option(0, 'iterations of training; 0 is what the config file says')


def call(*words):
    """Runs `python WORDS` as a user would, and ends with its exit code if it fails."""
    print('\n$ python ' + shlex.join(words), flush=True)
    code = subprocess.run([sys.executable, *words], check=False).returncode
    if code:
        raise SystemExit(code)


def validation_text(folder):
    """The bytes of a data set's validation documents, one after the other."""
    meta = load_meta(folder)
    tokenizer = tokenizer_from_meta(meta['tokenizer'])
    ids = np.fromfile(os.path.join(folder, 'val.bin'), dtype=np.dtype(meta['dtype']).newbyteorder('<'))
    return tokenizer.decode_bytes(ids[ids != meta['eot']].tolist())


def last_evaluation(out_dir):
    """The last evaluation in a run's metrics.jsonl."""
    with open(os.path.join(out_dir, 'metrics.jsonl'), encoding='utf-8') as f:
        return [entry for entry in map(json.loads, f) if 'val_loss' in entry][-1]


def main(argv):
    config, _ = configure(argv, DemoConfig, description=__doc__)
    config.out_dir = config.out_dir or 'out-demo' + (f'-{config.model_type}' if config.model_type != 'gpt2' else '')
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the script that runs: it saves, and ends with an error
    dataset = f'{DATASET}_{TOKENIZER.replace(":", "")}'
    folder = os.path.join(config.data_dir, dataset)
    place = [f'--out_dir={config.out_dir}', f'--data_dir={config.data_dir}']
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        call('prepare.py', DATASET, f'--tokenizer={TOKENIZER}', f'--val_fraction={VAL_FRACTION}',
             f'--data_dir={config.data_dir}')
    n = config.max_iters
    length = [f'--max_iters={n}', f'--warmup_iters={n // 10}'] if n else []
    if config.model_type == 'drifting':
        encoder = f'{config.out_dir}-encoder'
        call('train.py', 'config/train_python.py', f'--out_dir={encoder}', f'--data_dir={config.data_dir}', *length)
        call('train.py', 'config/train_drifting_python.py', f'--encoder={encoder}', *place, *length)
        call('sample.py', f'--out_dir={config.out_dir}')
        return
    if config.model_type == 'diffusion':
        recipe = ['config/train_diffusion_python.py']
    else:
        recipe = ['config/train_python.py', f'--model_type={config.model_type}']
    call('train.py', *recipe, *place, *length)
    call('train.py', '--init_from=resume', '--eval_only=True', '--eval_iters=0', *place)
    weigh(config.out_dir, folder)
    start = [f'--out_dir={config.out_dir}', '--start=def ']
    if config.model_type == 'diffusion':
        call('generate_diffusion.py', *start, '--max_new_tokens=56', '--animate=True')
    else:
        call('sample.py', *start, '--num_samples=3', '--max_new_tokens=150')


def weigh(out_dir, folder):
    """Bits per byte of the model beside those of xz on the same text: a language model is a compressor."""
    text = validation_text(folder)
    xz = 8 * len(lzma.compress(text, preset=9)) / len(text)
    found = last_evaluation(out_dir)
    model = found.get('val_bits_per_byte') or found['val_bits_per_byte_bound']
    most = '' if 'val_bits_per_byte' in found else 'at most '
    print(f'\nvalidation text, {len(text):,} bytes: the model needs {most}{model:.3f} bits per byte, xz -9 {xz:.3f}'
          f'{"" if model < xz else " (the model has not caught up yet: train longer)"}', flush=True)


if __name__ == '__main__':
    run(main)
