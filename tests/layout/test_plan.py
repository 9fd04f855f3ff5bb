"""The memory plan is what is really taken, and what does not fit is refused before it is."""

import itertools
import json
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, OPTConfig

from flexgen.engine.model import OptLM
from flexgen.errors import CapacityError, PolicyError
from flexgen.kernels import half_linear
from flexgen.kernels.scoring import Scoring, Window
from flexgen.kernels.sparse_attention import Sparsity, attend_chosen_in_torch, choose_in_torch
from flexgen.kernels.workspaces import GPU, HOST, choice_bytes
from flexgen.layout.cache import CacheLayout, Span, cache_segments
from flexgen.layout.cache_pool import cache_pool
from flexgen.layout.hidden import hidden_layout
from flexgen.layout.needs import MemoryPlan, Need
from flexgen.layout.passes import Passes
from flexgen.layout.pieces import PieceSizes
from flexgen.layout.placement import place_weights
from flexgen.layout.plan import Target, batch_sizes, plan_memory, room_sizes
from flexgen.layout.topology import LINKED, SHARED
from flexgen.layout.weight_slots import SlotSizes
from flexgen.memory.machine import Machine
from flexgen.memory.store import Store
from flexgen.models import build_layers, open_model
from flexgen.models.spec import CacheShape
from flexgen.policy import Policy, Share, Split, Tier
from flexgen.quant import CODECS, head_format
from flexgen.runtime.activations import Activations
from flexgen.runtime.kvcache import KVCache
from flexgen.schedule.orders import Slots
from flexgen.schedule.turns import Turns
from flexgen.units import ALIGNMENT, BLOCK, GIB, KIB, MIB, align
from flexgen.workload import Workload

DTYPES = st.sampled_from([torch.float32, torch.float16])
SPEC, DUMMY = open_model("opt-125m", weights="dummy")
LAYERS = build_layers(SPEC)
ATTENTION = SPEC.layers[0].attention
FEW_HEADS = replace(ATTENTION, heads=4, kv_heads=2, head_dim=32)
WIDE_HEADS = replace(ATTENTION, heads=6, kv_heads=3, head_dim=128)
UNEVEN = build_layers(
    replace(
        SPEC,
        layers=tuple(
            replace(SPEC.layers[0], attention=own) for own in (FEW_HEADS, ATTENTION, WIDE_HEADS, FEW_HEADS)
        ),
    )
)


@st.composite
def splits(draw, codecs=("none",)):
    a, b = sorted((draw(st.integers(0, 20)), draw(st.integers(0, 20))))
    shares = (Share(percent, draw(st.sampled_from(codecs))) for percent in (5 * a, 5 * (b - a), 5 * (20 - b)))
    return Split(*shares)


policies = st.builds(
    Policy,
    gpu_batch_size=st.integers(1, 9),
    num_gpu_batches=st.integers(1, 3),
    weights=st.just(Split(cpu=100)),
    cache=splits(codecs=("none", *CODECS)),
    activations=splits(),
    attend_on=st.sampled_from(["cpu", "gpu"]),
)


# Cache segments


@given(
    policy=policies,
    rows=st.integers(1, 40),
    capacity=st.integers(1, 3000),
    dtype=DTYPES,
    topology=st.sampled_from([LINKED, SHARED]),
)
def test_segments_cover_all_rows_and_tokens(policy, rows, capacity, dtype, topology):
    segments = cache_segments(ATTENTION.cache, policy, rows, capacity, dtype, topology)
    assert [row for segment in segments for row in segment.rows] == list(range(rows))
    assert len({segment.tier for segment in segments}) == len(segments)
    for segment in segments:
        assert segment.tier is Tier.GPU or policy.cache.percent(segment.tier) > 0
        assert segment.rows and segment.pages * segment.page_tokens >= capacity
        assert segment.pages * segment.page_tokens - capacity < segment.pages  # even pages, none mostly empty
        if segment.tier is Tier.GPU and topology is LINKED:
            assert (segment.pages, segment.page_tokens) == (1, capacity)
        else:
            assert 1 <= segment.page_tokens <= 128
        assert segment.codec == policy.cache[segment.tier].codec
        head = head_format(segment.codec, 64, dtype).nbytes
        width = head // dtype.itemsize if segment.codec == "none" else head
        assert segment.page_shape == (2, len(segment.rows), 12, segment.page_tokens, width)
        filled = segment.token_bytes(segment.page_tokens)
        assert segment.page_bytes % BLOCK == 0 and 0 <= segment.page_bytes - filled < BLOCK
        assert segment.nbytes == segment.pages * segment.page_bytes
        assert segment.token_bytes(1) == 2 * len(segment.rows) * 12 * head


