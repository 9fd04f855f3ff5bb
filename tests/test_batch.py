"""`python -m flexgen.batch`: an answer for each prompt, in order, after any interruption."""

import json
import random
import re
import shutil
import signal
import stat
import subprocess
import sys

import pytest
from hypothesis import settings
from piece_sizes import piece_sizes

from flexgen import batch
from flexgen.cli.answers import Answers
from flexgen.demo import MODEL_DIR
from flexgen.engine.model import OptLM
from flexgen.runtime.prompts import Prompts

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
    return batch.main([*map(str, job), *FLAGS, *block, *map(str, flags)])


def run_of(job):
    """How the job says that it was run."""
    return json.loads(job[1].with_name("answers.jsonl.job").read_text().splitlines()[0])["run"]


class Ended(Exception):
    """The process, at this point."""


@pytest.fixture
def ends_in_save(monkeypatch):
    """`ends_in_save(n)`: the process ends just before its n-th save."""
    save = Answers.save

    def arm(saves):
        left = iter(range(saves - 1))

        def counted(*args, **options):
            if next(left, None) is None:
                raise Ended
            return save(*args, **options)

        monkeypatch.setattr(Answers, "save", counted)

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


OPTIONS = [
    {"max_tokens": 9, "temperature": 0},
    {},
    {"temperature": 0.5, "top_k": 5, "seed": 3},
    {"max_tokens": 1},
    {"temperature": 2, "top_p": 0.9},
    {"stop": "1", "max_tokens": 20},
    {"stop": ["2", "t"], "temperature": 0},
]


def test_a_prompt_may_have_its_own_options(job, tmp_path, ends_in_save):
    """Each answer is that of a call with these options for all prompts, also after an interruption."""
    lines = [{"prompt": text, "options": own} for text, own in zip(PROMPTS, OPTIONS, strict=True)]
    job[0].write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = []
    with OptLM("demo", batch.Policy(), device="cpu", dtype="float32", progress=False) as model:
        for row, own in enumerate(OPTIONS):
            sampling = {"temperature": 1.0, "seed": 7} | own
            length, stop = sampling.pop("max_tokens", 6), sampling.pop("stop", "7")
            drawn = sampling["temperature"] > 0
            expected += model.generate_text(
                [PROMPTS[row]], length, stop=stop, do_sample=drawn, first_row=row, **sampling
            )
    ends_in_save(3)
    with pytest.raises(Ended):
        start(job, "--stop", "7")
    ends_in_save(100)
    assert start(job, "--stop", "7") == 0
    found = [json.loads(line) for line in job[1].read_text().splitlines()]
    assert [line["options"] for line in found] == OPTIONS
    assert [line["completion"] for line in found] == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ('{"temprature": 1}', "option 'temprature' is not known; .*did you mean 'temperature'"),
        ("[1]", r"options are \[1\]; they must be an object"),
        ('{"max_tokens": 0}', "max_tokens is 0; it must be a whole number >= 1"),
        ('{"max_tokens": 600}', "600 more are requested: .* exceed the 512 positions"),
        ('{"temperature": -1}', "temperature is -1"),
        ('{"temperature": true}', "temperature is True; it must be a number"),
        ('{"top_p": 0}', "top_p is 0"),
        ('{"top_k": 1.5}', "top_k is 1.5"),
        ('{"seed": -1}', "seed is -1"),
        ('{"stop": ""}', "stop contains ''"),
        ('{"stop": 3}', "stop is 3"),
    ],
)
def test_options_that_are_wrong_are_refused_with_their_line(options, said, tmp_path, capsys):
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(f'{{"prompt": "a"}}\n{{"prompt": "b", "options": {options}}}\n')
    assert start((prompts, answers)) == 1
    message = capsys.readouterr().err
    assert "prompts.jsonl, line 2: " in message
    assert re.search(said, message)
    assert not answers.exists()


def test_lines_of_a_text_file_are_prompts(tmp_path):
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_bytes(b"Date: 26 Apr 2019\r\nLength:\x0b 4 km\n")
    assert start((prompts, answers), "--temperature", "0") == 0
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["prompt"] for line in found] == ["Date: 26 Apr 2019", "Length:\x0b 4 km"]


