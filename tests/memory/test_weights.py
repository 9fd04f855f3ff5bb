"""A layer's weights arrive in their slot bit by bit, whatever the pieces, the device and the file."""

import os
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.errors import CheckpointError, LaneError
from flexgen.layout.plan import SLOTS
from flexgen.layout.rows import whole_weights
from flexgen.layout.topology import LINKED, SHARED
from flexgen.layout.weight_slots import GAP, slot_sizes
from flexgen.memory.gpu import EmulatedDevice
from flexgen.models.sources import Source
from flexgen.models.tensor_files import SafetensorsCheckpoint
from flexgen.policy import Split, Tier
from flexgen.units import BLOCK

SPLITS = [Split(gpu=30, cpu=30, disk=40), Split(cpu=100), Split(disk=100), Split(gpu=50, disk=50)]
DISK = Split(disk=100)


@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("split", SPLITS, ids=lambda s: f"{s.percent('gpu'):g}-{s.percent('cpu'):g}")
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_every_layer_arrives_in_every_slot_that_serves_it(stream, saved, family, split, device, pieces):
    model = stream(saved(family), split, device)
    for layer in range(len(model.layers)):
        for slot in model.slots_of(layer):
            model.bring(layer, slot, pieces)
            model.assert_there(layer, slot)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize(
    ("dtype", "format", "weights", "wanted"),
    [
        (torch.float16, "safetensors", "checkpoint", torch.float16),
        (torch.float16, "safetensors", "checkpoint", torch.float32),
        (torch.float32, "safetensors", "checkpoint", torch.bfloat16),
        (torch.float32, "bin", "checkpoint", torch.float32),
        (torch.float16, "bin", "checkpoint", torch.float32),
        (torch.float32, "safetensors", "dummy", torch.float16),
    ],
)
def test_every_kind_of_checkpoint_arrives(stream, saved, dtype, format, weights, wanted, device):
    model = stream(saved("opt", dtype, format), SPLITS[0], device, dtype=wanted, weights=weights)
    for layer in range(len(model.layers)):
        slot = model.slot(layer)
        model.bring(layer, slot, pieces=3)
        model.assert_there(layer, slot)
        assert all(tensor.dtype is wanted for tensor in model.slots.weights(layer, slot, visit=0).values())


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("split", SPLITS, ids=lambda s: f"{s.percent('gpu'):g}-{s.percent('cpu'):g}")
def test_weights_with_a_dtype_of_their_own_keep_their_values(stream, saved, split, device):
    """A correction in float32 that bfloat16 cannot represent, in place in its file and converted."""
    model = stream(saved("glm4_moe", torch.bfloat16), split, device, dtype=torch.bfloat16)
    found = {}
    for layer in range(len(model.layers)):
        model.bring(layer, model.slot(layer), pieces=2)
        model.assert_there(layer, model.slot(layer))
        found |= {
            f"{layer}.{name}": weight.clone()
            for name, weight in model.slots.weights(layer, model.slot(layer), visit=0).items()
            if name in ("router.weight", "correction")
        }
    assert len(found) == 4 and {weight.dtype for weight in found.values()} == {torch.float32}
    biases = [weight for name, weight in found.items() if name.endswith("correction")]
    assert all(not torch.equal(bias, bias.bfloat16().float()) for bias in biases)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_slots_hold_two_layers_at_once(stream, saved, device):
    model = stream(saved(), DISK, device)
    one, other = model.slot(1), model.slot(2)
    assert {one, other} == {0, 1} and model.slot(3) == one
    model.bring(1, one)
    model.bring(2, other, pieces=2)
    model.assert_there(1, one)
    model.assert_there(2, other)
    model.bring(3, one, pieces=2)
    model.assert_there(2, other)
    model.assert_there(3, one)


def test_a_slot_shows_what_is_in_it(stream, saved):
    """Weights that travel are views: bringing another layer of the same shape changes what is seen."""
    model = stream(saved(), DISK, "emulated")
    slot = model.slot(1)
    model.bring(1, slot)
    seen = model.slots.weights(1, slot, visit=0)
    before = {name: tensor.clone() for name, tensor in seen.items()}
    model.bring(3, slot)
    assert model.slots.weights(1, slot, visit=0) is seen
    assert not torch.equal(seen["q.weight"], before["q.weight"])


def test_what_is_in_place_does_not_move(stream, saved):
    for split, device in ((Split(gpu=100), "emulated"), (Split(gpu=40, cpu=60), "cpu")):
        model = stream(saved(), split, device)
        assert not any(model.slots.layouts[n].nbytes for n in range(len(model.layers)))
        for layer in range(len(model.layers)):
            assert model.slots.layouts[layer].nbytes == 0 and model.slots.chains(layer, 0, 0, 1) == ()
            model.assert_there(layer, slot=0)
            held = model.slots.weights(layer, slot=0, visit=0)
            assert all(held[w.name] is model.homes[w] for w in model.layers[layer].weights)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_layer_moves_as_few_large_parts(stream, saved, device):
    """One chain for weights in host memory and one for weights on disk; few other bytes are read."""
    model = stream(saved(), SPLITS[0], device)
    for layer in range(len(model.layers)):
        assert len(model.slots.chains(layer, 0, 0, 1)) <= (1 if device == "cpu" else 2)
        away = {Tier.DISK} if device == "cpu" else {Tier.DISK, Tier.CPU}
        whole = whole_weights(model.layers[layer], model.placement, SHARED if device == "cpu" else LINKED)
        weights = [w for w in whole if model.placement.of(w) in away]
        wanted = sum(w.nbytes(torch.float32) for w in weights)
        moved = model.slots.layouts[layer].nbytes
        assert wanted <= moved <= wanted + len(weights) * 6 * BLOCK
    assert any(model.slots.layouts[n].nbytes for n in range(len(model.layers)))