@pytest.mark.parametrize(
    ("tier", "attend_on", "topology", "on_device", "resident"),
    [
        (Tier.GPU, "cpu", LINKED, True, True),
        (Tier.GPU, "gpu", LINKED, True, True),
        (Tier.CPU, "cpu", LINKED, False, True),
        (Tier.CPU, "gpu", LINKED, True, False),
        (Tier.DISK, "cpu", LINKED, False, False),
        (Tier.DISK, "gpu", LINKED, True, False),
        (Tier.GPU, "cpu", SHARED, True, True),
        (Tier.CPU, "cpu", SHARED, True, True),
        (Tier.DISK, "cpu", SHARED, True, False),
    ],
)
def test_where_attention_reads_a_segment_and_whether_it_moves(tier, attend_on, topology, on_device, resident):
    policy = Policy(cache=Split(**{tier: 100}), attend_on=attend_on)
    (segment,) = cache_segments(ATTENTION.cache, policy, 4, 100, torch.float16, topology)
    assert (segment.tier, segment.on_device, segment.resident) == (tier, on_device, resident)


def test_encoded_cache_takes_the_bytes_of_its_codec():
    for codec, bits in (("none", 16), ("int8", 8.5), ("int4", 4.5)):
        policy = Policy(cache={"cpu": {"percent": 100, "codec": codec}})
        (segment,) = cache_segments(ATTENTION.cache, policy, 8, 1024, torch.float16, LINKED)
        exact = 2 * 8 * 768 * 1024 * bits / 8
        assert exact <= segment.nbytes <= exact + segment.pages * BLOCK
        assert segment.workspace_bytes(8) == 0 or codec != "none"


def test_heads_that_a_codec_cannot_keep_are_refused_at_once():
    config = OPTConfig(hidden_size=30, word_embed_proj_dim=30, num_attention_heads=6, num_hidden_layers=1)
    policy = Policy(cache={"cpu": {"percent": 100, "codec": "int4"}})
    with pytest.raises(
        PolicyError, match="codec 'int4' stores heads of an even size, but this model has heads of 5"
    ):
        OptLM(config, policy, device="cpu", weights="dummy", progress=False)
    OptLM(config, policy.replace(cache={"cpu": 100}), device="cpu", weights="dummy", progress=False).close()


def test_pages_on_disk_are_about_a_mebibyte():
    policy = Policy(cache=Split(disk=100))
    (many,) = cache_segments(ATTENTION.cache, policy, 8, 1024, torch.float16, LINKED)  # 24 KiB a token
    assert MIB <= many.page_bytes < MIB + 24 * KIB + BLOCK and many.pages > 1
    (wide,) = cache_segments(ATTENTION.cache, policy, 64, 1024, torch.float16, LINKED)  # 192 KiB a token
    assert wide.page_tokens == 8  # 1 KiB of each head, more than 1 MiB in all


@given(rows=st.integers(1, 40), capacity=st.integers(1, 3000), dtype=DTYPES, share=st.floats(0.01, 0.99))
def test_sparse_segments_have_whole_blocks_of_values(rows, capacity, dtype, share):
    """On disk: for each row and head, in each page, as keys and as values."""
    policy = Policy(cache=Split(cpu=50, disk=50), attn_sparsity=share)
    for segment in cache_segments(ATTENTION.cache, policy, rows, capacity, dtype, LINKED):
        assert segment.sparse and segment.sparsity.share == share
        assert segment.pages * segment.page_tokens >= capacity
        if segment.tier is not Tier.DISK:
            exact = cache_segments(
                ATTENTION.cache, policy.replace(attn_sparsity=1), rows, capacity, dtype, LINKED
            )
            assert segment.sparsity.unit == 1 and segment.page_shape in [s.page_shape for s in exact]
            continue
        token = 64 * dtype.itemsize
        assert segment.sparsity.unit * token % BLOCK == 0
        assert segment.page_tokens % segment.sparsity.unit == 0
        assert segment.page_bytes == segment.token_bytes(segment.page_tokens)
        assert segment.pages * segment.page_tokens - capacity < segment.page_tokens


