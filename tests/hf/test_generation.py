"""Generation modes in transformers' loops, and hidden states, compared with transformers' generate."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from flexgen.errors import CapacityError, RequestError, UnsupportedError
from flexgen.policy import Tier

LENGTHS = [4, 9, 2]
ENDS = [6, 9, 14, 20, 21]
ALL_OUTPUTS = dict(
    return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True
)

BEAMS: dict[str, dict[str, Any]] = {
    "2 beams": dict(num_beams=2),
    "4 beams": dict(num_beams=4),
    "stopped early": dict(num_beams=4, early_stopping=True, eos_token_id=ENDS, pad_token_id=0),
    "never stopped early": dict(num_beams=2, early_stopping="never", eos_token_id=ENDS, pad_token_id=0),
    "all beams returned": dict(num_beams=4, num_return_sequences=4, length_penalty=2.0),
    "with processors": dict(num_beams=2, repetition_penalty=1.8, no_repeat_ngram_size=2, bad_words_ids=[[9]]),
    "a penalty of the prompt": dict(num_beams=2, encoder_repetition_penalty=2.5),
    "allowed ids": dict(num_beams=2, prefix_allowed_tokens_fn=lambda row, ids: [row + 5, row + 11, 20]),
    "without a cache": dict(num_beams=2, use_cache=False),
}


def generated(model: Any, given: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(**given, **options)


@pytest.fixture(scope="module", params=["llama", "opt"])
def pair(request: Any, saved: Any) -> Any:
    """flexgen's model and transformers' own, with the same weights."""
    made = saved(request.param)
    with made.open() as opened:
        yield opened, made.reference


@pytest.mark.parametrize("case", BEAMS)
def test_beam_search(case: str, pair: Any, inputs: Any) -> None:
    model, reference = pair
    options = dict(do_sample=False, max_new_tokens=7) | BEAMS[case]
    given = inputs(LENGTHS)
    assert model.generate(**given, **options).tolist() == reference.generate(**given, **options).tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_all_outputs_of_beam_search(use_cache: bool, pair: Any, inputs: Any) -> None:
    model, reference = pair
    options = dict(
        do_sample=False, max_new_tokens=5, num_beams=3, num_return_sequences=2, use_cache=use_cache
    )
    given = inputs(LENGTHS)
    ours, theirs = (each.generate(**given, **options, **ALL_OUTPUTS) for each in (model, reference))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert ours.beam_indices.tolist() == theirs.beam_indices.tolist()
    assert_close(ours.sequences_scores, theirs.sequences_scores, atol=1e-4, rtol=1e-4)
    for name in ("scores", "logits"):
        assert_close(ours[name], theirs[name], atol=1e-3, rtol=1e-3)
    padding = given["attention_mask"].repeat_interleave(3, dim=0) == 0
    assert_hidden_states(ours.hidden_states, theirs.hidden_states, padding)


def assert_hidden_states(ours: Any, theirs: Any, padding: torch.Tensor) -> None:
    """Equal but for the padding of the prompts, which is zero here."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert [states.shape for states in mine] == [states.shape for states in other]
        for states, expected in zip(mine, other, strict=True):
            shown = torch.ones(states.shape[:2], dtype=torch.bool)
            if states.shape[1] >= padding.shape[1]:
                shown[:, : padding.shape[1]] = ~padding
                assert not states[~shown].any()
            assert_close(states[shown], expected[shown], atol=1e-3, rtol=1e-3)


def test_beam_sampling(pair: Any, inputs: Any) -> None:
    model, reference = pair
    options = dict(do_sample=True, num_beams=2, max_new_tokens=6, top_k=20, temperature=1.5)
    given = inputs(LENGTHS)
    ours = generated(model, given, **options)
    assert ours.tolist() == generated(reference, given, **options).tolist()
    assert ours.tolist() != generated(model, given, **options | dict(do_sample=False)).tolist()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("do_sample", [True, False])
