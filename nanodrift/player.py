"""
Refinement made visible: in the terminal, as a page that plays it, and a repair as a coloured diff.
"""
import codecs
import itertools
import json
import os
import time
from dataclasses import asdict, dataclass, replace

import torch
from rich.cells import cell_len
from rich.live import Live
from rich.text import Text

from nanodrift.options import UserError
from nanodrift.refinement import Step

OPEN = '·'
MOST_CELLS = 300_000  # steps x positions that are recorded: what a browser plays without effort
CONTINUATION = bytes(range(0x80, 0xC0))  # of a character that began before
SECONDS_PER_FRAME, SECONDS_AT_MOST = 0.15, 20
OLD, NEW, SAME, PLAIN = '\x1b[31;9m', '\x1b[32m', '\x1b[33m', '\x1b[0m'


@dataclass
class Recording:
    """One sample's refinement. `frames`: for each step that is shown, for each position (text, confidence, revised); text is
    None where it is open. `fixed`: whether a position was given. For each frame: `passes`, forward passes so far, and
    `steps`, the number of its step. `every`: of the steps that changed something the first, the one that many later, and so
    on are shown."""
    frames: list
    fixed: list
    passes: list
    steps: list
    every: int = 1

    @classmethod
    def of(cls, steps, tokenizer, mask):
        """Of the first row of refinement.Steps, the first of them before anything was done."""
        return cls.of_numbered(enumerate(steps), tokenizer, mask)

    @classmethod
    def of_numbered(cls, steps, tokenizer, mask):
        """The same, of pairs (number of the step, Step)."""
        ever, recording = set(), None
        for number, step in steps:
            ids, confidence = step.ids[0].tolist(), step.confidence[0].tolist()
            recording = recording or cls([], [i != mask for i in ids], [], [])
            ever |= set(step.revised[0].nonzero().flatten().tolist())
            texts = [None if i == mask else tokenizer.decode_bytes([i]) for i in ids]
            recording.frames.append([(text, round(c, 4), n in ever)
                                     for n, (text, c) in enumerate(zip(characters(texts), confidence))])
            recording.passes.append(int(step.passes[0]))
            recording.steps.append(number)
        return recording


def first_row(step):
    """The Step of one sample alone, on the CPU."""
    return Step(*(value[:1].cpu() for value in (step.ids, step.confidence, step.revised, step.passes)))


