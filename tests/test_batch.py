"""`python -m flexgen.batch`: an answer for each line, in order, whatever ends the command in between."""

import json

import pytest

from flexgen import batch
from flexgen.engine import OptLM

BLOCK = ["--gpu-batch-size", "2", "--num-gpu-batches", "1", "--percent", "100", "0", "100", "0", "100", "0"]
FLAGS = ["--device", "cpu", "--dtype", "float32", "--max-tokens", "6", "--seed", "7", "--save-every", "1"]
PROMPTS = [
    "Date: 26 Apr 2019",
    "Weight: 3 t\nUnit: kg\nAnswer:",
    "é",
    "Date: 3 May",
    "Length: 4 km",
    "A",
    "BC",
]


@pytest.fixture
def job(tmp_path):
    """The prompts' file, with a field of its own in each line, and the path of the answers."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"id": n, "prompt": text}) + "\n" for n, text in enumerate(PROMPTS))
    )
    return prompts, tmp_path / "answers.jsonl"


def start(job, *flags, block=BLOCK):
    return batch.main([*map(str, job), *FLAGS, *block, *flags])


class Ended(Exception):
    """The process, at this point."""


@pytest.fixture
def ends_in_call(monkeypatch):
    """`ends_in_call(n)`: the n-th call of a model is the last thing that the process does."""
    generate = OptLM.generate_text

    def arm(calls):
        left = iter(range(calls - 1))

        def counted(*args, **options):
            if next(left, None) is None:
                raise Ended
            return generate(*args, **options)

        monkeypatch.setattr(OptLM, "generate_text", counted)

    yield arm


def test_every_line_has_its_completion_in_order(job, capsys):
    assert start(job, "--temperature", "0") == 0
    assert "7 prompts answered" in capsys.readouterr().out
    found = [json.loads(line) for line in job[1].read_text().splitlines()]
    assert [(line["id"], line["prompt"]) for line in found] == list(enumerate(PROMPTS))
    with OptLM(
        "demo", batch.Policy(gpu_batch_size=2), device="cpu", dtype="float32", progress=False
    ) as model:
        assert [line["completion"] for line in found] == model.generate_text(PROMPTS, 6)


def test_lines_of_a_text_file_are_prompts(tmp_path):
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_bytes(b"Date: 26 Apr 2019\r\nLength:\x0b 4 km\n")
    assert start((prompts, answers), "--temperature", "0") == 0
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["prompt"] for line in found] == ["Date: 26 Apr 2019", "Length:\x0b 4 km"]


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_a_job_that_was_cut_off_goes_on_to_the_same_answers(calls, job, tmp_path, ends_in_call):
    whole = tmp_path / "whole.jsonl"
    assert start((job[0], whole)) == 0
    ends_in_call(calls)
    with pytest.raises(Ended):
        start(job)
    assert job[1].read_text().count("\n") == 2 * (calls - 1)
    ends_in_call(100)
    assert start(job) == 0
    assert job[1].read_text() == whole.read_text()


def test_what_was_drawn_and_searched_stays_without_a_seed_or_policy(job, ends_in_call, capsys):
    flags = ["--device", "cpu", "--max-tokens", "6", "--gpu-batch-size", "2", "--save-every", "1"]
    ends_in_call(2)
    with pytest.raises(Ended):
        batch.main([*map(str, job), *flags])
    said = json.loads(job[1].with_name("answers.jsonl.job").read_text())["run"]
    assert "policy: " in capsys.readouterr().err
    ends_in_call(100)
    assert batch.main([*map(str, job), *flags]) == 0
    assert json.loads(job[1].with_name("answers.jsonl.job").read_text())["run"] == said
    assert "policy: " not in capsys.readouterr().err  # no search


def test_a_job_that_is_done_is_left_alone(job, capsys, monkeypatch):
    assert start(job) == 0
    before = job[1].read_bytes()
    monkeypatch.setattr(batch, "OptLM", None)
    assert start(job) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert job[1].read_bytes() == before


def test_another_policy_may_go_on(job, ends_in_call, capsys):
    ends_in_call(2)
    with pytest.raises(Ended):
        start(job, "--temperature", "0")
    ends_in_call(100)
    assert start(job, "--temperature", "0", block=["--gpu-batch-size", "3", *BLOCK[2:]]) == 0
    assert "the policy is another one from here on" in capsys.readouterr().err
    assert [json.loads(line)["id"] for line in job[1].read_text().splitlines()] == list(range(7))


def test_what_changed_meanwhile_is_refused(job, ends_in_call, capsys):
    ends_in_call(2)
    with pytest.raises(Ended):
        start(job)
    before = job[1].read_bytes()
    assert start(job, "--max-tokens", "5") == 1
    assert "answers.jsonl was begun with other --max-tokens. Name another output" in capsys.readouterr().err
    job[0].write_text(job[0].read_text().replace("3 May", "4 May"))
    assert start(job) == 1
    assert "was begun with other prompts, tokens of the prompts" in capsys.readouterr().err
    assert job[1].read_bytes() == before


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", b"", "a.txt is empty; write a prompt into each line"),
        ("a.txt", b"one\n\ntwo\n", "a.txt, line 2: the line is empty"),
        ("a.txt", b"one\n\xff\n", "a.txt is not UTF-8 text: byte 4"),
        ("a.txt", b"one\n" + b"word " * 600, "exceed the 512 positions of demo. Shorten the prompt"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n', 'line 1: a line must be an object with a text: {"prompt"'),
        ("a.jsonl", b'["a"]\n', "line 1: a line must be an object"),
        ("a.jsonl", b'{"prompt": 3}\n', "line 1: a line must be an object with a text"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n', "the field 'completion' is there already"),
        ("a.jsonl", b'{"prompt": "a", "x": "\\ud800"}\n', "line 1: a text is not valid Unicode"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_line(name, text, said, tmp_path, capsys):
    prompts, answers = tmp_path / name, tmp_path / "answers.jsonl"
    prompts.write_bytes(text)
    assert start((prompts, answers)) == 1
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [prompts]


def test_what_cannot_be_meant_leaves_no_answers(job, tmp_path, capsys):
    for flags, said in (
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--device", "tpu"], "device 'tpu' is not known"),
        (["--policy", "nowhere.toml"], "nowhere.toml"),
        (["--temperature", "-1"], "temperature is -1"),
    ):
        assert start(job, *flags) == 1
        assert said in capsys.readouterr().err
        assert not job[1].exists()
    assert batch.main([str(tmp_path / "nowhere.txt"), str(job[1])]) == 1
    assert "nowhere.txt" in capsys.readouterr().err
