"""Attention over the cache on the host, during the computation: the same ids, the overlap, and failures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flexgen.engine.model import OptLM
from flexgen.errors import LaneError
from flexgen.memory.gpu import EmulatedDevice
from flexgen.models.block import Block
from flexgen.policy import Policy
from flexgen.results.trace import LaneName, Phase
from flexgen.runtime.call import Call
from flexgen.runtime.host_attention import HostAttention
from flexgen.schedule.steps import Op

ORDER = "overlap_cpu_attention"
LENGTHS = [3, 7, 5, 9, 2, 6, 4, 8, 5, 3]
SPLITS: list[dict[str, float]] = [
    {"cpu": 100},
    {"disk": 100},
    {"gpu": 50, "cpu": 50},
    {"cpu": 50, "disk": 50},
    {"gpu": 34, "cpu": 33, "disk": 33},
    {"gpu": 90, "cpu": 10},  # too little for a batch of two rows: nothing is asked of the host
]


@pytest.fixture
def host_policy() -> Callable[..., Policy]:
    """A policy with attention on the host while weights and hidden states come from there."""

    def make(**changes: Any) -> Policy:
        fields: dict[str, Any] = dict(
            gpu_batch_size=2,
            num_gpu_batches=5,
            weights={"cpu": 100},
            cache={"cpu": 100},
            activations={"cpu": 100},
            sep_layer=False,
        )
        return Policy(**fields | changes)

    return make


@pytest.mark.parametrize("cache", SPLITS, ids=str)
@pytest.mark.parametrize("batches", [2, 3, 5])
@pytest.mark.parametrize("sep_layer", [True, False])
def test_ids_are_those_of_transformers(
    sep_layer: bool, batches: int, cache: dict[str, float], tiny: Any, prompts: Any, host_policy: Any
) -> None:
    model, given = tiny("llama gqa 2"), prompts(LENGTHS[: 2 * batches + 1])  # and a block of one batch
    policy = host_policy(cache=cache, num_gpu_batches=batches, sep_layer=sep_layer)
    with OptLM(model.directory, policy, device="emulated", progress=False) as lm:
        np.testing.assert_array_equal(lm.generate(given, 9, stop=()), model.greedy(given, 9))
        assert lm.stats is not None and lm.stats.order == ORDER


def test_rows_that_stop_early(tiny: Any, prompts: Any, host_policy: Any) -> None:
    model, given = tiny("opt"), prompts(LENGTHS)
    free = model.greedy(given, 12)
    stop = [int(free[0, 12]), int(free[4, 14])]
    with OptLM(model.directory, host_policy(), device="emulated", progress=False) as lm:
        np.testing.assert_array_equal(lm.generate(given, 12, stop=stop), model.greedy(given, 12, stop))
        every = sorted(set(free[:, 9:12].ravel().tolist()))
        assert (model.greedy(given, 12, every)[:, 12:] == 1).all(), "no row may be left after three tokens"
        np.testing.assert_array_equal(lm.generate(given, 12, stop=every), model.greedy(given, 12, every))
        assert lm.stats is not None
        assert max(event.step.token for event in lm.stats.timing.trace.events) <= 3


@pytest.mark.parametrize(
    ("device", "changes", "order"),
    [
        ("emulated", {}, ORDER),
        ("emulated", {"num_gpu_batches": 1}, "overlap_single_batch"),
        ("emulated", {"cache": {"gpu": 100}}, "overlap_multi_batch"),
        ("emulated", {"attend_on": "gpu"}, "overlap_multi_batch"),
        ("emulated", {"overlap": False}, "normal"),
        ("cpu", {}, "overlap_multi_batch"),  # all attention is in place
    ],
)
def test_when_it_is_chosen(
    device: str, changes: Any, order: str, tiny: Any, prompts: Any, host_policy: Any
) -> None:
    with OptLM(tiny("opt").directory, host_policy(**changes), device=device, progress=False) as lm:
        lm.generate(prompts(LENGTHS), 2, stop=())
        assert lm.stats is not None and lm.stats.order == order
        split = {Op.PROJECT, Op.ATTEND, Op.LOAD_ATTENTION}
        ops = {event.step.op for event in lm.stats.timing.trace.events}
    assert split & ops == (split if order == ORDER else set())


@pytest.mark.parametrize("cache", [{"cpu": 100}, {"gpu": 50, "cpu": 50}], ids=str)
def test_lanes_of_a_cell(cache: Any, tiny: Any, prompts: Any, host_policy: Any) -> None:
    """Attention is on the device for the prompt, on the host for later tokens; a step starts after those it needs."""
    with OptLM(tiny("opt").directory, host_policy(cache=cache), device="emulated", progress=False) as lm:
        lm.generate(prompts(LENGTHS), 4, stop=())
        assert lm.stats is not None
        events, layers = lm.stats.timing.trace.events, len(lm.layer_names)
    lanes: dict[Any, list[Any]] = {}
    for event in events:
        lanes.setdefault(event.step, []).append(event)
    attention_steps = [step[1:] for step in lanes if step.op is Op.ATTEND]
    assert sorted(attention_steps) == [
        (i, j, k) for i in (1, 2, 3) for j in range(1, layers - 1) for k in range(5)
    ]
    on_device = [LaneName.COMPUTE] if "gpu" in cache else []
    chain = [
        (Op.PROJECT, [LaneName.COMPUTE, LaneName.FROM_DEVICE]),
        (Op.ATTEND, [LaneName.HOST, *on_device]),
        (Op.LOAD_ATTENTION, [LaneName.TO_DEVICE]),
        (Op.COMPUTE, [LaneName.COMPUTE]),
    ]
    for i, j, k in attention_steps:
        now = 0.0
        for op, expected in chain:
            found = lanes[(op, i, j, k)]
            assert sorted(event.lane for event in found) == sorted(expected)
            assert now <= min(event.start for event in found)
            now = max(event.end for event in found)


class Rendezvous:
    """Holds the host at each batch until the device has begun the batches on both sides of it.

    Where the order does not let them run together, the host fails after `patience` seconds.
    """

    patience = 60.0

    def __init__(self, patch: pytest.MonkeyPatch, batches: int) -> None:
        self._batches = batches
        self._begun = {"qkv": 0, "output": 0}
        self._attended = 0
        self._changed = threading.Condition()
        for half in self._begun:
            self._count(patch, half)
        attend = HostAttention.attend

        def held(*args: Any) -> None:
            n, self._attended = self._attended, self._attended + 1
            first, last = n % batches == 0, n % batches == batches - 1
            with self._changed:
                met = self._changed.wait_for(
                    lambda: (last or self._begun["qkv"] > n + 1) and (first or self._begun["output"] >= n),
                    self.patience,
                )
            assert met, f"nothing is computed during attention of cell {n}: {self._begun}"
            attend(*args)

        patch.setattr(HostAttention, "attend", held)

    def _count(self, patch: pytest.MonkeyPatch, half: str) -> None:
        method = getattr(Block, half)

        def counted(layer: Block, first: Any, *args: Any) -> Any:
            x = first if half == "qkv" else args[0]
            if x.shape[1] == 1:  # attention over the prompt is on the device
                with self._changed:
                    self._begun[half] += 1
                    self._changed.notify_all()
            return method(layer, first, *args)

        patch.setattr(Block, half, counted)


@pytest.mark.parametrize("batches", [4, 5])
def test_the_host_attends_while_the_device_computes_both_neighbours(
    batches: int, tiny: Any, prompts: Any, host_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = tiny("opt"), prompts(LENGTHS[: 2 * batches])
    with OptLM(
        model.directory, host_policy(num_gpu_batches=batches), device="emulated:link=8MiB", progress=False
    ) as lm:
        Rendezvous(monkeypatch, batches)
        np.testing.assert_array_equal(lm.generate(given, 5, stop=()), model.greedy(given, 5))


@pytest.mark.parametrize(
    ("method", "op", "lane"),
    [("collect", "project", "compute"), ("send", "project", "from_device"), ("attend", "attend", "host"),
     ("fetch", "load_attention", "to_device"), ("take", "compute", "compute")],
)  # fmt: skip
def test_an_error_of_any_part_reaches_the_caller(
    method: str,
    op: str,
    lane: str,
    tiny: Any,
    prompts: Any,
    host_policy: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, given = tiny("opt"), prompts(LENGTHS)
    right, calls, fails = getattr(HostAttention, method), 0, True

    def faulty(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if fails and calls == 13:  # some cell in the middle, with others under way
            raise OSError("the cable is out")
        return right(*args)

    monkeypatch.setattr(HostAttention, method, faulty)
    with OptLM(model.directory, host_policy(), device="emulated", progress=False) as lm:
        taken = lm.memory_in_use()
        with pytest.raises(LaneError, match=f"^{op} of token .* lane {lane}: OSError: the cable is out"):
            lm.generate(given, 6, stop=())
        assert lm.memory_in_use() == taken
        fails = False
        np.testing.assert_array_equal(lm.generate(given, 6, stop=()), model.greedy(given, 6))


@pytest.mark.parametrize("order", ["normal", "overlap_multi_batch", ORDER])
@pytest.mark.parametrize("shares_cores", [True, False])
def test_what_the_host_attends_is_a_lane_of_its_own_in_the_bound(
    order: str, shares_cores: bool, tiny: Any, prompts: Any, host_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever order is in force: the bound is of the hardware and the policy. Where the device computes on the
    host's cores, the two are one resource, and their seconds add."""
    monkeypatch.setattr(EmulatedDevice, "shares_cores", shares_cores)
    model, given = tiny("opt"), prompts(LENGTHS)
    timed: dict[LaneName, dict[Phase, float]] = {}
    time_lane = Call.time_lane

    def timing(self: Call, lane: LaneName, *args: Any) -> dict[Phase, float]:
        timed[lane] = time_lane(self, lane, *args)
        return timed[lane]

    monkeypatch.setattr(Call, "time_lane", timing)
    with OptLM(model.directory, host_policy(), device="emulated", progress=False, order=order) as lm:
        seconds = lm.lane_seconds(given, 6)
        # Attention over the prompt is on the device; the table is looked up by the host, in both phases.
        for phase, lanes in seconds.items():
            of_device, of_host = timed[LaneName.COMPUTE][phase], timed[LaneName.HOST][phase]
            if shares_cores:
                assert lanes.keys() == {LaneName.COMPUTE, LaneName.TO_DEVICE}
                assert lanes[LaneName.COMPUTE] == of_device + of_host
            else:
                assert lanes.keys() == {LaneName.COMPUTE, LaneName.HOST, LaneName.TO_DEVICE}
                assert (lanes[LaneName.COMPUTE], lanes[LaneName.HOST]) == (of_device, of_host)
            assert all(value > 0 for value in lanes.values())
        np.testing.assert_array_equal(lm.generate(given, 6, stop=()), model.greedy(given, 6))
