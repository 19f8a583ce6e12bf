"""generate_diffusion.py: what it prints for prompts, templates and repairs; the terminal and the page; mistakes."""
import io
import itertools
import json
import re
import shutil
import subprocess

import pytest
import torch
from conftest import TINY
from rich.console import Console

import generate_diffusion
import sample
import train
from generate_diffusion import GenerateConfig, all_ended, first_canvas, parse_template, refine_batch
from model import GPTConfig, load_model
from nanodrift import checkpoint, player
from nanodrift.options import UserError
from nanodrift.refinement import RefineConfig, Step
from nanodrift.tokenizer import ByteTokenizer


@pytest.fixture(scope='module')
def out_dir(tmp_path_factory, data_dir):
    """A tiny run of the repair objective, bytes, block_size 48."""
    settings = TINY | {'data_dir': data_dir, 'dataset': 'tiny_byte', 'max_iters': 30, 'eval_interval': 30, 'block_size': 48,
                       'model_type': 'diffusion', 'out_dir': str(tmp_path_factory.mktemp('out'))}
    assert train.main([f'--{key}={value}' for key, value in settings.items()]) == 0
    return settings['out_dir']


def recording_in(path):
    """The data of a page that --html wrote."""
    return json.loads(re.search(r'const recording = (\{.*\});', path.read_text(encoding='utf-8'))[1])


@pytest.fixture
def go(out_dir, capsys):
    """go(*args) -> stdout, stderr of generate_diffusion.py."""
    def start(*args):
        length = [] if any(arg.startswith(('--template', '--repair')) for arg in args) else ['--max_new_tokens=20']
        generate_diffusion.main([f'--out_dir={out_dir}', '--device=cpu', *length, '--max_steps=6', *args])
        return capsys.readouterr()
    return start


# ---------------------------------------------------------------------------------------------------------------------
# text

def test_a_prompt_is_continued_and_the_passes_are_counted(go):
    said = go('--start=Once upon')
    assert said.out.startswith('Once upon') and len(said.out.encode()) >= len('Once upon') + 20
    assert re.search(r'\d\.\d forward passes \(NFE\) for each of 1, 20 tokens in .* tokens/s', said.err)


def test_the_same_seed_says_the_same(go):
    assert go('--num_samples=3').out == go('--num_samples=3').out != go('--num_samples=3', '--seed=1').out
    assert go('--num_samples=3').out.count('---------------') == 3


def test_a_prompt_is_a_template_with_one_gap(go):
    prompt = go('--start=Once', '--max_new_tokens=6', '--ignore_eot').out
    assert prompt == go('--template=Once______').out == go('--template=Once[MASK:6]').out


def test_a_refinement_is_played_and_written(go, tmp_path):
    said = go('--start=The', '--animate', f'--html={tmp_path}/page.html', '--remask=flag', '--flag_threshold=0.05')
    marks = re.findall(r'step +\d+, +\d+ passes  (\S+)', said.out)
    assert len(marks) > 2 and marks[0] == '===' + '·' * 20 and '·' not in marks[-1] and '#' in marks[-1]
    recording = recording_in(tmp_path / 'page.html')
    assert len(recording['frames']) == len(marks)
    assert said.out.endswith(''.join(text for text, _, _ in recording['frames'][-1]) + '\n')


def test_a_template_keeps_its_text_byte_for_byte(go, tmp_path):
    (tmp_path / 'gaps.txt').write_bytes('The [MASK:4] Größe\n____ end. '.encode())
    for strategy in ('confidence', 'ancestral', 'random', 'threshold', 'naive'):
        said = go(f'--template=FILE:{tmp_path}/gaps.txt', f'--strategy={strategy}', '--temperature=0.1').out
        assert re.fullmatch('The .* Größe\n.* end. \n', said, re.DOTALL)


def test_gaps_are_as_long_as_they_say():
    encode, shape = ByteTokenizer().encode, GPTConfig(model_type='diffusion', vocab_size=300, block_size=16)
    assert parse_template('a[MASK:3]b____', encode, shape) == [97, 300, 300, 300, 98, 300, 300, 300, 300]
    assert parse_template('a[MASK]b[mask:2]', encode, shape) == [97, 300, 98, 300, 300]
    assert parse_template('__init__ ___', encode, shape) == [*b'__init__ ', 300, 300, 300]
    with pytest.raises(UserError, match='no gap'):
        parse_template('nothing __ open', encode, shape)
    for gap in ('[MASK:0]', '[MASK:17]', '[MASK:99999999999]'):
        with pytest.raises(UserError, match='block_size=16'):
            parse_template(f'a{gap}', encode, shape)