def test_hidden_states_of_greedy_search_and_sampling(
    do_sample: bool, use_cache: bool, pair: Any, inputs: Any
) -> None:
    model, reference = pair
    given = inputs(LENGTHS)
    options = dict(do_sample=do_sample, top_k=1, max_new_tokens=5, use_cache=use_cache)
    options |= dict(eos_token_id=ENDS, pad_token_id=0)
    ours, theirs = (each.generate(**given, **options, **ALL_OUTPUTS) for each in (model, reference))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert_hidden_states(ours.hidden_states, theirs.hidden_states, given["attention_mask"] == 0)


def test_hidden_states_do_not_change_the_samples(model: Any, inputs: Any) -> None:
    given, options = inputs(LENGTHS), dict(do_sample=True, max_new_tokens=6, temperature=1.5)
    expected = generated(model, given, **options)
    timing = model.lm.stats
    assert generated(model, given, **options, **ALL_OUTPUTS).sequences.equal(expected)
    assert model.lm.stats.new_tokens == timing.new_tokens  # of generating, not of the pass for the states


def test_hidden_states_are_planned_before_any_work(model: Any, inputs: Any, monkeypatch: Any) -> None:
    given = inputs(LENGTHS)
    options = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    model.generate(**given, **options)
    held = model.lm._machine.limits() | {Tier.CPU: model.lm.stats.plan.on(Tier.CPU)}
    monkeypatch.setattr(type(model.lm._machine), "limits", lambda self: held)
    model.generate(**given, **options)
    monkeypatch.setattr("flexgen.engine.model.Call", None)
    with pytest.raises(CapacityError, match="hidden states home"):
        model.generate(**given, **options, output_hidden_states=True)


