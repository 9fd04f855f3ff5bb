"""The plan against torch's real caching allocator, and what models on one GPU share."""

import contextlib
import gc
from unittest import mock

import pytest

pytest.importorskip("simulated", reason="runs on the simulated GPU: `make test-cuda`")

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from simulated import cases, runtime
from transformers import (
    GPTNeoXConfig,
    LlamaConfig,
    LogitsProcessorList,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen3MoeConfig,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from flexgen.engine.completion import Completion
from flexgen.hf.processors import RowProcessors
from flexgen.hf.steps import HFChoice, IdsSoFar
from flexgen.kernels.scoring import Scoring
from flexgen.kernels.workspaces import choice_bytes, choice_rows
from flexgen.memory.gpu import open_device
from flexgen.models.ops import causal_attention
from flexgen.policy import Tier
from flexgen.runtime.request import read_request
from flexgen.runtime.sampler import sample
from flexgen.units import GIB, KIB, MIB

OPT = OPTConfig(
    vocab_size=16384, hidden_size=1024, word_embed_proj_dim=1024, num_hidden_layers=2, num_attention_heads=16,
    ffn_dim=4096, max_position_embeddings=512,
)  # fmt: skip
LLAMA = LlamaConfig(
    vocab_size=16384, hidden_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
    intermediate_size=2816, max_position_embeddings=512,
)  # fmt: skip
PHI3 = Phi3Config(
    vocab_size=16384, hidden_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
    intermediate_size=2816, max_position_embeddings=512, pad_token_id=0,
)  # fmt: skip
"""Fused matrices."""
NEOX = GPTNeoXConfig(
    vocab_size=16384, hidden_size=1024, num_hidden_layers=2, num_attention_heads=16, intermediate_size=4096,
    max_position_embeddings=512,
)  # fmt: skip
"""A parallel residual, and RoPE of a part of each head."""
MIXTURE = Qwen3MoeConfig(
    vocab_size=16384, hidden_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
    head_dim=128, moe_intermediate_size=768, num_experts=8, num_experts_per_tok=2, mlp_only_layers=[],
    decoder_sparse_step=1, max_position_embeddings=512,
)  # fmt: skip
WINDOWED = MistralConfig(
    vocab_size=16384, hidden_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
    intermediate_size=2816, max_position_embeddings=512, sliding_window=100,
)  # fmt: skip
"""A ring of two pages of 128 tokens."""
LENGTHS = [256] * 8 + [200] * 8 + [100] * 8 + [256] * 8
PROMPTS = [[5 + (row + n) % 100 for n in range(length)] for row, length in enumerate(LENGTHS)]
"""They share no prefix, whose memory is that of a block of its own."""
ON_GPU = {"gpu": 100}
INT4_ON_GPU = cases.encoded("int4", ON_GPU)
FP8_ON_GPU = cases.encoded("fp8", ON_GPU)
CLASSES = {
    "on the GPU": dict(weights=ON_GPU, cache=ON_GPU, activations=ON_GPU),
    "thirds": {},
    "thirds, attention on the host": dict(attend_on="cpu"),
    "int4 weights": dict(weights=cases.encoded("int4")),
    "int4 cache": dict(cache=cases.encoded("int4")),
    "fp8 weights": dict(weights=cases.encoded("fp8")),
    "fp8 cache": dict(cache=cases.encoded("fp8")),
    "fp8 on the GPU": dict(weights=FP8_ON_GPU, cache=FP8_ON_GPU, activations=ON_GPU),
    "int4 on the GPU": dict(weights=INT4_ON_GPU, cache=INT4_ON_GPU, activations=ON_GPU),
    "sparse": dict(attn_sparsity=0.25),
    "unpinned": dict(pin_weight=False),
}
GREEDY, DRAWN, FORWARD = "greedy", "drawn", "forward"


def on_gpu_of(capability):
    """The device of this process with that compute capability, 75 for 7.5."""
    for index in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(index) == divmod(capability, 10):
            return torch.device("cuda", index)
    pytest.skip(f"FAKECUDA_CC has no {capability}")


@pytest.fixture(params=[75, 80, 89, 90], ids="sm_{}".format)
def gpu(request):
    return on_gpu_of(request.param)


@pytest.fixture
def t4():
    return on_gpu_of(75)


def called(gpu, config, how, prompts=PROMPTS, dtype="float16", tokens=4, **changes):
    """Bytes of the plan, of the model's peak, and most that torch had reserved, of a call."""
    policy = cases.policy(gpu_batch_size=16, num_gpu_batches=2, **changes)
    return called_with(policy, gpu, config, how, prompts, dtype, tokens)


def called_with(policy, gpu, config, how, prompts, dtype, tokens=4):
    """`called` with a whole policy."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(gpu)
    torch.cuda.reset_peak_memory_stats(gpu)
    with cases.open_on(str(gpu), config, policy, dtype) as model:
        if how is FORWARD:
            model.forward([prompt[:64] for prompt in prompts])
        else:
            model.generate(prompts, tokens, stop=(), do_sample=how is DRAWN, top_p=0.9, seed=0)
        reserved = torch.cuda.max_memory_reserved(gpu) - before
        return model.stats.plan.on(Tier.GPU), model.stats.peak_bytes[Tier.GPU], reserved


def assert_planned(plan, peak, reserved):
    assert peak <= max(1.05 * plan, plan + 4 * MIB)
    assert plan <= 1.4 * peak
    assert reserved <= max(1.1 * plan, plan + 160 * MIB)


@pytest.mark.parametrize("config", [OPT, LLAMA], ids=["opt", "llama"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_call_takes_what_was_planned(name, config, gpu):
    assert_planned(*called(gpu, config, GREEDY, **CLASSES[name]))


@pytest.mark.parametrize("config", [OPT, LLAMA], ids=["opt", "llama"])
@pytest.mark.parametrize("attend_on", ["gpu", "cpu"])
@pytest.mark.parametrize("on_gpu", [100, 50, 0])
def test_prompts_that_enter_at_a_rate_take_what_was_planned(config, on_gpu, attend_on, t4):
    """Each pass computes two prompts, one in a cell; as whole batches they are 16."""
    classes = dict(weights={"cpu": 100}, activations=ON_GPU, cache={"gpu": on_gpu, "cpu": 100 - on_gpu})
    taken = [
        called(t4, config, GREEDY, **classes, attend_on=attend_on, prefill_rows=limit) for limit in (2, 0)
    ]
    for one in taken:
        assert_planned(*one)
    assert taken[0][1] < taken[1][1]


@pytest.mark.parametrize("name", ["on the GPU", "thirds", "thirds, attention on the host", "int4 cache"])
def test_a_shared_prefix_takes_what_was_planned(name, gpu):
    prompts = [PROMPTS[0][:150] + prompt[:100] for prompt in PROMPTS]
    assert_planned(*called(gpu, LLAMA, GREEDY, prompts, **CLASSES[name]))


@pytest.mark.parametrize("config", [PHI3, NEOX], ids=["fused", "parallel"])
@pytest.mark.parametrize("name", ["on the GPU", "thirds", "int4 weights"])
def test_a_call_of_another_structure_takes_what_was_planned(name, config, gpu):
    assert_planned(*called(gpu, config, GREEDY, **CLASSES[name]))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("on the GPU", "bfloat16")]
    + [
        (name, "float16")
        for name in ("on the GPU", "thirds", "int4 weights", "fp8 weights", "int4 on the GPU")
    ],
)
def test_a_call_of_a_mixture_takes_what_was_planned(name, dtype, gpu, grouped_kernels):
    """In bfloat16 with torch's grouped product."""
    if dtype == "bfloat16" and torch.cuda.get_device_capability(gpu) < (8, 0):
        pytest.skip("computed in float16")
    plan, peak, reserved = called(gpu, MIXTURE, GREEDY, dtype=dtype, tokens=12, **CLASSES[name])
    assert peak <= plan
    assert plan <= 1.4 * max(peak, reserved)
    assert reserved <= max(1.1 * plan, plan + 160 * MIB)


@pytest.mark.parametrize("name", ["on the GPU", "thirds", "int4 cache", "fp8 on the GPU"])
def test_a_call_with_windows_takes_what_was_planned(name, gpu):
    assert_planned(*called(gpu, WINDOWED, GREEDY, **CLASSES[name]))


@pytest.mark.parametrize("cache", [ON_GPU, INT4_ON_GPU, FP8_ON_GPU], ids=["plain", "int4", "fp8"])
@pytest.mark.parametrize(
    "config", [OPT, LLAMA, WINDOWED, MIXTURE], ids=["opt", "llama", "windows", "mixture"]
)
def test_cuda_graphs_take_what_was_planned(config, cache, gpu, grouped_kernels):
    runtime.reset()
    changes = CLASSES["on the GPU"] | dict(cache=cache)
    plan, peak, reserved = called(gpu, config, GREEDY, tokens=16, **changes)
    assert peak <= plan
    # Graphs keep memory for their temporaries, which torch does not count as allocated.
    assert plan <= 1.3 * reserved
    assert reserved <= max(1.1 * plan, plan + 160 * MIB)
    assert runtime.counters().graph_launches > 14


def test_graphs_of_a_second_call_and_of_other_batches_take_no_more():
    """Their memory is used again, and nothing of it is allocated after the model is closed."""
    policy = cases.policy(gpu_batch_size=16, num_gpu_batches=2, **CLASSES["on the GPU"])
    gc.collect()
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_allocated(), []
    with cases.valid_ids(), cases.open_on("cuda", OPT, policy, "float16") as model:
        for stop in ((), (), range(0, 64, 9), range(0, 64, 9)):
            model.generate(PROMPTS, 16, stop=stop)
            reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] == reserved[0] and reserved[3] == reserved[2]
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("name", ["on the GPU", "thirds"])
@pytest.mark.parametrize("how", [DRAWN, FORWARD])
def test_drawing_and_forward_take_what_was_planned(how, name, gpu):
    assert_planned(*called(gpu, OPT, how, **CLASSES[name]))


