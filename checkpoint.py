"""
Checkpoints: tensors and plain Python values only, written so that a reader never sees half of one.

Also the way in for Hugging Face's GPT-2 weights.
"""
import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import asdict, fields

import torch

from configurator import UserError, one_of, parse
from corpus import hub_is_reachable
from model import ENCODER_OPTIONS, GPT, GPTConfig
from tokenizer import tokenizer_from_spec

# What the published variants call themselves, and what a Hugging Face GPT-2 may say of itself and still be that of model.py.
PUBLISHED_TYPES = {'dd-gpt2': 'dd', 'parallel-gpt2': 'parallel', 'duo-predict-gpt2': 'duo', 'rotating-head-gpt2': 'rotating'}
HF_FIXED = {'activation_function': ['gelu_new'], 'layer_norm_epsilon': [1e-5], 'scale_attn_weights': [True],
            'scale_attn_by_inverse_layer_idx': [False], 'tie_word_embeddings': [True], 'add_cross_attention': [False]}
FILES = {'best': 'ckpt_best.pt', 'last': 'ckpt.pt'}
EXPORTED, EXPORTED_KEYS = 'nanodrift', ('model_args', 'tokenizer', 'run_id', 'parents', 'encoder')  # of config.json
ENCODER = 'encoder'  # folder inside an export, of the model that drifting was trained with
INSIDE = f'hf:./{ENCODER}'  # what its config.json calls that, wherever the export is now
TABLE = 'transformer.wte.weight'  # and the head's


def save(out_dir, state, names):
    """Writes `state` once, and puts it under each of `names` ('best', 'last') in `out_dir` when it is whole and on disk.
    Raises UserError if it cannot; what stood there before is then untouched."""
    temporary = os.path.join(out_dir, 'ckpt.tmp')
    try:
        if os.path.exists(temporary):  # of a run that was killed; it may already be the best checkpoint by another name
            os.remove(temporary)
        with open(temporary, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        *others, final = [os.path.join(out_dir, FILES[name]) for name in names]
        for other in others:
            second_name(temporary, other)
        os.replace(temporary, final)
    except (OSError, RuntimeError) as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise UserError(f'cannot write a checkpoint to {out_dir} ({str(e).splitlines()[0]}); the one there is '
                        'untouched') from None
    if os.name == 'posix':  # the new names must outlive a power cut too
        folder = os.open(out_dir, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def forget_best(out_dir):
    """Removes the best checkpoint of `out_dir`, if there is one."""
    path = os.path.join(out_dir, FILES['best'])
    if os.path.exists(path):
        os.remove(path)


def fall_back(out_dir):
    """Makes the best checkpoint of `out_dir` the last one too, if there is one."""
    best, last = (os.path.join(out_dir, FILES[name]) for name in ('best', 'last'))
    if os.path.exists(best):
        second_name(best, last)


def keep(out_dir, iter_num):
    """Gives the last checkpoint of `out_dir` a name that no later one takes from it."""
    second_name(os.path.join(out_dir, FILES['last']), os.path.join(out_dir, f'ckpt_{iter_num:06d}.pt'))


def second_name(path, name):
    """Makes `name` the same file as `path`, in one step."""
    link = name + '.tmp'
    if os.path.exists(link):
        os.remove(link)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, link)
    os.replace(link, name)


def _read(path):
    """The dict that torch.save wrote to `path`, its tensors on the CPU."""
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'no checkpoint {path}: train one with train.py, or name its folder with --out_dir') from None
    except OSError as e:
        raise UserError(f'{path} is not a readable checkpoint: {e.strerror}') from None
    except Exception:  # whatever the unpickler stumbles over; its advice is to run the code that may be in the file
        state = None
    if not isinstance(state, dict):
        raise UserError(f'{path} is not a readable checkpoint: it is damaged, or holds more than tensors and plain values')
    return state


def load(path):
    """The checkpoint at `path`, its tensors on the CPU. Raises UserError if it is missing or not a checkpoint."""
    state = _read(path)
    missing = [key for key in ('model', 'model_args', 'config', 'tokenizer', 'iter_num') if key not in state]
    if missing:
        raise UserError(f'{path} is not a readable checkpoint of nanoDrift: it has no {", ".join(missing)}')
    return state


