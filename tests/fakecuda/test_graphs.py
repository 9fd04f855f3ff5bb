"""CUDA graphs on the simulated GPU: what the rig does with them, and the engine's own."""

import contextlib
from unittest import mock

import pytest

pytest.importorskip("simulated", reason="runs on the simulated GPU: `make test-cuda`")

import torch
from piece_sizes import piece_sizes
from simulated import cases, runtime
from simulated.numbers import Numbers, in_host_memory
from simulated.threads import in_every_thread

from flexgen.engine.completion import Completion
from flexgen.runtime import graphs
from flexgen.runtime.kvcache import KVCache
from flexgen.runtime.request import read_request


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

LONG = [list(range(5 + row, 5 + row + n)) for row, n in enumerate((50, 44, 47, 30, 51, 20, 45, 46, 43))]
"""With 24 new tokens they cross from one extent of attention to the next, which is at 64 tokens. They share no
prefix, because cells with a prefix are not captured."""
each_model = pytest.mark.parametrize("config", [cases.OPT, cases.LLAMA], ids=["opt", "llama"])


def resident(**changes):
    return cases.policy(**cases.RESIDENT | changes)


class Forced:
    """Chooses each id by its row and token, so that texts differ, and keeps the logits. `last`: of rows that end."""

    whole_call = False
    by_logits = False

    def __init__(self, last=()):
        self.last = dict(last)
        self.can_end = bool(last)
        self.logits = {}

    def choose(self, logits, rows, token):
        for row, values in zip(rows, logits.cpu(), strict=True):
            if token <= self.last.get(row, token):
                self.logits[row, token] = values.tolist()
        return torch.tensor([self._id(row, token) for row in rows]).to(logits.device)

    def ends(self, ids, rows, token):
        return torch.tensor([token == self.last.get(row) for row in rows])

    def _id(self, row, token):
        return (5 + 7 * row + 11 * token + token * token) % cases.VOCAB


class ForcedTogether(Forced):
    whole_call = True


def logits_on(device, config, tokens=24, policy=None, choice=None):
    """By (row, token), and the ids."""
    choice = choice or Forced()
    with cases.open_on(device, config, policy or resident()) as model:
        ids = model.generate_with(Completion(read_request(model.spec, LONG, None), tokens, choice))
    return choice.logits, ids.tolist()


def assert_as_on_the_cpu(make):
    """`make(device)` gives the same logits on the GPU, with its numbers filled in, as on the CPU."""
    expected = make("cpu")
    with in_every_thread(Numbers):
        runtime.reset()
        found = make("cuda")
    assert_same(found, expected)


def assert_same(found, expected, difference=1e-6):
    (found, ids), (expected, same) = found, expected
    assert ids == same
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-4, abs=difference), key
    assert runtime.counters().graph_launches > 80


@each_model
@pytest.mark.parametrize(
    "policy",
    [
        resident(),
        resident(num_gpu_batches=1, gpu_batch_size=9),
        resident(num_gpu_batches=2),  # two blocks
        resident(sep_layer=False),
        resident(prefill_chunk=8),
    ],
    ids=["three batches", "one batch", "two blocks", "whole layers", "parts of prompts"],
)
def test_logits_are_those_of_the_cpu(config, policy):
    assert_as_on_the_cpu(lambda device: logits_on(device, config, policy=policy))


@pytest.mark.parametrize("config", [cases.MISTRAL, cases.GEMMA3], ids=["windows", "some windows"])
@pytest.mark.parametrize(
    "policy",
    [
        resident(),
        resident(num_gpu_batches=1, gpu_batch_size=9),
        resident(sep_layer=False),
        resident(prefill_chunk=8),
    ],
    ids=["three batches", "one batch", "whole layers", "parts of prompts"],
)
@pytest.mark.parametrize("page_tokens", [3, 128], ids=["ring", "page"])
def test_logits_with_windows_are_those_of_the_cpu(config, policy, page_tokens):
    """A window of 5 is a ring of three pages of 3 tokens; with pages of 128, all tokens are in one page."""
    with piece_sizes(page_tokens=page_tokens, memory_page_tokens=page_tokens):
        assert_as_on_the_cpu(lambda device: logits_on(device, config, policy=policy))


@pytest.mark.parametrize("sep_layer", [True, False])
def test_logits_of_a_mixture_are_those_of_the_cpu(sep_layer, grouped_kernels):
    policy = resident(sep_layer=sep_layer)
    assert_as_on_the_cpu(lambda device: logits_on(device, cases.MIXTURE, policy=policy))
    assert grouped_kernels.calls


