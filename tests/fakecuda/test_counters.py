"""What a call asks of the host and of the driver, by the counters of the simulated runtime."""

import threading

import pytest

pytest.importorskip("simulated", reason="runs on the simulated GPU: `make test-cuda`")

from piece_sizes import piece_sizes
from simulated import cases, runtime
from simulated.numbers import Numbers
from simulated.threads import in_every_thread
from transformers import OPTConfig

from flexgen import Policy
from flexgen.engine.completion import Completion
from flexgen.runtime.choice import Sampled
from flexgen.runtime.layer_runner import LayerRunner
from flexgen.runtime.request import read_request

ONE_LAYER = OPTConfig(
    vocab_size=32, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
    max_position_embeddings=2050,
)  # fmt: skip


def test_events_of_2000_tokens_are_no_more_than_those_of_100():
    policy = Policy(gpu_batch_size=1, weights={"cpu": 100}, cache={"gpu": 100}, activations={"gpu": 100})
    most = []
    with cases.open_on("cuda", ONE_LAYER, policy) as model:
        for tokens in (100, 2000):
            runtime.reset()
            model.generate([[3, 4, 5]], tokens, stop=())
            most.append(runtime.counters().most_events)
            assert len(model.stats.timing.trace.events) > 6 * tokens
    assert runtime.counters().live_events == 0
    assert most[1] < 1.2 * most[0] < 1200


def of_a_call(model, tokens, **options):
    """The host's waits and the bytes copied in `generate` of this number of tokens."""
    runtime.reset()
    model.generate(cases.PROMPTS, tokens, stop=(), **options)
    counted = runtime.counters()
    return counted.host_waits, counted.copied


@pytest.mark.parametrize("attend_on", ["gpu", "cpu"])
def test_a_token_waits_for_events_only_and_copies_pinned_memory_only(attend_on):
    with cases.open_on("cuda", cases.OPT, cases.policy(attend_on=attend_on)) as model:
        (few_waits, few_copies), (waits, copies) = of_a_call(model, 4), of_a_call(model, 24)
    more = {name for name in waits if waits[name] != few_waits.get(name)}
    assert more == {"cudaEventSynchronize"}
    assert {kind for kind in copies if copies[kind] != few_copies.get(kind)} == {
        "d2d",
        "d2h pinned",
        "h2d pinned",
    }


MIXTURES = {
    "torch": (cases.MIXTURE, "bfloat16", cases.RESIDENT),
    "one launch": (cases.MIXTURE, "float16", cases.RESIDENT),
    "biased": (cases.GPT_OSS, "float16", cases.RESIDENT),
    "from all tiers": (cases.MIXTURE, "float16", {}),
    "int4": (cases.MIXTURE, "float16", cases.RESIDENT | dict(weights=cases.encoded("int4", {"gpu": 100}))),
    "fp8 from all tiers": (cases.MIXTURE, "bfloat16", dict(weights=cases.encoded("fp8"))),
    "windows": (cases.MISTRAL, "float16", cases.RESIDENT),
    "windows on all tiers": (cases.MISTRAL, "float16", {}),
}


@pytest.mark.parametrize(
    ("name", "graphs"),
    [(name, False) for name in MIXTURES]
    + [(name, True) for name in ("torch", "one launch", "biased", "windows")],
)
def test_a_token_of_a_mixture_or_with_windows_waits_for_ids_only(name, graphs, grouped_kernels, monkeypatch):
    """The host does not wait for the routes of tokens, and uploads nothing from pageable memory."""
    config, dtype, changes = MIXTURES[name]
    if not graphs:
        monkeypatch.setattr("flexgen.runtime.graphs.MIN_TOKENS", 1000)
    with (
        piece_sizes(page_tokens=4, memory_page_tokens=4),
        cases.open_on("cuda", config, cases.policy(**changes), dtype) as model,
    ):
        model.generate(cases.PROMPTS, 14, stop=())  # uploads tables, and has memory for graphs
        (few_waits, few_copies), (waits, copies) = of_a_call(model, 14), of_a_call(model, 34)
    more = {name for name in waits if waits[name] != few_waits.get(name)}
    assert more == {"cudaEventSynchronize"}
    kinds = {kind for kind in copies if copies[kind] != few_copies.get(kind)}
    assert kinds <= {"d2d", "d2h pinned", "h2d pinned"}
    if changes is cases.RESIDENT:
        assert copies["d2h pinned"] - few_copies["d2h pinned"] == 20 * len(cases.PROMPTS) * 8, "ids"


def test_numbers_that_ids_are_drawn_by_come_from_pinned_memory():
    options = dict(do_sample=True, seed=0)
    with cases.open_on("cuda", cases.OPT, cases.policy(**cases.RESIDENT)) as model:
        (_, few), (_, copies) = of_a_call(model, 4, **options), of_a_call(model, 24, **options)
    more = {kind: copies[kind] - few.get(kind, 0) for kind in copies}
    assert more["h2d pinned"] == 20 * len(cases.PROMPTS) * 8
    assert not more.get("h2d pageable")


def test_ids_do_not_come_back_to_the_device_that_has_chosen_them():
    with cases.open_on("cuda", cases.OPT, cases.policy(**cases.RESIDENT)) as model:
        (_, few), (_, copies) = of_a_call(model, 4), of_a_call(model, 24)
    more = {kind: copies[kind] - few.get(kind, 0) for kind in copies}
    assert more["h2d pinned"] == 0
    assert more["d2h pinned"] == 20 * len(cases.PROMPTS) * 8


def test_the_next_token_is_issued_while_the_host_takes_the_ids(monkeypatch):
    """A listener of the first ids waits until the second token's last layer but the head has been issued."""
    issued, waited = threading.Event(), []
    compute = LayerRunner.compute

    def watched(runner, cell):
        compute(runner, cell)
        if (cell.token, cell.layer) == (1, len(runner._model.layers) - 2):
            issued.set()

    def listen(new):
        if new.token == 0:
            waited.append(issued.wait(20))

    monkeypatch.setattr(LayerRunner, "compute", watched)
    policy = cases.policy(**cases.RESIDENT, num_gpu_batches=1)
    with cases.open_on("cuda", cases.OPT, policy) as model:
        request = read_request(model.spec, cases.PROMPTS[:3], None)
        model.generate_with(Completion(request, 3, Sampled()), listeners=[listen])
    assert waited == [True]


@pytest.mark.parametrize("pin", [True, False])
def test_a_model_on_the_second_gpu_makes_no_context_on_the_first(pin):
    runtime.reset()
    policy = cases.policy(attend_on="cpu", pin_weight=pin)
    # With right numbers: what is drawn from others may be no id, and no row of a table in host memory.
    with in_every_thread(Numbers), cases.open_on("cuda:1", cases.OPT, policy) as model:
        model.generate(cases.PROMPTS, 4, do_sample=True, seed=0, stop=())
        model.forward(cases.PROMPTS)
        model.lane_seconds(cases.PROMPTS[:3], 3)
    with runtime.refusing_to_pin(), cases.open_on("cuda:1", cases.OPT, policy):
        pass
    assert set(runtime.counters().contexts) == {"1"}


def test_results_of_a_forward_pass_come_through_pinned_memory():
    """A copy to the caller's own memory would block the thread that issues the steps."""
    with cases.open_on("cuda", cases.OPT, cases.policy()) as model:
        request = read_request(model.spec, cases.PROMPTS, None)
        runtime.reset()
        model.forward_with(request, hidden_states=True)
        counted = runtime.counters()
    assert "d2h pageable" not in counted.copied and "pageable copy from the device" not in counted.host_waits
