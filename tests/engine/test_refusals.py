"""What cannot be served is refused with its numbers, before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexgen.engine.model import OptLM
from flexgen.errors import CapacityError, FlexGenError, RequestError
from flexgen.policy import Policy

ROW = [5, 6, 7]
NAN = float("nan")


@pytest.fixture(scope="module")
def lm(tiny: Any, mixed: Any) -> Iterator[OptLM]:
    with OptLM(tiny("opt").directory, mixed(), device="emulated", progress=False) as opened:
        yield opened


@pytest.fixture
def refused(lm: OptLM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`refused(use, "64", "0 to 63")`: `use(lm)` raises RequestError with these words and starts nothing."""

    def no_work(*args: Any) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr("flexgen.engine.model.Call", no_work)

    def check(use: Callable[[OptLM], object], *words: str) -> None:
        with pytest.raises(RequestError) as raised:
            use(lm)
        assert isinstance(raised.value, ValueError)
        for word in words:
            assert word in str(raised.value)
        assert lm.stats is None

    return check


PROMPTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "none at all": ([], ("no prompts",)),
    "an array of none": (np.zeros((0, 4), dtype=int), ("no prompts",)),
    "an empty one": ([ROW, []], ("prompt 1", "empty")),
    "an array of empty ones": (np.zeros((2, 0), dtype=int), ("prompt 0", "empty")),
    "only padding": (np.array([ROW, [1, 1, 1]]), ("prompt 1", "empty")),
    "an id too large": ([ROW, [5, 64]], ("prompt 1", "64", "0 to 63")),
    "a negative id": ([[5, -1]], ("prompt 0", "-1", "0 to 63")),
    "an id too large for a machine word": ([[5, 2**64]], ("prompt 0",)),
    "a text": ("hello", ("str",)),
    "texts": (["hello", "you"], ("prompt 0", "hello")),
    "bytes": ([b"hello"], ("prompt 0",)),
    "a list of ids": (ROW, ("prompt 0", "list of ids")),
    "an array of ids": (np.array(ROW), ("(3,)", "(prompts, prompt_len)")),
    "a third dimension": (np.zeros((1, 2, 3), dtype=int), ("(1, 2, 3)",)),
    "lists too deep": ([[[5], [6]]], ("prompt 0",)),
    "lists of uneven depth": ([[[5], [6, 7]]], ("prompt 0",)),
    "floats": ([[5.0, 6.0]], ("prompt 0", "float64")),
    "an array of floats": (np.ones((1, 2)), ("float64", "whole numbers")),
    "a tensor of bfloat16": (torch.ones(1, 2, dtype=torch.bfloat16), ("bfloat16", "whole numbers")),
    "booleans": ([[True, False]], ("bool",)),
    "nothing": (None, ("NoneType",)),
    "a number": (5, ("int",)),
    "a dict": ({"input_ids": [ROW]}, ("dict",)),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(case: str, refused: Any) -> None:
    inputs, words = PROMPTS[case]
    refused(lambda lm: lm.generate(inputs, 4), *words)
    refused(lambda lm: lm.forward(inputs), *words)


MASK_VALUES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "NaN": ([[1, 1, NAN]], ("row 0", "nan")),
    "a tensor of NaN": (torch.full((1, 3), NAN), ("row 0", "nan")),
    "a tensor of bfloat16": (torch.full((1, 3), 2.0, dtype=torch.bfloat16), ("row 0", "2.0")),
    "negative values": ([[1, -1, 1]], ("row 0", "-1")),
    "other values": (np.array([[1, 2, 1]]), ("row 0", "2")),
    "digits as text": ([["1", "1", "0"]], ("row 0", "<U1")),
    "a text": ("110", ("one row of 0 and 1",)),
    "texts": (["110"], ("row 0", "'110'")),
    "None": ([[1, None, 1]], ("row 0", "object")),
    "numbers in place of rows": ([1, 1, 1], ("1 prompts",)),
    "rows of uneven depth": ([[1, [1], 1]], ("row 0",)),
    "a third dimension": (np.ones((1, 3, 1)), ("one row of 0 and 1",)),
}


