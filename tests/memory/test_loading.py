"""Opening a model reads each byte of its files at most once, and needs little memory in addition to the homes."""

from __future__ import annotations

import io
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from piece_sizes import piece_sizes
from quantized_checkpoints import FORMATS, save_quantized
from quantized_checkpoints import tiny as to_quantize
from tiny_families import TINY

from flexgen.layout.placement import place_weights
from flexgen.memory.homes import Homes
from flexgen.memory.machine import Machine
from flexgen.models import build_layers, open_model
from flexgen.models.checkpoint import Extent
from flexgen.policy import Share, Split

MIXED = Split(gpu=30, cpu=40, disk=30)
ENCODED = Split(gpu=Share(30, "int8"), cpu=Share(40, "int4"), disk=Share(30, "int4"))
STORED = Split(gpu=Share(30, "stored"), cpu=Share(40, "stored"), disk=Share(30, "stored"))
SMALL = 256
"""Bytes of a piece, so that matrices of tiny models are read in several pieces."""
VARIANTS = [(family, number) for family, configs in TINY.items() for number in range(len(configs))]


@pytest.fixture
def reads(monkeypatch):
    """The ranges of bytes that were read from each safetensors file. Headers and samples are not counted."""
    ranges = defaultdict(list)

    class Counted(io.FileIO):
        def readinto(self, buffer):
            begin = self.tell()
            count = super().readinto(buffer)
            ranges[self.name].append((begin, begin + (count or 0)))
            return count

    open_plainly = Path.open

    def opened(path, mode="r", buffering=-1, **options):
        plain = path.suffix == ".safetensors" and (mode, buffering) == ("rb", 0)
        return Counted(path, "r") if plain else open_plainly(path, mode, buffering, **options)

    monkeypatch.setattr(Path, "open", opened)
    return ranges


def read_twice(ranges):
    return [
        (name, begin, end)
        for name, spans in ranges.items()
        for (_, before), (begin, end) in zip(sorted(spans), sorted(spans)[1:], strict=False)
        if begin < before
    ]


def assert_read_once(model, reads):
    """Every weight was read once, or not at all if it is used in the checkpoint's own file."""
    directory = model.checkpoint.directory
    weights = {weight.key: weight for layer in model.layers for weight in layer.weights}
    parts = {part.key: part for weight in weights.values() for part in model.placement.parts(weight)}
    expected = 0
    for part in parts.values():
        home = model.homes[part]
        if not (isinstance(home, Extent) and home.path.parent == directory):
            encoded = model.checkpoint.encoded(part)
            for each in encoded.parts if encoded else (part,):
                dtype = each.dtype if each.quantized else model.checkpoint.dtype_of(each)
                expected += each.numel * dtype.itemsize
    own = {name: spans for name, spans in reads.items() if Path(name).parent == directory}
    assert read_twice(own) == []
    assert sum(end - begin for spans in own.values() for begin, end in spans) == expected > 0


@pytest.mark.parametrize(("family", "number"), VARIANTS)
def test_no_tensor_is_read_twice(family, number, stream, saved, reads):
    directory = saved(family, torch.bfloat16, number=number)
    reads.clear()
    with piece_sizes(read_bytes=SMALL, thread_bytes=SMALL):
        model = stream(directory, MIXED, "emulated", dtype=torch.bfloat16)
    assert_read_once(model, reads)


@pytest.mark.parametrize("family", TINY)
def test_no_tensor_is_read_twice_to_encode_it(family, stream, saved, reads):
    directory = saved(family, torch.bfloat16, number=0)
    reads.clear()
    with piece_sizes(read_bytes=SMALL, thread_bytes=SMALL):
        model = stream(directory, ENCODED, "emulated", dtype=torch.bfloat16)
    assert_read_once(model, reads)


@pytest.mark.parametrize("family", TINY)
def test_no_tensor_is_read_twice_for_the_layout_of_the_cpu(family, stream, saved, reads):
    """The CPU may store matrices in the layout of its products."""
    directory = saved(family, torch.bfloat16, number=0)
    reads.clear()
    assert_read_once(stream(directory, Split(cpu=60, disk=40), "cpu", dtype=torch.bfloat16), reads)


@pytest.mark.parametrize("split", [MIXED, STORED], ids=["decoded", "stored"])
@pytest.mark.parametrize("form", FORMATS)
def test_no_tensor_of_a_quantized_checkpoint_is_read_twice(form, split, stream, reads, tmp_path):
    save_quantized(to_quantize("llama"), FORMATS[form], tmp_path)
    assert_read_once(stream(tmp_path, split, "emulated", dtype=torch.bfloat16), reads)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_less_than_a_layer_is_in_memory_in_addition_to_the_homes(family, tier, saved, peak_bytes, tmp_path):
    """The files are in another dtype, and the weights are encoded, so nothing is used as it is stored."""
    directory = saved(family, torch.bfloat16, number=0)
    layers = build_layers(open_model(directory)[0])

    def load():
        """In a new directory, because a second run would reuse the files of the first."""
        _, checkpoint = open_model(directory)
        placement = place_weights(layers, Split.of({tier: {"percent": 100, "codec": "int4"}}), torch.float32)
        machine = Machine.open("emulated", Path(tempfile.mkdtemp(dir=tmp_path)))
        homes = Homes(checkpoint, placement, machine)
        homes.load(layers)
        machine.close()

    peak = peak_bytes(load)
    # The stores of the homes are not among the allocations that are counted. In so small a model, the bytes of the
    # weight that is being converted, as the file has them, are a large part of a layer.
    stored = max(weight.nbytes(torch.bfloat16) for layer in layers for weight in layer.weights)
    assert 0 < peak <= max(layer.weight_bytes(torch.float32) for layer in layers) + stored