@pytest.mark.parametrize(
    ("head_dim", "itemsize", "tokens", "nbytes"),
    [
        (128, 2, 64, 16 * KIB),
        (64, 2, 128, 16 * KIB),
        (128, 4, 32, 16 * KIB),
        (80, 2, 128, 20 * KIB),
        (96, 2, 128, 24 * KIB),
        (256, 2, 32, 16 * KIB),
        (8, 2, 256, 4 * KIB),  # not even 128 tokens make a block
    ],
)
def test_what_is_chosen_on_disk_is_worth_a_read(head_dim, itemsize, tokens, nbytes):
    assert PieceSizes().chosen_together(head_dim * itemsize) == tokens
    assert tokens * head_dim * itemsize == nbytes


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 32])
def test_choosing_stays_within_the_workspace(share, dtype, kv_heads, tmp_path):
    """In torch, which takes more than the compiled kernels."""
    rows, heads, length, dim = 3, 32, 1024, 16
    config = LlamaConfig(
        hidden_size=heads * dim, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=1
    )
    spec, _ = open_model(config, weights="dummy")
    layers, policy = build_layers(spec), Policy(gpu_batch_size=rows, attn_sparsity=share)
    q = torch.randn(rows, heads, 1, dim).to(dtype)
    page = torch.randn(rows, kv_heads, 128, dim).to(dtype)
    starts = torch.tensor([0, 5, 300])

    def attend():
        choice = choose_in_torch(q, [(page, page)] * 8, length, starts, Scoring(0.25), Sparsity(share))
        attend_chosen_in_torch(choice, [(page, page)] * 8)

    attend()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        attend()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = [
        e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"]) if e.get("name") == "[memory]"
    ]
    peak = max(itertools.accumulate(changes))
    placement, workload = place_weights(layers, policy.weights, dtype), Workload(length - 1, 1, rows)
    plan = plan_memory(layers, placement, policy, Target(LINKED), workload)
    (extra,) = [n.nbytes for n in plan.needs if (n.tier, n.what, n.role) == (Tier.GPU, "cache", "workspace")]
    (dense,) = [layer.workspace_bytes(rows, 1, length, dtype) for layer in layers if layer.has_cache]
    assert peak <= dense + extra


# What is planned is what is taken


def opened(layers, policy, workload, machine, dtype, slots):
    """Cache and hidden states of one block, as a call makes them."""
    batches = room_sizes(policy, workload.num_prompts, workload.gen_len)
    topology = machine.device.topology
    pool = cache_pool(layers, policy, batches, workload, dtype, topology)
    attention = {j: layer.layer_spec.attention for j, layer in enumerate(layers) if layer.has_cache}
    cached = {
        j: [cache_segments(own.cache, policy, rows, workload.capacity, dtype, topology) for rows in batches]
        for j, own in attention.items()
    }
    heads = {j: own.heads for j, own in attention.items()}
    passes = Passes.of(workload, policy)
    hidden = [hidden_layout(SPEC, policy, rows, dtype, topology) for rows in batches]
    yield "cache", lambda: KVCache(cached, heads, passes, machine, slots, pool)
    yield (
        "activations",
        lambda: Activations(hidden, passes.new, dtype, machine, slots),
    )


def planned(plan, tier, what, besides=()):
    """Bytes of buffers. Tensors that torch makes as it computes are workspace."""
    roles = {"home", "slots", "staging"} - set(besides)
    return sum(n.nbytes for n in plan.needs if (n.tier, n.what) == (tier, what) and n.role in roles)


@settings(max_examples=60)
@given(
    layers=st.sampled_from([LAYERS, UNEVEN]),
    policy=policies,
    prompts=st.integers(1, 30),
    prompt_len=st.integers(1, 12),
    dtype=DTYPES,
    device=st.sampled_from(["cpu", "emulated"]),
    slots=st.integers(1, 4),
    share=st.sampled_from([1.0, 0.1]),
    chunk=st.sampled_from([0, 1, 4]),
    reserve=st.sampled_from([0, 2]),
)
def test_cache_and_hidden_states_take_what_was_planned(
    layers, policy, prompts, prompt_len, dtype, device, slots, share, chunk, reserve
):
    assume(share == 1 or all(policy.cache[tier].codec == "none" for tier in Tier))
    policy = policy.replace(
        attn_sparsity=share, prefill_chunk=chunk, reserve_new=reserve if share == 1 else 0
    )
    assert_taken(layers, policy, Workload(prompt_len, 5, prompts), dtype, device, slots)