class Follows:
    """Allows the ids 1 to 3 after the newest one: a processor of one's own."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = (ids[:, -1:] + torch.arange(1, 4)) % scores.shape[1]
        return torch.full_like(scores, -torch.inf).scatter(1, allowed, scores.gather(1, allowed))


class HasTwice(StoppingCriteria):
    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (ids == 20).sum(1) >= 2


def test_processors_and_criteria_of_ones_own_see_the_beams(model: Any, reference: Any, inputs: Any) -> None:
    options = dict(do_sample=False, num_beams=2, max_new_tokens=8, eos_token_id=1, pad_token_id=0)
    given = inputs(LENGTHS)
    own = (
        dict(logits_processor=LogitsProcessorList([Follows()])),
        dict(stopping_criteria=StoppingCriteriaList([HasTwice()])),
    )
    for each in own:
        ours, theirs = (which.generate(**given, **options, **each) for which in (model, reference))
        assert ours.tolist() == theirs.tolist()


ASSISTED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "with processors": dict(repetition_penalty=1.5, no_repeat_ngram_size=2),
    "with an end": dict(eos_token_id=ENDS, pad_token_id=0),
}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("assistant", ["the same", "another", "flexgen", "itself", "lookup"])
@pytest.mark.parametrize("case", ASSISTED)
def test_assisted_generation_gives_the_greedy_ids(
    case: str, assistant: str, padded: bool, saved: Any, model: Any, reference: Any, inputs: Any
) -> None:
    given = {name: tensor[:1] for name, tensor in inputs([5, 8] if padded else [5]).items()}
    options = dict(do_sample=False, max_new_tokens=12) | ASSISTED[case]
    expected = reference.generate(**given, **options)
    if assistant == "lookup":
        helped = model.generate(**given, **options, prompt_lookup_num_tokens=3)
    elif assistant == "flexgen":
        with saved("opt").open() as helper:
            helped = model.generate(**given, **options, assistant_model=helper)
    else:
        helper = {"the same": reference, "another": saved("opt").reference, "itself": model}[assistant]
        helped = model.generate(**given, **options, assistant_model=helper)
    assert helped.tolist() == expected.tolist()


def test_all_outputs_of_assisted_generation(model: Any, reference: Any, saved: Any, inputs: Any) -> None:
    given, options = inputs([6]), dict(do_sample=False, max_new_tokens=7)
    for helper in (reference, saved("opt").reference):
        ours, theirs = (
            each.generate(**given, **options, **ALL_OUTPUTS, assistant_model=helper)
            for each in (model, reference)
        )
        assert ours.sequences.tolist() == theirs.sequences.tolist()
        for name in ("scores", "logits"):
            assert_close(ours[name], theirs[name], atol=1e-3, rtol=1e-3)
        assert_hidden_states(ours.hidden_states, theirs.hidden_states, given["attention_mask"] == 0)


def test_assisted_sampling_draws_as_transformers_does(model: Any, reference: Any, inputs: Any) -> None:
    options = dict(do_sample=True, temperature=1.3, max_new_tokens=10, prompt_lookup_num_tokens=2)
    ours, theirs = (generated(each, inputs([6]), **options) for each in (model, reference))
    assert ours.tolist() == theirs.tolist()


def test_an_assistant_that_agrees_saves_passes(
    model: Any, reference: Any, inputs: Any, monkeypatch: Any
) -> None:
    passes = []
    forward = type(model.lm).forward_with
    monkeypatch.setattr(
        type(model.lm), "forward_with", lambda self, *rest: passes.append(1) or forward(self, *rest)
    )
    monkeypatch.setattr(reference.generation_config, "num_assistant_tokens", 4)
    model.generate(**inputs([5]), max_new_tokens=10, do_sample=False, assistant_model=reference)
    assert len(passes) < 10


def test_a_recomputing_mode_says_so_once(model: Any, inputs: Any, caplog: Any) -> None:
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "flexgen"):
        model.generate(**inputs([3]), max_new_tokens=2, do_sample=False)
        assert "no KV cache" not in caplog.text
        for _ in range(2):
            model.generate(**inputs([3]), max_new_tokens=2, num_beams=2, do_sample=False)
    assert (
        caplog.text.count("beam search has no KV cache in flexgen, so each step computes all positions") == 1
    )


@pytest.mark.parametrize(("options", "rows"), [(dict(num_beams=2), 2), (dict(prompt_lookup_num_tokens=2), 1)])
def test_the_largest_pass_is_checked_first(
    options: Any, rows: int, model: Any, saved: Any, inputs: Any, monkeypatch: Any
) -> None:
    given = inputs([4])
    held = dict(model.lm._machine.limits())
    # With all logits: at least the memory of the first pass of either mode.
    model(**{name: tensor.expand(rows, -1) for name, tensor in given.items()})
    first = model.lm.stats.plan
    monkeypatch.setattr(type(model.lm._machine), "limits", lambda self: held)
    held[Tier.CPU] = first.on(Tier.CPU)
    held[Tier.GPU] = first.on(Tier.GPU)
    with monkeypatch.context() as no_work:
        no_work.setattr("flexgen.engine.model.Call", None)
        with pytest.raises(CapacityError):
            model.generate(**given, max_new_tokens=50, do_sample=False, **options)
    monkeypatch.undo()
    with saved("opt").open() as learned:
        monkeypatch.setattr("flexgen.engine.model.Call", None)
        with pytest.raises(RequestError, match="at most 60 new tokens"):
            learned.generate(**given, max_new_tokens=61, do_sample=False, **options)


def test_refusals(model: Any, inputs: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("flexgen.engine.model.Call", None)
    right = {name: tensor.flip(1) for name, tensor in inputs([3, 5]).items()}
    options = dict(max_new_tokens=2, do_sample=False)
    for mode in (
        dict(num_beams=2),
        dict(return_dict_in_generate=True, output_hidden_states=True),
    ):
        with pytest.raises(RequestError, match="row 0 is padded on the right.*Pad on the left"):
            model.generate(**right, **options, **mode)
    for name, value in (("assistant_early_exit", 1), ("use_mtp", True)):
        with pytest.raises(UnsupportedError, match=name):
            model.generate(**inputs([3]), **options, **{name: value})
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(**inputs([3, 4]), **options, prompt_lookup_num_tokens=2)
    with pytest.raises(RequestError, match="pad_token_id is 99"):
        model.generate(
            **inputs([3]), **options, pad_token_id=99, return_dict_in_generate=True, output_hidden_states=True
        )
    with pytest.raises(UnsupportedError, match="contrastive search.*never runs code from a repository"):
        model.generate(**inputs([3]), **options, penalty_alpha=0.6, top_k=4)
