"""Which host memory is pinned, for how long, and how much of it."""

import gc
import os
import traceback
import warnings
from pathlib import Path

import pytest

pytest.importorskip("simulated", reason="runs on the simulated GPU: `make test-cuda`")

from simulated import cases, runtime

from flexgen.engine.completion import Completion
from flexgen.memory import machine as machines
from flexgen.memory.cpu import HostStore
from flexgen.memory.machine import Machine
from flexgen.policy import Tier
from flexgen.runtime.request import read_request
from flexgen.units import MIB


@pytest.fixture
def pinned():
    """Bytes that this test has pinned. torch keeps some hundred that earlier tests used for random numbers."""
    before = runtime.counters().pinned
    return lambda: runtime.counters().pinned - before


def test_pinned_buffers_are_kept_from_call_to_call_and_given_back_at_the_end(pinned):
    with cases.open_on("cuda", cases.OPT, cases.policy()) as model:
        opened = pinned()
        model.generate(cases.PROMPTS, 4, stop=())
        first = runtime.counters()
        model.generate(cases.PROMPTS, 4, stop=())
        second = runtime.counters()
        assert second.registrations == first.registrations and second.pinned == first.pinned
        assert pinned() > opened
        model.generate(cases.PROMPTS, 40, stop=())  # a larger cache, which takes the place of what was kept
        host = model._machine.host
        assert host.pinned == pinned() == host.used + host.spare
    assert pinned() == 0


def test_cache_that_the_host_attends_to_is_not_pinned():
    """Only what crosses the link is: prompts, staging, queries and answers."""
    shares = {"gpu": 0, "cpu": 50, "disk": 50}
    pinned = {}
    for attend_on in ("gpu", "cpu"):
        policy = cases.policy(
            weights={"gpu": 100}, cache=shares, activations={"gpu": 100}, attend_on=attend_on
        )
        with cases.open_on("cuda", cases.OPT, policy) as model:
            model.generate(cases.PROMPTS, 100, stop=())
            pinned[attend_on] = runtime.counters().pinned
            cache = model.stats.plan.on(Tier.CPU, "cache")
    assert pinned["cpu"] < cache / 4 < cache / 2 < pinned["gpu"]


def test_a_share_of_what_is_free_stays_pageable(monkeypatch, caplog, pinned):
    monkeypatch.setattr(machines, "available_bytes", lambda cached: 100 * MIB)
    machine = Machine.open("cuda")
    try:
        assert machine.limits()[Tier.CPU] == 95 * MIB
        buffers = [machine.host.allocate(40 * MIB, "weights") for _ in range(2)]
        assert pinned() == 80 * MIB and not machine.host.pageable
        swappable = machine.host.allocate(10 * MIB, "KV cache")
        assert pinned() == 80 * MIB and machine.host.pageable
        assert "KV cache: cannot pin 10 MiB" in caplog.text and "80 MiB of at most 80 MiB" in caplog.text
        for buffer in (*buffers, swappable):
            machine.host.release(buffer)
    finally:
        machine.close()
    assert pinned() == 0


def test_what_is_kept_gives_way_to_what_is_needed(monkeypatch):
    free = 100 * MIB
    monkeypatch.setattr(machines, "available_bytes", lambda cached: free)
    machine = Machine.open("cuda")
    try:
        machine.limits()
        machine.host.release(machine.host.allocate(40 * MIB, "a call's cache"))
        assert (machine.host.used, machine.host.spare) == (0, 40 * MIB)
        free = 20 * MIB  # without the retained buffer; another program has taken the rest
        assert machine.limits()[Tier.CPU] == 59 * MIB
        buffer = machine.host.allocate(30 * MIB, "a cache that is never copied", copied_by_device=False)
        assert (machine.host.used, machine.host.spare) == (30 * MIB, 0)
        machine.host.release(buffer)
        assert (machine.host.used, machine.host.spare) == (0, 0)
    finally:
        machine.close()


def mapped(buffer):
    """Whether its first byte is in the address space of this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = ([int(end, 16) for end in line.split()[0].split("-")] for line in lines)
    return any(begin <= buffer.data_ptr() < end for begin, end in spans)


def forked(work):
    """The exit status of a child in which `work` returns it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from forks with threads
        child = os.fork()
    if not child:
        status = 99
        try:
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def test_a_forked_child_has_no_pages_of_pinned_memory():
    store = HostStore(pin_for=cases.GPU)
    pinned = store.allocate(MIB, "weights")
    pageable = store.allocate(MIB, "a cache that is never copied", copied_by_device=False).fill_(1)
    seen = forked(lambda: mapped(pinned) + 2 * mapped(pageable))
    store.close()
    assert seen == 2


@pytest.mark.parametrize("where", ["in a lane's thread", "in the caller's thread"])
def test_a_child_that_is_forked_within_a_call_leaves_the_gpu_alone(where, pinned):
    """CUDA cannot be used in it, and it has no pages of pinned memory."""
    found = []

    def give_back():
        nonlocal model, stream
        before = runtime.counters()
        if stream is not None:
            stream.close()
        model.close()
        model = stream = None
        gc.collect()  # buffers give themselves back
        return 7 if runtime.counters() == before else 1

    def listen(new):
        if where == "in a lane's thread" and not found:
            found.append(forked(give_back))

    model, stream = cases.open_on("cuda", cases.OPT, cases.policy()), None
    with cases.valid_ids():
        model.generate_with(
            Completion(read_request(model.spec, cases.PROMPTS), 4, model.sampled(stop=())), listeners=[listen]
        )
        stream = model.stream(cases.PROMPTS, 4, stop=())
        for _ in stream:
            if where == "in the caller's thread" and not found:
                found.append(forked(give_back))
    assert found == [7] and pinned() > 0
    model.close()
    assert pinned() == 0
