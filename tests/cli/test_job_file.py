"""A job file is read back unchanged, or refused."""

import json
import os

import pytest

from flexgen.cli.job_file import JobFile, JobState, Mark
from flexgen.errors import RequestError

MARKS = (Mark(2, 30, "ab"), Mark(5, 80, "cd"))
JOB = JobState({"prompts": "abc"}, {"seed": 4, "order": None}, MARKS)
HEAD = json.dumps({"about": {}, "run": {}}) + "\n"


@pytest.fixture
def file(tmp_path):
    return JobFile(tmp_path / "answers.jsonl.job", 0o600)


def test_it_is_read_as_it_was_written(file):
    assert file.read() is None
    file.write(JOB.up_to(2))
    assert file.read() == JobState(JOB.about, JOB.run, MARKS[:1])
    file.add(MARKS[1])
    file.close()
    assert file.read() == JOB
    assert JOB.up_to(4).marks == MARKS[:1] and JOB.up_to(0).marks == ()


def test_a_mark_that_a_crash_tore_is_left_out(file):
    file.write(JOB)
    file.close()
    whole = file.path.read_bytes()
    for lost in range(1, 40):
        file.path.write_bytes(whole[:-lost])
        found = file.read()
        assert found is not None and found.marks == MARKS[:1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"about": ',
        "[]\n",
        "3\n",
        "null\n",
        "{}\n",
        '{"about": [], "run": {}}\n',
        '{"about": {}, "run": null}\n',
        '{\n "about": {},\n "run": {},\n "save_every": 4,\n "first": 0\n}',  # an earlier version's
        HEAD + "3\n",
        HEAD + "{}\n",
        HEAD + '{"answers": 1, "nbytes": 2}\n',
        HEAD + '{"answers": 1, "nbytes": 2, "sha256": "", "more": 1}\n',
        HEAD + '{"answers": Infinity, "nbytes": 2, "sha256": ""}\n',
        HEAD + '{"answers": 1e400, "nbytes": 2, "sha256": ""}\n',
        HEAD + '{"answers": true, "nbytes": 2, "sha256": ""}\n',
        HEAD + '{"answers": 1, "nbytes": "2", "sha256": ""}\n',
        HEAD + '{"answers": 1, "nbytes": 2, "sha256": []}\n',
        HEAD + '{"answers": -1, "nbytes": 2, "sha256": ""}\n',
        HEAD + 2 * '{"answers": 1, "nbytes": 2, "sha256": ""}\n',
        HEAD + "\n",
        "[" * 100_000 + "\n",
        HEAD + '{"answers":' * 100_000 + "\n",
        HEAD + '{"answers": ' + "9" * 5000 + ', "nbytes": 2, "sha256": ""}\n',
        b"\xff\xfe\n",
        b"\0" * 64 + b"\n",
    ],
    ids=lambda text: repr(text[-50:]),
)
def test_a_damaged_file_is_refused(text, file):
    file.path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RequestError, match="is damaged or of another version .*remove it and answers.jsonl"):
        file.read()


def test_only_a_regular_file_will_do(file):
    os.mkfifo(file.path)
    with pytest.raises(RequestError, match="is not a regular file"):
        file.read()
