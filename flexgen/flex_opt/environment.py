"""The devices of FlexGen 0.1, and the models that were opened on them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from flexgen.engine.model import OptLM
from flexgen.memory.cpu import peak_resident_bytes
from flexgen.units import GIB


class TorchDevice:
    """A processor by name, "cuda:0" or "cpu". Without CUDA, the CPU takes the place of a GPU."""

    def __init__(self, name: str, mem_capacity: int | None = None, flops: float | None = None) -> None:
        self.name = name
        self.mem_capacity = mem_capacity
        self.flops = flops
        without = name.startswith("cuda") and not torch.cuda.is_available()
        self.device = "cpu" if without else name
        """The engine's name of the device. Its other devices ("emulated:...") are allowed too."""

    @property
    def dev(self) -> torch.device:
        """The torch device."""
        return torch.device(self.device if self.device.startswith("cuda") else "cpu")

    def mem_stats(self) -> tuple[int, int]:
        """(current, peak) bytes of device memory in use; for the CPU, of this process in host memory."""
        if self.dev.type == "cuda":
            return torch.cuda.memory_allocated(self.dev), torch.cuda.max_memory_allocated(self.dev)
        return psutil.Process().memory_info().rss, peak_resident_bytes()

    def print_stats(self, output_file: str | None = None) -> tuple[int, int]:
        """Print `mem_stats` or write them to a file, and return them."""
        now, peak = self.mem_stats()
        text = f"TorchDevice: {self.name}\n  cur_mem: {now / GIB:.4f} GB,  peak_mem: {peak / GIB:.4f} GB"
        if output_file is None:
            print(text)
        else:
            Path(output_file).write_text(text + "\n", encoding="utf-8")
        return now, peak

    def synchronize(self) -> None:
        """Do nothing: `generate` returns only when its work is done."""

    def __str__(self) -> str:
        return f"TorchDevice(name={self.name})"


class TorchDisk:
    """The offload directory, created if it is missing. `num_copy_threads` is unused: the engine has own threads."""

    def __init__(
        self,
        path: str,
        mem_capacity: int | None = None,
        cuda_id: int = 0,
        num_copy_threads: int = 4,
    ) -> None:
        self.name = path
        self.path = str(Path(path).expanduser().absolute())
        self.mem_capacity = mem_capacity
        Path(self.path).mkdir(parents=True, exist_ok=True)


class TorchMixedDevice:
    """Several devices together."""

    name = "mixed"

    def __init__(self, base_devices: Sequence[TorchDevice | TorchDisk]) -> None:
        self.base_devices = base_devices


@dataclass(frozen=True)
class ExecutionEnv:
    """The devices on which models are opened. Without a `gpu` the engine chooses the device; without a `disk` it
    creates a temporary directory if it needs one."""

    gpu: Any = None
    cpu: Any = None
    disk: Any = None
    mixed: Any = None
    _opened: weakref.WeakSet[OptLM] = field(
        default_factory=weakref.WeakSet, init=False, repr=False, compare=False
    )

    @classmethod
    def create(cls, offload_dir: str) -> ExecutionEnv:
        """The first GPU (the CPU without CUDA), the host and `offload_dir`."""
        gpu = TorchDevice("cuda:0" if torch.cuda.is_available() else "cpu")
        cpu, disk = TorchDevice("cpu"), TorchDisk(offload_dir)
        return cls(gpu, cpu, disk, TorchMixedDevice([gpu, cpu, disk]))

    def adopt(self, model: OptLM) -> None:
        """Make `close_copy_threads` close this model too."""
        self._opened.add(model)

    def close_copy_threads(self) -> None:
        """Close all models opened here, and free their files, threads and memory."""
        for model in list(self._opened):
            model.close()
        self._opened.clear()
