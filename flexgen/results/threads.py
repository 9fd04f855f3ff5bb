"""The threads of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ThreadCounts:
    """compute: the threads that torch and the kernels compute with on the CPU.
    cores, cpus, nodes: the physical cores that the process may use, their hardware threads and their NUMA nodes.
    disk: the threads that read and write files. They mostly wait.
    """

    compute: int
    cores: int
    cpus: int
    nodes: int
    disk: int

    def __str__(self) -> str:
        parts = [f"{self.compute} for arithmetic on {_count(self.cores, 'core')}"]
        if self.cpus != self.cores:
            parts.append(f" with {self.cpus} hardware threads")
        if self.nodes > 1:
            parts.append(f" of {self.nodes} NUMA nodes, whose memory is interleaved")
        return "".join(parts) + f"; {self.disk} for the disk"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")
