"""A file of answers is whole however its process ended: nothing lost, doubled or in part."""

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.answers import Answers
from flexgen.errors import RequestError

ABOUT = {"prompts": "abc", "--seed": None}
RUN = {"policy": {}, "seed": 4}


def answer(row):
    return {"prompt": f"number {row}", "completion": "é\n" * (row % 3)}


def lines(total):
    return "".join(json.dumps(answer(row), ensure_ascii=False) + "\n" for row in range(total)).encode()


def go_on(path, total, step, saves=1 << 30):
    """Run the job, of which this process lives for so many saves; the rows that it answered."""
    answered = []
    with Answers(path, ABOUT, total) as answers:
        answers.begin(RUN, step)
        while not answers.complete and saves > 0:
            rows = range(answers.count, min(answers.count + step, total))
            answers.save([answer(row) for row in rows])
            answered.append(rows)
            saves -= 1
    return answered


@given(
    total=st.integers(1, 12),
    step=st.integers(1, 5),
    cuts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 300)), max_size=4),
)
def test_whatever_is_cut_off_is_answered_again_in_the_same_saves(total, step, cuts, tmp_path_factory):
    path = tmp_path_factory.mktemp("job") / "answers.jsonl"
    undisturbed = [range(n, min(n + step, total)) for n in range(0, total, step)]
    for saves, lost in cuts:
        answered = go_on(path, total, step, saves)
        assert all(rows in undisturbed for rows in answered)
        kept = path.read_bytes()
        path.write_bytes(kept[: max(len(kept) - lost, 0)])  # what a crash left of the last write
    answered = go_on(path, total, step)
    assert answered == undisturbed[len(undisturbed) - len(answered) :]
    assert path.read_bytes() == lines(total)


def test_a_job_may_go_on_with_saves_of_another_size(tmp_path):
    path = tmp_path / "answers.jsonl"
    go_on(path, 20, 3, saves=2)
    assert go_on(path, 20, 5, saves=1) == [range(6, 11)]
    with path.open("ab") as file:
        file.write(b'{"torn": 1}\n{"tor')
    assert go_on(path, 20, 5)[0] == range(11, 16)
    assert path.read_bytes() == lines(20)


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "answers.jsonl"
    with Answers(path, ABOUT, 4) as answers:
        answers.begin(RUN, 2)
        with pytest.raises(RequestError, match="written by another process"):
            Answers(path, ABOUT, 4)
        answers.save([answer(0), answer(1)])
    assert go_on(path, 4, 2) == [range(2, 4)]


def test_files_of_another_job_stay_as_they_are(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("not ours\n")
    with pytest.raises(RequestError, match=r"no answers.jsonl.job that says what for; name another output"):
        Answers(path, ABOUT, 4)
    assert path.read_text() == "not ours\n"
    path.unlink()
    go_on(path, 4, 2, saves=1)
    for about, said in (({"prompts": "other"}, "other prompts"), ({"--seed": 3}, "other --seed")):
        with pytest.raises(RequestError, match=said):
            Answers(path, ABOUT | about, 4)
    (tmp_path / "answers.jsonl.job").write_text('{"about": ')
    with pytest.raises(RequestError, match="is damaged"):
        Answers(path, ABOUT, 4)
    assert path.read_bytes() == lines(2)


def test_lines_that_someone_added_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    go_on(path, 4, 2)
    path.write_bytes(path.read_bytes() + b"more\n")
    with pytest.raises(RequestError, match="has 5 lines, where 0 to 4 were written"):
        Answers(path, ABOUT, 4)


def test_what_was_not_begun_leaves_no_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    with Answers(path, ABOUT, 4):
        assert path.exists()
    assert not path.exists()
    path.touch()
    with Answers(path, ABOUT, 4):
        pass
    assert path.exists()  # it was there before


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_only_a_plain_file_will_do(kind, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(RequestError, match="is no plain file"):
        Answers(path, ABOUT, 4)


def test_a_full_disk_keeps_what_was_saved(tmp_path, monkeypatch):
    path, write = tmp_path / "answers.jsonl", os.pwrite

    def half(fd, data, offset):
        if len(data) < 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[: len(data) // 2], offset)

    with Answers(path, ABOUT, 4) as answers:
        answers.begin(RUN, 2)
        answers.save([answer(0), answer(1)])
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", half)
            with pytest.raises(OSError, match="No space left on device. 2 of 4 are kept: make room"):
                answers.save([answer(2), answer(3)])
        assert path.read_bytes() == lines(2)
        answers.save([answer(2), answer(3)])
    assert path.read_bytes() == lines(4)