def test_work_is_made_once(stream, saved):
    model = stream(saved(), DISK, "emulated")
    assert model.slots.chains(1, 0, 0, 2) is model.slots.chains(1, 0, 0, 2)
    assert model.slots.chains(1, 0, 0, 2) is not model.slots.chains(1, 0, 1, 2)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_nothing_is_allocated_while_weights_travel(stream, saved, device):
    model = stream(saved(), SPLITS[0], device)
    before = model.machine.host.used, model.machine.device.memory.used
    for layer in range(len(model.layers)):
        model.bring(layer, model.slot(layer), pieces=2)
    assert (model.machine.host.used, model.machine.device.memory.used) == before
    assert (model.machine.host.peak, model.machine.device.memory.peak) == before


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_truncated_file_is_an_error_of_the_step(stream, saved, tmp_path, device):
    directory = tmp_path / "model"
    shutil.copytree(saved(), directory)
    model = stream(directory, DISK, device)
    os.truncate(directory / "model.safetensors", 3000)
    with pytest.raises(LaneError, match="load_weights of token 0, layer 2") as caught:
        model.bring(2, model.slot(2))
    assert isinstance(caught.value.__cause__, CheckpointError)
    assert "the file ends at 3000" in str(caught.value)


def test_a_tied_head_arrives_from_the_embedding(stream, saved):
    model = stream(saved(), Split(cpu=100), "emulated")
    head = len(model.layers) - 1
    model.bring(head, model.slot(head), pieces=3)
    model.assert_there(head, model.slot(head))
    embedding = model.layers[0].weights[0].key
    assert embedding in [weight.key for weight in model.layers[head].weights]


# Sizes around what a block and a gap are, in numbers of four bytes, and small ones.
SIZES = st.one_of(
    st.integers(1, 70), st.sampled_from([1023, 1024, 1025, 4095, 4096, 4097]), st.integers(1, 9000)
)


@settings(max_examples=40)
@given(data=st.data())
def test_any_layout_fits_the_promised_slots(make_layers, stream_layers, data):
    """Weights of any size, in any order in a file that holds other things too, on any tiers."""
    sizes = data.draw(st.lists(st.lists(SIZES, min_size=1, max_size=5), min_size=1, max_size=4))
    layers = make_layers(sizes)
    pieces = data.draw(st.integers(1, 5))
    gpu, cpu = data.draw(st.sampled_from([(0, 0), (0, 100), (20, 30), (0, 50), (60, 20)]))
    split = Split(gpu=gpu, cpu=cpu, disk=100 - gpu - cpu)
    topology = data.draw(st.sampled_from([LINKED, SHARED]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))  # float16 is not what the file holds
    names = [weight.key for layer in layers for weight in layer.weights]
    others = data.draw(st.lists(SIZES, max_size=6))
    tensors = dict(zip(names, (size for row in sizes for size in row), strict=True))
    tensors |= {f"other-{n}": size for n, size in enumerate(others)}
    # A file keeps tensors of one dtype in the order of their names.
    renamed = {name: f"{n:03}" for n, name in enumerate(data.draw(st.permutations(sorted(tensors))))}
    layers = tuple(_with_sources(layer, renamed) for layer in layers)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "model.safetensors"
        safetensors.torch.save_file({renamed[n]: torch.randn(size) for n, size in tensors.items()}, path)
        checkpoint = SafetensorsCheckpoint(Path(folder), [path])
        device = "cpu" if topology is SHARED else EmulatedDevice()
        model = stream_layers(layers, checkpoint, split, device, dtype, Path(folder) / "offload", stack)
        promised = slot_sizes(layers, model.placement, topology, SLOTS)
        for layer in range(len(layers)):
            for slot in model.slots_of(layer):
                assert model.slots.layouts[layer].nbytes <= promised.device[slot]
                model.bring(layer, slot, pieces=pieces)
                model.assert_there(layer, slot)


@pytest.mark.parametrize("topology", [SHARED, LINKED])
def test_the_widest_gaps_that_are_read_along_fit(make_layers, stream_layers, tmp_path, topology):
    layers = make_layers([[1] * 5])
    names = {weight.key: f"{2 * n}" for n, weight in enumerate(layers[0].weights)}
    gaps = {f"{2 * n + 1}": torch.zeros(GAP // 4) for n in range(4)}
    tensors = {name: torch.randn(1) for name in names.values()} | gaps
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path, [tmp_path / "model.safetensors"])
    layers = tuple(_with_sources(layer, names) for layer in layers)
    with ExitStack() as stack:
        device = "cpu" if topology is SHARED else EmulatedDevice()
        model = stream_layers(layers, checkpoint, DISK, device, torch.float32, tmp_path / "offload", stack)
        assert len(model.slots._transfers._cargo[0]) == 1, "all is read as one"
        model.bring(0, slot=1, pieces=2)
        model.assert_there(0, slot=1)
        model.bring(0, slot=0)
        model.assert_there(0, slot=0)


def _with_sources(layer, renamed):
    return replace(layer, weights=tuple(replace(w, sources=(Source(renamed[w.key]),)) for w in layer.weights))
