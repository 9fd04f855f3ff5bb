"""Where weights live once a model is opened: in memory, in the user's files, or in files written once."""

import dataclasses
import os
import re
import shutil
from collections import Counter

import pytest
import torch
from piece_sizes import piece_sizes
from safetensors.torch import load_file

from flexgen import quant
from flexgen.errors import CapacityError, CheckpointError
from flexgen.layout.plan import SLOTS
from flexgen.layout.topology import LINKED
from flexgen.layout.weight_slots import slot_sizes
from flexgen.memory import conversions
from flexgen.memory.disk_store import DiskStore
from flexgen.memory.gpu import EmulatedDevice
from flexgen.memory.homes import HostRegion
from flexgen.models import checkpoint as source
from flexgen.models import tensor_files
from flexgen.models.checkpoint import Extent
from flexgen.policy import Share, Split, Tier
from flexgen.units import ALIGNMENT

CHANGES = ["touch", "rsync", "replace"]

MIXED = Split(gpu=30, cpu=30, disk=40)
DISK = Split(disk=100)
DISK_INT4 = Split(disk=Share(100, "int4"))


def files_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def converted_in(folder):
    return {path: mtime for path, mtime in files_in(folder).items() if path.suffix == ".safetensors"}


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_each_home_is_on_the_tier_it_was_given(stream, saved, family, device):
    model = stream(saved(family), MIXED, device)
    seen = set()
    for layer in model.layers:
        for weight in layer.weights:
            home, tier = model.homes[weight], model.placement.of(weight)
            seen.add(tier)
            if tier is Tier.DISK:
                assert isinstance(home, Extent)
            elif tier is Tier.CPU and device == "emulated":
                assert isinstance(home, HostRegion)
                region = home.buffer[home.offset : home.offset + home.nbytes]
                expected = model.checkpoint.read(weight, torch.float32)
                assert torch.equal(region.view(torch.float32).view(weight.shape), expected)
            else:
                assert torch.equal(home, model.checkpoint.read(weight, torch.float32))
    assert seen == set(Tier)


def test_stores_hold_what_was_placed(stream, saved):
    model = stream(saved(), MIXED, "emulated")
    count = sum(len(layer.weights) for layer in model.layers)
    slots = slot_sizes(model.layers, model.placement, LINKED, SLOTS)
    device = model.machine.device.memory.used - sum(slots.device)
    host = model.machine.host.used - sum(slots.staging)
    for used, tier in ((device, Tier.GPU), (host, Tier.CPU)):
        assert 0 <= used - model.placement.nbytes[tier] < ALIGNMENT * count
    assert model.machine.disk.used == 0


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_weights_on_disk_are_read_in_place(stream, saved, tmp_path, device):
    directory, offload = saved(), tmp_path / "offload"
    model = stream(directory, DISK, device, offload_dir=offload)
    for layer in model.layers:
        for weight in layer.weights:
            assert model.homes[weight].path.parent == directory
    assert files_in(offload) == {}


@pytest.mark.parametrize(
    ("dtype", "format", "weights", "wanted"),
    [
        (torch.float16, "safetensors", "checkpoint", torch.float32),
        (torch.float32, "safetensors", "checkpoint", torch.bfloat16),
        (torch.float32, "bin", "checkpoint", torch.float32),
        (torch.float32, "safetensors", "dummy", torch.float32),
    ],
)
def test_what_no_file_holds_is_written_once(stream, saved, tmp_path, dtype, format, weights, wanted):
    directory, offload = saved("opt", dtype, format), tmp_path / "offload"
    first = stream(directory, DISK, dtype=wanted, offload_dir=offload, weights=weights)
    written = converted_in(offload)
    assert len(written) == len(first.layers)
    second = stream(directory, DISK, dtype=wanted, offload_dir=offload, weights=weights)
    assert converted_in(offload) == written
    assert len(files_in(offload)) == 2 * len(written), "each with its record"
    for layer in range(len(second.layers)):
        second.bring(layer, slot=0)
        second.assert_there(layer, slot=0)


def test_another_dtype_makes_other_files(stream, saved, tmp_path):
    directory, offload = saved("opt", torch.float16), tmp_path / "offload"
    first = stream(directory, DISK, dtype=torch.float32, offload_dir=offload)
    stream(directory, DISK, dtype=torch.bfloat16, offload_dir=offload)
    assert len(converted_in(offload)) == 2 * len(first.layers)


