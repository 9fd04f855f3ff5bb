"""`python -m flexgen.complete`: only the completion on stdout, the rest on stderr, one line for an error."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import sys
import threading

import pytest

from flexgen import complete
from flexgen.demo import MODEL_DIR
from flexgen.engine.model import OptLM
from flexgen.policy import Policy
from flexgen.runtime.stream import Stream

PROMPT = "Date: 26 Apr 2019"
FLAGS = ["--device", "cpu", "--dtype", "float32", "--max-tokens", "12", "--gpu-batch-size", "1"]
FLAGS += ["--num-gpu-batches", "1", "--percent", "100", "0", "100", "0", "100", "0"]
BEST = [*FLAGS, "--temperature", "0"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def model():
    with OptLM("demo", Policy(gpu_batch_size=1), device="cpu", dtype="float32", progress=False) as lm:
        yield lm


@pytest.fixture(scope="module")
def completion(model):
    return model.generate_text([PROMPT], 12)[0]


@pytest.fixture
def typed(monkeypatch):
    """What stands on standard input: text, or bytes as they come through a pipe."""

    def stand(text):
        piped = isinstance(text, bytes)
        stdin = io.TextIOWrapper(io.BytesIO(text), encoding="utf-8") if piped else io.StringIO(text)
        monkeypatch.setattr(sys, "stdin", stdin)

    return stand


@pytest.fixture
def nothing_left(model):
    """No thread of a run stays behind."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Watched(io.TextIOWrapper):
    """A standard output of bytes that calls `seen` after each write."""

    def __init__(self, seen, file=None, encoding="utf-8"):
        super().__init__(file or io.BytesIO(), encoding=encoding)
        self._seen = seen

    def flush(self):
        super().flush()
        self._seen()


def test_the_completion_alone_is_on_stdout(completion, tmp_path, typed, capsys):
    typed("what is on stdin does not count where a prompt is given")
    assert complete.main([*BEST, "--prompt", PROMPT]) == 0
    assert capsys.readouterr().out == completion + "\n"
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT + "\n", encoding="utf-8")
    assert complete.main([*BEST, "--prompt-file", str(path)]) == 0
    assert capsys.readouterr().out == completion + "\n"
    typed(PROMPT + "\n")
    assert complete.main(BEST) == 0
    assert capsys.readouterr().out == completion + "\n"


def test_a_prompt_file_of_another_editor_means_the_same(tmp_path, typed, capsys):
    path = tmp_path / "prompt.txt"
    made = []
    for content in (b"Weight: 3 t\nUnit: kg\n", b"\xef\xbb\xbfWeight: 3 t\r\nUnit: kg\r\n"):
        path.write_bytes(content)
        assert complete.main([*BEST, "--prompt-file", str(path)]) == 0
        made.append(capsys.readouterr().out)
        typed(content.decode())
        assert complete.main(BEST) == 0
        made.append(capsys.readouterr().out)
    assert len(set(made)) == 1


