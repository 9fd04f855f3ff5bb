"""What a job is warmed up with before it is measured."""

import numpy as np
import pytest
from transformers import OPTConfig

from flexgen import OptLM, Policy
from flexgen.runtime.call import Call
from flexgen.tuning.trial import warm_up

CONFIG = OPTConfig(
    vocab_size=64, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4,
    ffn_dim=48, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture
def prepared(monkeypatch):
    """The shape of each block that runs: rows of its batches, their positions, tokens of the cache."""
    shapes = []
    prepare = Call.prepare

    def recorded(call, prompts, *args):
        found = prepare(call, prompts, *args)
        shapes.append((str(found.batches), tuple(map(len, prompts)), call._workload.capacity))
        return found

    monkeypatch.setattr(Call, "prepare", recorded)
    return shapes


@pytest.mark.parametrize(
    ("lengths", "blocks"),
    [([6] * 4, 1), ([6] * 19, 2), ([6] * 3, 1), ([3, 9, 4, 4, 7, 2, 5], 2)],
    ids=["one block", "a last block of another size", "less than a block", "prompts of many lengths"],
)
def test_every_shape_of_a_job_is_warmed_up(prepared, lengths, blocks):
    prompts = [np.arange(5, 5 + length) for length in lengths]
    with OptLM(CONFIG, Policy(gpu_batch_size=2, num_gpu_batches=2), device="cpu", weights="dummy") as model:
        warm_up(model, prompts, 5)
        before = list(prepared)
        model.generate(prompts, 5, stop=())
    assert len(before) == blocks  # no more than is needed: a block of each shape
    assert set(prepared[len(before) :]) == set(before)
