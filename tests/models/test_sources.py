"""Names in checkpoints, and parts of stored tensors."""

from __future__ import annotations

import torch

from flexgen.models.sources import OneRow, Source, Stacked, prefixed


def test_the_part_of_a_stack() -> None:
    stack = torch.arange(5 * 8 * 3).view(5, 8, 3)
    for part in range(2):
        source = Stacked("gate_up", part, 2).source(3, 5, (4, 3))
        assert source.shape == (5, 8, 3)
        values = stack.flatten()[source.skipped :][: 4 * 3].view(4, 3)
        assert torch.equal(values, stack[3, 4 * part : 4 * part + 4])
    assert Stacked("down").source(2, 5, (8, 3)) == Source("down", (2,), (5, 8, 3))
    assert OneRow("bias").source(7) == Source("bias", (0,), (1, 7)) and OneRow("bias").source(7).skipped == 0


def test_the_parts_of_a_tensor_have_different_names() -> None:
    stacks = [Stacked("gate_up", part, 2).source(expert, 5, (4, 3)) for part in (0, 1) for expert in range(5)]
    assert len(set(map(str, stacks))) == 10
    assert str(Source("q.weight")) == "q.weight"


def test_prefixes_of_every_layout() -> None:
    names = prefixed(("model.", ""), {"gate": ("{e}.w1", Stacked("gate_up", 0, 2)), "norm": "norm"})
    assert names == {
        "gate": ("model.{e}.w1", "{e}.w1", Stacked("model.gate_up", 0, 2), Stacked("gate_up", 0, 2)),
        "norm": ("model.norm", "norm"),
    }
