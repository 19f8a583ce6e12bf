"""
Models in Hugging Face's format, both ways: GPT-2 as transformers keeps it, and every other type as a config.json of our own
and a model.safetensors; the tokenizers that go with them.
"""
import glob
import json
import os
import shutil

import torch

from nanodrift import checkpoint
from nanodrift.checkpoint import EMBEDDING
from nanodrift.corpus import hub_is_reachable
from nanodrift.kernels import padded_vocab_size
from nanodrift.machine import DTYPES
from nanodrift.options import UserError
from nanodrift.tokenizer import EOT_TEXT, BPETokenizer, byte_alphabet, tokenizer_from_meta, tokenizer_from_spec

# What the published variants call themselves, and what a Hugging Face GPT-2 may say of itself and still be that of model.py.
PUBLISHED_TYPES = {'dd-gpt2': 'dd', 'parallel-gpt2': 'parallel', 'duo-predict-gpt2': 'duo', 'rotating-head-gpt2': 'rotating'}
HF_FIXED = {'activation_function': ['gelu_new'], 'layer_norm_epsilon': [1e-5], 'scale_attn_weights': [True],
            'scale_attn_by_inverse_layer_idx': [False], 'tie_word_embeddings': [True], 'add_cross_attention': [False]}
TRANSPOSED = ('c_attn.weight', 'c_fc.weight', 'c_proj.weight')  # Hugging Face's GPT-2 keeps these as Conv1D
OURS = 'nanodrift'  # the model_type in config.json of what transformers does not know
FACTS = {'model_args': dict, 'tokenizer': dict, 'run_id': str, 'parents': list, 'encoder': (str, type(None))}
ENCODER = 'encoder'  # folder inside an export, of the model that drifting was trained with
INSIDE = f'hf:./{ENCODER}'  # what its config.json calls that, wherever the export is now


# ---------------------------------------------------------------------------------------------------------------------
# reading

def holds_weights(folder):
    """Whether a folder has a model in Hugging Face's format."""
    return os.path.exists(os.path.join(folder, 'config.json')) and any(glob.glob(os.path.join(glob.escape(folder), pattern))
               for pattern in ('model*.safetensors*', 'pytorch_model*.bin*'))


def open_run(name, which='best'):
    """The checkpoint of a run's folder, or what 'hf:NAME_OR_FOLDER' holds in the same form: GPT-2 as Hugging Face keeps it,
    or any type as export.py wrote it. `tokenizer` is None if unknown. `foreign` is the model_type stated in a config.json
    that is not ours; its weight names still have to be checked."""
    if not name.startswith('hf:'):
        if holds_weights(name) and not checkpoint.holds_run(name):
            raise UserError(f"{name} holds a model in Hugging Face's format: write hf:{name}")
        return checkpoint.load(checkpoint.find(name, which))
    folder = name.removeprefix('hf:')
    config = _read_config(folder)
    if config.get('model_type') == OURS:
        check_facts(name, config, FACTS)
        weights = _read_tensors(folder)
        weights |= {'lm_head.weight': weights[EMBEDDING]} if EMBEDDING in weights else {}
        facts = {key: config.get(key) for key in FACTS}
        if facts['model_args'].get('encoder') == INSIDE:
            facts['model_args'] = facts['model_args'] | {'encoder': f'{name.rstrip("/")}/{ENCODER}'}
        return facts | {'model': weights, 'config': {}, 'iter_num': 0}
    if OURS in config:
        check_facts(name, config[OURS], ('tokenizer', 'run_id', 'parents'))
    model_args, weights = load_gpt2(folder, config)
    run_id = f'hf:{checkpoint.fingerprint(weights)}'  # by any name it is the same
    facts = {'run_id': run_id, 'parents': []} | config.get(OURS, {})
    if 'tokenizer' not in facts:
        tokenizer = read_tokenizer(folder, model_args['vocab_size'])
        facts['tokenizer'] = None if tokenizer is None else tokenizer.to_meta()
    if facts['tokenizer'] is not None:
        leave_out_added_ids(folder, model_args, weights, tokenizer_from_meta(facts['tokenizer']).vocab_size)
    return facts | {'model_args': model_args, 'model': weights, 'config': {}, 'iter_num': 0, 'foreign': config['model_type']}


