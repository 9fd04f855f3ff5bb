"""The common behaviour of all commands."""

import argparse
import os
import signal

import pytest

from flexgen.cli import flags
from flexgen.cli.sampling import add_sampling_flags


@pytest.fixture
def parser():
    made = argparse.ArgumentParser(prog="command")
    for flag in ("--json", "--save-hardware"):
        made.add_argument(flag, type=flags.OutputFile)
    return made


def test_a_file_that_cannot_be_written_is_refused_before_the_work(parser, tmp_path, capsys):
    def work(args):
        raise AssertionError("work was begun")

    for flag in ("--json", "--save-hardware"):
        missing = str(tmp_path / "nowhere" / "out")
        assert flags.run(parser, work, [flag, missing]) == 1
        assert f"{flag} {missing} cannot be written: No such file" in capsys.readouterr().err
        assert flags.run(parser, work, [flag, str(tmp_path)]) == 1
        assert f"{flag} {tmp_path} is a directory" in capsys.readouterr().err


def test_the_check_changes_no_file(parser, tmp_path):
    there, new = tmp_path / "there", tmp_path / "new"
    there.write_text("a line\n")
    assert flags.run(parser, lambda args: None, ["--json", str(there), "--save-hardware", str(new)]) == 0
    assert there.read_text() == "a line\n" and not new.exists()
    assert flags.run(parser, lambda args: None, ["--json", "-", "--save-hardware", "/dev/null"]) == 0


def test_sigterm_frees_the_resources_of_a_command(parser):
    freed = []

    def work(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            freed.append(True)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        flags.run(parser, work, [])
    assert ended.value.code == 143 and freed
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "²", "x"])
def test_a_count_is_refused_with_its_limit(text):
    with pytest.raises(argparse.ArgumentTypeError, match="whole number from 1 to"):
        flags.count(text)


@pytest.mark.parametrize(
    ("typed", "text"), [(r"\n", "\n"), (r"a\tb", "a\tb"), (r"\\n", r"\n"), ("\n", "\n"), (r"\d", r"\d")]
)
def test_escapes_from_a_shell_are_replaced(typed, text):
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser)
    assert parser.parse_args(["--stop", typed]).stop == [text]