@contextlib.contextmanager
def counting_without_holes():
    """Peaks of what tensors ask for. torch gives a tensor up to 1 MiB more, rather than dividing a free piece."""

    def asked(which):
        return lambda device=None: torch.cuda.memory_stats(device)[f"requested_bytes.all.{which}"]

    with (
        mock.patch.object(torch.cuda, "memory_allocated", asked("current")),
        mock.patch.object(torch.cuda, "max_memory_allocated", asked("peak")),
    ):
        yield


@settings(max_examples=30, phases=cases.WITHOUT_SHRINKING)
@given(
    policy=cases.policies(),
    config=st.sampled_from([OPT, LLAMA]),
    capability=st.sampled_from([75, 80, 89, 90]),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    how=st.sampled_from([GREEDY, DRAWN, FORWARD]),
    prompts=st.integers(1, 18),
)
def test_no_call_takes_more_than_was_planned(policy, config, capability, dtype, how, prompts):
    gpu = on_gpu_of(capability)
    with cases.valid_ids(), counting_without_holes():
        plan, peak, _ = called_with(policy, gpu, config, how, PROMPTS[-prompts:], dtype)
    assert peak <= plan


@settings(max_examples=200)
@given(
    capability=st.sampled_from([75, 80, 89, 90]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    rows=st.integers(1, 6),
    heads=st.sampled_from([1, 2, 8, 12, 32]),
    tokens=st.sampled_from([1, 64, 65, 300, 512, 1000]),
    head_dim=st.sampled_from([32, 64, 80, 128, 160, 256]),
    data=st.data(),
)
def test_attention_of_a_prompt_takes_no_more_than_planned(
    capability, dtype, rows, heads, tokens, head_dim, data
):
    assume(capability > 75 or dtype is not torch.bfloat16)  # has a test of its own
    padding = st.sampled_from([0, tokens // 2, tokens - 1])
    starts = data.draw(st.lists(padding, min_size=rows, max_size=rows))
    gpu = on_gpu_of(capability)
    device = open_device(str(gpu))
    call = object()
    with contextlib.closing(device), device.active():
        device.begin_call(call)  # without cuDNN
        x = torch.empty(rows, tokens, heads, head_dim, dtype=dtype, device=gpu).transpose(1, 2)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        causal_attention(x, x, x, starts, Scoring(1.0))
        taken = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        device.end_call(call)
    results = x.nbytes * (2 if any(starts) else 1)  # for a run of rows, and for all
    planned = device.workspaces.attention(rows, heads, tokens, tokens, head_dim, dtype)
    assert taken <= results + planned + KIB  # seeds and counters


def test_temporaries_of_a_wide_model_are_reserved_together(gpu):
    """Those of attention leave small pieces behind, and those of an MLP would each be reserved again."""
    wide = LlamaConfig(
        vocab_size=1024, hidden_size=4096, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, max_position_embeddings=1024,
    )  # fmt: skip
    plan, _, reserved = called(
        gpu, wide, GREEDY, [[n, *PROMPTS[0] * 2][:512] for n in range(32)], **CLASSES["on the GPU"]
    )
    assert reserved <= 1.1 * plan


def test_bfloat16_is_computed_in_float16_where_the_gpu_has_no_instructions_for_it(t4, caplog):
    config = OPTConfig(**cases.OPT.to_dict() | {"dtype": "bfloat16"})
    with cases.open_on(str(t4), config, cases.policy(), "auto") as model:
        assert model.dtype is torch.float16
    assert "no instructions for bfloat16" in caplog.text


def test_attention_in_bfloat16_that_builds_scores_is_planned(t4):
    native, *_ = called(t4, OPT, GREEDY, **CLASSES["on the GPU"])
    plan, peak, reserved = called(t4, OPT, GREEDY, dtype="bfloat16", **CLASSES["on the GPU"])
    assert plan > native + 64 * MIB  # scores in float32
    assert_planned(plan, peak, reserved)


# What models share


def small(**options):
    return cases.open_on("cuda", cases.OPT, cases.policy(**CLASSES["on the GPU"]), "float16", **options)


def test_attention_does_without_cudnn_during_a_call_only():
    backend = torch.backends.cuda
    seen = []
    with small() as model:
        assert backend.cudnn_sdp_enabled()
        model.generate_with(
            Completion(read_request(model.spec, cases.PROMPTS), 3, model.sampled(stop=())),
            check=lambda: seen.append(backend.cudnn_sdp_enabled()),
        )
        assert seen and not any(seen) and backend.cudnn_sdp_enabled()
        backend.enable_cudnn_sdp(False)  # by the user
        try:
            model.generate(cases.PROMPTS, 2)
            assert not backend.cudnn_sdp_enabled()
        finally:
            backend.enable_cudnn_sdp(True)


def test_models_leave_nothing_on_the_gpu():
    """The workspace of cuBLAS among it, which torch has for each stream."""
    with small() as model:  # tables that are made once
        model.generate(cases.PROMPTS, 2)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with small() as model:
            model.generate(cases.PROMPTS, 2)
            workspace = torch._C._cuda_getCublasWorkspaceSize()
            libraries = model.stats.plan.on(Tier.GPU, "libraries")
            assert model.stats.peak_bytes[Tier.GPU] > workspace and libraries == workspace
        assert torch.cuda.memory_allocated() == before


def test_a_model_has_a_peak_of_its_own():
    with small() as model:
        model.generate(cases.PROMPTS, 2)
        alone = model.stats.peak_bytes[Tier.GPU]
        others = torch.zeros(300 * MIB, dtype=torch.uint8, device="cuda")
        with small() as second:
            second.generate(cases.PROMPTS, 2)
            assert second.stats.peak_bytes[Tier.GPU] == pytest.approx(alone, abs=MIB)
            del others
            model.generate(cases.PROMPTS, 2)
            assert model.stats.peak_bytes[Tier.GPU] == pytest.approx(alone, abs=MIB)


def test_caps_of_several_models_add_up():
    fraction, total = torch.cuda.get_per_process_memory_fraction, torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(0.9)  # by the user
    policy = cases.policy()
    try:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        first = cases.open_on("cuda:0,memory=1GiB", cases.OPT, policy, "float16")
        assert fraction() * total == pytest.approx(before + GIB)
        second = cases.open_on("cuda:0,memory=2GiB", cases.OPT, policy, "float16")
        assert fraction() * total == pytest.approx(before + 3 * GIB)
        first.close()
        assert fraction() * total == pytest.approx(before + 2 * GIB)
        with small():  # has no cap
            assert fraction() == 0.9
        assert fraction() * total == pytest.approx(before + 2 * GIB)
        second.close()
        assert fraction() == 0.9
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# Drawing

VOCAB = 128_256


@pytest.mark.parametrize(
    "options",
    [{}, dict(top_k=50), dict(top_p=0.9), dict(top_k=50, top_p=0.9), dict(top_k=100_000, top_p=0.9)],
)
@pytest.mark.parametrize("rows", [1, 10, 128])
def test_drawing_takes_what_is_planned_for_it(rows, options):
    logits = torch.zeros(rows, VOCAB, dtype=torch.float16, device="cuda")
    uniforms = torch.zeros(rows, dtype=torch.float64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sample(logits, 0.7, uniforms=uniforms, **options)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= choice_bytes(rows, VOCAB) <= 64 * MIB
    assert rows <= choice_rows(VOCAB) or taken > 0.2 * choice_bytes(rows, VOCAB)


def test_top_k_makes_the_sort_of_top_p_a_short_one():
    logits = torch.zeros(4, VOCAB, device="cuda")
    uniforms = torch.zeros(4, dtype=torch.float64, device="cuda")

    def taken(**options):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sample(logits, 0.7, uniforms=uniforms, **options)
        return torch.cuda.max_memory_allocated() - before

    assert taken(top_k=50, top_p=0.9) == pytest.approx(taken(top_k=50), rel=0.01)
    assert taken(top_p=0.9) > 1.5 * taken(top_k=50, top_p=0.9)


@pytest.mark.parametrize(
    "processor",
    [
        TemperatureLogitsWarper(0.7),
        TopPLogitsWarper(0.9),
        TypicalLogitsWarper(0.9),
        RepetitionPenaltyLogitsProcessor(2.0),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_processors_of_transformers_take_what_is_planned_for_drawing(processor):
    rows, vocab = 512, 32_000
    processors = LogitsProcessorList([processor])
    lists = RowProcessors(processors, lambda rows: processors)
    ids = torch.ones(rows, 8, dtype=torch.int64)
    choice = HFChoice(IdsSoFar(ids, 4, 0), lists, StoppingCriteriaList(), do_sample=True)
    logits = torch.zeros(rows, vocab, dtype=torch.float16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    choice.choose(logits, range(rows), 0)
    taken = torch.cuda.max_memory_allocated() - before
    assert 0.2 * choice_bytes(rows, vocab) < taken <= choice_bytes(rows, vocab)
