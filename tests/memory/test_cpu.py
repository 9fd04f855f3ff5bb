"""Host memory: what may be taken of it, and what is pinned."""

import contextlib
import mmap
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from flexgen.errors import CapacityError
from flexgen.memory import cpu
from flexgen.memory.cpu import HostStore
from flexgen.memory.store import Store
from flexgen.policy import Tier
from flexgen.units import GIB, MIB

V2 = Path("sys/fs/cgroup")
V1 = Path("sys/fs/cgroup/memory")
GPU = torch.device("cuda", 0)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """`files({path: text})` stands in for /proc and /sys."""
    monkeypatch.setattr(cpu, "_ROOT", tmp_path)

    def write(texts):
        for path, text in texts.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(f"{text}\n")

    return write


@pytest.fixture
def plenty(monkeypatch):
    free = 64 * GIB
    monkeypatch.setattr(cpu.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    return free


def group_v2(folder, limit, used, inactive=0, active=0):
    stat = f"anon 5\nfile 9\nshmem 11\ninactive_anon 13\ninactive_file {inactive}\nactive_file {active}"
    return {folder / "memory.max": limit, folder / "memory.current": used, folder / "memory.stat": stat}


def test_without_a_control_group_the_system_decides(files, plenty):
    assert cpu.available_bytes() == plenty


def test_a_limit_leaves_what_is_not_used_and_what_the_kernel_gives_up(files, plenty):
    group = group_v2(V2 / "job", 9 * GIB, 4 * GIB, inactive=GIB, active=2 * GIB)
    files({"proc/self/cgroup": "0::/job"} | group)
    assert cpu.available_bytes() == 8 * GIB


def test_a_group_without_a_limit_does_not_count(files, plenty):
    files({"proc/self/cgroup": "0::/job"} | group_v2(V2 / "job", "max", 3 * GIB))
    assert cpu.available_bytes() == plenty


def test_the_limit_of_a_group_around_it_counts(files, plenty):
    files(
        {"proc/self/cgroup": "0::/job/step/task"}
        | group_v2(V2 / "job/step/task", "max", GIB)
        | group_v2(V2 / "job/step", 9 * GIB, GIB)
        | group_v2(V2 / "job", 6 * GIB, 2 * GIB)
    )
    assert cpu.available_bytes() == 4 * GIB


@pytest.mark.parametrize("path", ["/docker/0123", "/../../elsewhere"])
def test_inside_a_container_the_limit_stands_at_the_root(files, plenty, path):
    files({"proc/self/cgroup": f"0::{path}"} | group_v2(V2, 2 * GIB, GIB))
    assert cpu.available_bytes() == GIB


def test_more_used_than_allowed_leaves_nothing(files, plenty):
    files({"proc/self/cgroup": "0::/"} | group_v2(V2, GIB, 2 * GIB))
    assert cpu.available_bytes() == 0


def test_the_first_version_of_control_groups(files, plenty):
    files(
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/job\n0::/",
            V1 / "job/memory.limit_in_bytes": 4 * GIB,
            V1 / "job/memory.usage_in_bytes": GIB,
            # First of the group alone, then with the groups in it, which is what the limit is about.
            V1 / "job/memory.stat": "cache 3\ninactive_file 1\nactive_file 2\n"
            f"total_inactive_file {GIB // 2}\ntotal_active_file {GIB // 4}",
        }
    )
    assert cpu.available_bytes() == 3 * GIB + GIB * 3 // 4


def test_a_small_system_is_not_made_larger_by_a_limit(files, plenty):
    files({"proc/self/cgroup": "0::/"} | group_v2(V2, 1024 * GIB, 0))
    assert cpu.available_bytes() == plenty


def test_a_damaged_account_is_passed_over(files, plenty):
    files({"proc/self/cgroup": "0::/job"} | group_v2(V2 / "job", "?", "?"))
    assert cpu.available_bytes() == plenty


def test_this_machine_has_memory_to_give():
    assert 0 < cpu.available_bytes() <= psutil.virtual_memory().total
    assert 0 < cpu.resident_bytes() < psutil.virtual_memory().total


