"""play.py: a side answers what the scripts print; mistakes and hostile text on the page; the page in a real browser."""
import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
import torch
from conftest import ROOT, TINY

import generate_diffusion
import play
import prepare
import sample
import train
from nanodrift import player
from nanodrift.options import UserError
from nanodrift.refinement import Step
from nanodrift.tokenizer import ByteTokenizer
from play import CONTINUE, GAPS, REPAIR, Answer, PlayConfig, Side, Token

HOSTILE = '</textarea></script><script>alert(1)</script><img src=x onerror=alert(1)>"\'${alert(1)}{{1}}`'


@pytest.fixture(scope='module')
def runs(tmp_path_factory, data_dir, encoder):
    """{name: folder of a tiny run}; bytes, but `char`."""
    folder = tmp_path_factory.mktemp('play')
    (folder / 'text.txt').write_text('some text of few letters. ' * 100)
    prepare.main([f'--input={folder}/text.txt', '--name=few', '--tokenizer=char', '--num_proc=1', f'--data_dir={folder}'])
    few = {'dataset': 'few_char', 'data_dir': str(folder)}
    for name, more in {'gpt2': {}, 'char': few, 'repair': {'model_type': 'diffusion'},
                       'blocks': {'model_type': 'diffusion', 'diffusion_objective': 'nelbo', 'diffusion_block': 8},
                       'drifting': {'model_type': 'drifting', 'encoder': encoder, 'drift_prefix': 3}}.items():
        values = TINY | {'dataset': 'tiny_byte', 'data_dir': data_dir, 'out_dir': str(folder / name)} | more
        if name != 'drifting':  # which is as long as its encoder
            values['block_size'] = 48
        assert train.main([f'--{key}={value}' for key, value in values.items()]) == 0
    return {path.name: str(path) for path in folder.iterdir() if (path / 'ckpt.pt').exists()}


@pytest.fixture
def ask(runs):
    """ask(names, task, text, **settings) -> list of the last Answer of each side, all of which have the settings."""
    def go(names, task, text, seed=1337, **settings):
        config = PlayConfig(device='cpu', dtype='float32')
        sides = [Side(runs[name], config, torch.device('cpu')) for name in names.split(',')]
        return list(dict(play.answers(sides, task, text, seed, [dict(settings) for _ in sides])).values())
    return go


def text_of(answer):
    return ''.join(token.text for token in answer.tokens)


def test_both_sides_say_what_the_scripts_print_and_what_it_took(ask, runs, capsys):
    left, right = ask('gpt2,repair', CONTINUE, 'Once', max_new_tokens=12)
    small = ['--start=Once', '--max_new_tokens=12', '--num_samples=1', '--device=cpu', '--dtype=float32']
    sample.main([f'--out_dir={runs["gpt2"]}', *small])
    assert capsys.readouterr().out == text_of(left) + '\n'
    generate_diffusion.main([f'--out_dir={runs["repair"]}', *small])
    assert capsys.readouterr().out == text_of(right) + '\n'
    assert left.passes == 12 >= left.count and right.passes > 1 and right.count == 12
    assert left.seconds > 0 and right.seconds > 0 and left.finished and right.finished


def test_a_token_has_the_probability_that_the_model_gives_it(ask, runs):
    answer, = ask('gpt2', CONTINUE, 'abc', max_new_tokens=1, top_k=1)
    model, tokenizer = sample.open_model(runs['gpt2'], 'best', 'cpu')
    probs = model(torch.tensor([tokenizer.encode('abc')]))[0][0, -1].detach().softmax(-1)
    best = probs.topk(play.MOST_PROBABLE).indices.tolist()
    assert answer.tokens[0] == Token('abc', css='fixed') and answer.tokens[1].p == pytest.approx(float(probs.max()))
    told = [f'{play.quoted(tokenizer, i)} {float(probs[i]):.3f}' for i in best]
    assert answer.tokens[1].tip == f'{told[0]}\nmost probable: {", ".join(told)}'


@pytest.mark.parametrize('name', ['repair', 'blocks'])
def test_a_refinement_is_recorded_and_gaps_keep_their_text(ask, name):
    answer, = ask(name, GAPS, 'The ____ end.', max_steps=3)
    assert text_of(answer).startswith('The ') and text_of(answer).endswith(' end.') and answer.count == 4
    assert ''.join(text for text, *_ in answer.recording.frames[-1]) == text_of(answer)
    assert len(answer.recording.frames) > 2 and answer.recording.frames[0][5][0] is None
    assert bool(answer.notes[0]) == (name == 'blocks')  # a block does not see what is behind it


def test_the_canvas_on_the_way_shows_what_is_given_committed_and_open():
    def step(ids, revised):
        confidence = torch.tensor([[0.0, 0.25, 0.0, 0.0]]).double()
        return Step(torch.tensor([ids]), confidence, torch.tensor([revised]), torch.tensor([1]))
    first, now = step([97, 257, 257, 257], [False] * 4), step([97, 98, 257, 257], [False, False, False, True])
    assert play.shown(first, now, ByteTokenizer(), 257) == [
        Token('a', css='fixed'), Token('b', 0.25, "'b' 0.250 when committed"), Token('·', css='open'),
        Token('·', css='open revised')]


