"""Decode cells as tapes: the ids are those of cells that are computed kernel by kernel."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, OPTConfig, Qwen2Config

from flexgen import OptLM, Policy
from flexgen.engine.completion import Completion
from flexgen.kernels.loading import native_available
from flexgen.runtime import recorded
from flexgen.runtime.choice import Sampled
from flexgen.runtime.prompts import Prompts
from flexgen.runtime.recorded import RecordedCells
from flexgen.runtime.request import read_request

SHAPE = dict(
    vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=300
)
LLAMA = LlamaConfig(num_key_value_heads=2, intermediate_size=128, **SHAPE)
GELU = LlamaConfig(num_key_value_heads=2, intermediate_size=128, hidden_act="gelu", **SHAPE)
WINDOWED = MistralConfig(num_key_value_heads=2, intermediate_size=128, sliding_window=8, **SHAPE)
OPT = OPTConfig(word_embed_proj_dim=64, ffn_dim=128, **SHAPE)
PROMPTS = [list(range(5, 25)), list(range(25, 45)), list(range(9, 29))]
NEW = 12
ALL_ON_DEVICE = {name: {"gpu": 100} for name in ("weights", "cache", "activations")}

pytestmark = pytest.mark.skipif(not native_available(), reason="no compiled kernels here")


@pytest.fixture
def calls(monkeypatch):
    """For each call that replays tapes: the number of tapes, and by how many tokens they are later."""
    found, replay = [], recorded.replay

    def counted(tapes, later):
        found.append((len(tapes), later))
        return replay(tapes, later)

    monkeypatch.setattr(recorded, "replay", counted)
    # With instructions for tiles of bfloat16, a library would multiply its own layout of a matrix.
    monkeypatch.setattr("flexgen.kernels.half_linear._rows", lambda dtype: 64)
    return found


@pytest.fixture
def replays(calls, monkeypatch):
    """`calls` with one tape each."""
    monkeypatch.setattr(RecordedCells, "joins", lambda cells, layer, batch: False)
    return calls


def policy(batches=1, weights="cpu", codec="none", rows=1):
    return Policy(
        gpu_batch_size=rows,
        num_gpu_batches=batches,
        weights={weights: {"percent": 100, "codec": codec}},
        cache={"cpu": 100},
        activations={"cpu": 100},
    )


def generated(prompts, config=LLAMA, own=None, dtype="bfloat16", new=NEW, stop=(), device="cpu", **options):
    own = own or policy()
    with OptLM(config, own, device=device, weights="dummy", dtype=dtype, progress=False, **options) as model:
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
    # The first token is that of the prompt.
    assert replays == [(1, later) for later in range(NEW - 1) for _ in range(2 * 3 + 1)]


@pytest.mark.parametrize("batches", [1, 2])
def test_all_cells_are_recorded_before_the_first_one_is_computed(calls, monkeypatch, batches):
    replayed, record = [], recorded.record

    def watched(*args):
        replayed.append(len(calls))
        return record(*args)

    monkeypatch.setattr(recorded, "record", watched)
    generated(PROMPTS[:batches], own=policy(batches))
    assert replayed == [0] * 7 * batches and calls


def test_positions_are_computed_for_the_prompt_and_the_recording_only(calls, monkeypatch):
    found, positions = [], Prompts.positions

    def watched(prompts, cell):
        found.append(cell.number)
        return positions(prompts, cell)

    monkeypatch.setattr(Prompts, "positions", watched)
    generated(PROMPTS[:1])
    assert calls and found == [0, 1]


def test_tapes_continue_on_the_next_page_of_the_cache(replays, monkeypatch):
    expected = without_tapes(monkeypatch, PROMPTS[:1], new=200)
    assert generated(PROMPTS[:1], new=200) == expected and len(replays) == 199 * 7


@pytest.mark.parametrize("batches", [1, 2])
def test_passes_with_and_without_guesses_have_tapes_of_their_own(replays, monkeypatch, batches):
    """Two rows of each batch have different numbers of tokens. Some passes have guesses, and some have none."""
    prompts, own = PROMPTS + [PROMPTS[0][::-1]], replace(policy(batches, rows=2), guess=3)
    widths = []
    serves = RecordedCells.serves

    def watched(cells, cell, rows, weights):
        widths.append(cell.span.new)
        return serves(cells, cell, rows, weights)

    monkeypatch.setattr(RecordedCells, "serves", watched)
    free = without_tapes(monkeypatch, prompts, own=replace(own, guess=0), new=30)

    def guessed():
        def propose(ids, count):
            text = next(text for text in free if text[:20] == ids[:20].tolist())
            return text[len(ids) : len(ids) + count] if len(ids) % 9 < 5 or text[0] == 5 else []

        with OptLM(LLAMA, own, device="cpu", weights="dummy", dtype="bfloat16", progress=False) as model:
            request = read_request(model.spec, prompts[: 2 * batches])
            return model.generate_with(Completion(request, 30, Sampled(), propose=propose)).tolist()

    with monkeypatch.context() as patch:
        patch.setattr(recorded, "MIN_TOKENS", 1000)
        expected = guessed()
    assert not replays
    assert guessed() == expected and len(replays) > 20
    assert {1, 4} <= set(widths)


@pytest.mark.parametrize("sep_layer", [True, False])
def test_several_batches_and_rows(replays, monkeypatch, sep_layer):
    prompts = PROMPTS + [PROMPTS[0][::-1]]
    own = replace(policy(batches=2, rows=2), sep_layer=sep_layer)
    expected = without_tapes(monkeypatch, prompts, own=own)
    assert generated(prompts, own=own) == expected
    assert len(replays) == (NEW - 1) * 2 * (7 if sep_layer else 4)


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
    assert len(replays) == (3 + 1) * (NEW - 1)


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
    monkeypatch.setattr(recorded, "MOST_BYTES", 1024)
    assert generated(PROMPTS[:1]) == expected
    assert 0 < len(replays) < (NEW - 1) * 7


def test_further_layers_need_no_further_memory(monkeypatch):
    def kept(layers):
        """Bytes of the results of all tapes."""
        results, record = {}, recorded.record

        def watched(*args):
            y, tape = record(*args)
            results.update((tensor.data_ptr(), (tensor.nbytes, tape)) for tensor in tape.tensors)
            return y, tape

        with monkeypatch.context() as patch:
            patch.setattr(recorded, "record", watched)
            generated(PROMPTS[:1], config=LlamaConfig(**LLAMA.to_dict() | {"num_hidden_layers": layers}))
        return sum(nbytes for nbytes, _ in results.values())

    assert kept(5) == kept(2) > 0


def test_threads_may_change_between_calls(replays):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = generated(PROMPTS[:1])
        torch.set_num_threads(2)
        assert generated(PROMPTS[:1]) == one
    finally:
        torch.set_num_threads(before)


# Several layers in one call


def without_joining(monkeypatch, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(RecordedCells, "joins", lambda cells, layer, batch: False)
        return generated(*args, **kwargs)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("codec", ["none", "int4"])
def test_if_nothing_moves_one_call_replays_all_layers_of_a_pass(calls, monkeypatch, codec, rows):
    own, prompts = policy(codec=codec, rows=rows), PROMPTS[:rows]
    expected = without_tapes(monkeypatch, prompts, own=own)
    assert generated(prompts, own=own) == expected
    assert calls == [(7, later) for later in range(NEW - 1)]  # with the head


@pytest.mark.parametrize(
    "options",
    [
        {"own": policy(batches=3)},
        {"own": replace(policy(), cache={"disk": 100})},
        {"own": replace(policy(), activations={"disk": 100})},
        {"own": Policy(gpu_batch_size=1, **ALL_ON_DEVICE), "device": "emulated"},
    ],
    ids=["several batches", "cache", "activations", "a link"],
)
def test_layers_are_replayed_one_by_one_if_data_may_move_between_them(calls, monkeypatch, options, tmp_path):
    prompts = PROMPTS[: options.get("own", policy()).num_gpu_batches]
    expected = without_tapes(monkeypatch, prompts, offload_dir=tmp_path, **options)
    assert generated(prompts, offload_dir=tmp_path, **options) == expected
    assert {tapes for tapes, _ in calls} == {1}


def test_layers_without_a_tape_separate_those_that_are_replayed_together(calls, monkeypatch):
    kinds = ["full_attention", "full_attention", "sliding_attention"]
    mixed = Qwen2Config(
        num_key_value_heads=2, intermediate_size=128, use_sliding_window=True, sliding_window=8,
        max_window_layers=2, layer_types=kinds, **SHAPE,
    )  # fmt: skip
    expected = without_tapes(monkeypatch, PROMPTS[:1], config=mixed)
    assert generated(PROMPTS[:1], config=mixed) == expected
    # The attention and the MLP of two layers, then the last MLP and the head.
    assert calls == [(tapes, later) for later in range(NEW - 1) for tapes in (4, 2)]


@pytest.mark.parametrize("stop_after", [1, 2, 5])
def test_rows_that_end_between_passes_with_joined_layers(calls, monkeypatch, stop_after):
    own = policy(rows=3)
    plain = without_tapes(monkeypatch, PROMPTS, own=own)
    stop = [row[len(PROMPTS[0]) + stop_after] for row in plain[:2]]
    expected = without_tapes(monkeypatch, PROMPTS, own=own, stop=stop, new=30)
    calls.clear()
    assert generated(PROMPTS, own=own, stop=stop, new=30) == expected
    assert calls == [] or max(tapes for tapes, _ in calls) == 7


def test_the_trace_has_an_event_for_each_cell(calls, monkeypatch):
    traces = []
    for joins in (True, False):
        with monkeypatch.context() as patch:
            if not joins:
                patch.setattr(RecordedCells, "joins", lambda cells, layer, batch: False)
            with OptLM(
                LLAMA, policy(), device="cpu", weights="dummy", dtype="bfloat16", progress=False
            ) as model:
                model.generate(PROMPTS[:1], NEW)
                traces.append(model.stats.timing.trace.events)
        assert (7 in [tapes for tapes, _ in calls]) is joins
        calls.clear()
    joined, single = traces
    assert [event.step for event in joined] == [event.step for event in single]
    assert all(event.start <= event.end for event in joined)
    assert all(a.end <= b.start for a, b in pairwise(joined))


def test_each_token_of_a_choice_for_the_whole_call(calls, monkeypatch):
    class WholeCall(Sampled):
        whole_call = True

    expected = without_tapes(monkeypatch, PROMPTS[:1])
    with OptLM(LLAMA, policy(), device="cpu", weights="dummy", dtype="bfloat16", progress=False) as model:
        request = Completion(read_request(model.spec, PROMPTS[:1]), NEW, WholeCall())
        assert model.generate_with(request).tolist() == expected
    assert calls == [(7, later) for later in range(NEW - 1)]
