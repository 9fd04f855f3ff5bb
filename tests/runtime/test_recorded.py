"""Decode cells as tapes: the ids are those of cells that are computed kernel by kernel."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, OPTConfig

from flexgen import OptLM, Policy
from flexgen.kernels.loading import native_available
from flexgen.kernels.tape import Tape
from flexgen.runtime import recorded

SHAPE = dict(
    vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=300
)
LLAMA = LlamaConfig(num_key_value_heads=2, intermediate_size=128, **SHAPE)
GELU = LlamaConfig(num_key_value_heads=2, intermediate_size=128, hidden_act="gelu", **SHAPE)
WINDOWED = MistralConfig(num_key_value_heads=2, intermediate_size=128, sliding_window=8, **SHAPE)
OPT = OPTConfig(word_embed_proj_dim=64, ffn_dim=128, **SHAPE)
PROMPTS = [list(range(5, 25)), list(range(25, 45)), list(range(9, 29))]
NEW = 12

pytestmark = pytest.mark.skipif(not native_available(), reason="no compiled kernels here")


@pytest.fixture
def replays(monkeypatch):
    """The numbers of tokens of each replay."""
    found, replay = [], Tape.replay
    monkeypatch.setattr(Tape, "replay", lambda tape, later: found.append(later) or replay(tape, later))
    # With instructions for tiles of bfloat16, a library would multiply its own layout of a matrix.
    monkeypatch.setattr("flexgen.kernels.half_linear._rows", lambda dtype: 64)
    return found


def policy(batches=1, weights="cpu", codec="none", rows=1):
    return Policy(
        gpu_batch_size=rows,
        num_gpu_batches=batches,
        weights={weights: {"percent": 100, "codec": codec}},
        cache={"cpu": 100},
        activations={"cpu": 100},
    )


def generated(prompts, config=LLAMA, own=None, dtype="bfloat16", new=NEW, stop=(), **options):
    own = own or policy()
    with OptLM(config, own, device="cpu", weights="dummy", dtype=dtype, progress=False, **options) as model:
        return model.generate(prompts, new, stop=stop).tolist()


def without_tapes(monkeypatch, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(recorded, "MIN_TOKENS", 1000)
        return generated(*args, **kwargs)


@pytest.mark.parametrize("codec", ["none", "int4", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_each_layer_is_recorded_once_and_replayed_at_each_later_token(replays, monkeypatch, codec, dtype):
    expected = without_tapes(monkeypatch, PROMPTS[:1], own=policy(codec=codec), dtype=dtype)
    assert not replays
    assert generated(PROMPTS[:1], own=policy(codec=codec), dtype=dtype) == expected
    # Of the tokens, the first is that of the prompt, and the second one is recorded.
    assert replays == [later for later in range(1, NEW - 1) for _ in range(2 * 3)]


def test_tapes_continue_on_the_next_page_of_the_cache(replays, monkeypatch):
    expected = without_tapes(monkeypatch, PROMPTS[:1], new=200)
    assert generated(PROMPTS[:1], new=200) == expected and len(replays) == 198 * 6


@pytest.mark.parametrize("sep_layer", [True, False])
def test_several_batches_and_rows(replays, monkeypatch, sep_layer):
    prompts = PROMPTS + [PROMPTS[0][::-1]]
    own = replace(policy(batches=2, rows=2), sep_layer=sep_layer)
    expected = without_tapes(monkeypatch, prompts, own=own)
    assert generated(prompts, own=own) == expected
    assert len(replays) == (NEW - 2) * 2 * (6 if sep_layer else 3)


def test_each_block_and_each_group_of_rows_has_its_own_tapes(replays, monkeypatch):
    own = policy(batches=2)
    plain = without_tapes(monkeypatch, PROMPTS, own=own)
    stop = [plain[0][len(PROMPTS[0]) + 4]]
    expected = without_tapes(monkeypatch, PROMPTS, own=own, stop=stop, new=30)
    assert generated(PROMPTS, own=own, stop=stop, new=30) == expected and replays


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        ([PROMPTS[0], PROMPTS[1][:11]], {"own": policy(rows=2)}),
        (PROMPTS[:1], {"config": WINDOWED}),
        (PROMPTS[:1], {"own": replace(policy(), attn_sparsity=0.5)}),
        (PROMPTS[:1], {"own": replace(policy(), cache={"disk": 100})}),
        (PROMPTS[:1], {"own": replace(policy(), cache={"disk": 100}, activations={"disk": 100})}),
    ],
    ids=["padding", "window", "sparse attention", "cache on disk", "cache and activations on disk"],
)
def test_where_only_attention_changes_with_the_token_mlps_are_replayed(
    replays, monkeypatch, prompts, options
):
    expected = without_tapes(monkeypatch, prompts, **options)
    assert generated(prompts, **options) == expected
    assert len(replays) == 3 * (NEW - 2)


@pytest.mark.parametrize(
    "options",
    [
        {"own": policy(weights="disk")},
        {"config": OPT},
        {"dtype": "float32", "config": GELU},
        {"new": recorded.MIN_TOKENS},
    ],
    ids=["weights on disk", "layer norms", "another gate", "few tokens"],
)
def test_other_cells_are_computed_kernel_by_kernel(replays, monkeypatch, options, tmp_path):
    expected = without_tapes(monkeypatch, PROMPTS[:1], offload_dir=tmp_path, **options)
    assert generated(PROMPTS[:1], offload_dir=tmp_path, **options) == expected and not replays


def test_tapes_keep_a_limited_amount_of_memory(replays, monkeypatch):
    expected = without_tapes(monkeypatch, PROMPTS[:1])
    monkeypatch.setattr(recorded, "MOST_BYTES", 4 * 1024)
    assert generated(PROMPTS[:1]) == expected
    assert 0 < len(replays) < (NEW - 2) * 6


def test_threads_may_change_between_calls(replays):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = generated(PROMPTS[:1])
        torch.set_num_threads(2)
        assert generated(PROMPTS[:1]) == one
    finally:
        torch.set_num_threads(before)
