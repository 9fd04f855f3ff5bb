"""CUDA graphs on the simulated GPU: what the rig does with them, and the engine's own."""

import contextlib

import pytest

pytest.importorskip("simulated", reason="runs on the simulated GPU: `make test-cuda`")

import torch
from simulated import cases, runtime
from simulated.numbers import Numbers, in_host_memory


@contextlib.contextmanager
def captured(graph, **options):
    """What the body enqueues on a stream of its own goes to `graph`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin(**options)
        try:
            yield
        finally:
            graph.capture_end()


def test_a_graph_does_at_each_launch_what_was_captured_and_nothing_before():
    with Numbers():
        x, out = torch.full((4, 4), 1.0, device=cases.GPU), torch.zeros(4, 4, device=cases.GPU)
        x @ x  # cuBLAS's workspace is made once
        graph = torch.cuda.CUDAGraph()
        with captured(graph):
            y = (x @ x).mul_(2)
            out.copy_(y + out)
            y.zero_()
        assert not in_host_memory(out).any()
        runtime.reset()
        for _ in range(2):
            graph.replay()
        assert (in_host_memory(out) == 16).all()
        x.fill_(2)
        graph.replay()
        assert (in_host_memory(out) == 16 + 32).all()
    counted = runtime.counters()
    assert counted.graph_launches == 3
    assert counted.kernels == 1  # x.fill_


def test_a_capture_holds_no_host_wait():
    x, graph = torch.zeros(4, device=cases.GPU), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError), captured(graph):
        x.add_(1)
        torch.cuda.synchronize()
    x.add_(1)  # the device is as before
    torch.cuda.synchronize()


def test_a_capture_waits_for_no_event_of_another_stream():
    x, graph, event = torch.zeros(4, device=cases.GPU), torch.cuda.CUDAGraph(), torch.cuda.Event()
    event.record()
    with pytest.raises(RuntimeError), captured(graph):
        x.add_(1)
        torch.cuda.current_stream().wait_event(event)


def test_a_capture_can_be_refused():
    with runtime.refusing_to_capture(), pytest.raises(RuntimeError), captured(torch.cuda.CUDAGraph()):
        pass
