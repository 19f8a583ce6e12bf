"""Options: from the command line and from config files, what they declare of themselves, and the errors they raise."""
import re
from dataclasses import dataclass, fields

import pytest
from conftest import run_script

import train
from model import GPTConfig
from nanodrift import options
from nanodrift.options import UserError, build, check_options, configure, from_stored, option, read_values


@dataclass
class Toy:
    size: int = option(3, 'how large')
    rate: float = option(0.5, 'how fast, up to 100%')
    on: bool = option(True, 'whether at all')
    name: str = option('x', 'what to call it')
    kind: str = option('a', 'which one', ('a', 'b'))


@dataclass
class Rules:
    """Everything that an option can declare of itself."""
    model_type: str = option('plain', 'which type', ('plain', 'fancy', 'other'))
    count: int = option(1, 'how many', at_least=1)
    limit: int = option(0, 'how many at most', at_least=0, below=2 ** 63)
    share: float = option(0.5, 'how much of it', at_least=0, below=1)
    scale: float = option(1.0, 'how large', above=0, at_most=2)
    form: str = option('round', 'in which form', ('round', 'flat'), types='fancy')
    time: str = option('auto', 'how long', types=('fancy', 'other'), words=('auto', 'learned'), at_least=0.1)
    least: float = option(0.2, 'how long at least', types='fancy', at_least=0, needs={'time': 'learned'})
    noise: float = option(0.0, 'how much noise', at_least=0, needs={'form': 'flat'})
    steps: str = option('1,2', 'how many steps, each', items=int, at_least=1)
    rates: str = option('0.1,0.3', 'how fast, each', items=float, above=0)

    def __post_init__(self):
        check_options(self)


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
def test_bad_values_are_rejected_by_name(argument):
    with pytest.raises(UserError, match=argument[2:].split('=')[0]):
        toy(argument)


@pytest.mark.parametrize('line', ['size = True', 'size = 1.5', "size = 'x'", 'size = None', 'rate = True', "on = 'maybe'",
                                  'on = 2', 'name = 1', "kind = 'c'"])
def test_bad_values_in_a_file_are_rejected_by_name(config_file, line):
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


@pytest.mark.parametrize('argument, hint', [('--lr=1', "is 'learning_rate'"), ('--nodes=2', 'config; --help lists all keys'),
                                            ('-max_iters=2', 'write --max_iters=VALUE')])
def test_a_key_that_is_near_no_other_is_compared_with_none(tmp_path, argument, hint):
    with pytest.raises(UserError) as e:
        train.read_settings([argument])
    assert hint.replace('config', 'the command line') in str(e.value)


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


# ---------------------------------------------------------------------------------------------------------------------
# what options declare of themselves

@pytest.mark.parametrize('values', [
    {}, {'share': 0.0}, {'share': 0.999}, {'scale': 1e-30}, {'scale': 2.0}, {'count': 10 ** 400}, {'limit': 2 ** 63 - 1},
    {'steps': '7'}, {'rates': '1e-9,5'}, {'model_type': 'fancy', 'form': 'flat'}, {'model_type': 'fancy', 'time': '0.1'},
    {'model_type': 'other', 'time': 'learned'}, {'model_type': 'fancy', 'time': 'learned', 'least': 0.0},
    {'model_type': 'fancy', 'form': 'flat', 'noise': 1.0},
    {'noise': 1.0},  # what it needs is no option of this type
])
def test_what_options_declare_allows(values):
    assert {name: getattr(Rules(**values), name) for name in values} == values


