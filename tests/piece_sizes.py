"""Small pieces, so that the weights and the cache of a tiny model have several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from flexgen.layout.topology import Topology
from flexgen.memory.device import ComputeDevice
from flexgen.memory.gpu import HostDevice
from flexgen.predict.hardware import Hardware


def in_pieces(topology: Topology, **sizes: int) -> Topology:
    """The topology with fields of `PieceSizes` changed."""
    return replace(topology, pieces=replace(topology.pieces, **sizes))


@contextmanager
def piece_sizes(**sizes: int) -> Iterator[None]:
    """Compute devices, and machines that are planned for, have pieces of these sizes (fields of `PieceSizes`)."""
    topology_of = Hardware.topology.fget
    with pytest.MonkeyPatch.context() as patch:
        for device in (ComputeDevice, HostDevice):
            patch.setattr(device, "topology", in_pieces(device.topology, **sizes))
        patch.setattr(
            Hardware, "topology", property(lambda machine: in_pieces(topology_of(machine), **sizes))
        )
        yield