@pytest.mark.parametrize("codec", ["int4", "int8", "fp8"])
def test_logits_over_an_encoded_cache_are_those_without_graphs(codec, monkeypatch):
    """The CPU has kernels of its own for such a cache, which round in other places. A code may be the next one."""
    policy = resident(cache=cases.encoded(codec, {"gpu": 100}))
    with in_every_thread(Numbers):
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "MIN_TOKENS", 24)
            expected = logits_on("cuda", cases.LLAMA, policy=policy)
        runtime.reset()
        assert_same(logits_on("cuda", cases.LLAMA, policy=policy), expected, difference=1e-3)


@each_model
def test_graphs_end_with_the_batches_that_they_were_captured_for(config):
    """Rows that stop leave, and the others are grouped into other batches, at other addresses."""
    last = {0: 4, 1: 6, 2: 5, 4: 6, 5: 7, 7: 12, 8: 6}
    regrouped = []

    def make(device):
        with mock.patch.object(KVCache, "regroup", autospec=True, side_effect=KVCache.regroup) as regroup:
            made = logits_on(device, config, tokens=40, choice=Forced(last))
        regrouped.append(regroup.call_count)
        return made

    assert_as_on_the_cpu(make)
    assert regrouped[0] == regrouped[1] >= 2


def test_a_choice_for_all_rows_at_once_has_graphs_too():
    """Each token is a run of its own."""
    assert_as_on_the_cpu(lambda device: logits_on(device, cases.LLAMA, choice=ForcedTogether({3: 9})))


def ids_on(device, config, tokens=24, policy=None, **options):
    with cases.open_on(device, config, policy or resident()) as model:
        return model.generate(LONG, tokens, stop=(), **options)


def on_both(config, **options):
    """Ids on the CPU, ids on the GPU with its numbers filled in, and what the runtime counted."""
    expected = ids_on("cpu", config, **options)
    with in_every_thread(Numbers):
        runtime.reset()
        found = ids_on("cuda", config, **options)
    return expected, found, runtime.counters()


@each_model
def test_ids_that_are_drawn_are_those_of_the_cpu(config):
    expected, found, counted = on_both(config, do_sample=True, seed=3, temperature=5.0)
    assert found.tolist() == expected.tolist()
    assert len(set(expected[:, -20:].flatten().tolist())) > 30
    assert counted.graph_launches > 80


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


@pytest.mark.parametrize("sep_layer", [True, False])
@pytest.mark.parametrize(
    ("config", "dtype", "layers"),
    [
        (cases.MISTRAL, "float16", 4),
        (cases.GEMMA3, "float16", 4),
        (cases.MIXTURE, "bfloat16", 4),
        (cases.GEMMA2, "float16", 2),
    ],
    ids=["windows", "some windows", "mixture", "caps"],
)
def test_a_layer_with_a_window_or_experts_is_one_launch_a_token(config, dtype, layers, sep_layer):
    """In bfloat16, experts are multiplied by torch's grouped product. Capped scores are not replayed."""
    tokens, batches, capped = 24, 3, config is cases.GEMMA2
    replayed = layers if sep_layer else (0 if capped else layers // 2)
    with (
        piece_sizes(page_tokens=4, memory_page_tokens=4),
        cases.valid_ids(),
        cases.open_on("cuda", config, resident(sep_layer=sep_layer), dtype) as model,
    ):
        runtime.reset()
        model.generate(LONG, tokens, stop=())
    counted = runtime.counters()
    assert counted.graph_launches == (tokens - FIRST) * replayed * batches
    assert counted.graph_kernels >= 5 * counted.graph_launches


@pytest.mark.parametrize("sep_layer", [True, False])
def test_experts_that_need_the_host_are_not_captured(sep_layer):
    """In float32 without Triton; the other layers are."""
    runtime.reset()
    with cases.valid_ids():
        ids_on("cuda", cases.MIXTURE, policy=resident(sep_layer=sep_layer))
    assert runtime.counters().graph_launches == (24 - FIRST) * (3 if sep_layer else 1) * 3


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
        ids_on("cuda", cases.OPT, tokens=graphs.MIN_TOKENS)
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


def test_ctrl_c_in_a_capture_ends_the_call_and_the_capture(monkeypatch):
    attend_at = KVCache.attend_at

    def interrupted(cache, *args):
        if runtime.capturing():
            raise KeyboardInterrupt
        return attend_at(cache, *args)

    with in_every_thread(Numbers), cases.open_on("cuda", cases.LLAMA, resident()) as model:
        expected = model.generate(LONG, 12, stop=())
        with monkeypatch.context() as patch:
            patch.setattr(KVCache, "attend_at", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model.generate(LONG, 12, stop=())
        runtime.reset()
        assert model.generate(LONG, 12, stop=()).tolist() == expected.tolist()
    assert runtime.counters().graph_launches > 80
