"""
A checkpoint for others: a folder in Hugging Face's format, weights as safetensors, never pickle.

    python export.py --out_dir=out --to=my-model
    python sample.py --init_from=hf:my-model              here, from disk or, once uploaded, from the Hub
    python generate_diffusion.py --out_dir=hf:my-model    masked diffusion likewise

A gpt2 model becomes what transformers loads: GPT2LMHeadModel.from_pretrained('my-model'), AutoTokenizer likewise. Every
other type becomes a config.json and a model.safetensors that this repository loads (`hf:FOLDER_OR_NAME`), drifting with its
encoder in a folder inside.
"""
import json
import os
import shutil
from dataclasses import asdict, dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

import checkpoint
from configurator import UserError, configure, option, run
from tokenizer import EOT_TEXT, byte_alphabet, tokenizer_from_meta

TRANSPOSED = ('c_attn.weight', 'c_fc.weight', 'c_proj.weight')  # Hugging Face's GPT-2 keeps these as Conv1D


@dataclass
class ExportConfig:
    """What goes where."""
    out_dir: str = option('out', 'folder of the run')
    ckpt: str = option('best', 'which checkpoint of it', tuple(checkpoint.FILES))
    to: str = option('', 'the new folder')

    def __post_init__(self):
        if not self.to:
            raise UserError('--to=FOLDER is missing: where should the model go?')


# ---------------------------------------------------------------------------------------------------------------------
# weights

def gpt2_config(c, eot):
    """config.json of transformers for a GPTConfig."""
    return {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], 'vocab_size': c.vocab_size,
            'n_positions': c.block_size, 'n_embd': c.n_embd, 'n_layer': c.n_layer, 'n_head': c.n_head,
            'n_inner': c.n_inner or None, 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
            'resid_pdrop': c.dropout, 'embd_pdrop': c.dropout, 'attn_pdrop': c.dropout, 'tie_word_embeddings': True,
            'bos_token_id': eot, 'eos_token_id': eot}


def gpt2_weights(weights, c):
    """Our state dict in Hugging Face's names and shapes; biases that a model does without are zero there."""
    found = {}
    for name, tensor in weights.items():
        if name == 'lm_head.weight':
            continue  # tied
        if name == checkpoint.TABLE:
            tensor = tensor[:c.vocab_size]
        found[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous().clone()
        if not c.bias and name.endswith('.weight') and '.wte.' not in name and '.wpe.' not in name:
            found[name.replace('.weight', '.bias')] = torch.zeros(len(tensor))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

def halves(token, ranks):
    """The two tokens whose merge makes `token`, of bytes ranked by when they merge."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        merged = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        _, i = min(pair for pair in merged if pair[0] < ranks[token])
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def hf_tokenizer(tokenizer):
    """A Tokenizer of ours as one of the tokenizers library."""
    if tokenizer.name == 'char':
        vocab = {c: i for i, c in enumerate(tokenizer.characters)}
        theirs = HFTokenizer(models.WordLevel(vocab, unk_token=tokenizer.characters[0]))
        theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        theirs.decoder = decoders.Fuse()
    else:
        character = {byte: c for c, byte in byte_alphabet().items()}

        def spelled(token):
            return ''.join(character[b] for b in token)
        tokens = tokenizer.tokens[:-1]
        ranks = {token: i for i, token in enumerate(tokens)}
        merges = [tuple(map(spelled, halves(token, ranks))) for token in tokens if len(token) > 1]
        theirs = HFTokenizer(models.BPE({spelled(token): i for i, token in enumerate(tokens)}, merges))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([AddedToken(EOT_TEXT, special=True)])
    assert theirs.token_to_id(EOT_TEXT) == tokenizer.eot, 'the end-of-text id is the last one in both'
    return theirs


# ---------------------------------------------------------------------------------------------------------------------
# files

def write_text(folder, name, text):
    with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
        f.write(text)


def write_json(folder, name, value):
    write_text(folder, name, json.dumps(value, indent=1))


def export(state, folder):
    """Writes a checkpoint's model and tokenizer to a new folder, with the encoder of a drifting model inside. The folder is
    there when it is whole. Raises UserError if it is there already, or cannot be written."""
    checkpoint.refuse_foreign(state)
    folder = os.path.normpath(folder)
    if os.path.exists(folder):
        raise UserError(f'{folder} exists: name a new folder with --to')
    kind, encoder = checkpoint.model_config(state['model_args']).model_type, None
    if kind == 'drifting':
        encoder = checkpoint.load_model(state).encoder
        state = state | {'model_args': state['model_args'] | {'encoder': checkpoint.INSIDE}}
    temporary = folder + '.tmp'
    try:
        if os.path.exists(temporary):  # of an export that was killed
            shutil.rmtree(temporary)
        os.makedirs(temporary)
        (write_gpt2 if kind == 'gpt2' else write_ours)(state, temporary)
        if encoder is not None:
            its = encoder.source | {'model_args': asdict(encoder.config), 'model': encoder.state_dict()}
            os.mkdir(os.path.join(temporary, checkpoint.ENCODER))
            write_ours(its, os.path.join(temporary, checkpoint.ENCODER))  # to the last bit: it is known by its fingerprint
        os.rename(temporary, folder)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f'cannot write to={folder}: {getattr(e, "strerror", None) or e}') from None


def write_gpt2(state, folder):
    """What transformers loads, into an empty folder."""
    c, tokenizer = checkpoint.model_config(state['model_args']), tokenizer_from_meta(state['tokenizer'])
    facts = {key: state[key] for key in ('tokenizer', 'run_id', 'parents')}  # which transformers leaves alone
    write_json(folder, 'config.json', gpt2_config(c, tokenizer.eot) | {checkpoint.EXPORTED: facts})
    write_weights(folder, gpt2_weights(state.get('ema') or state['model'], c))
    write_tokenizer(folder, tokenizer, c.block_size)


def write_ours(state, folder):
    """What this repository loads, into an empty folder."""
    facts = {key: state.get(key) for key in checkpoint.EXPORTED_KEYS}  # runs of before have no encoder
    write_json(folder, 'config.json', {'model_type': checkpoint.EXPORTED} | facts)
    weights = state.get('ema') or state['model']
    untied = {name: tensor.contiguous().clone() for name, tensor in weights.items() if name != 'lm_head.weight'}
    write_weights(folder, untied)
    write_tokenizer(folder, tokenizer_from_meta(state['tokenizer']), state['model_args']['block_size'])


def write_weights(folder, weights):
    save_file(weights, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})


def write_tokenizer(folder, tokenizer, block_size):
    write_text(folder, 'tokenizer.json', hf_tokenizer(tokenizer).to_str(pretty=True))
    write_json(folder, 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': EOT_TEXT, 'eos_token': EOT_TEXT, 'unk_token': EOT_TEXT,
        'model_max_length': block_size, 'clean_up_tokenization_spaces': False})


def main(argv):
    config, _ = configure(argv, ExportConfig, description=__doc__)
    state = checkpoint.open_run(config.out_dir, config.ckpt)
    export(state, config.to)
    diffusion = state['model_args'].get('model_type') == 'diffusion'
    print(f'{config.to}: python ' + ('generate_diffusion.py --out_dir' if diffusion else 'sample.py --init_from')
          + f'=hf:{config.to}')


if __name__ == '__main__':
    run(main)
