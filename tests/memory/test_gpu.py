"""Compute devices: their names, their memory, and the links that feed them."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from flexgen.errors import CapacityError, RequestError, shown
from flexgen.memory.cpu import HostStore
from flexgen.memory.cuda import CudaDevice
from flexgen.memory.gpu import EmulatedDevice, HostDevice, Pace, choose_dtype, open_device
from flexgen.memory.lanes import InlineLane
from flexgen.memory.shared_gpu import shared_gpu
from flexgen.policy import Tier
from flexgen.results.trace import LaneName
from flexgen.units import GIB, MIB


class VirtualTime:
    """A clock that only sleeping moves."""

    def __init__(self, short=1.0):
        self.now, self.naps, self.short = 0.0, [], short

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.naps.append(seconds)
        self.now += seconds * self.short


def test_pace_waits_for_what_is_left_of_a_transfer():
    time = VirtualTime()
    pace = Pace(100.0, time.clock, time.sleep)
    pace.wait(began=0.0, nbytes=50)
    assert time.now == 0.5
    began, time.now = time.now, time.now + 0.2  # the copy itself took part of the time
    pace.wait(began, nbytes=100)
    assert time.now == pytest.approx(1.5)


def test_pace_does_not_wait_for_a_slow_copy():
    time = VirtualTime()
    time.now = 5.0
    Pace(100.0, time.clock, time.sleep).wait(began=0.0, nbytes=100)
    assert time.naps == []


def test_pace_sleeps_again_when_woken_early():
    time = VirtualTime(short=0.75)
    Pace(100.0, time.clock, time.sleep).wait(began=0.0, nbytes=100)
    assert time.now >= 1.0 or time.now == pytest.approx(1.0)
    assert len(time.naps) > 1


@pytest.mark.parametrize("name", ["cpu", " CPU ", torch.device("cpu")])
def test_the_cpu_by_name(name):
    device = open_device(name)
    assert isinstance(device, HostDevice)
    assert device.shares_host_memory and device.memory.tier is Tier.CPU
    assert device.available_bytes() is None


@pytest.mark.parametrize(
    ("name", "memory", "link", "disk"),
    [
        ("emulated", None, None, None),
        ("emulated:memory=1GiB,link=8GiB,disk=2GiB", GIB, 8 * GIB, 2 * GIB),
        ("Emulated:disk=100MB", None, None, 10**8),
        ("emulated:memory=4096", 4096, None, None),
    ],
)
def test_emulated_devices_by_name(name, memory, link, disk):
    device = open_device(name)
    assert isinstance(device, EmulatedDevice)
    assert device.memory.capacity == memory and device.available_bytes() == memory
    assert (device.pace.bandwidth if device.pace else None) == link
    assert device.disk_bandwidth == disk
    assert not device.shares_host_memory and device.memory.tier is Tier.GPU


def test_a_device_is_taken_as_it_is():
    device = EmulatedDevice(MIB)
    assert open_device(device) is device


@pytest.mark.parametrize(
    "name",
    ["", "tpu", "gpu", "cpu:0", "cpu:memory=1GiB", "emulated:0", "emulated:speed=3", "emulated:memory", "cuda:0,1"]
    + ["emulated:memory=1e400", "emulated:memory=" + "9" * 5000, "cuda:99999999999999999999", "cuda:" + "9" * 5000]
    + ["cuda:300", "cuda:\u0661", "emulated:link=" + "9" * 400]
    + ["emulated:memory=lots", "emulated:memory=-1", "emulated:link=0", "cuda:link=8GiB", "cuda:x", "auto:0"],
)  # fmt: skip
def test_other_names_are_refused(name):
    with pytest.raises(RequestError) as caught:
        open_device(name)
    assert f"device {shown(name)}" in str(caught.value)


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(open_device("auto"), HostDevice)


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "cuda:0,memory=16GiB", "cuda,memory=16GiB"])
def test_a_missing_gpu_is_reported(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match=r"device cuda:\d: no GPU is visible to torch; use device='cpu'"):
        open_device(name)


@pytest.mark.parametrize("device", [HostDevice(), EmulatedDevice()])
@pytest.mark.parametrize("way", ["to_device", "from_device"])
def test_a_move_is_a_copy(device, way):
    source = torch.arange(1000, dtype=torch.uint8)
    target = device.memory.allocate(1000, "a target")
    getattr(device, way)(target, source)
    assert torch.equal(target, source)
    source.zero_()
    assert target.any(), "the target must not be a view of the source"


def test_an_emulated_link_moves_bytes_whatever_they_mean():
    device = EmulatedDevice()
    source, target = torch.randn(3, 4), torch.zeros(48, dtype=torch.uint8)
    device.to_device(target, source)
    assert torch.equal(target.view(torch.float32).view(3, 4), source)


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (torch.zeros(5), torch.zeros(4)),
        (torch.zeros(4), torch.zeros(5)),
        (torch.zeros(4, 4).t(), torch.zeros(4, 4)),
        (torch.zeros(4, 4), torch.zeros(4, 8)[:, :4]),
    ],
)
def test_an_emulated_link_refuses_what_it_cannot_carry(target, source):
    with pytest.raises(ValueError, match="a link copies contiguous tensors of equal bytes"):
        EmulatedDevice().to_device(target, source)


def test_an_emulated_link_keeps_its_pace():
    device, time = EmulatedDevice(link=1000.0), VirtualTime()
    device.pace = Pace(1000.0, time.clock, time.sleep)
    device.to_device(torch.zeros(500, dtype=torch.uint8), torch.ones(500, dtype=torch.uint8))
    device.from_device(torch.zeros(250, dtype=torch.uint8), torch.ones(250, dtype=torch.uint8))
    assert time.now == 0.75


def test_emulated_memory_is_limited():
    device = EmulatedDevice(memory=MIB)
    buffer = device.memory.allocate(MIB // 2, "weights")
    assert device.available_bytes() == MIB // 2
    with pytest.raises(CapacityError, match="on the gpu tier"):
        device.memory.allocate(MIB, "KV cache")
    device.memory.release(buffer)
    assert device.peak_bytes() == MIB // 2 and device.available_bytes() == MIB


@pytest.mark.parametrize("name", ["cpu", "emulated"])
def test_every_device_serves_every_lane(name):
    lanes = open_device(name).make_lanes()
    try:
        assert set(lanes) == set(LaneName)
        distinct = len({id(lane) for lane in lanes.values()})
        if name == "emulated":
            assert distinct == len(LaneName)  # a resource each
        else:
            assert distinct == 3  # the processor, and the disk in both directions
        assert isinstance(lanes[LaneName.COMPUTE], InlineLane)  # no thread hop for a computation
    finally:
        lanes.close()


@pytest.mark.parametrize("device", [HostDevice(), EmulatedDevice()])
@pytest.mark.parametrize(
    ("bf16", "amx", "fast"),
    [(True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32)],
)
def test_half_precision_on_a_processor(monkeypatch, device, bf16, amx, fast):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert device.fast_dtype(torch.float16) is fast
    for dtype in (torch.float32, torch.bfloat16):
        assert device.fast_dtype(dtype) is dtype


@pytest.fixture
def runtime(monkeypatch):
    """A made-up GPU of 16 GiB, on which torch is not initialised yet; a namespace of its account."""
    card = SimpleNamespace(
        ready=False, total=16 * GIB, free=15 * GIB, reserved=0, allocated=0, shares=[], capability=(8, 0)
    )

    def needs_device(device, *_):
        if not card.ready:
            raise RuntimeError("Invalid device argument 0: did you call init?")

    def empty_cache():
        card.free, card.reserved = card.free + card.reserved - card.allocated, card.allocated

    fakes = {
        "device": contextlib.nullcontext,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "init": lambda: setattr(card, "ready", True),
        "reset_peak_memory_stats": needs_device,
        "get_device_properties": lambda device: SimpleNamespace(
            total_memory=card.total, multi_processor_count=108
        ),
        "set_per_process_memory_fraction": lambda share, device: card.shares.append(share),
        "mem_get_info": lambda device: (card.free, card.total),
        "memory_reserved": lambda device: card.reserved,
        "memory_allocated": lambda device: card.allocated,
        "max_memory_allocated": lambda device: card.allocated,
        "empty_cache": empty_cache,
        "get_per_process_memory_fraction": lambda device: 1.0,
        "get_device_capability": lambda device: card.capability,
    }
    monkeypatch.setattr(torch._C, "_cuda_getCublasWorkspaceSize", lambda: 8 * MIB, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    shared_gpu.cache_clear()
    yield card
    shared_gpu.cache_clear()


def test_a_gpu_opens_in_a_process_that_has_not_used_one(runtime):
    device = open_device("cuda")
    assert isinstance(device, CudaDevice) and runtime.ready
    device.close()
    assert runtime.shares == []
    capped = open_device("cuda,memory=4GiB")
    capped.close()
    capped.close()
    assert runtime.shares == [0.25, 1.0]  # the cap, which ends with the device


def test_what_torch_keeps_of_a_gpu_can_be_taken_again(runtime):
    device = open_device("cuda")
    before = device.available_bytes()
    assert 0.9 * runtime.free < before < runtime.free - runtime.total // 25  # room for workspaces
    runtime.free, runtime.reserved, runtime.allocated = 5 * GIB, 10 * GIB, 0  # behind a call
    assert device.available_bytes() == before
    runtime.allocated = 4 * GIB
    assert device.available_bytes() == before - 4 * GIB
    device.close()
    assert runtime.reserved == runtime.allocated and runtime.free == 11 * GIB
    runtime.free = 0
    assert device.available_bytes() == 0


def test_a_cap_keeps_a_reserve_too(runtime):
    device = open_device("cuda,memory=4GiB")
    assert 0.9 * 4 * GIB < device.available_bytes() < 0.97 * 4 * GIB
    device.memory.used = GIB
    assert 0.85 * 3 * GIB < device.available_bytes() < 0.97 * 3 * GIB


@pytest.mark.parametrize(
    ("capability", "hip", "fast"),
    [((7, 5), None, torch.float16), ((8, 0), None, torch.bfloat16), ((7, 5), "6.2", torch.bfloat16)],
)
def test_bfloat16_only_where_a_gpu_has_instructions_for_it(
    runtime, monkeypatch, caplog, capability, hip, fast
):
    runtime.capability = capability
    monkeypatch.setattr(torch.version, "hip", hip)
    device = open_device("cuda")
    assert choose_dtype("auto", torch.bfloat16, device) is fast
    assert ("no instructions for bfloat16" in caplog.text) == (fast is torch.float16)
    assert choose_dtype("auto", torch.float16, device) is torch.float16
    assert choose_dtype("bfloat16", torch.bfloat16, device) is torch.bfloat16
    built = device.workspaces.attention(1, 1, 64, 64, 64, torch.bfloat16)
    assert (built > 64 * 64 * torch.float32.itemsize) == (fast is torch.float16)
    assert device.compute_capability == (0.0 if hip else capability[0] + capability[1] / 10)
    device.close()


def test_caps_of_two_models_on_one_gpu_add_up(runtime):
    first, second = (open_device(f"cuda,memory={n}GiB") for n in (4, 2))
    uncapped = open_device("cuda")
    for device in (uncapped, first, second):
        device.close()
    assert runtime.shares == [0.25, 0.375, 1.0, 0.375, 0.125, 1.0]


@pytest.mark.gpu
@pytest.mark.parametrize("pin", [True, False])
def test_a_round_trip_through_a_gpu(pin):
    device, host = open_device("cuda:0"), HostStore(pin_for=torch.device("cuda", 0) if pin else None)
    source, back = (host.allocate(MIB, "a buffer") for _ in range(2))
    source.random_(0, 256)
    there = device.memory.allocate(MIB, "a target")
    assert there.device == device.torch_device and not there.any()
    device.to_device(there, source)
    device.from_device(back, there)
    device.wait_for_compute()
    assert torch.equal(back, source)
    assert device.memory.used == MIB and device.peak_bytes() >= MIB
    host.close()


@pytest.mark.gpu
def test_a_gpu_with_a_limit():
    try:
        device = open_device("cuda:0,memory=64MiB")
        assert isinstance(device, CudaDevice) and device.available_bytes() <= 64 * MIB
        with pytest.raises(CapacityError, match="on the gpu tier"):
            device.memory.allocate(65 * MIB, "weights")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)  # the cap is the process's: not for other tests
    with pytest.raises(RequestError, match="GPUs, numbered from 0"):
        open_device(f"cuda:{torch.cuda.device_count()}")


@pytest.mark.gpu
def test_a_gpu_has_streams_and_threads():
    lanes = open_device("cuda").make_lanes()
    assert set(lanes) == set(LaneName) and len({id(lane) for lane in lanes.values()}) == len(LaneName)
    lanes.close()
