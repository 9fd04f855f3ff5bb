"""To the first layer, gathered rows are a table like the whole one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import OPTConfig

from flexgen.layout.placement import place_weights
from flexgen.layout.plan import Target, plan_memory
from flexgen.layout.topology import LINKED, SHARED
from flexgen.layout.weight_slots import decoded_bytes, decodes, decoding_bytes
from flexgen.memory.homes import Homes
from flexgen.memory.lookup import open_table
from flexgen.models import build_layers, open_model
from flexgen.policy import Policy, Tier
from flexgen.runtime.lookup import Lookup
from flexgen.workload import Workload

VOCAB, WIDTH = 300, 64
CONFIG = OPTConfig(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, ffn_dim=48,
    max_position_embeddings=48, word_embed_proj_dim=WIDTH,
)  # fmt: skip
SPEC, DUMMY = open_model(CONFIG, weights="dummy")
LAYERS = build_layers(SPEC)
CASES = [("cpu", "disk"), ("emulated", "disk"), ("emulated", "cpu")]
cases = pytest.mark.parametrize(("device", "tier"), CASES)
codecs = pytest.mark.parametrize("codec", ["none", "int4", "fp8"])


@contextmanager
def lookup_on(
    machine: Any, device: str, tier: str, codec: str, tokens: int
) -> Iterator[tuple[Any, Lookup, Tensor]]:
    """A machine, a lookup on it, and the whole table as its codec keeps it."""
    policy = Policy(weights={tier: {"percent": 100, "codec": codec}})  # type: ignore[dict-item]
    placement = place_weights(LAYERS, policy.weights, torch.float32)
    with machine(device) as m:
        homes = Homes(DUMMY, placement, m)
        homes.load(LAYERS[:1])
        table = open_table(LAYERS, homes, m)
        assert table is not None
        whole = DUMMY.read(table.weight, torch.float32)
        if table.codec is not None:
            table.codec.decode(table.codec.encode(whole.clone()), whole)
        before = {store: store.used for store in (m.host, m.device.memory)}
        lookup = Lookup(table, tokens, torch.float32, m)
        yield m, lookup, whole
        lookup.close()
        assert {store: store.used for store in before} == before
        m.host.close()  # what the weights took
        m.device.memory.close()
        for path in m.disk.root.rglob("*.safetensors*"):
            path.unlink()


@codecs
@cases
def test_looking_up_gathered_rows_gives_what_the_table_gives(
    device: str, tier: str, codec: str, machine: Any, run: Any
) -> None:
    with lookup_on(machine, device, tier, codec, tokens=24) as (_, lookup, whole):
        random = torch.Generator().manual_seed(0)
        drawn = [torch.randint(0, VOCAB, (3, 8), generator=random) for _ in range(4)]
        drawn += [torch.tensor([[VOCAB - 1], [0], [VOCAB - 1]]), torch.full((3, 8), 5)]
        for n, ids in enumerate(drawn):
            other = drawn[n - 1]
            run(lookup.load(ids, slot=0))
            run(lookup.load(other, slot=1))  # two cells on their way do not meet
            for asked, slot in ((ids, 0), (other, 1)):
                x, rows = lookup.take(asked.shape, slot)
                assert x.shape == asked.shape and rows.shape == (24, WIDTH)
                assert torch.equal(F.embedding(x, rows), F.embedding(asked, whole))


@cases
def test_ids_are_read_when_the_work_is_done(device: str, tier: str, machine: Any, run: Any) -> None:
    with lookup_on(machine, device, tier, "none", tokens=4) as (_, lookup, whole):
        ids = torch.tensor([[1, 2]])
        chains = lookup.load(ids, slot=0)
        ids.copy_(torch.tensor([[7, 9]]))  # as the newest ids are, after the step was issued
        run(chains)
        x, rows = lookup.take(ids.shape, 0)
        assert torch.equal(F.embedding(x, rows), whole[ids])


def test_only_rows_cross_the_link(machine: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with lookup_on(machine, "emulated", "cpu", "none", tokens=40) as (m, lookup, _):
        moved: list[int] = []
        copy = m.device.to_device
        monkeypatch.setattr(
            type(m.device),
            "to_device",
            lambda _, target, source: (moved.append(source.nbytes), copy(target, source)),
        )
        run(lookup.load(torch.tensor([[5], [9], [5], [5]]), slot=0))
        assert sum(moved) == 2 * WIDTH * 4 + 4 * 8  # two rows, four places


@codecs
@cases
def test_a_stage_that_runs_alone_stays_inside_its_buffers(
    device: str, tier: str, codec: str, machine: Any, run: Any
) -> None:
    """As when a lane is timed: stages of one lane run, over whatever the others have left."""
    with lookup_on(machine, device, tier, codec, tokens=24) as (_, lookup, _):
        steps = [torch.randint(0, VOCAB, (3, 8)), torch.randint(0, VOCAB, (3, 1))]
        for alone in range(2 if device == "emulated" else 1):
            for ids in (*steps, *steps[::-1]):
                for chain in lookup.load(ids, slot=0):
                    chain[alone].job()
                x, rows = lookup.take(ids.shape, 0)
                assert F.embedding(x, rows).shape == (*ids.shape, WIDTH)


@codecs
@cases
def test_what_is_taken_was_planned(device: str, tier: str, codec: str, machine: Any) -> None:
    policy = Policy(gpu_batch_size=4, num_gpu_batches=2, weights={tier: {"percent": 100, "codec": codec}})  # type: ignore[dict-item]
    placement = place_weights(LAYERS, policy.weights, torch.float32)
    topology = SHARED if device == "cpu" else LINKED
    for prompt_len in (3, 40, 100):
        with_call, without = (
            plan_memory(LAYERS, placement, policy, Target(topology), workload)
            for workload in (Workload(prompt_len, 2, 7), None)
        )
        promised = {t: with_call.on(t, "weights") - without.on(t, "weights") for t in Tier}
        # Buffers of the decoded matrices, which a call makes as well.
        tokens = [4 * prompt_len] * (len(LAYERS) - 1) + [4]
        decoding = [
            layer for layer, n in zip(LAYERS, tokens, strict=True) if decodes(layer, placement, n, topology)
        ]
        decoded = max((decoded_bytes(layer, placement) for layer in decoding), default=0)
        promised[topology.device] -= decoded
        promised[Tier.GPU] -= 0 if topology is SHARED else decoding_bytes(LAYERS, placement)
        with machine(device) as m:
            homes = Homes(DUMMY, placement, m)
            homes.load(LAYERS[:1])
            before = {t: store.used for t, store in ((Tier.CPU, m.host), (Tier.GPU, m.device.memory))}
            table = open_table(LAYERS, homes, m)
            assert table is not None
            lookup = Lookup(table, 4 * prompt_len, torch.float32, m)
            taken = {Tier.CPU: m.host.used - before[Tier.CPU], Tier.DISK: 0}
            taken[Tier.GPU] = 0 if topology is SHARED else m.device.memory.used - before[Tier.GPU]
            assert taken == promised
            lookup.close()
            m.host.close()
            m.device.memory.close()
            for path in m.disk.root.rglob("*.safetensors*"):
                path.unlink()
