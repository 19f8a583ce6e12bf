"""
A checkpoint for others: a folder in Hugging Face's format, weights as safetensors, never pickle.

    python export.py --out_dir=out --to=my-model
    python sample.py --init_from=hf:my-model              here, from disk or, once uploaded, from the Hub

A gpt2 model becomes what transformers loads: GPT2LMHeadModel.from_pretrained('my-model'), AutoTokenizer likewise. Every
other type becomes a config.json and a model.safetensors that this repository loads (`hf:FOLDER_OR_NAME`).
"""
import json
import os
from dataclasses import dataclass

import torch
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

def write_json(folder, name, value):
    with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
        json.dump(value, f, indent=1)


def export(state, folder):
    """Writes a checkpoint's model and tokenizer to a new folder. Raises UserError if it is there already."""
    checkpoint.refuse_foreign(state)
    c = checkpoint.model_config(state['model_args'])
    if os.path.exists(folder):
        raise UserError(f'{folder} exists: name a new folder with --to')
    tokenizer = tokenizer_from_meta(state['tokenizer'])
    weights = state.get('ema') or state['model']
    os.makedirs(folder)
    if c.model_type == 'gpt2':
        facts = {key: state[key] for key in ('tokenizer', 'run_id', 'parents')}  # which transformers leaves alone
        write_json(folder, 'config.json', gpt2_config(c, tokenizer.eot) | {checkpoint.EXPORTED: facts})
        weights = gpt2_weights(weights, c)
    else:
        facts = {key: state.get(key) for key in checkpoint.EXPORTED_KEYS}  # runs of before have no encoder
        write_json(folder, 'config.json', {'model_type': checkpoint.EXPORTED} | facts)
        weights = {name: tensor.contiguous().clone() for name, tensor in weights.items() if name != 'lm_head.weight'}
    save_file(weights, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})
    hf_tokenizer(tokenizer).save(os.path.join(folder, 'tokenizer.json'))
    write_json(folder, 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': EOT_TEXT, 'eos_token': EOT_TEXT, 'unk_token': EOT_TEXT,
        'model_max_length': c.block_size, 'clean_up_tokenization_spaces': False})


def main(argv):
    config, _ = configure(argv, ExportConfig, description=__doc__)
    state = checkpoint.open_run(config.out_dir, config.ckpt)
    export(state, config.to)
    print(f'{config.to}: python sample.py --init_from=hf:{config.to}')


if __name__ == '__main__':
    run(main)
