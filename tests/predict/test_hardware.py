"""Machines as data: presets with sources, TOML round trips, and errors."""

import math
import re
import tomllib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import HardwareError
from flexgen.policy import Tier
from flexgen.predict.hardware import PRESETS, Hardware
from flexgen.predict.workspaces import workspaces_on
from flexgen.results.trace import LaneName, Phase
from flexgen.units import MIB

FILE = tomllib.loads(PRESETS.read_text(encoding="utf-8"))
NAMES = list(FILE)
WITH_GPU = [name for name in NAMES if "gpu" in FILE[name]["capacity"]]


@pytest.mark.parametrize("name", NAMES)
def test_presets_load(name):
    preset = Hardware.preset(name)
    assert preset.name == name and len(preset.source) > 40
    assert preset.topology.shares_host_memory == (name not in WITH_GPU)
    for dtype in preset.products:
        assert preset.figure("prefill_attention", dtype) and preset.figure("device_attention", dtype)
        assert preset.topology.shares_host_memory or preset.figure("host_attention", dtype)
    assert {"int4", "int8"} <= set(preset.decoding)


def test_the_machines_that_were_asked_for_are_there():
    assert set(NAMES) >= {
        *["t4", "t4-paper", "l4", "rtx-3090", "rtx-4090", "a100-80g", "h100", "h200", "laptop-16g"],
    }


@pytest.mark.parametrize("name", NAMES)
def test_presets_know_what_the_libraries_of_their_gpu_take(name):
    preset = Hardware.preset(name)
    assert (preset.compute_capability == 0) == preset.topology.shares_host_memory
    # Of cuBLAS: none on a CPU, 8.125 MiB on a GPU, 32 MiB from Hopper (9.0) on.
    wanted = 0 if name not in WITH_GPU else 8.125 if preset.compute_capability < 9 else 32
    assert workspaces_on(preset).fixed == wanted * MIB


def test_a_t4_computes_bfloat16_in_float16(machine):
    points = [[8, 1e9]]
    products = {"bfloat16": points, "float16": points}
    for capability, computed in ((7.5, "float16"), (8.0, "bfloat16"), (0, "bfloat16")):
        hardware = machine(products=products, computes_in={}, compute_capability=capability)
        assert hardware.dtype_for("bfloat16") == computed and hardware.dtype_for("float16") == "float16"
        built = workspaces_on(hardware).attention(1, 8, 512, 512, 64, torch.bfloat16) > 8 * 512 * 512 * 4
        assert built == (capability == 7.5)


def test_every_figure_has_its_source():
    for line in PRESETS.read_text(encoding="utf-8").splitlines():
        if re.match(r"\w[\w.]* = ", line) and not line.startswith("source"):
            assert re.search(r"  # \S.{8,}", line), line


@pytest.mark.parametrize("name", [name for name in WITH_GPU if name != "t4-paper"])
def test_one_point_is_the_roofline_that_the_comments_say(name):
    """Weights are read at the rate at which the cache is: below the ridge a product is bound by memory."""
    preset = Hardware.preset(name)
    for dtype, itemsize in (("float16", 2), ("float32", 4)):
        [(ridge, rate)] = preset.products[dtype]
        assert rate * itemsize / (2 * ridge) == pytest.approx(preset.device_attention[dtype], rel=0.02)


def test_rates_between_and_beyond_points(machine):
    hardware = machine(products={"float32": [[4, 1e9], [16, 2e9]]})
    rate = hardware.product_rate
    assert rate("float32", 4) == 1e9 and rate("float32", 1) == 0.25e9
    assert rate("float32", 16) == rate("float32", 4000) == 2e9
    assert rate("float32", 8) == pytest.approx(math.sqrt(2) * 1e9)


@given(
    peak=st.floats(1e9, 1e15),
    memory=st.floats(1e9, 1e13),
    rows=st.integers(1, 10**6),
    itemsize=st.sampled_from([2, 4]),
)
def test_one_point_is_a_roofline(peak, memory, rows, itemsize, machine):
    ridge = peak * itemsize / (2 * memory)
    hardware = machine(products={"float32": [[ridge, peak]]})
    weights = 1e6
    seconds = 2 * rows * weights / hardware.product_rate("float32", rows)
    assert seconds == pytest.approx(max(2 * rows * weights / peak, weights * itemsize / memory))


