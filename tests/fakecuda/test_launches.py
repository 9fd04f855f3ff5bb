"""Kernels that a layer launches for each token are within budgets, which only grow on purpose."""

from collections import Counter

import pytest

pytest.importorskip("simulated", reason="runs on the simulated GPU: `make test-cuda`")

import torch
from piece_sizes import piece_sizes
from simulated import cases, runtime
from transformers import LlamaConfig, MistralConfig, OPTConfig, Qwen3MoeConfig

from flexgen.kernels import groupwise, groupwise_linear, loading
from flexgen.kernels.attention import attend_fused
from flexgen.kernels.groupwise import dequantise_in_torch
from flexgen.kernels.heads import GroupwiseHeads
from flexgen.kernels.packed import Packed
from flexgen.models import mixture as mixtures

ALL = {"gpu": 100}
SHAPE = dict(vocab_size=64, hidden_size=256, num_attention_heads=4, max_position_embeddings=1024)


def opt(layers):
    return OPTConfig(word_embed_proj_dim=256, num_hidden_layers=layers, ffn_dim=512, **SHAPE)


def llama(layers):
    return LlamaConfig(num_hidden_layers=layers, num_key_value_heads=2, intermediate_size=512, **SHAPE)


def windowed(layers):
    return MistralConfig(
        num_hidden_layers=layers, num_key_value_heads=2, intermediate_size=512, sliding_window=64, **SHAPE
    )


