"""CUDA graphs of the compute lane's work."""

from __future__ import annotations

from collections.abc import Callable

import torch

_PRIORITY = -1
"""Of the stream that captures. torch has 32 streams of each priority, which it gives out in turn. The lanes have the
other priority: otherwise the stream could be that of a lane, whose work would become part of a graph."""


class CudaGraphs:
    """`Graphs` of an NVIDIA GPU.

    A stream of their own captures them, so that cuBLAS has a workspace for it in their memory. When a graph is
    destroyed, torch frees the workspace of the stream that captured it, which other graphs still use.

    Their memory is kept until the device is closed. Raises RuntimeError where the GPU refuses to capture.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=_PRIORITY)
        self._pool = torch.cuda.graph_pool_handle()
        # A pool ends with its last graph. A `MemPool` does not, but it aborts the process if the device has failed.
        self._keeper = self._captured(lambda: torch.zeros(1, device=device))

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        return self._captured(work).replay

    def _captured(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Not by `torch.cuda.graph`, which first empties torch's cache and waits for the device.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph
