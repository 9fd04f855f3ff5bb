"""Ids on the simulated GPU equal those on the CPU. Downloads arrive only when the host has waited for them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("simulated", reason="runs on the simulated GPU: `make test-cuda`")

from piece_sizes import piece_sizes
from simulated import cases, runtime
from simulated.numbers import Numbers
from simulated.threads import in_every_thread

from flexgen.engine.completion import Completion
from flexgen.errors import LaneError
from flexgen.kernels import grouped
from flexgen.kernels.attention import decode_part
from flexgen.kernels.heads import HeadFormat
from flexgen.kernels.partial import merge
from flexgen.kernels.scoring import Scoring, Window
from flexgen.kernels.shared_prefix import attend_prefix
from flexgen.models.embed import InputEmbed
from flexgen.models.ops import causal_part
from flexgen.quant import CODECS
from flexgen.runtime.request import read_request
from flexgen.runtime.sampler import INVALID


@settings(max_examples=20, phases=cases.WITHOUT_SHRINKING)
@given(
    config=st.sampled_from([cases.OPT, cases.LLAMA]),
    policy=cases.policies(exact=True),
    order=cases.orders(),
    stop=st.sampled_from([(), tuple(range(0, cases.VOCAB, 3))]),
)
def test_ids_are_those_of_the_cpu(config, policy, order, stop):
    expected = cases.ids_on("cpu", config, policy, stop)
    runtime.reset()
    with in_every_thread(Numbers):
        found = cases.ids_on("cuda", config, policy, stop, order=order)
    np.testing.assert_array_equal(found, expected)
    assert runtime.counters().hazards == 0


@pytest.mark.parametrize("config", [cases.MISTRAL, cases.GEMMA2, cases.BLOOM], ids=lambda c: c.model_type)
@settings(max_examples=5, phases=cases.WITHOUT_SHRINKING)
@given(
    policy=cases.policies(exact=True),
    order=cases.orders(),
    stop=st.sampled_from([(), tuple(range(0, cases.VOCAB, 3))]),
)
def test_ids_with_windows_caps_and_alibi_are_those_of_the_cpu(config, policy, order, stop):
    """Pages of 4 tokens, so that a window of 5 is a ring of two pages."""
    expected = cases.ids_on("cpu", config, policy, stop)
    runtime.reset()
    with piece_sizes(page_tokens=4, memory_page_tokens=4), in_every_thread(Numbers):
        found = cases.ids_on("cuda", config, policy, stop, order=order)
    np.testing.assert_array_equal(found, expected)
    assert runtime.counters().hazards == 0


@pytest.mark.parametrize("attend_on", ["gpu", "cpu"])
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(
    "config", [cases.GPT_OSS, cases.LLAMA4, cases.GEMMA4, cases.MIMO], ids=lambda c: c.model_type
)
def test_ids_with_sinks_chunks_and_uneven_heads_are_those_of_the_cpu(config, resident, attend_on):
    """The text grows past the windows and chunks of 5; a ring has two pages."""
    policy = cases.policy(**cases.RESIDENT) if resident else cases.policy(attend_on=attend_on)
    with piece_sizes(page_tokens=4, memory_page_tokens=4):
        expected = cases.ids_on("emulated", config, policy)
        runtime.reset()
        with in_every_thread(Numbers):
            found = cases.ids_on("cuda", config, policy)
    np.testing.assert_array_equal(found, expected)
    assert runtime.counters().hazards == 0


@pytest.mark.parametrize(
    "changes", [{}, cases.RESIDENT, dict(sep_layer=False)], ids=["thirds", "resident", "blocks"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ids_of_a_mixture_are_those_of_the_cpu(dtype, changes, monkeypatch):
    """In bfloat16 with everything on the GPU, experts are multiplied together."""
    policy, together = cases.policy(**changes), []
    expected = cases.ids_on("emulated", cases.MIXTURE, policy, dtype=dtype)
    runtime.reset()
    product = grouped.grouped_linear
    monkeypatch.setattr(grouped, "grouped_linear", lambda *of: together.append(of) or product(*of))
    with in_every_thread(Numbers):
        found = cases.ids_on("cuda", cases.MIXTURE, policy, dtype=dtype)
    np.testing.assert_array_equal(found, expected)
    assert runtime.counters().hazards == 0
    assert bool(together) == (dtype == "bfloat16" and changes is cases.RESIDENT)


@pytest.mark.parametrize("changes", [{}, cases.RESIDENT, dict(sep_layer=False)], ids=str)
@pytest.mark.parametrize("codec", ["none", "int4", "int8", "fp8"])
@pytest.mark.parametrize("config", [cases.MIXTURE, cases.GPT_OSS], ids=["plain", "biased"])
def test_ids_of_a_mixture_whose_experts_are_multiplied_in_one_launch(config, codec, changes, grouped_kernels):
    """In float32, for which torch has no grouped product; with matrices on all tiers, and with biases."""
    shares = changes.get("weights", cases.THIRDS)
    policy = cases.policy(**changes | dict(weights=cases.encoded(codec, shares)))
    expected = cases.ids_on("emulated", config, policy)
    runtime.reset()
    with in_every_thread(Numbers):
        found = cases.ids_on("cuda", config, policy)
    np.testing.assert_array_equal(found, expected)
    assert runtime.counters().hazards == 0
    assert grouped_kernels.calls > 20


@pytest.mark.parametrize(
    "changes",
    [{}, dict(cache=cases.encoded("int4", {"cpu": 50, "disk": 50})), dict(attn_sparsity=0.5)],
    ids=["plain", "int4", "sparse"],
)
def test_attention_reads_all_pages_from_the_link_together(changes, monkeypatch):
    monkeypatch.setattr(HeadFormat, "joined_bytes", 4 << 10)  # a row at a time
    policy = cases.policy(**dict(cache={"cpu": 50, "disk": 50}, attend_on="gpu") | changes)
    with piece_sizes(page_tokens=4, memory_page_tokens=4):
        expected = cases.ids_on("emulated", cases.LLAMA, policy)
        with in_every_thread(Numbers):
            found = cases.ids_on("cuda", cases.LLAMA, policy)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("window", [None, Window(20), Window(25, chunked=True)])
def test_parts_of_attention_merge_to_those_of_the_cpu(dtype, window):
    """With and without torch's fused attention, for the tokens of a prompt and for one token."""
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randn(2, 2, 30, 16, generator=generator).to(dtype)
    own = torch.randn(2, 3, 2, 9, 16, generator=generator).to(dtype)
    scoring = Scoring(0.25, window=window)
    for new in (9, 1):
        q = torch.randn(3, 4, new, 16, generator=generator).to(dtype)
        positions = None if window is None else torch.full((3,), 30 + 9 - new)

        def merged(device, new=new, query=q, positions=positions):
            there = [x.to(device) for x in (query, prefix, own)]
            at = None if positions is None else positions.to(device)
            q, (k, v), mine = there
            after = scoring.after(30)
            part = causal_part(q, *mine, None, after) if new > 1 else decode_part(q, [mine], 9, None, after)
            return merge([attend_prefix(q, k, v, scoring, at), part], dtype).cpu()

        with in_every_thread(Numbers):
            found = merged("cuda")
        torch.testing.assert_close(
            found, merged("cpu"), rtol=0, atol=1e-6 if dtype is torch.float32 else 4e-3
        )


