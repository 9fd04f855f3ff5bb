"""The names, bytes, flops and workspace of layers, compared with those counted by torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AfmoeConfig,
    CodeGenConfig,
    CohereConfig,
    FalconConfig,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MiMoV2FlashConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen2MoeConfig,
)

from flexgen.kernels.attention import attend_in_torch
from flexgen.kernels.rotation import token_factors
from flexgen.models import build_layers, open_model
from flexgen.models.block import Block
from flexgen.models.mlp import MLP
from flexgen.models.ops import MASK_VALUES, causal_attention, rope_tables
from flexgen.units import MIB

ROWS, PAGE = 4, 128
GROUPED = dict(
    vocab_size=512, hidden_size=128, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2,
    intermediate_size=320, max_position_embeddings=600, pad_token_id=0,
)  # fmt: skip
CONFIGS = {
    "opt": OPTConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=1, num_attention_heads=4, ffn_dim=512,
        word_embed_proj_dim=64, activation_function="gelu", max_position_embeddings=600,
    ),
    "opt-post-norm": OPTConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=1, num_attention_heads=4, ffn_dim=512,
        do_layer_norm_before=False, max_position_embeddings=600,
    ),
    "llama": LlamaConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=320, max_position_embeddings=600,
    ),
    "fused": Phi3Config(
        **GROUPED, rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
    ),
    "fused groups, parallel": FalconConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=1, num_attention_heads=8, num_kv_heads=2,
        new_decoder_architecture=True, max_position_embeddings=600,
    ),
    "parallel, one norm": CohereConfig(**GROUPED, use_qk_norm=True),
    "norms after": Olmo2Config(**GROUPED),
    "norms around, interleaved": Glm4Config(**GROUPED, head_dim=16),
    "four parts": CodeGenConfig(
        vocab_size=512, n_embd=128, n_layer=1, n_head=8, rotary_dim=8, n_positions=600
    ),
    "scales": GraniteConfig(**GROUPED, residual_multiplier=0.5, embedding_multiplier=2.0, logits_scaling=3.0),
    "plus": GemmaConfig(**GROUPED, head_dim=16),
    # With as many as are chosen, every expert has all tokens, as an estimate must assume.
    "experts": Qwen2MoeConfig(
        **GROUPED, num_experts=2, num_experts_per_tok=2, moe_intermediate_size=96,
        shared_expert_intermediate_size=200,
    ),
    "experts in groups": Glm4MoeConfig(
        **GROUPED, head_dim=16, n_routed_experts=4, num_experts_per_tok=4, n_group=2, topk_group=2,
        moe_intermediate_size=96, first_k_dense_replace=0,
    ),
    "gate": AfmoeConfig(
        **GROUPED, head_dim=16, layer_types=["full_attention"], num_dense_layers=1, num_experts=2,
        num_experts_per_tok=2, moe_intermediate_size=96,
    ),
    "experts with weighted inputs": Llama4TextConfig(
        **GROUPED, head_dim=16, num_local_experts=2, num_experts_per_tok=2, no_rope_layers=[1],
        layer_types=["full_attention"], moe_layers=[0],
    ),
    "values from keys, an MLP next to experts": Gemma4TextConfig(
        **GROUPED, global_head_dim=16, attention_k_eq_v=True, layer_types=["full_attention"],
        hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=2, top_k_experts=2,
        moe_intermediate_size=96,
    ),
    "narrow values": MiMoV2FlashConfig(
        **GROUPED, head_dim=24, v_head_dim=16, layer_types=["full_attention"], mlp_layer_types=["dense"],
    ),
}  # fmt: skip


class _Context:
    """An existing cache of `context` tokens, and attention over the prompt in one piece."""

    last_only = False
    text_length = None

    def __init__(self, spec, seq, context, starts, dtype):
        self.starts, self.context = starts, context
        self.positions = torch.arange(context - seq, context).expand(ROWS, seq).contiguous()
        own = spec.layers[0].attention
        shape = (ROWS, own.kv_heads, PAGE, own.head_dim)
        count = -(-context // PAGE)
        self.pages = [
            (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(count)
        ]

    def rope_factors(self, rope, dtype):
        return token_factors(*rope_tables(rope, self.positions, dtype))

    def keep_new(self, k, v):
        pass

    def attend_chunk(self, chunk, q, k, v, scoring):
        seen = (chunk.rows, slice(None), slice(chunk.tokens.stop))
        return causal_attention(q, k[seen], v[seen], self.starts[chunk.rows], scoring)

    def attend(self, q, k, v, scoring):
        if q.shape[2] > 1:
            return causal_attention(q, k, v, self.starts, scoring)
        # What a layer says holds for the version in torch; the compiled one takes less memory.
        return attend_in_torch(q, self.pages, self.context, torch.tensor(self.starts), scoring)


def _cases(config, dtype, seq, context, starts, sep_layer=True, **changes):
    spec, checkpoint = open_model(CONFIGS[config], "dummy")
    spec = replace(spec, **changes)
    ctx = _Context(spec, seq, context, starts, dtype)
    for layer in build_layers(spec, sep_layer):
        weights = {weight.name: checkpoint.read(weight, dtype) for weight in layer.weights}
        x = torch.zeros(ROWS, seq, dtype=torch.int64)
        if layer.name != "embed":
            x = torch.randn(ROWS, seq, spec.hidden_size).to(dtype)
        yield layer, lambda layer=layer, x=x, weights=weights: layer.forward(x, weights, ctx)


# float16, because bfloat16 products take scratch memory of their own on a CPU.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("seq", "context", "starts"),
    [(64, 64, [0] * ROWS), (64, 64, [0, 3, 9, 3]), (1, 500, [0, 3, 9, 3])],
    ids=["prompt", "ragged", "decode"],
)
@pytest.mark.parametrize("config", CONFIGS)
def test_workspace_is_an_upper_estimate_and_not_a_wild_one(config, seq, context, starts, dtype, peak_bytes):
    for sep_layer in (True, False):
        for layer, call in _cases(config, dtype, seq, context, starts, sep_layer):
            peak = peak_bytes(call)
            estimate = layer.workspace_bytes(ROWS, seq, context, dtype)
            # The estimate has room for the copies of the compiled products, which `peak_bytes` does not see, and
            # for those of the rotation and of routers in torch, which the compiled ones do not make.
            near = 1.15 if isinstance(layer, MLP) and dtype is torch.float32 else 4.1
            assert peak <= estimate <= near * peak + 16_384, f"{layer.name}: peak {peak}, estimate {estimate}"


# Four pieces of each row; two rows at once; one row at once.
@pytest.mark.parametrize("chunk_tokens", [16, 130, 64])
@pytest.mark.parametrize("starts", [[0] * ROWS, [0, 3, 40, 40]], ids=["equal", "ragged"])
@pytest.mark.parametrize("config", CONFIGS)
def test_workspace_of_a_prompt_in_chunks(config, starts, chunk_tokens, peak_bytes):
    for sep_layer in (True, False):
        cases = _cases(config, torch.float32, 64, 64, starts, sep_layer, chunk_tokens=chunk_tokens)
        for layer, call in cases:
            peak = peak_bytes(call)
            estimate = layer.workspace_bytes(ROWS, 64, 64, torch.float32)
            blocks = (
                8 * 1024 * torch.get_num_threads()
            )  # temporaries of the attention kernel: small chunks, small ones
            assert peak <= estimate + blocks and estimate <= 3 * peak + 16_384, (layer.name, peak, estimate)


@pytest.mark.parametrize("sep_layer", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_memory_grows_with_the_prompt_only_by_the_results_of_a_layer(config, sep_layer, peak_bytes):
    """Beyond a chunk: its result, the keys and values of attention, and the middle of both halves in one."""
    _, *middle, _ = _cases(config, torch.float32, 512, 512, [0] * ROWS, sep_layer, chunk_tokens=64)
    for layer, call in middle:
        spec = layer.spec
        own = layer.layer_spec.attention
        queries = 0 if own.qkv == "separate" else own.q_size
        kept = spec.hidden_size + (2 * own.kv_size + queries if layer.has_cache else 0)
        if isinstance(
            layer, Block
        ):  # each half has its own maximum, and the input of the second stays in memory
            kept = max(kept, 2 * spec.hidden_size)
        one, two = (layer.workspace_bytes(1, n, n, torch.float32) for n in (100_000, 200_000))
        assert two - one <= 100_000 * kept * 4
        estimate = layer.workspace_bytes(ROWS, 512, 512, torch.float32)
        blocks = 200 * 1024 * torch.get_num_threads()  # temporaries of the attention kernel
        assert peak_bytes(call) <= estimate + blocks
        assert estimate < 0.7 * _whole(layer).workspace_bytes(ROWS, 512, 512, torch.float32)


def _whole(layer):
    """The layer that computes a prompt at once."""
    spec = replace(layer.spec, chunk_tokens=1 << 30)
    return next(other for other in build_layers(spec, layer.name.count(".") > 1) if other.name == layer.name)


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("chunk_tokens", [100_000, 1024])
@pytest.mark.parametrize("config", CONFIGS)
def test_scores_of_a_prompt_are_never_built(config, chunk_tokens, peak_bytes):
    """Neither as a tensor nor inside a kernel: all that a layer holds is smaller than the scores of one head."""
    seq = 2048
    cases = _cases(
        config, torch.float32, seq, seq, [0, 0, 100, 600], chunk_tokens=chunk_tokens, max_positions=seq
    )
    for layer, call in cases:
        if layer.has_cache:
            with _Largest() as largest:
                call()
            widest = max(weight.shape[0] for weight in layer.weights)
            # Large results begin with a huge page.
            most = 4 * max(ROWS * seq * widest, MASK_VALUES) + 2 * MIB
            assert 0 < largest.nbytes <= most
            assert peak_bytes(call) < ROWS * layer.layer_spec.attention.heads * seq * seq


@pytest.mark.parametrize("config", CONFIGS)
def test_flops_equal_those_counted_by_torch(config):
    # One token over whole pages: torch counts all products, masked or not.
    for layer, call in _cases(config, torch.float32, 1, 2 * PAGE, [0] * ROWS):
        with FlopCounterMode(display=False) as counter:
            call()
        additions = ROWS * layer.spec.hidden_size if layer.name == "embed" else 0
        positions = additions if layer.spec.positions == "learned" else 0
        assert layer.flops(ROWS, 1, 2 * PAGE) == counter.get_total_flops() + positions, layer.name


def test_flops_of_a_prompt_are_those_of_its_tokens_one_by_one():
    spec, _ = open_model(CONFIGS["llama"], "dummy")
    for sep_layer in (True, False):
        for layer in build_layers(spec, sep_layer):
            one_by_one = sum(layer.flops(3, 1, context) for context in range(1, 11))
            assert layer.flops(3, 10, 10) == one_by_one
            assert layer.flops(3, 4, 10) == sum(layer.flops(3, 1, context) for context in range(7, 11))


def test_names_and_bytes():
    spec, checkpoint = open_model(CONFIGS["llama"], "dummy")
    apart, together = build_layers(spec), build_layers(spec, sep_layer=False)
    assert [layer.name for layer in apart] == ["embed", "layers.0.attention", "layers.0.mlp", "head"]
    assert [layer.name for layer in together] == ["embed", "layers.0", "head"]
    assert [layer.has_cache for layer in apart] == [False, True, False, False]
    assert [layer.has_cache for layer in together] == [False, True, False]
    for layer in (*apart, *together):
        read = sum(checkpoint.read(weight, torch.bfloat16).nbytes for weight in layer.weights)
        assert layer.weight_bytes(torch.bfloat16) == read
        assert len({weight.name for weight in layer.weights}) == len(layer.weights)
    assert {w.key for layer in apart for w in layer.weights} == {
        w.key for layer in together for w in layer.weights
    }


@pytest.mark.parametrize("sep_layer", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_halves_run_separately_and_do_not_change_inputs(config, sep_layer):
    spec, checkpoint = open_model(CONFIGS[config], "dummy")
    ctx = _Context(spec, 3, 3, [0] * ROWS, torch.float32)
    _, *middle, _ = build_layers(spec, sep_layer)
    for layer in middle:
        weights = {weight.name: checkpoint.read(weight, torch.float32) for weight in layer.weights}
        x = torch.randn(ROWS, 3, spec.hidden_size)
        before = x.clone()
        out = layer.forward(x, weights, ctx)
        if layer.has_cache:
            outputs = ctx.attend(*layer.qkv(x, weights, ctx), layer.scoring(weights))
            assert torch.equal(layer.output(outputs, x, weights), out)
        assert torch.equal(x, before)


def test_a_layer_is_immutable():
    spec, _ = open_model(CONFIGS["opt"], "dummy")
    for layer in (*build_layers(spec), *build_layers(spec, sep_layer=False)):
        with pytest.raises(AttributeError):
            layer.weights = ()
