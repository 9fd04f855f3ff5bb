"""The arguments of `generate`, compared with transformers' own generate on the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    WatermarkingConfig,
    set_seed,
)

from flexgen.demo import MODEL_DIR
from flexgen.errors import CapacityError, LaneError, RequestError, UnsupportedError
from flexgen.hf import FlexGenForCausalLM
from flexgen.hf.steps import HFChoice
from flexgen.policy import Policy, Tier

LENGTHS = [4, 9, 2, 6, 7]
ENDS = [6, 9, 14, 20, 21]


class Favour(LogitsProcessor):
    """Adds to the id that follows a row's newest one."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = (input_ids[:, -1:] + 1) % scores.shape[1]
        return scores.scatter_add(1, wanted, torch.full(wanted.shape, 30.0))


class Twice(StoppingCriteria):
    """Ends a row that has an id of `ENDS` twice, wherever; it needs the whole row, padding aside."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.stack([(input_ids == end).sum(1) >= 2 for end in ENDS]).any(0)


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "several ends": dict(eos_token_id=ENDS, pad_token_id=0),
    "one end, another pad": dict(eos_token_id=6, pad_token_id=3),
    "repetition penalty": dict(repetition_penalty=1.8),
    "no repeated pairs": dict(no_repeat_ngram_size=2),
    "a least number": dict(min_new_tokens=7, eos_token_id=ENDS),
    "a least length": dict(min_length=13, eos_token_id=ENDS),
    "bad words": dict(bad_words_ids=[[9], [20], [4, 5]]),
    "a bias": dict(sequence_bias={(7,): 20.0, (8, 12): 5.0}),
    "penalty of the prompt": dict(encoder_repetition_penalty=2.5),
    "a prefix for each row": dict(prefix_allowed_tokens_fn=lambda row, ids: [row + 5, row + 11]),
    "a processor": dict(logits_processor=LogitsProcessorList([Favour()])),
    "a criterion and an end": dict(
        stopping_criteria=StoppingCriteriaList([Twice()]), eos_token_id=1, pad_token_id=0
    ),
    "sampling without choice": dict(do_sample=True, top_k=1, temperature=0.7),
    "sampling of the likeliest": dict(do_sample=True, top_p=1e-6, top_k=0),
    "a config": dict(generation_config=GenerationConfig(max_new_tokens=6, repetition_penalty=1.5)),
    "a watermark": dict(watermarking_config=WatermarkingConfig(bias=8.0)),
    "whole length": dict(max_length=14),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_ids_are_those_of_transformers(case: str, model: Any, reference: Any, inputs: Any) -> None:
    options = dict(do_sample=False) | OPTIONS[case]
    if not {"generation_config", "max_length"} & options.keys():
        options["max_new_tokens"] = 10
    given = inputs(LENGTHS)
    ours, theirs = model.generate(**given, **options), reference.generate(**given, **options)
    assert ours.tolist() == theirs.tolist()


def test_scores_and_logits_of_every_step(model: Any, reference: Any, inputs: Any) -> None:
    options = dict(
        max_new_tokens=8, do_sample=False, repetition_penalty=1.5, eos_token_id=ENDS, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    given = inputs(LENGTHS)
    ours, theirs = model.generate(**given, **options), reference.generate(**given, **options)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    width = given["input_ids"].shape[1]
    for name in ("scores", "logits"):
        mine, other = ours[name], theirs[name]
        assert len(mine) == len(other)
        for step, (a, b) in enumerate(zip(mine, other, strict=True)):
            assert a.shape == b.shape and a.dtype == b.dtype and not a.is_inference()
            new = theirs.sequences[:, width : width + step]
            live = ~torch.isin(new, torch.tensor(ENDS)).any(1)
            torch.testing.assert_close(a[live], b[live], atol=1e-4, rtol=1e-4)
    assert not torch.equal(ours.scores[0], ours.logits[0])
    only = model.generate(**given, max_new_tokens=2, return_dict_in_generate=True)
    assert only.scores is None and only.logits is None


def test_memory_of_scores_is_checked_first(model: Any, inputs: Any, monkeypatch: Any) -> None:
    given = inputs(LENGTHS)
    options = dict(max_new_tokens=8, return_dict_in_generate=True, output_scores=True)
    model.generate(**given, max_new_tokens=8)
    needed = model.lm.stats.plan.on(Tier.CPU) + len(LENGTHS) * 8 * model.config.vocab_size * 4
    held = dict(model.lm._machine.limits())
    monkeypatch.setattr(type(model.lm._machine), "limits", lambda self: held)
    held[Tier.CPU] = needed
    model.generate(**given, **options)
    held[Tier.CPU] = needed - 1
    model.generate(**given, max_new_tokens=8)
    with pytest.raises(CapacityError, match="scores home"):
        model.generate(**given, **options)


def test_several_sequences_of_each_prompt(model: Any, inputs: Any) -> None:
    given = inputs([3, 6])
    options = dict(
        do_sample=True, num_return_sequences=4, max_new_tokens=6, temperature=1.5, top_k=0, min_p=0.01
    )
    torch.manual_seed(7)
    first = model.generate(**given, **options)
    assert first.shape == (8, 12)
    prompts = given["input_ids"].repeat_interleave(4, dim=0)
    assert first[:, :6].tolist() == prompts.tolist()
    assert len({tuple(row) for row in first.tolist()}) > 4
    torch.manual_seed(7)
    assert model.generate(**given, **options).tolist() == first.tolist()
    assert model.generate(**given, **options).tolist() != first.tolist()


@pytest.mark.parametrize("seed", [torch.manual_seed, set_seed])
def test_a_seed_repeats_under_every_policy(seed: Any, saved: Any, inputs: Any) -> None:
    given, made = inputs(LENGTHS), []
    options = dict(do_sample=True, max_new_tokens=12, temperature=1.5, top_p=0.95)
    for policy, device in (
        (Policy(gpu_batch_size=2, num_gpu_batches=2), "cpu"),
        (Policy(gpu_batch_size=3, weights={"cpu": 100}, cache={"cpu": 100}), "emulated"),
    ):
        with saved("llama").open(policy, device=device) as model:
            seed(11)
            made += [model.generate(**given, **options), model.generate(**given, **options)]
    assert made[0].equal(made[2]) and made[1].equal(made[3])
    assert not made[0].equal(made[1])


def test_sampling_has_the_distribution_of_the_processed_scores(saved: Any, inputs: Any) -> None:
    given = {name: values.expand(400, -1) for name, values in inputs([5]).items()}
    torch.manual_seed(0)
    with saved("llama").open(Policy(gpu_batch_size=200), device="cpu") as model:
        out = model.generate(
            **given, do_sample=True, top_k=3, temperature=2.0, max_new_tokens=1, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
    expected = out.scores[0][0].softmax(0)
    assert int((expected > 0).sum()) == 3
    drawn = torch.bincount(out.sequences[:, -1], minlength=len(expected)) / 400
    assert (drawn - expected).abs().max() < 0.1


def test_stop_strings(model: Any, reference: Any, tokenizer: Any) -> None:
    inputs = tokenizer(["hello", "why not?"], padding=True, return_tensors="pt")
    new = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    free = reference.generate(**inputs, **new)
    text = tokenizer.decode(free[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    options = dict(stop_strings=[text[2:4], "zzz"], tokenizer=tokenizer) | new
    ours, theirs = model.generate(**inputs, **options), reference.generate(**inputs, **options)
    assert ours.tolist() == theirs.tolist()
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(**inputs, stop_strings=["a"], max_new_tokens=2)


def test_a_streamer_hears_one_row(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer(["hello"], return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, timeout=5)
    out = model.generate(**inputs, max_new_tokens=9, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0])
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(**tokenizer(["a", "b"], return_tensors="pt"), streamer=TextIteratorStreamer(tokenizer))


class Puts(list):  # type: ignore[type-arg]
    """A streamer of one's own."""

    def put(self, value: torch.Tensor) -> None:
        self.append((value.shape, value.tolist()))

    def end(self) -> None:
        self.append("end")


