"""No race under any policy and order; and with each kind of wait taken out, one is found."""

import contextlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("simulated", reason="runs on the simulated GPU: `make test-cuda`")

import torch
from simulated import cases, runtime
from simulated.numbers import Numbers
from simulated.races import watched
from simulated.threads import in_every_thread

from flexgen.memory.cuda import CudaDevice
from flexgen.memory.stream_lanes import EventDone, QueuedDone

STOPS = range(0, cases.VOCAB, 3)


def test_a_planted_race_is_found():
    with watched() as races:
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        x = torch.zeros(64, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            x.add_(1)
        with torch.cuda.stream(second):
            x * 2
        assert races.hazards.total() == 1
        second.wait_stream(first)
        with torch.cuda.stream(second):
            x * 2
    assert races.hazards.total() == 1


def test_a_pinned_buffer_is_watched():
    runtime.reset()
    pinned = torch.zeros(64, dtype=torch.uint8).pin_memory()
    there = torch.ones(64, dtype=torch.uint8, device="cuda")
    there.copy_(pinned, non_blocking=True)
    pinned.fill_(3)  # while the copy may still read it
    torch.cuda.synchronize()
    assert runtime.counters().overwritten_uploads == 1
    pinned.copy_(there, non_blocking=True)
    assert pinned.tolist() != there.cpu().tolist()  # garbage: nobody has waited for this copy's stream
    torch.cuda.synchronize()


@pytest.fixture(scope="module")
def valid_ids():
    """Without computed numbers ids are garbage, and name rows that a table does not have."""
    made = itertools.count()

    def sample(logits, *args, **options):
        ids = torch.arange(len(logits)) * 7 + next(made)
        return (ids % cases.VOCAB).to(logits.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexgen.runtime.choice.sample", sample)
        yield


@settings(max_examples=10, phases=cases.WITHOUT_SHRINKING)
@given(
    config=st.sampled_from([cases.OPT, cases.LLAMA]),
    policy=cases.policies(),
    order=cases.orders(),
    dtype=st.sampled_from(["float32", "float16"]),
)
def test_no_policy_and_order_races(config, policy, order, dtype, valid_ids):
    runtime.reset()
    with watched() as races, cases.open_on("cuda", config, policy, dtype, order=order) as model:
        model.generate(cases.PROMPTS, 4, stop=())
        model.generate(cases.PROMPTS, 6, stop=STOPS)
        model.forward(cases.PROMPTS[:4])
        torch.cuda.synchronize()
    assert races.hazards.total() == 0, str(races)
    assert runtime.counters().hazards == 0
    assert races.operations > 100


def streams_do_not_wait(patch):
    patch.setattr(EventDone, "precede", lambda done, stream: None)


def streams_do_not_wait_for_queued_copies(patch):
    patch.setattr(QueuedDone, "precede", lambda done, stream: super(QueuedDone, done).wait())


def buffers_are_not_settled(patch):
    patch.setattr(CudaDevice, "settle", lambda device: None)


def the_host_does_not_wait_for_queries(patch):
    patch.setattr(CudaDevice, "wait_for_compute", lambda device: None)


def the_host_does_not_wait_for_downloads(patch):
    patch.setattr(EventDone, "wait", lambda done: None)


@pytest.mark.parametrize(
    "wait",
    [
        streams_do_not_wait,
        streams_do_not_wait_for_queued_copies,
        buffers_are_not_settled,
        the_host_does_not_wait_for_queries,
        the_host_does_not_wait_for_downloads,
    ],
)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_wait_that_is_taken_out_is_missed(wait, overlap, monkeypatch):
    policy = cases.policy(attend_on="cpu", overlap=overlap)
    expected = cases.ids_on("cpu", cases.OPT, policy)
    wait(monkeypatch)
    runtime.reset()
    with in_every_thread(Numbers), watched() as races, contextlib.suppress(Exception):
        found = cases.ids_on("cuda", cases.OPT, policy)
        wrong = bool((found != expected).any())
        assert races.hazards.total() or runtime.counters().hazards or wrong
        return
