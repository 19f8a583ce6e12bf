"""
A run of train.py that is planned, and what its folder holds of it already: settings, log, last checkpoint.
"""
import json
import math
import os
import statistics
from dataclasses import dataclass

from nanodrift import checkpoint
from nanodrift.data import load_meta, text_hashes
from nanodrift.options import UserError

MAY_DIFFER = ('out_dir', 'init_from', 'encoder', 'vocab_size', 'device', 'overwrite')  # may differ in one run


def read_lines(folder):
    """The entries of a run's metrics.jsonl; none where it has not begun. A last line that is not whole was cut by a kill,
    and will be written again."""
    path = os.path.join(folder, 'metrics.jsonl')
    try:
        with open(path, encoding='utf-8') as f:
            text = f.read()
    except FileNotFoundError:
        return []
    try:
        return [json.loads(line) for line in text[:text.rfind('\n') + 1].splitlines()]
    except ValueError as e:
        raise UserError(f'{path} is damaged: {e}') from None


def divergence(folder):
    """When a run wrote, as its last line, that its loss is no number; None if it did not."""
    if any(entry.get('diverged') for entry in read_lines(folder)[-1:]):
        return os.stat(os.path.join(folder, 'metrics.jsonl')).st_mtime_ns


def read_object(path):
    """The JSON object in a file; an empty one where the file is missing or unreadable."""
    try:
        with open(path, encoding='utf-8') as f:
            value = json.load(f)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def settings_of(folder):
    """What a run's config.json says; nothing where there is none."""
    return read_object(os.path.join(folder, 'config.json'))


def median_speed(entries):
    """Tokens per second, as a log has them; None where it has none."""
    speeds = [entry['tokens_per_s'] for entry in entries if 'tokens_per_s' in entry]
    return statistics.median(speeds) if speeds else None


@dataclass
class Run:
    """The arguments of train.py that start it, and every setting that they give it: {key: value}."""
    words: list
    settings: dict

    @property
    def folder(self):
        return self.settings['out_dir']

    @property
    def max_iters(self):
        return self.settings['max_iters']

    @property
    def tokens_per_iter(self):
        return self.settings['batch_size'] * self.settings['gradient_accumulation_steps'] * self.settings['block_size']

    def differing(self, had):
        """What differs between the settings that a run had and those of this one: 'key=value, not value'."""
        had, wanted = (settings | {'data_dir': os.path.abspath(settings['data_dir'])} for settings in (had, self.settings))
        return [f'{key}={had[key]}, not {value}' for key, value in wanted.items()
                if key not in MAY_DIFFER and had.get(key, value) != value]

    def state(self):
        """The last checkpoint in its folder; None where there is none yet. Raises UserError where it is of another run."""
        state = checkpoint.load_last(self.folder) if checkpoint.holds_run(self.folder) else None
        if state is not None and (others := self.differing(state['config'])):
            raise UserError(f'{self.folder} holds a run with {"; ".join(others)}: name another folder with --out_dir')
        text = text_hashes(load_meta(os.path.join(self.settings['data_dir'], self.settings['dataset'])))
        if state is not None and state.get('data', text) != text:
            raise UserError(f'{self.folder} holds a run on another text, which {self.settings["dataset"]} had before it was '
                            'prepared anew: name another folder with --out_dir')
        return state

    def finished(self, state):
        """Whether the run with this last checkpoint, which may be None, has been evaluated after its last iteration. The
        checkpoint records that evaluation; where the process was killed before it was saved, metrics.jsonl alone has it."""
        if state is None or state['iter_num'] != self.max_iters:
            return False
        return self.max_iters == state['evaluated_iter'] or \
            self.losses().get(self.max_iters, -math.inf) >= state['best_val_loss']

    def losses(self):
        """{iteration: val_loss} of its evaluations."""
        return {entry['iter']: entry['val_loss'] for entry in read_lines(self.folder) if entry.get('val_loss') is not None}

    def last_stderr(self):
        """The standard error of the bound that it measured last; 0 where its loss is none."""
        return next((entry['val_nelbo_stderr'] for entry in reversed(read_lines(self.folder))
                     if entry.get('val_nelbo_stderr') is not None), 0.0)

    def last_loss(self):
        """The val_loss at its end; infinite where it diverged, None where it has not ended."""
        if self.finished(self.state()):
            return list(self.losses().values())[-1]
        return math.inf if self.diverged() else None

    def log(self):
        """The entries of its log; none where it has not begun, or where the folder has that of a run with other settings."""
        had = settings_of(self.folder)
        return read_lines(self.folder) if had and not self.differing(had) else []

    def diverged(self):
        return any(entry.get('diverged') for entry in self.log()[-1:])

    def iterations_left(self):
        """How many iterations its log lacks; none where it diverged."""
        last = (self.log() or [{'iter': 0}])[-1]
        return 0 if last.get('diverged') else max(0, self.max_iters - last['iter'])
