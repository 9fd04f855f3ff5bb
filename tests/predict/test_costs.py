"""The cost model moves the bytes that the engine moves, and computes what layers say; figures by hand."""

import itertools
import threading
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from piece_sizes import piece_sizes

from flexgen import OptLM, Policy
from flexgen.layout.passes import Passes
from flexgen.layout.placement import place_weights
from flexgen.layout.plan import batch_sizes
from flexgen.layout.prefix import prefix_policy, prefix_workloads, shared_tokens
from flexgen.layout.rows import lookup_sizes, read_bytes
from flexgen.memory.disk import DiskIO
from flexgen.memory.gpu import EmulatedDevice, HostDevice
from flexgen.models import build_layers, open_model
from flexgen.models.checkpoint import Extent
from flexgen.policy import Tier
from flexgen.predict.costs import CostedBlock, StepCosts
from flexgen.predict.placed import PlacedModel
from flexgen.results.trace import LaneName
from flexgen.schedule.orders import ORDERS
from flexgen.schedule.steps import Op, Step, all_steps
from flexgen.workload import Workload

VOCABULARY = 96


def split(codecs=False):
    """Splits with and without each tier; with codecs too if asked."""
    plain = [
        {"gpu": 100}, {"cpu": 100}, {"disk": 100}, {"gpu": 34, "cpu": 33, "disk": 33}, {"cpu": 50, "disk": 50},
        {"gpu": 25, "disk": 75},
    ]  # fmt: skip
    coded = [
        {"cpu": {"percent": 60, "codec": "int4"}, "disk": {"percent": 40, "codec": "int8"}},
        {"gpu": {"percent": 50, "codec": "int4"}, "cpu": 50},
    ]
    return st.sampled_from(plain + coded if codecs else plain)


SPARSE = st.builds(
    Policy,
    gpu_batch_size=st.integers(1, 4),
    num_gpu_batches=st.integers(1, 3),
    cache=split(),
    prefill_chunk=st.sampled_from([0, 5]),
    attn_sparsity=st.sampled_from([0.2, 0.5]),
    attend_on=st.sampled_from(["cpu", "gpu"]),
)
POLICIES = SPARSE | st.builds(
    Policy,
    gpu_batch_size=st.integers(1, 4),
    num_gpu_batches=st.integers(1, 3),
    weights=split(codecs=True),
    cache=split(codecs=True),
    activations=split(),
    attend_on=st.sampled_from(["cpu", "gpu"]),
    overlap=st.booleans(),
    sep_layer=st.booleans(),
    prefill_chunk=st.sampled_from([0, 0, 1, 3, 4, 7]),
)


@pytest.fixture(autouse=True, scope="module")
def _small_pages():
    """Pages and pieces so small that a tiny model has several."""
    with piece_sizes(page_tokens=4, memory_page_tokens=8, weight_bytes=4096):
        yield


@pytest.fixture(scope="module")
def counted():
    """Bytes that crossed links and reached disks, by the lane they moved on; but for values that sparse attention
    chooses, which depend on what the model says."""
    moved: Counter = Counter()
    names = {f"flexgen-{lane}": lane for lane in LaneName}
    lock = threading.Lock()

    def count(nbytes):
        thread = threading.current_thread().name
        if not thread.startswith("flexgen-values"):
            with lock:
                moved[names.get(thread, LaneName.COMPUTE)] += nbytes

    def wrap(owner, name, nbytes):
        original = getattr(owner, name)

        def wrapped(self, first, *rest):
            count(nbytes(first))
            return original(self, first, *rest)

        patch.setattr(owner, name, wrapped)

    with pytest.MonkeyPatch.context() as patch:
        for device in (EmulatedDevice, HostDevice):
            for name in ("to_device", "from_device"):
                wrap(device, name, lambda target: target.nbytes)
        for name in ("read", "start_read"):
            wrap(DiskIO, name, lambda reads: sum(read.target.nbytes for read in reads))
        wrap(DiskIO, "write", lambda writes: sum(write.source.nbytes for write in writes))
        yield moved