def mixture(layers):
    return Qwen3MoeConfig(
        num_hidden_layers=layers, num_key_value_heads=2, moe_intermediate_size=128, num_experts=8, head_dim=64,
        num_experts_per_tok=2, mlp_only_layers=[], decoder_sparse_step=1, **SHAPE,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def without_triton_and_cudnn(monkeypatch):
    """Triton's launches do not come to the simulated runtime, which has no cuDNN."""
    for module in (groupwise, groupwise_linear, loading):
        monkeypatch.setattr(module, "triton_kernels", lambda device: None)
    was = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(was)


def launched(config, policy, prompt, tokens):
    with cases.open_on("cuda", config, policy, "float16") as model:
        prompts = [[5] * prompt, [7] * (prompt - 2)]
        model.generate(prompts, 2, stop=())  # what is made once
        runtime.reset()
        model.generate(prompts, tokens, stop=())
        torch.cuda.synchronize()
        return Counter(runtime.counters().launches)


def by_kernel(make, policy, prompt):
    """Launches of a layer in the prefill, and of a layer and later token, by kernel."""
    (one, three), (one_more, three_more) = (
        [launched(make(layers), policy, prompt, tokens) for tokens in (1, 3)] for layers in (2, 4)
    )
    names = [*(one | three | one_more | three_more)]
    prefill = Counter({n: (one_more[n] - one[n]) / 2 for n in names})
    return prefill, Counter({n: (three_more[n] - three[n]) / 4 - (one_more[n] - one[n]) / 4 for n in names})


IN_HOST_MEMORY, ON_DISK = {"cpu": 100}, {"disk": 100}
BUDGETS = {
    "plain": ({}, 45, 20),
    "int4 weights": ({"weights": cases.encoded("int4", ALL)}, 65, 40),
    "int4 cache": ({"cache": cases.encoded("int4", ALL)}, 72, 55),
    "fp8 weights": ({"weights": cases.encoded("fp8", ALL)}, 60, 36),
    "fp8 cache": ({"cache": cases.encoded("fp8", ALL)}, 58, 38),
    "sparse": ({"attn_sparsity": 0.5}, 45, 72),
    "cache in host memory": ({"cache": IN_HOST_MEMORY}, 45, 23),
    "cache on disk": ({"cache": ON_DISK}, 45, 23),
    "int4 cache in host memory": ({"cache": cases.encoded("int4", IN_HOST_MEMORY)}, 72, 55),
    "fp8 cache in host memory": ({"cache": cases.encoded("fp8", IN_HOST_MEMORY)}, 58, 41),
    "sparse, cache in host memory": ({"attn_sparsity": 0.5, "cache": IN_HOST_MEMORY}, 45, 75),
}
"""Changes of a policy, and launches of a layer: in the prefill, and of a later token at any length."""


@pytest.mark.parametrize("prompt", [20, 500])
@pytest.mark.parametrize("make", [opt, llama])
@pytest.mark.parametrize("name", BUDGETS)
def test_a_layer_stays_within_its_budget(name, make, prompt):
    changes, prefill, decode = BUDGETS[name]
    fields = dict(
        gpu_batch_size=2, num_gpu_batches=1, weights=ALL, cache=ALL, activations=ALL, attend_on="gpu"
    )
    first, later = by_kernel(make, cases.policy(**fields | changes), prompt)
    assert first.total() <= prefill, first.most_common()
    assert 0 < later.total() <= decode, later.most_common()


OF_LAYERS = {
    "window": (windowed, {}, (43, 240), 26),
    "window, cache in host memory": (windowed, {"cache": IN_HOST_MEMORY}, (43, 240), 30),
    "mixture": (mixture, {}, (65, 89), 40),
    "int4 mixture": (mixture, {"weights": cases.encoded("int4", ALL)}, (78, 177), 53),
    "fp8 mixture": (mixture, {"weights": cases.encoded("fp8", ALL)}, (73, 148), 49),
    "int4 mixture in host memory": (
        mixture,
        {"weights": cases.encoded("int4", IN_HOST_MEMORY)},
        (78, 177),
        53,
    ),
}
"""Kinds of layers, changes of a policy, launches of a prefill of 20 and of 500 tokens, and of a later token. A long
prompt attends by blocks of a window, and multiplies its eight experts one by one."""


@pytest.fixture
def all_experts_chosen(monkeypatch):
    """A prompt multiplies the experts one by one. Without computed numbers, their rows are garbage: here one each."""
    monkeypatch.setattr(mixtures, "_spans", lambda ends: {n: (n, n + 1) for n in range(len(ends))})


@pytest.mark.parametrize(("prompt", "length"), [(20, 0), (500, 1)])
@pytest.mark.parametrize("name", OF_LAYERS)
def test_a_layer_of_another_kind_stays_within_its_budget(
    name, prompt, length, grouped_kernels, all_experts_chosen
):
    """Pages of 16 tokens, so that a window of 64 is a ring of five pages."""
    make, changes, prefills, decode = OF_LAYERS[name]
    fields = dict(
        gpu_batch_size=2, num_gpu_batches=1, weights=ALL, cache=ALL, activations=ALL, attend_on="gpu"
    )
    with piece_sizes(page_tokens=16, memory_page_tokens=16):
        first, later = by_kernel(make, cases.policy(**fields | changes), prompt)
    assert first.total() <= prefills[length], first.most_common()
    assert 0 < later.total() <= decode, later.most_common()


IN_GRAPHS = {"opt": (opt, 15), "llama": (llama, 21), "window": (windowed, 23), "mixture": (mixture, 41)}
"""Kernels of a layer's attention and MLP in their two graphs."""


@pytest.mark.parametrize("name", IN_GRAPHS)
def test_a_layer_in_graphs_is_two_launches_of_few_kernels(name, grouped_kernels):
    make, most = IN_GRAPHS[name]
    policy = cases.policy(gpu_batch_size=2, num_gpu_batches=1, **cases.RESIDENT)

    def counted(layers, tokens):
        with cases.open_on("cuda", make(layers), policy, "float16") as model:
            model.generate([[5] * 100, [7] * 98], tokens, stop=())
            runtime.reset()
            model.generate([[5] * 100, [7] * 98], tokens, stop=())
            torch.cuda.synchronize()
            of = runtime.counters()
            return of.graph_launches, of.graph_kernels, of.kernels

    with piece_sizes(page_tokens=16, memory_page_tokens=16), cases.valid_ids():
        few, many = (
            [b - a for a, b in zip(counted(layers, 12), counted(layers, 20), strict=True)]
            for layers in (2, 4)
        )
    launches, kernels, others = ((b - a) / 8 / 2 for a, b in zip(few, many, strict=True))
    assert launches == 2
    assert 5 < kernels <= most
    assert others == 0, "kernels of a token outside of graphs do not grow with the layers"


def test_the_largest_matrix_of_opt_30b_is_decoded_in_three_launches():
    out, hidden = 7168, 28672
    packed = Packed(
        torch.empty(out, hidden // 2, dtype=torch.uint8, device="cuda"),
        *(torch.empty(out, hidden // 64, dtype=torch.float16, device="cuda") for _ in range(2)),
        bits=4,
        group=64,
    )
    target = torch.empty(out, hidden, dtype=torch.float16, device="cuda")
    dequantise_in_torch(packed, target)  # its constants are made once
    runtime.reset()
    dequantise_in_torch(packed, target)
    assert runtime.counters().kernels == 3


def test_attention_over_an_int4_cache_of_opt_30b_takes_few_launches():
    form = GroupwiseHeads(128, 4, 64)
    page = tuple(torch.empty(48, 56, 1024, form.width, dtype=torch.uint8, device="cuda") for _ in range(2))
    q = torch.empty(48, 56, 1, 128, dtype=torch.float16, device="cuda")
    attend_fused(q, [page], range(1000), None, 1.0, form)
    runtime.reset()
    attend_fused(q, [page], range(1000), None, 1.0, form)
    assert 0 < runtime.counters().kernels <= 30
