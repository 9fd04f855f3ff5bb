"""An error inside a lane reaches the caller and leaves a model that works; closing leaves nothing behind."""

from __future__ import annotations

import gc
import mmap
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexgen.engine.model import OptLM
from flexgen.errors import CapacityError, LaneError
from flexgen.memory.disk import DiskIO
from flexgen.memory.disk_store import DiskStore
from flexgen.memory.gpu import EmulatedDevice, HostDevice
from flexgen.memory.store import Store
from flexgen.models.embed import Head, InputEmbed
from flexgen.policy import Tier
from flexgen.runtime.executor import _Run
from flexgen.schedule.orders import ORDERS

LENGTHS = [3, 7, 5, 9, 2, 6, 4, 8]


class Faulty:
    """Stands in for a method: counts its calls, and raises `error` at call number `at`, once; `after` it was done."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str, after: bool = False) -> None:
        self.calls = 0
        self.at: int | None = None
        self.error: BaseException = OSError("the cable is out")
        method = getattr(owner, name)

        def stand_in(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls != self.at:
                return method(*args, **options)
            if after:
                method(*args, **options)
            raise self.error

        patch.setattr(owner, name, stand_in)

    def arm(self, share: float) -> None:
        """Raise when `share` of the calls of the run before have been made."""
        self.at, self.calls = int(self.calls * share), 0


PLACES = [
    (InputEmbed, "forward", "emulated", "compute"),
    (Head, "forward", "emulated", "compute"),
    (DiskIO, "start_read", "emulated", "disk_read"),
    (DiskIO, "write", "emulated", "disk_write"),
    (EmulatedDevice, "to_device", "emulated", ""),
    (EmulatedDevice, "from_device", "emulated", ""),
    (Head, "forward", "cpu", "compute"),
    (DiskIO, "start_read", "cpu", "disk_read"),
    (HostDevice, "from_device", "cpu", ""),
]


@pytest.mark.parametrize("order", sorted(ORDERS))
@pytest.mark.parametrize(
    ("owner", "method", "device", "lane"), PLACES, ids=lambda value: getattr(value, "__name__", value)
)
def test_an_error_on_a_lane_reaches_the_caller(
    owner: type,
    method: str,
    device: str,
    lane: str,
    order: str,
    tiny: Any,
    prompts: Any,
    mixed: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    model, given = tiny("opt"), prompts(LENGTHS)
    fault = Faulty(monkeypatch, owner, method)
    policy = mixed(attend_on="gpu")
    with OptLM(
        model.directory, policy, device=device, progress=False, order=order, offload_dir=tmp_path
    ) as lm:
        fault.calls = 0
        expected = lm.generate(given, 5, stop=())
        np.testing.assert_array_equal(expected, model.greedy(given, 5))
        stats, taken = lm.stats, lm.memory_in_use()
        fault.arm(0.45 if device == "emulated" else 0.8)  # a late token of the first block, or of the second
        with pytest.raises(LaneError) as raised:
            lm.generate(given, 5, stop=())
        assert raised.value.__cause__ is fault.error
        message = str(raised.value)
        assert "OSError: the cable is out" in message and f"lane {lane}" in message
        where = re.search(r"of token (\d+), layer \d+, batch \d+", message)
        assert where and int(where[1]) > 0
        assert lm.memory_in_use() == taken and taken[Tier.DISK] == 0
        assert lm.stats is stats, "the stats are those of the last call that ended well"
        np.testing.assert_array_equal(lm.generate(given, 5, stop=()), expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [MemoryError("full"), ValueError("odd"), RuntimeError("off")])
def test_errors_of_every_kind(
    error: Exception, tiny: Any, prompts: Any, mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Faulty(monkeypatch, Head, "forward")
    with OptLM(tiny("opt").directory, mixed(), device="emulated", progress=False) as lm:
        fault.error, fault.at = error, 3
        with pytest.raises(LaneError) as raised:
            lm.generate(prompts(LENGTHS), 4, stop=())
        assert raised.value.__cause__ is error


def test_an_error_of_forward(tiny: Any, prompts: Any, mixed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Faulty(monkeypatch, Head, "forward")
    with OptLM(tiny("opt").directory, mixed(), device="emulated", progress=False) as lm:
        expected = lm.forward(prompts(LENGTHS))
        fault.arm(0.5)
        with pytest.raises(LaneError, match="the cable is out"):
            lm.forward(prompts(LENGTHS))
        assert lm.forward(prompts(LENGTHS)).equal(expected)


def test_an_interrupt_of_the_caller_stops_the_lanes(
    tiny: Any, prompts: Any, mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = tiny("opt"), prompts(LENGTHS)
    copies = Faulty(monkeypatch, EmulatedDevice, "to_device")
    issued, issue = 0, _Run.issue

    def interrupt(run: Any, step: Any) -> None:
        nonlocal issued
        issued += 1
        if issued == 100:
            raise KeyboardInterrupt
        issue(run, step)

    # The link is so slow that most of what was issued still waits for it.
    with OptLM(model.directory, mixed(), device="emulated:link=256KiB", progress=False) as lm:
        lanes = lm._opened().lanes
        monkeypatch.setattr(_Run, "issue", interrupt)
        with pytest.raises(KeyboardInterrupt):
            lm.generate(given, 4, stop=())
        made = copies.calls
        lanes.stop(cancel=False)
        assert copies.calls == made, "a lane went on after the call was over"
        np.testing.assert_array_equal(lm.generate(given, 2, stop=()), model.greedy(given, 2))


class Mapping(mmap.mmap):
    """Host memory, as the stores map it, that can be counted."""

    made: list[weakref.ref[Mapping]] = []

    def __new__(cls, *args: Any, **options: Any) -> Mapping:
        mapping = super().__new__(cls, *args, **options)
        cls.made.append(weakref.ref(mapping))
        return mapping

    @classmethod
    def alive(cls) -> int:
        gc.collect()
        return sum(ref() is not None for ref in cls.made)


@pytest.fixture
def mappings(monkeypatch: pytest.MonkeyPatch) -> type[Mapping]:
    monkeypatch.setattr("flexgen.memory.cpu.mmap.mmap", Mapping)
    monkeypatch.setattr(Mapping, "made", [])
    return Mapping


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_leaving_frees_files_threads_and_memory(
    device: str, tiny: Any, prompts: Any, mixed: Any, threads: Any, mappings: Any, tmp_path: Path
) -> None:
    before = threads()
    with OptLM(tiny("opt").directory, mixed(), device=device, offload_dir=tmp_path, progress=False) as lm:
        held = mappings.alive()
        assert held
        lm.generate(prompts(LENGTHS), 4, stop=())
        assert threads() > before
        assert mappings.alive() == held, "a call keeps what it took"
        assert len(mappings.made) > held
    assert threads() <= before
    assert not list(tmp_path.iterdir())
    assert mappings.alive() == 0
    assert lm.device == device  # the closed model can still be asked what it was


def test_a_model_that_is_dropped_frees_the_same(
    tiny: Any, prompts: Any, mixed: Any, threads: Any, mappings: Any, tmp_path: Path
) -> None:
    before = threads()
    lm = OptLM(tiny("opt").directory, mixed(), device="emulated", offload_dir=tmp_path, progress=False)
    lm.generate(prompts(LENGTHS), 4, stop=())
    del lm
    assert mappings.alive() == 0
    assert threads() <= before
    assert not list(tmp_path.iterdir())


def test_a_call_that_fails_takes_its_files_with_it(
    tiny: Any, prompts: Any, mixed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fault = Faulty(monkeypatch, DiskIO, "write")
    with OptLM(tiny("opt").directory, mixed(), device="emulated", offload_dir=tmp_path, progress=False) as lm:
        fault.at = fault.calls + 2
        with pytest.raises(LaneError):
            lm.generate(prompts(LENGTHS), 4, stop=())
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        assert lm._machine.limits()[Tier.DISK] is not None


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize(
    ("owner", "method", "error"),
    [
        (DiskStore, "make", CapacityError("the disk is full")),
        (Store, "allocate", MemoryError("there is no more")),
        (Store, "allocate", KeyboardInterrupt()),
        (Store, "release", KeyboardInterrupt()),
        (DiskStore, "release", KeyboardInterrupt()),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_fails_while_buffers_are_made_or_given_back_leaves_nothing(
    owner: type,
    method: str,
    error: BaseException,
    device: str,
    tiny: Any,
    prompts: Any,
    mixed: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Wherever it fails: a file that stayed would be in the way of the next call, bytes that stayed counted too."""
    model, given = tiny("opt"), prompts(LENGTHS)
    fault = Faulty(monkeypatch, owner, method, after=method == "release")
    with OptLM(model.directory, mixed(), device=device, progress=False, offload_dir=tmp_path) as lm:
        fault.calls = 0
        expected = lm.generate(given, 2, stop=())
        calls, taken = fault.calls, lm.memory_in_use()
        fault.error = error
        for at in sorted({1, 2, calls // 4, calls // 2, calls - 1, calls} - {0}):
            fault.at, fault.calls = at, 0
            with pytest.raises(type(error)):
                lm.generate(given, 2, stop=())
            assert lm.memory_in_use() == taken, f"call {at} of {calls}"
            assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        np.testing.assert_array_equal(lm.generate(given, 2, stop=()), expected)
