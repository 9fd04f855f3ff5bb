"""A caller's own processors and criteria get the same arguments as in transformers, for any batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    InfNanRemoveLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
)
from transformers.generation.stopping_criteria import ConfidenceCriteria

from flexgen.errors import CapacityError, LaneError
from flexgen.hf import FlexGenForCausalLM
from flexgen.hf.processors import RowProcessors
from flexgen.hf.steps import HFChoice, IdsSoFar
from flexgen.layout.needs import MemoryPlan
from flexgen.policy import Policy, Tier
from flexgen.runtime.call import Call
from flexgen.runtime.sampler import INVALID

LENGTHS = [4, 9, 2, 6, 7]
ENDS = [6, 9, 14, 20, 21]
VOCAB = 36


class Pull(LogitsProcessor):
    """Holds a tensor with a value for each row."""

    def __init__(self, rows: int = len(LENGTHS)) -> None:
        self.bias = 4 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.bias


class Counting(LogitsProcessor):
    """Counts its calls and changes scores by their number; keeps its arguments."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append((input_ids, scores))
        return scores.roll(len(self.seen), dims=1)


class Guides(LogitsProcessor):
    """Has a state for each row, made at the first call and advanced by the row's last id; writes to the scores. As
    structured generation does."""

    def __init__(self) -> None:
        self.states: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.states:
            self.states = [1 + n for n in range(len(input_ids))]
        else:
            last = input_ids[:, -1].tolist()
            self.states = [(31 * state + id) % 1009 for state, id in zip(self.states, last, strict=True)]
        for row, state in zip(scores, self.states, strict=True):
            row[torch.arange(len(row)) % 5 != state % 5] = -torch.inf
        return scores


class Texts(StoppingCriteria):
    """Ends all rows when each has had a stop, which it remembers: as lm-eval's MultiTokenEOSCriteria."""

    stops = frozenset(range(5, VOCAB, 4))

    def __init__(self, prompt_len: int, rows: int) -> None:
        self.prompt_len = prompt_len
        self.done = [False] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        for n, ids in enumerate(input_ids[:, self.prompt_len :][:, -3:].tolist()):
            self.done[n] = self.done[n] or not self.stops.isdisjoint(ids)
        return all(self.done)


class Patience(StoppingCriteria):
    """Ends each row after its own number of calls."""

    def __init__(self) -> None:
        self.left: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.left is None:
            self.left = torch.arange(len(input_ids)) % 4 + 2
        self.left -= 1
        return self.left <= 0


def processors(*parts: Any) -> dict[str, Any]:
    return dict(logits_processor=LogitsProcessorList(parts))


def criteria(*parts: Any) -> dict[str, Any]:
    return dict(stopping_criteria=StoppingCriteriaList(parts))


def by_turns() -> Callable[[int, Tensor], list[int]]:
    """A function of allowed ids that counts steps by the calls for row 0."""
    steps = [0]

    def allowed(row: int, ids: Tensor) -> list[int]:
        steps[0] += row == 0
        return [5 + (3 * steps[0] + row) % 29, 7, int(ids[-1])]

    return allowed


EARLY = dict(eos_token_id=ENDS, pad_token_id=0)
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "a tensor of rows": lambda: processors(Pull()) | EARLY,
    "counted calls": lambda: processors(Counting()),
    "counted calls and early ends": lambda: processors(Counting()) | EARLY,
    "guides": lambda: processors(Guides()),
    "guides and early ends": lambda: processors(Guides()) | EARLY,
    "a function of allowed ids": lambda: dict(prefix_allowed_tokens_fn=by_turns()) | EARLY,
    "penalties of the prompt, given": lambda: processors(
        RepetitionPenaltyLogitsProcessor(1.9, prompt_ignore_length=torch.tensor([5, 0, 7, 3, 2]))
    ),
    "penalties of the prompt, asked for": lambda: (
        processors(Guides()) | dict(repetition_penalty=1.7, encoder_repetition_penalty=0.6) | EARLY
    ),
    "texts": lambda: criteria(Texts(9, len(LENGTHS))) | dict(eos_token_id=1, pad_token_id=0),
    "texts, nothing else ends": lambda: criteria(Texts(9, len(LENGTHS))) | dict(eos_token_id=None),
    "patience": lambda: criteria(Patience()) | dict(eos_token_id=1, pad_token_id=0),
    "patience, nothing else ends": lambda: criteria(Patience()) | dict(eos_token_id=None),
    "all at once": lambda: processors(Pull(), Guides()) | criteria(Patience(), Texts(9, 5)) | EARLY,
    "a watermark that remembers": lambda: (
        dict(watermarking_config=SynthIDTextWatermarkingConfig(ngram_len=3, keys=[5, 6, 7])) | EARLY
    ),
    "several sequences": lambda: (
        processors(Pull(15), Guides()) | dict(do_sample=True, top_k=1, num_return_sequences=3) | EARLY
    ),
    "allowed ids of several sequences": lambda: (
        dict(prefix_allowed_tokens_fn=by_turns(), do_sample=True, top_k=1, num_return_sequences=3) | EARLY
    ),
    "scores for a criterion": lambda: (
        criteria(ConfidenceCriteria(0.122)) | dict(return_dict_in_generate=True, output_scores=True) | EARLY
    ),
}