def changed(directory, change, other):
    """Change the checkpoint in `directory`; "rsync" keeps time and size."""
    stored = directory / "model.safetensors"
    status = stored.stat()
    while stored.stat().st_ctime_ns == status.st_ctime_ns:  # a file system's clock ticks in milliseconds
        if change == "touch":
            stored.touch()
        elif change == "rsync":
            data = stored.read_bytes()
            stored.write_bytes(data[:-2000] + bytes(2000))
            os.utime(stored, ns=(status.st_atime_ns, status.st_mtime_ns))
        else:
            shutil.copy(other / "model.safetensors", directory)
            shutil.copy(other / "config.json", directory)


def test_weights_of_another_encoding_are_written_again_and_no_old_files_stay(
    stream, saved, tmp_path, monkeypatch
):
    directory, weights = saved("opt", hidden_size=64, ffn_dim=64, word_embed_proj_dim=64), DISK_INT4
    with stream(directory, weights, offload_dir=tmp_path):
        before = converted_in(tmp_path)
    with stream(directory, weights, offload_dir=tmp_path):
        assert before and converted_in(tmp_path) == before
    monkeypatch.setattr(conversions, "ENCODING", conversions.ENCODING + 1)
    with stream(directory, weights, offload_dir=tmp_path):
        after = converted_in(tmp_path)
    assert len(after) == len(before) and not set(before) & set(after)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_checkpoint_is_converted_again_and_no_old_files_stay(stream, saved, tmp_path, change):
    offload, directory = tmp_path / "offload", tmp_path / "model"
    shutil.copytree(saved("opt", torch.float16), directory)
    with stream(directory, DISK, offload_dir=offload) as model:
        count = len(model.layers)
    for _ in range(2):
        before = converted_in(offload)
        changed(directory, change, saved("opt", torch.float16, max_position_embeddings=41))
        with stream(directory, DISK, offload_dir=offload) as model:
            for layer in range(count):
                model.bring(layer, slot=0)
                model.assert_there(layer, slot=0)
        after = converted_in(offload)
        assert len(after) == count and not set(before) & set(after)
        assert len(list(offload.glob("*/*"))) == 1, "no folder of an earlier state"


def test_what_an_open_model_uses_is_not_removed(stream, saved, tmp_path):
    offload, directory = tmp_path / "offload", tmp_path / "model"
    shutil.copytree(saved("opt", torch.float16), directory)
    with stream(directory, DISK, offload_dir=offload) as old:
        before = converted_in(offload)
        expected = {w.key: old.checkpoint.read(w, torch.float32) for w in old.layers[1].weights}
        changed(directory, "rsync", None)
        with stream(directory, DISK, offload_dir=offload):
            assert set(before) < set(converted_in(offload))
            old.bring(1, slot=0)
            found = old.slots.weights(1, 0, visit=0)
            assert all(torch.equal(found[w.name], expected[w.key]) for w in old.layers[1].weights)
    changed(directory, "touch", None)
    stream(directory, DISK, offload_dir=offload)
    assert len(converted_in(offload)) == len(before) and not set(before) & set(converted_in(offload))


def test_other_dtypes_and_models_of_the_same_name_stay(stream, saved, tmp_path):
    offload = tmp_path / "offload"
    for place in ("a", "b"):
        shutil.copytree(saved("opt", torch.float16), tmp_path / place / "model")
        stream(tmp_path / place / "model", DISK, offload_dir=offload)
    layers = stream(tmp_path / "a" / "model", DISK, dtype=torch.bfloat16, offload_dir=offload).layers
    assert len(converted_in(offload)) == 3 * len(layers)


def flip_last_byte(path):
    """Keeps the size and the mtime; the ctime changes with the file system's clock, which ticks in milliseconds."""
    before = path.stat()
    data = path.read_bytes()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        with path.open("r+b") as file:
            file.write(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("damage", ["byte", "header", "longer", "shorter", "link", "owner", "record"])
def test_a_written_file_that_is_not_as_expected_is_written_again(
    stream, saved, tmp_path, monkeypatch, damage
):
    directory, offload = saved("opt", torch.float16), tmp_path / "offload"
    stream(directory, DISK, offload_dir=offload)
    written = sorted(converted_in(offload))[1]
    before, right = written.stat().st_ino, written.read_bytes()
    if damage == "link":
        written.rename(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").write_bytes(bytes(len(right)))
        written.symlink_to(tmp_path / "elsewhere")
    elif damage == "owner":
        monkeypatch.setattr(os, "getuid", lambda: os.stat(written).st_uid + 1)
    elif damage == "record":
        written.with_name(written.name + ".json").write_text("[" * 100_000)
    elif damage == "byte":
        flip_last_byte(written)
    else:
        wrong = {
            "header": right.replace(b"F32", b"I32"),
            "longer": right + b"x",
            "shorter": right[:-1],
        }
        written.write_bytes(wrong[damage])
    stream(directory, DISK, offload_dir=offload)
    assert written.read_bytes() == right and not written.is_symlink() and written.stat().st_ino != before


def test_content_is_digested_only_where_the_file_may_have_changed(stream, saved, tmp_path, monkeypatch):
    directory, offload = saved("opt", torch.float16), tmp_path / "offload"
    stream(directory, DISK, offload_dir=offload)
    shutil.copytree(offload, tmp_path / "copy")
    written, digest, digested = converted_in(tmp_path / "copy"), conversions._digest, []
    monkeypatch.setattr(conversions, "_digest", lambda file: digested.append(file.name) or digest(file))
    stream(directory, DISK, offload_dir=offload)
    assert not digested
    for _ in range(2):  # a copy is digested once
        stream(directory, DISK, offload_dir=tmp_path / "copy")
        assert sorted(digested) == sorted(map(str, written))
    assert converted_in(tmp_path / "copy") == written, "and not written again"


@pytest.mark.parametrize("name", ["..", "a/../b", "x" * 300, "/deep" * 80, "é" * 300, "/"])
def test_any_name_of_a_model_is_a_folder(stream, saved, tmp_path, monkeypatch, name):
    opened = source._open_directory

    def renamed(*args):
        spec, files = opened(*args)
        return dataclasses.replace(spec, name=name), files

    monkeypatch.setattr(source, "_open_directory", renamed)
    model = stream(saved("opt", torch.float16), DISK, offload_dir=tmp_path / "offload")
    model.bring(1, slot=0)
    model.assert_there(1, slot=0)


def test_a_tied_head_is_the_embedding_at_home(stream, saved):
    model = stream(saved("opt"), MIXED, "emulated")
    embed = next(w for w in model.layers[0].weights if w.name == "embed.weight")
    head = next(w for w in model.layers[-1].weights if w.shape == embed.shape)
    assert model.homes[head] is model.homes[embed]


def test_a_checkpoint_that_shrinks_while_it_is_read_is_reported(stream, saved, tmp_path, monkeypatch):
    directory = tmp_path / "model"
    shutil.copytree(saved(), directory)
    read = tensor_files.SafetensorsCheckpoint.read

    def shrinking(self, weight, dtype, rows=None):
        with (directory / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
        return read(self, weight, dtype, rows)

    monkeypatch.setattr(tensor_files.SafetensorsCheckpoint, "read", shrinking)
    with pytest.raises(CheckpointError, match=re.escape(str(directory / "model.safetensors"))):
        stream(directory, Split(gpu=100))


def test_memory_that_is_too_small_is_reported_by_layer(stream, saved):
    with pytest.raises(CapacityError, match=r"weights of \S+ needs .* on the gpu tier"):
        stream(saved(), Split(gpu=100), EmulatedDevice(memory=4096))


def test_a_full_disk_is_reported_before_anything_is_written(stream, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(DiskStore, "free", property(lambda self: 1000))
    with pytest.raises(CapacityError, match=r"weights need .* in the offload directory, which has 1000 B"):
        stream(saved("opt", torch.float16), DISK, offload_dir=tmp_path / "offload")
    assert files_in(tmp_path / "offload") == {}


WIDE = dict(hidden_size=128, ffn_dim=192, word_embed_proj_dim=128)  # whole groups
CODECS = ["none", *quant.CODECS]


def kept(weight, checkpoint, placement, dtype):
    """The weight as its tier keeps it, made at once."""
    codec, tensor = placement.codec(weight), checkpoint.read(weight, dtype)
    return codec.encode(tensor) if codec else tensor


@pytest.mark.parametrize("piece_bytes", [1, 5 * 128 * 2, 1 << 30])
@pytest.mark.parametrize("codec", CODECS)
def test_files_that_are_written_in_pieces_are_those_of_whole_tensors(
    stream, saved, tmp_path, codec, piece_bytes
):
    split = Split(disk=Share(100, codec))
    with piece_sizes(read_bytes=piece_bytes):
        model = stream(saved("opt", **WIDE), split, dtype=torch.bfloat16, offload_dir=tmp_path)
    written = [
        load_file(path) for path in converted_in(tmp_path)
    ]  # its reader refuses holes and what overlaps
    assert len(written) == len(model.layers)
    found = {name: tensor for tensors in written for name, tensor in tensors.items()}
    for layer in model.layers:
        for weight in layer.weights:
            expected = kept(weight, model.checkpoint, model.placement, torch.bfloat16)
            assert found[weight.key].dtype == expected.dtype and torch.equal(found[weight.key], expected)
            assert model.homes[weight].nbytes == model.placement.stored_bytes(weight)


@pytest.mark.parametrize("pieces", [{"read_bytes": 7 * 128 * 2}, {"thread_bytes": 7 * 128 * 2}], ids=str)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("codec", CODECS)
def test_what_is_encoded_in_pieces_into_memory_is_whole(stream, saved, codec, device, pieces):
    """By one thread after the other, or by all threads at once."""
    split = Split(gpu=Share(50, codec), cpu=Share(50, codec))
    with piece_sizes(**pieces):
        model = stream(saved("opt", **WIDE), split, device, dtype=torch.bfloat16)
    for layer in model.layers:
        for weight in layer.weights:
            home, expected = (
                model.homes[weight],
                kept(weight, model.checkpoint, model.placement, torch.bfloat16),
            )
            if isinstance(home, HostRegion):
                home = home.buffer[home.offset : home.offset + home.nbytes].view(expected.dtype)
                home = home.view(expected.shape)
            assert torch.equal(home.to_dense() if home.is_mkldnn else home, expected), weight.key


def test_no_more_than_a_piece_of_a_weight_is_held_in_addition(stream, saved, tmp_path, monkeypatch):
    limit = 16 * 128 * 4
    read, taken, of = tensor_files.SafetensorsCheckpoint.read, [], Counter()

    def counting(self, weight, dtype, rows=None):
        tensor = read(self, weight, dtype, rows)
        taken.append(tensor.nbytes)
        of[weight.key] += tensor.nbytes
        return tensor

    monkeypatch.setattr(tensor_files.SafetensorsCheckpoint, "read", counting)
    split = Split(cpu=Share(50, "int4"), disk=Share(50, "int4"))
    with piece_sizes(read_bytes=limit):
        model = stream(saved("opt", **WIDE), split, "emulated", offload_dir=tmp_path)
    assert max(taken) <= limit < max(w.nbytes(torch.float32) for layer in model.layers for w in layer.weights)
    encoded = {w.key: w for layer in model.layers for w in layer.weights if model.placement.codec(w)}
    assert {model.placement.of(w) for w in encoded.values()} == {Tier.CPU, Tier.DISK}
    assert all(of[key] == weight.nbytes(torch.float32) for key, weight in encoded.items()), "read once"


def test_a_failure_between_pieces_leaves_no_file(stream, saved, tmp_path, monkeypatch):
    read, left = tensor_files.SafetensorsCheckpoint.read, [5]

    def failing(self, weight, dtype, rows=None):
        left[0] -= 1
        if left[0] < 0:
            raise CheckpointError("the disk is gone")
        return read(self, weight, dtype, rows)

    monkeypatch.setattr(tensor_files.SafetensorsCheckpoint, "read", failing)
    pieces = piece_sizes(read_bytes=16 * 128 * 4)
    with pieces, pytest.raises(CheckpointError, match="the disk is gone"):
        stream(saved("opt", **WIDE), Split(disk=Share(100, "int4")), offload_dir=tmp_path)
    assert files_in(tmp_path) == {}
