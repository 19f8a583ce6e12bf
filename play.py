"""
A page to try trained models on, one alone or two side by side. It needs Gradio, which nothing else here does.

    python play.py --out_dir=out                            text token by token, with probabilities
    python play.py --out_dir=out,out-diffusion              two models answer one prompt, with passes and seconds
    python play.py --out_dir=hf:gpt2,out --port=7861        any run, or 'hf:NAME_OR_FOLDER'

Only this machine can open the page, and the page loads nothing from elsewhere.
"""
import codecs
import os
import time
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import jinja2
import torch

from generate_diffusion import (
    GenerateConfig,
    Tally,
    all_ended,
    check_flagging,
    check_repairs,
    ends,
    prompt_canvas,
    rewrite,
    template_canvas,
    unseen,
    up_to_end,
)
from nanodrift import player
from nanodrift.checkpoint import FILES
from nanodrift.data import derive_seed
from nanodrift.machine import DTYPES, autocast, limit_threads, pick_device, pick_dtype
from nanodrift.options import UserError, build, check_options, configure, mistake, option, run
from nanodrift.refinement import RefineConfig, check_defined
from nanodrift.tokenizer import encode_prompt
from sample import ONE_STEP, SampleConfig, generate_at_once, open_model, unread

GRADIO = 'gradio==6.31.0'
CONTINUE, GAPS, REPAIR = TASKS = 'continue', 'fill gaps', 'repair'
MOST_PROBABLE = 5  # tokens that are shown together with the drawn one
SECONDS_PER_UPDATE = 0.1  # at least, between two updates of the page


