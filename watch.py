"""
Refinement made visible: in the terminal, as a page that plays it, and a repair as a coloured diff.
"""
import json
import os
import time
from dataclasses import dataclass

from rich.live import Live
from rich.text import Text

from configurator import UserError

OPEN = '·'
SECONDS_PER_FRAME = 0.15


@dataclass
class Film:
    """One sample's refinement. `frames`: for each step, for each position (text, confidence, revised); text is None where
    it is open. `fixed`: whether a position was given. `passes`: forward passes so far, for each step."""
    frames: list
    fixed: list
    passes: list

    @classmethod
    def of(cls, steps, tokenizer, mask, row=0):
        """Of one row of a list of refinement.Steps, the first of them before anything was done."""
        first, ever, frames = steps[0].ids[row].tolist(), set(), []
        for step in steps:
            ever |= set(step.revised[row].nonzero().flatten().tolist())
            frames.append([(None if i == mask else tokenizer.decode([i]), round(c, 4), n in ever) for n, (i, c) in
                           enumerate(zip(step.ids[row].tolist(), step.confidence[row].tolist()))])
        return cls(frames, [i != mask for i in first], [int(step.passes[row]) for step in steps])


# ---------------------------------------------------------------------------------------------------------------------
# terminal

def visible(text):
    """A token's text on one line."""
    return text.replace('\n', '⏎').replace('\t', ' ')


def cells(film):
    """The width of each position: that of its widest token, so that nothing moves while the film plays."""
    return [max(len(visible(frame[n][0])) if frame[n][0] is not None else 1 for frame in film.frames)
            for n in range(len(film.fixed))]


def colour(confidence):
    """From red over yellow to green."""
    return f'rgb({int(220 * min(1, 2 - 2 * confidence))},{int(200 * min(1, 2 * confidence))},60)'


def picture(film, number, widths, columns):
    """Frame `number` as rich Text of so many columns: given text bold, committed text coloured by confidence, revised text
    underlined. Lines break at the same positions in every frame."""
    text, used = Text(f'step {number}, {film.passes[number]} forward passes\n', no_wrap=True), 0
    for (token, confidence, revised), fixed, width in zip(film.frames[number], film.fixed, widths):
        if used and used + width > columns:
            text.append('\n')
            used = 0
        style = 'dim' if token is None else 'bold' if fixed else colour(confidence) + ' underline' * revised
        shown = OPEN if token is None else visible(token)
        text.append(shown, style)
        text.append(' ' * (width - len(shown)))
        used += width
    return text


def play(film, console):
    """Plays a Film; where stdout is no terminal it is printed, a line of marks for each step."""
    if not console.is_terminal:
        for number, frame in enumerate(film.frames):
            marks = ''.join(OPEN if token is None else '=' if fixed else '~' if revised else '#'
                            for (token, _, revised), fixed in zip(frame, film.fixed))
            print(f'step {number:3d}, {film.passes[number]:3d} passes  {marks}')
        return
    widths = cells(film)
    with Live(console=console, auto_refresh=False, vertical_overflow='crop') as live:
        for number in range(len(film.frames)):
            live.update(picture(film, number, widths, console.width), refresh=True)
            time.sleep(SECONDS_PER_FRAME)


def print_diff(tokenizer, before, after, doubted, console):
    """Prints a text whose doubted tokens were rewritten: what went in red, what came in green, what was confirmed in
    yellow."""
    text = Text()
    for old, new, wrong in zip(before.tolist(), after.tolist(), doubted.tolist()):
        was, now = tokenizer.decode([old]), tokenizer.decode([new])
        if not wrong:
            text.append(was)
        elif old == new:
            text.append(was, 'yellow')
        elif console.is_terminal:
            text.append(was, 'red strike')
            text.append(now, 'green')
        else:
            text.append(f'[-{was}-]{{+{now}+}}')
    console.print(text, soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------------
# a page

def write_page(film, path):
    """Writes a page that plays a Film, with nothing loaded from elsewhere. Raises UserError if it cannot."""
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, 'watch.html'), encoding='utf-8') as f:
        template = f.read()
    data = json.dumps({'frames': film.frames, 'fixed': film.fixed, 'passes': film.passes}).replace('<', '\\u003c')
    try:
        with open(path, 'w', encoding='utf-8') as f:
            f.write(template.replace('/*FILM*/null', data))
    except OSError as e:
        raise UserError(f'cannot write the page {path}: {e.strerror}') from None
