"""What a store hands out is counted, and what does not fit is refused in words."""

import mmap
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import CapacityError
from flexgen.memory.cpu import HostStore
from flexgen.memory.store import tensor_at
from flexgen.policy import Tier
from flexgen.units import MIB


def test_used_and_peak_follow_live_buffers():
    store = HostStore()
    first = store.allocate(5000, "first")
    second = store.allocate(3000, "second")
    assert (store.used, store.peak) == (8000, 8000)
    store.release(first)
    assert (store.used, store.peak) == (3000, 8000)
    third = store.allocate(4000, "third")
    assert (store.used, store.peak) == (7000, 8000)
    store.release(second)
    store.release(third)
    assert (store.used, store.peak) == (0, 8000)


@given(sizes=st.lists(st.integers(0, 20_000), max_size=8), data=st.data())
def test_accounting_in_any_order(sizes, data):
    store, live, peak = HostStore(), [], 0
    for size in sizes:
        live.append((size, store.allocate(size, "something")))
        peak = max(peak, sum(n for n, _ in live))
        if data.draw(st.booleans()):
            _, buffer = live.pop(data.draw(st.integers(0, len(live) - 1)))
            store.release(buffer)
            del buffer
        assert (store.used, store.peak) == (sum(n for n, _ in live), peak)
    store.close()
    assert store.used == 0


def test_a_store_that_is_full_reports_its_limit():
    store = HostStore(Tier.GPU, capacity=2 * MIB)
    buffer = store.allocate(MIB + MIB // 2, "weights of layer-0")
    with pytest.raises(CapacityError) as caught:
        store.allocate(MIB, "KV cache")
    message = str(caught.value)
    for part in ("KV cache needs 1 MiB on the gpu tier", "1.5 MiB of 2 MiB", "smaller share on gpu"):
        assert part in message
    assert (store.used, store.peak) == (buffer.nbytes, buffer.nbytes)
    store.allocate(MIB // 2, "what just fits")
    assert store.used == store.capacity
    store.release(buffer)
    store.allocate(MIB, "KV cache")


@pytest.mark.parametrize("nbytes", [1, 100, 4096, 5 * MIB + 1])
def test_host_buffers_are_zeroed_bytes_that_begin_a_page(nbytes):
    store = HostStore()
    for _ in range(3):
        buffer = store.allocate(nbytes, "anything")
        assert (buffer.dtype, buffer.shape) == (torch.uint8, (nbytes,))
        assert buffer.data_ptr() % mmap.PAGESIZE == 0
        assert not buffer.any()
        buffer.fill_(255)
        store.release(buffer)
        del buffer


def test_an_empty_buffer_is_allowed():
    store = HostStore(capacity=0)
    buffer = store.allocate(0, "nothing")
    assert (buffer.dtype, buffer.numel(), store.used) == (torch.uint8, 0, 0)
    store.release(buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 1, 4), (0, 3)])
def test_tensor_at_is_a_view(dtype, shape):
    buffer = HostStore().allocate(1024, "a buffer")
    view = tensor_at(buffer, 256, shape, dtype)
    assert (view.dtype, view.shape, view.is_contiguous()) == (dtype, shape, True)
    view.fill_(1)
    written = buffer.nonzero().flatten()
    assert view.numel() == 0 or 256 <= int(written.min()) <= int(written.max()) < 256 + view.nbytes
    assert torch.equal(buffer[256 : 256 + view.nbytes].view(dtype), view.flatten())


def test_tensor_at_does_not_reach_past_the_buffer():
    buffer = HostStore().allocate(64, "a buffer")
    with pytest.raises(RuntimeError, match=re.compile("shape|size")):
        tensor_at(buffer, 32, (9,), torch.float32)
