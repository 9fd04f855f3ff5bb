"""The batches of a block in which rows have different numbers of new tokens, and prompts that wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flexgen.layout.cache import Span
from flexgen.layout.passes import Passes
from flexgen.runtime.choice import Sampled
from flexgen.runtime.compaction import Moved
from flexgen.runtime.prompts import Prompts
from flexgen.runtime.tokens import NewTokens

PAD = 1
GIVEN = [[5, 6, 7, 8], [9, 10], [11], [12, 13, 14], [15, 3], [2]]
DEVICES = ["cpu", "emulated"]


def prompts_on(machine: Any, chunk: int = 0) -> Prompts:
    return Prompts([np.array(row) for row in GIVEN], [2, 2], Passes(4, chunk), PAD, machine)


@pytest.mark.parametrize("device", DEVICES)
def test_prompts_beyond_the_block_wait_and_enter(device: str, machine: Any, run: Any) -> None:
    with machine(device) as m:
        prompts = prompts_on(m)
        assert (prompts.batches, prompts.waiting) == ([[0, 1], [2, 3]], [[4, 5]])
        assert prompts.prompt_positions == 8 + 6 + 4
        moved = prompts.regroup([[1, 3], [4, 5]], 2)
        assert moved == [Moved(((0, 1), (1, 1)), (5, 4), 4, None), Moved((), (5, 4), 0, None, 2)]
        assert not prompts.waiting
        old, new = prompts.cell(2, 0, 0, 0), prompts.cell(2, 0, 1, 1)
        assert (old.token, old.span, old.padding.starts) == (2, Span(4, 1), (1, 0))
        assert prompts.positions(old).tolist() == [[3], [4]]
        assert (new.token, new.span, new.padding.starts) == (0, Span(0, 2), (0, 1))
        run(prompts.load(new))
        assert prompts.take(new).tolist() == [[15, 3], [PAD, 2]]
        prompts.close()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_batch_with_different_numbers_of_tokens(device: str, machine: Any, run: Any) -> None:
    """Each row has its own position, and the choice is told its own token."""
    asked: list[tuple[list[int], int]] = []

    class Asked(Sampled):
        def choose(self, logits: Tensor, rows: Sequence[int], token: int) -> Tensor:
            asked.append((list(rows), token))
            return super().choose(logits, rows, token)

    with machine(device) as m:
        prompts = prompts_on(m)
        output = NewTokens(prompts, 6, Asked(), names=[50, 51, 52, 53, 54, 55])
        prompts.regroup([[1, 3], [4, 5]], 2)
        (moved,) = prompts.regroup([[4, 1, 5]], 4)
        assert moved == Moved(((0, 0), (1, 0), (1, 1)), (6, 3), 5, None)
        cell = prompts.cell(4, 0, 0, 0)
        # Row 1 has 2 + 4 - 1 cached tokens, row 4 has 2 + 2 - 1 and row 5 has 1 + 2 - 1.
        assert (cell.token, cell.span, cell.padding.starts) == (4, Span(5, 1), (0, 2, 3))
        assert prompts.positions(cell).tolist() == [[5], [3], [2]]
        assert prompts.passes_left(4, 6) == 2
        logits = torch.zeros(3, 1, 16)
        logits[range(3), 0, [7, 8, 9]] = 1.0
        output.keep(cell, logits)
        run(output.store(cell))
        assert asked == [([51], 4), ([54, 55], 2)]
        assert output.ids[[1, 4, 5], [4, 2, 2]].tolist() == [7, 8, 9]
        assert prompts.newest[:3].tolist() == [7, 8, 9]
        prompts.close()


def test_the_longest_prompt_of_a_batch_that_enters_sets_its_first_pass(machine: Any) -> None:
    with machine("cpu") as m:
        prompts = prompts_on(m, chunk=1)
        assert prompts.first == -3
        prompts.regroup([[0, 1], [4, 5]], 2)
        spans = [prompts.cell(number, 0, 1, 0).span for number in (2, 3, 4)]
        assert spans == [Span(0, 1), Span(1, 1), Span(2, 1)]
        assert [prompts.cell(number, 0, 1, 0).token for number in (2, 3, 4)] == [-1, 0, 1]
        prompts.close()