def test_a_streamer_gets_prompt_and_ids(model: Any, reference: Any, inputs: Any) -> None:
    puts = [Puts(), Puts()]
    for each, streamer in zip((model, reference), puts, strict=True):
        each.generate(**inputs([4]), max_new_tokens=9, do_sample=False, streamer=streamer, eos_token_id=ENDS)
    assert puts[0] == puts[1] and puts[0][-1] == "end"
    with pytest.raises(UnsupportedError, match="a streamer is not supported with 2 rows"):
        model.generate(**inputs([4, 5]), max_new_tokens=9, streamer=Puts())


def test_every_row_ends_with_its_first_token(model: Any, reference: Any, inputs: Any) -> None:
    options = dict(
        max_new_tokens=6, do_sample=False, eos_token_id=list(range(36)), return_dict_in_generate=True,
        output_scores=True, output_logits=True,
    )  # fmt: skip
    given = inputs(LENGTHS)
    ours, theirs = model.generate(**given, **options), reference.generate(**given, **options)
    assert ours.sequences.equal(theirs.sequences) and ours.sequences.shape == (5, 10)
    assert len(ours.scores) == len(ours.logits) == 1


def test_without_ids_a_row_begins_with_the_bos(model: Any, reference: Any) -> None:
    options = dict(max_new_tokens=6, do_sample=False)
    expected = reference.generate(**options)
    assert model.generate(**options).equal(expected) and expected[0, 0] == 2
    assert model.generate(input_ids=None, attention_mask=None, **options).equal(expected)


