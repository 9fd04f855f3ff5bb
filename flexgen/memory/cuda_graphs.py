"""CUDA graphs of the compute lane's work."""

from __future__ import annotations

from collections.abc import Callable

import torch

_PRIORITY = -1
"""Of the stream for captures. torch gives out its 32 streams of a priority again and again, and the lanes have the
other one: a stream of theirs could get into a graph."""


class CudaGraphs:
    """`Graphs` of an NVIDIA GPU.

    Captures are on a stream of their own, where nothing runs. So cuBLAS has a workspace for them in the graphs' memory:
    torch frees that of the capture's stream whenever a graph is destroyed, and other graphs go on using it.

    The memory is kept until the device is closed. Raises RuntimeError where the GPU refuses to capture.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=_PRIORITY)
        self._pool = torch.cuda.graph_pool_handle()
        # torch gives the memory of a pool up with its last graph, and then has no use for the pool. A `MemPool` would
        # keep it too, but ends the process where the device has failed.
        self._keeper = self._captured(lambda: torch.zeros(1, device=device))

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        return self._captured(work).replay

    def _captured(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` would empty torch's cache and wait for the device first. Other threads go on meanwhile.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph
