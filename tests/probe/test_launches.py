"""The time of a GPU's launches is in `fixed.cell`, not in its rates."""

import copy
from contextlib import closing

import pytest
import torch

from flexgen.kernels.heads import PlainHeads
from flexgen.memory.machine import Machine
from flexgen.probe import arithmetic
from flexgen.probe.arithmetic import ArithmeticProbe
from flexgen.probe.effort import Effort, on_gpu
from flexgen.probe.machine import within
from flexgen.units import GIB

LAUNCHES, BYTES_S = 150e-6, 1e12


class Watch:
    """A stopwatch on which a call takes its launches, and the bytes of the cache that it attends to."""

    def __init__(self):
        self.read = 0

    def seconds(self, work, settle=None):
        work()
        return LAUNCHES + self.read / BYTES_S


@pytest.fixture
def machine():
    with closing(Machine.open("cpu", None)) as machine:
        yield machine


@pytest.mark.parametrize("place", ["meta", "cpu"])
def test_launches_are_taken_off_the_attention_of_a_gpu(machine, monkeypatch, place):
    watch = Watch()

    def attend(q, pages, context, mask, scale, form):
        watch.read = sum(k.nbytes + v.nbytes for k, v in pages)

    monkeypatch.setattr(arithmetic, "decode_attention", attend)
    effort = Effort(hidden=256, heads=4, context=512, cache_rows=512, working_set=1)
    device = copy.copy(machine.device)
    device.torch_device = torch.device(place)
    probe = ArithmeticProbe(device, torch.float32, effort, watch)
    rate = probe.token_attention(PlainHeads(64, torch.float32), machine.host, torch.device(place))
    # The error of the subtracted time is one row of bytes. On the CPU, launches are part of its 8 rows.
    launched = 8 * 2 * 512 * 256 * 4 / (LAUNCHES + 8 * 2 * 512 * 256 * 4 / BYTES_S)
    assert rate == pytest.approx(BYTES_S if place == "meta" else launched, rel=0.01)


def test_a_time_that_is_all_launches_keeps_a_share(machine):
    device = copy.copy(machine.device)
    device.torch_device = torch.device("meta")
    probe = ArithmeticProbe(device, torch.float32, Effort(hidden=256, heads=4), Watch())
    assert probe.without_launches(100e-6, lambda: 99e-6) == pytest.approx(50e-6)
    assert probe.without_launches(1e-3, lambda: 1e-4) == pytest.approx(9e-4)
    host = ArithmeticProbe(machine.device, torch.float32, Effort(hidden=256, heads=4), Watch())
    assert host.without_launches(1e-3, lambda: 1e-4) == 1e-3


def test_a_gpu_is_measured_with_more_and_no_more_than_it_holds():
    usual, large = Effort(), within(on_gpu(Effort()), 80 * GIB, "the GPU")
    assert (large.hidden, large.cache_rows, large.rows[-1]) == (2 * usual.hidden, 64, 4096)
    small = within(on_gpu(Effort()), 1 * GIB, "the GPU")
    assert small.hidden < large.hidden and 2 <= small.cache_rows < 64
    # Keys and values of a cache in 4 bytes.
    assert 2 * 4 * small.cache_rows * small.context * small.hidden <= 1 * GIB // 8