@pytest.mark.parametrize('values, message', [
    ({'count': 0}, 'count=0 must be at least 1'),
    ({'limit': -1}, f'limit=-1 must be at least 0 and below {2 ** 63}'),
    ({'limit': 2 ** 63}, f'limit={2 ** 63} must be at least 0 and below {2 ** 63}'),
    ({'limit': 10 ** 400}, f'limit={10 ** 400} must be at least 0 and below {2 ** 63}'),
    ({'share': 1.0}, 'share=1.0 must be at least 0 and below 1, and finite'),
    ({'share': -1e-9}, 'share=-1e-09 must be at least 0 and below 1, and finite'),
    ({'share': float('nan')}, 'share=nan must be at least 0 and below 1, and finite'),
    ({'scale': 0.0}, 'scale=0.0 must be above 0 and at most 2, and finite'),
    ({'scale': 2.1}, 'scale=2.1 must be above 0 and at most 2, and finite'),
    ({'scale': float('-inf')}, 'scale=-inf must be above 0 and at most 2, and finite'),
    ({'noise': float('inf')}, 'noise=inf must be at least 0, and finite'),
    ({'model_type': 'strange'}, "model_type='strange' is not one of: plain, fancy, other"),
    ({'form': 'flat'}, 'form is an option of model_type fancy, not of plain'),
    ({'model_type': 'other', 'form': 'flat'}, 'form is an option of model_type fancy, not of other'),
    ({'time': 'learned'}, 'time is an option of model_type fancy and other, not of plain'),
    ({'model_type': 'fancy', 'form': 'oval'}, "form='oval' is not one of: round, flat"),
    ({'model_type': 'fancy', 'time': 'long'}, "time='long' is neither a number nor one of: auto, learned"),
    ({'model_type': 'fancy', 'time': '0.05'}, 'time=0.05 must be at least 0.1, and finite'),
    ({'model_type': 'fancy', 'time': 'inf'}, 'time=inf must be at least 0.1, and finite'),
    ({'model_type': 'fancy', 'least': 0.1}, 'least=0.1 has no effect without time=learned'),
    ({'model_type': 'fancy', 'noise': 0.1}, 'noise=0.1 has no effect without form=flat'),
    ({'steps': '1,x'}, "steps='1,x' must be whole numbers, separated by commas"),
    ({'steps': '1.5'}, "steps='1.5' must be whole numbers, separated by commas"),
    ({'steps': ''}, "steps='' must be whole numbers, separated by commas"),
    ({'steps': '2,0'}, 'steps=0 must be at least 1'),
    ({'rates': '1;2'}, "rates='1;2' must be numbers, separated by commas"),
    ({'rates': '1,'}, "rates='1,' must be numbers, separated by commas"),
    ({'rates': '1,0'}, 'rates=0.0 must be above 0, and finite'),
    ({'rates': '1,nan'}, 'rates=nan must be above 0, and finite'),
])
def test_what_options_declare_forbids(values, message):
    with pytest.raises(UserError) as e:
        Rules(**values)
    assert str(e.value) == message


@pytest.mark.parametrize('words, name, value', [
    (['--time=3', '--model_type=other'], 'time', '3'), (['--steps=4'], 'steps', '4'), (['--rates=2,3'], 'rates', '2,3')])
def test_numbers_in_text_from_the_command_line(words, name, value):
    assert getattr(configure(words, Rules)[0], name) == value


@pytest.mark.parametrize('line, name, value', [
    ("time = 3; model_type = 'other'", 'time', '3'), ('steps = 4', 'steps', '4'), ('rates = 0.25', 'rates', '0.25')])
def test_a_number_in_a_file_where_text_may_be_one(config_file, line, name, value):
    assert getattr(configure([config_file(line)], Rules)[0], name) == value


def test_stored_values_are_checked_as_those_of_the_command_line():
    assert from_stored(Rules, {'count': 3, 'share': 0.25}, 'here are values') == Rules(count=3, share=0.25)
    with pytest.raises(UserError, match='^here are values unknown here: a, b$'):
        from_stored(Rules, {'b': 1, 'count': 3, 'a': 2}, 'here are values')
    for wrong in ({'count': 'three'}, {'count': [3]}, {'share': None}, {'form': {}}, {'count': 0}, {'time': []}):
        with pytest.raises(UserError, match=f'^{next(iter(wrong))}='):
            from_stored(Rules, wrong, 'here are values')


# ---------------------------------------------------------------------------------------------------------------------
# the scripts

def test_help_shows_every_key_with_default_meaning_and_types():
    text = ' '.join(run_script('train.py', '--help').stdout.split())
    for cls in (train.TrainConfig, GPTConfig):
        for f in fields(cls):
            assert f.metadata['help'], f.name
            entry = re.search(rf'(?<!\[)--{f.name} (?:[A-Z]+|\[[A-Z]+\]) (.*?)(?= --\w|$)', text)[1]
            owners = ', '.join(f.metadata['types']) + ': ' if f.metadata['types'] else ''
            assert entry.startswith(owners + f.metadata['help']) and f'[{f.default!r}]' in entry, f.name
            assert all(str(choice) in entry for choice in f.metadata['choices'] or ())


def test_mistakes_write_nothing(command_line, config_file, tmp_path, monkeypatch, capsys):
    broken = config_file('1 / 0', 'broken.py')
    mistakes = [['--bath_size=3'], ['--batch_size=x'], ['--batch_size=0'], ['--beta1=1'], ['--n_head=3'], [broken],
                ['--warmup_iters=3', '--warmup_ratio=0.1'], ['--warmup_iters=99'], ['--dataset=missing'],
                ['--block_size=100000'], ['--device=warp'], ['--learning_rate=nan'], ['--num_epochs=inf'],
                ['missing.py'], ['--init_from=missing'], ['--init_from=resume'], ['--model_type=gpt9'],
                ['--seed=1e30'], ['--seed=' + '9' * 400]]
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
