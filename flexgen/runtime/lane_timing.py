"""What each lane alone would take for a call."""

from __future__ import annotations

import torch

from flexgen.policy import Tier
from flexgen.results.report import timed_lanes
from flexgen.results.trace import LaneName, Phase
from flexgen.runtime.call import Call
from flexgen.runtime.choice import Sampled
from flexgen.runtime.model import Model
from flexgen.runtime.request import Request
from flexgen.runtime.tokens import NewTokens
from flexgen.workload import Workload


def lane_seconds(model: Model, request: Request, workload: Workload) -> dict[Phase, dict[LaneName, float]]:
    """Seconds of each lane that can be timed, for both phases of all blocks, see `OptLM.lane_seconds`."""
    lanes = timed_lanes(model.machine.device.topology.host_attends(model.policy))
    on_disk = any(split.percent(Tier.DISK) for split in (model.policy.cache, model.policy.activations))
    tokens = workload.gen_len
    seconds: dict[Phase, dict[LaneName, float]] = {phase: {} for phase in Phase}
    active = model.machine.device.active()
    with active, torch.inference_mode(), (call := Call(model, workload, 0)), call:
        timed: dict[tuple[int, ...], dict[LaneName, dict[Phase, float]]] = {}
        for rows in request.blocks(model.policy.block_size):
            lengths = tuple(len(request.prompts[n]) for n in rows)
            if lengths not in timed:
                prompts = call.prepare([request.prompts[n] for n in rows])
                output = NewTokens(prompts, tokens, Sampled())
                # What was never written is read without touching the disk, and no rows were looked up yet.
                if on_disk or model.table is not None:
                    call.run(prompts, 1, output)
                timed[lengths] = {lane: call.time_lane(lane, prompts, tokens, output) for lane in lanes}
            for lane, alone in timed[lengths].items():
                if lane is LaneName.HOST and model.machine.device.shares_cores:
                    lane = LaneName.COMPUTE  # one resource: what cannot be beaten is their sum
                for phase, taken in alone.items():
                    if taken:
                        seconds[phase][lane] = seconds[phase].get(lane, 0.0) + taken
    return seconds