def find(out_dir, which='best'):
    """Path of the 'best' or 'last' checkpoint of a run's folder."""
    one_of('ckpt', which, FILES)
    if not os.path.isdir(out_dir):
        raise UserError(f'no folder {out_dir!r}: train a model with train.py, or name its folder with --out_dir')
    best, last = (os.path.join(out_dir, FILES[w]) for w in ('best', 'last'))
    return best if which == 'best' and os.path.exists(best) else last


def model_config(model_args):
    """The GPTConfig of a checkpoint's model_args. Raises UserError on arguments that this version does not know, and on
    those of a wrong type."""
    known = {f.name: f for f in fields(GPTConfig)}
    unknown = set(model_args) - set(known)
    if unknown:
        raise UserError(f'the checkpoint has model arguments unknown here: {", ".join(sorted(unknown))}')
    return GPTConfig(**{name: parse(name, value, known[name].type, known[name].metadata['choices'],
                                    known[name].metadata['numeric']) for name, value in model_args.items()})


def open_run(name, which='best'):
    """The checkpoint of a run's folder, or what 'hf:NAME_OR_FOLDER' holds in the same form: GPT-2 as Hugging Face keeps it,
    or any type as export.py wrote it. There `tokenizer` may be None: unknown; `foreign`: what it calls itself,
    its names are to be checked."""
    if not name.startswith('hf:'):
        return load(find(name, which))
    folder = name.removeprefix('hf:')
    config = _hf_config(folder)
    if config.get('model_type') == EXPORTED:
        check_facts(name, config, EXPORTED_KEYS)
        weights = _hf_tensors(folder)
        weights |= {'lm_head.weight': weights[TABLE]} if TABLE in weights else {}
        facts = {key: config.get(key) for key in EXPORTED_KEYS}
        if facts['model_args'].get('encoder') == INSIDE:
            facts['model_args'] = facts['model_args'] | {'encoder': f'{name.rstrip("/")}/{ENCODER}'}
        facts['model_args'] = asdict(model_config(facts['model_args']))
        return facts | {'model': weights, 'config': {}, 'iter_num': 0}
    if EXPORTED in config:
        check_facts(name, config[EXPORTED], ('tokenizer', 'run_id', 'parents'))
    model_args, weights = load_hf(folder)
    gpt2 = tokenizer_from_spec('gpt2')
    facts = {'tokenizer': gpt2.to_meta() if model_args['vocab_size'] == gpt2.vocab_size else None,
             'run_id': f'hf:{fingerprint(weights)}', 'parents': []}  # by any name it is the same
    return facts | config.get(EXPORTED, {}) | {'model_args': model_args, 'model': weights, 'config': {}, 'iter_num': 0,
                                               'foreign': config['model_type']}


def check_facts(name, facts, keys):
    """Raises UserError where what export.py wrote of a model into its config.json is not all there, or of a wrong type."""
    kinds = {'model_args': dict, 'tokenizer': dict, 'run_id': str, 'parents': list, 'encoder': (str, type(None))}
    if not isinstance(facts, dict):
        raise UserError(f'{name}: {EXPORTED} in its config.json is not what export.py writes')
    missing = [key for key in keys if key not in facts and key != 'encoder']
    if missing:
        raise UserError(f'{name}: its config.json lacks {", ".join(missing)}')
    wrong = [key for key in keys if not isinstance(facts.get(key), kinds[key])]
    if wrong:
        raise UserError(f'{name}: {", ".join(wrong)} in its config.json is not what export.py writes')


def refuse_foreign(state):
    """Raises UserError on published weights, which do not say the options of their type."""
    kind = PUBLISHED_TYPES.get(state.get('foreign'))
    if kind:
        published = ' --published=True' * (kind in ('dd', 'duo'))
        raise UserError(f"{state['foreign']} weights do not say their type's options: take them into a run first, train.py "
                        f'--init_from=hf:FOLDER --model_type={kind}{published}')


def load_model(checkpoint, device='cpu'):
    """The trained model in a checkpoint, in evaluation mode: with the averaged weights where there are any. What token drift
    trained needs no encoder any more."""
    refuse_foreign(checkpoint)
    args = checkpoint['model_args']
    if args.get('diffusion_objective') == 'drift':
        args = args | {'diffusion_objective': 'nelbo'} | {name: getattr(GPTConfig, name) for name in ENCODER_OPTIONS}
    model = GPT(model_config(args))
    if checkpoint.get('foreign'):
        start_from(model, checkpoint['model'])
    else:
        load_weights(model, checkpoint.get('ema') or checkpoint['model'])
    refuse_encoder(model, checkpoint)
    return model.to(device).eval()


