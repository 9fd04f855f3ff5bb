"""A long prompt in chunks has the same results as in one piece, and as in transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.kernels.scoring import Scoring
from flexgen.models.layer import chunks
from flexgen.models.ops import MASK_VALUES, causal_attention, rope_tables
from flexgen.models.spec import RopeSpec

FAMILIES = [
    ("opt", {}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    ("llama", {}),
    ("llama", {"num_key_value_heads": 1}),
    (
        "llama",
        {
            "max_position_embeddings": 8,  # fewer than the prompt has: the rope is stretched
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
        },
    ),
]


@given(rows=st.integers(1, 9), seq=st.integers(1, 40), limit=st.integers(1, 60))
def test_chunks_cover_a_batch_once_and_in_order(rows: int, seq: int, limit: int) -> None:
    seen = torch.zeros(rows, seq, dtype=torch.int64)
    sizes = []
    for number, part in enumerate(chunks(rows, seq, limit), 1):
        assert not seen[part].any()
        seen[part] = number
        sizes.append(seen[part].numel())
        assert part.tokens == slice(0, seq) or part.rows.stop - part.rows.start == 1
    assert seen.all() and max(sizes) <= limit
    assert (seen.flatten().diff() >= 0).all()
    whole = limit // seq * seq  # rows come first
    assert max(sizes) - min(sizes) <= (seq if whole else 1)


@pytest.mark.parametrize("sep_layer", [True, False])
@pytest.mark.parametrize(("family", "changes"), FAMILIES)
@pytest.mark.parametrize("limit", [1, 3, 14, 30])
@pytest.mark.parametrize("starts", [[0, 0, 0], [0, 3, 3, 13, 5]], ids=["equal", "ragged"])
def test_logits(
    family: str,
    changes: dict[str, Any],
    sep_layer: bool,
    limit: int,
    starts: list[int],
    make_model: Any,
    save: Any,
    runner: Any,
) -> None:
    model = make_model(family, **changes)
    directory = save(model)
    ids = torch.randint(4, 64, (len(starts), 14), generator=torch.Generator().manual_seed(1))
    at_once, in_chunks = (
        runner(directory, torch.float32, sep_layer, chunk_tokens=tokens).full(ids, starts)
        for tokens in (1 << 30, limit)
    )
    torch.testing.assert_close(in_chunks, at_once, rtol=1e-5, atol=1e-5)
    there = torch.arange(14) >= torch.tensor(starts)[:, None]
    positions = (there.long().cumsum(1) - 1).clamp_min(0)
    extra = {"position_ids": positions} if family == "llama" else {}
    theirs = model(ids, attention_mask=there.long(), **extra).logits
    torch.testing.assert_close(in_chunks[there], theirs[there], rtol=0, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("start", [0, 7, 1500])
def test_queries_at_the_end_of_their_keys(start: int, heads: int) -> None:
    """More queries than one mask has rows for, against the whole at once."""
    generator = torch.Generator().manual_seed(0)
    seq, queries = 2000, 1200
    assert queries * seq > 2 * MASK_VALUES
    q = torch.randn(1, heads, seq, 8, generator=generator)
    k, v = torch.randn(2, 1, 1, seq, 8, generator=generator)
    whole = causal_attention(q, k, v, [start], Scoring(0.4))
    last = causal_attention(q[:, :, seq - queries :], k, v, [start], Scoring(0.4))
    torch.testing.assert_close(last, whole[:, :, seq - queries :], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_of_a_chunk_is_that_of_the_longest_row(kind: str) -> None:
    rope = RopeSpec(kind, (1.0, 0.1), factor=2.0, original_max_positions=8, long_inv_freq=(0.5, 0.05))
    positions = torch.arange(20).expand(2, 20)
    length = positions.max() + 1
    whole = rope_tables(rope, positions, torch.float32)
    for begin in (0, 4, 15):
        part = rope_tables(rope, positions[:, begin : begin + 5], torch.float32, length)
        for ours, theirs in zip(part, whole, strict=True):
            assert ours.equal(theirs[:, :, begin : begin + 5])
    assert not rope_tables(rope, positions[:, :5], torch.float32)[1].equal(whole[1][:, :, :5])


def test_chunks_are_an_attribute_of_the_model(make_model: Any, save: Any, runner: Any) -> None:
    spec = runner(save(make_model("opt")), torch.float32).spec
    assert spec.chunk_tokens >= 1024 and replace(spec, chunk_tokens=7).chunk_tokens == 7
