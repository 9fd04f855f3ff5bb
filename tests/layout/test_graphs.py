"""Which cells are replayed as CUDA graphs, over how many positions, and what that takes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, MixtralConfig, OPTConfig

from flexgen.kernels.workspaces import GPU, HOST, gpu_workspaces
from flexgen.layout.cache import cache_segments
from flexgen.layout.graphs import extent, replayed, step_layout
from flexgen.layout.placement import place_weights
from flexgen.layout.plan import Target, plan_memory
from flexgen.layout.topology import LINKED
from flexgen.models import build_layers, open_model
from flexgen.models.embed import Head, InputEmbed
from flexgen.policy import Policy, Tier
from flexgen.units import ALIGNMENT, MIB
from flexgen.workload import Workload

HOPPER = gpu_workspaces(9.0)
ON_GPU = {"gpu": 100}
INT4 = {"gpu": {"percent": 100, "codec": "int4"}}
RESIDENT = dict(gpu_batch_size=4, weights=ON_GPU, cache=ON_GPU, activations=ON_GPU)
OPT = OPTConfig(
    vocab_size=64,
    hidden_size=128,
    word_embed_proj_dim=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=256,
)
LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=256,
)  # fmt: skip


_TINY = dict(
    vocab_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=256, head_dim=32,
)  # fmt: skip
_KINDS = ["sliding_attention", "full_attention"]
GEMMA2 = Gemma2Config(**_TINY, sliding_window=5, layer_types=_KINDS)
GEMMA3 = Gemma3TextConfig(**_TINY, sliding_window=5, layer_types=_KINDS)
MIXTURE = MixtralConfig(**_TINY, num_local_experts=3)


def layers_of(config, sep_layer=True):
    return build_layers(open_model(config, weights="dummy")[0], sep_layer)


def numbers(config, workspaces=HOPPER, **changes):
    policy = Policy(**RESIDENT | changes)
    layers = layers_of(config, policy.sep_layer)
    placement = place_weights(layers, policy.weights, torch.float16)
    return layers, replayed(layers, placement, policy, LINKED, workspaces)


@pytest.mark.parametrize("config", [OPT, LLAMA], ids=["opt", "llama"])
@pytest.mark.parametrize("sep_layer", [True, False])
def test_all_layers_of_what_is_resident_but_the_ends(config, sep_layer):
    layers, found = numbers(config, sep_layer=sep_layer)
    ends = [j for j, layer in enumerate(layers) if isinstance(layer, InputEmbed | Head)]
    assert len(ends) == 2 and sorted([*found, *ends]) == list(range(len(layers)))


@pytest.mark.parametrize(
    "changes",
    [
        dict(weights={"cpu": 100}),
        dict(weights=INT4),
        dict(cache={"gpu": 90, "cpu": 10}),
        dict(activations={"gpu": 50, "cpu": 50}),
        dict(attn_sparsity=0.5),
        dict(workspaces=HOST),
        dict(workspaces=GPU),  # not NVIDIA's
    ],
    ids=str,
)
def test_none_of_what_moves_is_decoded_or_chosen(changes):
    _, found = numbers(LLAMA, **changes)
    assert found == ()


@given(st.integers(1, 10_000), st.data())
def test_extents_hold_the_text_and_are_few(capacity, data):
    length = data.draw(st.integers(1, capacity))
    assert length <= extent(length, capacity) <= capacity
    assert extent(length, capacity) - length < max(capacity / 8, 64) + 16
    ends = sorted({extent(n, capacity) for n in range(1, capacity + 1)})
    assert len(ends) <= 8
    assert all(b - a >= 64 and a % 16 == 0 for a, b in zip(ends[:-2], ends[1:-1], strict=True))


@pytest.mark.parametrize(("config", "ropes"), [(OPT, 0), (LLAMA, 1)], ids=["opt", "llama"])
def test_what_changes_with_the_token_has_a_place_of_its_own(config, ropes):
    layers = layers_of(config)[1:-1]
    layout = step_layout(layers, segments_of(layers, 3, 100), 3, torch.float16)
    assert [shape for shape, _ in layout.shapes[:4]] == [(3, 1, 128), (3, 1), (3, 1, 1, 112), (2,)]
    assert [shape for shape, _ in layout.shapes[4:]] == [(3, 4, 1, 16)] * ropes
    for (begin, end), (shape, dtype) in zip(layout.extents, layout.shapes, strict=True):
        assert begin % ALIGNMENT == 0
        assert end - begin >= torch.Size(shape).numel() * dtype.itemsize
    assert all(a[1] == b[0] for a, b in zip(layout.extents, layout.extents[1:], strict=False))
    assert layout.nbytes == layout.extents[-1][1]


def segments_of(layers, rows, capacity):
    policy = Policy(**RESIDENT)
    own = {layer.layer_spec.attention for layer in layers}
    return {
        each: cache_segments(each.cache, policy, rows, capacity, torch.float16, LINKED)[0] for each in own
    }


@pytest.mark.parametrize(("capacity", "ring"), [(1000, True), (200, False)])
def test_layers_with_a_window_have_a_mask_over_their_ring(capacity, ring):
    layers, found = numbers(GEMMA3)
    assert len(found) == len(layers) - 2, "layers with and without a window"
    resident = [layers[j] for j in found]
    segments = segments_of([layer for layer in resident if layer.has_cache], 3, capacity)
    layout = step_layout(resident, segments, 3, torch.float16)
    whole, windowed = sorted(layout.places, key=lambda places: places.window is not None)
    assert (whole.count, whole.window) == (capacity, None)
    assert windowed.window.size == 5 and (windowed.pages > 1) == ring
    assert windowed.count == (windowed.pages * LINKED.pieces.memory_page_tokens if ring else capacity)
    assert windowed.extent(capacity) == windowed.count


def test_scores_that_are_capped_have_no_graph():
    layers, found = numbers(GEMMA2)
    assert [layers[j].has_cache for j in found] == [False] * 2


def test_a_mixture_may_have_a_graph():
    layers, found = numbers(MIXTURE)
    assert len(found) == len(layers) - 2


def test_the_plan_has_graphs_of_what_is_resident_and_only_of_that():
    def planned(prefix=0, **changes):
        policy = Policy(**RESIDENT | changes)
        layers = layers_of(LLAMA)
        placement = place_weights(layers, policy.weights, torch.float16)
        workload = Workload(100, 20, 8, prefix=prefix)
        plan = plan_memory(layers, placement, policy, Target(LINKED, workspaces=HOPPER), workload)
        return plan.on(Tier.GPU, "graphs")

    assert HOPPER.captured < planned() < HOPPER.captured + MIB
    assert planned() < planned(num_gpu_batches=2)
    assert planned(cache={"cpu": 100}) == 0
    assert planned(prefix=40) == 0  # neither the calls with a prefix nor the block that computes it