class Recorder:
    """Keeps the first row of each Step that changes something, for a Recording. Where these would be more than `most` cells,
    it keeps every second, fourth ... of them. The newest Step is always kept."""

    def __init__(self, most=MOST_CELLS):
        self.most, self.every, self.given, self.changes = most, 1, 0, 0
        self.kept, self.newest = [], None  # (how many steps have changed something before, number of the step, Step)

    def add(self, step):
        row = first_row(step)
        self.newest = self.given, row
        if not self.kept or not torch.equal(row.ids, self.kept[-1][-1].ids):
            self._keep(self.changes, self.given, row)
            self.changes += 1
        self.given += 1
        if len(self.kept) > max(2, self.most // row.ids.size(1)):
            kept, self.kept, self.every = self.kept, [], 2 * self.every
            for entry in kept:
                self._keep(*entry)

    def _keep(self, change, number, row):
        if self.kept and self.kept[-1][0] % self.every:  # the last one was kept only as the newest
            row = replace(row, revised=row.revised | self.kept.pop()[-1].revised)
        self.kept.append((change, number, row))

    def recording(self, tokenizer, mask):
        steps = [(number, row) for _, number, row in self.kept]
        recording = Recording.of_numbered(steps + [self.newest] * (steps[-1][0] != self.newest[0]), tokenizer, mask)
        recording.every = self.every
        return recording


def characters(tokens):
    """The text of each token, given as bytes, None where it is open. A character of several tokens stands at its last one;
    while one of them is open, it is not shown."""
    decoder, texts, cut = codecs.getincrementaldecoder('utf-8')('replace'), [], False
    for token in tokens:
        if token is None:
            decoder.reset()
            texts.append(None)
            cut = True
            continue
        rest = token.lstrip(CONTINUATION) if cut else token
        cut = cut and not rest
        texts.append(decoder.decode(rest))
    if texts and texts[-1] is not None:
        texts[-1] += decoder.decode(b'', final=True)
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# terminal

def visible(text):
    """A token's text on one line, without what would move the cursor."""
    return ''.join(c if c.isprintable() else '⏎' if c == '\n' else ' ' if c in '\t\r' else '?' for c in text)


def cells(recording):
    """The width of each position: that of its widest token, so that nothing moves while it plays."""
    return [max(1 if frame[n][0] is None else cell_len(visible(frame[n][0])) for frame in recording.frames)
            for n in range(len(recording.fixed))]


def colour(confidence):
    """From red over yellow to green."""
    return f'rgb({int(220 * min(1, 2 - 2 * confidence))},{int(200 * min(1, 2 * confidence))},60)'


def lines_of(widths, columns):
    """The positions of each line of so many columns: the same in every frame."""
    lines, used = [[]], 0
    for n, width in enumerate(widths):
        if used and used + width > columns:
            lines.append([])
            used = 0
        lines[-1].append(n)
        used += width
    return lines


def view(frame, lines, height):
    """The lines that a screen has room for: those around the first open position, at the end all."""
    first = next((i for i, line in enumerate(lines) if any(frame[n][0] is None for n in line)), None)
    if first is None:
        return lines
    start = max(0, min(first - height // 2, len(lines) - height))
    return lines[start:start + height]


def picture(recording, number, widths, columns, height):
    """Frame `number` as rich Text of so many columns and, while something is open, at most so many lines: given text bold,
    committed text coloured by confidence, revised text underlined."""
    frame = recording.frames[number]
    text = Text(f'step {recording.steps[number]}, {recording.passes[number]} forward passes', no_wrap=True)
    for line in view(frame, lines_of(widths, columns), height - 1):
        text.append('\n')
        for n in line:
            token, confidence, revised = frame[n]
            style = 'dim' if token is None else 'bold' if recording.fixed[n] else colour(confidence) + ' underline' * revised
            shown = OPEN if token is None else visible(token)
            text.append(shown, style)
            text.append(' ' * (widths[n] - cell_len(shown)))
    return text


def play(recording, console):
    """Plays a Recording; where stdout is no terminal it is printed, a line of marks for each step."""
    if not console.is_terminal:
        for number, frame in enumerate(recording.frames):
            marks = ''.join(OPEN if token is None else '=' if fixed else '~' if revised else '#'
                            for (token, _, revised), fixed in zip(frame, recording.fixed))
            print(f'step {recording.steps[number]:3d}, {recording.passes[number]:3d} passes  {marks}')
        return
    widths = cells(recording)
    with Live(console=console, auto_refresh=False, vertical_overflow='crop') as live:
        for number in range(len(recording.frames)):
            live.update(picture(recording, number, widths, *console.size), refresh=True)
            time.sleep(min(SECONDS_PER_FRAME, SECONDS_AT_MOST / len(recording.frames)))


def whole_characters(kinds, *texts):
    """kinds of tokens, 0 to 2, raised so that all tokens of one character have the same; texts: the bytes of each token."""
    inside = [any(text[i][:1] and 0x80 <= text[i][0] < 0xC0 for text in texts) for i in range(len(kinds))]
    kinds = list(kinds)
    for order in (range(1, len(kinds)), range(len(kinds) - 1, 0, -1)):
        for i in order:
            if inside[i]:
                kinds[i] = kinds[i - 1] = max(kinds[i], kinds[i - 1])
    return kinds


def changes(tokenizer, before, after, flagged):
    """Of a text whose flagged tokens were rewritten, from left to right: (what was done, the old text, the new text); what
    was done is 'kept', 'same' for what was flagged and confirmed, or 'new'."""
    kinds = [0 if not wrong else 1 if old == new else 2 for old, new, wrong in zip(before, after, flagged)]
    texts = [[tokenizer.decode_bytes([i]) for i in ids] for ids in (before, after)]
    start = 0
    for kind, tokens in itertools.groupby(whole_characters(kinds, *texts)):
        run = slice(start, start + len(list(tokens)))
        start = run.stop
        yield ('kept', 'same', 'new')[kind], tokenizer.decode(before[run]), tokenizer.decode(after[run])


def diff(tokenizer, before, after, flagged, colours):
    """The `changes` as one text: what went in red, what came in green, what was confirmed in yellow; without colours as
    [-went-]{+came+}. Everything else stands as it stood."""
    text = ''
    for kind, was, now in changes(tokenizer, before, after, flagged):
        if kind == 'kept' or (kind == 'same' and not colours):
            text += was
        elif kind == 'same':
            text += SAME + was + PLAIN
        else:
            text += f'{OLD}{was}{PLAIN}{NEW}{now}{PLAIN}' if colours else f'[-{was}-]{{+{now}+}}'
    return text


# ---------------------------------------------------------------------------------------------------------------------
# a page

def page(recording):
    """A page that plays a Recording, with nothing loaded from elsewhere."""
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, 'player.html'), encoding='utf-8') as f:
        template = f.read()
    data = json.dumps(asdict(recording)).replace('<', '\\u003c')  # or a token could end the script
    return template.replace('/*RECORDING*/null', data)


def write_page(recording, path):
    """Writes the page of a Recording. Raises UserError if it cannot."""
    try:
        with open(path, 'w', encoding='utf-8') as f:
            f.write(page(recording))
    except OSError as e:
        raise UserError(f'cannot write the page {path}: {e.strerror}') from None
