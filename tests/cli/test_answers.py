"""The answers are complete after any interruption: none is lost, duplicated, truncated or at the wrong prompt."""

import errno
import json
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.cli.answers import Answers
from flexgen.errors import RequestError

ABOUT = {"prompts": "abc", "--seed": None}
RUN = {"policy": {}, "seed": 4}


def prompt(row):
    return {"prompt": f"number {row} é"}


def completion(row):
    return "é\n" * (row % 3)


def prompts(total):
    return [prompt(row) for row in range(total)]


def lines(total):
    answers = [prompt(row) | {"completion": completion(row)} for row in range(total)]
    return "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers).encode()


def resume(path, total, step, saves=1 << 30):
    """Run the job in a process that ends after some saves, and return the rows that it answered."""
    answered = []
    with Answers(path, ABOUT, prompts(total)) as answers:
        if not answers.complete:
            answers.begin(RUN)
        while not answers.complete and saves > 0:
            rows = range(answers.count, min(answers.count + step, total))
            answers.save([completion(row) for row in rows])
            answered.append(rows)
            saves -= 1
    return answered


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


def job_of(path):
    return path.with_name(path.name + ".job")


@given(
    total=st.integers(1, 12),
    cuts=st.lists(
        st.tuples(st.integers(1, 5), st.integers(0, 3), st.integers(0, 300), st.integers(0, 300)), max_size=4
    ),
)
def test_answers_are_complete_after_a_crash_at_any_point(total, cuts, tmp_path_factory):
    path = tmp_path_factory.mktemp("job") / "answers.jsonl"
    for step, saves, lost, lost_notes in cuts:
        resume(path, total, step, saves)
        kept, notes = path.read_bytes(), job_of(path).read_bytes()
        path.write_bytes(kept[: max(len(kept) - lost, 0)])
        head = notes.index(b"\n") + 1  # is replaced as a whole
        job_of(path).write_bytes(notes[: max(len(notes) - lost_notes, head)])
    resume(path, total, 2)
    assert path.read_bytes() == lines(total)


def test_saves_may_be_of_any_size(path):
    resume(path, 20, 3, saves=2)
    assert resume(path, 20, 5, saves=1) == [range(6, 11)]
    with path.open("ab") as file:
        file.write(lines(13)[len(lines(11)) :] + b'{"prompt": "number 13\0\0\0')
    assert resume(path, 20, 5)[0] == range(11, 16)
    assert path.read_bytes() == lines(20)


EDITS = {
    "a line is removed": (lambda rows: [*rows[:4], *rows[5:]], "line 5 is not the answer of its prompt", 4),
    "two lines are swapped": (
        lambda rows: [*rows[:4], rows[5], rows[4], *rows[6:]],
        "line 5 is not the answer of its prompt",
        4,
    ),
    "a line is doubled": (lambda rows: [*rows[:3], *rows[2:]], "line 4 is not the answer of its prompt", 3),
    "a prompt is edited": (
        lambda rows: [*rows[:5], rows[5].replace(b"number", b"Number"), *rows[6:]],
        "line 6 is not the answer of its prompt",
        5,
    ),
    "a completion is edited": (
        lambda rows: [*rows[:4], rows[4][:-4] + b'x"}\n', *rows[5:]],
        "one of the lines 4 to 6 was edited",
        3,
    ),
    "a line is added": (lambda rows: [*rows, b"more\n"], "line 10 is", 9),
    "an end is added": (lambda rows: [*rows, b"mo"], "line 10 is", 9),
}


@pytest.mark.parametrize("done", [9, 12], ids=["whole", "to be resumed"])
@pytest.mark.parametrize("edit", EDITS)
def test_edited_answers_are_refused_and_not_changed(edit, done, path):
    change, said, good = EDITS[edit]
    resume(path, done, 3, saves=3)
    before, notes = path.read_bytes(), job_of(path).read_bytes()
    edited = b"".join(change(before.splitlines(keepends=True)))
    path.write_bytes(edited)
    with pytest.raises(RequestError, match=said) as raised:
        Answers(path, ABOUT, prompts(done))
    assert (path.read_bytes(), job_of(path).read_bytes()) == (edited, notes)
    # The advice is right: with the first lines alone, the job continues.
    assert f"keep only its first {good} lines" in str(raised.value)
    path.write_bytes(b"".join(edited.splitlines(keepends=True)[:good]))
    resume(path, done, 3)
    assert path.read_bytes() == lines(done)


