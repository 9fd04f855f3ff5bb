"""What the compute device of a `Hardware` takes in addition to operands and results."""

from __future__ import annotations

from dataclasses import replace

from flexgen.kernels.workspaces import GPU, HOST, Workspaces, gpu_workspaces
from flexgen.predict.hardware import Hardware


def workspaces_on(hardware: Hardware) -> Workspaces:
    """Those of its compute device, as `ComputeDevice.workspaces` has them."""
    # A checkpoint in float16 is computed in another type on the host's cores, and on no GPU.
    if hardware.topology.shares_host_memory or "float16" in hardware.computes_in:
        return HOST
    capability = hardware.compute_capability
    return replace(
        gpu_workspaces(capability) if capability else GPU, native_bfloat16=not hardware.emulates_bfloat16
    )