@pytest.mark.parametrize("saves", [1, 2, 3])
def test_a_job_that_was_cut_off_resumes_to_the_same_answers(saves, job, tmp_path, ends_in_save):
    whole = tmp_path / "whole.jsonl"
    assert start((job[0], whole)) == 0
    ends_in_save(saves)
    with pytest.raises(Ended):
        start(job)
    assert 2 * (saves - 1) <= job[1].read_text().count("\n") < len(PROMPTS)
    ends_in_save(100)
    assert start(job) == 0
    assert job[1].read_text() == whole.read_text()


OTHER_WAYS = {
    "larger saves": (["--save-every", "3"], BLOCK),
    "one block": (["--save-every", "1"], ["--gpu-batch-size", "7", *BLOCK[2:]]),
    "several batches": (
        ["--save-every", "2"],
        ["--gpu-batch-size", "1", "--num-gpu-batches", "3", *BLOCK[4:]],
    ),
    "offloaded": (["--device", "emulated"], [*BLOCK[:4], "--percent", "0", "100", "0", "100", "0", "100"]),
    "another order": (["--order", "normal"], BLOCK),
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_samples_are_the_same_however_the_job_runs(way, job, tmp_path, ends_in_save):
    flags, block = OTHER_WAYS[way]
    whole = tmp_path / "whole.jsonl"
    assert start((job[0], whole)) == 0
    assert start(job, *flags, block=block) == 0
    assert job[1].read_bytes() == whole.read_bytes()
    # Cut off in one way, and resumed in the other.
    mixed = job[0], tmp_path / "mixed.jsonl"
    ends_in_save(2)
    with pytest.raises(Ended):
        start(mixed)
    ends_in_save(100)
    assert start(mixed, *flags, block=block) == 0
    assert mixed[1].read_bytes() == whole.read_bytes()


def test_rows_that_wait_for_cache_keep_their_answers(tmp_path, ends_in_save, monkeypatch):
    job = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    job[0].write_text("".join(f"Length: {n} km\n" for n in range(20, 30)))
    waited, put_back = [], Prompts.put_back

    def counted(self, rows, *args):
        waited.extend(rows)
        put_back(self, rows, *args)

    monkeypatch.setattr(Prompts, "put_back", counted)
    whole, block = tmp_path / "whole.jsonl", ["--gpu-batch-size", "1", "--num-gpu-batches", "8", *BLOCK[4:]]
    with piece_sizes(memory_page_tokens=2):
        assert start((job[0], whole), block=block) == 0 and not waited
        ends_in_save(2)
        with pytest.raises(Ended):
            start(job, "--reserve-new", 1, block=block)
        ends_in_save(100)
        assert start(job, "--reserve-new", 1, block=block) == 0 and waited
    assert job[1].read_bytes() == whole.read_bytes()


def test_equal_prompts_draw_each_for_itself(tmp_path):
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("A\n" * 6)
    assert start((prompts, answers), "--temperature", "2") == 0
    assert len(set(answers.read_text().splitlines())) == 6


def test_answers_that_were_edited_are_refused(job, ends_in_save, capsys):
    ends_in_save(3)
    with pytest.raises(Ended):
        start(job)
    rows = job[1].read_text().splitlines(keepends=True)
    job[1].write_text("".join([rows[1], rows[0], *rows[2:]]))
    ends_in_save(100)
    assert start(job) == 1
    assert "line 1 is not the answer of its prompt" in capsys.readouterr().err
    job[1].write_text("".join(rows))
    assert start(job) == 0


def test_a_chat_is_answered_as_its_template_says(tmp_path, capsys):
    directory = tmp_path / "chat"
    shutil.copytree(MODEL_DIR, directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
    )
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    prompts, answers = tmp_path / "prompts.json", tmp_path / "answers.jsonl"
    chat = [{"role": "system", "content": "Weight: 3 t"}, {"role": "user", "content": "Unit: kg"}]
    prompts.write_text(json.dumps([{"id": 1, "messages": chat}, {"prompt": "é"}]))
    flags = ["--temperature", "0", "--model", str(directory)]
    assert start((prompts, answers), *flags) == 0
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    with OptLM(
        directory, batch.Policy(gpu_batch_size=2), device="cpu", dtype="float32", progress=False
    ) as model:
        rendered = model.tokenizer("Weight: 3 t\nUnit: kg\nAnswer:", add_special_tokens=False).input_ids
        texts = model.generate_text([rendered, "é"], 6)
    assert found == [
        {"id": 1, "messages": chat, "completion": texts[0]},
        {"prompt": "é", "completion": texts[1]},
    ]
    prompts.write_text(json.dumps(["a", {"messages": [{"role": "tool", "content": "a"}]}], indent=0))
    assert start((prompts, tmp_path / "other.jsonl"), *flags) == 1
    assert (
        "prompts.json, line 3: the tokenizer's chat template failed: no tools. Give only messages"
        in capsys.readouterr().err
    )


def test_special_tokens_can_be_left_out(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Weight: 3 t\n")
    asked = []
    for flags in ([], ["--no-special-tokens"]):
        args = batch.make_parser().parse_args([str(prompts), "answers.jsonl", *flags])
        asked.append(batch.read_job(args).ids[0])
    assert asked[0] == [*asked[0][: len(asked[0]) - len(asked[1])], *asked[1]] and len(asked[0]) > len(
        asked[1]
    )


def test_answers_are_for_their_owner_alone_unless_asked_otherwise(job, tmp_path, capsys):
    assert start(job) == 0
    shared = tmp_path / "shared.jsonl"
    assert start((job[0], shared), "--file-mode", "644") == 0
    for path, mode in ((job[1], 0o600), (shared, 0o644)):
        for file in (path, path.with_name(path.name + ".job")):
            assert stat.S_IMODE(file.stat().st_mode) == mode
    for wrong in ("8", "444", "7777", "rw", "-1"):
        with pytest.raises(SystemExit):
            start(job, f"--file-mode={wrong}")
        assert "is not a mode; write three octal digits" in capsys.readouterr().err


def test_a_resumed_job_keeps_its_seed_and_policy(job, ends_in_save, capsys):
    flags = ["--device", "cpu", "--max-tokens", "6", "--gpu-batch-size", "2", "--save-every", "1"]
    ends_in_save(2)
    with pytest.raises(Ended):
        batch.main([*map(str, job), *flags])
    said = run_of(job)
    assert "policy: " in capsys.readouterr().err
    ends_in_save(100)
    assert batch.main([*map(str, job), *flags]) == 0
    assert run_of(job) == said
    assert "policy: " not in capsys.readouterr().err  # no search


def test_a_job_that_is_done_is_left_alone(job, capsys, monkeypatch):
    assert start(job) == 0
    before = job[1].read_bytes()
    monkeypatch.setattr(batch, "OptLM", None)
    assert start(job) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert job[1].read_bytes() == before


def test_another_policy_may_resume(job, ends_in_save, capsys):
    ends_in_save(2)
    with pytest.raises(Ended):
        start(job, "--temperature", "0")
    ends_in_save(100)
    assert start(job, "--temperature", "0", block=["--gpu-batch-size", "3", *BLOCK[2:]]) == 0
    assert "the policy has changed" in capsys.readouterr().err
    assert [json.loads(line)["id"] for line in job[1].read_text().splitlines()] == list(range(7))


def test_a_changed_job_is_refused(job, ends_in_save, capsys):
    ends_in_save(2)
    with pytest.raises(Ended):
        start(job)
    before = job[1].read_bytes()
    assert start(job, "--max-tokens", "5") == 1
    assert (
        "answers.jsonl was begun with a different value of: --max-tokens. Choose another output"
        in capsys.readouterr().err
    )
    job[0].write_text(job[0].read_text().replace("3 May", "4 May"))
    assert start(job) == 1
    assert "was begun with a different value of: prompts, tokens of the prompts" in capsys.readouterr().err
    assert job[1].read_bytes() == before


def test_a_copy_of_the_model_resumes_and_another_model_is_refused(job, tmp_path, ends_in_save, capsys):
    model = tmp_path / "model"
    shutil.copytree(MODEL_DIR, model)
    ends_in_save(2)
    with pytest.raises(Ended):
        start(job, "--model", model)
    before = job[1].read_bytes()
    weights = model / "model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    assert start(job, "--model", model) == 1
    assert (
        "was begun with a different value of: weights or configuration of the model"
        in capsys.readouterr().err
    )
    assert job[1].read_bytes() == before
    weights.write_bytes(right)
    ends_in_save(100)
    assert start(job, "--model", model.rename(tmp_path / "moved")) == 0
    assert [json.loads(line)["id"] for line in job[1].read_text().splitlines()] == list(range(7))


DAMAGED_RUNS = {
    "no policy": lambda run: run.pop("policy"),
    "a policy that is a number": lambda run: run.update(policy=3),
    "a policy of other fields": lambda run: run.update(policy={"weigths": 3}),
    "a policy beyond floats": lambda run: run["policy"].update(attn_sparsity=float("inf")),
    "a deep policy": lambda run: run["policy"].update(weights=[[[[]]]]),
    "no order": lambda run: run.pop("order"),
    "an unknown order": lambda run: run.update(order="zigzag"),
    "an order that is a list": lambda run: run.update(order=[]),
    "no seed": lambda run: run.update(seed=None),
    "a fractional seed": lambda run: run.update(seed=0.5),
    "an infinite seed": lambda run: run.update(seed=float("inf")),
    "a seed beyond 64 bits": lambda run: run.update(seed=1 << 64),
}


@pytest.mark.parametrize("case", DAMAGED_RUNS)
def test_a_job_file_that_is_damaged_is_refused(case, job, ends_in_save, capsys):
    ends_in_save(2)
    with pytest.raises(Ended):
        start(job)
    path = job[1].with_name("answers.jsonl.job")
    head, *marks = path.read_text().splitlines(keepends=True)
    state = json.loads(head)
    DAMAGED_RUNS[case](state["run"])
    path.write_text("".join([json.dumps(state) + "\n", *marks]))
    before = job[1].read_bytes()
    assert start(job) == 1
    assert f"{path} is damaged (" in capsys.readouterr().err
    assert job[1].read_bytes() == before


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", b"", "a.txt is empty; give a file with at least one prompt"),
        ("a.txt", b"one\n" + b"word " * 600, "exceed the 512 positions of demo. Shorten the prompt"),
        ("a.json", b'["a",\n' + b'"word' + b" word" * 600 + b'"]', "a.json, line 2: the prompt has"),
        ("a.jsonl", b'{"prompt": "a"}\n\n', "a.jsonl, line 2: the line is blank"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', "line 1: message 0 of a chat is"),
    ],
)
def test_an_invalid_prompt_is_refused_with_its_line(name, text, said, tmp_path, capsys):
    prompts, answers = tmp_path / name, tmp_path / "answers.jsonl"
    prompts.write_bytes(text)
    assert start((prompts, answers)) == 1
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [prompts]


def test_invalid_flags_leave_no_answers(job, tmp_path, capsys):
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


def kills():
    """The number of kills: few in a normal run, 20 with `--hypothesis-profile=explore`."""
    return 20 if settings.get_current_profile_name() == "explore" else 2


def test_a_job_that_is_killed_at_random_moments_resumes_to_the_same_answers(tmp_path, capsys):
    """Answers end early at a stop string, so prompts enter while others run, and answers are saved in between."""
    texts = [f"Weight: {n}.5 t\nUnit: {('kg', 'g', 't')[n % 3]}\nAnswer:" for n in range(120)]
    prompts, whole, killed = (tmp_path / name for name in ("prompts.json", "whole.jsonl", "killed.jsonl"))
    prompts.write_text(json.dumps(texts))
    flags = [
        *("--dtype", "float32", "--device", "emulated:link=128MiB", "--max-tokens", "24", "--stop", "1"),
        *("--temperature", "1.5", "--seed", "3", "--save-every", "1", "--gpu-batch-size", "2"),
        *("--num-gpu-batches", "3", "--percent", "0", "100", "100", "0", "100", "0"),
    ]
    rng = random.Random(kills())
    deaths = 0
    while deaths < kills():
        job = [sys.executable, "-m", "flexgen.batch", prompts, killed, *flags]
        with subprocess.Popen([*map(str, job)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            for _ in range(rng.randrange(1, 4)):  # saves
                process.stderr.readline()
            try:
                process.wait(rng.uniform(0, 0.3))
            except subprocess.TimeoutExpired:
                process.kill()
            process.stderr.read()
        deaths += process.returncode == -signal.SIGKILL
        if process.returncode == 0:  # it was done: the next kills are those of a new job
            killed.unlink()
            killed.with_name(killed.name + ".job").unlink()
    assert batch.main([str(prompts), str(killed), *flags]) == 0
    assert batch.main([str(prompts), str(whole), *flags]) == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert len(whole.read_text().splitlines()) == len(texts)