def test_naive_tells_how_much_each_step_commits(go):
    for samples in (1, 3, 70):
        said = go('--strategy=naive', '--start=given', f'--num_samples={samples}').err
        counts = re.search(r'committed in each step, over all samples: (.*)', said)[1].split(', ')
        assert sum(map(int, counts)) == 20 * samples


def test_repair_rewrites_only_what_is_flagged(go, tmp_path, monkeypatch):
    text = 'Größe\tzwei\r\n\x0c' + 'abc' * 40
    raw = text.encode()
    (tmp_path / 'text.txt').write_bytes(raw)
    wrong = torch.zeros(len(raw), dtype=torch.bool)
    wrong[[30, 31, 90]] = True
    monkeypatch.setattr(generate_diffusion, 'flagged_tokens', lambda model, ids, threshold: wrong)
    said = go(f'--repair={tmp_path}/text.txt', '--temperature=2.0', '--top_k=0', '--seed=2', f'--to={tmp_path}/new.txt')
    old = re.sub(r'\[-(.*?)-\]\{\+.*?\+\}', r'\1', said.out, flags=re.DOTALL)
    assert old == text + '\n' and 1 <= said.out.count('[-') <= 3
    new = (tmp_path / 'new.txt').read_bytes()
    assert new != raw and all(a == b for i, (a, b) in enumerate(zip(new, raw)) if not wrong[i])
    assert '3 tokens' in said.err and f'for each of {-(-len(raw) // 48)}' in said.err


def test_an_untouched_text_is_printed_as_it_is(go, tmp_path, monkeypatch):
    text = 'Größe\tzwei\r\n\x0c\x1b[0m日本\n'
    (tmp_path / 'text.txt').write_bytes(text.encode())
    monkeypatch.setattr(generate_diffusion, 'flagged_tokens', lambda model, ids, threshold: torch.zeros(len(ids)).bool())
    assert go(f'--repair={tmp_path}/text.txt').out == text


def test_the_diff_leaves_characters_whole():
    """Of ö the second byte is flagged, and turned into that of Ö's neighbour."""
    before, after = list('aöb'.encode()), list('aøb'.encode())
    assert player.diff(ByteTokenizer(), before, after, [False, False, True, False], False) == 'a[-ö-]{+ø+}b'
    assert player.diff(ByteTokenizer(), before, before, [False, False, True, False], False) == 'aöb'


def test_the_diff_is_coloured_where_there_are_colours():
    before, after, flagged = list(b'abcd'), list(b'abxd'), [False, True, True, False]
    coloured = player.diff(ByteTokenizer(), before, after, flagged, colours=True)
    assert coloured == f'a{player.SAME}b{player.PLAIN}{player.OLD}c{player.PLAIN}{player.NEW}x{player.PLAIN}d'
    assert player.diff(ByteTokenizer(), before, after, flagged, colours=False) == 'ab[-c-]{+x+}d'


def test_text_ends_at_end_of_text(go, monkeypatch):
    ends = [*b'abXY', 256, *b'Z']

    def steps(*_):
        nothing = torch.zeros(1, 6)
        for ids in ([257] * 6, ends):
            yield Step(torch.tensor([ids]), nothing, nothing.bool(), torch.zeros(1, dtype=torch.long))
    monkeypatch.setattr(generate_diffusion, 'refine_batch', steps)
    assert go('--start=ab').out == 'abXY\n'
    assert go('--start=ab', '--ignore_eot=True').out == 'abXY<|endoftext|>Z\n'


def test_as_much_is_filled_in_as_fits(out_dir, capsys):
    generate_diffusion.main([f'--out_dir={out_dir}', '--device=cpu', '--start=abc', '--max_steps=3', '--ignore_eot=True'])
    assert ', 45 tokens in' in capsys.readouterr().err


def test_tokens_are_flagged_where_the_model_predicts_the_mask(out_dir):
    model = load_model(checkpoint.load(checkpoint.find(out_dir)))
    ids = torch.randint(200, (100,))
    p = torch.cat([model(block[None])[0][0].softmax(-1)[:, -1] for block in ids.split(48)]).detach()
    threshold = float(p.median())
    flagged = generate_diffusion.flagged_tokens(model, ids, threshold)
    assert torch.equal(flagged, p.double() > threshold) or (flagged != (p > threshold)).sum() <= 1
    assert 30 < flagged.sum() < 70