def test_kinds_of_tensors(model: Any, inputs: Any) -> None:
    given, options = inputs([3, 6]), dict(max_new_tokens=4, do_sample=False)
    ids, mask = given["input_ids"], given["attention_mask"]
    expected = model.generate(ids, attention_mask=mask, **options)
    assert expected.dtype == torch.int64 and not expected.is_inference()
    for same_ids, same_mask in (
        (ids.int(), mask.int()), (ids.to(torch.uint8), mask.bool()), (ids, mask.float()), (ids, mask.tolist()),
        (ids, None),
    ):  # fmt: skip
        assert model.generate(input_ids=same_ids, attention_mask=same_mask, **options).equal(expected)
        if same_mask is not None:
            assert model(same_ids, same_mask).logits.equal(model(ids, mask).logits)


def test_the_length_without_one_given(model: Any, inputs: Any, monkeypatch: Any) -> None:
    given = inputs([3, 5])
    config = GenerationConfig(do_sample=False)
    assert model.generate(**given, generation_config=config, eos_token_id=None).shape == (2, 55)
    long = inputs([3, 40])
    assert model.generate(**long, eos_token_id=None).shape == (
        2,
        64,
    )  # as in transformers
    monkeypatch.setattr(model.generation_config, "max_new_tokens", 3)
    assert model.generate(**given, eos_token_id=None).shape == (2, 8)


def test_the_default_length_is_not_reported_as_an_argument(model: Any, inputs: Any, monkeypatch: Any) -> None:
    warnings_seen: list[str] = []
    monkeypatch.setattr("transformers.generation.utils.logger.warning_once", warnings_seen.append)
    config = GenerationConfig(do_sample=False)
    assert model.generate(**inputs([3]), generation_config=config).shape[1] <= 53
    assert not warnings_seen and config.max_new_tokens is None