@settings(max_examples=40)
@given(
    layers=st.sampled_from([LAYERS, UNEVEN]),
    policy=policies,
    on_gpu=st.integers(0, 10),
    prompts=st.integers(1, 30),
    prompt_len=st.integers(1, 300),
    dtype=DTYPES,
    device=st.sampled_from(["cpu", "emulated"]),
    slots=st.integers(1, 4),
    limit=st.integers(1, 12),
)
def test_cells_of_prompts_take_what_was_planned(
    layers, policy, on_gpu, prompts, prompt_len, dtype, device, slots, limit
):
    codecs = policy.cache[Tier.GPU].codec, policy.cache[Tier.CPU].codec
    cache = Split(Share(10 * on_gpu, codecs[0]), Share(100 - 10 * on_gpu, codecs[1]))
    policy = policy.replace(activations={"gpu": 100}, cache=cache, prefill_rows=limit)
    assert_taken(layers, policy, Workload(prompt_len, 5, prompts), dtype, device, slots)


def assert_taken(layers, policy, workload, dtype, device, slots):
    with closing(Machine.open(device)) as machine:
        placement = place_weights(layers, policy.weights, dtype)
        topology = machine.device.topology
        plan = plan_memory(layers, placement, policy, Target(topology, Slots(cells=slots)), workload)
        stores = {Tier.CPU: machine.host, Tier.DISK: machine.disk}
        computes_in = topology.device
        if topology is LINKED:
            stores[Tier.GPU] = machine.device.memory
        for what, make in opened(layers, policy, workload, machine, dtype, slots):
            before = {tier: store.used for tier, store in stores.items()}
            with closing(make()):
                for tier, store in stores.items():
                    # Hidden states that stay where they are computed are a layer's result as it is.
                    stay = ("home",) if (what, tier) == ("activations", computes_in) else ()
                    taken, promised = store.used - before[tier], planned(plan, tier, what, besides=stay)
                    if (what, tier) == (
                        "cache",
                        Tier.CPU,
                    ):  # the plan rounds what is staged up to whole blocks
                        assert taken <= promised <= taken + 2 * slots * BLOCK
                    else:
                        assert taken == promised, (what, tier)
            assert {tier: store.used for tier, store in stores.items()} == before  # all is given back


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("weights", [Split(gpu=20, cpu=50, disk=30), Split(cpu=100), Split(disk=100)])
def test_weights_take_what_was_planned(stream, saved, device, weights):
    model = stream(saved(), weights, device)
    machine, topology = model.machine, model.machine.device.topology
    plan = plan_memory(model.layers, model.placement, Policy(weights=weights), Target(topology))
    padding = ALIGNMENT * sum(len(layer.weights) for layer in model.layers)
    assert 0 <= machine.host.peak - plan.on(Tier.CPU) <= padding
    if topology is LINKED:
        assert 0 <= machine.device.memory.peak - plan.on(Tier.GPU) <= padding
    assert plan.on(Tier.DISK, "weights") == model.placement.nbytes[Tier.DISK]


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("chunk", [0, 2])
def test_a_whole_call_stays_within_the_plan(saved, device, codec, chunk, tmp_path):
    """Weights, cache, hidden states: the stores' peaks are the plan's, but for the ids of the prompts."""
    mixed = Split(gpu=30, cpu=30, disk=40)
    cache = {tier: Share(mixed.percent(tier), codec) for tier in Tier}
    policy = Policy(
        gpu_batch_size=4, num_gpu_batches=2, weights=mixed, cache=cache, activations=mixed, prefill_chunk=chunk
    )  # fmt: skip
    with OptLM(saved(), policy, device=device, offload_dir=tmp_path, progress=False) as model:
        model.generate([[5, 6, 7, 8, 9]] * 8, max_new_tokens=6, stop=())
        plan, machine = model.stats.plan, model._machine
        fixed = {
            tier: sum(n.nbytes for n in plan.needs if n.tier is tier and n.role != "workspace")
            for tier in Tier
        }
        assert machine.host.peak == pytest.approx(fixed[Tier.CPU], rel=0.1)
        on_disk = fixed[Tier.DISK] - plan.on(Tier.DISK, "weights")
        assert machine.disk.peak == on_disk > 0
        if device == "emulated":
            assert machine.device.memory.peak == pytest.approx(fixed[Tier.GPU], rel=0.1)
        assert machine.disk.used == 0, "nothing of a call stays behind"