@pytest.mark.parametrize("case", MASK_VALUES)
def test_mask_values(case: str, refused: Any) -> None:
    mask, words = MASK_VALUES[case]
    refused(lambda lm: lm.generate([ROW], 4, attention_mask=mask), "attention_mask", *words)


OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "too long": ({"max_new_tokens": 46}, ("prompt 0", "3", "46", "49", "48", "at most 45")),
    "no token": ({"max_new_tokens": 0}, ("max_new_tokens", "0")),
    "fewer than none": ({"max_new_tokens": -3}, ("-3",)),
    "half a token": ({"max_new_tokens": 2.5}, ("2.5",)),
    "true tokens": ({"max_new_tokens": True}, ("True",)),
    "temperature NaN": ({"temperature": NAN}, ("temperature", "nan")),
    "temperature below zero": ({"temperature": -0.5}, ("temperature", "-0.5")),
    "temperature infinite": ({"temperature": float("inf")}, ("temperature", "inf")),
    "temperature as text": ({"temperature": "1"}, ("temperature", "'1'")),
    "top_p zero": ({"top_p": 0.0}, ("top_p", "0.0")),
    "top_p above one": ({"top_p": 1.01}, ("top_p", "1.01")),
    "top_p NaN": ({"top_p": NAN}, ("top_p", "nan")),
    "top_p None": ({"top_p": None}, ("top_p", "None")),
    "top_k negative": ({"top_k": -1}, ("top_k", "-1")),
    "top_k a float": ({"top_k": 1.5}, ("top_k", "1.5")),
    "stop outside": ({"stop": 64}, ("64", "0 to 63")),
    "stop negative": ({"stop": [5, -1]}, ("-1",)),
    "stop a bool": ({"stop": True}, ("stop", "True")),
    "stop a text": ({"stop": "</s>"}, ("stop",)),
    "stop a float": ({"stop": 2.0}, ("stop", "2.0")),
    "stops with a bool": ({"stop": [5, False]}, ("stop", "False")),
    "debug_mode": ({"debug_mode": "profile"}, ("profile", "breakdown", "fewer_batch")),
    "a seed that no generator takes": (
        {"seed": 1 << 64},
        ("seed is 18446744073709551616", f"<= {(1 << 64) - 1}"),
    ),
    "a seed below zero": ({"seed": -1}, ("seed is -1",)),
    "a row below zero": ({"first_row": -1}, ("first_row is -1",)),
    "a row that is no number": ({"first_row": "a"}, ("first_row is 'a'",)),
    "a temperature beyond floats": ({"temperature": 10**400}, ("temperature exceeds the range",)),
    "cut to nothing": ({"cut_gen_len": 0}, ("cut_gen_len", "0")),
    "cut to a float": ({"cut_gen_len": 2.0}, ("cut_gen_len", "2.0")),
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_options(case: str, do_sample: bool, refused: Any) -> None:
    options, words = OPTIONS[case]
    refused(lambda lm: lm.generate([ROW], **{"max_new_tokens": 4, "do_sample": do_sample} | options), *words)


def test_forward_of_more_than_the_positions(refused: Any) -> None:
    refused(lambda lm: lm.forward([ROW, [5] * 49]), "prompt 1", "49 ids, which exceed the 48")


