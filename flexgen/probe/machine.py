"""The measurement of a machine: all figures of a `Hardware`, in order."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from flexgen.errors import CapacityError
from flexgen.kernels.heads import HeadFormat, PlainHeads
from flexgen.memory.device import ComputeDevice
from flexgen.memory.lanes import Lanes
from flexgen.memory.machine import Machine
from flexgen.policy import Tier
from flexgen.predict.fixed import Fixed
from flexgen.predict.hardware import Hardware
from flexgen.probe.arithmetic import ArithmeticProbe
from flexgen.probe.effort import FULL, Clock, Effort, Stopwatch, on_gpu
from flexgen.probe.elementwise import ElementwiseProbe
from flexgen.probe.links import LinkProbe
from flexgen.probe.overheads import cell_seconds, host_attention_seconds
from flexgen.probe.together import lost_shares, meanwhile
from flexgen.quant import CODECS, Codec
from flexgen.results.trace import LaneName, Phase
from flexgen.units import BLOCK, MIB, format_bytes

Progress = Callable[[int, int, str], object]
"""Called before each measurement, with the number done, the total number and the name of the next one."""

logger = logging.getLogger(__name__)

_BUSY = 0.1
"""The share of the processors that other programs may use during a measurement."""
_LEAST_MEMORY = 8 * MIB
"""The minimum memory of a device, for long transfers and for the model that measures the fixed cost of a cell."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU = torch.device("cpu")
_OTHERS = (LaneName.TO_DEVICE, LaneName.FROM_DEVICE, LaneName.DISK_READ, LaneName.DISK_WRITE)
_OTHER_ROWS = {Phase.DECODE: ("interference", 16), Phase.PREFILL: ("prefill_interference", 512)}
"""For each phase, its table and the rows of the product that runs together with other lanes. A product with few rows
is limited by memory bandwidth and cores, one with many rows by the cores."""
_STARTS = 32
"""The number of reads from which the start of a read is measured."""
_PAUSE = 3e-3
"""Seconds without reads, after which the threads of the disk sleep."""
_IN_FLIGHT = 3
"""The number of reads in flight while a computation starts."""
_NOISE = 0.03
"""Shares up to this one are noise between two measurements."""


def measure(
    device: str | torch.device | ComputeDevice = "auto",
    offload_dir: str | Path | None = None,
    progress: Progress | None = None,
    *,
    effort: Effort = FULL,
    clock: Clock = time.perf_counter,
) -> Hardware:
    """Measure `device` (as in `OptLM`), the host and the disk of `offload_dir`.

    It takes less than a minute on two cores, `Effort.file` bytes of disk, and a few times `Effort.working_set` bytes
    of memory, or less if less is free. Keep the machine idle: `disturbed` reports other programs. Raises RequestError
    for a device that does not exist, and CapacityError if there is not enough memory.
    """
    with contextlib.ExitStack() as stack, torch.inference_mode():
        machine = Machine.open(device, offload_dir)
        stack.callback(machine.close)
        stack.enter_context(machine.device.active())
        others = _Others()
        lanes = machine.make_lanes()
        stack.callback(lanes.close)
        machine.device.begin_call(others)
        stack.callback(machine.device.end_call, others)
        hardware = _Measurement(machine, lanes, effort, clock).run(progress)
        if (share := others.share()) > _BUSY:
            note = f"{hardware.source}; other programs used {share:.0%} of the processors during it"
            hardware = hardware.replace(source=note, disturbed=share)
    return hardware


class _Others:
    """Measures the share of the processors that other programs use, from its creation on."""

    def __init__(self) -> None:
        self._began = self._seconds()

    def share(self) -> float:
        (began_all, began_others), (all_, others) = self._began, self._seconds()
        return min(max((others - began_others) / max(all_ - began_all, 1e-9), 0.0), 1.0)

    @staticmethod
    def _seconds() -> tuple[float, float]:
        """The total seconds of all processors, and the seconds in which other programs ran."""
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # Guest time is included in user time.
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return total, total - idle - own.user - own.system


