"""
Checkpoints: tensors and plain Python values only, written so that a reader never sees half of one.

Files first, then weights into a model that is there; model.py builds one from a checkpoint (`load_model`).
"""
import contextlib
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
import zipfile

import torch

from nanodrift.options import UserError, mistake, one_of
from nanodrift.system import flush_folder, move

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SHOWN_WITHIN = 60  # seconds; network file systems show new files late
FILES = {'best': 'ckpt_best.pt', 'last': 'ckpt.pt'}
# what a checkpoint holds, for whatever reads one; older ones and those made elsewhere may lack the keys that came LATER
FORM = {'model': dict, 'model_args': dict, 'config': dict, 'tokenizer': dict, 'iter_num': int, 'run_id': str,
        'parents': list, 'ema': dict, 'data': dict, 'encoder': (str, type(None)), 'experiment': (dict, type(None)),
        'best_val_loss': (int, float), 'log_bytes': int, 'examples_seen': int}
FORM_OF_CONFIG = {'dataset': str, 'data_dir': str, 'batch_size': int, 'gradient_accumulation_steps': int}
LATER = ('ema', 'data', 'encoder', 'experiment', 'best_val_loss', 'log_bytes', 'examples_seen')
EMBEDDING, POSITIONS = 'transformer.wte.weight', 'transformer.wpe.weight'  # the first is the head's too
GPT2_NAMES = re.compile(r'(lm_head|transformer\.(wte|wpe|ln_f|h\.\d+\.(ln_[12]|attn\.c_(attn|proj)|mlp\.c_(fc|proj))))'
                        r'\.(weight|bias)')


def save(out_dir, state, names):
    """Writes `state` once, and puts it under each of `names` ('best', 'last') in `out_dir` when it is whole and on disk.
    Raises UserError if it cannot; an existing checkpoint is then unchanged."""
    temporary = os.path.join(out_dir, f'ckpt-{os.getpid()}.tmp')
    try:
        for left in glob.glob(os.path.join(glob.escape(out_dir), 'ckpt*.tmp')):
            os.remove(left)  # of a run that was killed; it may already be the best checkpoint by another name
        with open(temporary, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        *others, final = [os.path.join(out_dir, FILES[name]) for name in names]
        for other in others:
            hard_link(temporary, other)
        move(temporary, final)
    except (OSError, RuntimeError, UserError) as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise UserError(f'cannot write a checkpoint to {out_dir} ({str(e).splitlines()[0]}); an existing checkpoint there '
                        'is unchanged') from None
    flush_folder(out_dir)


def checkpoints(out_dir):
    """The paths of all checkpoints in a folder, the newest first."""
    return sorted(glob.glob(os.path.join(glob.escape(out_dir), 'ckpt*.pt')), key=os.path.getmtime, reverse=True)


def holds_run(out_dir):
    """Whether a folder has a checkpoint of a run."""
    return bool(checkpoints(out_dir))


def remove_run(out_dir):
    """Removes what a run has left in a folder."""
    for pattern in ('ckpt*.pt', 'ckpt*.tmp', 'metrics.jsonl', 'config.json', 'evaluation.json'):
        for path in glob.glob(os.path.join(glob.escape(out_dir), pattern)):
            os.remove(path)


@contextlib.contextmanager
def lock(out_dir):
    """Keeps other runs out of a folder; the lock ends with this process. Raises UserError where another run has it. Where
    there is no flock, as on Windows, nothing is locked."""
    path = os.path.join(out_dir, '.lock')
    try:
        os.makedirs(out_dir, exist_ok=True)
        made = not os.path.exists(path)
        f = open(path, 'a', encoding='utf-8')
    except OSError as e:
        raise UserError(f'cannot write to out_dir={out_dir}: {e.strerror}') from None
    with f:
        if fcntl is not None:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f'another run is writing to {out_dir}: name another --out_dir, or wait for it') from None
            except OSError:  # some network file systems have no locks
                pass
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # somebody may have removed the folder; Windows keeps open files
                if made and not holds_run(out_dir):  # no checkpoint was written: remove what this call made
                    os.remove(path)
                if not os.listdir(out_dir):
                    os.rmdir(out_dir)


def check_shared(out_dir, ranks):
    """Raises UserError where the ranks' out_dir are different folders: the others must find what the first one writes."""
    if ranks.world_size == 1:
        return
    path = os.path.join(out_dir, f'.{ranks.gather(uuid.uuid4().hex)[0]}')
    if ranks.first:
        write_empty(path)
    try:
        ranks.gather(None)  # it is written
        until = time.monotonic() + SHOWN_WITHIN
        while not (found := os.path.exists(path)) and time.monotonic() < until:
            time.sleep(0.5)
        everyone = all(ranks.gather(found))
    finally:  # also where another rank is gone
        if ranks.first:
            os.remove(path)
    if not everyone:
        raise UserError(f'some ranks do not see out_dir={out_dir}: it must be one folder that all machines share')