def test_the_same_prompt_twice_does_not_hide_an_edit(path):
    same = [{"prompt": "a"}] * 6
    with Answers(path, ABOUT, same) as answers:
        answers.begin(RUN)
        for n in range(3):
            answers.save([f"x{n}", f"y{n}"])
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([rows[1], rows[0], *rows[2:]]))
    with pytest.raises(RequestError, match="one of the lines 1 to 2 was edited"):
        Answers(path, ABOUT, same)


def test_one_process_at_a_time(path):
    with Answers(path, ABOUT, prompts(4)) as answers:
        answers.begin(RUN)
        with pytest.raises(RequestError, match="in use by another process"):
            Answers(path, ABOUT, prompts(4))
        answers.save([completion(0), completion(1)])
    assert resume(path, 4, 2) == [range(2, 4)]


def test_files_of_another_job_stay_as_they_are(path):
    path.write_text("not ours\n")
    with pytest.raises(
        RequestError, match=r"answers.jsonl.job, which records its job, does not; choose another output"
    ):
        Answers(path, ABOUT, prompts(4))
    assert path.read_text() == "not ours\n"
    path.unlink()
    resume(path, 4, 2, saves=1)
    for about, said in (
        ({"prompts": "other"}, "different value of: prompts"),
        ({"--seed": 3}, "different value of: --seed"),
    ):
        with pytest.raises(RequestError, match=said):
            Answers(path, ABOUT | about, prompts(4))
    with pytest.raises(RequestError, match="is damaged: it counts 2 answers for 1 prompts"):
        Answers(path, ABOUT, prompts(1))
    assert path.read_bytes() == lines(2)


def test_a_job_that_was_not_begun_leaves_no_file(path):
    with Answers(path, ABOUT, prompts(4)):
        assert path.exists()
    assert not path.exists()
    path.touch()
    with Answers(path, ABOUT, prompts(4)):
        pass
    assert path.exists()  # it was there before


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_only_a_regular_file_will_do(kind, path):
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(RequestError, match="is not a regular file"):
        Answers(path, ABOUT, prompts(4))


@pytest.mark.parametrize(("mode", "umask"), [(None, 0o000), (0o644, 0o077), (0o600, 0o277)])
def test_files_have_the_mode_that_is_asked_for(mode, umask, path):
    before = os.umask(umask)
    try:
        with Answers(path, ABOUT, prompts(4), *[] if mode is None else [mode]) as answers:
            answers.begin(RUN)
            answers.save([completion(0)])
    finally:
        os.umask(before)
    for file in (path, job_of(path)):
        assert stat.S_IMODE(file.stat().st_mode) == (0o600 if mode is None else mode)


def test_a_file_that_exists_keeps_its_mode(path):
    path.touch(0o640)
    path.chmod(0o640)
    resume(path, 4, 2)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "more", [20, 20 + len(lines(4)) - len(lines(2))], ids=["in an answer", "in its note"]
)
def test_a_full_disk_keeps_the_saved_answers(more, path, monkeypatch):
    write, room = os.pwrite, [more]

    def as_much_as_fits(fd, data, offset):
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(fd, data[: room[0]], offset)
        room[0] -= written
        return written

    with Answers(path, ABOUT, prompts(4)) as answers:
        answers.begin(RUN)
        answers.save([completion(0), completion(1)])
        notes = job_of(path).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", as_much_as_fits)
            with pytest.raises(
                OSError, match="No space left on device. 2 of 4 answers are saved; free some space"
            ):
                answers.save([completion(2), completion(3)])
        assert (path.read_bytes(), job_of(path).read_bytes()) == (lines(2), notes)
        answers.save([completion(2), completion(3)])
    assert path.read_bytes() == lines(4)
    with Answers(path, ABOUT, prompts(4)) as answers:
        assert answers.complete


def test_answers_are_valid_json(path):
    with Answers(path, ABOUT, [{"prompt": "a", "x": float("nan")}]) as answers:
        answers.begin(RUN)
        with pytest.raises(ValueError, match="not JSON compliant"):
            answers.save(["b"])
