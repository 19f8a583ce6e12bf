"""
Builds a script's command line from its dataclasses: one field is one key, with its default, meaning and choices.

    cfg, *rest = configure(argv, TrainConfig, GPTConfig)

reads `config/x.py --key=value --other=value`. A config file is a plain Python file of assignments; the command line
overrides it; the dataclass holds the defaults. Whatever is wrong raises UserError, which `run` turns into one line on
stderr and exit code 2.
"""
import argparse
import difflib
import io
import math
import os
import re
import runpy
import sys
import time
import types
from dataclasses import MISSING, field, fields

# what PyTorch says where an allocation fails, or is larger than any memory
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|Storage size calculation overflowed|"
                           "Overflow when unpacking")
LIMIT = 2 ** 63  # of whole numbers: what a tensor can hold
OTHER_RANKS_WAIT = 5  # seconds before a rank but the first says what is wrong


class UserError(ValueError):
    """A mistake that the user can fix; the message says how. Scripts print it as one line and exit with 2."""


def option(default, help, choices=None, *, types=(), at_least=None, above=None, at_most=None, below=None, needs=None,
           words=(), items=None):
    """
    A dataclass field that is also a command-line key, with its one-line meaning and what it declares of itself:

    choices: its allowed values. at_least, above, at_most, below: its range; a number that has one must be finite.
    types: the model types that have it, one or several; in all others it must keep its default.
    needs: {another option: the value without which this one has no effect}.
    words: text that is one of these words or a number. items: int or float; text that is such numbers, comma between them.
    """
    bounds = {'at least': at_least, 'above': above, 'at most': at_most, 'below': below}
    return field(default=default, metadata={
        'help': help, 'choices': choices, 'words': words, 'items': items, 'needs': needs or {},
        'types': (types,) if isinstance(types, str) else types,
        'bounds': {word: bound for word, bound in bounds.items() if bound is not None}})


def check_options(config):
    """Raises UserError where a dataclass of options breaks what they declare of themselves."""
    declared = {f.name: f.metadata for f in fields(config)}
    for f in fields(config):
        name, value, rules = f.name, getattr(config, f.name), f.metadata
        if rules['types'] and config.model_type not in rules['types'] and value != f.default:
            raise UserError(f"{name} is an option of model_type {' and '.join(rules['types'])}, not of {config.model_type}")
        if rules['choices']:
            one_of(name, value, rules['choices'])
        for number in numbers_of(name, value, rules):
            check_range(name, number, rules['bounds'])
        for other, needed in rules['needs'].items():
            owners = declared[other]['types']
            applies = not owners or config.model_type in owners
            if value != f.default and applies and getattr(config, other) != needed:
                raise UserError(f'{name}={value} has no effect without {other}={needed}')


def numbers_of(name, value, rules):
    """The numbers in an option's value that have a range. Raises UserError where text is not the numbers it should be."""
    try:
        if rules['words']:
            return [] if value in rules['words'] else [float(value)]
        if rules['items']:
            return split_numbers(value, rules['items'])
    except ValueError:
        if rules['words']:
            raise UserError(f"{name}={value!r} is neither a number nor one of: {', '.join(rules['words'])}") from None
        kind = 'whole numbers' if rules['items'] is int else 'numbers'
        raise UserError(f'{name}={value!r} must be {kind}, separated by commas') from None
    return [value] if isinstance(value, (int, float)) and rules['bounds'] else []


def split_numbers(text, kind=int):
    """'1,2' -> (1, 2). Raises ValueError where there is none, or something else."""
    return tuple(kind(item) for item in text.split(','))


def check_range(name, value, bounds):
    """Raises UserError unless a number is finite and within bounds, which are named as in the message: {'at least': 0}."""
    within = {'at least': value >= bounds.get('at least', value), 'above': value > bounds.get('above', -math.inf),
              'at most': value <= bounds.get('at most', value), 'below': value < bounds.get('below', math.inf)}
    infinite = isinstance(value, float) and not math.isfinite(value)  # an int may be too large for isfinite
    if infinite or not all(within[word] for word in bounds):
        words = ' and '.join(f'{word} {bound}' for word, bound in bounds.items())
        raise UserError(f'{name}={value} must be {words}' + ', and finite' * isinstance(value, float))


def one_of(name, value, choices):
    """Returns `value`, or raises UserError listing the choices (the `else` of every if/elif on a choice)."""
    if value not in choices:
        raise UserError(f"{name}={value!r} is not one of: {', '.join(map(str, choices))}")
    return value


def parse(name, value, kind, choices=None, number_allowed=False):
    """Turns `value` (a string from the command line, or a value from a config file) into the type `kind`.

    An int is accepted where a float is asked for, '1e4' where an int is; 'true/false/1/0' for a bool; where
    `number_allowed`, a number for text."""
    try:
        if kind is bool:
            value = {'true': True, '1': True, 'false': False, '0': False}[str(value).lower()]
        elif kind is int:
            exact = isinstance(value, int) or isinstance(value, str) and value.lstrip('+-').isdigit()
            number = int(value) if exact else float(value)
            if isinstance(value, bool) or number != int(number) or abs(number) >= LIMIT:
                raise ValueError
            value = int(number)
        elif kind is float:
            if isinstance(value, bool):
                raise ValueError
            value = float(value)
        elif number_allowed and type(value) in (int, float):
            value = str(value)
        elif not isinstance(value, str) or '\0' in value:
            raise ValueError
    except (ValueError, KeyError, TypeError, OverflowError):
        expected = {bool: 'True or False', int: 'a whole number below 2**63', float: 'a number',
                    str: 'text in quotes, without NUL'}[kind]
        # Python refuses to write the digits of a very large number
        shown = 'a huge number' if type(value) is int and abs(value) >= LIMIT else repr(value)
        raise UserError(f'{name}={shown}: expected {expected}') from None
    return one_of(name, value, choices) if choices else value


