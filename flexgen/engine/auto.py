"""`policy="auto"`: searches for a policy for the machine and the workload, and for calls of other workloads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from flexgen.errors import FlexGenError
from flexgen.memory.device import ComputeDevice
from flexgen.models import ModelSpec
from flexgen.policy import Auto, Policy, Tier
from flexgen.predict.hardware import Hardware
from flexgen.predict.job import Job
from flexgen.probe.measured import measured, remembered
from flexgen.schedule.orders import Slots, normal, overlap_multi_batch
from flexgen.search.candidates import Search
from flexgen.search.find import find_for_job
from flexgen.workload import Workload

_log = logging.getLogger("flexgen")

USUAL = Workload(512, 32, 256)
"""The workload if none is given: the lengths of FlexGen's paper, and enough prompts to fill large blocks."""

_SPARE = 0.95
"""The share of measured capacity that plans use: other processes may take memory before the weights are loaded."""

_FIXED_AT_OPENING = ("weights", "overlap", "sep_layer", "pin_weight")
_UNLIKE = 2.0
"""Lengths or numbers of prompts that differ by a larger factor make a call unlike the planned one."""


def usual_workload(spec: ModelSpec) -> Workload:
    """`USUAL`, with lengths cut to the model's positions."""
    gen_len = min(USUAL.gen_len, max(spec.max_positions // 2, 1))
    return Workload(min(USUAL.prompt_len, max(spec.max_positions - gen_len, 1)), gen_len, USUAL.num_prompts)


def this_machine(
    device: str | torch.device | ComputeDevice,
    offload_dir: str | Path | None,
    progress: bool | None = None,
    max_memory: Mapping[Tier, int] | None = None,
) -> Hardware:
    """The figures of this machine, which is measured first if it was not measured before (one or two minutes).

    The capacity of each tier is a little less than the free memory, so that plans still fit when they run.

    progress: whether to show a progress bar; None shows it on a terminal only.
    max_memory: the maximum bytes by tier.
    """
    with _Bar(progress) as bar:
        hardware = measured(device, offload_dir, progress=bar)
    most = max_memory or {}
    capacity = {
        tier: max(min(int(n * _SPARE), most.get(tier, n)), 1) for tier, n in hardware.capacity.items()
    }
    return hardware.replace(capacity=capacity)


def known_machine(
    device: str | torch.device | ComputeDevice, offload_dir: str | Path | None
) -> Hardware | None:
    """The figures of this machine if it was measured before, else None. It measures nothing."""
    return remembered(device, offload_dir)


class _Bar:
    """A progress bar for the measurement. It stays hidden if the machine was measured before."""

    def __init__(self, progress: bool | None) -> None:
        self._disable = None if progress is None else not progress
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int, label: str) -> None:
        if self._bar is None:
            _log.info("this machine was not measured before: measuring it once takes one or two minutes")
            self._bar = tqdm(total=total, desc="measuring", disable=self._disable, leave=False)
        self._bar.update(done - self._bar.n)
        self._bar.set_postfix_str(label)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


@dataclass(frozen=True)
class Chosen:
    """A policy, and the name of its order (None: the policy's own order)."""

    policy: Policy
    order: str | None


class AutoPolicy:
    """The policies of one opened model: the policy that it was opened with, and those of calls of other workloads.

    Weights and their slots are placed once. Batches, cache and hidden states belong to a call and may change with it.
    """

    def __init__(self, auto: Auto, job: Job) -> None:
        """job: the job that the model is opened for."""
        self.once = auto.once
        self._auto = auto
        self.job = job
        self.search = find_for_job(job, auto)
        self.opened = _chosen(self.search, job)
        self._known: dict[Workload, Chosen] = {}
        _log.info("%s", in_words(self.search))

    def for_call(self, workload: Workload, fits: Callable[[Policy], bool]) -> Chosen:
        """The policy of a call: the opening's policy, unless it does not fit or the call is worth a search."""
        if workload not in self._known:
            chosen = self.opened
            if not fits(chosen.policy) or self._worth_a_search(workload):
                chosen = self._again(workload) or chosen
            self._known[workload] = chosen
        return self._known[workload]

    def _worth_a_search(self, workload: Workload) -> bool:
        planned, block = self.job.workload, self.opened.policy.block_size
        pairs = (
            (workload.prompt_len, planned.prompt_len),
            (workload.gen_len, planned.gen_len),
            (min(workload.num_prompts, block), min(planned.num_prompts, block)),
        )
        if all(max(a, b) <= _UNLIKE * min(a, b) for a, b in pairs):
            return False
        report = self.search.best.prediction.report
        blocks, before = (-(-w.num_prompts // block) for w in (workload, planned))
        prefill = report.prefill_s * workload.prompt_len / planned.prompt_len
        decode = report.decode_s * workload.gen_len / planned.gen_len
        return (prefill + decode) * blocks / before > self._auto.worth * self.search.seconds

    def _again(self, workload: Workload) -> Chosen | None:
        """A policy for `workload` that leaves the weights in place, or None if none is found."""
        policy = self.opened.policy
        fixed = {name: getattr(policy, name) for name in _FIXED_AT_OPENING} | dict(self._auto.fixed)
        # An order that needs more slots than there are cannot run, so others are tried. The last one always fits.
        asked, held = self.job.order, self._slots(self.opened)
        for order in (asked,) if asked else (None, overlap_multi_batch.name, normal.name):
            try:
                job = replace(self.job, order=order).for_workload(self._completed(workload))
                search = find_for_job(job, Auto(fixed, self._auto.lossy), slots=held)
            except FlexGenError as error:
                _log.info("this call keeps the policy of the opening: %s", error)
                return None
            chosen = _chosen(search, job)
            if self._slots(chosen).fit(held):
                _log.info("%s", in_words(search))
                return chosen
        return None

    def _completed(self, workload: Workload) -> Workload:
        """The workload of a call, with what only the job says about its answers."""
        mean, most = self.job.workload.mean_new, workload.gen_len
        if workload.mean_new is None and mean is not None:
            workload = replace(workload, mean_new=min(mean, most))
        return replace(workload, copied=self.job.workload.copied)

    def _slots(self, chosen: Chosen) -> Slots:
        """The slots of a full block."""
        return replace(self.job, order=chosen.order).order_for(chosen.policy).slots


def in_words(search: Search) -> str:
    """The chosen policy in one line."""
    return f"policy: {search.line()} (searched {search.considered} in {search.seconds:.1f} s)"


def own_order(policy: Policy, hardware: Hardware) -> str:
    """The name of the policy's own order for a full block."""
    return hardware.topology.choose_order(None, policy, policy.num_gpu_batches).name


def _chosen(search: Search, job: Job) -> Chosen:
    """The best of a search. Its order is None if it is the policy's own."""
    policy, order = search.best.policy, search.best.order
    return Chosen(policy, job.order or (None if order == own_order(policy, job.hardware) else order))