def leave_out_added_ids(name, model_args, weights, vocab_size):
    """Ids behind the tokenizer's, of a padding token say, have no text: they must be neither drawn nor counted."""
    if model_args['vocab_size'] < vocab_size:
        raise UserError(f"hf:{name} has a vocabulary of {model_args['vocab_size']}, its tokenizer one of {vocab_size}")
    model_args['vocab_size'] = vocab_size
    embedding = weights[EMBEDDING].clone()[:padded_vocab_size(vocab_size)]
    embedding[vocab_size:] = 0
    weights[EMBEDDING] = weights['lm_head.weight'] = embedding


def read_tokenizer(name, vocab_size):
    """The tokenizer that lies beside weights in Hugging Face's format, as one of ours; GPT-2's where there is none and the
    size is right, None where it is not. Raises UserError where it is not byte-level BPE with end-of-text behind the ids of
    text, the form that GPT-2's has."""
    if path := _fetch(name, 'tokenizer.json', optional=True):
        content = _read_json(path)
        model = content.get('model') or {}
        added = {token['content']: token['id'] for token in content.get('added_tokens') or []}
        vocab, merges = model.get('vocab'), [' '.join(m) if isinstance(m, list) else m for m in model.get('merges') or []]
        before = content.get('pre_tokenizer') or {}
        usual = (before.get('type') == 'ByteLevel' and before.get('use_regex', True) and not before.get('add_prefix_space')
                 and content.get('normalizer') is None and not model.get('ignore_merges'))
    elif (path := _fetch(name, 'vocab.json', optional=True)) and (merges := _fetch(name, 'merges.txt', optional=True)):
        vocab, added, usual = _read_json(path), {}, True
        with open(merges, encoding='utf-8') as f:
            merges = [line.rstrip('\n') for line in f if line.strip() and not line.startswith('#version')]
    else:
        gpt2 = tokenizer_from_spec('gpt2')
        return gpt2 if vocab_size == gpt2.vocab_size else None
    tokens = ordinary_tokens(vocab, merges, added) if usual else None
    if tokens is None:
        raise UserError(f'{path} is not a tokenizer of the form that GPT-2 has (byte-level BPE over its pre-tokens, '
                        'end-of-text behind the ids of text), and no other can be used here')
    gpt2 = tokenizer_from_spec('gpt2')
    return gpt2 if tokens == gpt2.tokens[:-1] else BPETokenizer(f'bpe:{len(tokens) + 1}', tokens)


def ordinary_tokens(vocab, merges, added):
    """The bytes of each id of text, or None where ids are not in the order of the merges, with end-of-text behind them.
    vocab: {token: id}; merges: 'a b' in order; added: {special token: id}."""
    if not isinstance(vocab, dict):
        return None
    alphabet = byte_alphabet()
    spelled = sorted((token for token in vocab if token not in added and token != EOT_TEXT), key=vocab.get)
    merged = [merge.replace(' ', '') for merge in merges]
    in_order = [vocab[token] for token in spelled] == list(range(len(spelled))) and spelled[256:] == merged
    whole = all(c in alphabet for token in spelled for c in token)
    if not in_order or not whole or added.get(EOT_TEXT, vocab.get(EOT_TEXT)) != len(spelled):
        return None
    return [bytes(alphabet[c] for c in token) for token in spelled]


def check_facts(name, facts, keys):
    """Raises UserError where a fact that export.py writes into config.json is missing, or has a wrong type."""
    if not isinstance(facts, dict):
        raise UserError(f'{name}: {OURS} in its config.json is not what export.py writes')
    missing = [key for key in keys if key not in facts and key != 'encoder']
    if missing:
        raise UserError(f'{name}: its config.json lacks {", ".join(missing)}')
    wrong = [key for key in keys if not isinstance(facts.get(key), FACTS[key])]
    if wrong:
        raise UserError(f'{name}: {", ".join(wrong)} in its config.json is not what export.py writes')


def check_complete(state):
    """Raises UserError on published weights, which do not say the options of their type."""
    kind = PUBLISHED_TYPES.get(state.get('foreign'))
    if kind:
        published = ' --published=True' * (kind in ('dd', 'duo'))
        raise UserError(f"{state['foreign']} weights do not say their type's options: take them into a run first, train.py "
                        f'--init_from=hf:FOLDER --model_type={kind}{published}')


