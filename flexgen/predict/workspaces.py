"""The workspaces of the compute device of a `Hardware`, in addition to operands and results."""

from __future__ import annotations

from dataclasses import replace

from flexgen.kernels.workspaces import GPU, HOST, Workspaces, gpu_workspaces
from flexgen.predict.hardware import Hardware


def workspaces_on(hardware: Hardware) -> Workspaces:
    """The workspaces of the compute device, in the form of `ComputeDevice.workspaces`."""
    # Only the host computes a float16 checkpoint in another dtype; no GPU does.
    if hardware.topology.shares_host_memory or "float16" in hardware.computes_in:
        return HOST
    capability = hardware.compute_capability
    return replace(
        gpu_workspaces(capability) if capability else GPU, native_bfloat16=not hardware.emulates_bfloat16
    )
