"""Opening a model reads each byte of its files at most once, and needs little memory in addition to the homes."""

from __future__ import annotations

import io
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from piece_sizes import piece_sizes
from tiny_families import TINY

from flexgen.layout.placement import place_weights
from flexgen.memory.homes import Homes
from flexgen.memory.machine import Machine
from flexgen.models import build_layers, open_model
from flexgen.policy import Share, Split

MIXED = Split(gpu=30, cpu=40, disk=30)
ENCODED = Split(gpu=Share(30, "int8"), cpu=Share(40, "int4"), disk=Share(30, "int4"))
SMALL = 256
"""Bytes of a piece, so that matrices of tiny models are read in several pieces."""


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


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("split", [MIXED, ENCODED], ids=["plain", "encoded"])
def test_no_tensor_is_read_twice(family, split, stream, saved, reads):
    directory = saved(family, torch.bfloat16)
    reads.clear()
    with piece_sizes(read_bytes=SMALL):
        stream(directory, split, "emulated", dtype=torch.bfloat16)
    own = {name: spans for name, spans in reads.items() if Path(name).parent == directory}
    assert own and read_twice(own) == []


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_less_than_a_layer_is_in_memory_in_addition_to_the_homes(family, tier, saved, peak_bytes, tmp_path):
    """The files are in another dtype, and the weights are encoded, so nothing is used as it is stored."""
    spec, checkpoint = open_model(saved(family, torch.bfloat16))
    layers = build_layers(spec)
    placement = place_weights(layers, Split.of({tier: {"percent": 100, "codec": "int4"}}), torch.float32)

    def load():
        """In a new directory, because a second run would reuse the files of the first."""
        machine = Machine.open("emulated", Path(tempfile.mkdtemp(dir=tmp_path)))
        homes = Homes(checkpoint, placement, torch.float32, machine)
        homes.load(layers)
        machine.close()

    peak = peak_bytes(load)
    # The stores of the homes are not among the allocations that are counted. In so small a model, the bytes of the
    # weight that is being converted, as the file has them, are a large part of a layer.
    stored = max(weight.nbytes(torch.bfloat16) for layer in layers for weight in layer.weights)
    assert 0 < peak <= max(layer.weight_bytes(torch.float32) for layer in layers) + stored
