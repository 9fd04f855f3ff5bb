"""Narrow layers: the figures of a machine with known costs are found, and wide layers have the measured time."""

import pytest
import torch

from flexgen.errors import HardwareError
from flexgen.memory.gpu import HostDevice
from flexgen.models import attention
from flexgen.models.ops import apply_rope
from flexgen.policy import Policy
from flexgen.predict.arithmetic import layer_numbers
from flexgen.predict.hardware import Hardware
from flexgen.probe.arithmetic import ArithmeticProbe
from flexgen.probe.effort import Effort, Sampling, Stopwatch
from flexgen.probe.elementwise import ElementwiseProbe
from flexgen.results.trace import LaneName, Phase
from flexgen.tuning.correct import Seen, corrected

RATE, EACH = 1e9, 3e-9
EFFORT = Effort(hidden=128, heads=8, rows=(1, 32, 64), working_set=1, sampling=Sampling(1, 0.0))


class Law(Stopwatch):
    """Predefined times."""

    def __init__(self, *times):
        super().__init__(EFFORT)
        self._times = iter(times)

    def seconds(self, work, settle=lambda: None):
        work()
        return next(self._times)


def probe_of(*times, effort=EFFORT):
    device = HostDevice()
    wide = ArithmeticProbe(device, torch.float32, effort, Stopwatch(effort.sampling))
    return ElementwiseProbe(wide, device, torch.float32, effort, Law(*times)), wide.layer


def took(layer_hidden, tokens):
    """A layer of four projections and three matrices to and from four times the width."""
    return tokens * (2 * 16 * layer_hidden**2 / RATE + 23 * layer_hidden * EACH)


def test_time_per_value_and_per_flop_are_separated():
    wide_rate = 2 * 16 * 128**2 / took(128, 1)
    rates = ((1.0, wide_rate), (512.0, wide_rate))
    few, many = 2 * 8, 64 * 8
    probe, wide = probe_of(took(16, few), took(16, many))
    assert layer_numbers(wide) == 23 * 128
    found = probe.seconds_of_numbers(rates)
    assert [numbers for numbers, _ in found] == [few * 23 * 16, many * 23 * 16]
    assert [each for _, each in found] == pytest.approx([EACH, EACH])
    # Both together are the time of wide layers.
    assert [rate for _, rate in probe.alone(rates, found)] == pytest.approx([RATE, RATE])


def test_noise_is_ignored():
    """A narrow layer that is faster than its flops, and one that was held up."""
    probe, wide = probe_of(1e-9, 1e3)
    rates = ((1.0, RATE), (64.0, RATE))
    found = probe.seconds_of_numbers(rates)
    assert found[0][1] == 0
    assert [rate for _, rate in probe.alone(rates, found)] == pytest.approx([RATE, 2 * RATE])
    # Other rates than those that the numbers were taken from: the products keep a tenth of their time.
    faster = tuple((rows, 10 * rate) for rows, rate in rates)
    assert [rate for _, rate in probe.alone(faster, found)] == pytest.approx([10 * RATE, 100 * RATE])


def test_around_attention_is_the_rest_after_projections_and_flops():
    """The heads are those of wide layers. Four of them share keys and values."""
    effort = Effort(hidden=64, heads=4, rows=(96,), working_set=1)
    rows, tokens, hidden, rate = 96 // 32, 32, 64, 1e9
    flops = 4 * rows * (tokens * (tokens + 1) // 2) * hidden
    probe, _ = probe_of(0.5 + flops / rate, 0.2, effort=effort)
    assert probe.around_attention(rate) == pytest.approx(0.3 / (rows * tokens * 2 * (hidden + hidden // 4)))
    probe, _ = probe_of(0.2, 0.5, effort=effort)
    assert probe.around_attention(rate) == 0


def test_around_attention_includes_rotary_positions(monkeypatch):
    rotated = []

    def spy(x, *others):
        rotated.append(x.shape)
        return apply_rope(x, *others)

    monkeypatch.setattr(attention, "apply_rope", spy)
    probe, _ = probe_of(0.5, 0.2, effort=Effort(hidden=64, heads=4, rows=(4,), working_set=1))
    probe.around_attention(1e12)
    assert rotated


def test_rates_between_two_points_are_interpolated(machine):
    hardware = machine(elementwise={"float32": [[10, 2e-9], [1000, 4e-9]]})
    for numbers, each in ((1, 2e-9), (10, 2e-9), (100, 3e-9), (1000, 4e-9), (10**6, 4e-9)):
        assert hardware.elementwise_seconds("float32", numbers) == pytest.approx(numbers * each)
    assert hardware.elementwise_seconds("float16", 100) == 0
    assert machine().elementwise_seconds("float32", 100) == 0


def test_a_file_of_before(machine):
    """Neither figure is needed: then rates contain them."""
    older = {
        key: entry
        for key, entry in machine().to_dict().items()
        if key not in ("elementwise", "around_attention")
    }
    assert Hardware.from_dict(older) == machine()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"elementwise": {"float32": [[10, -1e-9]]}}, "elementwise.float32 is -1e-09; it must be at least 0"),
        ({"elementwise": {"float32": 1e-9}}, r"write points: \[\[numbers, seconds of each\], ...\]"),
        (
            {"elementwise": {"float32": [[9, 0], [9, 0]]}},
            "points at numbers 9, 9; write them in ascending order of numbers",
        ),
        (
            {"around_attention": {"float32": -1}},
            "around_attention.float32 is -1; it must be at least 0 seconds",
        ),
    ],
)
def test_mistakes_are_errors(changes, said, machine):
    with pytest.raises(HardwareError, match=said):
        machine(**changes)


def test_a_run_that_computed_slower_corrects_them(machine):
    guess = machine(
        elementwise={"float32": [[10, 2e-9]]}, around_attention={"float32": 1e-9, "float16": 1e-9}
    )
    lanes = {phase: {LaneName.COMPUTE: 1.0} for phase in Phase}
    slower = {phase: {LaneName.COMPUTE: 2.0} for phase in Phase}
    better = corrected(guess, [Seen(Policy(), "float32", 8, slower, lanes)])
    assert better.elementwise["float32"] == ((10.0, pytest.approx(4e-9)),)
    assert better.around_attention == {"float32": pytest.approx(2e-9), "float16": 1e-9}