def parse_option(f, value):
    """`parse` for a dataclass field that `option` made."""
    return parse(f.name, value, f.type, f.metadata['choices'], bool(f.metadata['words'] or f.metadata['items']))


def from_stored(cls, values, what):
    """An instance of a dataclass of options from values that were stored. Raises UserError on what this version does not
    know, and on values of a wrong type; `what` names them in the message."""
    known = {f.name: f for f in fields(cls)}
    unknown = set(values) - set(known)
    if unknown:
        raise UserError(f'{what} unknown here: {", ".join(sorted(map(str, unknown)))}')
    return build(values, cls)[0]


def unknown_key(name, known, where):
    if name in known:
        return UserError(f'in {where}: write --{name}=VALUE')
    shortened = [key for key in known if key.startswith(name) or ''.join(word[0] for word in key.split('_')) == name]
    near = (shortened or difflib.get_close_matches(name, known, n=1, cutoff=0.7))[:1]
    hint = f'the nearest known one is {near[0]!r} (--help lists them all)' if near else '--help lists all keys'
    return UserError(f'unknown key {name!r} in {where}; {hint}')


def read_config_file(path):
    """The assignments of a config file, as a dict. Imported modules, functions and _private names are not settings."""
    if not os.path.isfile(path):
        raise UserError(f"no config file {path!r}; a config file is given by its path, a setting as --key=value")
    try:
        settings = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        reason = ' '.join(f'{type(e).__name__}: {e}'.split())
        raise UserError(f'{path} is not a readable Python file: {reason}') from None
    return {k: v for k, v in settings.items()
            if not k.startswith('_') and not isinstance(v, types.ModuleType) and not callable(v)}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def _build_parser(classes, description, positional):
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    name, meaning = positional
    parser.add_argument(name, nargs='*', help=meaning)
    for cls in classes:
        group = parser.add_argument_group(cls.__name__)
        for f in fields(cls):
            choices = f.metadata['choices']
            owners = f"{', '.join(f.metadata['types'])}: " if f.metadata['types'] else ''
            text = owners + f.metadata['help'] + (f" ({', '.join(map(str, choices))})" if choices else '')
            default = '' if f.default is MISSING else f" [{f.default!r}]"
            flag = {'nargs': '?', 'const': 'True'} if f.type is bool else {}  # --animate alone is --animate=True
            group.add_argument(f'--{f.name}', metavar=f.type.__name__.upper(), default=argparse.SUPPRESS, **flag,
                               help=(text + default).replace('%', '%%'))
    return parser


def read_values(argv, *classes, description=None, positional=('config', 'config files, read in the order given')):
    """Reads `argv` -> {key: value} of what the files and the command line set, and the list of positionals.

    `positional` names the arguments that are not --key=value; with its default they are config files.
    Raises UserError for an unknown key (naming the nearest known one), a bad value or an unreadable file."""
    known = {f.name: f for cls in classes for f in fields(cls)}
    assert len(known) == sum(len(fields(cls)) for cls in classes), 'two dataclasses share a key'
    arguments, strangers = _build_parser(classes, description, positional).parse_known_intermixed_args(argv)
    if strangers:
        key = strangers[0].split('=')[0].lstrip('-')
        raise unknown_key(key, known, 'the command line')
    given = vars(arguments)
    words = given.pop(positional[0])
    values = {}
    for path in words if positional[0] == 'config' else []:
        for key, value in read_config_file(path).items():
            if key not in known:
                raise unknown_key(key, known, path)
            values.pop(key, None)  # the order is that in which keys were given last
            values[key] = value
    values = {key: value for key, value in values.items() if key not in given} | given
    return {key: parse_option(known[key], value) for key, value in values.items()}, words


def build(values, *classes):
    """One instance of each dataclass, of those of the `values` that are its fields. Raises UserError on a wrong type."""
    return [cls(**{f.name: parse_option(f, values[f.name]) for f in fields(cls) if f.name in values}) for cls in classes]


def configure(argv, *classes, **options):
    """`read_values` and `build` in one: the instances in the order of `classes`, and after them the positionals."""
    values, words = read_values(argv, *classes, **options)
    return *build(values, *classes), words


def mistake(error):
    """What a user can do about an exception, in one line; None where it is a fault of this code."""
    text = ' '.join(str(error).split('\n'))
    if isinstance(error, UserError):
        return text
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
        said = f' ({text[:150]})' * bool(text)
        return f'there is not enough memory: lower --batch_size, --block_size or the size of the model{said}'
    return None


def run(main):
    """Runs a script's `main(argv)`; a mistake becomes one line on stderr and exit code 2, Ctrl-C exits with 130."""
    name = os.path.basename(sys.argv[0])
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may be no Unicode
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # whoever read the output has had enough of it, `| head` say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        sys.exit(141)
    except Exception as e:
        line = mistake(e)
        if line is None:
            raise
        rank = os.environ.get('LOCAL_RANK', '0')
        if rank != '0':  # most mistakes are made by all ranks, and then the first one's line ends the others in the meantime
            time.sleep(OTHER_RANKS_WAIT)
        print(f'{name}: ' + f'rank {os.environ.get("RANK")}: ' * (rank != '0') + line, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
