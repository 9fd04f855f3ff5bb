"""Ctrl-C during the imports of a command."""

import argparse
import os
import signal
import subprocess
import sys

import pytest

from flexgen.__main__ import COMMANDS
from flexgen.cli.flags import run as run_command
from flexgen.cli.interrupts import _is_command

# Runs when the interpreter starts: Ctrl-C is pressed in the middle of importing torch, or the module PRESS_AT.
PRESS = """
import builtins, os, signal
imported = builtins.__import__
def importing(name, *args, **kwargs):
    if name == os.environ.get("PRESS_AT", "torch"):
        builtins.__import__ = imported
        os.kill(os.getpid(), signal.SIGINT)
    return imported(name, *args, **kwargs)
builtins.__import__ = importing
"""


@pytest.fixture
def run(tmp_path):
    """Runs Python's arguments with SIGINT at the import of torch."""
    (tmp_path / "sitecustomize.py").write_text(PRESS)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH")]))

    def start(*argv):
        return subprocess.run(
            [sys.executable, *argv], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
        )

    return start


@pytest.mark.parametrize("command", [f"flexgen.{name}" for name in COMMANDS])
def test_a_command_ends_with_the_status_of_an_interrupt(command, run, monkeypatch):
    done = run("-m", command, "--help")
    if done.returncode == 0:  # nothing was pressed: the command does not import torch
        monkeypatch.setenv("PRESS_AT", "flexgen.cli.help")
        done = run("-m", command, "--help")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_command_of_commands_does_too(run):
    done = run("-m", "flexgen", "bench", "--help")
    assert (done.returncode, done.stderr) == (130, "")


def test_options_of_the_interpreter_change_nothing(run):
    done = run("-W", "ignore", "-X", "utf8", "-m", "flexgen.bench", "--help")
    assert (done.returncode, done.stderr) == (130, "")


def test_an_interrupt_while_arguments_are_parsed(capsys):
    class Interrupted(argparse.ArgumentParser):
        def parse_args(self, *args):
            raise KeyboardInterrupt

    assert run_command(Interrupted(prog="flexgen x"), print, []) == 130
    assert capsys.readouterr().err == "flexgen x: interrupted\n"


def test_another_program_gets_its_exception(run):
    done = run("-c", "import flexgen; flexgen.OptLM")
    assert done.returncode == -signal.SIGINT and "KeyboardInterrupt" in done.stderr


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["python", "-m", "flexgen.bench", "--policy", "x"], True),
        (["python", "-W", "always", "-m", "flexllmgen.flex_opt"], True),
        (["python", "-X", "utf8", "-Werror", "-m", "flexgen"], True),
        (["python", "-u", "-m", "flexgen.batch"], True),
        (["python", "-um", "flexgen.batch"], True),
        (["python", "-uW", "ignore", "-mflexgen.batch"], True),
        (["python", "--check-hash-based-pycs", "always", "-m", "flexgen"], True),
        (["python", "-X", "flexgen", "script.py"], False),
        (["python", "-m", "pytest", "flexgen"], False),
        (["python", "-Bc", "import flexgen", "-m", "flexgen"], False),
        (["/venv/bin/python", "/venv/bin/flexgen", "bench"], True),
        (["python", "script.py", "-m", "flexgen.bench"], False),
        (["python", "-c", "import flexgen"], False),
        (["python"], False),
    ],
)
def test_commands_are_recognised(argv, command):
    assert _is_command(argv) is command
