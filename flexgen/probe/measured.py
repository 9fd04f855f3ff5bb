"""This machine as a `Hardware`: measured once, then read from the user's cache.

Figures are cached by machine, device, disk and versions of torch and flexgen. Free memory is read at every use.
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
from flexgen.user_cache import cache_folder, keep

logger = logging.getLogger(__name__)

THIS = ("measured", "this")
"""Names for this machine."""

KIND = "hardware"
"""The folder of measurements in the user's cache."""

_FORM = 11
"""Increase it when a figure is added or changes its meaning, so that older measurements are repeated."""


def measured(
    device: str | torch.device | ComputeDevice = "auto",
    offload_dir: str | Path | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> Hardware:
    """Return the figures of this machine. It is measured at the first use.

    device: the compute device, as in `OptLM`.
    offload_dir: a directory on the disk to measure, as in `OptLM`.
    again: whether to measure again, even if there is a cached measurement.
    progress: called before each measurement, with the number done, the total number and the name of the next one.

    A measurement takes less than two minutes. Capacities are the bytes that are free now. If other programs used the
    processors during the measurement, the figures are returned but not cached. If the cache cannot be read, the
    machine is measured again; if it cannot be written, a warning is logged.

    Raises RequestError for a device that does not exist, and CapacityError if there is not enough memory.
    """
    path, capacity = _place(device, offload_dir)
    hardware = None if again else _load_saved(path)
    if hardware is None:
        hardware = measure(device, offload_dir, progress)
        if hardware.disturbed:
            logger.warning(
                "other programs used %.0f%% of the processors during the measurement: its figures are too slow and "
                "are not cached. Measure again when the machine is idle (python -m flexgen.measure --again)",
                100 * hardware.disturbed,
            )
        else:
            _keep(hardware, path)
    return hardware.replace(capacity=capacity)


def remembered(
    device: str | torch.device | ComputeDevice = "auto", offload_dir: str | Path | None = None
) -> Hardware | None:
    """The cached result of `measured`, or None if there is none."""
    path, capacity = _place(device, offload_dir)
    hardware = _load_saved(path)
    return hardware and hardware.replace(capacity=capacity)


def _place(
    device: str | torch.device | ComputeDevice, offload_dir: str | Path | None
) -> tuple[Path, dict[Tier, int]]:
    """The cache file of the machine, and the free bytes of each tier."""
    with contextlib.closing(Machine.open(device, offload_dir, pin=False)) as machine:
        return cache_file(machine, device, offload_dir), capacities(machine)


def find_hardware(
    name: str,
    device: str | torch.device | ComputeDevice = "auto",
    offload_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Hardware:
    """`Hardware.find`, or for "measured" and "this" this machine with `device` and `offload_dir`."""
    return measured(device, offload_dir, progress=progress) if name in THIS else Hardware.find(name)


def cache_file(
    machine: Machine, device: str | torch.device | ComputeDevice, offload_dir: str | Path | None
) -> Path:
    """The cache file for a machine, device, disk and versions, with or without compiled kernels."""
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
    return cache_folder(KIND) / f"{readable}-{digest}.toml"


def _own_version() -> str:
    try:
        return version("flexgen")
    except PackageNotFoundError:  # not installed
        return "unknown"


def _load_saved(path: Path) -> Hardware | None:
    if not path.exists():
        return None
    try:
        return Hardware.load(path)
    except HardwareError as error:
        logger.warning("%s; measuring the machine again", error)
        return None


def _keep(hardware: Hardware, path: Path) -> None:
    try:
        keep(path, hardware.to_toml().encode("utf-8"))
    except OSError as error:
        logger.warning("cannot cache the measurement in %s: %s", path.parent, error.strerror or error)