def test_the_peak_of_resident_memory_is_seen_after_it_is_gone():
    cpu.reset_peak_resident_bytes()
    if not cpu.peak_resident_bytes():
        pytest.skip("this kernel keeps no account of the peak")
    before = cpu.resident_bytes()
    buffer = HostStore().allocate(64 * MIB, "a peak").fill_(1)
    del buffer
    assert cpu.peak_resident_bytes() >= before + 48 * MIB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have their own rules")
def test_memory_that_is_freed_between_what_is_kept_goes_back(tmp_path):
    # In a separate process: after other tests some of the tensors would be in holes of the heap.
    code = """
import sys
from pathlib import Path
import torch
from flexgen.errors import CapacityError
from flexgen.memory import cpu
from flexgen.memory.machine import Machine
from flexgen.units import MIB
Machine.open("cpu", Path(sys.argv[1])).close()
for _ in range(3):  # glibc would take this for the size that is freed and wanted again
    torch.ones(24 * MIB, dtype=torch.uint8)
tensors = [torch.ones(8 * MIB, dtype=torch.uint8) for _ in range(16)]
before = cpu.resident_bytes()
del tensors[::2]
print(before - cpu.resident_bytes())
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 7 * 8 * MIB


_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not _HUGE_PAGES.exists() or "[never]" in _HUGE_PAGES.read_text(), reason="the system has no huge pages"
)
def test_temporaries_of_torch_are_in_huge_pages():
    code = """
import resource
import torch
from flexgen.memory import cpu
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
torch.ones(64 << 20, dtype=torch.uint8)
print((faults() - before) * resource.getpagesize())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 * MIB


def test_without_a_device_nothing_is_pinned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    store = HostStore(pin_for=GPU)
    assert store.pageable
    assert not store.allocate(4096, "anything").is_pinned()


def test_memory_that_cannot_be_pinned_is_used_as_it_is(monkeypatch, caplog):
    class Runtime:
        cudaHostRegister = staticmethod(lambda address, nbytes, flags: 2)

        def cudaHostUnregister(self, address):
            raise AssertionError("it was never registered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    launched = []

    class Kernel:
        def add_(self, _):
            launched.append(1)
            raise RuntimeError("CUDA error: out of memory")  # from the call before it

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **at: Kernel() if at else zeros(*size))
    store = HostStore(pin_for=GPU)
    assert not store.pageable
    buffer = store.allocate(MIB, "weights of layer-0")
    assert buffer.numel() == MIB and not buffer.any()
    assert store.pageable and launched == [1], "the error is left to be blamed on the next kernel"
    assert "weights of layer-0: cannot pin 1 MiB (CUDA error 2)" in caplog.text
    store.release(buffer)
    store.close()


@pytest.fixture
def registered(monkeypatch):
    """Addresses that a made-up CUDA runtime has registered, in order of their registration."""
    addresses = []

    class Runtime:
        def cudaHostRegister(self, address, nbytes, flags):
            addresses.append(address)
            return 0

        def cudaHostUnregister(self, address):
            addresses.remove(address)
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    return addresses


def test_what_was_pinned_is_given_back(registered):
    store = HostStore(pin_for=GPU)
    first, second = (store.allocate(4096, "anything") for _ in range(2))
    assert registered == [first.data_ptr(), second.data_ptr()] and not store.pageable
    store.release(first)
    assert registered == [second.data_ptr()]
    store.close()
    assert registered == []


def test_a_pinned_buffer_is_kept_for_the_next_one_of_its_size(registered):
    store = HostStore(pin_for=GPU)
    store.allow(held=10_000, pinned=10_000)
    first = store.allocate(4096, "a cache").fill_(7)
    address = first.data_ptr()
    store.release(first)
    store.release(first)  # as one does that Ctrl-C has interrupted
    assert (store.used, store.spare, store.pinned) == (0, 4096, 4096) and registered == [address]
    again = store.allocate(4096, "a cache")
    assert again.data_ptr() == address and not again.any()
    assert (store.used, store.spare, store.pinned) == (4096, 0, 4096)
    store.release(again)
    other = store.allocate(5000, "a cache")  # within what is allowed with the spare one
    assert (store.used, store.spare) == (5000, 4096) and len(registered) == 2
    third = store.allocate(3000, "staging")  # which takes its place
    assert (store.used, store.spare) == (8000, 0) and registered == [other.data_ptr(), third.data_ptr()]
    store.allow(held=7000, pinned=7000)
    store.release(other)
    assert (store.used, store.spare) == (3000, 0)
    store.release(third)
    assert (store.used, store.spare) == (0, 3000)
    store.close()
    assert registered == [] and store.spare == store.pinned == 0


