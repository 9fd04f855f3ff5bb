"""Rows of a table that is not on the compute device: the right bytes, and few others."""

from contextlib import closing
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.layout import rows as row_sizes
from flexgen.layout.placement import place_weights
from flexgen.layout.rows import gathered_table, lookup_sizes, whole_weights
from flexgen.layout.topology import LINKED, SHARED
from flexgen.memory.disk import DiskIO
from flexgen.memory.homes import Homes
from flexgen.memory.lookup import open_table
from flexgen.memory.machine import Machine
from flexgen.models import WeightSpec, build_layers, open_model
from flexgen.models.embed import InputEmbed
from flexgen.models.sources import Source
from flexgen.models.tensor_files import SafetensorsCheckpoint
from flexgen.policy import Split, Tier
from flexgen.quant import CODECS
from flexgen.units import BLOCK, MIB

SPEC, _ = open_model("opt-125m", weights="dummy")
CODEC = st.sampled_from(["none", *CODECS])
WHERE = st.sampled_from([("cpu", "disk"), ("emulated", "disk"), ("emulated", "cpu")])


class Tables(InputEmbed):
    """A layer with nothing but a small weight and, behind it at home, the table."""

    @property
    def table(self):
        return self.weights[1]


def only_table(shape):
    """A model of nothing but an embedding of this shape."""
    layer = Tables(SPEC)
    weights = (
        WeightSpec("small", (3,), (Source("small"),)),
        WeightSpec("embed.weight", shape, (Source("table"),)),
    )
    object.__setattr__(layer, "weights", weights)
    return (layer,)


def opened(folder, layers, dtype, split, device, before=0):
    """The table at home, in a file that has `before` bytes of another tensor in front of it."""
    tensors = {weight.key: torch.randn(weight.shape).to(dtype) for weight in layers[0].weights}
    if before:
        tensors["a"] = torch.zeros(before, dtype=torch.uint8)
    path = Path(folder) / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    checkpoint = SafetensorsCheckpoint(Path(folder), [path])
    machine = Machine.open(device, Path(folder) / "offload")
    homes = Homes(checkpoint, place_weights(layers, split, dtype), machine)
    homes.load(layers)
    return checkpoint, homes, machine


def buffer(machine, nbytes):
    return machine.host.allocate(nbytes, "a test")


@settings(max_examples=80)
@given(
    data=st.data(),
    vocab=st.integers(1, 300),
    groups=st.integers(1, 3),
    width=st.integers(1, 1500),
    codec=CODEC,
    where=WHERE,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    before=st.integers(0, 9000),
    limits=st.sampled_from([(0, BLOCK, 0), (BLOCK, 3 * BLOCK, 4 * BLOCK), (1 << 16, 1 << 20, 1 << 24)]),
)
def test_rows_are_those_of_the_table(
    data, vocab, groups, width, codec, where, dtype, before, limits, tmp_path_factory
):
    """Rows of any width, at any offset of the file, including the first and the last, encoded or not."""
    (device, tier), shape = where, (vocab, 64 * groups if codec != "none" else width)
    layers = only_table(shape)
    split = Split(**{tier: {"percent": 100, "codec": codec}})
    wanted = data.draw(st.sets(st.integers(0, vocab - 1), min_size=1) | st.just({0, vocab - 1}))
    rows = torch.tensor(sorted(wanted))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("_READ_ALONG", "_SPAN", "_SCRATCH"), limits, strict=True):
            patch.setattr(row_sizes, name, value)
        checkpoint, homes, machine = opened(
            tmp_path_factory.mktemp("t"), layers, dtype, split, device, before
        )
        with closing(machine):
            table = open_table(layers, homes, machine)
            sizes = table.sizes(len(rows) + 2)
            assert sizes.rows == min(len(rows) + 2, vocab)
            target = buffer(machine, sizes.slot - sizes.lead + 1).fill_(7)
            table.gather(rows, target, buffer(machine, sizes.scratch))
            used = table.nbytes(len(rows))
            assert target[sizes.slot - sizes.lead] == 7, "not a byte behind the promised buffer"
            expected = checkpoint.read(layers[0].table, dtype)
            if codec == "none":
                assert torch.equal(target[:used].view(dtype).view(len(rows), -1), expected[rows])
            else:
                out, whole = torch.empty(len(rows), shape[1], dtype=dtype), torch.empty(shape, dtype=dtype)
                CODECS[codec].decode(target[:used], out)
                CODECS[codec].decode(CODECS[codec].encode(expected), whole)
                assert torch.equal(out, whole[rows])