def test_where_memory_is_shared_nothing_is_on_the_gpu_tier():
    policy = Policy(gpu_batch_size=4)
    placement = place_weights(LAYERS, policy.weights, torch.float16)
    plan = plan_memory(LAYERS, placement, policy, Target(SHARED), Workload(8, 8, 4))
    assert plan.on(Tier.GPU) == 0 and plan.on(Tier.CPU) > placement.nbytes[Tier.GPU]
    assert plan.by_tier == {tier: plan.on(tier) for tier in Tier}


def test_only_one_block_is_in_memory_at_once():
    policy = Policy(gpu_batch_size=4, num_gpu_batches=2)
    placement = place_weights(LAYERS, policy.weights, torch.float16)
    one, many = (
        plan_memory(LAYERS, placement, policy, Target(LINKED), Workload(8, 8, prompts))
        for prompts in (8, 1000)
    )
    assert one == many


def test_all_logits_are_kept_in_host_memory():
    policy = Policy(gpu_batch_size=4)
    placement = place_weights(LAYERS, policy.weights, torch.float16)
    last, every = (
        plan_memory(LAYERS, placement, policy, Target(LINKED), Workload(64, 1, 6), all_logits)
        for all_logits in (False, True)
    )
    logits = 6 * 64 * SPEC.vocab_size * 2
    staging = 2 * 16 * MIB  # for two cells
    assert every.on(Tier.CPU) - last.on(Tier.CPU) == logits + staging
    assert every.on(Tier.GPU, "activations") > last.on(Tier.GPU, "activations")