@pytest.mark.parametrize('args, words', [
    (['--max_new_tokens=50'], 'block_size=48'), (['--template=full'], 'no gap'),
    (['--max_new_tokens=99999999999'], 'block_size=48'), (['--template=' + 'a' * 60 + '___'], 'block_size=48'),
    (['--repair=README.md', '--html=x.html'], 'no meaning'), (['--to=x'], 'repair'), (['--eta=0.5'], 'eta'),
    (['--start=a', '--template=b___'], 'contradict'),
    (['--strategy=best'], 'ancestral'), (['--remask=remdm-cap', '--strategy=random'], 'ancestral'),
    (['--start=FILE:nowhere'], 'nowhere'), (['--repair=nowhere'], 'nowhere'),
    (['--num_samples=0'], 'num_samples'), (['--flag_threshold=0.9'], 'remask=flag'),
    (['--threshold=0.5'], 'strategy=threshold'), (['--html=nowhere/x.html'], 'nowhere'),
])
def test_mistakes_are_one_line(go, args, words):
    with pytest.raises(UserError, match=words):
        go(*args)


def test_models_of_other_kinds_are_refused(tiny, go):
    config, model_config = tiny()
    train.train(config, model_config)
    with pytest.raises(UserError, match='sample.py'):
        go(f'--out_dir={config.out_dir}', '--max_new_tokens=8')
    with pytest.raises(UserError, match='sample.py'):
        go(f'--out_dir={config.out_dir}', '--repair=README.md')
    config, model_config = tiny(out_dir='bound', model_type='diffusion', diffusion_objective='nelbo')
    train.train(config, model_config)
    with pytest.raises(UserError, match='repair'):
        go(f'--out_dir={config.out_dir}', '--repair=README.md')


def test_sample_refers_to_generate_diffusion(out_dir):
    with pytest.raises(UserError, match='generate_diffusion.py'):
        sample.main([f'--out_dir={out_dir}'])


def test_a_canvas_without_gaps_stays_as_it_is(out_dir):
    model = load_model(checkpoint.load(checkpoint.find(out_dir)))
    steps = list(refine_batch(model, torch.arange(10), 1, RefineConfig(), 0))
    assert steps[-1].ids.tolist() == [list(range(10))]


def test_a_canvas_is_prompt_and_open_positions():
    config = GenerateConfig(start='ab', max_new_tokens=3)
    canvas = first_canvas(config, ByteTokenizer(), GPTConfig(vocab_size=257, block_size=9))
    assert canvas.tolist() == [97, 98, 257, 257, 257]


# ---------------------------------------------------------------------------------------------------------------------
# to be watched

def recording():
    """Two tokens given, three filled in over three steps; the last of them is taken back once."""
    mask, tokenizer = 257, ByteTokenizer()
    rows = [[97, 98, mask, mask, mask], [97, 98, mask, 99, 60], [97, 98, 10, 99, mask], [97, 98, 10, 99, 101]]
    steps, before = [], rows[0]
    for number, row in enumerate(rows):
        ids = torch.tensor([row])
        revised = (ids == mask) & (torch.tensor([before]) != mask)
        confidence = torch.where(ids == mask, 0.0, 0.25 * (number + 1)).double()
        steps.append(Step(ids, confidence, revised, torch.tensor([number])))
        before = row
    return player.Recording.of(steps, tokenizer, mask)


def test_a_recording_knows_what_was_open_given_and_taken_back():
    recorded = recording()
    assert recorded.fixed == [True, True, False, False, False] and recorded.passes == [0, 1, 2, 3]
    assert [[text for text, _, _ in frame] for frame in recorded.frames] == [
        ['a', 'b', None, None, None], ['a', 'b', None, 'c', '<'], ['a', 'b', '\n', 'c', None], ['a', 'b', '\n', 'c', 'e']]
    assert [frame[4][2] for frame in recorded.frames] == [False, False, True, True]


def test_the_frame_stands_still_in_a_terminal(monkeypatch):
    monkeypatch.setattr(player.time, 'sleep', lambda seconds: None)
    widths, recorded = player.cells(recording()), recording()
    pictures = [player.picture(recorded, n, widths, columns=3, height=25) for n in range(4)]
    bodies = [p.plain.split('\n', 1)[1] for p in pictures]
    assert bodies == ['ab·\n··', 'ab·\nc<', 'ab⏎\nc·', 'ab⏎\nce']
    out = io.StringIO()
    player.play(recorded, Console(file=out, force_terminal=True, width=40, color_system='truecolor'))
    said = out.getvalue()
    assert 'step 3, 3 forward passes' in said and '\x1b[' in said
    styles = {str(span.style) for span in pictures[3].spans}
    assert any('underline' in style for style in styles) and 'bold' in styles