rates = st.floats(1e-3, 1e18)
tables = st.dictionaries(st.text(min_size=1, max_size=5), rates, max_size=3)


@st.composite
def machines(draw):
    gpu = draw(st.booleans())
    tiers = (Tier.GPU, Tier.CPU, Tier.DISK) if gpu else (Tier.CPU, Tier.DISK)
    rows = st.lists(st.floats(0.5, 1e6), min_size=1, max_size=4, unique=True).map(sorted)
    return Hardware(
        name=draw(st.text()),
        source=draw(st.text()),
        capacity={tier: draw(st.integers(1, 2**60)) for tier in tiers},
        bandwidth={lane: draw(rates) for lane in LaneName if lane is not LaneName.COMPUTE},
        products={
            dtype: [[r, draw(rates)] for r in draw(rows)]
            for dtype in draw(st.sets(st.sampled_from(["float32", "float16", "bfloat16"]), min_size=1))
        },
        prefill_attention=draw(tables),
        device_attention=draw(tables),
        host_attention=draw(tables),
        decoding=draw(tables),
        elementwise={"float32": [[r, draw(st.floats(0, 1))] for r in draw(rows)]},
        around_attention=draw(st.dictionaries(st.just("float16"), st.floats(0, 1))),
        start=draw(st.dictionaries(st.sampled_from([LaneName.DISK_READ, LaneName.COMPUTE]), st.floats(0, 1))),
        fixed=dict(
            zip(
                ("cell", "attention", "recording", "stage", "disk_job"),
                draw(st.lists(st.floats(0, 10), max_size=5)),
                strict=False,
            )
        ),
    )


@given(hardware=machines())
def test_toml_there_and_back(hardware, tmp_path_factory):
    path = tmp_path_factory.mktemp("hardware") / "machine.toml"
    hardware.save(path)
    assert Hardware.load(path) == hardware
    assert Hardware.find(str(path)) == hardware
    assert Hardware.from_dict(hardware.to_dict()) == hardware


def test_a_file_is_named_after_itself(machine, tmp_path):
    machine().save(path := tmp_path / "mine.toml")
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("name")))
    assert Hardware.load(path).name == "mine"


def test_it_cannot_be_changed(machine):
    hardware = machine()
    with pytest.raises(TypeError):
        hardware.bandwidth[LaneName.HOST] = 1.0
    with pytest.raises(AttributeError):
        hardware.name = "other"
    assert hardware.replace(name="other").name == "other"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(bandwidth={"to_device": 1.0}), "bandwidth lacks disk_read, disk_write, host, from_device"),
        (dict(bandwidth={"to_devise": 1.0}), "unknown key 'to_devise' in bandwidth"),
        (dict(bandwidth={"to_devise": 1.0}), "did you mean 'to_device'"),
        (dict(bandwidth=3), "bandwidth is 3 (int); write a table"),
        (dict(capacity={"cpu": "much", "disk": 1}), "capacity.cpu: 'much' is not a size"),
        (dict(capacity={"cpu": 0, "disk": 1}), "capacity.cpu is 0"),
        (dict(capacity={"cpu": 1}), "capacity lacks disk"),
        (dict(products={"float32": []}), "products.float32 is []; write points"),
        (dict(products={"float32": [[8, 1e9], [8, 2e9]]}), "ascending order of rows"),
        (dict(products={"float32": [[8, -1]]}), "products.float32 is -1; a rate must be above 0"),
        (dict(products={"float8": [[8, 1]]}), "unknown key 'float8' in products; known: float32"),
        (dict(products={}), "products is empty"),
        (dict(decoding={"int4": float("nan")}), "decoding.int4 is nan; it must be a finite number"),
        (dict(decoding={"int4": True}), "decoding.int4 is True"),
        (dict(compute_capability=-1), "compute_capability is -1; it must be at least 0"),
        (dict(compute_capability="8.6"), "compute_capability is '8.6'; it must be a finite number"),
        (dict(fixed={"cell": -1}), "fixed.cell is -1; it must be at least 0 seconds"),
        (
            dict(fixed={"cells": 1}),
            "unknown key 'cells' in fixed; known: cell, attention, recorded, recording, joined, attend, split,",
        ),
        (dict(start={"disk_write": 1}), "unknown key 'disk_write' in start; known: disk_read, compute"),
        (dict(busy_start={"compute": -1}), "busy_start.compute is -1; it must be at least 0 seconds"),
        (dict(name=3), "name is 3; it must be a string"),
    ],
)
def test_mistakes_are_reported(changes, said, machine):
    with pytest.raises(HardwareError, match=re.escape(said)):
        machine(**changes)


