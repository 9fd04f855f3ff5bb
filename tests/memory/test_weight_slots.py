"""Each slot is as large as the layers that it serves, and a slot in use is never filled."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, OPTConfig

from flexgen import OptLM, Policy
from flexgen.kernels.loading import native_available
from flexgen.memory.placement import place_weights
from flexgen.memory.store import Store
from flexgen.memory.weight_slots import SlotSizes, decoded_bytes, decodes, slot_sizes, take_turns
from flexgen.models import build_layers, open_model
from flexgen.policy import Split
from flexgen.schedule import ORDERS, Grid, Op, Visit, needed_visit

TRAVELS = st.lists(st.booleans(), min_size=1, max_size=12)
SLOTS = st.integers(1, 4)


@given(travels=TRAVELS, slots=SLOTS)
def test_visits_in_a_row_that_bring_something_have_a_slot_each(travels, slots):
    turns = take_turns(travels, slots)
    visits = [
        (token, layer) for token in range(2 * slots + 1) for layer in range(len(travels)) if travels[layer]
    ]
    numbers = [token * len(travels) + layer for token, layer in visits]
    for n, visit in enumerate(visits):
        for before in range(n):
            if numbers[n] - numbers[before] < slots:
                assert turns.slot(*visits[before]) != turns.slot(*visit)


@given(travels=TRAVELS, slots=SLOTS, name=st.sampled_from(sorted(ORDERS)), batches=st.integers(1, 3))
def test_a_slot_is_filled_once_the_layer_that_had_it_is_computed(travels, slots, name, batches):
    """By what a schedule promises of a step (`needs`), whichever layers go without a turn."""
    turns = take_turns(travels, slots)
    grid = Grid(3, len(travels), batches, weight_slots=slots)
    had: dict[int, tuple[int, int]] = {}
    for token in range(grid.tokens):
        for layer in range(grid.layers):
            if not travels[layer]:
                continue
            slot = turns.slot(token, layer)
            if slot in had:
                free = needed_visit(Visit(Op.LOAD_WEIGHTS, token, layer).steps(grid)[0], grid)
                assert free is not None and had[slot] <= (free.token, free.layer)  # computed in this order
            had[slot] = token, layer


@given(travels=TRAVELS, slots=SLOTS)
def test_a_slot_serves_the_layers_that_it_is_said_to_serve(travels, slots):
    turns = take_turns(travels, slots)
    for slot in range(slots):
        met = {
            layer
            for token in range(slots)
            for layer in range(len(travels))
            if turns.slot(token, layer) == slot
        }
        assert set(turns.layers(slot)) == met


@given(travels=TRAVELS, slots=SLOTS)
def test_layers_keep_their_slots_where_enough_of_them_bring_nothing(travels, slots):
    turns = take_turns(travels, slots)
    keeps = travels.count(False) >= len(travels) % slots
    assert keeps == all(turns.slot(1, n) == turns.slot(0, n) for n in range(len(travels)))


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
        return slot_sizes(layers, placement, True, slots).device

    assert sizes(disk=100) == pytest.approx([mlp, head], rel=0.01)
    assert sizes(1, disk=100) == pytest.approx([head], rel=0.01)
    # The head, whose share has room in memory, does not travel.
    attending, feeding = sorted(sizes(cpu=25, disk=75))
    assert feeding <= 1.01 * mlp and attending <= 1.01 * attention
    assert sizes(cpu=100) == (0, 0)
    # Whole layers, an odd number of them with the embedding, of which only rows travel.
    uneven = build_layers(replace(spec, num_layers=7), sep_layer=False)
    assert sorted(sizes(layers=uneven, disk=100)) == pytest.approx([attention + mlp, head], rel=0.01)


def test_few_tokens_need_no_decoded_matrix(monkeypatch):
    monkeypatch.setattr("flexgen.memory.weight_slots.native_available", lambda: True)
    assert [decodes(n, torch.bfloat16, True) for n in (1, 16, 17)] == [False, False, True]
    assert decodes(1, torch.bfloat16, False), "which kernels another device has is not known ahead"
    monkeypatch.setattr("flexgen.memory.weight_slots.native_available", lambda: False)
    assert decodes(1, torch.bfloat16, True)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_decoded_weights_take_what_was_planned_and_only_in_a_call(device, monkeypatch):
    """The head of a few rows is multiplied as it is kept; logits of every position have it decoded too."""
    if not native_available():
        pytest.skip("without compiled kernels every product decodes its matrix")
    taken = []
    allocate = Store.allocate

    def counted(self, nbytes, purpose):
        if purpose == "decoded weights":
            taken.append(nbytes)
        return allocate(self, nbytes, purpose)

    monkeypatch.setattr(Store, "allocate", counted)
    policy = Policy(gpu_batch_size=4, weights={"cpu": {"percent": 100, "codec": "int4"}})
    with OptLM(CONFIGS["opt"](2, 1024), policy, device=device, weights="dummy", progress=False) as model:
        before = model._machine.device.memory.used
        assert taken == []
        *others, head = (decoded_bytes(layer, model.placement) for layer in model._layers)
        assert head > max(others) > 0
        for call, wanted in ((model.generate, max(others)), (model.forward, head)):
            call([[5, 6, 7, 8, 9]] * 4)
            needs = model.stats.plan.needs
            (planned,) = [n.nbytes for n in needs if (n.what, n.role) == ("weights", "workspace")]
            assert taken[-1] == wanted <= planned
            assert device != "cpu" or wanted == planned, "elsewhere the plan cannot know the kernels"
            assert model._machine.device.memory.used == before
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

    def guarded(self, nbytes, purpose):
        if purpose not in ("weight slots", "staging of weights"):
            return allocate(self, nbytes, purpose)
        whole = allocate(self, nbytes + GUARD, purpose)
        whole[nbytes:] = 0xA5
        behind.append(whole[nbytes:])
        return whole[:nbytes]

    monkeypatch.setattr(Store, "allocate", guarded)
    return lambda: behind and all(bool((guard == 0xA5).all()) for guard in behind)


def _roomy(sizes):
    device, staging = (sum(part) for part in (sizes.device, sizes.staging))
    return SlotSizes(sizes.turns, (device,) * sizes.turns.slots, (staging,) * sizes.turns.slots)


@settings(max_examples=15)
@given(
    family=st.sampled_from(sorted(CONFIGS)),
    layers=st.integers(1, 4),
    vocab=st.sampled_from([64, 1024]),
    sep_layer=st.booleans(),
    batches=st.integers(1, 2),
    split=st.sampled_from([(0, 0), (0, 40), (30, 30), (0, 75)]),
    codec=st.sampled_from(["none", "int4"]),
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
        patch.setattr("flexgen.memory.plan.slot_sizes", lambda *args: _roomy(slot_sizes(*args)))
        assert ids() == found
