"""Graphs of decode cells on a device whose graphs are closures. Those of CUDA are tested by tests/fakecuda."""

from dataclasses import replace
from unittest import mock

import pytest
from transformers import LlamaConfig, OPTConfig

from flexgen import OptLM, Policy
from flexgen.kernels.workspaces import HOST
from flexgen.memory.cuda_graphs import CudaGraphs
from flexgen.memory.gpu import EmulatedDevice
from flexgen.runtime import graphs as graphs_module
from flexgen.runtime.graphs import MIN_TOKENS

SHAPE = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=160
)
OPT = OPTConfig(word_embed_proj_dim=32, ffn_dim=64, **SHAPE)
LLAMA = LlamaConfig(num_key_value_heads=2, intermediate_size=64, **SHAPE)
ON_GPU = {"gpu": 100}
POLICY = Policy(gpu_batch_size=2, num_gpu_batches=2, weights=ON_GPU, cache=ON_GPU, activations=ON_GPU)
PROMPTS = [list(range(5, 5 + n)) for n in (50, 44, 9, 51)]
LAYERS, ATTENTION_LAYERS, BATCHES = 4, 2, 2


class Closures:
    """What is captured runs again from its start, so it may read nothing that only its first run had."""

    def __init__(self, refuses_from=None):
        self.refuses_from = refuses_from
        self.captures = self.replays = 0

    def capture(self, work):
        self.captures += 1
        if self.refuses_from is not None and self.captures >= self.refuses_from:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def replay():
            self.replays += 1
            work()

        return replay


class GraphDevice(EmulatedDevice):
    workspaces = replace(HOST, captured=0)

    def __init__(self, graphs):
        super().__init__()
        self._graphs = graphs

    @property
    def graphs(self):
        return self._graphs


def generated(device, config, tokens, **sampling):
    with OptLM(config, POLICY, device=device, weights="dummy", dtype="float32", progress=False) as model:
        return model.generate(PROMPTS, tokens, **{"stop": ()} | sampling).tolist()


@pytest.mark.parametrize("config", [OPT, LLAMA], ids=["opt", "llama"])
def test_a_cell_is_captured_once_for_an_extent_and_replayed_at_each_token(config):
    graphs = Closures()
    assert generated(GraphDevice(graphs), config, 20) == generated("cpu", config, 20)
    # Longer prompts come first. In their batch, attention goes from one extent to another at 64 tokens.
    assert graphs.captures == LAYERS * BATCHES + ATTENTION_LAYERS
    assert graphs.replays == (20 - 2) * LAYERS * BATCHES


def test_other_batches_have_other_graphs():
    plain = generated("cpu", LLAMA, 30)
    stop = [plain[0][len(PROMPTS[3]) + 10]]
    graphs = Closures()
    expected = generated("cpu", LLAMA, 30, stop=stop)
    assert generated(GraphDevice(graphs), LLAMA, 30, stop=stop) == expected
    assert graphs.captures > LAYERS * BATCHES


def test_a_call_of_few_tokens_captures_nothing():
    graphs = Closures()
    generated(GraphDevice(graphs), OPT, MIN_TOKENS)
    assert graphs.captures == 0
    generated(GraphDevice(graphs), OPT, MIN_TOKENS + 1)
    assert graphs.captures == LAYERS * BATCHES


@pytest.mark.parametrize("refuses_from", [1, 6])
def test_where_a_capture_is_refused_ids_are_the_same_and_one_warning_says_so(refuses_from, caplog):
    graphs = Closures(refuses_from)
    assert generated(GraphDevice(graphs), OPT, 20) == generated("cpu", OPT, 20)
    assert graphs.captures == refuses_from and graphs.replays == refuses_from - 1
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "flexgen"]
    assert "'operation not permitted when stream is capturing'" in warning


def test_a_device_without_graphs_says_so():
    with pytest.raises(NotImplementedError, match="emulated"):
        print(EmulatedDevice().graphs)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [OPT, LLAMA], ids=["opt", "llama"])
def test_ids_on_a_gpu_are_those_without_graphs(config, monkeypatch):
    drawn = dict(do_sample=True, temperature=3.0, seed=1)
    with mock.patch.object(CudaGraphs, "capture", autospec=True, side_effect=CudaGraphs.capture) as capture:
        found = generated("cuda", config, 20, **drawn)
    assert capture.call_count >= LAYERS * BATCHES
    monkeypatch.setattr(graphs_module, "MIN_TOKENS", 20)
    assert generated("cuda", config, 20, **drawn) == found
