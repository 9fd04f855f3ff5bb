"""`read_request` and its checks. tests/engine/test_refusals.py has the errors that a caller sees."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import RequestError
from flexgen.models import ModelSpec
from flexgen.runtime.request import (
    Request,
    check_length,
    check_positions,
    pad_id,
    read_request,
    stop_ids,
)

IDS = st.lists(st.integers(3, 63), min_size=1, max_size=12)


@given(
    prompts=st.lists(IDS, min_size=1, max_size=8), left=st.lists(st.integers(0, 3), min_size=8, max_size=8)
)
def test_padding_is_taken_off_and_its_place_is_kept(
    prompts: list[list[int]], left: list[int], spec: ModelSpec
) -> None:
    width = max(map(len, prompts)) + 3
    ids = np.full((len(prompts), width), 63)
    mask = np.zeros_like(ids)
    for row, (prompt, begin) in enumerate(zip(prompts, left, strict=False)):
        ids[row, begin : begin + len(prompt)] = prompt
        mask[row, begin : begin + len(prompt)] = 1
    request = read_request(spec, ids, mask)
    assert [prompt.tolist() for prompt in request.prompts] == prompts
    assert request.width == width and request.longest == max(map(len, prompts))
    for n, (row, prompt) in enumerate(zip(ids, prompts, strict=True)):
        assert row[request.columns[n]].tolist() == prompt


@given(prompts=st.lists(IDS, min_size=1, max_size=20), size=st.integers(1, 6))
def test_blocks_hold_each_prompt_once_longest_first(
    prompts: list[list[int]], size: int, spec: ModelSpec
) -> None:
    request = read_request(spec, prompts)
    blocks = request.blocks(size)
    assert sorted(n for block in blocks for n in block) == list(range(len(prompts)))
    assert all(len(block) == size for block in blocks[:-1]) and 0 < len(blocks[-1]) <= size
    lengths = [len(prompts[n]) for block in blocks for n in block]
    assert lengths == sorted(lengths, reverse=True)


def test_prompts_of_one_length_keep_their_order(spec: ModelSpec) -> None:
    assert read_request(spec, [[5, 6]] * 5).blocks(2) == [[0, 1], [2, 3], [4]]


def test_leading_pad_ids(spec: ModelSpec) -> None:
    padded = [[1, 1, 5], [1, 6, 7], [8, 1, 9]]
    assert [p.tolist() for p in read_request(spec, np.array(padded)).prompts] == [[5], [6, 7], [8, 1, 9]]
    # Lists of several lengths need no padding: what looks like it is meant.
    assert [p.tolist() for p in read_request(spec, [[1, 5], [6, 7, 8]]).prompts] == [[1, 5], [6, 7, 8]]
    # Where the pad id ends texts, too, a text may begin with it.
    for other in (replace(spec, eos_token_ids=(1,)), replace(spec, pad_token_id=None)):
        assert [p.tolist() for p in read_request(other, padded).prompts] == padded


def test_ids_become_int64(spec: ModelSpec) -> None:
    for dtype in (np.int8, np.uint16, np.int32, np.uint64):
        (prompt,) = read_request(spec, np.array([[5, 6]], dtype=dtype)).prompts
        assert prompt.dtype == np.int64


@pytest.mark.parametrize(("length", "tokens"), [(1, 47), (47, 1), (20, 28)])
def test_every_position_can_be_used(length: int, tokens: int, spec: ModelSpec) -> None:
    request = read_request(spec, [[5] * length, [5]])
    check_length(spec, request, tokens)
    with pytest.raises(RequestError) as raised:
        check_length(spec, request, tokens + 1)
    for words in (f"{length} ids", f"{tokens + 1} more", "49 exceed the 48", f"at most {tokens} new"):
        assert words in str(raised.value)


def test_rotary_positions_have_no_end(spec: ModelSpec, caplog: pytest.LogCaptureFixture) -> None:
    rotary = replace(spec, name="a rotary model", positions="attention")
    check_length(rotary, read_request(rotary, [[5] * 47]), 1)
    assert not caplog.messages
    for _ in range(2):
        check_length(rotary, read_request(rotary, [[5] * 40]), 1000)
    (message,) = caplog.messages
    assert "exceeds the 48 positions of a rotary model" in message


def test_a_prompt_alone_may_fill_the_positions(spec: ModelSpec) -> None:
    check_positions(spec, read_request(spec, [[5] * 48]), 0)
    with pytest.raises(RequestError, match=r"^prompt 1 has 49 ids, which exceed the 48 .*Shorten it$"):
        check_positions(spec, read_request(spec, [[5], [5] * 49]), 0)
    with pytest.raises(RequestError, match=r"1 more are requested: 49 exceed .*Shorten the prompt$"):
        check_positions(spec, read_request(spec, [[5] * 48]), 1)


def test_stop_ids(spec: ModelSpec) -> None:
    assert stop_ids(spec, None) == (2,)
    assert stop_ids(spec, 0) == (0,)
    assert stop_ids(spec, np.int32(7)) == (7,)
    assert stop_ids(spec, [7, 0]) == (7, 0)
    assert stop_ids(spec, ()) == ()
    assert stop_ids(replace(spec, eos_token_ids=()), None) == ()


def test_pad_id(spec: ModelSpec) -> None:
    assert pad_id(spec) == 1
    assert pad_id(replace(spec, pad_token_id=0)) == 0
    assert pad_id(replace(spec, pad_token_id=None)) == 2
    assert pad_id(replace(spec, pad_token_id=None, eos_token_ids=())) == 0


@given(lengths=st.lists(st.integers(1, 30), min_size=6, max_size=6), size=st.sampled_from([1, 2, 3, 6]))
def test_blocks_of_like_length_need_no_more_padding_than_any_other_order(
    lengths: list[int], size: int
) -> None:
    def positions(order: Iterable[int]) -> int:
        ordered = [lengths[n] for n in order]
        batches = [ordered[n : n + size] for n in range(0, 6, size)]
        return sum(len(batch) * max(batch) for batch in batches)

    request = Request(tuple(np.zeros(n, dtype=int) for n in lengths), max(lengths), ())
    (ours,) = request.blocks(6)
    assert positions(ours) == min(map(positions, itertools.permutations(range(6))))