MASKS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "rows missing": ([[1, 1, 1]], ("1 rows", "2 prompts")),
    "rows too many": (np.ones((3, 3)), ("3 rows", "2 prompts")),
    "row too short": ([[1, 1, 1], [1, 1]], ("row 1", "2 entries", "3 ids")),
    "an array too wide": (np.ones((2, 4)), ("row 0", "4 entries", "3 ids")),
    "one flat row": ([1, 1], ("attention_mask",)),
    "a number": (1, ("attention_mask",)),
    "a third dimension": (np.ones((2, 3, 1)), ("attention_mask",)),
    "a hole": ([[1, 0, 1], [1, 1, 1]], ("row 0", "hole")),
    "all zero": (torch.tensor([[1, 1, 1], [0, 0, 0]]), ("row 1", "empty")),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks(case: str, refused: Any) -> None:
    mask, words = MASKS[case]
    refused(lambda lm: lm.generate([ROW, ROW], 4, attention_mask=mask), *words)
    refused(lambda lm: lm.forward([ROW, ROW], attention_mask=mask), *words)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"device": "tpu"}, "tpu"),
        ({"device": "emulated:speed=3"}, "speed"),
        ({"device": "emulated:memory=lots"}, "lots"),
        ({"dtype": "float8"}, "float8"),
        ({"dtype": torch.int8}, "int8"),
        ({"dtype": None}, "None"),
        ({"order": "zigzag"}, "zigzag"),
        ({"weights": "random"}, "random"),
    ],
)
def test_opening(
    options: dict[str, Any], word: str, tiny: Any, mixed: Any, threads: Any, tmp_path: Path
) -> None:
    before = threads()
    with pytest.raises(ValueError, match=word) as raised:
        OptLM(tiny("opt").directory, mixed(), **{"device": "cpu", "offload_dir": tmp_path} | options)
    assert isinstance(raised.value, FlexGenError)
    assert not list(tmp_path.iterdir()) and threads() <= before


# What does not fit

LARGE = {"hidden_size": 128, "ffn_dim": 512, "word_embed_proj_dim": 128, "num_hidden_layers": 3}


@pytest.fixture
def large(tiny: Any, tmp_path: Path) -> Path:
    """A config, for dummy weights, of about 2.4 MiB in float32."""
    directory = tmp_path / "large"
    directory.mkdir()
    shutil.copy(tiny("opt").directory / "config.json", directory)
    fields = json.loads((directory / "config.json").read_text()) | LARGE
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def test_weights_that_do_not_fit(large: Path, threads: Any, tmp_path: Path) -> None:
    offload, before = tmp_path / "offload", threads()
    with pytest.raises(CapacityError) as raised:
        OptLM(large, Policy(), device="emulated:memory=1MiB", weights="dummy", offload_dir=offload)
    message = str(raised.value)
    for words in (
        "gpu tier, which has 1 MiB",
        "weights home",
        "in all it needs gpu",
        "cpu",
        "disk",
        "slower tier",
    ):
        assert words in message
    assert isinstance(raised.value, MemoryError)
    assert not list(offload.iterdir()) and threads() <= before


def test_a_batch_that_does_not_fit_and_one_that_would(large: Path, threads: Any, tmp_path: Path) -> None:
    policy = Policy(gpu_batch_size=16, num_gpu_batches=4, weights={"cpu": 100})
    rows, offload = [[5] * 20] * 64, tmp_path / "offload"
    options: dict[str, Any] = dict(
        device="emulated:memory=4MiB", weights="dummy", offload_dir=offload, progress=False
    )
    before = threads()
    with OptLM(large, policy, **options) as lm:
        running = threads()
        with pytest.raises(CapacityError) as raised:
            lm.generate(rows, 20)
        assert lm.stats is None and threads() <= running
        assert not list(offload.iterdir())
        message = str(raised.value)
        assert "gpu tier, which has 4 MiB" in message and "cache home" in message
        lm.generate(rows[:1], 2)  # what does fit is still served
    shape = message.partition("It would fit with ")[2].replace(" and ", "\n")
    advised: dict[str, int] = {}
    for line in shape.splitlines():
        key, _, value = line.partition(" = ")
        advised[key] = int(value)
    assert advised.keys() == {"gpu_batch_size", "num_gpu_batches"}
    with OptLM(large, policy.replace(**advised), **options) as lm:
        assert lm.generate(rows, 20, stop=()).shape == (64, 40)  # the advice is true
        assert lm.stats is not None and lm.stats.peak_bytes["gpu"] <= 4 << 20
    assert threads() <= before


def test_no_batch_that_would_fit(large: Path) -> None:
    policy = Policy(weights={"cpu": 100})
    with OptLM(large, policy, device="emulated:memory=1400KiB", weights="dummy", progress=False) as lm:
        with pytest.raises(CapacityError) as raised:
            lm.generate([[5] * 40], 8)
        assert "would fit" not in str(raised.value) and "slower tier" not in str(raised.value)
        assert "At least" in str(raised.value) and "shorten the prompts" in str(raised.value)
