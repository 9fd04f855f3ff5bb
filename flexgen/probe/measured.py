"""The machine at hand as a `Hardware`: measured once, then found in the user's cache.

Rates are kept for each machine, device, disk and version of torch and flexgen; what is free is asked at every use.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import re
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from flexgen.errors import HardwareError
from flexgen.kernels.loading import native_available
from flexgen.memory.device import ComputeDevice
from flexgen.memory.machine import Machine
from flexgen.policy import Tier
from flexgen.predict.hardware import Hardware
from flexgen.probe import measure
from flexgen.probe.machine import Progress, capacities, description, processor

logger = logging.getLogger(__name__)

THIS = ("measured", "this")
"""Names that stand for the machine at hand."""

_FORM = 6
"""Counted up when what is measured changes its meaning, so that older figures are measured again."""


def measured(
    device: str | torch.device | ComputeDevice = "auto",
    offload_dir: str | Path | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> Hardware:
    """What this machine can do with `device` and the disk of `offload_dir` (both as in `OptLM`).

    Measured at the first use, and with `again`; see `measure` for how long that takes and what it raises. Capacities
    are what is free now. Figures that were taken while other programs used the processors are
    returned but not kept. A cache that cannot be read is measured anew, one that cannot be written is a warning.
    """
    path, capacity = _place(device, offload_dir)
    hardware = None if again else _kept(path)
    if hardware is None:
        hardware = measure(device, offload_dir, progress)
        if hardware.disturbed:
            logger.warning(
                "other programs took %.0f%% of the processors during the measurement: its figures are too slow and "
                "are not kept. Measure again when they are done (python -m flexgen.measure --again)",
                100 * hardware.disturbed,
            )
        else:
            _keep(hardware, path)
    return hardware.replace(capacity=capacity)


def remembered(
    device: str | torch.device | ComputeDevice = "auto", offload_dir: str | Path | None = None
) -> Hardware | None:
    """`measured`, if that was done before; None if it would have to be done."""
    path, capacity = _place(device, offload_dir)
    hardware = _kept(path)
    return hardware and hardware.replace(capacity=capacity)


def _place(
    device: str | torch.device | ComputeDevice, offload_dir: str | Path | None
) -> tuple[Path, dict[Tier, int]]:
    """Where the machine's figures are kept, and what is free now."""
    with contextlib.closing(Machine.open(device, offload_dir, pin=False)) as machine:
        return cache_file(machine, device, offload_dir), capacities(machine)


def find_hardware(
    name: str,
    device: str | torch.device | ComputeDevice = "auto",
    offload_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Hardware:
    """`Hardware.find`, where "measured" or "this" is the machine at hand with `device` and `offload_dir`."""
    return measured(device, offload_dir, progress=progress) if name in THIS else Hardware.find(name)


def cache_folder() -> Path:
    """Where measurements are kept."""
    given = os.environ.get("XDG_CACHE_HOME")
    # The standard says that a relative path is to be ignored.
    base = Path(given) if given and os.path.isabs(given) else Path.home() / ".cache"
    return base / "flexgen" / "hardware"


def cache_file(
    machine: Machine, device: str | torch.device | ComputeDevice, offload_dir: str | Path | None
) -> Path:
    """The file of one machine, device, disk and version, with or without compiled kernels."""
    disk = os.stat(offload_dir or tempfile.gettempdir()).st_dev
    name, _ = description(machine)
    spec = machine.device.name if isinstance(device, ComputeDevice) else str(device).strip().lower()
    if spec == "auto":
        spec = machine.device.name
    parts = (
        platform.node(), processor(), os.cpu_count(), torch.get_num_threads(), name, spec, disk,
        torch.__version__, _own_version(), native_available(), _FORM,
    )  # fmt: skip
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
    readable = re.sub(r"[^a-z0-9]+", "-", spec).strip("-")[:40]
    return cache_folder() / f"{readable}-{digest}.toml"


def _own_version() -> str:
    try:
        return version("flexgen")
    except PackageNotFoundError:  # run from its sources
        return "unknown"


def _kept(path: Path) -> Hardware | None:
    if not path.exists():
        return None
    try:
        return Hardware.load(path)
    except HardwareError as error:
        logger.warning("%s; the machine is measured again", error)
        return None


def _keep(hardware: Hardware, path: Path) -> None:
    """Complete, or not at all."""
    partial: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, partial = tempfile.mkstemp(prefix="part-", dir=path.parent)
        os.close(fd)
        hardware.save(partial)
        os.replace(partial, path)
    except OSError as error:
        logger.warning("what was measured cannot be kept in %s: %s", path.parent, error.strerror or error)
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)
