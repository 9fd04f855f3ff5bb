"""Measures the time that a call needs on each lane alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from flexgen.policy import Tier
from flexgen.results.bounds import timed_lanes
from flexgen.results.trace import LaneName, Phase
from flexgen.runtime.call import Call
from flexgen.runtime.choice import Sampled
from flexgen.runtime.model import Model
from flexgen.runtime.prefix_groups import PrefixGroup
from flexgen.runtime.request import Request
from flexgen.runtime.tokens import NewTokens
from flexgen.workload import Workload


def lane_seconds(
    model: Model, request: Request, groups: Sequence[PrefixGroup], workload: Workload
) -> dict[Phase, dict[LaneName, float]]:
    """Seconds of each lane that can be timed, for both phases of all blocks. See `OptLM.lane_seconds`."""
    lanes = timed_lanes(model.machine.device.topology.host_attends(model.policy))
    on_disk = any(split.percent(Tier.DISK) for split in (model.policy.cache, model.policy.activations))
    tokens = workload.gen_len
    seconds: dict[Phase, dict[LaneName, float]] = {phase: {} for phase in Phase}
    active = model.machine.device.active()

    def add(timed: Mapping[LaneName, Mapping[Phase, float]]) -> None:
        for lane, alone in timed.items():
            if lane is LaneName.HOST and model.machine.device.shares_cores:
                lane = LaneName.COMPUTE  # one resource: the lower bound is their sum
            for phase, taken in alone.items():
                if taken:
                    seconds[phase][lane] = seconds[phase].get(lane, 0.0) + taken

    with active, torch.inference_mode(), (call := Call(model, workload, 0)), call:
        timed: dict[tuple[int, ...], dict[LaneName, dict[Phase, float]]] = {}
        for group in groups:
            for part in call.begin(group, request, lanes=lanes):
                add(part)
            own = group.prompts(request)
            for rows in own.blocks(model.policy.block_size):
                lengths = group.shared, *(len(own.prompts[n]) for n in rows)
                if lengths not in timed:
                    prompts = call.prepare([own.prompts[n] for n in rows])
                    output = NewTokens(prompts, tokens, Sampled())
                    # Reads of bytes that were never written do not access the disk, and no rows have been looked up
                    # yet.
                    if on_disk or model.table is not None:
                        call.run(prompts, 1, output)
                    timed[lengths] = {lane: call.time_lane(lane, prompts, tokens, output) for lane in lanes}
                add(timed[lengths])
    return seconds