def test_of_a_canvas_taller_than_the_screen_the_part_in_work_is_seen_and_all_at_the_end():
    rows = [[97] * 4 + [257] * 8, [97] * 10 + [257] * 2, [97] * 12]
    known = torch.zeros(1, 12)
    steps = [Step(torch.tensor([row]), known.double(), known.bool(), torch.tensor([n])) for n, row in enumerate(rows)]
    tall = player.Recording.of(steps, ByteTokenizer(), 257)
    pictures = [player.picture(tall, n, player.cells(tall), columns=2, height=4).plain for n in range(3)]
    assert [p.split('\n')[1:] for p in pictures] == [['aa', '··', '··'], ['aa', 'aa', '··'], ['aa'] * 6]


def test_wide_and_unprintable_characters_have_cells_too():
    frames = [[('日', 1.0, False), ('\r', 1.0, False)], [('a', 1.0, False), ('\x1b', 1.0, False)]]
    wide = player.Recording(frames, [False, False], [0, 1], [0, 1])
    assert player.cells(wide) == [2, 1]
    assert [player.picture(wide, n, [2, 1], 80, 25).plain.split('\n')[1] for n in (0, 1)] == ['日 ', 'a ?']


def of_row(row, revised=()):
    opened = torch.tensor([[n in revised for n in range(len(row))]])
    return Step(torch.tensor([row]), torch.zeros(1, len(row)).double(), opened, torch.tensor([1]))


def test_steps_that_change_nothing_are_not_recorded():
    recorder = player.Recorder()
    for row in ([97, 257, 257], [97, 98, 257], [97, 98, 257], [97, 98, 257], [97, 98, 99], [97, 98, 99], [97, 98, 99]):
        recorder.add(of_row(row))
    recorded = recorder.recording(ByteTokenizer(), 257)
    assert recorded.steps == [0, 1, 4, 6] and len(recorded.frames) == 4 == len(recorded.passes)  # the last one, too
    assert player.picture(recorded, 2, [1] * 3, 80, 25).plain.startswith('step 4, ')


@pytest.mark.parametrize('count', [3, 9, 10, 11, 40, 41])
def test_of_too_many_steps_every_second_is_recorded_and_the_newest(count):
    recorder = player.Recorder(most=80)
    rows = [[97 + n % 20, 97 + n // 20] + [257] * 6 for n in range(count)]
    for n, row in enumerate(rows):
        recorder.add(of_row(row, revised=[n % 8]))
        recorded = recorder.recording(ByteTokenizer(), 257)
        apart = {b - a for a, b in itertools.pairwise(recorded.steps[:-1])}
        assert len(recorded.steps) <= 10 and recorded.steps[0] == 0 and recorded.steps[-1] == n and len(apart) <= 1
    assert sum(revised for _, _, revised in recorded.frames[-1]) == min(count, 8)  # of steps that are left out too


def test_a_block_that_may_be_opened_again_has_not_ended():
    c = GPTConfig(model_type='diffusion', block_size=12, vocab_size=300, diffusion_block=4, n_layer=1, n_head=2, n_embd=8,
                  diffusion_objective='nelbo')
    eot, mask = 299, 300
    second = torch.tensor([[1, 2, 3, 4, 5, eot, 5, 5] + [mask] * 4])
    third = torch.tensor([[1, 2, 3, 4, 5, eot, 5, 5, 6, 6, 6, 6] + [mask] * 4])
    for remask, early in (('none', True), ('remdm-cap', False)):
        how = RefineConfig(strategy='ancestral', remask=remask)
        assert all_ended(second, c, how, 1, eot) == early and all_ended(third, c, how, 1, eot)
        assert not all_ended(third, c, how, 6, eot)


def test_without_a_terminal_it_is_plain_lines(capsys):
    player.play(recording(), Console(file=io.StringIO()))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ['==···', '==·##', '==##·', '==##~']
    assert '\x1b' not in ''.join(lines)


def test_the_page_holds_the_recording_and_loads_nothing(tmp_path):
    player.write_page(recording(), str(tmp_path / 'page.html'))
    page, data = (tmp_path / 'page.html').read_text(encoding='utf-8'), recording_in(tmp_path / 'page.html')
    assert data['passes'] == [0, 1, 2, 3] and data['frames'][1][4][0] == '<' and '"<"' not in page
    assert not re.search(r'src=|href=|url\(|@import|https?://', page)


@pytest.mark.skipif(not any(map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), reason='needs Chromium')
def test_the_page_plays_in_a_real_browser(tmp_path):
    """By hand elsewhere: open the page that --html wrote, in any browser."""
    player.write_page(recording(), str(tmp_path / 'page.html'))
    page = tmp_path / 'page.html'
    browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))))
    words = ['--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=9000', '--dump-dom']
    done = subprocess.run([browser, *words, f'file://{tmp_path}/page.html'], capture_output=True, text=True, timeout=60)
    assert 'step 3 of 3, 3 forward passes' in done.stdout, done.stderr
    cells = re.findall(r'<span class="([^"]*)"[^>]*>([^<]*)</span>', done.stdout.split('id="canvas"')[1])
    assert [text for _, text in cells[:5]] == ['a', 'b', '⏎', 'c', 'e']
    assert 'fixed' in cells[0][0] and 'revised' in cells[4][0] and '>Play<' in done.stdout
    by_hand = """<script>setTimeout(() => { at.value = 1; at.dispatchEvent(new Event('input'));
                 canvas.children[4].click(); }, 6000)</script></html>"""
    page.write_text(page.read_text(encoding='utf-8').replace('</html>', by_hand), encoding='utf-8')
    done = subprocess.run([browser, *words, f'file://{page}'], capture_output=True, text=True, timeout=60)
    assert 'step 1 of 3, 1 forward passes' in done.stdout
    history = re.search(r'id="history">([^<]*)<', done.stdout)[1].splitlines()
    assert history[0] == 'position 4' and [line.split()[2] for line in history[1:]] == ['[MASK]', '"&lt;"', '[MASK]', '"e"']