def _fetch(name, filename, optional=False):
    """Path of a file of a local folder or of a Hub repository (OWNER/NAME, maybe with a folder in it); None if there is no
    such file, or if it is `optional` and cannot be had without a network."""
    if os.path.isdir(name):
        path = os.path.join(name, filename)
        return path if os.path.isfile(path) else None
    if name.startswith(('/', '.', '~')) or os.path.exists(name):
        raise UserError(f'hf:{name}: there is no such folder')
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    owner, *rest = name.split('/', 2)
    repository, inside = '/'.join([owner, *rest[:1]]), rest[1:]
    try:
        return hf_hub_download(repository, '/'.join([*inside, filename]), local_files_only=not hub_is_reachable())
    except LocalEntryNotFoundError:
        if optional:
            return None
        raise UserError(f'hf:{name} is neither a local folder nor can it be downloaded now; on a machine with a network '
                        f'get its config.json and model.safetensors and use --init_from=hf:FOLDER') from None
    except EntryNotFoundError:
        return None
    except Exception as e:
        raise UserError(f'hf:{name} cannot be downloaded: {str(e).splitlines()[0]}') from None


def _read_tensors(name):
    """The state dict of a Hugging Face folder or repository, from safetensors (one file or sharded) or from a .bin."""
    for single, read in (('model.safetensors', _read_safetensors), ('pytorch_model.bin', checkpoint.read)):
        if path := _fetch(name, single):
            return read(path)
        if index := _fetch(name, f'{single}.index.json'):
            listed = _read_json(index).get('weight_map')
            if not isinstance(listed, dict):
                raise UserError(f'{index} holds no weight_map')
            shards = sorted(set(listed.values()))
            return {k: v for shard in shards for k, v in read(_fetch(name, shard) or shard).items()}
    raise UserError(f'hf:{name} holds no model.safetensors and no pytorch_model.bin')


def _read_safetensors(path):
    from safetensors.torch import load_file  # here, since training needs neither this package nor the next
    try:
        return load_file(path)
    except Exception as e:
        raise UserError(f'{path} is not readable: {e}') from None


def _read_json(path):
    try:
        with open(path, encoding='utf-8') as f:
            value = json.load(f)
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f'{path} is not readable: {e}') from None
    if not isinstance(value, dict):
        raise UserError(f'{path} does not hold the settings of a model')
    return value


def _read_config(name):
    path = _fetch(name, 'config.json')
    if not path:
        raise UserError(f'hf:{name} holds no config.json')
    return _read_json(path)


def load_gpt2(name, config):
    """GPT-2 in Hugging Face's format, from a folder or the Hub, and its config.json -> model arguments, state dict in our
    names.

    Hugging Face keeps its Linear weights transposed (Conv1D), and may leave out the `transformer.` prefix."""
    if config.get('model_type') not in ('gpt2', *PUBLISHED_TYPES):
        raise UserError(f"hf:{name} is a {config.get('model_type')!r} model; 'gpt2' can be loaded, and "
                        f'{", ".join(PUBLISHED_TYPES)}')
    missing = [key for key in ('n_positions', 'vocab_size', 'n_layer', 'n_head', 'n_embd') if key not in config]
    if missing:
        raise UserError(f'hf:{name}: its config.json lacks {", ".join(missing)}')
    changed = [k for k, allowed in HF_FIXED.items() if k in config and config[k] not in allowed]
    if changed:
        raise UserError(f'hf:{name} changes GPT-2 itself ({", ".join(changed)}); plain GPT-2 can be loaded')
    model_args = dict(block_size=config['n_positions'], vocab_size=config['vocab_size'], n_layer=config['n_layer'],
                      n_head=config['n_head'], n_embd=config['n_embd'], n_inner=config.get('n_inner') or 0, bias=True)
    weights = {}
    tensors = _read_tensors(name)
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f'hf:{name}: {key} in its weights is no tensor')
        key = 'transformer.' + key.removeprefix('transformer.')
        if key.endswith(('.attn.bias', '.attn.masked_bias')) or key == 'transformer.lm_head.weight':
            continue  # the causal mask, and the tied head
        if key.endswith(TRANSPOSED) and tensor.dim() == 2:
            tensor = tensor.t()
        weights[key] = tensor.float()
    head = tensors.get('lm_head.weight')
    embedding = weights.setdefault(EMBEDDING, None if head is None else head.float())  # one matrix, by either name
    if embedding is None or embedding.dim() != 2 or len(embedding) != config['vocab_size']:
        raise UserError(f"hf:{name}: vocab_size={config['vocab_size']} in its config.json, but "
                        f"{EMBEDDING} is {'missing' if embedding is None else 'of shape ' + str(tuple(embedding.shape))}")
    if head is not None and not torch.equal(head.float(), embedding):
        raise UserError(f'hf:{name}: lm_head.weight is not {EMBEDDING}; here the two are one')
    padding = padded_vocab_size(len(embedding)) - len(embedding)
    weights[EMBEDDING] = torch.cat((embedding, embedding.new_zeros(padding, embedding.size(1))))
    weights['lm_head.weight'] = weights[EMBEDDING]
    return model_args, weights


