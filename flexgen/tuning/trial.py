"""Runs with their predictions, and trials: short runs that represent a long job."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flexgen.engine.model import OptLM
from flexgen.errors import FlexGenError
from flexgen.models import ModelSpec
from flexgen.policy import Policy
from flexgen.predict.hardware import Hardware
from flexgen.predict.job import Job
from flexgen.predict.prediction import predict, predict_job, roofline
from flexgen.results.report import Report
from flexgen.workload import Workload

_log = logging.getLogger("flexgen")

_LEAST_LAYERS, _LEAST_TOKENS = 2, 4


def with_prediction(report: Report, spec: ModelSpec, hardware: Hardware) -> Report:
    """The report of a run, with its prediction and its roofline if `hardware` has the figures for them."""
    # The length of the prompts is the mean of the computed lengths, with padding, after the prefix.
    prompts, shared = report.num_prompts, report.prefix
    computed = (report.prompt_tokens - shared * (prompts - 1)) / (1 - report.padded_share)
    length = shared + max(round((computed - shared) / prompts), 1)
    mean = None if report.new_tokens is None else max(report.new_tokens / prompts, 1.0)
    workload = Workload(length, report.gen_len, prompts, shared, mean, report.copied)
    # The run did fit, so the memory that is free now does not matter.
    hardware = hardware.replace(capacity=dict.fromkeys(hardware.capacity, 1 << 62))
    job = spec, report.policy, hardware, workload
    try:
        predicted = predict(*job, dtype=report.dtype, order=report.order).report
        least = roofline(*job, dtype=report.dtype, order=report.order)
    except FlexGenError as error:
        _log.info("no prediction: %s", error)
        return report
    return replace(report, predicted=predicted, roofline=least)


def warm_up(model: OptLM, prompts: Sequence[np.ndarray] | np.ndarray, gen_len: int) -> None:
    """Run two tokens of each block shape of a job of `prompts` and `gen_len` new tokens.

    At the first use of a shape, libraries compile kernels, load modules, choose algorithms, and make threads and
    workspaces. After the warm-up, a measured call does not include this work. The cache has the same size as in the
    job, because kernels are also compiled for strides.
    """
    block = model.policy.block_size
    lengths = {len(prompt) for prompt in prompts}
    # If all prompts have the same length, only the last block may differ, by fewer prompts.
    rest = len(prompts) % block
    prompts_of_part = prompts if len(lengths) > 1 else prompts[: min(block + rest, len(prompts))]
    model.generate(prompts_of_part, gen_len, stop=(), cut_gen_len=min(2, gen_len))


@dataclass(frozen=True)
class Shape:
    """The part of a job that a trial runs: one block of prompts, the first `layers` layers, and fewer tokens. No row
    ends early."""

    layers: int
    workload: Workload

    def __str__(self) -> str:
        job = self.workload
        return f"{self.layers} layers, {job.gen_len} new tokens of {job.num_prompts} prompts"


def shapes(spec: ModelSpec, policy: Policy, workload: Workload) -> Iterator[Shape]:
    """Growing parts of a job, from a few layers and tokens to one whole block."""
    prompts = min(policy.block_size, workload.num_prompts)
    layers, tokens = min(_LEAST_LAYERS, spec.num_layers), min(_LEAST_TOKENS, workload.gen_len)
    while True:
        yield Shape(layers, replace(workload, gen_len=tokens, num_prompts=prompts, mean_new=None))
        if (layers, tokens) == (spec.num_layers, workload.gen_len):
            return
        # Layers grow first, so that both ends of the model and of a block are a small part of the time.
        more_layers = layers < spec.num_layers and (layers <= 2 * tokens or tokens == workload.gen_len)
        if more_layers:
            layers = min(2 * layers, spec.num_layers)
        else:
            tokens = min(2 * tokens, workload.gen_len)


def shape_for(job: Job, policy: Policy, seconds: float) -> Shape:
    """The largest part of a job with a predicted time of at most `seconds`, or the smallest part if none has."""
    found = None
    for shape in shapes(job.spec, policy, job.workload):
        took = predicted_trial(job, policy, shape).total_s
        if found is not None and took > seconds:
            break
        found = shape
    assert found is not None
    return found


def predicted_trial(job: Job, policy: Policy, shape: Shape) -> Report:
    """The prediction of a trial."""
    part = replace(job, spec=job.spec.first_layers(shape.layers), workload=shape.workload)
    return predict_job(part, policy).report


def run_trial(
    opening: Mapping[str, Any], policy: Policy, order: str | None, shape: Shape, lanes: bool, seed: int = 0
) -> Report:
    """Run a trial with random ids.

    opening: the other arguments of `OptLM`.
    lanes: whether to time each lane alone too.

    Raises the errors of `OptLM` and of `OptLM.generate`.
    """
    job = shape.workload
    with OptLM(**opening, policy=policy, order=order, num_layers=shape.layers) as model:
        random = np.random.default_rng(seed)
        ids = random.integers(0, model.spec.vocab_size, size=(job.num_prompts, job.prompt_len))
        ids[:, : job.prefix] = ids[0, : job.prefix]
        warm_up(model, list(ids), job.gen_len)
        _, report = model.generate(ids, job.gen_len, stop=(), stats=True)
        return replace(report, phases=model.lane_seconds(ids, job.gen_len)) if lanes else report
