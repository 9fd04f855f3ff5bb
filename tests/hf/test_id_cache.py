"""The cache of ids: its operations, and forward passes that continue from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import Cache, DynamicCache

from flexgen.errors import RequestError, UnsupportedError
from flexgen.hf.id_cache import CACHE_NAME, IdCache, read_cache


def test_operations_of_generation_loops() -> None:
    cache = IdCache()
    assert isinstance(cache, Cache) and cache.get_seq_length() == 0 and cache.batch_size == -1
    assert cache.is_croppable and not cache.is_compileable and not all(cache.is_linear)
    for operation in (lambda: cache.crop(-1), lambda: cache.reorder_cache(torch.tensor([0])), cache.reset):
        operation()
    cache.ids = cache.with_new(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    cache.crop(0)
    assert cache.get_seq_length() == 3 and cache.batch_size == 2
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.ids is not None and cache.ids.tolist() == [[4, 5], [4, 5]]
    cache.crop(1)  # older versions of transformers give the length
    cache.batch_repeat_interleave(2)
    assert cache.ids.tolist() == [[4]] * 4
    assert cache.with_new(torch.full((4, 1), 7)).tolist() == [[4, 7]] * 4
    with pytest.raises(RequestError, match="cache has 4 rows and input_ids have 1"):
        cache.with_new(torch.tensor([[7]]))


def test_a_cache_is_given_by_either_name() -> None:
    cache = IdCache()
    assert read_cache(cache=None, past_key_values=cache) is cache
    assert read_cache(cache=None) is None
    with pytest.raises(UnsupportedError, match="cache: a DynamicCache is not supported"):
        read_cache(cache=DynamicCache())


def cached(result: Any) -> Any:
    """The cache of a result, whose name depends on the version of transformers."""
    return getattr(result, CACHE_NAME)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_forward_continues_from_a_cache(name: str, saved: Any, inputs: Any) -> None:
    given = inputs([4, 9, 6])
    ids, mask = given["input_ids"], given["attention_mask"]
    with saved(name).open() as model:
        whole = model(ids, mask, output_hidden_states=True)
        first = model(ids[:, :7], mask[:, :7], use_cache=True)
        assert_close(first.logits, whole.logits[:, :7], atol=1e-5, rtol=1e-5)
        assert cached(first).get_seq_length() == 7
        then = model(
            ids[:, 7:],
            mask,
            cache=cached(first),
            cache_position=torch.arange(7, 9),
            output_hidden_states=True,
        )
        assert_close(then.logits, whole.logits[:, 7:], atol=1e-5, rtol=1e-5)
        for states, expected in zip(then.hidden_states, whole.hidden_states, strict=True):
            assert_close(states, expected[:, 7:], atol=1e-5, rtol=1e-5)
        assert cached(then) is cached(first) and cached(then).get_seq_length() == 9
        cached(then).crop(-1)
        for keep in (0, 1):
            last = model(ids[:, 8:], mask, past_key_values=cached(then), logits_to_keep=keep)
            assert_close(last.logits, whole.logits[:, 8:], atol=1e-5, rtol=1e-5)
            cached(last).crop(-1)
        assert cached(model(ids, mask)) is None
        assert [type(part).__name__ for part in model(ids, mask, use_cache=True, return_dict=False)] == [
            "Tensor", "IdCache",
        ]  # fmt: skip
        with pytest.raises(UnsupportedError, match="labels are not supported with a cache"):
            model(ids[:, 8:], mask, cache=cached(then), labels=ids[:, 8:])
        with pytest.raises(RequestError, match="entries for"):
            model(ids[:, 8:], mask[:, 8:], cache=cached(then))


def test_generate_takes_the_cache_of_an_earlier_pass(model: Any, reference: Any, inputs: Any) -> None:
    given, options = inputs([4, 9]), dict(max_new_tokens=4, do_sample=False)
    cache = cached(model(**given, use_cache=True))
    cache.crop(-1)
    for mode in ({}, dict(num_beams=2)):
        ours = model.generate(**given, **options, **mode, cache=cache)
        assert ours.equal(reference.generate(**given, **options, **mode))
    cache = cached(model(**given, use_cache=True))
    with pytest.raises(RequestError, match="9 positions and the cache has 9; pass all ids"):
        model.generate(**given, **options, past_key_values=cache)