def test_a_repair_has_a_diff(ask, monkeypatch):
    monkeypatch.setattr(generate_diffusion, 'flagged_tokens', lambda model, ids, threshold: ids == ord('x'))
    answer, = ask('repair', REPAIR, 'abxcd', temperature=2.0, top_k=0)
    assert ''.join(was for _, was, _ in answer.changes) == 'abxcd' and answer.passes > 1 and answer.count == 1
    assert ['x' in was for kind, was, _ in answer.changes if kind != 'kept'] == [True]
    assert 'nothing was flagged' in rendered(ask('repair', REPAIR, 'ab')[0]) and 'nothing' not in rendered(answer)


def test_drifting_takes_one_pass(ask):
    answer, = ask('drifting', CONTINUE, 'ab', max_new_tokens=9)
    assert answer.passes == 1 and answer.count == 9 and text_of(answer).startswith('ab')


@pytest.mark.parametrize('name, task, text, settings, words', [
    ('gpt2', GAPS, 'a____', {}, 'only a diffusion model'), ('drifting', REPAIR, 'a', {}, 'only a diffusion model'),
    ('char', CONTINUE, 'Ω', {}, 'no id for'), ('repair', CONTINUE, 'x' * 99, {}, 'shorten'),
    ('drifting', CONTINUE, 'abcdef', {}, 'drift_prefix'), ('repair', GAPS, '', {}, 'no gap'),
    ('repair', REPAIR, '', {}, 'no text'), ('blocks', REPAIR, 'a', {}, 'objective=repair'),
    ('blocks', CONTINUE, 'a', {'remask': 'flag'}, 'remask=flag'), ('gpt2', CONTINUE, 'a', {'top_p': 0}, 'top_p'),
    ('gpt2', CONTINUE, 'a', {'top_k': None}, 'top_k'), ('repair', CONTINUE, 'a', {'max_steps': 1.5}, 'max_steps'),
    ('repair', CONTINUE, 'a', {'flag_threshold': 0.1}, 'flag_threshold'), ('gpt2', CONTINUE, 'a', {'seed': -1}, 'seed')])
def test_a_mistake_is_shown_on_its_side_and_the_other_answers(ask, name, task, text, settings, words):
    answer, = ask(name, task, text, **settings)
    assert words in answer.error and answer.finished and not answer.passes
    assert f'<p class="error" role="alert">{play.jinja2.filters.escape(answer.error)}</p>' in rendered(answer)
    wrong, right = ask('gpt2,repair', GAPS, 'a____')
    assert wrong.error and not right.error and right.count == 4


def test_a_prompt_is_what_was_typed_and_never_a_file(ask):
    answer, = ask('gpt2', CONTINUE, 'FILE:README.md', max_new_tokens=2)
    assert text_of(answer).startswith('FILE:README.md')


def test_a_long_prompt_is_read_in_part_and_said(ask):
    answer, = ask('gpt2', CONTINUE, 'x' * 60, max_new_tokens=2)
    assert answer.count <= 2 and 'last block_size=48' in rendered(answer)