def test_what_no_device_copies_is_not_pinned(registered):
    store = HostStore(pin_for=GPU)
    store.allow(held=10_000, pinned=10_000)
    buffer = store.allocate(4096, "cache that the host attends to", copied_by_device=False)
    assert registered == [] and not store.pageable
    store.release(buffer)
    assert store.spare == 0


@pytest.mark.gpu
def test_registered_memory_is_pinned():
    store = HostStore(pin_for=GPU)
    buffer = store.allocate(8 * MIB, "weights")
    assert buffer.is_pinned()
    device = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
    device.copy_(buffer.fill_(7), non_blocking=True)
    torch.cuda.synchronize()
    assert (device == 7).all()
    store.release(buffer)
    again = store.allocate(8 * MIB, "weights")
    assert again.is_pinned()
    store.close()


def resident_in(buffer):
    """The bytes of a buffer that the system has provided. Only written pages are (proc(5), pagemap)."""
    page = mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(buffer.data_ptr() // page * 8)
        entries = np.frombuffer(file.read(buffer.nbytes // page * 8), dtype=np.uint64)
    return int((entries >> np.uint64(63)).sum()) * page


def test_memory_by_need_is_taken_when_it_is_written():
    store, page = HostStore(capacity=1 * MIB), mmap.PAGESIZE
    buffer = store.allocate(64 * MIB, "cache", in_use=1 * MIB)
    assert (buffer.nbytes, store.used, store.peak) == (64 * MIB, 1 * MIB, 1 * MIB)
    assert resident_in(buffer) == 0
    buffer[5 * page : 7 * page] = 3
    buffer[-1] = 4
    assert resident_in(buffer) == 3 * page
    store.clear(buffer[5 * page : 6 * page])
    assert resident_in(buffer) == 2 * page
    assert not buffer[5 * page : 6 * page].any() and (buffer[6 * page : 7 * page] == 3).all()
    store.clear(buffer[6 * page + 1 : 7 * page - 1])  # no whole page
    assert buffer[6 * page : 7 * page].nonzero().flatten().tolist() == [0, page - 1]
    store.clear(buffer[page + 9 :])
    assert resident_in(buffer) <= page and not buffer.any()
    store.release(buffer)
    assert store.used == 0 and not store._by_need


def test_clearing_other_memory_fills_it_with_zeros():
    store = HostStore()
    buffer = store.allocate(3 * mmap.PAGESIZE, "cache")
    buffer.fill_(1)
    store.clear(buffer[5:])
    assert buffer.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_memory_by_need_must_fit_with_what_is_in_use():
    store = HostStore(capacity=1 * MIB)
    with pytest.raises(CapacityError, match="cache needs 2 MiB on the cpu tier"):
        store.allocate(64 * MIB, "cache", in_use=2 * MIB)
    assert store.used == 0


def test_memory_by_need_is_never_pinned(registered):
    store = HostStore(pin_for=torch.device("cuda", 0))
    assert not store.pageable
    store.allocate(1 * MIB, "cache", copied_by_device=False, in_use=MIB)
    assert not store.pageable and not store.pinned
    store.allocate(1 * MIB, "cache", in_use=MIB)
    assert store.pageable and not store.pinned
    store.close()


def test_other_tiers_take_memory_at_once():
    class Whole(Store):
        def _make(self, nbytes, purpose, copied_by_device):
            return torch.zeros(nbytes, dtype=torch.uint8)

    store = Whole(Tier.GPU)
    with pytest.raises(NotImplementedError, match="the gpu tier cannot take memory page by page"):
        store.allocate(8, "cache", in_use=4)
    buffer = store.allocate(8, "cache").fill_(1)
    store.clear(buffer[2:])
    assert buffer.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
