"""What the probe finds on a GPU whose kernels take no time and whose launches do."""

from contextlib import closing

import pytest

pytest.importorskip("simulated", reason="runs on the simulated GPU: `make test-cuda`")

import torch
from simulated import runtime

from flexgen.kernels.heads import PlainHeads
from flexgen.memory.machine import Machine
from flexgen.probe.arithmetic import ArithmeticProbe
from flexgen.probe.effort import Effort, Sampling, Stopwatch
from flexgen.probe.elementwise import ElementwiseProbe
from flexgen.quant import CODECS

LAUNCH = 5e-6
EFFORT = Effort(
    hidden=256, heads=4, working_set=1, rows=(1, 8), prompt=16, context=64, sampling=Sampling(3, 0.0)
)


class Bound(ArithmeticProbe):
    """Counts what each figure takes off, and leaves all of it."""

    def without_launches(self, seconds, launches):
        self.found = getattr(self, "found", []) + [(seconds, launches())]
        return seconds


@pytest.fixture
def machine():
    with closing(Machine.open("cuda", None)) as machine, machine.device.active(), torch.inference_mode():
        call = object()
        machine.device.begin_call(call)
        yield machine
        machine.device.end_call(call)


def launched():
    return runtime.counters().kernels * LAUNCH


def watch():
    return Stopwatch(EFFORT.sampling, launched)


@pytest.mark.parametrize(
    "measure",
    [
        lambda probe, machine: probe.products(),
        lambda probe, machine: probe.decoding(CODECS["int4"]),
        lambda probe, machine: probe.prompt_attention(),
        lambda probe, machine: probe.token_attention(
            PlainHeads(64, torch.float16), machine.device.memory, machine.device.torch_device
        ),
        lambda probe, machine: probe.multiplying_seconds(8),
    ],
    ids=["products", "decoding", "prompt_attention", "token_attention", "narrow layers"],
)
def test_launches_are_taken_off_every_figure(measure, machine):
    """Kernels take no time here: what is taken off is all there is, but for a share that always stays."""
    probe = Bound(machine.device, torch.float16, EFFORT, watch())
    measure(probe, machine)
    assert probe.found
    for seconds, launches in probe.found:
        assert LAUNCH <= launches == pytest.approx(seconds, rel=0.3)


def test_numbers_around_attention_take_nothing_where_there_are_only_launches(machine):
    device = machine.device
    probe = ArithmeticProbe(device, torch.float16, EFFORT, watch())
    narrow = ElementwiseProbe(probe, device, torch.float16, EFFORT, watch())
    narrow._narrow.__class__ = Bound
    narrow.around_attention(1e12)
    [(seconds, launches)] = narrow._narrow.found
    assert launches >= LAUNCH and launches <= seconds * (1 + 1e-9)
