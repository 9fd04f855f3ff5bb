"""Each slot is as large as the layers that it serves, and a slot in use is never filled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, OPTConfig

from flexgen import OptLM, Policy
from flexgen.kernels import groupwise_linear
from flexgen.kernels.loading import native_available
from flexgen.layout.placement import place_weights
from flexgen.layout.topology import LINKED, SHARED
from flexgen.layout.weight_slots import SlotSizes, decoded_bytes, decodes, slot_sizes
from flexgen.memory.store import Store
from flexgen.models import build_layers, open_model
from flexgen.policy import Share, Split
from flexgen.quant import CODECS


def test_a_vocabulary_takes_room_in_one_slot():
    """Llama-3.2-1B in shape: its tied head is five times as large as an MLP."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128_256,
        tie_word_embeddings=True,
    )
    spec, _ = open_model(config, "dummy")
    layers = build_layers(spec)
    attention, mlp, head = (layers[n].weight_bytes(torch.bfloat16) for n in (1, 2, -1))
    assert head > 5 * mlp > 20 * attention

    def sizes(slots=2, layers=layers, **split):
        placement = place_weights(layers, Split(**split), torch.bfloat16)
        return slot_sizes(layers, placement, SHARED, slots).device

    assert sizes(disk=100) == pytest.approx([attention, mlp, 0, head], rel=0.01)
    assert sizes(1, disk=100) == pytest.approx([head], rel=0.01)
    # The head, whose share has room in memory, does not travel.
    attending, feeding, first, last = sizes(cpu=25, disk=75)
    assert attending <= 1.01 * attention and feeding <= 1.01 * mlp and last < 0.01 * head and first == 0
    assert sizes(cpu=100) == (0, 0, 0, 0)
    # Whole layers, an odd number of them, take both slots alternately.
    uneven = build_layers(spec.first_layers(7), sep_layer=False)
    whole = attention + mlp
    assert sizes(layers=uneven, disk=100) == pytest.approx([whole, whole, 0, head], rel=0.01)


def test_few_tokens_need_no_decoded_matrix(monkeypatch):
    config = OPTConfig(
        hidden_size=64, ffn_dim=128, word_embed_proj_dim=64, num_attention_heads=4, num_hidden_layers=1
    )
    layers = build_layers(open_model(config, "dummy")[0])
    kept = {
        codec: place_weights(layers, Split(cpu=Share(100, codec)), torch.float16)
        for codec in ("int4", "none")
    }
    # With AVX2, no number of rows in a half type decodes the matrix.
    monkeypatch.setattr(groupwise_linear, "_WIDENS", "no variant")
    monkeypatch.setattr("flexgen.quant.groupwise.native_available", lambda: True)
    assert [decodes(layers[1], kept["int4"], n, SHARED) for n in (1, 64, 65)] == [False, False, True]
    assert decodes(layers[1], kept["int4"], 1, LINKED), "which kernels another device has is not known ahead"
    assert not decodes(layers[1], kept["none"], 1000, LINKED)
    monkeypatch.setattr("flexgen.quant.groupwise.native_available", lambda: False)
    assert decodes(layers[1], kept["int4"], 1, SHARED)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_decoded_weights_take_what_was_planned_and_only_in_a_call(device, monkeypatch):
    """The head of a few rows is multiplied as it is kept; logits of every position have it decoded too."""
    if not native_available():
        pytest.skip("without compiled kernels every product decodes its matrix")
    taken = []
    allocate = Store.allocate

    def counted(self, nbytes, purpose, *keep):
        if purpose == "decoded weights":
            taken.append(nbytes)
        return allocate(self, nbytes, purpose, *keep)

    monkeypatch.setattr(Store, "allocate", counted)
    policy = Policy(gpu_batch_size=4, weights={"cpu": {"percent": 100, "codec": "int4"}})
    with OptLM(CONFIGS["opt"](2, 1024), policy, device=device, weights="dummy", progress=False) as model:
        before = model.memory_in_use()
        assert taken == []
        *others, head = (decoded_bytes(layer, model.placement) for layer in model._layers)
        assert head > max(others) > 0
        for call, wanted in ((model.generate, max(others)), (model.forward, head)):
            call([[5, 6, 7, 8, 9]] * 4)
            needs = model.stats.plan.needs
            (planned,) = [n.nbytes for n in needs if (n.what, n.role) == ("weights", "workspace")]
            assert taken[-1] == wanted <= planned
            assert device != "cpu" or wanted == planned, "elsewhere the plan cannot know the kernels"
            assert model.memory_in_use() == before
            taken.clear()


GUARD = 4096
CONFIGS = {
    "opt": lambda layers, vocab: OPTConfig(
        hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_attention_heads=2, num_hidden_layers=layers,
        vocab_size=vocab, max_position_embeddings=40,
    ),
    "llama": lambda layers, vocab: LlamaConfig(
        hidden_size=64, intermediate_size=192, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_hidden_layers=layers, vocab_size=vocab, tie_word_embeddings=True, pad_token_id=0,
    ),
}  # fmt: skip


def _guarded(monkeypatch):
    """Slots with a pattern behind their ends; returns what says whether it is still there."""
    behind = []
    allocate = Store.allocate

    def guarded(self, nbytes, purpose, *keep):
        if purpose not in ("weight slots", "staging of weights"):
            return allocate(self, nbytes, purpose, *keep)
        whole = allocate(self, nbytes + GUARD, purpose)
        whole[nbytes:] = 0xA5
        behind.append(whole[nbytes:])
        return whole[:nbytes]

    monkeypatch.setattr(Store, "allocate", guarded)
    return lambda: behind and all(bool((guard == 0xA5).all()) for guard in behind)


def _roomy(sizes):
    device, staging = (sum(part) for part in (sizes.device, sizes.staging))
    return SlotSizes(sizes.turns, (device,) * sizes.turns.count, (staging,) * sizes.turns.count)


@pytest.mark.slow
@settings(max_examples=15)
@given(
    family=st.sampled_from(sorted(CONFIGS)),
    layers=st.integers(1, 4),
    vocab=st.sampled_from([64, 1024]),
    sep_layer=st.booleans(),
    batches=st.integers(1, 2),
    split=st.sampled_from([(0, 0), (0, 40), (30, 30), (0, 75)]),
    codec=st.sampled_from(["none", *CODECS]),
    device=st.sampled_from(["cpu", "emulated"]),
    order=st.sampled_from(["overlap_multi_batch", "overlap_cpu_attention", "normal"]),
)
def test_ids_are_those_of_roomy_slots_and_no_end_is_passed(
    family, layers, vocab, sep_layer, batches, split, codec, device, order
):
    gpu, cpu = split
    shares = {"gpu": gpu, "cpu": cpu, "disk": 100 - gpu - cpu}
    policy = Policy(
        gpu_batch_size=2,
        num_gpu_batches=batches,
        weights={tier: {"percent": share, "codec": codec} for tier, share in shares.items()},
        sep_layer=sep_layer,
    )

    def ids():
        opened = dict(device=device, weights="dummy", order=order, progress=False)
        with OptLM(CONFIGS[family](layers, vocab), policy, **opened) as model:
            return model.generate([[5, 6, 7], [8, 9, 10, 11], [12], [13, 14]], 4, stop=()).tolist()

    with pytest.MonkeyPatch.context() as patch:
        intact = _guarded(patch)
        found = ids()
        assert intact()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexgen.layout.plan.slot_sizes", lambda *args: _roomy(slot_sizes(*args)))
        assert ids() == found