POLICIES = {
    "row by row": Policy(gpu_batch_size=1, num_gpu_batches=2),
    "blocks of two": Policy(gpu_batch_size=2, num_gpu_batches=1, cache={"gpu": 50, "disk": 50}),
    "two batches": Policy(gpu_batch_size=2, num_gpu_batches=2, weights={"disk": 100}, attend_on="cpu"),
    "all rows": Policy(gpu_batch_size=16),
}


@pytest.fixture(scope="module", params=POLICIES)
def shaped(request: Any, saved: Any) -> Iterator[FlexGenForCausalLM]:
    device = "cpu" if request.param == "row by row" else "emulated"
    with saved("llama").open(POLICIES[request.param], device=device) as opened:
        yield opened


def both(
    make: Callable[[], dict[str, Any]], ours: FlexGenForCausalLM, theirs: PreTrainedModel, inputs: Any
) -> list[Any]:
    """What each generates with options of its own: they have state."""
    made = []
    for model in (ours, theirs):
        options = dict(max_new_tokens=12, do_sample=False) | make()
        made.append(model.generate(**inputs(LENGTHS), **options))
    return made


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_transformers(case: str, shaped: Any, reference: Any, inputs: Any) -> None:
    ours, theirs = both(CASES[case], shaped, reference, inputs)
    if case == "scores for a criterion":
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=1e-4)
        ours, theirs = ours.sequences, theirs.sequences
    assert ours.tolist() == theirs.tolist()
    assert ours.shape[1] > 10, "it shows little"


@pytest.mark.parametrize("ends", [{}, EARLY])
def test_every_row_is_seen_once_a_step_in_its_place(
    ends: dict[str, Any], shaped: Any, reference: Any, inputs: Any
) -> None:
    seen = []
    for model in (shaped, reference):
        counting = Counting()
        model.generate(**inputs(LENGTHS), max_new_tokens=12, **processors(counting), **ends)
        seen.append(counting.seen)
    assert len(seen[0]) == len(seen[1]) > 2
    for (ids, scores), (expected_ids, expected_scores) in zip(*seen, strict=True):
        assert ids.equal(expected_ids)
        # Also of rows that have ended, and of tensors that were kept.
        torch.testing.assert_close(scores, expected_scores, atol=1e-4, rtol=1e-4)
        assert not scores.is_inference() and not ids.is_inference()


def test_state_serves_call_after_call(model: Any, reference: Any, inputs: Any) -> None:
    class Mean(LogitsProcessor):
        total = torch.zeros(5, VOCAB)

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.total = self.total + scores
            return scores - self.total / 4

    made = []
    for each in (model, reference):
        mean = Mean()
        ids = [each.generate(**inputs(LENGTHS), max_new_tokens=4, **processors(mean)).tolist() for _ in "ab"]
        mean.total += 1  # it is a tensor as any other
        made.append(ids)
    assert made[0] == made[1]


def test_transformers_own_are_called_batch_by_batch(
    model: Any, reference: Any, inputs: Any, monkeypatch: Any
) -> None:
    blocks, run = [], Call.run

    def counted(call: Call, prompts: Any, *rest: Any) -> None:
        blocks.append([[len(rows) for rows in batches] for batches in (prompts.batches, prompts.waiting)])
        run(call, prompts, *rest)

    monkeypatch.setattr(Call, "run", counted)
    options = dict(repetition_penalty=1.5, no_repeat_ngram_size=2, max_time=60.0, **EARLY)
    options |= processors(TemperatureLogitsWarper(0.5))
    made = [each.generate(**inputs(LENGTHS), max_new_tokens=8, **options) for each in (model, reference)]
    assert made[0].equal(made[1])
    assert blocks == [[[2, 2], [1]]]  # the policy's two batches of two rows, and the rest, which enters later
    blocks.clear()
    model.generate(**inputs(LENGTHS), max_new_tokens=8, **processors(Pull()))
    assert blocks == [[[2, 2, 1], []]]


def fits_up_to(nbytes: int, monkeypatch: Any, model: FlexGenForCausalLM) -> None:
    limits = {**model.lm._machine.limits(), Tier.CPU: nbytes}
    monkeypatch.setattr(type(model.lm._machine), "limits", lambda self: limits)