# ---------------------------------------------------------------------------------------------------------------------
# writing

def gpt2_config(c, eot):
    """config.json of transformers for a GPTConfig."""
    return {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], 'vocab_size': c.vocab_size,
            'n_positions': c.block_size, 'n_embd': c.n_embd, 'n_layer': c.n_layer, 'n_head': c.n_head,
            'n_inner': c.n_inner or None, 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
            'resid_pdrop': c.dropout, 'embd_pdrop': c.dropout, 'attn_pdrop': c.dropout, 'tie_word_embeddings': True,
            'bos_token_id': eot, 'eos_token_id': eot}


def gpt2_weights(weights, c):
    """Our state dict in Hugging Face's names and shapes; biases that a model does without are zero there."""
    theirs = {}
    for name, tensor in weights.items():
        if name == 'lm_head.weight':
            continue  # tied
        if name == EMBEDDING:
            tensor = tensor[:c.vocab_size]
        theirs[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous().clone()
        if not c.bias and name.endswith('.weight') and '.wte.' not in name and '.wpe.' not in name:
            theirs[name.replace('.weight', '.bias')] = torch.zeros(len(tensor))
    return theirs


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
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as HFTokenizer
    if tokenizer.name == 'char':
        vocab = {c: i for i, c in enumerate([*tokenizer.characters, EOT_TEXT])}  # an unknown character ends the text
        theirs = HFTokenizer(models.WordLevel(vocab, unk_token=EOT_TEXT))
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


def write_text(folder, name, text):
    with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
        f.write(text)


def write_json(folder, name, value):
    write_text(folder, name, json.dumps(value, indent=1))


def write_gpt2(state, c, folder, dtype):
    """What transformers loads of a checkpoint and its GPTConfig, into an empty folder."""
    tokenizer = tokenizer_from_meta(state['tokenizer'])
    facts = {key: state[key] for key in ('tokenizer', 'run_id', 'parents')}  # which transformers leaves alone
    write_json(folder, 'config.json', gpt2_config(c, tokenizer.eot) | {'torch_dtype': dtype, OURS: facts})
    write_weights(folder, gpt2_weights(state.get('ema') or state['model'], c), dtype)
    write_tokenizer(folder, tokenizer, c.block_size)


def write_ours(state, folder, dtype):
    """What this repository loads, into an empty folder."""
    facts = {key: state.get(key) for key in FACTS}  # runs of before have no encoder
    write_json(folder, 'config.json', {'model_type': OURS} | facts)
    weights = state.get('ema') or state['model']
    untied = {name: tensor.contiguous().clone() for name, tensor in weights.items() if name != 'lm_head.weight'}
    write_weights(folder, untied, dtype)
    write_tokenizer(folder, tokenizer_from_meta(state['tokenizer']), state['model_args']['block_size'])


def write_weights(folder, weights, dtype):
    from safetensors.torch import save_file
    # an angle is a position times its rate: rounded, the rates of rotary positions would be wrong far from the beginning
    rounded = {name: tensor if name.endswith('.frequencies') else tensor.to(DTYPES[dtype])
               for name, tensor in weights.items()}
    if any((tensor.isinf() & weights[name].isfinite()).any() for name, tensor in rounded.items()):
        raise UserError(f'dtype={dtype} cannot hold these weights: --dtype=bfloat16')
    path = os.path.join(folder, 'model.safetensors')
    save_file(rounded, path, metadata={'format': 'pt'})
    shutil.copymode(os.path.join(folder, 'config.json'), path)  # save_file lets only its owner read it


def write_tokenizer(folder, tokenizer, block_size):
    write_text(folder, 'tokenizer.json', hf_tokenizer(tokenizer).to_str(pretty=True))
    write_json(folder, 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': EOT_TEXT, 'eos_token': EOT_TEXT, 'unk_token': EOT_TEXT,
        'model_input_names': ['input_ids', 'attention_mask'],  # GPT-2 has no token types
        'model_max_length': block_size, 'clean_up_tokenization_spaces': False})
