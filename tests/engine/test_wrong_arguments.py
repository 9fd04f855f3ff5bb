"""Whatever the type and size of an argument: a call serves it or says in a few words what it takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from flexgen import OptLM, Policy
from flexgen.errors import FlexGenError

MOST_OF_A_MESSAGE = 2000
IDS = [[5, 6, 7], [8, 9]]
VALUES: list[Any] = [
    None, True, -1, 1, 1.5, float("nan"), float("inf"), 10**30, 10**5000, 1e-320, "", "x", "\0", "a" * 100_000,
    [], [[]], [5], {}, {"a": 1}, (), object(), b"x", np.int64(3), np.float32(2), np.array([1, 2]), np.array(5),
    np.array([["a"]]), np.array([[1, 2]], dtype=object), torch.tensor(5), torch.tensor([[5, 6]]),
    torch.tensor([[5.5]]), [[5, "a"]], [[5, None]], [[5, [6]]], ["Hi", np.array(5)], range(3), iter([5]), len,
    Policy, [[10**30]], [[-1]], 1 + 2j,
]  # fmt: skip


def calls(lm: OptLM) -> dict[str, Callable[[Any], object]]:
    """What is done with a value, by the name of the argument."""
    sampling = ("do_sample", "temperature", "top_k", "top_p", "seed", "first_row")
    generate = (*sampling, "stop", "attention_mask", "debug_mode", "cut_gen_len", "verbose")

    def first(stream: Any) -> list[Any]:
        with stream:
            return [item for _, item in zip(range(2), stream, strict=False)]

    return {
        "inputs": lambda value: lm.generate(value, 2),
        "max_new_tokens": lambda value: lm.generate(IDS, value),
        **{name: lambda value, name=name: lm.generate(IDS, 2, **{name: value}) for name in generate},
        "ids of forward": lm.forward,
        "mask of forward": lambda value: lm.forward(IDS, value),
        "prompts of stream": lambda value: first(lm.stream(value, 2)),
        "stop of stream": lambda value: first(lm.stream(IDS, 2, stop=value)),
        "prompts of generate_text": lambda value: lm.generate_text(value, 2),
        "one prompt of generate_text": lambda value: lm.generate_text(["Hi", value], 2),
        "stop of generate_text": lambda value: lm.generate_text(["Hi"], 2, stop=value),
        "special_tokens": lambda value: lm.generate_text(["Hi"], 2, special_tokens=value),
        "prompt of stream_text": lambda value: first(lm.stream_text(value, 2)),
        "texts of score": lm.score,
        "rows of score": lambda value: lm.score(["Hi"], value),
    }


def refused_in_few_words(use: Callable[[Any], object], value: Any) -> None:
    try:
        use(value)
    except FlexGenError as error:
        assert 0 < len(str(error)) <= MOST_OF_A_MESSAGE


def test_a_call_takes_or_refuses_any_value(capsys: pytest.CaptureFixture[str]) -> None:
    with OptLM("demo", Policy(gpu_batch_size=2), device="cpu", progress=False) as lm:
        expected = lm.generate(IDS, 2)
        for (name, use), value in itertools.product(calls(lm).items(), VALUES):
            try:
                refused_in_few_words(use, value)
            except Exception as error:
                raise AssertionError(f"{name} = {type(value).__name__}") from error
        assert (lm.generate(IDS, 2) == expected).all()


@pytest.mark.parametrize(
    "name",
    ["policy", "workload", "device", "dtype", "offload_dir", "weights", "progress", "order", "num_layers", "hub",
     "max_memory"],
)  # fmt: skip
def test_opening_takes_or_refuses_any_value(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)  # a text is the path of an offload directory
    for value in VALUES:
        options: dict[str, Any] = {"policy": Policy(), "device": "cpu", "progress": False, name: value}
        refused_in_few_words(lambda value, options=options: OptLM("demo", **options).close(), value)
