"""
Builds a script's command line from its dataclasses: one field is one key, with its default, meaning and choices.

    cfg, *rest = configure(argv, TrainConfig, GPTConfig)

reads `config/x.py --key=value --other=value`. A config file is a plain Python file of assignments; the command line
overrides it; the dataclass holds the defaults. Whatever is wrong raises UserError, which `run` turns into one line on
stderr and exit code 2.
"""
import argparse
import difflib
import os
import runpy
import sys
import types
from dataclasses import MISSING, field, fields


class UserError(ValueError):
    """A mistake that the user can mend; the message says how. Scripts print it as one line and exit with 2."""


def option(default, help, choices=None, numeric=False):
    """A dataclass field that is also a command-line key, with its one-line meaning and, maybe, its allowed values; `numeric`
    text may be given as a number."""
    return field(default=default, metadata={'help': help, 'choices': choices, 'numeric': numeric})


def one_of(name, value, choices):
    """Returns `value`, or raises UserError listing the choices (the `else` of every if/elif on a choice)."""
    if value not in choices:
        raise UserError(f"{name}={value!r} is not one of: {', '.join(map(str, choices))}")
    return value


def parse(name, value, kind, choices=None, numeric=False):
    """Turns `value` (a string from the command line, or a value from a config file) into the type `kind`.

    An int is accepted where a float is asked for, '1e4' where an int is; 'true/false/1/0' for a bool; where `numeric`,
    a number for text."""
    try:
        if kind is bool:
            value = {'true': True, '1': True, 'false': False, '0': False}[str(value).lower()]
        elif kind is int:
            exact = isinstance(value, int) or isinstance(value, str) and value.lstrip('+-').isdigit()
            number = int(value) if exact else float(value)
            if isinstance(value, bool) or number != int(number):
                raise ValueError
            value = int(number)
        elif kind is float:
            if isinstance(value, bool):
                raise ValueError
            value = float(value)
        elif numeric and type(value) in (int, float):
            value = str(value)
        elif not isinstance(value, str):
            raise ValueError
    except (ValueError, KeyError, TypeError, OverflowError):
        expected = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text in quotes'}[kind]
        raise UserError(f"{name}={value!r}: expected {expected}") from None
    return one_of(name, value, choices) if choices else value


def unknown_key(name, known, where):
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return UserError(f"unknown key {name!r} in {where}; the nearest known one is {near[0]!r} (--help lists them all)")


def read_config_file(path):
    """The assignments of a config file, as a dict. Imported modules, functions and _private names are not settings."""
    if not os.path.isfile(path):
        raise UserError(f"no config file {path!r}; a config file is given by its path, a setting as --key=value")
    try:
        found = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        reason = ' '.join(f'{type(e).__name__}: {e}'.split())
        raise UserError(f'{path} is not a readable Python file: {reason}') from None
    return {k: v for k, v in found.items()
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
            choices = f.metadata.get('choices')
            text = f.metadata.get('help', '') + (f" ({', '.join(map(str, choices))})" if choices else '')
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
            values[key] = value
    values.update(given)
    rules = {key: known[key].metadata for key in values}
    return {key: parse(key, value, known[key].type, rules[key].get('choices'), rules[key].get('numeric', False))
            for key, value in values.items()}, words


def build(values, *classes):
    """One instance of each dataclass, of those of the `values` that are its fields."""
    return [cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values}) for cls in classes]


def configure(argv, *classes, **options):
    """`read_values` and `build` in one: the instances in the order of `classes`, and after them the positionals."""
    values, words = read_values(argv, *classes, **options)
    return *build(values, *classes), words


def run(main):
    """Runs a script's `main(argv)`; a UserError becomes one line on stderr and exit code 2, Ctrl-C exits with 130."""
    name = os.path.basename(sys.argv[0])
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        if os.environ.get('LOCAL_RANK', '0') == '0':  # under torchrun once per machine, not once per rank
            print(f"{name}: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
