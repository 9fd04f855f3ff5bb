"""Which events overlap, from the trace: no wall clock, only the order of events."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from piece_sizes import piece_sizes

from flexgen.engine.model import OptLM
from flexgen.memory.transfer import Chains, Stage
from flexgen.memory.weights import WeightSlots
from flexgen.models.attention import Attention
from flexgen.models.embed import Head, InputEmbed
from flexgen.models.mlp import MLP
from flexgen.policy import Policy
from flexgen.results.trace import Event, LaneName, Phase
from flexgen.schedule.steps import Op

SLOW = "emulated:link=8MiB,disk=8MiB"
TOKENS = 4
LENGTHS = [3, 7, 5, 9, 2, 6]


def edges(events: Iterable[Event], layers: int) -> tuple[dict[int, float], dict[int, float]]:
    """By visit of a layer: when its weights begin to arrive, and when its last computation ends."""
    loads: dict[int, float] = {}
    ends: dict[int, float] = {}
    for (op, token, layer, _), _, start, end in events:
        visit = token * layers + layer
        if op is Op.LOAD_WEIGHTS:
            loads[visit] = min(loads.get(visit, start), start)
        elif op is Op.COMPUTE:
            ends[visit] = max(ends.get(visit, end), end)
    return loads, ends


class Rendezvous:
    """Holds the last batch of each layer until the weights of the next visit have begun to arrive.

    So a computation that is too quick for a loaded machine cannot hide what may overlap with it. Where the
    order does not let them run together, the computation fails after `patience` seconds.
    """

    patience = 60.0

    def __init__(self, patch: pytest.MonkeyPatch, layers: int, batches: int) -> None:
        self._layers, self._batches = layers, batches
        self._loads: Counter[int] = Counter()
        self._computed = 0
        self._changed = threading.Condition()
        chains = WeightSlots.chains

        def recorded(slots: WeightSlots, layer: int, *args: int) -> Chains:
            (((lane, job), *rest),) = chains(slots, layer, *args)  # one chain: all weights on one tier

            def begin() -> None:
                with self._changed:
                    self._loads[layer] += 1
                    self._changed.notify_all()
                job()

            return ((Stage(lane, begin), *rest),)

        patch.setattr(WeightSlots, "chains", recorded)
        for kind in (InputEmbed, Attention, MLP, Head):
            self._hold(patch, kind)

    def _hold(self, patch: pytest.MonkeyPatch, kind: type) -> None:
        forward = kind.forward  # type: ignore[attr-defined]

        def held(*args: Any) -> Any:
            visit, batch = divmod(self._computed, self._batches)
            self._computed += 1
            if batch == self._batches - 1 and visit + 1 < TOKENS * self._layers:
                token, layer = divmod(visit + 1, self._layers)
                with self._changed:
                    if not self._changed.wait_for(lambda: self._loads[layer] > token, self.patience):
                        raise AssertionError(
                            f"weights of visit {visit + 1} are not loaded during visit {visit}"
                        )
            return forward(*args)

        patch.setattr(kind, "forward", held)


@pytest.mark.parametrize("tier", ["cpu", "disk"])
@pytest.mark.parametrize("batches", [1, 2])
def test_overlap_loads_the_next_layer_while_this_one_computes(
    batches: int, tier: str, tiny: Any, prompts: Any, mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = tiny("opt"), prompts(LENGTHS)[: 3 * batches]
    policy = mixed(weights={tier: 100}, num_gpu_batches=batches)
    with (
        piece_sizes(weight_bytes=1 << 20),  # a layer travels in one piece
        OptLM(model.directory, policy, device=SLOW, progress=False) as lm,
    ):
        Rendezvous(monkeypatch, len(lm.layer_names), batches)
        np.testing.assert_array_equal(lm.generate(given, TOKENS, stop=()), model.greedy(given, TOKENS))
        assert lm.stats is not None
        loads, ends = edges(lm.stats.timing.trace.events, len(lm.layer_names))
    assert loads.keys() == ends.keys() == set(range(TOKENS * len(lm.layer_names)))
    assert all(loads[visit + 1] < ends[visit] for visit in ends if visit + 1 in loads)


@pytest.mark.parametrize("device", ["cpu", "emulated", SLOW])
@pytest.mark.parametrize("batches", [1, 2])
def test_without_overlap_nothing_moves_while_a_cell_computes(
    batches: int, device: str, tiny: Any, prompts: Any, mixed: Any
) -> None:
    policy = mixed(num_gpu_batches=batches, overlap=False, attend_on="gpu")
    with OptLM(tiny("opt").directory, policy, device=device, progress=False) as lm:
        lm.generate(prompts(LENGTHS)[: 3 * batches], TOKENS, stop=())
        assert lm.stats is not None
        events = lm.stats.timing.trace.events
    computing = [event for event in events if event.step.op is Op.COMPUTE]
    moving = [event for event in events if event.step.op is not Op.COMPUTE]
    assert len(computing) == TOKENS * len(lm.layer_names) * batches and moving
    for cell in computing:
        overlapping = [event for event in moving if event.start < cell.end and cell.start < event.end]
        assert not overlapping, f"{overlapping[0]} overlaps with {cell}"


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("overlap", [False, True])
def test_events_keep_the_order_of_their_data(
    overlap: bool, device: str, tiny: Any, prompts: Any, mixed: Any
) -> None:
    """A cell computes after all its loads, stores after it computes, and lanes serve one at a time."""
    with OptLM(tiny("opt").directory, mixed(overlap=overlap), device=device, progress=False) as lm:
        lm.generate(prompts(LENGTHS), TOKENS, stop=())
        assert lm.stats is not None
        events = lm.stats.timing.trace.events
    computed = {event.step[1:]: event for event in events if event.step.op is Op.COMPUTE}
    for (op, token, layer, batch), _, start, end in events:
        if op is Op.LOAD_WEIGHTS:
            assert all(end <= computed[token, layer, k].start for k in range(2))
        elif op in (Op.LOAD_CACHE, Op.LOAD_HIDDEN):
            assert end <= computed[token, layer, batch].start
        elif op in (Op.STORE_CACHE, Op.STORE_HIDDEN):
            assert start >= computed[token, layer, batch].end
    for lane in LaneName:
        served = [event for event in events if event.lane is lane]
        assert all(a.end <= b.start for a, b in zip(served, served[1:], strict=False))


def test_what_is_in_place_does_not_move(tiny: Any, prompts: Any) -> None:
    with OptLM(tiny("opt").directory, Policy(gpu_batch_size=6), device="cpu", progress=False) as lm:
        lm.generate(prompts(LENGTHS), TOKENS, stop=())
        assert lm.stats is not None
        ops = {event.step.op for event in lm.stats.timing.trace.events}
    assert ops == {Op.COMPUTE, Op.STORE_HIDDEN}  # the latter hands over the new ids


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_lanes_alone(device: str, tiny: Any, prompts: Any, mixed: Any) -> None:
    model, given = tiny("opt"), prompts(LENGTHS)
    with OptLM(model.directory, mixed(attend_on="gpu"), device=device, progress=False) as lm:
        seconds = lm.lane_seconds(given, 6)
        assert seconds.keys() == set(Phase)
        lanes = {LaneName.COMPUTE, LaneName.DISK_READ, LaneName.DISK_WRITE}
        for by_lane in seconds.values():
            assert all(value > 0 for value in by_lane.values())
            assert by_lane.keys() == (lanes if device == "cpu" else lanes | {LaneName.TO_DEVICE})
        (prefill,) = ({*lm.lane_seconds(given, 1)[phase]} for phase in Phase if phase is Phase.PREFILL)
        assert prefill == seconds[Phase.PREFILL].keys() and not lm.lane_seconds(given, 1)[Phase.DECODE]
        assert lm.stats is None
        np.testing.assert_array_equal(lm.generate(given, 6, stop=()), model.greedy(given, 6))