def test_a_fault_of_the_code_is_no_mistake_of_the_user(ask, monkeypatch):
    monkeypatch.setattr(play, 'unread', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask('gpt2', CONTINUE, 'a')


def test_the_page_gets_the_first_and_the_last_of_many_updates():
    steps = [Answer(), *(Answer(passes=n) for n in range(1, 99)), Answer(passes=99, finished=True)]
    seen = [answer.passes for _, answer in play.now_and_then((0, step) for step in steps)]
    assert seen[0] == 0 and seen[-1] == 99 and len(seen) < 10


# ---------------------------------------------------------------------------------------------------------------------
# HTML

def rendered(answer, title='run: gpt2'):
    return play.render(play.read_template(), title, answer)


class Reader(HTMLParser):
    """The names of all elements, and the attributes."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes, self.text = [], [], ''
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_text_never_becomes_part_of_the_page():
    recording = player.Recording(fixed=[False], passes=[1], steps=[0], frames=[[(HOSTILE, 1.0, False)]])
    answer = Answer([Token(HOSTILE, 0.5, HOSTILE), Token(HOSTILE, css='fixed')], recording,
                    [(kind, HOSTILE, HOSTILE) for kind in ('kept', 'same', 'new')], [HOSTILE], HOSTILE, passes=1)
    read = Reader(rendered(answer, title=HOSTILE))
    assert set(read.names) == {'style', 'div', 'h2', 'iframe', 'span', 'p', 'del', 'ins', 'mark'}
    assert not [name for name, _ in read.attributes if name.startswith('on') or name in ('src', 'href')]
    attributes = dict(read.attributes)
    assert attributes['data-tip'] == HOSTILE and attributes['srcdoc'] == player.page(recording)
    assert attributes['sandbox'] == 'allow-scripts' and read.text.count(HOSTILE) == 9


def test_half_a_surrogate_pair_can_be_sent():
    assert 'a?b' in rendered(Answer([Token('a\ud800b')]))


def test_a_token_is_told_as_python_writes_it():
    assert [play.quoted(ByteTokenizer(), i) for i in (97, 10, 0xc3)] == ["'a'", r"'\n'", r"b'\xc3'"]


# ---------------------------------------------------------------------------------------------------------------------
# the command, and the page in a browser

def test_without_gradio_one_line_says_what_to_install(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(UserError, match=r'pip install gradio==\d'):
        play.main([f'--out_dir={runs["gpt2"]}', '--device=cpu'])


needs_gradio = pytest.mark.skipif(not importlib.util.find_spec('gradio'), reason='needs gradio')
needs_browser = pytest.mark.skipif(
    not importlib.util.find_spec('selenium') or not all(map(shutil.which, ('chromium', 'chromedriver'))),
    reason='needs selenium, chromium and chromedriver')


@needs_gradio
def test_a_port_that_is_taken(runs):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        with pytest.raises(UserError, match='--port'):
            play.main([f'--out_dir={runs["gpt2"]}', '--device=cpu', f'--port={s.getsockname()[1]}', '--browser=False'])


@pytest.fixture
def address(runs):
    """Where the page of two models is served, by a process without a network."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    words = [f'--out_dir={runs["gpt2"]},{runs["repair"]}', '--device=cpu', '--dtype=float32', f'--port={port}',
             '--browser=False']
    server = subprocess.Popen([sys.executable, 'play.py', *words], cwd=ROOT, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE)
    try:
        until(lambda: not socket.socket().connect_ex(('127.0.0.1', port)), 90)
        yield f'http://127.0.0.1:{port}/'
    finally:
        server.kill()
    assert b'Traceback' not in server.communicate()[1]


def until(condition, seconds=30):
    """Waits for a condition to hold, and returns its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except Exception as e:  # the page is not there yet, or changes while it is read
            last = e
        time.sleep(0.2)
    pytest.fail(f'not within {seconds} s: {locals().get("last", "false")}')


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which('chromium')
    for word in ('headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-background-networking',
                 'disable-component-update', 'disable-sync', 'disable-dev-shm-usage', f'user-data-dir={tmp_path}/profile'):
        options.add_argument(f'--{word}')
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL'})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which('chromedriver')))
    driver.get('about:blank')
    driver.get_log('performance')  # of Chromium's own first page
    yield driver
    driver.quit()


@pytest.mark.slow
@needs_gradio
@needs_browser
def test_the_page_in_a_real_browser(address, browser):
    """By hand elsewhere: play.py --out_dir=GPT,REPAIR; each task with a text and with a wrong one; point at tokens."""
    def find(selector):
        return browser.find_elements('css selector', selector)

    def click(selector, label):
        next(element for element in find(selector) if element.text.strip() == label).click()

    def run(text, task):
        box.clear()
        box.send_keys(text)
        click('label', task)
        click('button', 'Run')
    browser.get(address)
    box = until(lambda: find('textarea'))[0]
    hostile = '<img src=x onerror=alert(1)>${1}{{1}}`'
    run(hostile, 'continue')
    until(lambda: len(find('.answer')) == 2 and find('.answer .facts')[1] and find('.answer iframe'), 60)
    assert [element.text for element in find('.answer .fixed')[:1]] == [hostile] and not find('.answer img')
    assert all(re.search(r'\d+ forward passes,\s\d+\.\d\d s, \d+ token', facts.text) for facts in find('.answer .facts'))
    token = find('.answer .text [data-tip]')[0]
    browser.execute_script('arguments[0].focus()', token)
    told = browser.execute_script('return getComputedStyle(arguments[0], "::after").content', token)
    assert 'most probable: ' in told
    browser.switch_to.frame(find('.answer iframe')[0])
    until(lambda: re.search(r'step (\d+) of \1, \d+ forward passes', find('#now')[0].text), 30)
    find('#canvas span')[len(hostile)].click()
    assert '[MASK]' in find('#history')[0].text
    browser.switch_to.default_content()
    run('no gap', 'fill gaps')
    until(lambda: len(find('.answer .error')) == 2)
    assert 'only a diffusion model' in find('.answer .error')[0].text and 'no gap' in find('.answer .error')[1].text
    run('the drift', 'repair')
    until(lambda: len(find('.answer .error')) == 1 and find('.answer .facts'))
    requests = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    asked = [request['params']['request']['url'] for request in requests if request['method'] == 'Network.requestWillBeSent']
    assert len(asked) > 5 and not [url for url in asked if not url.startswith((address, 'data:', 'blob:', 'about:'))]