@dataclass
class PlayConfig:
    """Which models, and where the page is."""
    out_dir: str = option('out', "folder of a run, or 'hf:NAME_OR_FOLDER'; two, with a comma between them, side by side")
    ckpt: str = option('best', 'which checkpoint of a run', tuple(FILES))
    port: int = option(7860, 'the page is http://127.0.0.1:PORT', at_least=1, at_most=65535)
    browser: bool = option(True, 'open the page in the browser')
    device: str = option('auto', "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = option('auto', 'of matrix products: auto takes the fastest safe one of the device', ('auto', *DTYPES))

    def __post_init__(self):
        check_options(self)
        if self.out_dir.count(',') > 1:
            raise UserError(f'out_dir={self.out_dir}: at most two models stand side by side')


class Token(NamedTuple):
    """A token on the page. p: probability or confidence, None for no colour; css: 'fixed', 'open', 'open revised' or ''."""
    text: str
    p: float | None = None
    tip: str = ''
    css: str = ''


@dataclass
class Answer:
    """What the page shows of a model's answer so far."""
    tokens: list = field(default_factory=list)
    recording: player.Recording | None = None
    changes: list = field(default_factory=list)  # of a repair, as player.changes has them
    notes: list = field(default_factory=list)
    error: str = ''
    passes: int = 0
    count: int = 0  # of new tokens
    seconds: float = 0.0
    finished: bool = False


class Side:
    """One of the models of a page."""

    def __init__(self, name, config, device):
        self.model, self.tokenizer = open_model(name, config.ckpt, device)
        self.dtype = pick_dtype(config.dtype, device)
        model_type = self.model.config.model_type
        self.name, self.title = name, f'{name}: {model_type}, {self.model.num_params():,} parameters'
        self.write, self.settings = WAYS.get(model_type, LEFT_TO_RIGHT)

    def computed(self, steps, answer):
        """Yields from `steps`, and adds the seconds to the answer. Autocast holds for one thread, and the page may ask for
        each step from another, so each step sets it."""
        while True:
            started = time.perf_counter()
            with autocast(self.model.device, self.dtype):
                step = next(steps, None)
            answer.seconds += time.perf_counter() - started
            if step is None:
                return
            yield step


# ---------------------------------------------------------------------------------------------------------------------
# answers. Each way of writing fills in an Answer, and yields whenever there is more to show.

def quoted(tokenizer, i):
    """A token as Python writes it: 'the', or b'\\xc3' where it ends inside a character."""
    text = tokenizer.decode_bytes([i])
    try:
        return repr(text.decode('utf-8'))
    except UnicodeDecodeError:
        return repr(text)


def write_left_to_right(side, task, text, values, answer):
    check_continues(side, task)
    config, = build(values, SampleConfig)
    tokenizer, decoder = side.tokenizer, codecs.getincrementaldecoder('utf-8')('replace')
    prompt = encode_prompt(tokenizer, text) or [tokenizer.eot]
    answer.notes.append(unread(prompt, side.model.config))
    answer.tokens.append(Token(text, css='fixed'))
    steps = side.model.generate(torch.tensor([prompt], device=side.model.device), config.max_new_tokens, config.temperature,
                                config.top_k or None, config.top_p, config.seed, return_logits=True)
    learned = ((int(column), logits[0].float().softmax(-1).cpu()) for column, logits in steps)
    for i, probs in side.computed(learned, answer):
        answer.passes += 1
        if i == tokenizer.eot and not config.ignore_eot:
            break
        best = probs.topk(min(MOST_PROBABLE, len(probs))).indices.tolist()
        numbers = [f'{quoted(tokenizer, j)} {float(probs[j]):.3f}' for j in (i, *best)]
        answer.tokens.append(Token(decoder.decode(tokenizer.decode_bytes([i])), float(probs[i]),
                                   f'{numbers[0]}\nmost probable: {", ".join(numbers[1:])}'))
        answer.count += 1
        yield
    answer.tokens.append(Token(decoder.decode(b'', final=True)))


def write_at_once(side, task, text, values, answer):
    check_continues(side, task)
    config, = build(values, SampleConfig)
    prompt = encode_prompt(side.tokenizer, text)
    sample = (generate_at_once(side.model, prompt, 1, config, derive_seed(config.seed, 0)) for _ in range(1))
    (ids,), = side.computed(sample, answer)
    answer.passes, answer.count = 1, len(ids)
    answer.tokens = [Token(text, css='fixed'), Token(side.tokenizer.decode(ids.tolist()))]
    yield


def check_continues(side, task):
    if task != CONTINUE:
        raise UserError(f'only a diffusion model can {task}; a {side.model.config.model_type} model can {CONTINUE} a text')


def write_by_refinement(side, task, text, values, answer):
    model, tokenizer, c = side.model, side.tokenizer, side.model.config
    refine_config, = build(values, RefineConfig)
    check_flagging(refine_config, task == REPAIR)
    if task == REPAIR:
        yield from repair(side, text, refine_config, values, answer)
        return
    if task == GAPS:  # where max_new_tokens and ignore_eot have no meaning
        canvas = template_canvas(text, tokenizer, c)
        config = GenerateConfig(template=text, seed=values['seed'])
    else:
        config, = build(values, GenerateConfig)
        canvas = prompt_canvas(text, config.max_new_tokens, tokenizer, c)
    answer.notes.append(unseen(canvas, c))
    given, lead, eot = ends(canvas, config, tokenizer, c)
    recorder, first = player.Recorder(), None
    steps = Tally().refine(model, canvas, 1, refine_config, derive_seed(config.seed, 0),
                           ended=lambda ids: all_ended(ids, c, refine_config, given, eot))
    for step in map(player.first_row, side.computed(steps, answer)):
        first = first or step
        recorder.add(step)
        answer.tokens = shown(first, step, tokenizer, c.vocab_size)[lead:]
        answer.passes, answer.count = int(step.passes[0]), int((step.ids != canvas).sum())
        yield
    answer.tokens = answer.tokens[:len(up_to_end(step.ids[0].tolist(), given, eot)) - lead]
    answer.recording = recorder.recording(tokenizer, c.vocab_size)


def shown(first, step, tokenizer, mask):
    """The Tokens of a Step; positions that are open in the `first` one are new."""
    recording, tokens = player.Recording.of((first, step), tokenizer, mask), []
    for i, (text, confidence, revised), fixed in zip(step.ids[0].tolist(), recording.frames[-1], recording.fixed):
        if fixed:
            tokens.append(Token(text, css='fixed'))
        elif text is None:
            tokens.append(Token(player.OPEN, css='open revised' if revised else 'open'))
        else:
            tokens.append(Token(text, confidence, f'{quoted(tokenizer, i)} {confidence:.3f} when committed'))
    return tokens


def repair(side, text, refine_config, values, answer):
    check_repairs(side.model)
    ids = side.tokenizer.encode(text)
    if not ids:
        raise UserError('there is no text to repair')
    check_defined(refine_config, side.model)
    repairs = (rewrite(side.model, torch.tensor(ids), refine_config, values['seed']) for _ in range(1))
    (repaired, flagged, tally), = side.computed(repairs, answer)
    answer.changes = list(player.changes(side.tokenizer, ids, repaired, flagged.tolist()))
    answer.notes.append('' if flagged.any() else 'nothing was flagged: a lower flag_threshold flags more')
    answer.passes, answer.count = sum(tally.passes), tally.tokens
    yield


def of(cls, *names):
    return [f for f in fields(cls) if f.name in names]


# model_type -> how it writes, and the options that are settings on the page
LEFT_TO_RIGHT = write_left_to_right, of(SampleConfig, 'max_new_tokens', 'temperature', 'top_k', 'top_p', 'ignore_eot')
WAYS = {'diffusion': (write_by_refinement, [*of(GenerateConfig, 'max_new_tokens', 'ignore_eot'), *fields(RefineConfig)]),
        'drifting': (write_at_once, of(SampleConfig, 'max_new_tokens', 'temperature'))}


def answers(sides, task, text, seed, settings):
    """Yields (number of a side, its Answer so far): one side after the other, so that each has the machine for itself while
    its seconds are counted. A user's mistake is an answer too."""
    yield from ((number, Answer()) for number in range(len(sides)))
    for number, (side, values) in enumerate(zip(sides, settings)):
        answer = Answer()
        try:
            values['seed'] = build({'seed': seed}, SampleConfig)[0].seed
            for _ in side.write(side, task, text, values, answer):
                yield number, answer
        except Exception as e:
            answer.error = mistake(e)
            if answer.error is None:
                raise
        answer.finished = True
        yield number, answer


def now_and_then(updates):
    """Passes on the first and the last update of each side, and others at most every SECONDS_PER_UPDATE."""
    before = 0
    for number, answer in updates:
        if answer.finished or not answer.passes or time.monotonic() - before > SECONDS_PER_UPDATE:
            yield number, answer
            before = time.monotonic()


# ---------------------------------------------------------------------------------------------------------------------
# the page

def read_template():
    with open(os.path.join(os.path.dirname(player.__file__), 'play.html'), encoding='utf-8') as f:
        return jinja2.Template(f.read(), autoescape=True, trim_blocks=True)


def render(template, title, answer):
    """HTML of an Answer, all text in it escaped."""
    page = player.page(answer.recording) if answer.recording else ''
    text = template.render(title=title, answer=answer, page=page)
    return text.encode('utf-8', errors='replace').decode('utf-8')  # a lone surrogate becomes a question mark


def import_gradio():
    try:
        import gradio
    except ImportError:
        raise UserError(f'the page needs Gradio: pip install {GRADIO}') from None
    return gradio


def control(gradio, f, defaults):
    """A control of the page for an option; defaults: {name: value} of those that differ from the option's own."""
    words = dict(value=defaults.get(f.name, f.default), label=f.name, info=f.metadata['help'], min_width=200)
    if f.type is bool:
        return gradio.Checkbox(**words)
    return gradio.Dropdown(list(f.metadata['choices']), **words) if f.metadata['choices'] else gradio.Number(**words)


def build_page(gradio, sides):
    template = read_template()

    def respond(text, task, seed, *values):
        settings, values = [], iter(values)
        for side in sides:
            settings.append({f.name: next(values) for f in side.settings})
        for number, answer in now_and_then(answers(sides, task, text, seed, settings)):
            yield [render(template, side.title, answer) if n == number else gradio.skip() for n, side in enumerate(sides)]

    with gradio.Blocks(title='nanoDrift playground', analytics_enabled=False) as page:
        text = gradio.Textbox(label='text', lines=3, info='Empty starts a new document. A gap is `[MASK:12]`, twelve '
                              'tokens, or `____`, one for each underscore.')
        with gradio.Row(equal_height=True):
            task = gradio.Radio(TASKS, value=CONTINUE, label='task', min_width=280)
            seed = gradio.Number(SampleConfig.seed, label='seed', info='the same seed gives the same text', min_width=150)
        with gradio.Row():
            go, stop = gradio.Button('Run', variant='primary', min_width=120), gradio.Button('Stop', min_width=120)
        controls, outputs = [], []
        with gradio.Row():
            for side in sides:
                with gradio.Column(min_width=320):
                    with gradio.Accordion(f'settings of {side.name}', open=False), gradio.Row():
                        defaults = ONE_STEP if side.write is write_at_once else {}
                        controls += [control(gradio, f, defaults) for f in side.settings]
                    outputs.append(gradio.HTML(render(template, side.title, Answer())))
        private = dict(api_visibility='private', show_progress='hidden')
        running = go.click(respond, [text, task, seed, *controls], outputs, concurrency_limit=1, **private)
        stop.click(None, cancels=running, **private)
    return page


def main(argv):
    config, _ = configure(argv, PlayConfig, description=__doc__)
    limit_threads()
    device = pick_device(config.device, float64=True)  # which refinement draws in
    sides = [Side(name, config, device) for name in config.out_dir.split(',')]
    gradio = import_gradio()
    theme = gradio.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace'])  # none to load
    try:
        build_page(gradio, sides).launch(
            server_name='127.0.0.1', server_port=config.port, inbrowser=config.browser, share=False, theme=theme,
            footer_links=[], run_history=False, enable_monitoring=False, mcp_server=False, ssr_mode=False, pwa=False)
    except OSError as e:
        if 'port' not in str(e):
            raise
        raise UserError(f'port={config.port} is taken or not allowed: choose another --port') from None


if __name__ == '__main__':
    run(main)