def test_bad_files(tmp_path, machine):
    with pytest.raises(HardwareError, match="nowhere.toml: cannot read it"):
        Hardware.load(tmp_path / "nowhere.toml")
    path = tmp_path / "bad.toml"
    path.write_text("capacity = ")
    with pytest.raises(HardwareError, match="bad.toml: not valid TOML.*; correct the file, or measure"):
        Hardware.find(str(path))
    path.write_text("capacity = { cpu = 1, disk = 1 }")
    with pytest.raises(HardwareError, match="bad.toml: bandwidth, products, .* missing"):
        Hardware.load(path)
    path.write_text("speed = 1")
    with pytest.raises(HardwareError, match="unknown key 'speed'; known: name, source, capacity"):
        Hardware.load(path)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(HardwareError, match="'h1000' is not known; known: t4, .*did you mean 'h100'"):
        Hardware.preset("h1000")


def test_the_host_computes_in_the_thread_that_issues_the_steps(machine):
    """Also for an emulated device, whose memory is its own."""
    assert not machine().computes_inline and machine(shares_cores=True).computes_inline
    host = {tier: nbytes for tier, nbytes in machine().capacity.items() if tier is not Tier.GPU}
    assert machine(capacity=host).computes_inline


def test_jobs_start_later_while_other_lanes_work(machine):
    plain = machine()
    assert not plain.startup(serial=False)
    read, compute = LaneName.DISK_READ, LaneName.COMPUTE
    slow = plain.replace(start={read: 1e-3, compute: 4e-3}, busy_start={read: 2e-3, compute: 3e-3})
    assert slow.startup(serial=True) == {read: 1e-3, compute: 4e-3}
    assert slow.startup(serial=False) == {read: 2e-3, compute: 4e-3}
    assert plain.replace(start={read: 1e-3}).startup(serial=False) == {read: 1e-3}
    assert plain.replace(busy_start={compute: 1e-3}).startup(serial=True) == {}


def test_a_figure_that_is_missing_is_named(machine):
    with pytest.raises(HardwareError, match=r"'round' has no figure decoding.int3, only for int4, int8"):
        machine().figure("decoding", "int3")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "t4-paper"])
def test_the_link_and_the_host_share_what_memory_gives(name):
    """What the host attends at is what its memory gives; t4-paper's figures are fitted to runs, and ask for less."""
    machine = Hardware.preset(name)
    if machine.topology.shares_host_memory:
        assert not machine.losses
        return
    (most,) = {rate for kind, rate in machine.host_attention.items() if kind.startswith(("float", "bfloat"))}
    link, copies = machine.bandwidth[LaneName.TO_DEVICE], 2 * machine.bandwidth[LaneName.HOST]
    decode, prefill = machine.losses[Phase.DECODE], machine.losses.get(Phase.PREFILL, {})
    together = (LaneName.HOST, LaneName.TO_DEVICE), (LaneName.TO_DEVICE, LaneName.HOST)
    for rate, losses in ((most, decode), (copies, prefill)):
        lost = [losses.get(pair, 0.0) for pair in together]
        taken = rate * (1 - lost[0]) + link * (1 - lost[1])
        assert taken <= 1.01 * most
        assert taken >= 0.99 * min(most, rate + link), "no more is lost than has to be"