class Ran(NamedTuple):
    """A block of a run."""

    policy: Policy
    workload: Workload
    sizes: list[int]

    @property
    def passes(self):
        return Passes.of(self.workload, self.policy)

    @property
    def count(self):
        """The number of passes."""
        return self.workload.gen_len - self.passes.first

    @property
    def parts(self):
        """The number of tokens of each part of a prompt."""
        return [self.passes.span(token).new for token in range(self.passes.first, 1)]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    policy=POLICIES,
    name=st.sampled_from(["opt", "opt untied, projected", "llama, grouped", "uneven"]),
    device=st.sampled_from(["emulated", "cpu"]),
    order=st.none() | st.sampled_from(sorted(ORDERS)),
    prompts=st.integers(1, 8),
    prefix=st.sampled_from([0, 0, 32, 35]),
    prompt_len=st.integers(1, 12),
    tokens=st.integers(1, 7),
)
def test_the_engine_moves_these_bytes_on_these_lanes(
    policy,
    name,
    device,
    order,
    prompts,
    prefix,
    prompt_len,
    tokens,
    configs,
    uneven,
    machine,
    host,
    counted,
    monkeypatch,
):
    """Stage by stage, and byte by byte on every lane, in a run of each policy."""
    prompts = min(prompts, policy.block_size)
    hardware = host() if device == "cpu" else machine()
    sizes = batch_sizes(policy, prompts)
    if sizes[0] == 1:  # all prompts of this test are equal then
        prefix = 0
    workload = Workload(prefix + prompt_len, tokens, prompts, prefix)

    def spread(rows, seq=1):
        """Ids that are spread evenly over the vocabulary, as the cost model assumes."""
        return np.arange(rows * seq).reshape(rows, seq) * VOCABULARY // (rows * seq)

    monkeypatch.setattr(
        "flexgen.runtime.choice.sample", lambda logits, *_, **__: torch.from_numpy(spread(len(logits))[:, 0])
    )
    blocks = [Ran(policy, workload, sizes)]
    if shared := shared_tokens(workload, policy):
        blocks[:0] = [Ran(prefix_policy(policy), part, [1]) for part in prefix_workloads(workload, policy)]

    def prompt_ids(block):
        """The ids of the parts of each batch."""
        return [np.concatenate([spread(rows, new) for new in block.parts], axis=1) for rows in block.sizes]

    ids = np.concatenate(prompt_ids(blocks[-1]))
    if shared:
        ids = np.concatenate([np.repeat(*prompt_ids(blocks[0]), prompts, axis=0), ids], axis=1)
    unlike = uneven.UnevenConfig(("wide", "narrow", "post-norm"), VOCABULARY)
    config = unlike if name == "uneven" else configs[name]
    with OptLM(config, policy, device=device, weights="dummy", progress=False, order=order) as model:
        counted.clear()
        model.generate(ids, tokens, stop=(), attention_mask=np.ones_like(ids))
        moved = dict(counted)
        events = model.stats.timing.trace.events
        cargo = model._model.weights._transfers._cargo
        files = [[c for c in per if not isinstance(c.source, torch.Tensor)] for per in cargo]
        layers, placement, table = model._layers, model.placement, model._model.table
        assert model.stats.prefix == shared
    predicted: Counter = Counter()
    stages: Counter = Counter()
    placed = PlacedModel(layers, placement, hardware)
    for block in blocks:
        asked = hardware.topology.choose_order(order, block.policy, len(block.sizes))
        costs = StepCosts(placed, block.policy, block.workload, CostedBlock(sum(block.sizes), asked))
        shape = block.count, len(layers), len(block.sizes), costs.weight_pieces
        for step in all_steps(asked.grid(*shape, feeds_ids=costs.feeds_ids)):
            for chain in costs.loads(step):
                for load in chain:
                    predicted[load.lane] += load.nbytes
                    named = step._replace(token=step.token + block.passes.first)
                    stages[named, load.lane] += step.op is not Op.LOAD_WEIGHTS
    count = sum(block.count for block in blocks)
    # What a read brings along before, between and behind the weights depends on the file alone.
    for cargo in itertools.chain(*files):
        own = sum(placement.stored_bytes(weight) for weight, _ in cargo.weights)
        predicted[LaneName.DISK_READ] += count * (cargo.length - own)
        if device != "cpu":
            predicted[LaneName.TO_DEVICE] += count * (cargo.end - cargo.lead - own)
    # So does where the table begins in it.
    if table is not None and isinstance(table._home, Extent):
        for block in blocks:
            most = max(block.sizes) * block.passes.new
            scratch = lookup_sizes(layers, placement, hardware.topology, most).scratch
            for rows in block.sizes:
                later = [spread(rows)] * (block.workload.gen_len - 1)
                for ids in (*(spread(rows, new) for new in block.parts), *later):
                    at_zero, there = (
                        read_bytes(table.weight, placement, ids.ravel(), begin, scratch)
                        for begin in (0, table._home.offset)
                    )
                    predicted[LaneName.DISK_READ] += there - at_zero
    # Copies within host memory cross no link: they are stages, but no device is asked.
    if device != "cpu":
        del predicted[LaneName.HOST]
    assert {lane: n for lane, n in predicted.items() if n} == {lane: n for lane, n in moved.items() if n}
    ran = Counter((e.step, e.lane) for e in events if e.step.op is not Op.LOAD_WEIGHTS)
    assert {key: n for key, n in stages.items() if n} == dict(ran)


