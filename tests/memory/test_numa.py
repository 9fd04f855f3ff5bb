"""Memory that is interleaved over NUMA nodes: the system call, and who asks for it."""

from __future__ import annotations

import mmap
from types import SimpleNamespace
from typing import Any

import pytest

from flexgen.memory import cpu, numa
from flexgen.memory.cores import Cores
from flexgen.memory.cpu import HostStore
from flexgen.memory.gpu import HostDevice
from flexgen.memory.numa import interleave
from flexgen.units import MIB


class Kernel:
    """Notes the arguments of system calls."""

    def __init__(self, result: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.result = result

    def syscall(self, number: int, *arguments: Any) -> int:
        self.calls.append((number, *arguments))
        return self.result


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(numa, "_libc", lambda: made)
    monkeypatch.setattr(numa.platform, "machine", lambda: "x86_64")
    return made


@pytest.mark.parametrize(("nodes", "words"), [((0, 1), [0b11]), ((1, 3), [0b1010]), ((0, 64), [1, 1])])
def test_the_nodes_are_the_bits_of_the_mask(kernel: Kernel, nodes: tuple[int, ...], words: list[int]) -> None:
    mapping = mmap.mmap(-1, MIB)
    assert interleave(mapping, nodes)
    ((number, _, length, policy, mask, bits, flags),) = kernel.calls
    assert (number, length.value, policy, flags) == (237, MIB, 3, 0)
    assert list(mask) == words and bits.value == 64 * len(words) + 1
    mapping.close()  # raises BufferError if the call still exports it


def test_one_node_and_unknown_processors_keep_the_rule_of_the_system(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = mmap.mmap(-1, MIB)
    assert not interleave(mapping, (0,))
    monkeypatch.setattr(numa.platform, "machine", lambda: "another")
    assert not interleave(mapping, (0, 1)) and kernel.calls == []


def test_a_system_that_refuses_is_no_error(kernel: Kernel) -> None:
    kernel.result = -1
    assert not interleave(mmap.mmap(-1, MIB), (0, 1))


def test_this_system_knows_the_call() -> None:
    """A mask with node 0 alone is valid on every machine, so only the number of the call could be wrong."""
    mapping = mmap.mmap(-1, MIB)
    if not interleave(mapping, (0, 0)):
        pytest.skip("this system does not allow the call")
    mapping[:] = b"1" * MIB


@pytest.mark.parametrize("nodes", [(0,), (0, 1)])
def test_large_buffers_are_interleaved_and_files_are_mapped_on_one_node_only(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, nodes: tuple[int, ...]
) -> None:
    found = SimpleNamespace(usable_cores=lambda: Cores(8, 8, nodes))
    monkeypatch.setattr(cpu, "usable_cores", found.usable_cores)
    monkeypatch.setattr("flexgen.memory.gpu.usable_cores", found.usable_cores)
    store = HostStore()
    store.allocate(MIB, "a small buffer")
    assert kernel.calls == []
    store.allocate(8 * MIB, "weights")
    assert len(kernel.calls) == len(nodes) - 1
    assert HostDevice().maps_files == (len(nodes) == 1)
