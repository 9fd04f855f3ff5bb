"""Which decode cells a CPU repeats from tapes: those of the runtime, and about as many bytes."""

import pytest
import torch
from transformers import GemmaConfig, LlamaConfig, MistralConfig, MixtralConfig, OPTConfig

from flexgen import OptLM, Policy
from flexgen.kernels.loading import native_available
from flexgen.layout.passes import Passes
from flexgen.layout.placement import place_weights
from flexgen.layout.tapes import kept_bytes, recordable
from flexgen.layout.topology import SHARED
from flexgen.models import build_layers, open_model
from flexgen.runtime.recorded import RecordedCells

SHAPE = dict(
    vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=300
)
LLAMA = LlamaConfig(num_key_value_heads=2, intermediate_size=128, **SHAPE)
CONFIGS = {
    "llama": LLAMA,
    "another gate": GemmaConfig(head_dim=16, num_key_value_heads=2, intermediate_size=128, **SHAPE),
    "window": MistralConfig(num_key_value_heads=2, intermediate_size=128, sliding_window=8, **SHAPE),
    "mixture": MixtralConfig(
        num_key_value_heads=2, intermediate_size=128, num_local_experts=4, sliding_window=None, **SHAPE
    ),
    "layer norms": OPTConfig(word_embed_proj_dim=64, ffn_dim=128, **SHAPE),
}
IN_PLACE = {name: {"cpu": 100} for name in ("weights", "cache", "activations")}

pytestmark = pytest.mark.skipif(not native_available(), reason="no compiled kernels here")


@pytest.fixture
def recorded(monkeypatch):
    """The cells that the last call recorded, and the bytes that their tapes kept."""
    found = {}
    drop = RecordedCells.drop

    def keep(cells):
        if getattr(cells, "_recorded", None):
            found["cells"] = {cell for cell, tape in cells._recorded.items() if tape is not None}
            found["bytes"] = cells._nbytes
        drop(cells)

    monkeypatch.setattr(RecordedCells, "drop", keep)
    monkeypatch.setattr("flexgen.kernels.half_linear._rows", lambda dtype: 64)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_gpu_batches": 2, "sep_layer": False},
        {"weights": {"cpu": {"percent": 100, "codec": "int4"}}},
        {"weights": {"cpu": 50, "disk": 50}},
        {"cache": {"disk": 100}},
        {"cache": {"cpu": {"percent": 100, "codec": "int8"}}},
        {"cache": {"cpu": 50, "gpu": 50}},
        {"attn_sparsity": 0.5},
        {"guess": 2},
    ],
    ids=lambda changes: ", ".join(changes) or "in place",
)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cells_are_those_of_the_runtime(recorded, name, changes, dtype, tmp_path):
    if dtype == "float32" and "codec" in str(changes):
        pytest.skip("the head of an encoded model is repeated too, which is little of a pass")
    policy = Policy(**{"gpu_batch_size": 2, **IN_PLACE, **changes})
    prompts = [list(range(5 + n, 25 + n)) for n in range(policy.block_size)]
    options = dict(weights="dummy", dtype=dtype, device="cpu", offload_dir=tmp_path, progress=False)
    with OptLM(CONFIGS[name], policy.replace(share_prefix=False), **options) as model:
        model.generate(prompts, 6, stop=())
    layers = build_layers(open_model(CONFIGS[name], "dummy")[0], policy.sep_layer)
    placement = place_weights(layers, policy.weights, getattr(torch, dtype))
    found = recordable(layers, placement, policy, Passes(20, guess=policy.guess), SHARED)
    expected = {(j, k) for j in found for k in range(policy.num_gpu_batches)}
    assert {(j, k) for j, k, _ in recorded.get("cells", ())} == expected
    if policy.guess:
        return  # passes with and without guesses have tapes of their own
    nbytes = policy.num_gpu_batches * kept_bytes(layers, found, 2, placement.dtype)
    # Results of the same shape are shared by layers of different kinds, too.
    assert not expected or 0.7 * nbytes <= recorded["bytes"] <= 1.25 * nbytes


def test_cells_with_a_shared_prefix_are_not_repeated():
    layers = build_layers(open_model(LLAMA, "dummy")[0], True)
    policy = Policy(**IN_PLACE)
    placement = place_weights(layers, policy.weights, torch.bfloat16)
    every = recordable(layers, placement, policy, Passes(20), SHARED)
    others = recordable(layers, placement, policy, Passes(20, shared=40), SHARED)
    assert set(every) - set(others) == {j for j, layer in enumerate(layers) if layer.has_cache}