def costs_of(config, policy, hardware, workload=None, dtype=torch.float32):
    spec, _ = open_model(config, "dummy")
    layers = build_layers(spec, policy.sep_layer)
    workload = workload or Workload(6, 4, policy.block_size)
    placement = place_weights(layers, policy.weights, dtype)
    block = CostedBlock(workload.num_prompts, ORDERS["overlap_multi_batch"])
    return StepCosts(PlacedModel(layers, placement, hardware), policy, workload, block)


def compute(costs, token, layer, batch=0):
    [[load]] = costs.loads(Step(Op.COMPUTE, token, layer, batch))
    assert load.lane is LaneName.COMPUTE
    return load


def test_computation_by_hand(configs, machine):
    """Two rows of the tiny OPT: 4 projections of 64 x 64, decoded below the ridge of 8 rows."""
    costs = costs_of(configs["opt"], Policy(gpu_batch_size=2), machine())
    prefill = 1e-4 + 2 * 12 * 4 * 64 * 64 / 1e9 + 2 * 2 * 2 * (6 * 7 / 2) * 64 / 1e9
    assert compute(costs, 0, 1).seconds == pytest.approx(prefill)
    # 2 of 8 rows: a quarter of the rate. Then 6 + 3 tokens of keys and values in float32.
    decode = 1e-4 + 2 * 2 * 4 * 64 * 64 / 0.25e9 + 2 * 2 * 64 * 9 * 4 / 1e8
    assert compute(costs, 3, 1).seconds == pytest.approx(decode)
    assert compute(costs, 3, 1).nbytes == 0
    # The head takes the last position only, in the prefill too.
    assert compute(costs, 0, 5).seconds == compute(costs, 1, 5).seconds


