"""The help texts of all commands."""

import argparse
import importlib
import sys

import pytest

from flexgen.__main__ import COMMANDS, module_of
from flexgen.cli.help import HelpFormatter


@pytest.fixture
def parser_of(monkeypatch):
    """The parser with which a command reads its arguments, on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def capture(name):
        parsers = []

        def parse_args(parser, argv):
            parsers.append(parser)
            sys.exit()

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(SystemExit):
            importlib.import_module(f"flexgen.{module_of(name)}").main([])
        return parsers[0]

    return capture


def shown(parser, action):
    """The help of one option, as one line."""
    formatter = parser.formatter_class(prog=parser.prog)
    formatter.add_argument(action)
    return " ".join(formatter.format_help().split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns(name, parser_of):
    assert not [line for line in parser_of(name).format_help().splitlines() if len(line) > 80]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name, parser_of):
    assert not [action.dest for action in parser_of(name)._actions if not action.help]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_default(name, parser_of):
    parser = parser_of(name)
    valued = [action for action in parser._actions if action.nargs != 0 and action.default not in (None, [])]
    missing = [action.dest for action in valued if "(default: " not in shown(parser, action)]
    assert not missing


def test_the_default_that_is_shown_is_the_one_that_is_used():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    cases = [
        (dict(type=int, default=4, help="a count"), "a count (default: 4)"),
        (dict(nargs=2, default=[100, 0], help="two"), "two (default: 100 0)"),
        (dict(default="50%", help="a share"), "a share (default: 50%)"),
        (dict(default=0, help="a number"), "a number (default: 0)"),
        (dict(default="auto", help="a name (default: by the flags)"), "a name (default: by the flags)"),
        (dict(help="a file"), "a file"),
        (dict(action="append", default=[], help="a stop"), "a stop"),
        (dict(action="store_true", help="a switch"), "a switch"),
    ]
    for number, (kwargs, expected) in enumerate(cases):
        assert shown(parser, parser.add_argument(f"--option{number}", **kwargs)).endswith(expected)