def test_another_length_among_the_criteria_is_that_of_the_call(
    model: Any, reference: Any, inputs: Any
) -> None:
    class Sooner(MaxLengthCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return super().__call__(input_ids, scores) | (input_ids[:, -1] >= 0)

    given = inputs([3, 6, 5])
    for criterion, width in (
        (MaxLengthCriteria(9), 9),
        (MaxLengthCriteria(2), 7),
        (MaxLengthCriteria(19), 19),
        (Sooner(50), 7),
    ):
        options = dict(
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
            stopping_criteria=StoppingCriteriaList([criterion]),
        )
        theirs = reference.generate(**given, **options)
        assert theirs.shape[1] == width
        assert model.generate(**given, **options).equal(theirs)


def test_without_a_criterion_of_ones_own_nothing_ends_a_row(
    model: Any, inputs: Any, monkeypatch: Any
) -> None:
    seen = []
    choose = HFChoice.choose
    monkeypatch.setattr(
        HFChoice, "choose", lambda self, *rest: seen.append(self.can_end) or choose(self, *rest)
    )
    for end, can_end in ((None, False), (1, True)):
        model.generate(**inputs([3, 6]), max_new_tokens=2, eos_token_id=end, pad_token_id=0)
        assert set(seen) == {can_end}
        seen.clear()


def test_a_mask_that_is_inferred(model: Any, reference: Any, monkeypatch: Any) -> None:
    options = dict(max_new_tokens=6, do_sample=False)
    padded = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    assert model.generate(padded, **options).equal(reference.generate(padded, **options))
    inside = torch.tensor([[7, 8, 9, 10], [2, 5, 0, 7]])
    everything = dict(attention_mask=torch.ones_like(inside))
    # If two arguments could be meant, the message names both.
    assert model.generate(inside, **everything, **options).equal(
        reference.generate(inside, **everything, **options)
    )
    ends = dict(eos_token_id=0, pad_token_id=0)  # where the pad id ends texts, transformers infers none
    assert model.generate(inside, **ends, **options).equal(reference.generate(inside, **ends, **options))
    monkeypatch.setattr("flexgen.engine.model.Call", None)
    words = r"row 1 has a hole.* No mask was given.* pad_token_id = 0.*torch.ones_like\(input_ids\)"
    with pytest.raises(RequestError, match=words):
        model.generate(inside, **options)
    with pytest.raises(RequestError, match="row 0 is all zero.* No mask was given"):
        model.generate(torch.tensor([[0, 0], [5, 6]]), **options)


def test_right_padding_means_the_same(model: Any, inputs: Any) -> None:
    given = inputs([3, 5])
    right = {"input_ids": given["input_ids"].clone(), "attention_mask": given["attention_mask"].flip(1)}
    right["input_ids"][0] = right["input_ids"][0].roll(-2)
    new = [model.generate(**x, max_new_tokens=6)[:, 5:].tolist() for x in (given, right)]
    assert new[0] == new[1]


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "embeddings": (dict(inputs_embeds=torch.zeros(2, 5, 32)), NotImplementedError, "inputs_embeds"),
    "attentions": (dict(output_attentions=True), NotImplementedError, "output_attentions"),
    "guidance": (dict(guidance_scale=1.5), NotImplementedError, "guidance_scale"),
    "contrast": (dict(penalty_alpha=0.6, top_k=4), NotImplementedError, "contrastive search"),
    "greedy sequences": (dict(num_return_sequences=2, do_sample=False), ValueError, "num_return_sequences"),
    "a typo": (dict(max_new_token=3), ValueError, "max_new_token"),
    "too long": (dict(max_new_tokens=10**9), CapacityError, "needs .* on the cpu tier"),
    "far too long": (
        dict(max_new_tokens=10**15),
        RequestError,
        "max_new_tokens is 1000000000000000; it must be",
    ),
    "no tokens": (dict(max_new_tokens=0), ValueError, "greater than 0"),
    "part of a token": (dict(max_new_tokens=2.5), RequestError, "whole number"),
    "a length below the prompt's": (dict(max_new_tokens=None, max_length=4), ValueError, "max_length"),
    "paged cache": (dict(cache_implementation="paged"), NotImplementedError, "continuous batching"),
    "positions": (dict(position_ids=torch.ones(2, 5)), NotImplementedError, "position_ids"),
    "groups of beams": (dict(num_beams=4, num_beam_groups=2), NotImplementedError, "beam search"),
    "a cache": (dict(past_key_values=object()), NotImplementedError, "past_key_values"),
    "top_p": (dict(do_sample=True, top_p=-0.5), ValueError, "top_p"),
    "token healing": (dict(token_healing=True), NotImplementedError, "token_healing"),
    "a temperature that overflows": (
        dict(do_sample=True, temperature=1e-38),
        RequestError,
        "must be at least 1e-30",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, model: Any, inputs: Any, monkeypatch: Any) -> None:
    def no_work(*args: Any) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr("flexgen.engine.model.Call", no_work)
    options, error, words = REFUSED[case]
    with pytest.raises(error, match=words) as raised:
        model.generate(**inputs([3, 5]), **dict(max_new_tokens=2) | options)
    if error is NotImplementedError:
        assert isinstance(raised.value, UnsupportedError)


WRONG_IDS: dict[str, tuple[Any, Any, str]] = {
    "a list": ([[5, 6]], None, "list; give a tensor"),
    "what a tokenizer gives": (BatchEncoding({"input_ids": torch.tensor([[5]])}), None, r"\*\*inputs"),
    "one dimension": (torch.tensor([5, 6]), None, r"shape \(2,\)"),
    "no rows": (torch.zeros(0, 3, dtype=torch.int64), None, "no prompts"),
    "no columns": (torch.zeros(2, 0, dtype=torch.int64), None, "row 0 is all zero"),
    "fractions": (torch.rand(2, 3), None, "whole numbers"),
    "another vocabulary": (torch.tensor([[5], [36]]), None, "prompt 1 has id 36"),
    "a narrow mask": (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 2), "row 0 has 2 entries for 3"),
    "a short mask": (torch.ones(2, 3, dtype=torch.int64), torch.ones(1, 3), "1 rows for 2"),
}