def load_weights(model, weights):
    """All of them and no others. Raises UserError, also where an older version of this model_type had fewer."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        first = str(e).splitlines()[1].strip()
        raise UserError(f'the weights are not those of the model that is described beside them; another '
                        f'version may have written them (its commit is in config.json): {first[:150]}') from None


def load_encoder(name):
    """The gpt2 model of a run's folder, or of 'hf:NAME_OR_FOLDER', in evaluation mode. Its `source` says whose it is:
    run_id, parents, tokenizer. Raises UserError if it is of another type."""
    try:
        state = open_run(name)
    except UserError as e:
        raise UserError(f'encoder={name}: {e}') from None
    kind = model_config(state['model_args']).model_type
    if kind != 'gpt2':
        raise UserError(f'encoder={name} is a {kind} model, it must be gpt2')
    model = load_model(state)
    model.source = {key: state[key] for key in ('run_id', 'parents', 'tokenizer')}
    model.source['fingerprint'] = fingerprint(model.state_dict())
    return model


def fingerprint(weights):
    """A hash of a state dict's tensors."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].detach().float().contiguous().cpu().numpy())
    return found.hexdigest()[:32]


def refuse_encoder(model, state):
    """Raises UserError where the encoder that a model finds is not the one that it was trained with."""
    if model.encoder is not None and state.get('encoder') not in (None, model.encoder.source['fingerprint']):
        raise UserError(f'encoder={model.config.encoder} is not what this model was trained with: put the former '
                        'weights there, or name where they are, train.py --encoder=FOLDER')


def fitted(config, model_args):
    """A copy of a GPTConfig, of its type and options, in the sizes that weights of these model arguments have.

    The context may be shorter: positions can be cut off."""
    shape = {k: model_args[k] for k in ('n_layer', 'n_head', 'n_embd', 'n_inner', 'bias') if k in model_args}
    shape['block_size'] = min(config.block_size, model_args['block_size'])
    return GPTConfig(**asdict(config) | shape)


def start_from(model, weights, rows=None):
    """Copies `weights` (a state dict) into a model of maybe another type; returns the names that start fresh.

    `rows` is how many rows of the token table have been trained, vocab_size where nothing is said. What may be missing is
    what the type has and GPT-2 has not, and only all of it. Raises UserError naming any other weight that is missing, not
    known here or of another shape."""
    own, weights, fresh = model.state_dict(), dict(weights), []
    rows = model.config.vocab_size if rows is None else rows
    table, positions = TABLE, 'transformer.wpe.weight'
    if table in weights and table in own and weights[table].shape[1:] == own[table].shape[1:]:
        known = model.config.vocab_size + model.config.textless_ids
        both = min(len(weights[table]), len(own[table]))
        new = torch.cat((weights[table][:both].to(own[table]), own[table][both:]))
        new[rows:known] = new[:rows].mean(0)  # a beginner that stands out from no token
        weights[table] = weights['lm_head.weight'] = new
        fresh = [f'{table}[{row}] (an id without text)' for row in range(rows, known)]
    if positions in weights and positions not in own and model.config.model_type == 'diffusion':
        raise UserError(f'the weights hold a table of positions ({positions}), which --positions=rotary has no use for: '
                        'add --positions=both, or learned')
    if positions in weights:
        weights[positions] = weights[positions][:model.config.block_size]
    for name, tensor in weights.items():
        if name not in own:
            raise UserError(f'the weights hold {name}, which this model does not have')
        if tensor.shape != own[name].shape:
            raise UserError(f'{name} has shape {tuple(tensor.shape)} in the weights, {tuple(own[name].shape)} here; '
                            "the options of the model's type must be those of the weights (--published=True, say)")
    missing = [name for name in own if name not in weights]
    typical = own_names(model)
    wrong = [name for name in missing if name not in typical or len(missing) < len(typical)]
    if wrong:
        raise UserError(f'the weights lack {wrong[0]}' + f' and {len(wrong) - 1} more' * (len(wrong) > 1))
    model.load_state_dict(weights, strict=False)
    return fresh + missing


