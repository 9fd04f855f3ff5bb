"""The ids of one block: padding, positions, the newest id of each row, stops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from piece_sizes import piece_sizes
from transformers import OPTConfig

from flexgen.layout.cache import Span
from flexgen.layout.passes import Passes
from flexgen.models import build_layers, open_model
from flexgen.runtime.cell import BoundCell
from flexgen.runtime.choice import NewIds, Sampled
from flexgen.runtime.positions import Forward
from flexgen.runtime.prompts import Prompts
from flexgen.runtime.request import Request
from flexgen.runtime.tokens import NewTokens

PAD = 1
GIVEN = [[5, 6, 7, 8], [9, 10], [11], [12, 13, 14]]
DEVICES = ["cpu", "emulated"]
SPEC, _ = open_model(OPTConfig(vocab_size=16, hidden_size=8, num_attention_heads=2, ffn_dim=8), "dummy")


def prompts_on(machine: Any) -> Prompts:
    return Prompts([np.array(row) for row in GIVEN], [2, 2], Passes(4), PAD, machine)


def cell_of(prompts: Prompts, token: int, batch: int, slot: int = 0) -> BoundCell:
    return prompts.cell(token, 0, batch, slot)


def chosen(ids: list[int], positions: int = 1) -> torch.Tensor:
    """Logits (rows, positions, 16) whose best last ids are these."""
    logits = torch.zeros(len(ids), positions, 16)
    logits[range(len(ids)), -1, ids] = 1.0
    return logits


@pytest.mark.parametrize("device", DEVICES)
def test_each_batch_is_padded_to_its_own_width(device: str, machine: Any, run: Any) -> None:
    with machine(device) as m:
        prompts = prompts_on(m)
        expected = [[[5, 6, 7, 8], [PAD, PAD, 9, 10]], [[PAD, PAD, 11], [12, 13, 14]]]
        positions = [[[0, 1, 2, 3], [0, 0, 0, 1]], [[0, 0, 0], [0, 1, 2]]]
        for batch in range(2):
            cell = cell_of(prompts, 0, batch, slot=batch)
            run(prompts.load(cell))
            assert prompts.take(cell).tolist() == expected[batch]
            assert prompts.positions(cell).tolist() == positions[batch]
        first = [cell_of(prompts, 0, batch) for batch in range(2)]
        assert [cell.padding.starts for cell in first] == [(0, 2), (2, 0)]
        assert [cell.span for cell in first] == [Span(0, 4), Span(0, 3)]
        later = [cell_of(prompts, 1, 0), cell_of(prompts, 3, 1)]
        assert [cell.span for cell in later] == [Span(4, 1), Span(5, 1)]
        assert [prompts.positions(cell).tolist() for cell in later] == [[[4], [2]], [[3], [5]]]
        prompts.close()


@pytest.mark.parametrize("device", DEVICES)
def test_new_ids_are_read_by_the_next_token(device: str, machine: Any, run: Any) -> None:
    with machine(device) as m:
        prompts = prompts_on(m)
        sizes: list[int] = []
        output = NewTokens(prompts, 3, Sampled(), listeners=[lambda new: sizes.append(len(new.rows))])
        for token, ids in enumerate([[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14]]):
            for batch in range(2):
                cell, following = (cell_of(prompts, n, batch, batch) for n in (token, token + 1))
                output.keep(cell, chosen(ids[2 * batch : 2 * batch + 2]))
                run(output.store(cell))
                run(prompts.load(following))
                expected = [[n] for n in ids[2 * batch : 2 * batch + 2]]
                assert prompts.take(following).tolist() == expected
                assert prompts.fed(batch).tolist() == expected
            assert output.following(token) == (None if token < 2 else [])
        assert output.ids.tolist() == [[3, 7, 11], [4, 8, 12], [5, 9, 13], [6, 10, 14]]
        assert output.count == sum(sizes) == 12
        assert not output.can_finish
        prompts.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stops", [(0,), (0, 15)])
def test_a_stopped_row_gets_pad_ids(stops: tuple[int, ...], device: str, machine: Any, run: Any) -> None:
    with machine(device) as m:
        prompts = prompts_on(m)
        output = NewTokens(prompts, 4, Sampled(stop_ids=stops))
        assert output.can_finish
        finished = []
        for token, ids in enumerate([[0, 4, 5, 6], [7, 8, 0, 10], [11, 0, 13, 15], [2, 2, 2, 0]]):
            for batch in range(2):
                cell = cell_of(prompts, token, batch)
                output.keep(cell, chosen(ids[2 * batch : 2 * batch + 2]))
                run(output.store(cell))
            finished.append(output.following(token) == [])
        ends = 15 in stops
        last = [6, 10, 15, PAD if ends else 0]
        assert output.ids.tolist() == [[0, PAD, PAD, PAD], [4, 8, 0, PAD], [5, 0, PAD, PAD], last]
        assert finished == [False, False, ends, True]
        assert output.count == 1 + 3 + 2 + (3 if ends else 4)
        prompts.close()


@pytest.mark.parametrize("device", DEVICES)
def test_listeners_know_rows_by_the_callers_numbers(device: str, machine: Any, run: Any) -> None:
    with machine(device) as m:
        prompts = prompts_on(m)
        heard: list[tuple[Any, ...]] = []

        def listen(new: NewIds) -> None:
            given = (new.ids, new.live, new.ended)
            heard.append((list(new.rows), new.token, *(values.tolist() for values in given)))

        names = [40, 30, 20, 10]
        output = NewTokens(prompts, 3, Sampled(stop_ids=[0]), names, [listen])
        for token, ids in enumerate([[0, 4], [7, 8], [9, 0]]):
            cell = cell_of(prompts, token, 0)
            output.keep(cell, chosen(ids))
            run(output.store(cell))
        prompts.regroup([[1, 3]], 3)
        cell = cell_of(prompts, 2, 0)
        output.keep(cell, chosen([5, 6]))
        run(output.store(cell))
        assert heard == [
            ([40, 30], 0, [0, 4], [True, True], [True, False]),
            ([40, 30], 1, [PAD, 8], [False, True], [False, False]),
            ([40, 30], 2, [PAD, 0], [False, True], [False, True]),
            ([30, 10], 2, [PAD, 6], [False, True], [False, True]),
        ]
        prompts.close()


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_last_position_chooses(device: str, machine: Any, run: Any) -> None:
    with machine(device) as m:
        prompts = prompts_on(m)
        output = NewTokens(prompts, 1, Sampled())
        logits = chosen([3, 4], positions=4)
        logits[:, 0, 9] = 5.0
        cell = cell_of(prompts, 0, 0)
        output.keep(cell, logits)
        run(output.store(cell))
        assert output.ids[:2].tolist() == [[3], [4]]
        prompts.close()


@pytest.mark.parametrize("piece", [0, 1, 3, 1000])
@pytest.mark.parametrize("device", DEVICES)
def test_all_logits_are_kept_without_their_padding(device: str, piece: int, machine: Any, run: Any) -> None:
    """Whatever the positions that leave the device at once."""
    with piece_sizes(result_bytes=piece * 16 * 4), machine(device) as m:
        prompts = prompts_on(m)
        rows = [GIVEN[n] for n in (2, 3, 0, 1)]  # the caller's order
        request = Request(tuple(map(np.array, rows)), 6, tuple(np.arange(len(r)) + 1 for r in rows))
        result = Forward(build_layers(SPEC), request, torch.float32)
        used = m.host.used
        output = result.output(prompts, [2, 3, 0, 1], m)
        assert not output.last_only and not output.can_finish
        logits = [torch.randn(2, width, 16) for width in (4, 3)]
        for batch in range(2):
            cell = cell_of(prompts, 0, batch, batch)
            output.keep(cell, logits[batch])
            run(output.store(cell))
        expected = torch.zeros(4, 6, 16)
        for n, given in enumerate(GIVEN):
            expected[(n + 2) % 4, 1 : 1 + len(given)] = logits[n // 2][n % 2, -len(given) :]
        assert result.logits.equal(expected)
        assert output.following(0) is None
        output.close()
        assert m.host.used == used
        prompts.close()
