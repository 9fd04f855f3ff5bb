"""A call with a choice of its own: it knows rows by the caller's numbers, and hears of ids before it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flexgen.engine import OptLM
from flexgen.errors import CapacityError, LaneError
from flexgen.memory.needs import Need
from flexgen.orders import ORDERS
from flexgen.policy import Tier
from flexgen.runtime.choice import NewIds
from flexgen.runtime.request import read_request

PAD, STOP, TOKENS = 1, 2, 8
LENGTHS = [3, 9, 1, 7, 5, 2, 8, 4, 6, 3]


class Best:
    """The best id, as `generate` has it, of rows whose ids so far are what the choice was told."""

    can_end = True

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.so_far = [list(prompt) for prompt in prompts]
        self.new: dict[int, int] = {}

    def choose(self, logits: Tensor, rows: Sequence[int], token: int) -> Tensor:
        assert all(self.new.get(row, 0) == token for row in rows), "a token is chosen before those before it"
        assert logits.shape == (len(rows), 64)
        return logits.argmax(-1)

    def ends(self, ids: Tensor, rows: Sequence[int], token: int) -> Tensor:
        for row, new in zip(rows, ids.tolist(), strict=True):
            self.so_far[row].append(new)
            self.new[row] = token + 1
        # What ends a row is no matter of the newest id alone: here, the second time that an id comes.
        return torch.tensor([len(set(self.so_far[row])) < len(self.so_far[row]) for row in rows])


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_rows_are_known_by_their_numbers_in_the_call(
    order: str, device: str, tiny: Any, prompts: Any, mixed: Any
) -> None:
    texts = [list(dict.fromkeys(text)) for text in prompts(LENGTHS)]
    model = tiny("opt")
    best = [row[-TOKENS:].tolist() for row in model.greedy(texts, TOKENS)]
    expected = []
    for text, new in zip(texts, best, strict=True):
        both = text + new
        until = next((n for n in range(len(text), len(both)) if both[n] in both[:n]), len(both))
        expected.append(both[: until + 1])
    streamed: list[list[int]] = [[] for _ in texts]
    ended: list[int] = []

    def listen(news: NewIds) -> None:
        for n, row in enumerate(news.rows):
            if news.live[n]:
                assert len(streamed[row]) == news.token
                streamed[row].append(int(news.ids[n]))
            if news.ended[n]:
                ended.append(row)

    with OptLM(
        model.directory, mixed(attend_on="cpu", sep_layer=False), device=device, order=order, progress=False
    ) as lm:
        request = read_request(lm.spec, texts)
        choice = Best(texts)
        out = lm.generate_with(request, TOKENS, choice, pad=0, listeners=[listen])
        assert lm.stats is not None and lm.stats.new_tokens == sum(map(len, streamed))
    for row, (text, whole) in enumerate(zip(texts, expected, strict=True)):
        assert text + streamed[row] == whole
        begin = request.width - len(text)
        assert out[row, begin : begin + len(whole)].tolist() == whole
        assert not out[row, begin + len(whole) :].any()
    assert sorted(ended) == list(range(len(texts))), "every row is told to have ended, once"
    assert len({len(row) for row in streamed}) > 2, "rows end at different times, or this shows little"


def test_what_a_choice_raises_is_the_cause(tiny: Any, prompts: Any, mixed: Any) -> None:
    class Broken(Best):
        def choose(self, logits: Tensor, rows: Sequence[int], token: int) -> Tensor:
            raise KeyError("no such id")

    with OptLM(tiny("opt").directory, mixed(), device="emulated", progress=False) as lm:
        request = read_request(lm.spec, prompts([3, 4]))
        with pytest.raises(LaneError) as raised:
            lm.generate_with(request, 2, Broken(request.prompts))
        assert isinstance(raised.value.__cause__, KeyError)
        assert lm.generate(prompts([3, 4]), 2).shape == (2, 6), "the model goes on"


def test_what_the_caller_keeps_is_planned(tiny: Any, prompts: Any, mixed: Any) -> None:
    with OptLM(tiny("opt").directory, mixed(), device="emulated", progress=False) as lm:
        request = read_request(lm.spec, prompts([3, 4]))
        before = lm.generate([[5, 6, 7, 8], [9, 10, 11]], 2, stop=())
        assert isinstance(before, np.ndarray) and lm.stats is not None
        planned = lm.stats.plan.on(Tier.CPU)
        lm.generate_with(request, 2, Best(request.prompts), kept=[Need(Tier.CPU, "scores", "home", 1 << 20)])
        assert lm.stats.plan.on(Tier.CPU) == planned + (1 << 20)
        with pytest.raises(CapacityError, match=r"scores home 1024 TiB"):
            lm.generate_with(
                request, 2, Best(request.prompts), kept=[Need(Tier.CPU, "scores", "home", 1 << 50)]
            )