def test_the_number_of_tokens_is_max_tokens(model, capsys):
    assert complete.main([*BEST, "--prompt", PROMPT, "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out == model.generate_text([PROMPT], 3)[0] + "\n"


def test_a_stop_ends_it(completion, capsys):
    stop = completion[3:5]
    assert complete.main([*BEST, "--prompt", PROMPT, "--stop", "never", "--stop", stop]) == 0
    assert capsys.readouterr().out == completion.partition(stop)[0] + "\n"


def test_a_seed_repeats_the_sampling(model, capsys):
    flags = ["--prompt", PROMPT, "--temperature", "1.3", "--top-k", "40", "--top-p", "0.9", "--seed", "5"]
    drawn = dict(do_sample=True, temperature=1.3, top_k=40, top_p=0.9, seed=5)
    assert complete.main([*FLAGS, *flags]) == 0
    assert capsys.readouterr().out == model.generate_text([PROMPT], 12, **drawn)[0] + "\n"


@pytest.mark.parametrize("flags", [["--top-k", "1"], ["--top-p", "1e-6"]])
def test_the_best_alone_may_be_left_to_draw_from(flags, completion, capsys):
    assert complete.main([*FLAGS, "--prompt", PROMPT, "--temperature", "5", *flags]) == 0
    assert capsys.readouterr().out == completion + "\n"


def test_pieces_are_shown_as_they_are_made(completion, monkeypatch):
    class Seen(io.StringIO):
        pieces = []

        def flush(self):
            self.pieces.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Seen())
    assert complete.main([*BEST, "--prompt", PROMPT]) == 0
    assert len(set(Seen.pieces)) > 3 and Seen.pieces[-1] == completion + "\n"
    assert all(completion.startswith(seen) for seen in Seen.pieces[:-1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "nowhere/at/all", "--prompt", "a"], "no such directory"),
        ([], "there is no prompt: give --prompt TEXT"),
        (["--prompt", "a", "--prompt-file", "b"], "give one of them"),
        (["--prompt", "a", "--interactive"], "leave --prompt"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", "word " * 600], "positions of demo"),
        (["--prompt", "a", "--max-tokens", "600"], "at most 5"),
        (["--prompt", "a", "--max-tokens", "0"], "--max-tokens is 0"),
        (["--prompt", "a", "--max-tokens", "-4"], "--max-tokens is -4"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "a", "--top-k", "-1"], "top_k is -1"),
        (["--prompt", "a", "--top-p", "2"], "top_p is 2"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1"),
        (["--prompt", "a", "--seed", str(1 << 64)], "seed is 18446744073709551616"),
        (["--prompt", "a", "--stop", ""], "stop contains ''"),
        (["--prompt", "a\udcff"], "not valid Unicode at character 1"),
        (["--prompt", "a", "--device", "tpu"], "device 'tpu' is not known"),
        (["--prompt", "a", "--dtype", "int3"], "int3"),
        (["--prompt", "a", "--policy", "nowhere.toml"], "nowhere.toml"),
    ],
)
@pytest.mark.parametrize("stdin", [io.StringIO, Terminal])
def test_bad_input_is_one_clear_line(flags, said, stdin, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", stdin())
    assert complete.main([*FLAGS, *flags]) == 1
    out, err = capsys.readouterr()
    assert not out and said in err and len(err.strip().splitlines()) == 1


def test_prompts_that_are_no_text(tmp_path, typed, capsys):
    path = tmp_path / "prompt.txt"
    for content, said in ((b"", "is empty"), (b"\n", "is empty"), (b"caf\xe9", "is not UTF-8 text: byte 3")):
        path.write_bytes(content)
        assert complete.main([*FLAGS, "--prompt-file", str(path)]) == 1
        assert f"prompt.txt {said}" in capsys.readouterr().err
    assert complete.main([*FLAGS, "--prompt-file", str(tmp_path)]) == 1
    assert "directory" in capsys.readouterr().err
    for content, said in (
        (b"\n", "there is no prompt"),
        (b"caf\xe9", "standard input is not UTF-8 text: byte 3"),
    ):
        typed(content)
        assert complete.main(FLAGS) == 1
        assert said in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_refused_before_weights_are_loaded(monkeypatch, capsys):
    monkeypatch.setattr(OptLM, "__init__", lambda *args, **options: pytest.fail("it was opened"))
    assert complete.main([*FLAGS, "--prompt", "word " * 600]) == 1
    assert "positions" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--prompt", PROMPT], ["--interactive"]])
@pytest.mark.parametrize("pieces", [0, 2])
def test_a_reader_that_leaves_is_no_error(flags, pieces, nothing_left, typed, monkeypatch, capsys):
    read, write = os.pipe()
    shown = []

    def leave():
        shown.append(1)
        if len(shown) == pieces:
            os.close(read)

    if not pieces:
        os.close(read)
    typed(f"{PROMPT}\n{PROMPT}\n")
    with Watched(leave, open(write, "wb")) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert complete.main([*BEST, *flags]) == 0
    assert "Error" not in (err := capsys.readouterr().err) and err.count(">>>") <= 1


@pytest.mark.parametrize("flags", [["--prompt", PROMPT], ["--interactive"]])
def test_a_full_disk_is_one_clear_line(flags, typed, monkeypatch, capsys):
    typed(f"{PROMPT}\n{PROMPT}\n")
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert complete.main([*BEST, *flags]) == 1
    assert "No space left" in (last := capsys.readouterr().err.splitlines()[-1]) and "complete: " in last


@pytest.mark.parametrize(
    ("stream", "flags", "said"),
    [
        ("stdout", ["--prompt", "a"], "standard output is closed"),
        ("stdout", ["--interactive"], "standard output is closed"),
        ("stdin", ["--interactive"], "standard input is closed"),
        ("stdin", [], "there is no prompt"),
    ],
)
def test_streams_that_are_closed(stream, flags, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, stream, None)
    assert complete.main([*BEST, *flags]) == 1
    assert said in (err := capsys.readouterr().err) and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("flags", [["--prompt", "a"], ["--interactive"]])
def test_a_model_without_tokenizer_is_refused_before_weights_are_loaded(flags, tmp_path, monkeypatch, capsys):
    shutil.copytree(MODEL_DIR, tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    monkeypatch.setattr(OptLM, "__init__", lambda *args, **options: pytest.fail("it was opened"))
    assert complete.main([*FLAGS, "--model", str(tmp_path / "bare"), *flags]) == 1
    assert "bare has no tokenizer" in (err := capsys.readouterr().err) and len(err.splitlines()) == 1


def test_characters_that_a_terminal_cannot_show_are_replaced(monkeypatch):
    pieces = "caf", "é", " 日本"
    pieces_stream = Stream(lambda writer: [writer.put(piece) for piece in pieces])
    monkeypatch.setattr(OptLM, "stream_text", lambda *args, **options: pieces_stream)
    stdout = Watched(lambda: None, encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert complete.main([*BEST, "--prompt", PROMPT]) == 0
    assert stdout.buffer.getvalue() == "café ??\n".encode("latin-1")


@pytest.fixture
def press(monkeypatch):
    """`press()` sends Ctrl-C once, after three pieces. Returns the contents of standard output after each piece."""

    def start():
        shown = []

        def show():
            shown.append(stdout.buffer.getvalue().decode())
            if len(shown) == 3:
                signal.raise_signal(signal.SIGINT)

        stdout = Watched(show)
        monkeypatch.setattr(sys, "stdout", stdout)
        return shown

    return start


def test_ctrl_c_in_the_middle_of_a_completion(nothing_left, completion, press, capsys):
    pressed = press()
    assert complete.main([*BEST, "--prompt", PROMPT]) == 130
    assert completion.startswith(pressed[-1]) and len(pressed[-1]) < len(completion)
    assert capsys.readouterr().err.endswith("python -m flexgen.complete: interrupted\n")


def test_ctrl_c_ends_an_answer_and_the_next_line_is_answered(nothing_left, completion, press, typed, capsys):
    pressed = press()
    typed(f"{PROMPT}\n{PROMPT}\n")
    assert complete.main([*BEST, "--interactive"]) == 0
    first = pressed[2]
    assert completion.startswith(first) and len(first) < len(completion)
    assert pressed[-1] == first + completion + "\n"
    err = capsys.readouterr().err
    assert "answer stopped;" in err and err.endswith("\nbye\n")


# At a prompt


def test_lines_are_answered_one_after_another(completion, typed, capsys):
    typed(f"{PROMPT}\n\n   \n/reset\n{PROMPT}")
    assert complete.main([*BEST, "--interactive"]) == 0
    out, err = capsys.readouterr()
    assert out == (completion + "\n") * 2
    assert err.count(">>> ") == 6 and "there is no conversation" in err and err.endswith("bye\n")


def test_an_invalid_line_is_reported_and_the_next_one_is_read(completion, typed, capsys):
    typed(b"word " * 600 + b"\ncaf\xe9\n" + PROMPT.encode())
    assert complete.main([*BEST, "--interactive"]) == 0
    out, err = capsys.readouterr()
    assert (
        out == completion + "\n" and "positions of demo" in err and "not valid Unicode at character 3" in err
    )


def test_ctrl_c_at_a_line_drops_it_and_twice_leaves(monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, "a line", KeyboardInterrupt, KeyboardInterrupt, "never read"])

    def read():
        if (line := next(typed)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    answered = []
    monkeypatch.setattr(complete, "_read_line", read)
    monkeypatch.setattr(complete, "_answer", lambda *args: answered.append(args))
    assert complete.main([*BEST, "--interactive"]) == 0
    assert len(answered) == 1 and next(typed) == "never read"
    err = capsys.readouterr().err
    assert err.count("press Ctrl-C again or Ctrl-D to exit") == 2 and err.endswith("\nbye\n")


def test_at_a_terminal(completion, monkeypatch, capsys):
    ours, theirs = pty.openpty()
    os.write(ours, f"{PROMPT}\n\x04".encode())
    with open(theirs, encoding="utf-8") as stdin, open(os.dup(theirs), "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", stdout)
        assert complete.main([*BEST, "--interactive"]) == 0
        shown, expected = b"", f">>> {completion}\n".replace("\n", "\r\n").encode()
        while (
            expected not in shown and select.select([ours], [], [], 30)[0]
        ):  # a terminal passes on part after part
            shown += os.read(ours, 10_000)
    os.close(ours)
    assert expected in shown
    assert capsys.readouterr().err.endswith("\nbye\n")


def test_a_conversation(tmp_path, typed, monkeypatch, capsys):
    directory = tmp_path / "chat"
    shutil.copytree(MODEL_DIR, directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    asked = []
    answer = complete._answer

    def listening(lm, ids, args):
        asked.append(lm.tokenizer.decode(ids))
        return answer(lm, ids, args)

    monkeypatch.setattr(complete, "_answer", listening)
    typed("ab\ncd\n" + "word " * 600 + "\n/reset\nef\n")
    assert complete.main([*BEST, "--model", str(directory), "--interactive"]) == 0
    out, err = capsys.readouterr()
    first = "[user] ab\n[assistant]"
    assert asked[0] == first
    reply = asked[1].removeprefix(f"{first} ").removesuffix("\n[user] cd\n[assistant]")
    assert out.startswith(reply + "\n"), "the answer is a part of the second prompt"
    assert " positions of " in err and "(/reset clears the conversation)" in err
    assert asked[3] == "[user] ef\n[assistant]"
    assert "a new conversation" in err
