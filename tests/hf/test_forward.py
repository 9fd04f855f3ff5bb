"""`forward` compared with transformers: logits, loss and hidden states, with padding at either end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from flexgen.errors import CapacityError, RequestError
from flexgen.policy import Policy


def padded() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, a mask with padding at both ends, and the positions that it means."""
    ids = torch.randint(5, 30, (5, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, 5:] = mask[4, :1] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)


@pytest.mark.parametrize("sep_layer", [True, False])
@pytest.mark.parametrize("name", ["opt", "opt projected", "llama"])
def test_logits_hidden_states_and_loss(name: str, sep_layer: bool, saved: Any) -> None:
    made = saved(name)
    ids, mask, positions = padded()
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 4] = -100
    with made.open(Policy(gpu_batch_size=2, weights={"cpu": 50, "disk": 50}, sep_layer=sep_layer)) as model:
        ours = model(ids, mask, labels=labels, output_hidden_states=True)
        as_tuple = model(ids, mask, labels=labels, return_dict=False)
    labels = labels.masked_fill(mask.roll(1, 1) == 0, -100)  # transformers would score padding's prediction
    with torch.no_grad():
        theirs = made.reference(
            ids, attention_mask=mask, position_ids=positions, labels=labels, output_hidden_states=True
        )
    there = mask == 1
    assert_close(ours.logits[there], theirs.logits[there], atol=1e-4, rtol=1e-4)
    assert not ours.logits[~there].any()
    assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 4
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert mine.shape == other.shape
        assert_close(mine[there], other[there], atol=1e-4, rtol=1e-4)
    assert len(as_tuple) == 2 and as_tuple[0].equal(ours.loss) and as_tuple[1].equal(ours.logits)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize(
    "keep", [1, 3, torch.tensor([0, 5]), [0, 5]], ids=["last", "some", "indices", "list"]
)
def test_logits_to_keep(keep: Any, device: str, saved: Any) -> None:
    made = saved("llama")
    ids, mask, _ = padded()
    with made.open(device=device) as model:
        for use in (torch.ones_like(mask), mask):
            whole = model(ids, use).logits
            kept = model(ids, use, logits_to_keep=keep).logits
            expected = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
            assert_close(kept, expected, atol=1e-5, rtol=1e-5)


def test_without_a_mask_every_position_counts(model: Any, reference: Any) -> None:
    ids = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]])
    with torch.no_grad():
        assert_close(model(ids).logits, reference(ids).logits, atol=1e-4, rtol=1e-4)


def test_labels_of_padding_do_not_count(model: Any) -> None:
    ids, mask, _ = padded()
    expected = model(ids, mask, labels=ids.masked_fill(mask == 0, -100)).loss
    assert model(ids, mask, labels=ids).loss.equal(expected)
    nothing = model(ids, mask, labels=torch.full_like(ids, -100), return_dict=None)
    assert nothing.loss.isnan() and nothing.past_key_values is None


def test_hidden_states_are_planned(model: Any, monkeypatch: Any) -> None:
    ids, mask, _ = padded()
    model(ids, mask)
    before = model.lm.stats.plan.by_tier
    model(ids, mask, output_hidden_states=True)
    after = model.lm.stats.plan.by_tier
    states = 4 * ids.numel() * 32 * 4  # layers, positions, hidden size, float32
    leaving = 2 * 4 * 8 * 32 * 4  # of two cells of four prompts
    assert after["cpu"] - before["cpu"] == states + leaving
    assert after["gpu"] > before["gpu"]
    held = model.lm._machine.limits() | {"cpu": after["cpu"] - 1}
    monkeypatch.setattr(type(model.lm._machine), "limits", lambda self: held)
    model(ids, mask)
    with pytest.raises(CapacityError, match="hidden states home"):
        model(ids, mask, output_hidden_states=True)


def test_refusals(model: Any) -> None:
    ids, mask, _ = padded()
    for name, value in (
        ("inputs_embeds", torch.zeros(1, 2, 32)),
        ("output_attentions", True),
        ("past_key_values", object()),
        ("cache", DynamicCache()),
        ("position_ids", torch.zeros(5, 8)),
        ("cache_position", torch.arange(1, 9)),
    ):
        with pytest.raises(NotImplementedError, match=name):
            model(ids, mask, **{name: value})
    with pytest.raises(TypeError, match="lables"):
        model(ids, lables=ids)
    model(ids, mask, use_cache=False, output_attentions=False, past_key_values=None)
    with pytest.raises(RequestError, match=r"labels have shape \(5, 3\)"):
        model(ids, labels=ids[:, :3])
    with pytest.raises(RequestError, match="labels contain the id 36"):
        model(ids, labels=ids.masked_fill(ids == ids[2, 3], 36))