class _Best:
    """The best id, for all rows of the call at once or batch by batch; ids that 7 divides end a row."""

    can_end = True
    by_logits = False

    def __init__(self, whole_call):
        self.whole_call = whole_call

    def choose(self, logits, rows, token):
        return logits.argmax(-1)

    def ends(self, ids, rows, token):
        return ids % 7 == 0


@pytest.mark.parametrize("whole_call", [False, True])
def test_ids_that_stay_on_the_gpu(whole_call):
    """Batches are regrouped, rows that have ended get the pad id, and a listener hears what the result has."""
    found = {}
    for device in ("cpu", "cuda"):
        heard = {}

        def listen(new, heard=heard):
            heard.update({(row, new.token): i for row, i in zip(new.rows, new.ids.tolist(), strict=True)})

        policy = cases.policy(**cases.RESIDENT)
        with in_every_thread(Numbers), cases.open_on(device, cases.LLAMA, policy) as model:
            request = read_request(model.spec, cases.PROMPTS, None)
            ids = model.generate_with(Completion(request, 8, _Best(whole_call)), listeners=[listen])
            assert all(ids[row, request.width + token] == i for (row, token), i in heard.items())
        found[device] = ids
    np.testing.assert_array_equal(found["cuda"], found["cpu"])


def test_no_id_that_is_invalid_is_embedded():
    """The host refuses it, but the next token may have been computed by then."""
    read = []

    class Broken(_Best):
        can_end = False

        def choose(self, logits, rows, token):
            return torch.full((len(rows),), INVALID if token else 1, device=logits.device)

    embed = InputEmbed._embed

    def watched(layer, ids, *rest):
        read.append(ids.cpu())
        return embed(layer, ids, *rest)

    with pytest.MonkeyPatch.context() as patch, in_every_thread(Numbers):
        patch.setattr(InputEmbed, "_embed", watched)
        with cases.open_on("cuda", cases.OPT, cases.policy(**cases.RESIDENT)) as model:
            request = read_request(model.spec, cases.PROMPTS, None)
            with pytest.raises(LaneError, match="NaN or infinite at new token 1"):
                model.generate_with(Completion(request, 8, Broken(False)))
    assert len(read) > 3 and all((ids >= 0).all() for ids in read)


