"""Opens a model's weights on a machine, with a given policy or one that is searched for."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from flexgen.engine.auto import AutoPolicy, Chosen, this_machine, usual_workload
from flexgen.engine.calls import CallPlans
from flexgen.errors import MOST_OF_PATH, PolicyError, RequestError, shown
from flexgen.layout.placement import place_weights
from flexgen.memory.cpu import reset_peak_resident_bytes
from flexgen.memory.device import ComputeDevice
from flexgen.memory.gpu import choose_dtype, open_device
from flexgen.memory.homes import Homes, stored_bytes
from flexgen.memory.lookup import open_table
from flexgen.memory.machine import Machine
from flexgen.memory.weights import WeightSlots
from flexgen.models import ModelSpec, build_layers
from flexgen.models.checkpoint import Checkpoint
from flexgen.policy import Auto, Policy, Tier
from flexgen.predict.job import Job
from flexgen.runtime.in_use import InUse
from flexgen.runtime.model import Model
from flexgen.workload import Workload


@dataclass(frozen=True)
class Place:
    """The arguments of `OptLM` that describe the machine."""

    device: str | torch.device | ComputeDevice
    dtype: str | torch.dtype
    offload_dir: str | Path | None
    max_memory: Mapping[Tier, int] | None
    progress: bool | None
    fast_start: bool = False

    def __post_init__(self) -> None:
        """Raises RequestError for invalid values."""
        if self.progress is not None and not isinstance(self.progress, bool):
            raise RequestError(f"progress is {shown(self.progress)}; it must be True, False or None")
        given = self.offload_dir
        path = os.fspath(given) if isinstance(given, str | os.PathLike) else given
        if path is not None and (not isinstance(path, str) or "\0" in path or len(path) > MOST_OF_PATH):
            raise RequestError(f"offload_dir is {shown(given)}; it must be the path of a directory or None")
        if not isinstance(self.fast_start, bool):
            raise RequestError(f"fast_start is {shown(self.fast_start)}; it must be True or False")


def read_policy(policy: Policy | Auto | str | Path) -> Policy | Auto:
    """The policy argument of `OptLM` (an object, "auto" or a path) as an object. Raises PolicyError."""
    if isinstance(policy, str | Path):
        return Auto() if policy == "auto" else Policy.load(policy)
    if not isinstance(policy, Policy | Auto):
        raise PolicyError(
            f'policy is {shown(policy)}; it must be a Policy, an Auto, "auto" or the path of a TOML file'
        )
    return policy


@dataclass(frozen=True)
class Opened:
    """A model whose weights are loaded, and the plans of its calls.

    resident_before: bytes of host memory that this process had in use before the weights were loaded.
    resources: closes everything that the model holds, running calls first.
    """

    model: Model
    plans: CallPlans
    resident_before: int
    resources: ExitStack

    def closed_with(self, owner: object) -> weakref.finalize[..., object]:
        """Close the resources when `owner` is deleted, at exit, or when the result is called.

        A forked child closes nothing, because the parent owns the resources.
        """
        return weakref.finalize(owner, _close_own, self.plans.in_use, self.resources)


def _close_own(in_use: InUse, stack: ExitStack) -> None:
    if not in_use.inherited:
        stack.close()


def open_weights(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    policy: Policy | Auto,
    place: Place,
    workload: Workload | None,
    order: str | None,
) -> Opened:
    """Search for a policy if it is "auto", and load all weights.

    Raises as `OptLM` does, before any weight is read.
    """
    if workload is not None and not isinstance(workload, Workload):
        raise RequestError(f"workload is {shown(workload)}; it must be a Workload or None")
    # This comes before the device is opened, because a measurement opens and closes it too.
    searched = isinstance(policy, Auto)
    hardware = (
        this_machine(place.device, place.offload_dir, place.progress, place.max_memory) if searched else None
    )
    with ExitStack() as stack:
        compute = open_device(place.device)
        stack.callback(compute.close)
        dtype, auto = choose_dtype(place.dtype, spec.dtype, compute), None
        if isinstance(policy, Auto):
            assert hardware is not None
            layers = build_layers(spec)
            checkpoint.verify(layers)
            stored = stored_bytes(checkpoint, layers, dtype, place.offload_dir)
            # Weights that are already stored need no free space on the disk.
            disk = hardware.capacity[Tier.DISK] + stored
            hardware = hardware.replace(capacity={**hardware.capacity, Tier.DISK: disk})
            job = Job.checked(
                spec, hardware, workload or usual_workload(spec), str(dtype).removeprefix("torch."), order
            )
            auto = AutoPolicy(policy, job)
            policy, order = auto.opened.policy, auto.opened.order
        layers = build_layers(spec, sep_layer=policy.sep_layer)
        checkpoint.verify(layers)
        machine = Machine.open(compute, place.offload_dir, policy.pin_weight, place.max_memory)
        stack.callback(machine.close)
        # A block with fewer batches may run in another order. The slots of a full block are enough for it.
        slots = compute.topology.choose_order(order, policy, policy.num_gpu_batches).slots
        placement = place_weights(layers, policy.weights, dtype)
        resident_before = reset_peak_resident_bytes()
        in_use = InUse()
        plans = CallPlans(layers, placement, machine, slots, Chosen(policy, order), auto, in_use)
        plan = plans.of_weights()
        homes = Homes(checkpoint, placement, machine, place.fast_start)
        no_bar = None if place.progress is None else not place.progress
        with compute.active():
            homes.load(layers, partial(tqdm, desc="weights", unit="layer", disable=no_bar))
            weight_slots = WeightSlots(layers, homes, plan.weight_slots, placement, machine, slots.decoded)
            table = open_table(layers, homes, machine)
            compute.settle()
            lanes = machine.make_lanes()
            stack.callback(lanes.close)
        model = Model(layers, dtype, policy, machine, weight_slots, lanes, slots, order, table, in_use)
        stack.callback(plans.forget_all)
        stack.callback(in_use.close)  # closed first: a running call uses the resources that the others free
        return Opened(model, plans, resident_before, stack.pop_all())