@pytest.mark.parametrize(("weights", "joint"), [("cpu", True), ("disk", False)])
def test_one_product_of_the_rows_that_decode_and_a_prompt_that_enters(weights, joint, configs, host):
    """Two rows and a prompt of six tokens fill the ridge of 8 rows together, if no data moves between their cells."""
    policy = Policy(
        gpu_batch_size=2, prefill_rows=1, weights={weights: 100}, cache={"cpu": 100}, activations={"gpu": 100},
    )  # fmt: skip
    spec, _ = open_model(configs["opt"], "dummy")
    layers = build_layers(spec, policy.sep_layer)
    placement = place_weights(layers, policy.weights, torch.float32)
    block = CostedBlock(3, ORDERS["overlap_multi_batch"], [(1, 0)], batches=[2, 1])
    costs = StepCosts(PlacedModel(layers, placement, host()), policy, Workload(6, 4, 8), block)
    for batch, tokens in enumerate((2, 6)):
        rate = 1e9 if joint else tokens / 8 * 1e9
        assert compute(costs, 0, 2, batch).seconds == pytest.approx(1e-4 + 2 * tokens * 2 * 64 * 192 / rate)
    rate = (3 if joint else 2) / 8 * 1e9  # the head computes one position of the prompt
    assert compute(costs, 0, 5).seconds == pytest.approx(1e-4 + 2 * 2 * 64 * VOCABULARY / rate)


def test_what_is_done_to_each_number(configs, machine):
    """Two rows: four projections of 64 x 64, an MLP of 64 x 192, both ends of the model."""
    policy = Policy(gpu_batch_size=2)
    plain, counted = (
        costs_of(configs["opt"], policy, machine(**figures))
        for figures in ({}, {"elementwise": {"float32": [[1, 1e-6]]}, "around_attention": {"float32": 1e-3}})
    )
    for token, new in ((0, 2 * 6), (2, 2)):
        more = [compute(counted, token, n).seconds - compute(plain, token, n).seconds for n in range(6)]
        attention, mlp = 4 * 2 * 64 * 1e-6 + 4 * 64 * 1e-3, 2 * (64 + 192) * 1e-6
        embed, head = 4 * 64 * 1e-6, (64 + VOCABULARY) * 1e-6
        layers = [new * embed, *[new * attention, new * mlp] * 2, 2 * head]
        assert more == pytest.approx(layers)


def test_what_the_host_attends_is_asked_and_answered_over_the_link(configs, machine):
    on_host = costs_of(configs["opt"], Policy(gpu_batch_size=2, cache={"cpu": 100}), machine())
    on_gpu = costs_of(configs["opt"], Policy(gpu_batch_size=2), machine())
    asked, answered = 2 * 3 * 64 * 4, 2 * 64 * 4
    attention = 2 * 2 * 64 * 7 * 4
    extra = attention / 1e7 - attention / 1e8 + (asked + answered) / 1e6 + 2e-5
    load = compute(on_host, 1, 1)
    assert load.seconds - compute(on_gpu, 1, 1).seconds == pytest.approx(extra)
    assert load.nbytes == asked + answered


def test_attention_of_device_and_host_runs_at_once(configs, machine):
    policy = Policy(gpu_batch_size=4, cache={"gpu": 50, "cpu": 50})
    base = costs_of(configs["opt"], policy, machine(device_attention={"float32": 1e12}))
    hidden = costs_of(configs["opt"], policy, machine(device_attention={"float32": 2e7}))
    longer = costs_of(configs["opt"], policy, machine(device_attention={"float32": 5e6}))
    assert compute(hidden, 1, 1).seconds == compute(base, 1, 1).seconds
    attention = 2 * 2 * 64 * 7 * 4
    more = compute(longer, 1, 1).seconds - compute(base, 1, 1).seconds
    assert more == pytest.approx(attention / 5e6 - attention / 1e7)


def test_encoded_weights_are_decoded_once_a_visit_where_there_are_many_rows(configs, machine):
    coded = {"gpu": {"percent": 100, "codec": "int4"}}
    shape = dict(gpu_batch_size=16, num_gpu_batches=2)
    plain, encoded, always = (
        costs_of(configs["opt"], Policy(**shape, weights=weights), machine(products_decode=decode))
        for weights, decode in (({"gpu": 100}, False), (coded, False), (coded, True))
    )
    decoding = 4 * 64 * 64 * 4 / 1e8

    def more(costs, token, batch):
        return compute(costs, token, 1, batch).seconds - compute(plain, token, 1, batch).seconds

    assert more(encoded, 0, 0) == pytest.approx(decoding)  # 96 rows
    assert more(encoded, 0, 1) == 0
    assert all(more(always, token, batch) == pytest.approx(decoding) for token in (0, 1) for batch in (0, 1))
    # 16 rows are above the ridge: reading less does not help, and nothing is decoded.
    assert more(encoded, 1, 0) == pytest.approx(0)