def test_a_call_too_large_for_one_block_says_how_to_split_it(
    saved: Any, inputs: Any, monkeypatch: Any
) -> None:
    lengths = [9] * 7
    scores = dict(max_new_tokens=8, return_dict_in_generate=True, output_scores=True)
    with saved("llama").open(Policy(gpu_batch_size=2), device="cpu") as model:

        def planned(rows: int) -> MemoryPlan:
            model.generate(**inputs(lengths[:rows]), **scores, **processors(Pull(rows)))
            return model.lm.stats.plan

        needed = [planned(rows).on(Tier.CPU) for rows in (5, 6)]
        assert needed[0] < needed[1]
        for nbytes in (needed[0], needed[1] - 1):
            with monkeypatch.context() as patch:
                fits_up_to(nbytes, patch, model)
                model.generate(**inputs(lengths), max_new_tokens=8)  # in blocks
                with patch.context() as no_work:
                    no_work.setattr("flexgen.engine.model.Call", None)
                    with pytest.raises(CapacityError, match=r"All 7 rows .* at most 5 rows"):
                        model.generate(**inputs(lengths), **scores, **processors(Pull(7)))
                planned(5)
        fits_up_to(1000, monkeypatch, model)
        with pytest.raises(CapacityError, match="1000 B"):
            model.generate(**inputs(lengths), **scores, **processors(Pull(7)))


def test_the_exception_is_the_cause_and_names_the_token(model: Any, inputs: Any) -> None:
    class Fails:
        def __init__(self, calls: int) -> None:
            self.left = calls

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.left -= 1
            if not self.left:
                raise KeyError("lost")
            return scores

    class Criterion(Fails, StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
            super().__call__(input_ids, scores)
            return False

    for options in (processors(Fails(4)), criteria(Criterion(4))):
        with pytest.raises(LaneError, match=r"token 3 of all 5 rows .*KeyError: 'lost'") as raised:
            model.generate(**inputs(LENGTHS), max_new_tokens=9, eos_token_id=None, **options)
        assert isinstance(raised.value.__cause__, KeyError)
    assert model.generate(**inputs(LENGTHS), max_new_tokens=2).shape[1] == 11, "the model can be used"


@pytest.mark.parametrize("sampling", [dict(do_sample=False), dict(do_sample=True, top_k=0)])
def test_scores_that_are_nan_name_their_row(sampling: dict[str, Any], model: Any, inputs: Any) -> None:
    def broken(input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == 9 + 3:
            scores[2, 7] = torch.nan
        return scores

    with pytest.raises(LaneError, match="row 2 has logits that are NaN or infinite at new token 3"):
        model.generate(
            **inputs(LENGTHS), max_new_tokens=9, eos_token_id=None, logits_processor=[broken], **sampling
        )


@pytest.mark.parametrize("sampling", [dict(do_sample=False), dict(do_sample=True, top_p=0.8)])
def test_processors_are_called_for_some_rows_at_a_time(
    sampling: dict[str, Any], model: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = dict(encoder_repetition_penalty=1.5, return_dict_in_generate=True, output_scores=True)
    found = []
    for rows in (3, 100):
        monkeypatch.setattr("flexgen.hf.steps.choice_rows", lambda vocab, rows=rows: rows)
        torch.manual_seed(0)
        found.append(model.generate(**inputs(LENGTHS), max_new_tokens=9, **wanted, **sampling))
    assert found[0].sequences.equal(found[1].sequences)
    assert all(map(torch.equal, found[0].scores, found[1].scores))


def choice_of(*parts: Any, do_sample: bool = False) -> HFChoice:
    lists = RowProcessors(LogitsProcessorList(parts), lambda rows: LogitsProcessorList(parts))
    ids = IdsSoFar(torch.zeros(3, 2, dtype=torch.int64), 4, 0)
    return HFChoice(ids, lists, StoppingCriteriaList(), do_sample)


def test_a_processor_that_removes_nan_works() -> None:
    logits = torch.tensor([[1.0, torch.nan, 3.0], [2.0, 1.0, 0.0], [1.0, torch.inf, 0.0]])
    rows: Sequence[int] = range(3)
    assert choice_of().choose(logits, rows, 0).tolist() == [INVALID, 0, 1]
    assert choice_of(InfNanRemoveLogitsProcessor()).choose(logits, rows, 0).tolist() == [2, 0, 1]
    drawn = choice_of(do_sample=True).choose(logits, rows, 0).tolist()
    assert drawn[0] == drawn[2] == INVALID and drawn[1] != INVALID


def test_outlines(shaped: Any, reference: Any, tokenizer: Any) -> None:
    """The package itself, where it is installed."""
    outlines = pytest.importorskip("outlines")
    backends = pytest.importorskip("outlines.backends")
    prompts = tokenizer(["why", "a longer one", "why", "why", "no?"], padding=True, return_tensors="pt")
    made = []
    for model in (shaped, reference):
        front = outlines.from_transformers(reference, tokenizer)
        guide = backends.get_regex_logits_processor("outlines_core", front, "[a-f]{2,4} (x|yes)[k-m]?")
        ids = model.generate(**prompts, max_new_tokens=12, do_sample=False, **processors(guide))
        new = ids[:, prompts["input_ids"].shape[1] :]
        made.append(tokenizer.batch_decode(new, skip_special_tokens=True))
    assert made[0] == made[1]
    assert all(re.fullmatch("[a-f]{2,4} (x|yes)[k-m]?", text) for text in made[0])
