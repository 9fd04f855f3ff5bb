"""Which prompts share the parts of a prefix."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.runtime.prefix_groups import (
    MOST_PARTS,
    BlockPasses,
    PrefixGroup,
    covering,
    one_group,
    prefix_groups,
)
from flexgen.runtime.request import Request
from flexgen.workload import Workload

FREE = BlockPasses(block_size=4, per_block=1, positions=0.0)
"""Passes that take no time, so that every group is worth its own."""


def request_of(*prompts: list[int]) -> Request:
    rows = tuple(np.array(prompt) for prompt in prompts)
    return Request(rows, max(map(len, rows)), tuple(np.arange(len(row)) for row in rows))


def text(first: int, length: int) -> list[int]:
    return list(range(first, first + length))


ROOT, A, B = text(1000, 40), text(2000, 50), text(3000, 60)


def tree() -> Request:
    """Two prompts of document A, three of B, whose numbers are mixed, and one without a document."""
    return request_of(
        ROOT + A + [1], ROOT + B + [2], ROOT + [3], ROOT + B + [4, 4], ROOT + A + [5], ROOT + B + [6, 6, 6]
    )


def test_an_instruction_documents_and_questions():
    groups = prefix_groups(tree(), 40, FREE)
    assert groups == [
        PrefixGroup((2,), (40,)),
        PrefixGroup((0, 4), (40, 90)),
        PrefixGroup((1, 3, 5), (40, 100)),
    ]
    assert [group.shared for group in groups] == [40, 90, 100]
    assert groups[2].workload(tree(), 8) == Workload(103, 8, 3, prefix=100, cuts=(40,))
    assert [row.tolist() for row in groups[2].prompts(tree()).prompts] == [[2], [4, 4], [6, 6, 6]]


def test_a_part_that_is_used_once_is_not_cut():
    """All prompts with A have the same section, and no other prompt shares A alone."""
    section = text(5000, 40)
    prompts = request_of(ROOT + A + section + [1], ROOT + A + section + [2], ROOT + [3], ROOT + [4])
    assert prefix_groups(prompts, 40, FREE) == [PrefixGroup((2, 3), (40,)), PrefixGroup((0, 1), (40, 130))]


def test_three_levels():
    sections = [text(5000, 40), text(6000, 40)]
    prompts = request_of(*(ROOT + A + section + [n] for n in (1, 2) for section in sections), ROOT + [3])
    assert prefix_groups(prompts, 40, FREE) == [
        PrefixGroup((4,), (40,)),
        PrefixGroup((0, 2), (40, 90, 130)),
        PrefixGroup((1, 3), (40, 90, 130)),
    ]


def test_without_a_common_beginning_of_all():
    prompts = request_of(A + [1], B + [2], A + [3], B + [4], [5])
    assert prefix_groups(prompts, 0, FREE) == [
        PrefixGroup((4,)),
        PrefixGroup((0, 2), (50,)),
        PrefixGroup((1, 3), (60,)),
    ]


def test_each_prompt_has_an_id_of_its_own():
    """Also one that ends where the others go on, and equal ones."""
    prompts = request_of(A, A + [1, 2], A + [1, 3], B, B)
    assert prefix_groups(prompts, 0, FREE) == [PrefixGroup((0, 1, 2), (49,)), PrefixGroup((3, 4), (59,))]


@pytest.mark.parametrize(
    ("rows", "positions", "grouped"),
    [
        (4, 49.0, True),  # 3 times 50 positions for a pass of 49: the block is full
        (4, 151.0, False),
        (3, 55.0, False),  # a block with one free place of four, in which others would run: 55 x (1 + 8 / 4)
        (3, 33.0, True),
        (2, 9.0, True),  # 50 positions, for 9 x (1 + 8 / 2)
        (2, 11.0, False),
    ],
)
def test_a_group_saves_more_than_its_passes_cost(rows, positions, grouped):
    prompts = request_of(*(A + [n] for n in range(rows)), *([n] for n in range(5)))
    groups = prefix_groups(prompts, 0, BlockPasses(block_size=4, per_block=8, positions=positions))
    assert (len(groups) == 2) is grouped
    assert sorted(row for group in groups for row in group.rows) == list(range(rows + 5))


def test_prompts_that_are_left_over_run_with_the_shorter_prefix():
    """Two prompts of A are not worth a block, after eight others of A have longer prefixes."""
    sections = [text(5000, 200), text(6000, 200)]
    inner = [ROOT + A + section + [n] for section in sections for n in range(4)]
    prompts = request_of(*inner, ROOT + A + [1], ROOT + A + [2], *(ROOT + [n] for n in range(4)))
    groups = prefix_groups(prompts, 40, BlockPasses(block_size=4, per_block=8, positions=30.0))
    assert [group.ends for group in groups] == [(40,), (40, 90, 290), (40, 90, 290)]
    assert set(groups[0].rows) == set(range(8, 14))


def test_prompts_that_continue_each_other_have_few_parts():
    whole = text(1, 2000)
    prompts = request_of(*(whole[:length] for length in range(100, 2000, 40)))
    groups = prefix_groups(prompts, 99, FREE)
    assert 2 < max(len(group.ends) for group in groups) <= MOST_PARTS
    assert sorted(row for group in groups for row in group.rows) == list(range(len(prompts.prompts)))


def test_groups_have_only_prompts_that_are_sorted_together():
    """Answers of the first ones are saved before others begin."""
    a, b = ([A + [n] for n in range(2)], [B + [n] for n in range(2)])
    prompts = request_of(*a, *b, [1], [2], [3], [4], [5], [6], [7], [8], *a, *b)
    in_fours = dataclasses.replace(prompts, sorted_in=4)
    assert prefix_groups(in_fours, 0, FREE) == [
        PrefixGroup((0, 1), (50,)),
        PrefixGroup((2, 3), (60,)),
        PrefixGroup(tuple(range(4, 12))),
        PrefixGroup((12, 13), (50,)),
        PrefixGroup((14, 15), (60,)),
    ]
    assert [group.rows for group in prefix_groups(prompts, 0, FREE)[1:]] == [(0, 1, 12, 13), (2, 3, 14, 15)]
    assert prefix_groups(in_fours, 0, BlockPasses(4, 1, 1e9)) == [one_group(in_fours, 0)]


def test_covering_workloads_need_the_most_of_each_group():
    longest = request_of(ROOT + A + [1], ROOT + A + [2, 2, 2], ROOT + B + [3], ROOT + B + [4], ROOT + [5] * 7)
    found = covering(prefix_groups(longest, 40, FREE), longest, 8)
    assert found == [Workload(103, 8, 5, prefix=100, cuts=(40,)), Workload(47, 8, 5, prefix=40)]
    assert covering([one_group(longest, 0)], longest, 8) == [Workload(101, 8, 5)]


@given(
    prompts=st.lists(
        st.lists(st.sampled_from([ROOT, A, B, text(1000, 33), [7], [8]]), min_size=1, max_size=4),
        min_size=1,
        max_size=12,
    ),
    positions=st.sampled_from([0.0, 5.0, 40.0, 1000.0]),
    block_size=st.integers(1, 5),
)
def test_groups_share_what_they_say(prompts, positions, block_size):
    """Every prompt is in one group, has the group's prefix and more, and adjacent groups repeat no part."""
    request = request_of(*(sum(pieces, []) for pieces in prompts))
    root = request.prefix if len(prompts) > 1 and request.prefix >= 32 else 0
    groups = prefix_groups(request, root, BlockPasses(block_size, 3, positions))
    assert sorted(row for group in groups for row in group.rows) == list(range(len(prompts)))
    computed: list[list[int]] = []
    for group in groups:
        assert not root or group.ends[0] == root
        assert all(end - begin >= 32 for begin, end in pairwise((0, *group.ends)))
        first = request.prompts[group.rows[0]]
        for row in group.rows:
            assert len(request.prompts[row]) > group.shared
            np.testing.assert_array_equal(request.prompts[row][: group.shared], first[: group.shared])
    for one, other in pairwise(groups):  # a part that is freed is not computed again
        shared = [
            (a, first[:a].tolist())
            for a, b in zip(one.ends, other.ends, strict=False)
            if a == b
            and np.array_equal(
                (first := request.prompts[one.rows[0]])[:a], request.prompts[other.rows[0]][:a]
            )
        ]
        computed += [request.prompts[one.rows[0]][:end].tolist() for end in one.ends[len(shared) :]]
        assert all(request.prompts[other.rows[0]][:end].tolist() not in computed for end in other.ends)