@given(
    rows=st.sets(st.integers(0, 2000), min_size=1),
    width=st.integers(1, 3 * BLOCK),
    begin=st.integers(0, 5 * BLOCK),
    more=st.integers(0, 9 * BLOCK),
)
def test_rounds_cover_every_row_once_and_fit(rows, width, begin, more):
    offsets = begin + torch.tensor(sorted(rows)).numpy() * width
    room = -(-width // BLOCK) * BLOCK + BLOCK + more
    covered = []
    for spans in row_sizes.read_rounds(offsets, width, room):
        assert spans and sum(span.end - span.start for span in spans) <= room
        for span in spans:
            assert span.start % BLOCK == span.end % BLOCK == 0
            assert span.start <= offsets[span.first] and offsets[span.last - 1] + width <= span.end
            covered += range(span.first, span.last)
    assert covered == list(range(len(offsets)))


def test_few_rows_are_few_bytes_and_all_rows_are_one_stream(tmp_path, monkeypatch):
    layers = only_table((4000, 512))  # 4 MB in bfloat16
    _, homes, machine = opened(tmp_path, layers, torch.bfloat16, Split(disk=100), "cpu", before=40)
    reads = []
    read = DiskIO.read
    monkeypatch.setattr(DiskIO, "read", lambda io, all_: (reads.extend(all_), read(io, all_))[1])
    with closing(machine):
        table = open_table(layers, homes, machine)
        sizes = table.sizes(10_000)
        target, scratch = buffer(machine, sizes.slot), buffer(machine, sizes.scratch)
        table.gather(torch.tensor([0, 1000, 2000, 3999]), target, scratch)
        assert len(reads) == 4 and sum(r.target.numel() for r in reads) <= 4 * 2 * BLOCK
        reads.clear()
        table.gather(torch.arange(4000), target, scratch)
        assert len(reads) <= 6 and sum(r.target.numel() for r in reads) <= 4000 * 1024 + 6 * 2 * BLOCK
        reads.clear()
        # Small gaps between rows are read too, in reads of at most 1 MiB.
        table.gather(torch.arange(0, 4000, 8), target, scratch)
        assert len(reads) <= 6
        assert max(r.target.numel() for r in reads) <= MIB


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("tier", list(Tier))
def test_a_table_in_place_is_not_gathered(tier, device, tmp_path):
    layers = only_table((100, 64))
    _, homes, machine = opened(tmp_path, layers, torch.float32, Split(**{tier: 100}), device)
    with closing(machine):
        topology = SHARED if device == "cpu" else LINKED
        in_place = topology.in_place(tier)
        table = open_table(layers, homes, machine)
        assert (table is None) == in_place
        sizes = lookup_sizes(layers, homes.placement, topology, 10)
        assert (sizes.slot == 0) == in_place and (sizes.staging == 0) == (in_place or topology is SHARED)
        assert (sizes.scratch == 0) == (tier is not Tier.DISK)
        assert len(whole_weights(layers[0], homes.placement, topology)) == 1 + in_place


def test_only_the_input_embedding_has_a_table():
    layers = build_layers(SPEC)
    placement = place_weights(layers, Split(disk=100), torch.float32)
    tables = [gathered_table(layer, placement, SHARED) for layer in layers]
    assert tables[0] is layers[0].weights[0] and not any(tables[1:])
    assert layers[-1].weights[-1].key == tables[0].key, "the head is tied, and travels whole"
    assert tables[0] not in whole_weights(layers[0], placement, SHARED)
    assert whole_weights(layers[-1], placement, SHARED) == list(layers[-1].weights)