@pytest.mark.parametrize("case", WRONG_IDS)
def test_wrong_ids(case: str, model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("flexgen.engine.model.Call", None)
    ids, mask, words = WRONG_IDS[case]
    for call in (lambda: model.generate(ids, attention_mask=mask), lambda: model(ids, mask)):
        with pytest.raises(RequestError, match=words):
            call()


@pytest.mark.parametrize(("row", "word"), [([0, 0, 0, 0, 0], "zero"), ([1, 0, 1, 1, 1], "hole")])
def test_masks_are_refused_by_row(row: list[int], word: str, model: Any, inputs: Any) -> None:
    given = inputs([3, 5, 4])
    given["attention_mask"][1] = torch.tensor(row)
    for call in (lambda: model.generate(**given, max_new_tokens=2), lambda: model(**given)):
        with pytest.raises(RequestError, match=f"row 1 .*{word}"):
            call()


def test_the_exception_of_a_processor_is_the_cause(model: Any, inputs: Any) -> None:
    def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyError("lost")

    with pytest.raises(LaneError) as raised:
        model.generate(**inputs([3]), max_new_tokens=2, logits_processor=LogitsProcessorList([broken]))
    assert isinstance(raised.value.__cause__, KeyError)


class Forced(LogitsProcessor):
    """Makes `id` the new token number `at`."""

    def __init__(self, prompt_len, at, id):
        self.length, self.id = prompt_len + at, id

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.length:
            scores = scores.clone()
            scores[:, self.id] = scores.max() + 1
        return scores


def test_a_special_token_can_be_a_stop_string():
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, padding_side="left")
    inputs = tokenizer(["Length: 42.7 km\nUnit: m\nAnswer:"], return_tensors="pt")
    prompt_len = inputs.input_ids.shape[1]

    def ids(model):
        forced = Forced(prompt_len, 3, tokenizer.unk_token_id)
        return model.generate(
            **inputs, max_new_tokens=8, do_sample=False, stop_strings=[tokenizer.unk_token], tokenizer=tokenizer,
            logits_processor=LogitsProcessorList([forced]),
        )  # fmt: skip

    with FlexGenForCausalLM.from_pretrained(MODEL_DIR, Policy(), device="cpu", dtype="float32") as model:
        found = ids(model)
    expected = ids(AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32))
    assert found.tolist() == expected.tolist()
    assert found.shape[1] == prompt_len + 4 and found[0, -1] == tokenizer.unk_token_id


def test_too_many_positions_for_the_table_are_refused(saved: Any, inputs: Any) -> None:
    """Learned positions end; those of the llama of the other tests do not."""
    with saved("opt").open() as model:
        room = model.lm.spec.max_positions - 5
        with pytest.raises(RequestError, match=f"at most {room} new tokens"):
            model.generate(**inputs([3, 5]), max_new_tokens=room + 1)
        with pytest.raises(RequestError, match="positions"):
            model(torch.full((1, room + 6), 5))