def write_empty(path):
    try:
        open(path, 'w', encoding='utf-8').close()  # closed, network file systems show it
    except OSError as e:
        raise UserError(f'cannot write to out_dir={os.path.dirname(path)}: {e.strerror}') from None


def forget_best(out_dir):
    """Removes the best checkpoint of `out_dir`, if there is one."""
    path = os.path.join(out_dir, FILES['best'])
    if os.path.exists(path):
        os.remove(path)


def fall_back(out_dir, iter_num):
    """Makes the best checkpoint of `out_dir` the last one too, if there is one, and removes the last one if not: its
    weights, those of this iteration, are no numbers. Says in words what it did."""
    best, last = (os.path.join(out_dir, FILES[name]) for name in ('best', 'last'))
    with contextlib.suppress(FileNotFoundError):
        os.remove(kept_path(out_dir, iter_num))
    if os.path.exists(best):
        hard_link(best, last)
        return 'the last checkpoint is the best one again'
    os.remove(last)
    return 'there was no better checkpoint to go back to'


def keep(out_dir, iter_num):
    """Gives the last checkpoint of `out_dir` a further name, which later checkpoints do not take."""
    hard_link(os.path.join(out_dir, FILES['last']), kept_path(out_dir, iter_num))


def kept_path(out_dir, iter_num):
    return os.path.join(out_dir, f'ckpt_{iter_num:06d}.pt')


def hard_link(path, name):
    """Makes `name` the same file as `path`, in one step. Raises UserError if it cannot."""
    link = name + '.tmp'
    try:
        if os.path.exists(link):
            os.remove(link)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        move(link, name)
    except OSError as e:
        raise UserError(f'cannot write {name}: {e.strerror}') from None


def read(path):
    """The dict that torch.save wrote to `path`, its tensors on the CPU. Raises UserError where one byte is another."""
    try:
        check_sums(path)
        state = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'no checkpoint {path}: train one with train.py, or name its folder with --out_dir') from None
    except OSError as e:
        raise UserError(f'{path} is not a readable checkpoint: {e.strerror}') from None
    except Exception as e:  # whatever the unpickler stumbles over; its advice is to run the code that may be in the file
        if mistake(e):  # too little memory says nothing about the file
            raise
        state = None
    if not isinstance(state, dict):
        raise UserError(f'{path} is not a readable checkpoint: it is damaged, or holds more than tensors and plain values')
    return state


def check_sums(path):
    """Raises BadZipFile where a file that torch.save wrote is damaged: it holds checksums, but torch.load ignores them."""
    if zipfile.is_zipfile(path):  # as it is not in PyTorch's format of before 1.6
        with zipfile.ZipFile(path) as f:
            if f.testzip():
                raise zipfile.BadZipFile


def fits(value, kind):
    return isinstance(value, kind) and not (kind is int and value < 0)


def load(path):
    """The checkpoint at `path`, its tensors on the CPU. Raises UserError if it is missing or not a checkpoint."""
    state = read(path)
    missing = [key for key in FORM if key not in state and key not in LATER]
    if missing:
        raise UserError(f'{path} is not a readable checkpoint of nanoDrift: it has no {", ".join(missing)}')
    wrong = [key for key, kind in FORM.items() if key in state and not fits(state[key], kind)]
    wrong = wrong or [key for key, kind in FORM_OF_CONFIG.items() if not fits(state['config'].get(key, kind()), kind)]
    weights = {**state['model'], **(state.get('ema') or {})} if not wrong else {}
    wrong += [name for name, weight in weights.items() if not isinstance(name, str) or not isinstance(weight, torch.Tensor)]
    if wrong:
        raise UserError(f'{path} is not a readable checkpoint of nanoDrift: {wrong[0]!r} in it is not what was saved')
    return state


def load_last(out_dir):
    """The last checkpoint of a run's folder. Where it is damaged or missing, this says so and returns the newest of the
    others, with a key 'stands_in'. Raises UserError where none can be read."""
    path = find(out_dir, 'last')
    try:
        return load(path)
    except UserError as e:
        reason = str(e)
    others = [other for other in checkpoints(out_dir) if other != path]
    for other in others:
        with contextlib.suppress(UserError):
            state = load(other)
            if os.environ.get('RANK', '0') == '0':
                print(f'warning: {reason}; going on from {other}, iteration {state["iter_num"]}', file=sys.stderr)
            return state | {'stands_in': True}
    more = f'; neither is {" nor ".join(others)}; start anew in another folder' if others else ''
    raise UserError(reason + more)


