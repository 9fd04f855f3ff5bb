"""What tests of every folder share: hypothesis' profile, a machine that is made up, and fixtures."""

import importlib
import json
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from flexgen.engine import auto
from flexgen.memory.gpu import open_device
from flexgen.models import cached_specs, families, tied_head
from flexgen.predict.hardware import Hardware
from flexgen.schedule.steps import Grid

# No deadline: how long an example takes says something about the machine, not about the code. The same examples
# each time: what a run finds, it finds again. `--hypothesis-profile=explore` tries others, and many more of them
# where a test does not say how many.
settings.register_profile("flexgen", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("flexgen")

# `st.from_type(Grid)`: small, with slots enough for every order.
GRID = {name: st.integers(1, 5) for name in ("tokens", "layers", "batches")}
GRID |= {
    "weight_pieces": st.integers(1, 7),
    "weight_slots": st.integers(2, 5),
    "cell_slots": st.integers(2, 5),
}
st.register_type_strategy(Grid, st.builds(Grid, **GRID, splits_attention=st.booleans()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))


def machine_of(device, offload_dir=None, again=False, progress=None) -> Hardware:
    """Round figures for a device of any name, so that what is searched does not depend on where tests run."""
    compute = open_device(device)
    capacity = {"cpu": 1 << 32, "disk": 1 << 36}
    if not compute.shares_host_memory:
        capacity["gpu"] = compute.available_bytes() or 1 << 34
    rates = dict.fromkeys(("float32", "bfloat16", "float16", "int4", "int8"), 1e9)
    dtypes = ("float32", "bfloat16", "float16")
    return Hardware(
        name=f"made up, {compute.name}",
        capacity=capacity,
        bandwidth={"to_device": 4e9, "from_device": 4e9, "disk_read": 1e9, "disk_write": 5e8, "host": 8e9},
        products={dtype: [[1, 1e9], [64, 4e10]] for dtype in dtypes},
        prefill_attention=dict.fromkeys(dtypes, 1e10),
        device_attention=rates,
        host_attention=rates,
        decoding={"int4": 1e9, "int8": 1e9},
        computes_in={"float16": "float32"} if compute.shares_cores else {},
        fixed={"cell": 1e-5, "stage": 1e-5, "disk_job": 1e-4},
    )


@pytest.fixture(autouse=True, scope="session")
def nothing_is_measured():
    """What "auto" would measure of this machine is made up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "measured", machine_of)
        patch.setattr(auto, "remembered", lambda device, offload_dir=None: None)
        yield machine_of


@pytest.fixture(autouse=True, scope="session")
def models_are_cached_for_this_session(tmp_path_factory):
    """Tests neither read facts about models from the user's cache nor write to it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        for module in (cached_specs, tied_head):
            patch.setattr(module, "cache_folder", lambda kind: folder / kind)
        yield


@pytest.fixture(autouse=True, scope="session")
def interrupts_arrive():
    """What a shell starts in the background ignores them, and so would all that is started here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def uneven():
    """The module of a family whose layers differ (more_families/uneven.py), which is found as any family is."""
    with pytest.MonkeyPatch.context() as patch:
        folder = Path(__file__).parent / "more_families"
        patch.setattr(families, "__path__", [*families.__path__, str(folder)])
        yield importlib.import_module("flexgen.models.families.uneven")


@pytest.fixture
def peak_bytes(tmp_path):
    """`peak_bytes(call)`: the most bytes of tensors that `call` held at once, from the allocator's own events."""

    def peak(call) -> int:
        call()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        trace = tmp_path / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda e: e["ts"]):
            held += event["args"]["Bytes"]
            most = max(most, held)
        return most

    return peak