@pytest.mark.parametrize(
    ("prompts", "sizes"),
    [(1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (11, [4, 4, 3]), (12, [4] * 3), (99, [4] * 3)],
)
def test_batches_of_a_block(prompts, sizes):
    assert batch_sizes(Policy(gpu_batch_size=4, num_gpu_batches=3), prompts) == sizes


# What does not fit


PLAN = MemoryPlan(
    (
        Need(Tier.GPU, "weights", "home", 3 * GIB),
        Need(Tier.GPU, "cache", "slots", 5 * GIB),
        Need(Tier.GPU, "activations", "slots", 0),
        Need(Tier.CPU, "cache", "home", 2 * GIB),
        Need(Tier.DISK, "weights", "home", 7 * GIB),
        Need(Tier.DISK, "cache", "home", GIB),
    ),
    SlotSizes(Turns(1, 1), (0,), (0,)),
)


def test_a_shortage_names_tier_need_limit_and_parts():
    text = PLAN.shortage({Tier.GPU: 6 * GIB, Tier.CPU: None, Tier.DISK: None})
    assert "needs 8 GiB on the gpu tier, which has 6 GiB" in text
    assert "(cache slots 5 GiB, weights home 3 GiB)" in text  # the largest first, nothing that is empty
    assert "in all it needs gpu 8 GiB, cpu 2 GiB, disk 8 GiB" in text


@pytest.mark.parametrize(
    ("limits", "short"),
    [
        ({Tier.GPU: 8 * GIB, Tier.CPU: 2 * GIB, Tier.DISK: GIB}, None),
        ({}, None),
        ({Tier.GPU: 8 * GIB - 1}, "gpu"),
        ({Tier.CPU: 2 * GIB - 1}, "cpu"),
        ({Tier.DISK: GIB - 1}, "disk"),  # weights on disk are files that are there already
    ],
)
def test_a_limit_is_the_most_that_fits(limits, short):
    text = PLAN.shortage(limits)
    assert f"on the {short} tier" in text if short else text == ""


@pytest.mark.parametrize(
    ("policy", "what"),
    [
        (Policy(), "weights home"),
        (Policy(weights=Split(disk=100), gpu_batch_size=64), "weights slots"),
    ],
)
def test_a_small_device_refuses_before_anything_is_allocated(saved, monkeypatch, policy, what):
    taken = []
    monkeypatch.setattr(Store, "allocate", lambda self, nbytes, purpose: taken.append((nbytes, purpose)))
    with pytest.raises(CapacityError) as caught:
        OptLM(saved(), policy, device="emulated:memory=20KiB", progress=False)
    for part in ("on the gpu tier, which has 20 KiB", what, "At least "):
        assert part in str(caught.value)
    assert taken == []


def test_a_call_that_does_not_fit_is_refused_with_a_shape_that_does(saved):
    policy = Policy(weights=Split(cpu=100), gpu_batch_size=64, num_gpu_batches=4)
    with OptLM(saved(), policy, device="emulated:memory=1MiB", progress=False) as model:
        used = model.memory_in_use()
        with pytest.raises(CapacityError, match="It would fit with gpu_batch_size = ") as caught:
            model.generate([[5, 6, 7]] * 256, max_new_tokens=20)
        assert "on the gpu tier, which has 1 MiB" in str(caught.value)
        assert model.memory_in_use() == used
        size = int(str(caught.value).split("gpu_batch_size = ")[1].split()[0])
    smaller = policy.replace(gpu_batch_size=size, num_gpu_batches=1)
    with OptLM(saved(), smaller, device="emulated:memory=1MiB", progress=False) as model:
        assert model.generate([[5, 6, 7]] * (2 * size), max_new_tokens=20, stop=()).shape == (2 * size, 23)


def test_what_is_taken_already_counts_as_there(saved):
    with closing(Machine.open("emulated:memory=1MiB")) as machine:
        assert machine.limits()[Tier.GPU] == MIB
        machine.device.memory.allocate(300 * KIB, "weights")
        assert machine.limits()[Tier.GPU] == MIB
        assert machine.limits()[Tier.CPU] > 0 and machine.limits()[Tier.DISK] > 0
    with closing(Machine.open("cpu")) as machine:
        assert machine.limits()[Tier.GPU] is None and machine.host is machine.device.memory


def test_the_plan_has_the_workspaces_of_the_device(monkeypatch):
    """Half types are widened on the host alone, and a GPU has a workspace for its library."""
    monkeypatch.setattr(half_linear, "has_products", lambda dtype: dtype is not torch.float16)
    monkeypatch.setattr(half_linear, "native_rows", lambda dtype: 0)  # the host widens pieces of matrices
    policy = Policy(gpu_batch_size=4)
    placement = place_weights(LAYERS, policy.weights, torch.float16)
    host, gpu = (
        plan_memory(LAYERS, placement, policy, Target(LINKED, workspaces=spaces), Workload(100, 8, 4))
        for spaces in (HOST, GPU)
    )
    assert host.on(Tier.GPU, "libraries") == 0 and gpu.on(Tier.GPU, "libraries") == GPU.fixed
    assert gpu.on(Tier.GPU, "activations") < host.on(Tier.GPU, "activations")


def test_the_plan_has_what_drawing_ids_takes():
    policy, rows = Policy(gpu_batch_size=4), 4
    placement = place_weights(LAYERS, policy.weights, torch.float16)
    plan = plan_memory(LAYERS, placement, policy, Target(LINKED), Workload(1, 8, rows))
    assert plan.on(Tier.GPU, "activations") >= choice_bytes(rows, SPEC.vocab_size)


def test_the_cache_of_a_window_has_its_tokens_and_a_page_at_most():
    """Of a text of any length, on every tier."""
    for topology in (LINKED, SHARED):
        for tier in Tier:
            policy = Policy(cache={str(tier): 100}, attend_on="gpu")
            for capacity in (8, 100, 1024, 1100, 1300, 8192, 100_000):
                (segment,) = cache_segments(
                    CacheShape(4, 256, Window(1024)), policy, 8, capacity, torch.bfloat16, topology
                )
                page = topology.pieces.memory_page_tokens
                assert min(capacity, 1024) <= segment.capacity < min(capacity, 1024 + page) + page
                layout = CacheLayout((segment,), 0, topology)
                for length in (n for n in (1, 7, 1023, 1024, 5000) if n < capacity):
                    moved = [move.nbytes for route in layout.load(Span(length, 1)) for move in route.moves]
                    assert all(nbytes <= segment.nbytes for nbytes in moved)


def test_a_prompt_in_parts_takes_the_same_at_any_length():
    """Hidden states, staging and workspace of a prefill in parts: the cache alone grows with the prompt."""
    spec, _ = open_model(
        LlamaConfig(
            vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
            intermediate_size=96, max_position_embeddings=1 << 20,
        ), "dummy",
    )  # fmt: skip
    layers = build_layers(spec)
    policy = Policy(
        gpu_batch_size=4, num_gpu_batches=2, activations={"cpu": 50, "disk": 50}, prefill_chunk=512
    )
    placement = place_weights(layers, policy.weights, torch.float16)

    def taken(prompt_len, policy):
        """Without workspace: of a long text the decode's is larger, and grows with it."""
        target = Target(LINKED, Slots(cells=2))
        plan = plan_memory(layers, placement, policy, target, Workload(prompt_len, 32, 8))
        return {
            (n.tier, n.what, n.role): n.nbytes
            for n in plan.needs
            if n.role != "workspace" and n.what != "weights" and (n.what, n.role) != ("cache", "home")
        }

    def computing(prompt_len, chunk):
        return max(layer.workspace_bytes(4, chunk, prompt_len, torch.float16) for layer in layers[:-1])

    short, long = (taken(prompt_len, policy) for prompt_len in (4096, 32768))
    whole = taken(32768, policy.replace(prefill_chunk=0))
    assert long == short and all(nbytes * 60 < whole[key] for key, nbytes in long.items())
    assert computing(32768, 512) == computing(4096, 512) < computing(32768, 32768) / 8


def test_prompts_that_enter_at_a_rate_take_the_memory_of_their_cells():
    """The hidden states of all prompts of a pass and of one token of each row, and keys and values of one cell."""
    policy = Policy(
        gpu_batch_size=6, num_gpu_batches=4, cache={"cpu": 100}, activations={"gpu": 100}, attend_on="cpu",
    )  # fmt: skip
    token, rows, width = 2 * SPEC.hidden_size, 24, 512
    placement, workload = place_weights(LAYERS, policy.weights, torch.float16), Workload(width, 4, rows)

    def needed(policy, tier, what, role):
        plan = plan_memory(LAYERS, placement, policy, Target(LINKED), workload)
        return sum(n.nbytes for n in plan.needs if (n.tier, n.what, n.role) == (tier, what, role))

    slow = policy.replace(prefill_rows=5)  # two prompts in a cell
    hidden = Tier.GPU, "activations", "home"
    assert needed(policy, *hidden) == rows * width * token
    assert needed(slow, *hidden) == 4 * align(6 * token, BLOCK) + 5 * width * token
    staging = Tier.CPU, "cache", "staging"
    assert needed(policy, *staging) - needed(slow, *staging) == 2 * (6 - 2) * 2 * width * token
    for role in "workspace", "slots":
        for what in "activations", "cache", "weights":
            assert needed(slow, Tier.GPU, what, role) <= needed(policy, Tier.GPU, what, role)
    assert needed(slow, Tier.CPU, "cache", "workspace") == 0, "no rows move together"


def test_joint_cells_take_the_workspace_of_all_their_tokens():
    """On a CPU, one call computes six rows that decode and prompts of 40 tokens, up to 512 tokens."""
    policy = Policy(gpu_batch_size=6, cache={"cpu": 100}, activations={"gpu": 100}, prefill_rows=6)
    placement = place_weights(LAYERS, policy.weights, torch.float16)

    def workspace(prompts, width):
        plan = plan_memory(LAYERS, placement, policy, Target(SHARED), Workload(width, 4, prompts))
        return sum(n.nbytes for n in plan.needs if (n.what, n.role) == ("activations", "workspace"))

    def joint(tokens):
        layers = (layer.workspace_bytes(1, tokens, tokens, torch.float16, HOST) for layer in LAYERS[:-1])
        return max(layers) + tokens * 2 * SPEC.hidden_size

    assert workspace(6, 40) >= joint(6 * 40 + 6)
    assert workspace(6, 400) >= joint(512)