def find(out_dir, which='best'):
    """Path of the 'best' or 'last' checkpoint of a run's folder."""
    one_of('ckpt', which, FILES)
    if not os.path.isdir(out_dir):
        raise UserError(f'no folder {out_dir!r}: train a model with train.py, or name its folder with --out_dir')
    best, last = (os.path.join(out_dir, FILES[w]) for w in ('best', 'last'))
    return best if which == 'best' and os.path.exists(best) else last


# ---------------------------------------------------------------------------------------------------------------------
# weights into a model

def load_weights(model, weights):
    """Makes the tensors of `weights` the model's own, without a copy. Raises UserError where the names do not match exactly,
    also where an older version of this model_type had fewer weights."""
    own = model.state_dict()
    weights = {name: tensor.to(own[name].dtype).contiguous() if name in own else tensor for name, tensor in weights.items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as e:
        first = str(e).splitlines()[1].strip()
        raise UserError(f'the weights are not those of the model that its model_args describe; another '
                        f'version may have written them (its commit is in config.json): {first[:150]}') from None
    if EMBEDDING in own:
        model.lm_head.weight = model.transformer.wte.weight  # the same tensor by two names became two parameters


def start_from(model, weights, rows=None):
    """
    Copies `weights` (a state dict) into a model of maybe another type; returns the names that start fresh.

    `rows`: how many rows of the embedding matrix are trained (default vocab_size). Parameters that GPT-2 does not have may
    be missing, but only all together. Any other missing, unknown or differently shaped weight raises UserError.
    """
    own, weights, fresh = model.state_dict(), dict(weights), []
    rows = model.config.vocab_size if rows is None else rows
    if EMBEDDING in weights and EMBEDDING in own and weights[EMBEDDING].shape[1:] == own[EMBEDDING].shape[1:]:
        known = model.config.vocab_size + model.config.mask_tokens
        both = min(len(weights[EMBEDDING]), len(own[EMBEDDING]))
        new = torch.cat((weights[EMBEDDING][:both].to(own[EMBEDDING]), own[EMBEDDING][both:]))
        new[rows:known] = new[:rows].mean(0)  # new ids start at the mean of the trained embeddings
        weights[EMBEDDING] = weights['lm_head.weight'] = new
        fresh = [f'{EMBEDDING}[{row}] (an id without text)' for row in range(rows, known)]
    if POSITIONS in weights and POSITIONS not in own and model.config.model_type == 'diffusion':
        raise UserError(f'the weights hold learned positions ({POSITIONS}), which --positions=rotary has no use for: '
                        'add --positions=both, or learned')
    if POSITIONS in weights:
        rows = weights[POSITIONS]
        if model.config.diffusion_shift:  # which has one position more: it starts as the last one of the weights
            rows = torch.cat((rows, rows[-1:]))
        weights[POSITIONS] = rows[:model.config.n_positions]
    for name, tensor in weights.items():
        if name not in own:
            raise UserError(f'the weights hold {name}, which this model does not have')
        if tensor.shape != own[name].shape:
            raise UserError(f'{name} has shape {tuple(tensor.shape)} in the weights, {tuple(own[name].shape)} here; '
                            "the options of the model's type must be those of the weights (--published=True, say)")
    missing = [name for name in own if name not in weights]
    own_names = [name for name in own if not GPT2_NAMES.fullmatch(name)]  # what a GPT-2 does not have
    wrong = [name for name in missing if name not in own_names or len(missing) < len(own_names)]
    if wrong:
        raise UserError(f'the weights lack {wrong[0]}' + f' and {len(wrong) - 1} more' * (len(wrong) > 1))
    model.load_state_dict(weights, strict=False)
    return fresh + missing


def fingerprint(weights):
    """A hash of a state dict's tensors."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().float().contiguous().cpu().numpy())
    return digest.hexdigest()[:32]


def check_encoder(model, state):
    """Raises UserError where the encoder that a model finds is not the one that it was trained with."""
    if model.encoder is not None and state.get('encoder') not in (None, model.encoder.source['fingerprint']):
        raise UserError(f'encoder={model.config.encoder} is not what this model was trained with: put the former '
                        'weights there, or name where they are, train.py --encoder=FOLDER')


def commit():
    """The commit of this code, '-dirty' behind it where files were changed; None outside a git checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        words = ['git', '-C', here, 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