def test_products_of_few_rows_read_what_is_kept(configs, machine):
    plain, encoded = (
        costs_of(configs["opt"], Policy(gpu_batch_size=1, weights=weights), machine())
        for weights in ({"gpu": 100}, {"gpu": {"percent": 100, "codec": "int4"}})
    )
    # One of 8 rows: 4.5 bits are read of 32, which is more than the eighth that arithmetic takes.
    products = 8 * 2 * 4 * 64 * 64 / 1e9
    saved = compute(plain, 1, 1).seconds - compute(encoded, 1, 1).seconds
    assert saved == pytest.approx(products * (1 - 4.5 / 32), rel=0.02)


def halves_of_a_cell(config, policy, hardware, attending=None):
    """The loads of a cell's steps before, in, after attention, and of the rest."""
    spec, _ = open_model(config, "dummy")
    layers = build_layers(spec, policy.sep_layer)
    placement = place_weights(layers, policy.weights, torch.float32)
    block = CostedBlock(8, ORDERS["overlap_cpu_attention"], attending=attending)
    halves = StepCosts(PlacedModel(layers, placement, hardware), policy, Workload(6, 4, 8), block)
    return [halves.loads(Step(op, 2, 1, 0)) for op in (Op.PROJECT, Op.ATTEND, Op.LOAD_ATTENTION, Op.COMPUTE)]


def test_halves_of_a_cell_are_the_whole(configs, machine):
    policy = Policy(gpu_batch_size=4, num_gpu_batches=2, cache={"gpu": 50, "cpu": 50}, sep_layer=False)
    hardware = machine(fixed={"cell": 1.0, "attention": 5.0, "attend": 2.0})
    whole = costs_of(configs["opt"], policy, hardware)
    [[project, asked]], [[host], [device]], [[answered]], [[rest]] = halves_of_a_cell(
        configs["opt"], policy, hardware
    )
    assert [load.lane for load in (asked, host, device, answered)] == [
        LaneName.FROM_DEVICE, LaneName.HOST, LaneName.COMPUTE, LaneName.TO_DEVICE
    ]  # fmt: skip
    together = project.seconds + asked.seconds + max(host.seconds, device.seconds) + answered.seconds
    assert together + rest.seconds == pytest.approx(compute(whole, 2, 1).seconds)
    assert compute(whole, 2, 1).nbytes == asked.nbytes + answered.nbytes


def test_the_host_does_not_read_the_cache_of_rows_without_a_token(configs, machine):
    policy = Policy(gpu_batch_size=4, num_gpu_batches=2, cache={"cpu": 100}, sep_layer=False)
    hardware = machine(fixed={"attend": 0.0})
    every = halves_of_a_cell(configs["opt"], policy, hardware)
    one = halves_of_a_cell(configs["opt"], policy, hardware, attending=(1, 4))
    [[all_rows]], [[one_row]] = every.pop(1), one.pop(1)
    assert one_row.seconds == pytest.approx(all_rows.seconds / 4)
    assert one == every, "all else is computed for all rows"


