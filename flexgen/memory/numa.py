"""Memory of several NUMA nodes.

All threads of a product read parts of a matrix, and the next call may divide it among them differently. So no node is
close to the threads that use a page. flexgen interleaves the pages of large buffers over the nodes of its cores: the
threads then read with the bandwidth of all nodes, whichever thread touched the buffer first. Files are not mapped,
because the page cache has their pages on the nodes that read them first.

To use one node only, start the process there (`numactl --cpunodebind=0 --membind=0`, or a cpuset).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
from collections.abc import Sequence

_INTERLEAVE = 3  # MPOL_INTERLEAVE of mbind(2)
_MBIND = {"x86_64": 237, "aarch64": 235, "riscv64": 235, "ppc64le": 259}
"""The numbers of the system call, which the C library does not have a function for."""


def interleave(mapping: mmap.mmap, nodes: Sequence[int]) -> bool:
    """Take the memory of a new mapping from all of several `nodes`. Does nothing for one node, or if the system
    refuses. Returns whether the memory is interleaved."""
    number = _MBIND.get(platform.machine())
    if len(nodes) < 2 or number is None:
        return False
    words = max(nodes) // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    buffer = ctypes.c_char.from_buffer(mapping)
    # The kernel reads one bit less than the given number.
    bits = ctypes.c_ulong(64 * words + 1)
    address, length = ctypes.c_void_p(ctypes.addressof(buffer)), ctypes.c_ulong(len(mapping))
    return _libc().syscall(number, address, length, _INTERLEAVE, mask, bits, 0) == 0


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
