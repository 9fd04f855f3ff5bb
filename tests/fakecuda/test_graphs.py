"""CUDA graphs on the simulated GPU: what the rig does with them, and the engine's own."""

import contextlib

import pytest

pytest.importorskip("simulated", reason="runs on the simulated GPU: `make test-cuda`")

import torch
from simulated import cases, runtime
from simulated.numbers import Numbers, in_host_memory
from simulated.threads import in_every_thread

from flexgen.runtime.graphs import MIN_TOKENS


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


# The engine's

LONG = [list(range(5, 5 + n)) for n in (50, 44, 47, 30, 51, 20, 45, 46, 43)]
"""With 24 new tokens they cross from one extent of attention to the next, which is at 64 tokens."""
each_model = pytest.mark.parametrize("config", [cases.OPT, cases.LLAMA], ids=["opt", "llama"])


def resident(**changes):
    return cases.policy(**cases.RESIDENT | changes)


def ids_on(device, config, tokens=24, stop=(), policy=None, **options):
    with cases.open_on(device, config, policy or resident()) as model:
        return model.generate(LONG, tokens, stop=stop, **options)


def on_both(config, **options):
    """Ids on the CPU, ids on the GPU with its numbers filled in, and what the runtime counted."""
    expected = ids_on("cpu", config, **options)
    with in_every_thread(Numbers):
        runtime.reset()
        found = ids_on("cuda", config, **options)
    return expected, found, runtime.counters()


@each_model
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(do_sample=True, seed=3, top_p=0.9),
        dict(policy=resident(num_gpu_batches=1, gpu_batch_size=9)),
        dict(policy=resident(num_gpu_batches=2)),  # two blocks
        dict(policy=resident(sep_layer=False)),
        dict(policy=resident(prefill_chunk=8)),
    ],
    ids=["greedy", "drawn", "one batch", "two blocks", "whole layers", "parts of prompts"],
)
def test_ids_are_those_of_the_cpu(config, options):
    expected, found, counted = on_both(config, **options)
    assert found.tolist() == expected.tolist()
    assert counted.graph_launches > 80


@each_model
def test_graphs_end_with_the_batches_that_they_were_captured_for(config):
    """Rows that stop leave, and the others are grouped into other batches, at other addresses."""
    plain = ids_on("cpu", config)
    stop = sorted({int(row[n]) for row, n in zip(plain[::2], (6, 8, 9, 11, 10), strict=True)})
    expected, found, counted = on_both(config, stop=stop)
    assert found.tolist() == expected.tolist()
    assert (expected == expected[:, -1:]).sum() > 9 * 2  # rows have ended
    assert counted.graph_launches > 20


def test_a_stream_is_that_of_the_cpu():
    said = []
    for device in ("cpu", "cuda"):
        with in_every_thread(Numbers), cases.open_on(device, cases.LLAMA, resident()) as model:
            said.append(sorted((row, ids.tolist()) for row, ids in model.stream(LONG, 12)))
    assert said[0] == said[1]


def test_a_conversation_is_that_of_the_cpu():
    """Its cache outlives its calls, and its graphs do not. The second call goes back behind the end of the first."""
    said = []
    for device in ("cpu", "cuda"):
        with in_every_thread(Numbers), cases.open_on(device, cases.LLAMA, resident()) as model:
            with model.conversation(120) as conversation:
                first = conversation.generate(LONG[0], 14)
                second = conversation.generate([*first[:-9], 9, 8], 16)
                third = conversation.generate(second, 12)
            said.append([first.tolist(), second.tolist(), third.tolist()])
    assert said[0] == said[1]


LAYERS = 2
FIRST = 2
"""Tokens of a call that no graph computes: the prompts', and the one that has libraries prepare themselves."""


@pytest.mark.parametrize("sep_layer", [True, False])
@each_model
def test_a_layer_of_a_batch_is_one_launch_a_token(config, sep_layer):
    tokens, batches = 24, 3
    with cases.valid_ids(), cases.open_on("cuda", config, resident(sep_layer=sep_layer), "float16") as model:
        runtime.reset()
        model.generate(LONG, tokens, stop=())
    counted = runtime.counters()
    assert counted.graph_launches == (tokens - FIRST) * LAYERS * (2 if sep_layer else 1) * batches
    assert counted.graph_kernels > 5 * counted.graph_launches


@each_model
def test_launches_of_a_token_do_not_grow_with_the_layers(config):
    """Those that are not in graphs: of the embedding, the head, the choice, and the buffers of the token."""

    def launched(layers, tokens):
        changed = type(config)(**config.to_dict() | {"num_hidden_layers": layers})
        with cases.valid_ids(), cases.open_on("cuda", changed, resident(), "float16") as model:
            model.generate(LONG, tokens, stop=())
            runtime.reset()
            model.generate(LONG, tokens, stop=())
            return runtime.counters().kernels

    few, many = (launched(layers, 20) - launched(layers, 12) for layers in (2, 4))
    assert few == many
    assert 0 < few / 8 / 3 <= 40  # of a token and a batch


NOT_RESIDENT = {
    "weights that travel": dict(weights={"gpu": 50, "cpu": 50}),
    "int4 weights": dict(weights=cases.encoded("int4", {"gpu": 100})),
    "int4 cache": dict(cache=cases.encoded("int4", {"gpu": 100})),
    "cache in host memory": dict(cache={"cpu": 100}, attend_on="gpu"),
    "attention by the host": dict(cache={"cpu": 100}, attend_on="cpu"),
    "hidden states in host memory": dict(activations={"cpu": 100}),
    "sparse": dict(attn_sparsity=0.5),
}


@pytest.mark.parametrize("name", NOT_RESIDENT)
def test_nothing_is_captured_of(name):
    runtime.reset()
    with cases.valid_ids():
        ids_on("cuda", cases.LLAMA, tokens=12, policy=resident(**NOT_RESIDENT[name]))
    assert runtime.counters().graph_launches == 0


def test_a_call_of_few_tokens_captures_nothing():
    runtime.reset()
    with cases.valid_ids():
        ids_on("cuda", cases.OPT, tokens=MIN_TOKENS)
    assert runtime.counters().graph_launches == 0


def test_without_captures_ids_are_the_same_and_one_warning_says_so(caplog):
    with runtime.refusing_to_capture():
        expected, found, counted = on_both(cases.LLAMA)
    assert found.tolist() == expected.tolist()
    assert counted.graph_launches == 0
    (warning,) = [record for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert warning.levelname == "WARNING"


def test_a_capture_that_fails_in_the_middle_is_done_without(caplog, monkeypatch):
    """A later graph than the first one: those before it have been captured and replayed."""
    began = []

    def refuse_later(graph, *args, **options):
        began.append(graph)
        if len(began) == 5:
            with runtime.refusing_to_capture():
                return capture_begin(graph, *args, **options)
        return capture_begin(graph, *args, **options)

    capture_begin = torch.cuda.CUDAGraph.capture_begin
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", refuse_later)
    expected, found, counted = on_both(cases.LLAMA)
    assert found.tolist() == expected.tolist()
    assert counted.graph_launches == 3  # the first capture keeps the memory of the graphs
    assert sum("CUDA graph" in record.getMessage() for record in caplog.records) == 1