# ---------------------------------------------------------------------------------------------------------------------
# characters of several tokens, end-of-text inside a text, options without effect

def test_characters_of_several_tokens_are_shown_whole():
    word = 'ß日'.encode()
    tokens = [bytes([b]) for b in word]
    assert player.characters(tokens) == ['', 'ß', '', '', '日']
    assert ''.join(filter(None, player.characters([None, *tokens[1:3], None, tokens[4]]))) == ''
    assert player.characters([b'a', b'\xff', b'b', b'\xe6']) == ['a', '\ufffd', 'b', '\ufffd']
    assert player.characters([None, b'\x97', b'\xa5', b'x']) == [None, '', '', 'x']


def test_the_page_and_stdout_agree_on_characters(go, tmp_path):
    said = go('--template=Größe 日本 [MASK:8] é', f'--html={tmp_path}/p.html').out
    final = recording_in(tmp_path / 'p.html')['frames'][-1]
    assert ''.join(text for text, *_ in final) == said.rstrip('\n')


@pytest.mark.parametrize('kind', ['template', 'repair'])
def test_end_of_text_is_never_written_into_a_text(go, out_dir, tmp_path, monkeypatch, kind):
    """Of a model that would write nothing else."""
    def eager(*args):
        model = load_model(*args)
        with torch.no_grad():
            model.transformer.ln_f.weight.zero_()
            model.transformer.ln_f.bias.fill_(1)
            model.transformer.wte.weight[256] = 100
        return model
    monkeypatch.setattr(sample, 'load_model', eager)
    monkeypatch.setattr(generate_diffusion, 'flagged_tokens', lambda model, ids, threshold: ids == ord('x'))
    (tmp_path / 'a.txt').write_text('abxcd\nabx')
    said = go('--template=ab____cd') if kind == 'template' else go(f'--repair={tmp_path}/a.txt')
    assert '<|endoftext|>' not in said.out
    assert '<|endoftext|>' in go('--template=ab____').out  # a text may end where nothing is given any more


def test_options_without_effect_are_refused_and_more_steps_are_said(go):
    for words in (['--template=a___', '--ignore_eot'], ['--repair=a.txt', '--max_new_tokens=3'],
                  ['--repair=a.txt', '--animate']):
        with pytest.raises(UserError, match='no meaning for'):
            go(*words)
    assert '--block_length=4 took more than --max_steps=2' in go('--max_steps=2', '--block_length=4').err
    assert 'took more' not in go('--max_steps=5', '--block_length=4').err


def test_no_cursor_moves_in_a_pipe(go, monkeypatch):
    monkeypatch.setenv('FORCE_COLOR', '1')
    assert '\x1b[' not in go('--start=a', '--animate').out
