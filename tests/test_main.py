"""`flexgen COMMAND`."""

import importlib
import subprocess
import sys

import pytest

from flexgen import __main__
from flexgen.__main__ import COMMANDS, module_of


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed(argv, capsys):
    assert __main__.main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert max(map(len, out.splitlines())) <= 80


def test_an_unknown_command_is_refused_with_the_one_that_is_like_it(capsys):
    assert __main__.main(["benhc", "--model", "demo"]) == 2
    out, err = capsys.readouterr()
    assert "'benhc' is not a command (did you mean 'bench'?)" in err and not out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gets_the_arguments_behind_its_name(name, monkeypatch):
    given = []
    monkeypatch.setattr(
        importlib.import_module(f"flexgen.{module_of(name)}"), "main", lambda argv: given.append(argv) or 7
    )
    assert __main__.main([name, "--flag", "value"]) == 7
    assert given == [["--flag", "value"]]


def test_the_list_needs_no_torch():
    code = "import sys, flexgen.__main__ as m; m.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
