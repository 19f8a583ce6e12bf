import re
from dataclasses import dataclass, fields

import pytest
from conftest import run_script

import train
from model import GPTConfig
from nanodrift import options
from nanodrift.options import UserError, build, configure, option, read_values


@dataclass
class Toy:
    size: int = option(3, 'how large')
    rate: float = option(0.5, 'how fast, up to 100%')
    on: bool = option(True, 'whether at all')
    name: str = option('x', 'what to call it')
    kind: str = option('a', 'which one', ('a', 'b'))


@pytest.fixture
def config_file(tmp_path):
    def write(text, name='config.py'):
        (tmp_path / name).write_text(text, encoding='utf-8')
        return str(tmp_path / name)
    return write


def toy(*argv):
    return configure(argv, Toy)[0]


def test_defaults():
    assert toy() == Toy()


@pytest.mark.parametrize('argument, value', [
    ('--rate=1', 1.0), ('--rate=1e-3', 1e-3), ('--size=1e4', 10000), ('--size=-2', -2), ('--size=2.0', 2),
    ('--size=9007199254740993', 2 ** 53 + 1),
    ('--on=False', False), ('--on', True), ('--on=true', True), ('--on=0', False), ('--on=1', True),
    ('--name=a=b=c', 'a=b=c'), ('--name=', ''), ('--name=1', '1'), ('--name=--size', '--size'), ('--kind=b', 'b'),
])
def test_values_on_the_command_line(argument, value):
    found = getattr(toy(argument), argument[2:].split('=')[0])
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize('line, value', [
    ('size = 5 * 8', 40), ('size = 1e4', 10000), ('size = 2 ** 53 + 1', 2 ** 53 + 1), ('rate = 1', 1.0),
    ('on = False', False), ('on = 1', True), ("name = 'a=b'", 'a=b'), ('import math; size = math.isqrt(49)', 7),
    ('from math import isqrt; size = isqrt(49)', 7), ('from fractions import Fraction; size = int(Fraction(7))', 7),
    ('_half = 4; size = 2 * _half', 8), ('def twice(x): return 2 * x\nsize = twice(4)', 8),
    ('size = sum(i for i in range(5))', 10), ("name = 'café'", 'café'),
])
def test_values_in_a_file(config_file, line, value):
    cfg = toy(config_file(line))
    found = {'s': cfg.size, 'r': cfg.rate, 'o': cfg.on, 'n': cfg.name}[re.search(r'(\w+) = [^;\n]*$', line)[1][0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize('argument', ['--size=1.5', '--size=nan', '--size=inf', '--size=x', '--size=', '--rate=fast',
                                      '--on=maybe', '--on=', '--kind=c', '--size'])
def test_bad_values_are_refused_by_name(argument):
    with pytest.raises(UserError, match=argument[2:].split('=')[0]):
        toy(argument)


@pytest.mark.parametrize('line', ['size = True', 'size = 1.5', "size = 'x'", 'size = None', 'rate = True', "on = 'maybe'",
                                  'on = 2', 'name = 1', "kind = 'c'"])
def test_bad_values_in_a_file_are_refused_by_name(config_file, line):
    with pytest.raises(UserError, match=line.split()[0]):
        toy(config_file(line))


def test_the_choices_are_listed():
    with pytest.raises(UserError, match='a, b'):
        toy('--kind=c')


@pytest.mark.parametrize('wrong, right', [('sise', 'size'), ('nam', 'name'), ('Kind', 'kind'), ('si', 'size')])
def test_an_unknown_key_names_the_nearest(config_file, wrong, right):
    with pytest.raises(UserError, match=f"'{wrong}'.*'{right}'"):
        toy(f'--{wrong}=1')
    path = config_file(f'{wrong} = 1')
    with pytest.raises(UserError, match=f"'{wrong}'.*{re.escape(path)}.*'{right}'"):
        toy(path)


def test_later_files_beat_earlier_ones_and_the_command_line_beats_files(config_file):
    one, two = config_file("size = 1\nname = 'one'\nrate = 1", 'one.py'), config_file("size = 2\nname = 'two'", 'two.py')
    assert toy(one, two, '--name=line') == Toy(size=2, name='line', rate=1.0)
    assert toy('--name=line', one, two) == Toy(size=2, name='line', rate=1.0)
    assert toy(one, '--name=line', two) == Toy(size=2, name='line', rate=1.0)


def test_given_defaults_stand_below_files_and_above_the_dataclass(config_file):
    values, _ = read_values([config_file('size = 7')], Toy)
    assert values == {'size': 7}
    assert build({'size': 5, 'name': 'given', 'of_another': 1} | values, Toy) == [Toy(size=7, name='given')]


@pytest.mark.parametrize('text', ['raise ValueError("no\\nno")', '1 / 0', 'size = = 3', 'import no_such_module',
                                  'raise SystemExit(0)'])
def test_a_file_that_does_not_run(config_file, text):
    path = config_file(text)
    with pytest.raises(UserError, match=re.escape(path)) as e:
        toy(path)
    assert '\n' not in str(e.value)


def test_a_missing_file():
    with pytest.raises(UserError, match='no_such_config.py'):
        toy('no_such_config.py')


def test_other_positionals_are_returned():
    cfg, words = configure(['one', '--size=4', 'two'], Toy, positional=('word', 'words'))
    assert cfg.size == 4 and words == ['one', 'two']


def test_run_turns_a_user_error_into_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['somewhere/toy.py', '--sise=3'])
    with pytest.raises(SystemExit) as e:
        options.run(lambda argv: toy(*argv))
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == '' and err.count('\n') == 1 and err.startswith('toy.py: ')


def test_help_shows_every_key_with_default_and_meaning():
    text = ' '.join(run_script('train.py', '--help').stdout.split())
    for cls in (train.TrainConfig, GPTConfig):
        for f in fields(cls):
            assert f.metadata['help'], f.name
            entry = re.search(rf'(?<!\[)--{f.name} (?:[A-Z]+|\[[A-Z]+\]) (.*?)(?= --\w|$)', text)[1]
            assert entry.startswith(f.metadata['help']) and f'[{f.default!r}]' in entry, f.name
            assert all(str(choice) in entry for choice in f.metadata['choices'] or ())


def test_mistakes_write_nothing(command_line, config_file, tmp_path, monkeypatch, capsys):
    broken = config_file('1 / 0', 'broken.py')
    mistakes = [['--bath_size=3'], ['--batch_size=x'], ['--batch_size=0'], ['--beta1=1'], ['--n_head=3'], [broken],
                ['--warmup_iters=3', '--warmup_ratio=0.1'], ['--warmup_iters=99'], ['--dataset=missing'],
                ['--block_size=100000'], ['--device=warp'], ['--learning_rate=nan'], ['--num_epochs=inf'],
                ['missing.py'], ['--init_from=missing'], ['--init_from=resume'], ['--model_type=gpt9'],
                ['--seed=1e30']]
    for mistake in mistakes:
        monkeypatch.setattr('sys.argv', ['train.py', *command_line(), *mistake])
        with pytest.raises(SystemExit) as e:
            options.run(lambda argv: train.train(*train.read_settings(argv)))
        out, err = capsys.readouterr()
        assert e.value.code == 2 and err.count('\n') == 1 and err.startswith('train.py: '), (mistake, err)
    assert not (tmp_path / 'run').exists()


def test_a_mistake_in_the_real_command(command_line, tmp_path):
    done = run_script('train.py', *command_line(), '--learning_rat=3', check=False)
    assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1
    assert "'learning_rate'" in done.stderr and not (tmp_path / 'run').exists()
