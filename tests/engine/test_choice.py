"""A call with a choice of its own: it knows rows by the caller's numbers, and gets ids before the call continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flexgen.engine.completion import Completion
from flexgen.engine.model import OptLM
from flexgen.errors import CapacityError, LaneError
from flexgen.layout.needs import Need
from flexgen.policy import Tier
from flexgen.runtime.choice import NewIds, Sampled
from flexgen.runtime.request import read_request
from flexgen.schedule.orders import ORDERS
from flexgen.schedule.steps import Op

PAD, STOP, TOKENS = 1, 2, 8
LENGTHS = [3, 9, 1, 7, 5, 2, 8, 4, 6, 3]


class Best:
    """The best id, as in `generate`, for rows whose ids so far are those passed to the choice."""

    can_end = True
    by_logits = False

    def __init__(self, prompts: Sequence[Sequence[int]], whole_call: bool = False) -> None:
        self.whole_call = whole_call
        self.so_far = [list(prompt) for prompt in prompts]
        self.new: dict[int, int] = {}

    def choose(self, logits: Tensor, rows: Sequence[int], token: int) -> Tensor:
        assert not self.whole_call or list(rows) == list(range(len(self.so_far)))
        assert all(self.new.get(row, 0) == token for row in rows), "a token is chosen before those before it"
        assert logits.shape == (len(rows), 64)
        return logits.argmax(-1)

    def ends(self, ids: Tensor, rows: Sequence[int], token: int) -> Tensor:
        for row, new in zip(rows, ids.tolist(), strict=True):
            self.so_far[row].append(new)
            self.new[row] = token + 1
        # What ends a row is no matter of the newest id alone: here, the second time that an id comes.
        return torch.tensor([len(set(self.so_far[row])) < len(self.so_far[row]) for row in rows])


@pytest.mark.parametrize("whole_call", [False, True])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_rows_are_known_by_their_numbers_in_the_call(
    order: str, device: str, whole_call: bool, tiny: Any, prompts: Any, mixed: Any
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
        choice = Best(texts, whole_call)
        out = lm.generate_with(Completion(request, TOKENS, choice, pad=0), listeners=[listen])
        assert lm.stats is not None and lm.stats.new_tokens == sum(map(len, streamed))
    for row, (text, whole) in enumerate(zip(texts, expected, strict=True)):
        assert text + streamed[row] == whole
        begin = request.width - len(text)
        assert out[row, begin : begin + len(whole)].tolist() == whole
        assert not out[row, begin + len(whole) :].any()
    assert sorted(ended) == list(range(len(texts))), "the end of every row is reported once"
    assert len({len(row) for row in streamed}) > 2, "rows end at different times, or this shows little"


def test_what_a_choice_raises_is_the_cause(tiny: Any, prompts: Any, mixed: Any) -> None:
    class Broken(Best):
        def choose(self, logits: Tensor, rows: Sequence[int], token: int) -> Tensor:
            raise KeyError("no such id")

    with OptLM(tiny("opt").directory, mixed(), device="emulated", progress=False) as lm:
        request = read_request(lm.spec, prompts([3, 4]))
        with pytest.raises(LaneError) as raised:
            lm.generate_with(Completion(request, 2, Broken(request.prompts)))
        assert isinstance(raised.value.__cause__, KeyError)
        assert lm.generate(prompts([3, 4]), 2).shape == (2, 6), "the model still works"


def test_what_the_caller_keeps_is_planned(tiny: Any, prompts: Any, mixed: Any) -> None:
    with OptLM(tiny("opt").directory, mixed(), device="emulated", progress=False) as lm:
        request = read_request(lm.spec, prompts([3, 4]))
        before = lm.generate([[5, 6, 7, 8], [9, 10, 11]], 2, stop=())
        assert isinstance(before, np.ndarray) and lm.stats is not None
        planned = lm.stats.plan.on(Tier.CPU)
        lm.generate_with(
            Completion(request, 2, Best(request.prompts)),
            extra_needs=[Need(Tier.CPU, "scores", "home", 1 << 20)],
        )
        assert lm.stats.plan.on(Tier.CPU) == planned + (1 << 20)
        with pytest.raises(CapacityError, match=r"scores home 1024 TiB"):
            lm.generate_with(
                Completion(request, 2, Best(request.prompts)),
                extra_needs=[Need(Tier.CPU, "scores", "home", 1 << 50)],
            )


@pytest.mark.parametrize("whole_call", [False, True])
def test_a_failure_names_the_token_of_the_call(whole_call: bool, tiny: Any, prompts: Any, mixed: Any) -> None:
    class Fails(Sampled):
        """Row 1 alone is left after the first token, and fails at token 5."""

        can_end = True

        def __init__(self) -> None:
            super().__init__()
            self.whole_call = whole_call
            self.rows: list[int] = []

        def choose(self, logits: Tensor, rows: Sequence[int], token: int) -> Tensor:
            self.rows.append(len(rows))
            if token == 5:
                raise KeyError("lost")
            return super().choose(logits, rows, token)

        def ends(self, ids: Tensor, rows: Sequence[int], token: int) -> Tensor:
            return torch.tensor([row != 1 for row in rows])

    with OptLM(tiny("opt").directory, mixed(), device="emulated", progress=False) as lm:
        request, choice = read_request(lm.spec, prompts([3, 4, 5, 6])), Fails()
        with pytest.raises(LaneError, match=r"token 5\b.*KeyError: 'lost'"):
            lm.generate_with(Completion(request, TOKENS, choice))
        assert choice.rows[-1] == (4 if whole_call else 1)


def test_the_trace_of_a_call_that_runs_token_by_token(tiny: Any, prompts: Any, mixed: Any) -> None:
    with OptLM(tiny("opt").directory, mixed(), device="emulated", progress=False) as lm:
        request = read_request(lm.spec, prompts(LENGTHS))
        choice = lm.sampled(stop=())
        choice.whole_call = True
        lm.generate_with(Completion(request, TOKENS, choice))
        assert lm.stats is not None and 0 < lm.stats.timing.prefill < lm.stats.timing.total
        computed = [e.step for e in lm.stats.timing.trace.events if e.step.op is Op.COMPUTE]
    assert computed == sorted(computed, key=lambda step: step.token) and len(set(computed)) == len(computed)
    assert {step.token for step in computed} == set(range(TOKENS))


@pytest.mark.parametrize("whole_call", [False, True])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize(
    ("sampling", "value"),
    [(dict(), torch.nan), (dict(temperature=0.8, top_k=5), torch.nan), (dict(temperature=1.0), torch.inf)],
)
def test_logits_that_are_no_numbers_name_their_row(
    sampling: Any, value: float, device: str, whole_call: bool, tiny: Any, prompts: Any, mixed: Any
) -> None:
    class Poisoned(Sampled):
        """Row 0 ends at once, and from then on its logits are not looked at; row 6 is spoiled at token 3."""

        can_end = True

        def choose(self, logits: Tensor, rows: Sequence[int], token: int) -> Tensor:
            for place, row in enumerate(rows):
                if (row == 0 and token) or (row == 6 and token == 3):
                    logits[place, 11] = value
            return super().choose(logits, rows, token)

        def ends(self, ids: Tensor, rows: Sequence[int], token: int) -> Tensor:
            return torch.tensor([row == 0 for row in rows])

    with OptLM(tiny("opt").directory, mixed(), device=device, progress=False) as lm:
        request, choice = read_request(lm.spec, prompts(LENGTHS)), Poisoned(**sampling)
        choice.whole_call = whole_call
        with pytest.raises(LaneError, match=r"row 6 has logits that are NaN or infinite at new token 3\b"):
            lm.generate_with(Completion(request, TOKENS, choice))
        assert lm.generate_with(Completion(request, 3, choice)).shape == (len(LENGTHS), 12)


def test_a_block_with_more_batches_than_the_policy_does_with_the_slots_that_there_are(
    tiny: Any, prompts: Any, mixed: Any
) -> None:
    model, texts = tiny("opt"), prompts(LENGTHS)
    # With several batches it would ask for the order that attends on the host meanwhile, with more slots.
    one_batch = mixed(gpu_batch_size=3, num_gpu_batches=1, attend_on="cpu", sep_layer=False)
    with OptLM(model.directory, one_batch, device="emulated", progress=False) as lm:
        request = read_request(lm.spec, texts)
        choice = lm.sampled(stop=())
        choice.whole_call = True
        out = lm.generate_with(Completion(request, TOKENS, choice))
        assert out.tolist() == model.greedy(texts, TOKENS).tolist()
        assert lm.stats is not None and lm.stats.policy.num_gpu_batches == 4
        assert lm.stats.order == "overlap_multi_batch"
        assert lm.generate(texts, TOKENS, stop=()).tolist() == out.tolist(), "in blocks again"
        assert lm.stats.policy.num_gpu_batches == 1