# Codecs that searches skip round activations on a CPU and not on a GPU, so their ids differ.
@pytest.mark.parametrize("codec", sorted(name for name, codec in CODECS.items() if codec.searched))
@pytest.mark.parametrize("attend_on", ["gpu", "cpu"])
def test_encoded_weights_and_cache(codec, attend_on):
    policy = cases.policy(weights=cases.encoded(codec), cache=cases.encoded(codec), attend_on=attend_on)
    expected = cases.ids_on("emulated", cases.LLAMA, policy)
    with in_every_thread(Numbers):
        found = cases.ids_on("cuda", cases.LLAMA, policy)
    np.testing.assert_array_equal(found, expected)


def test_logits_of_all_positions():
    policy = cases.policy()
    with cases.open_on("cpu", cases.OPT, policy) as model:
        expected = model.forward(cases.PROMPTS)
    with in_every_thread(Numbers), cases.open_on("cuda", cases.OPT, policy) as model:
        found = model.forward(cases.PROMPTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_drawn_ids_are_those_of_the_cpu():
    policy, found = cases.policy(**cases.RESIDENT), {}
    runtime.reset()
    for device in ("cpu", "cuda"):
        with in_every_thread(Numbers), cases.open_on(device, cases.OPT, policy) as model:
            found[device] = model.generate(cases.PROMPTS, 6, stop=(), do_sample=True, top_k=9, seed=3)
    np.testing.assert_array_equal(found["cuda"], found["cpu"])
    assert runtime.counters().hazards == 0


@pytest.mark.parametrize("attend_on", ["gpu", "cpu"])
@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
def test_a_conversation(tier, attend_on):
    policy = cases.policy(cache={tier: 100}, attend_on=attend_on, prefill_chunk=3)
    with piece_sizes(page_tokens=4, memory_page_tokens=4), cases.open_on("cpu", cases.LLAMA, policy) as model:
        first = model.generate([[5, 6, 7, 8, 9, 10, 11]], 6, stop=())[0]
        second = model.generate([[*first, 12, 13, 14, 15, 16]], 6, stop=())[0]
    with (
        piece_sizes(page_tokens=4, memory_page_tokens=4),
        in_every_thread(Numbers),
        cases.open_on("cuda", cases.LLAMA, policy) as model,
        model.conversation() as chat,
    ):
        np.testing.assert_array_equal(chat.generate(first[:7], 6, stop=()), first)
        np.testing.assert_array_equal(chat.generate(second[:18], 6, stop=()), second)
        assert chat.stats.positions_computed == 6
