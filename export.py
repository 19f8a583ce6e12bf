"""
A checkpoint for others: a folder in Hugging Face's format, weights as safetensors, never pickle.

    python export.py --out_dir=out --to=my-model            --dtype=float16 halves the file
    python sample.py --init_from=hf:my-model              here, from disk or, once uploaded, from the Hub
    python generate_diffusion.py --out_dir=hf:my-model    masked diffusion likewise

A gpt2 model becomes what transformers loads: GPT2LMHeadModel.from_pretrained('my-model'), AutoTokenizer likewise. Every
other type becomes a config.json and a model.safetensors that this repository loads (`hf:FOLDER_OR_NAME`), drifting with its
encoder in a folder inside. README.md is a model card, to be gone over before it is published.
"""
import os
import shutil
from dataclasses import asdict, dataclass, replace

from safetensors import SafetensorError

from model import GPTConfig, load_model
from nanodrift import huggingface
from nanodrift.checkpoint import FILES
from nanodrift.machine import DTYPES
from nanodrift.model_card import model_card, writing_command
from nanodrift.options import UserError, check_options, configure, from_stored, option, run


@dataclass
class ExportConfig:
    """What goes where."""
    out_dir: str = option('out', 'folder of the run')
    ckpt: str = option('best', 'which checkpoint of it', tuple(FILES))
    to: str = option('', 'the new folder')
    dtype: str = option('float32', 'number type of the weights: one of 16 bits halves the file, and rounds', tuple(DTYPES))

    def __post_init__(self):
        check_options(self)
        if not self.to:
            raise UserError('--to=FOLDER is missing: where should the model go?')


def export(state, folder, dtype='float32'):
    """Writes a checkpoint's model and tokenizer to a new folder, with the encoder of a drifting model inside. The folder is
    there when it is whole. Raises UserError if it is there already, or cannot be written."""
    huggingface.check_complete(state)
    folder = os.path.normpath(folder)
    if os.path.exists(folder):
        raise UserError(f'{folder} exists: name a new folder with --to')
    config = from_stored(GPTConfig, state['model_args'], 'the checkpoint has model arguments')
    model = load_model(state)
    encoder = model.encoder
    if encoder is not None:
        config = replace(config, encoder=huggingface.INSIDE)
    state = state | {'model_args': asdict(config)}
    temporary = folder + '.tmp-export'  # a name that no folder of the user's has
    try:
        if os.path.exists(temporary):  # of an export that was killed
            shutil.rmtree(temporary)
        os.makedirs(temporary)
        if config.model_type == 'gpt2':
            huggingface.write_gpt2(state, config, temporary, dtype)
        else:
            huggingface.write_ours(state, temporary, dtype)
        if encoder is not None:
            encoder_state = encoder.source | {'model_args': asdict(encoder.config), 'model': encoder.state_dict()}
            inside = os.path.join(temporary, huggingface.ENCODER)
            os.mkdir(inside)
            huggingface.write_ours(encoder_state, inside, 'float32')  # to the last bit: it is known by its fingerprint
        huggingface.write_text(temporary, 'README.md', model_card(state, config, model, folder, dtype))
        os.rename(temporary, folder)
    except (OSError, SafetensorError) as e:
        raise UserError(f'cannot write to={folder}: {getattr(e, "strerror", None) or e}') from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # where all went well it has its new name, and is not there


def main(argv):
    config, _ = configure(argv, ExportConfig, description=__doc__)
    state = huggingface.open_run(config.out_dir, config.ckpt)
    export(state, config.to, config.dtype)
    print(f'{config.to}: ' + ' '.join(writing_command(state['model_args'].get('model_type', 'gpt2'), config.to)))


if __name__ == '__main__':
    run(main)