def test_attention_on_the_host_has_fixed_costs_of_its_own(configs, machine):
    """`attend` on the host; on the device, `split` instead of `cell` and `attention`, half of it in each part."""
    policy = Policy(gpu_batch_size=4, num_gpu_batches=2, cache={"cpu": 100}, sep_layer=False)

    def parts(**fixed):
        [[project, _]], [[host]], _, [[rest]] = halves_of_a_cell(configs["opt"], policy, machine(fixed=fixed))
        return project.seconds, host.seconds, rest.seconds

    kernels = parts()

    def more(**fixed):
        return [after - before for before, after in zip(kernels, parts(**fixed), strict=True)]

    usual = {"cell": 1.0, "attention": 5.0}
    assert more(**usual) == pytest.approx([5.5, 0.0, 0.5])
    assert more(**usual, attend=3.0, split=8.0) == pytest.approx([4.0, 3.0, 4.0])


def test_cells_with_attention_cost_more_than_others(configs, machine):
    """`fixed.attention` is in each cell with attention once, in the prefill and in the decode."""

    def seconds(token, layer, **fixed):
        hardware = machine(fixed={"cell": 1.0, **fixed})
        return compute(costs_of(configs["opt"], Policy(), hardware), token, layer).seconds

    for token in (0, 2):
        more = [seconds(token, layer, attention=5.0) - seconds(token, layer) for layer in (0, 1, 2)]
        assert more == pytest.approx([0.0, 5.0, 0.0])  # embedding, attention, feed-forward


def test_sparse_attention_reads_all_keys_and_some_values(configs, machine):
    def host(**fields):
        policy = Policy(gpu_batch_size=2, cache={"cpu": 100}, **fields)
        return compute(costs_of(configs["opt"], policy, machine()), 3, 1).seconds

    # 8 cached tokens and the new one; half of the cached are chosen.
    attention = 2 * 2 * 64 * 9 * 4 / 1e7
    assert host() - host(attn_sparsity=0.5) == pytest.approx(attention * (1 - (1 + 5 / 9) / 2))


def test_encoded_weights_travel_as_they_are_kept(configs, machine):
    coded = {"cpu": {"percent": 100, "codec": "int4"}}
    costs = costs_of(configs["opt"], Policy(weights=coded), machine())
    [[load]] = costs.loads(Step(Op.LOAD_WEIGHTS, 0, 1, 0))
    # 4.5 bits for each value of four matrices; biases and norms as they are; padding of at most 64 bytes.
    values, rest = 4 * 64 * 64 * 4.5 / 8, 6 * 64 * 4
    assert values + rest <= load.nbytes <= values + rest + 10 * 64


def test_a_stage_takes_its_bytes_and_what_is_fixed(configs, machine):
    costs = costs_of(configs["opt"], Policy(gpu_batch_size=2, activations={"disk": 100}), machine())
    hidden = 2 * 6 * 64 * 4
    [[out, write]] = costs.loads(Step(Op.STORE_HIDDEN, 0, 1, 0))
    assert out == (LaneName.FROM_DEVICE, hidden, pytest.approx(1e-5 + hidden / 1e6))
    assert write == (LaneName.DISK_WRITE, 4096, pytest.approx(1e-4 + 4096 / 2e5))


def test_layers_flops_are_products_and_attention(configs):
    spec, _ = open_model(configs["llama, grouped"], "dummy")
    for sep_layer in (True, False):
        for layer in build_layers(spec, sep_layer):
            both = layer.product_flops(3, 5, 9), layer.attention_flops(3, 5, 9)
            assert sum(both) == layer.flops(3, 5, 9) and min(both) >= 0
            assert bool(both[1]) == layer.has_cache
            # What is multiplied with weights does not know of the context; attention is all of the rest.
            assert both[0] == layer.product_flops(3, 5, 5)


def test_a_batch_of_fewer_rows_has_less_to_do(configs, machine):
    policy = Policy(gpu_batch_size=4, num_gpu_batches=2, cache={"cpu": 100}, attend_on="gpu")
    costs = costs_of(configs["opt"], policy, machine(), Workload(6, 4, 5))
    [[full]], [[one]] = (costs.loads(Step(Op.LOAD_CACHE, 1, 1, batch)) for batch in (0, 1))
    assert full.nbytes > one.nbytes
    assert policy.cache.percent(Tier.CPU) == 100
