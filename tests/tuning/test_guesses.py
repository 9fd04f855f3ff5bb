"""Runs with and without guesses in a tuning, and the choice between them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from flexgen import tune
from flexgen.demo import MODEL_DIR
from flexgen.demo.tasks import records
from flexgen.models import open_model
from flexgen.policy import Auto, Policy
from flexgen.predict.hardware import Hardware
from flexgen.predict.job import Job
from flexgen.predict.prediction import predict
from flexgen.results.report import Report
from flexgen.tuning import rounds as tuning
from flexgen.tuning.guesses import GuessRuns, run_guesses
from flexgen.tuning.rounds import Effort, Tuning
from flexgen.tuning.trial import predicted_trial
from flexgen.workload import Workload

OPENING = {"model": "demo", "weights": "checkpoint", "device": "cpu", "dtype": "float32", "progress": False}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Records with their answers, and then one whose answer is in the prompt."""
    few = [records(6, seed, ("lookup", "field")) for seed in range(4)]
    return ["".join(record.text for record in some[:-1]) + some[-1].prompt for some in few]


def report(tokens_s: float, guess: int, copied: float = 1.0) -> Report:
    """A report of 100 tokens."""
    spec, _ = open_model("opt-125m", "dummy")
    made = predict(
        spec, Policy(gpu_batch_size=10, guess=guess), Hardware.preset("t4"), Workload(8, 10, 10)
    ).report
    kept = round(90 - 90 / copied)
    return replace(made, prefill_s=0.0, decode_s=100 / tokens_s, guesses_made=kept, guesses_kept=kept)


@pytest.mark.parametrize(
    ("speeds", "best"),
    [
        ({0: 10.0, 4: 15.0, 8: 14.0}, 4),
        ({0: 10.0, 4: 10.1, 8: 9.0}, 0),
        ({0: 10.0, 4: 9.0}, 0),
        ({0: 10.0}, 0),
    ],
)
def test_guesses_are_chosen_if_they_are_clearly_faster(speeds: dict[int, float], best: int) -> None:
    runs = GuessRuns({guess: report(speed, guess) for guess, speed in speeds.items()})
    assert runs.best == runs.policy.guess == best


def test_words() -> None:
    runs = GuessRuns({0: report(10, 0), 4: report(15, 4, copied=2.0)})
    assert str(runs) == "10.00 tokens/s without guesses, 15.00 with up to 4 (2.00 tokens accepted a pass)"
    assert runs.to_dict()["4"] == {"tokens_s": pytest.approx(15), "copied": 2.0}


def test_runs_on_prompts(texts: list[str]) -> None:
    """The demo model continues with records like those in its prompt, so some of its text is copied."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    prompts = [tokenizer(text).input_ids for text in texts]
    found = run_guesses(OPENING, Policy(gpu_batch_size=4, guess=3), None, prompts, 24)
    assert list(found.runs) == [0, 4, 8]
    assert found.runs[0].copied == 1 < found.runs[4].copied
    assert {run.policy.guess for run in found.runs.values()} == {0, 4, 8}
    assert len({run.new_tokens for run in found.runs.values()}) == 1


def test_policies_that_cannot_guess(texts: list[str]) -> None:
    prompts = [[5, 6, 7]] * 2
    sparse = Policy(gpu_batch_size=2, attn_sparsity=0.5)
    assert list(run_guesses(OPENING, sparse, None, prompts, 4).runs) == [0]


@pytest.fixture
def guessed(monkeypatch: pytest.MonkeyPatch, nothing_is_measured: Any) -> list[Any]:
    """Trials that run nothing, and runs on prompts that are faster with guesses. Returns their arguments."""
    asked: list[Any] = []

    def run_trial(opening: Any, policy: Policy, order: Any, shape: Any, lanes: bool, seed: int) -> Report:
        spec, _ = open_model("demo", "dummy")
        job = Job.checked(spec, nothing_is_measured("cpu"), shape.workload, order=order)
        made = predicted_trial(job, policy, shape)
        return made if lanes else replace(made, phases={})

    def runs(opening: Any, policy: Policy, order: Any, prompts: Any, tokens: int) -> GuessRuns:
        asked.append((policy, prompts, tokens))
        return GuessRuns({0: report(10, 0), 4: report(25, 4, copied=3.0)})

    monkeypatch.setattr(tuning, "run_trial", run_trial)
    monkeypatch.setattr(tuning, "run_guesses", runs)
    return asked


def test_the_command_measures_guesses_on_the_prompts_of_a_file(
    guessed: list[Any], texts: list[str], tmp_path: Path, capsys: Any
) -> None:
    file, out, figures = tmp_path / "prompts.jsonl", tmp_path / "policy.toml", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    flags = "--model demo --device cpu --prompt-len 120 --gen-len 40 --num-prompts 6 --rounds 1 --top 1 --repeats 1"
    given = [*flags.split(), "--prompts", str(file), "-o", str(out), "--json", str(figures)]
    assert tune.main(given) == 0
    assert Policy.load(out).guess == 4
    assert "# On prompts of the job: 10.00 tokens/s without guesses, 25.00 with up to 4" in out.read_text()
    assert json.loads(figures.read_text())["guesses"]["4"]["copied"] == 3.0
    ((policy, prompts, tokens),) = guessed
    assert policy.guess == 0 and len(prompts) == min(policy.block_size, 6)
    assert prompts[0] == AutoTokenizer.from_pretrained(MODEL_DIR)(texts[0]).input_ids
    assert 16 <= tokens <= 40
    assert tune.main([*given, "--guess", "0"]) == 0
    assert len(guessed) == 1, "the flag decides"


def test_runs_are_short_where_the_whole_job_takes_long(guessed: list[Any], nothing_is_measured: Any) -> None:
    spec, _ = open_model("demo", "dummy")
    job = Job.checked(spec, nothing_is_measured("cpu"), Workload(8, 64, 2))
    for seconds, tokens in ((1e-9, 16), (1e9, 64)):
        own = Tuning(job, Auto(), Effort(top=1, rounds=1, repeats=1, trial_seconds=seconds), OPENING)
        own.run()
        own.try_guesses([[5, 6, 7]])
        _, prompts, ran = guessed[-1]
        assert ran == tokens and prompts == [[5, 6, 7]] * min(own.best.candidate.policy.block_size, 2)


@pytest.mark.parametrize("flags", ["--simulate-only --hardware t4", "--weights dummy"])
def test_prompts_need_the_text_of_the_model(flags: str, capsys: Any) -> None:
    assert tune.main(["--prompts", "none.txt", *flags.split()]) == 1
    assert "--prompts measures guesses in the text of the model" in capsys.readouterr().err


def test_an_invalid_prompt_is_named(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n')
    assert tune.main(["--prompts", str(file), "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert f"{file}, line 2: the tokenizer has no chat template" in err