def within(effort: Effort, memory: int, where: str) -> Effort:
    """Reduce `effort` to a part of `memory` bytes of `where`.

    Transfers are whole blocks, because they go to the disk too. Raises CapacityError if the memory is too small.
    """
    if memory < _LEAST_MEMORY:
        raise CapacityError(
            f"{where} has {format_bytes(memory)} for the measurement, which needs at least "
            f"{format_bytes(_LEAST_MEMORY)}: free some memory, or raise the limit (memory=...)"
        )
    share = memory // 8 // BLOCK * BLOCK
    hidden, heads = effort.hidden, effort.heads
    # Attention and the feed-forward half of a layer have 16 matrices of hidden x hidden values.
    while heads % 2 == 0 and 16 * hidden**2 * torch.float32.itemsize > memory // 4:
        hidden, heads = hidden // 2, heads // 2
    return replace(
        effort,
        working_set=min(effort.working_set, share),
        transfer=min(effort.transfer, share),
        hidden=hidden,
        cache_rows=max(min(effort.cache_rows, share // (8 * effort.context * hidden)), 2),
        heads=heads,
    )


def capacities(machine: Machine) -> dict[Tier, int]:
    """The free bytes of each tier. A tier without a limit has that of the host."""
    limits = machine.limits()
    own = {tier: limits[tier] if limits[tier] is not None else limits[Tier.CPU] for tier in Tier}
    if machine.device.shares_host_memory:
        del own[Tier.GPU]
    elif limits.host is not None:  # both tiers together must fit the host
        device = min(own[Tier.GPU] or 0, limits.host // 2)
        own |= {Tier.GPU: device, Tier.CPU: min(own[Tier.CPU] or 0, limits.host - device)}
    return {tier: max(count, 1) for tier, count in own.items() if count is not None}


def installed(machine: Machine) -> dict[Tier, int]:
    """The total bytes of each tier, used or free."""
    device, host = machine.device, psutil.virtual_memory().total
    there = {Tier.CPU: host, Tier.DISK: machine.disk.total}
    if device.torch_device.type == "cuda":
        there[Tier.GPU] = torch.cuda.get_device_properties(device.torch_device).total_memory
    elif not device.shares_host_memory:
        there[Tier.GPU] = device.memory.capacity or host
    return there


def description(machine: Machine) -> tuple[str, str]:
    """The name and the source of the measurement of a machine."""
    device = machine.device
    name = device.name
    if device.torch_device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device.torch_device)} ({device.name})"
    elif not device.shares_host_memory:
        name = f"{device.name} on {processor()}"
    else:
        name = processor()
    parts = [f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"]
    parts.append(f"{format_bytes(psutil.virtual_memory().total)} of host memory")
    if device.torch_device.type == "cuda":
        total = torch.cuda.get_device_properties(device.torch_device).total_memory
        parts.append(f"{format_bytes(total)} of GPU memory")
    day = datetime.datetime.now().astimezone().date().isoformat()
    return name, f"measured by python -m flexgen.measure on {day}: {'; '.join(parts)}"


def processor() -> str:
    """The model name of the CPU, as reported by the system."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "CPU"


class _Measurement:
    """The figures so far, and the work that measures each."""

    def __init__(self, machine: Machine, lanes: Lanes, effort: Effort, clock: Clock) -> None:
        self._machine = machine
        self._device = machine.device
        self._lanes = lanes
        if self._device.torch_device != _CPU:
            effort = on_gpu(effort)
        for tier, left in machine.limits().items():
            if left is not None and tier is not Tier.DISK:
                where = f"device {self._device.name}" if tier is Tier.GPU else "the host"
                effort = within(effort, left, where)
        self._effort = effort
        self._clock = clock
        self._watch = Stopwatch(effort.sampling, clock)
        self._links = LinkProbe(machine, lanes, effort, self._watch)
        self._figures: dict[str, dict[Any, Any]] = {}
        self._fixed: dict[str, float] = {}

    def run(self, progress: Progress | None) -> Hardware:
        work = list(self._work())
        try:
            for n, (label, job) in enumerate(work):
                if progress:
                    progress(n, len(work), label)
                job()
            if progress:
                progress(len(work), len(work), "done")
        finally:
            self._links.close()
        name, source = description(self._machine)
        capacity = capacities(self._machine)
        fields: dict[str, Any] = {"name": name, "source": source, "capacity": capacity} | self._figures
        return Hardware(
            **fields,
            installed=installed(self._machine),
            compute_capability=self._device.compute_capability,
            shares_cores=not self._device.shares_host_memory and self._device.shares_cores,
            fixed=Fixed(**self._fixed),
        )

    def _put(self, table: str, key: object, find: Callable[[], Any]) -> None:
        if found := find():
            self._figures.setdefault(table, {})[key] = found

    def _work(self) -> Iterator[tuple[str, Callable[[], object]]]:
        shared = self._device.shares_host_memory
        lanes = [LaneName.DISK_WRITE, LaneName.DISK_READ]
        if not shared:
            lanes += [LaneName.TO_DEVICE, LaneName.FROM_DEVICE]
        for lane in lanes:
            yield (
                f"bandwidth {lane}",
                partial(self._put, "bandwidth", lane, partial(self._links.bandwidth, lane)),
            )
        if self._device.pinnable:
            for lane in (LaneName.TO_DEVICE, LaneName.FROM_DEVICE):
                find = partial(self._links.pageable_bandwidth, lane)
                yield f"bandwidth {lane}, pageable memory", partial(self._put, "pageable", lane, find)
        yield "bandwidth host", partial(self._put, "bandwidth", LaneName.HOST, self._links.host_copies)
        yield "fixed costs", self._find_fixed
        for dtype in self._dtypes():
            yield from self._of_dtype(dtype)
        computed = {
            str(dtype).removeprefix("torch."): self._device.fast_dtype(dtype) for dtype in self._dtypes()
        }
        self._figures["computes_in"] = {
            name: str(dtype).removeprefix("torch.")
            for name, dtype in computed.items()
            if str(dtype) != f"torch.{name}"
        }
        yield "lanes together", self._find_interference
        yield "starts", self._find_starts

    def _dtypes(self) -> list[torch.dtype]:
        if self._device.torch_device.type == "cuda" and not torch.cuda.is_bf16_supported():
            return [torch.float32, torch.float16]
        return list(_DTYPES)

    def _of_dtype(self, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
        device, name = self._device, str(dtype).removeprefix("torch.")
        probe = ArithmeticProbe(device, dtype, self._effort, self._watch)
        yield f"products {name}", partial(self._put, "products", name, probe.products)
        if device.prelayout(dtype):
            yield (
                f"packed products {name}",
                partial(self._put, "packed_products", name, probe.packed_products),
            )
        brief = replace(self._effort.sampling, seconds=self._effort.sampling.seconds / 2)
        narrow = ElementwiseProbe(probe, device, dtype, self._effort, Stopwatch(brief, self._clock))
        yield f"element-wise work {name}", partial(self._find_elementwise, narrow, name)
        for codec in CODECS.values():
            key = f"{name} {codec.name}"
            yield f"products {key}", partial(self._find_encoded, probe, narrow, key, codec)
            yield f"decoding {key}", partial(self._put, "decoding", key, partial(probe.decoding, codec))
        yield (
            f"attention of a prompt, {name}",
            partial(self._put, "prefill_attention", name, probe.prompt_attention),
        )
        yield f"around attention, {name}", partial(self._find_around_attention, narrow, name)
        head_dim = self._effort.hidden // self._effort.heads
        forms: dict[str, HeadFormat] = {name: PlainHeads(head_dim, dtype)}
        # An encoded cache has the same bytes for every dtype, so one dtype is enough.
        if dtype is device.fast_dtype(torch.float16):
            forms |= {codec.name: codec.heads(head_dim) for codec in CODECS.values()}
        for key, form in forms.items():
            yield f"attention of a token, {key}", partial(self._find_attention, probe, key, form)

    def _find_elementwise(self, narrow: ElementwiseProbe, name: str) -> None:
        found = narrow.seconds_of_numbers(self._figures["products"][name])
        self._figures.setdefault("elementwise", {})[name] = found
        for table in ("products", "packed_products"):
            rates = self._figures.get(table, {})
            if name in rates:
                rates[name] = narrow.alone(rates[name], found)

    def _find_encoded(self, probe: ArithmeticProbe, narrow: ElementwiseProbe, key: str, codec: Codec) -> None:
        # An empty entry means that no product uses encoded matrices; no entry means that it was not measured.
        found, name = probe.encoded_products(codec), key.split()[0]
        if plain := self._figures.get("elementwise", {}).get(name):
            found = narrow.alone(found, plain)
        self._figures.setdefault("encoded_products", {})[key] = found

    def _find_around_attention(self, narrow: ElementwiseProbe, name: str) -> None:
        rate = self._figures["prefill_attention"][name]
        self._figures.setdefault("around_attention", {})[name] = narrow.around_attention(rate)

    def _find_attention(self, probe: ArithmeticProbe, key: str, form: Any) -> None:
        device, host = self._device, self._machine.host
        found = probe.token_attention(form, device.memory, device.torch_device)
        self._figures.setdefault("device_attention", {})[key] = found
        if not device.shares_host_memory:
            if device.torch_device != _CPU:
                found = probe.token_attention(form, host, _CPU)
            self._figures.setdefault("host_attention", {})[key] = found

    def _find_fixed(self) -> None:
        shared = self._device.shares_host_memory
        links = (LaneName.HOST,) if shared else (LaneName.TO_DEVICE, LaneName.FROM_DEVICE)
        self._fixed["stage"] = self._links.latency(links)
        self._fixed["disk_job"] = self._links.latency((LaneName.DISK_READ,))
        device = self._device
        dtype = device.fast_dtype(torch.float16)
        probe = ArithmeticProbe(device, dtype, self._effort, self._watch)
        self._fixed |= cell_seconds(self._machine, self._lanes, dtype, self._effort, probe.has_tapes())
        if not shared:
            cell = self._fixed["cell"]
            self._fixed |= host_attention_seconds(self._machine, self._lanes, dtype, self._effort, cell)

    def _find_interference(self) -> None:
        """Measure how each pair of lanes slows down, and for the prefill each lane together with the computation."""
        device = self._device
        dtype = device.fast_dtype(torch.float16)
        probe = ArithmeticProbe(device, dtype, self._effort, self._watch)
        others: dict[LaneName, Callable[[], object]] = {}
        if not device.shares_host_memory:
            form = PlainHeads(self._effort.hidden // self._effort.heads, dtype)
            others[LaneName.HOST] = probe.attending(form, self._machine.host, _CPU)
        lanes = _OTHERS if not device.shares_host_memory else (LaneName.DISK_READ, LaneName.DISK_WRITE)
        for lane in lanes:
            others[lane] = self._links.mover(lane)
        for phase, (table, rows) in _OTHER_ROWS.items():
            # Compute is first: the other lane runs until the last product ends, which may take most of the time.
            work = {LaneName.COMPUTE: self._multiplying(probe, rows), **others}
            found = self._figures.setdefault(table, {})
            for one, other in itertools.combinations(work, 2):
                if phase is Phase.PREFILL and LaneName.COMPUTE not in (one, other):
                    continue  # equal in both phases
                lost = lost_shares(work[one], work[other], self._effort.sampling.together, self._clock)
                for lane, other_lane, share in ((one, other, lost[0]), (other, one, lost[1])):
                    found[f"{lane} {other_lane}"] = share if share > _NOISE else 0.0
        probe.release()

    def _find_starts(self) -> None:
        """Measure the starts of reads and of computations, each without other work and while another lane works."""
        device, links = self._device, self._links
        probe = ArithmeticProbe(device, device.fast_dtype(torch.float16), self._effort, self._watch)
        _, rows = _OTHER_ROWS[Phase.DECODE]
        several, one = (self._multiplying(probe, each) for each in (rows, 1))
        together = partial(meanwhile, several, count=_STARTS)
        lost = self._figures["interference"]["disk_read compute"]
        # In a serial order, a read follows a computation, whose threads do not sleep at once.
        alone = {
            LaneName.DISK_READ: links.start_of_read(lambda read: [read() for _ in range(_STARTS)], several)
        }
        busy = {LaneName.DISK_READ: links.start_of_read(together, partial(time.sleep, _PAUSE), lost)}
        if device.shares_host_memory or device.shares_cores:  # its thread waits for reads
            alone[LaneName.COMPUTE] = links.start_of_computation(one, 0)
            busy[LaneName.COMPUTE] = links.start_of_computation(one, _IN_FLIGHT)
        self._figures |= {"start": alone, "busy_start": busy}
        probe.release()

    def _multiplying(self, probe: ArithmeticProbe, rows: int) -> Callable[[], None]:
        """A product of `rows` rows on the device, until its end."""
        enqueue = probe.multiplying(rows)

        def multiply() -> None:
            enqueue()
            self._device.wait_for_compute()

        return multiply