def own_names(model):
    """The names in a model's state dict that a GPT-2 of its sizes does not have."""
    sizes = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_inner', 'bias')
    with torch.device('meta'):
        plain = GPT(GPTConfig(**{name: getattr(model.config, name) for name in sizes}))
    return set(model.state_dict()) - set(plain.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face

def _hf_file(name, filename):
    """Path of a file of a local folder or of a Hub repository (OWNER/NAME, maybe with a folder in it); None if there is no
    such file."""
    if os.path.isdir(name):
        path = os.path.join(name, filename)
        return path if os.path.isfile(path) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    owner, *rest = name.split('/', 2)
    repository, inside = '/'.join([owner, *rest[:1]]), rest[1:]
    try:
        return hf_hub_download(repository, '/'.join([*inside, filename]), local_files_only=not hub_is_reachable())
    except LocalEntryNotFoundError:
        raise UserError(f'hf:{name} is neither a local folder nor can it be downloaded now; on a machine with a network '
                        f'get its config.json and model.safetensors and use --init_from=hf:FOLDER') from None
    except EntryNotFoundError:
        return None
    except Exception as e:
        raise UserError(f'hf:{name} cannot be downloaded: {str(e).splitlines()[0]}') from None


def _hf_tensors(name):
    """The state dict of a Hugging Face folder or repository, from safetensors (one file or sharded) or from a .bin."""
    path = _hf_file(name, 'model.safetensors')
    if path:
        return _safetensors(path)
    index = _hf_file(name, 'model.safetensors.index.json')
    if index:
        listed = _json(index).get('weight_map')
        if not isinstance(listed, dict):
            raise UserError(f'{index} holds no weight_map')
        shards = sorted(set(listed.values()))
        return {k: v for shard in shards for k, v in _safetensors(_hf_file(name, shard) or shard).items()}
    path = _hf_file(name, 'pytorch_model.bin')
    if path:
        return _read(path)
    raise UserError(f'hf:{name} holds no model.safetensors and no pytorch_model.bin')


def _safetensors(path):
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except Exception as e:
        raise UserError(f'{path} is not readable: {e}') from None


def _json(path):
    try:
        with open(path, encoding='utf-8') as f:
            found = json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(f'{path} is not readable: {e}') from None
    if not isinstance(found, dict):
        raise UserError(f'{path} does not hold the settings of a model')
    return found


def _hf_config(name):
    path = _hf_file(name, 'config.json')
    if not path:
        raise UserError(f'hf:{name} holds no config.json')
    return _json(path)


def load_hf(name):
    """GPT-2 in Hugging Face's format, from a folder or the Hub -> (model arguments, state dict in our names).

    Hugging Face keeps its Linear weights transposed (Conv1D), and may leave out the `transformer.` prefix."""
    config = _hf_config(name)
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
    tensors = _hf_tensors(name)
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f'hf:{name}: {key} in its weights is no tensor')
        key = 'transformer.' + key.removeprefix('transformer.')
        if key.endswith(('.attn.bias', '.attn.masked_bias')) or key == 'transformer.lm_head.weight':
            continue  # the causal mask, and the tied head
        if key.endswith(('c_attn.weight', 'c_fc.weight', 'c_proj.weight')) and tensor.dim() == 2:
            tensor = tensor.t()
        weights[key] = tensor.float()
    table = weights.get(TABLE)
    if table is None or table.dim() != 2 or len(table) != config['vocab_size']:
        raise UserError(f"hf:{name}: vocab_size={config['vocab_size']} in its config.json, but "
                        f"{TABLE} is {'missing' if table is None else 'of shape ' + str(tuple(table.shape))}")
    head = tensors.get('lm_head.weight')
    if head is not None and not torch.equal(head.float(), table):
        raise UserError(f'hf:{name}: lm_head.weight is not {TABLE}; here the two are one')
    padded = GPT.padded_vocab_size(len(table))
    weights['transformer.wte.weight'] = torch.cat((table, table.new_zeros(padded - len(table), table.size(1))))
    weights['lm_head.weight'] = weights['transformer.wte.weight']
    return model_args, weights


def commit():
    """The commit of this code, '-dirty' behind it where files were changed; None outside a git checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        words = ['git', '-C', here, 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
