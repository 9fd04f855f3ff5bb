"""The figures of a machine that a prediction needs.

A `Hardware` is plain, immutable, validated data. Its keyword arguments are the keys of its TOML file. Presets are
stored in `hardware.toml`, each figure with its source.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from flexgen.errors import HardwareError, cut, did_you_mean, shown, shown_path
from flexgen.kernels.workspaces import BFLOAT16_CAPABILITY
from flexgen.layout.topology import LINKED, SHARED, Topology
from flexgen.memory.machine import PINNED_SHARE
from flexgen.policy import CODECS, Tier
from flexgen.predict import checks
from flexgen.predict.checks import Points
from flexgen.predict.fixed import Fixed
from flexgen.results.trace import LaneName, Phase

PRESETS = Path(__file__).with_name("hardware.toml")

_LINK = (LaneName.TO_DEVICE, LaneName.FROM_DEVICE)
_DISK = (LaneName.DISK_READ, LaneName.DISK_WRITE)
_HOST = (LaneName.HOST,)
_STARTED = (LaneName.DISK_READ, LaneName.COMPUTE)
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The figures of one machine.

    name: the name of the machine.
    source: the origin of the figures.
    capacity: by tier, the bytes that a plan may use. Without `gpu`, the compute device is the host.
    installed: by tier, the total bytes. It is only reported; plans do not use it.
    compute_capability: of an NVIDIA GPU, such as 8.6; 0 if it is unknown. The workspaces of libraries depend on it.
        Below 8.0, "auto" computes a bfloat16 checkpoint in float16.
    bandwidth: by lane, bytes/s: `to_device` and `from_device` (a GPU's link), `disk_read`, `disk_write`, and `host`
        for copies within host memory.
    pageable: bytes/s of a GPU's link, `to_device` and `from_device`, for host memory that is not pinned. Without
        them, it is as fast as pinned memory.
    products: by dtype, points (rows, flop/s) of matrix products on the compute device. A single point is a roofline:
        its rows are peak * itemsize / (2 * memory bandwidth), and its rate is the peak.
    packed_products: the same for matrices that stay on the device, if it stores them in a layout of its own.
    encoded_products: by "dtype codec", the same for products that use the encoded matrix without decoding it, up to
        the maximum rows of such a product. An empty list means that there is no such product. Without an entry, the
        time is that of a plain product in proportion to the bytes of the matrix.
    prefill_attention: by dtype, flop/s of causal attention over a prompt on the compute device.
    device_attention: by the format of the cache (a dtype or a codec), bytes/s of cache at which the compute device
        computes attention of a new token.
    host_attention: the same for the host, if the compute device is a GPU.
    decoding: by codec or by "dtype codec", the output bytes/s of decoding weights on the compute device.
    elementwise: by dtype, points (values, seconds): the time of element-wise work (norm, bias, activation, residual
        connection, first writes to memory) per input or output value of a layer's products, if the layer has that
        many values. Without it, the rates of products include this work, as those of wide layers do.
    around_attention: by dtype, seconds per value of queries, keys, values and attention outputs of new tokens, in
        addition to flops and bytes: transposing by head, storing to the cache, and the fixed cost of each row.
    interference: by "lane lane", the share of its rate that the first lane loses while the second one works, because
        they share cores, memory or a disk.
    prefill_interference: the same in the prefill, for pairs that lose another share there. Products with many rows
        are limited by the cores, those of the decode by memory.
    start: by lane, the seconds that a job needs in addition if its lane is idle. `disk_read`: for a read, if no other
        read is in flight. `compute`: for a computation, if the thread that issues the steps also computes, and has
        waited for data; at most the time of this wait.
    busy_start: the same while other lanes work. It applies if it is larger.
    computes_in: by the dtype of a checkpoint, the dtype that "auto" selects, if it differs.
    shares_cores: whether a compute device with its own memory computes on the host's cores, as an emulated one does.
    products_decode: whether each product decodes its matrix. This engine's products do not: with few rows they use
        the encoded matrix, and otherwise all batches of a visit share the decoded one.
    disturbed: the share of the processors that other programs used during the measurement.
    fixed: fixed costs, see `Fixed`.

    Raises HardwareError for invalid values.
    """

    name: str
    source: str = ""
    capacity: Mapping[Tier, int]
    installed: Mapping[Tier, int] = field(default_factory=dict)
    compute_capability: float = 0.0
    bandwidth: Mapping[LaneName, float]
    pageable: Mapping[LaneName, float] = field(default_factory=dict)
    products: Mapping[str, Points]
    prefill_attention: Mapping[str, float]
    device_attention: Mapping[str, float]
    host_attention: Mapping[str, float] = field(default_factory=dict)
    decoding: Mapping[str, float] = field(default_factory=dict)
    packed_products: Mapping[str, Points] = field(default_factory=dict)
    encoded_products: Mapping[str, Points] = field(default_factory=dict)
    elementwise: Mapping[str, Points] = field(default_factory=dict)
    around_attention: Mapping[str, float] = field(default_factory=dict)
    interference: Mapping[str, float] = field(default_factory=dict)
    prefill_interference: Mapping[str, float] = field(default_factory=dict)
    start: Mapping[LaneName, float] = field(default_factory=dict)
    busy_start: Mapping[LaneName, float] = field(default_factory=dict)
    computes_in: Mapping[str, str] = field(default_factory=dict)
    shares_cores: bool = False
    products_decode: bool = False
    disturbed: float = 0.0
    fixed: Fixed = Fixed()

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("name", "source"):
            if not isinstance(text := getattr(self, name), str):
                raise HardwareError(f"{name} is {shown(text)}; it must be a string")
        put("disturbed", checks.seconds("disturbed", self.disturbed))
        put(
            "capacity",
            checks.table("capacity", self.capacity, checks.nbytes, needed=(Tier.CPU, Tier.DISK), known=Tier),
        )
        put("installed", checks.table("installed", self.installed, checks.nbytes, known=Tier))
        put("compute_capability", checks.at_least_0("compute_capability", self.compute_capability))
        lanes = (*_DISK, *_HOST, *(() if self.topology.shares_host_memory else _LINK))
        rates = checks.table(
            "bandwidth", self.bandwidth, checks.rate, needed=lanes, known=(*_LINK, *_DISK, *_HOST)
        )
        put("bandwidth", rates)
        put("pageable", checks.table("pageable", self.pageable, checks.rate, known=_LINK))
        put("products", checks.table("products", self.products, checks.points, known=_DTYPES))
        if not self.products:
            raise HardwareError("products is empty; give points for at least one dtype")
        put(
            "packed_products",
            checks.table("packed_products", self.packed_products, checks.points, known=_DTYPES),
        )
        forms = [f"{dtype} {codec}" for dtype in _DTYPES for codec in CODECS]
        put(
            "encoded_products",
            checks.table("encoded_products", self.encoded_products, checks.points_or_none, known=forms),
        )
        for name in ("prefill_attention", "device_attention", "host_attention", "decoding"):
            put(name, checks.table(name, getattr(self, name), checks.rate))
        put("elementwise", checks.table("elementwise", self.elementwise, checks.seconds_at, known=_DTYPES))
        put(
            "around_attention",
            checks.table("around_attention", self.around_attention, checks.seconds, known=_DTYPES),
        )
        pairs = [f"{lane} {other}" for lane in LaneName for other in LaneName if lane is not other]
        for name in ("interference", "prefill_interference"):
            put(name, checks.table(name, getattr(self, name), checks.lost, known=pairs))
        for name in ("start", "busy_start"):
            put(name, checks.table(name, getattr(self, name), checks.seconds, known=_STARTED))
        put("computes_in", checks.table("computes_in", self.computes_in, self._dtype, known=_DTYPES))
        for name in ("shares_cores", "products_decode"):
            if not isinstance(flag := getattr(self, name), bool):
                raise HardwareError(f"{name} is {shown(flag)}; it must be true or false")
        if not isinstance(self.fixed, Fixed):
            known = tuple(f.name for f in dataclasses.fields(Fixed))
            put("fixed", Fixed(**checks.table("fixed", self.fixed, checks.seconds, known=known)))

    @property
    def topology(self) -> Topology:
        """How the compute device is connected. Without a capacity for the GPU tier, it is the host."""
        return LINKED if Tier.GPU in self.capacity else SHARED

    @property
    def computes_inline(self) -> bool:
        """Whether the thread that issues the steps also computes, so that it issues none while it computes."""
        return self.shares_cores or self.topology.shares_host_memory

    def startup(self, serial: bool) -> dict[LaneName, float]:
        """By lane, the seconds of `start`. serial: whether lanes never work at the same time."""
        busy = {} if serial else self.busy_start
        starts = {lane: max(self.start.get(lane, 0.0), busy.get(lane, 0.0)) for lane in _STARTED}
        return {lane: seconds for lane, seconds in starts.items() if seconds}

    @property
    def losses(self) -> dict[Phase, dict[tuple[LaneName, LaneName], float]]:
        """`interference` by phase and lanes. Phases without losses are left out."""
        shares = {
            Phase.PREFILL: {**self.interference, **self.prefill_interference},
            Phase.DECODE: self.interference,
        }
        return {
            phase: {(LaneName(lane), LaneName(other)): share for (lane, other), share in pairs}
            for phase, of_phase in shares.items()
            if (pairs := [(pair.split(), share) for pair, share in of_phase.items() if share])
        }

    def copying(self, nbytes: int, pins: bool) -> Hardware:
        """The same machine with the link's bandwidth for copies from and to `nbytes` of host memory.

        pins: whether the memory is pinned, as far as possible. The rest is an equal share of each transfer.
        """
        pinned = self.capacity[Tier.CPU] * PINNED_SHARE if pins else 0.0
        if not self.pageable or nbytes <= pinned:
            return self
        share = 1 - pinned / nbytes
        mixed = {
            lane: 1 / ((1 - share) / self.bandwidth[lane] + share / rate)
            for lane, rate in self.pageable.items()
        }
        return self.replace(bandwidth={**self.bandwidth, **mixed})

    def product_rate(self, dtype: str, rows: float, packed: bool = False) -> float:
        """flop/s of a product with `rows` rows of activations.

        Between two points, the rate is interpolated with both axes logarithmic. Below the first point, a product
        takes as long as there, because it reads the same weights. Above the last point, the rate is constant.

        packed: whether the matrix is in the device's own layout.
        """
        table = "packed_products" if packed and dtype in self.packed_products else "products"
        return interpolated(self.figure(table, dtype), rows)

    def encoded_rate(self, dtype: str, codec: str, rows: float) -> float | None:
        """`product_rate` with a matrix encoded by `codec`, without decoding it; None if it was not measured."""
        points = self.encoded_products.get(f"{dtype} {codec}")
        return interpolated(points, rows) if points else None

    def elementwise_seconds(self, dtype: str, numbers: float) -> float:
        """Seconds of element-wise work on `numbers` values; between two points, linear in their logarithm."""
        points = self.elementwise.get(dtype)
        return numbers * seconds_of_each(points, numbers) if points and numbers else 0.0

    def decoding_rate(self, dtype: str, codec: str) -> float:
        """The output bytes/s of decoding weights from `codec` to `dtype`."""
        exact = f"{dtype} {codec}"
        return self.figure("decoding", exact if exact in self.decoding else codec)

    def decodes(self, dtype: str, codec: str) -> bool:
        """Whether `decoding_rate` is known."""
        return f"{dtype} {codec}" in self.decoding or codec in self.decoding

    def _dtype(self, name: str, value: object) -> str:
        if not isinstance(value, str) or value not in self.products:
            raise HardwareError(
                f"{name} is {shown(value)}; it must be one of products: {', '.join(self.products)}"
            )
        return str(value)

    def figure(self, table: str, key: str) -> Any:
        """An entry of one of the tables by dtype or codec. Raises HardwareError if there is none."""
        known: Mapping[str, Any] = getattr(self, table)
        if key not in known:
            have = cut(", ".join(known)) or "nothing"
            raise HardwareError(
                f"hardware {shown(self.name)} has no figure {table}.{key}, only for {have}: add it to the hardware "
                f"file, or choose a dtype and codecs that the file has"
            )
        return known[key]

    @property
    def emulates_bfloat16(self) -> bool:
        """Whether the compute device has no instructions for bfloat16."""
        return "bfloat16" in self.computes_in or 0 < self.compute_capability < BFLOAT16_CAPABILITY

    def dtype_for(self, checkpoint: str) -> str:
        """The dtype that "auto" selects for a checkpoint of that dtype.

        It is that of `computes_in`, or the checkpoint's own. If the machine has no products for it, it is the first
        dtype of `products`.
        """
        wanted = self.computes_in.get(checkpoint, checkpoint)
        if wanted == "bfloat16" and self.emulates_bfloat16:
            wanted = "float16"
        return wanted if wanted in self.products else next(iter(self.products))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], name: str | None = None) -> Hardware:
        """A machine from the keys of its TOML; the inverse of `to_dict`. `name`: used if the keys have none."""
        known = [f.name for f in dataclasses.fields(cls)]
        fields = checks.table("", fields, lambda _, value: value, known=known)
        given = {"name": name} | dict(fields) if name else dict(fields)
        needed = ("name", "capacity", "bandwidth", "products", "prefill_attention", "device_attention")
        if missing := [key for key in needed if key not in given]:
            raise HardwareError(f"{', '.join(missing)} missing; a machine needs all of them: add them")
        return cls(**given)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Hardware:
        """The machine in a TOML file. Raises HardwareError, with the path, if it is missing or invalid."""
        try:
            return cls.from_dict(_read(path), Path(path).stem)
        except HardwareError as error:
            raise HardwareError(f"{shown_path(path)}: {error}") from None

    @classmethod
    def preset(cls, name: str) -> Hardware:
        """A machine of `hardware.toml`. Raises HardwareError, with the known names, for an unknown name."""
        presets = _read(PRESETS)
        if name not in presets:
            hint = did_you_mean(name, presets)
            raise HardwareError(
                f"hardware {shown(name)} is not known; known: {', '.join(presets)}{hint}. For a file of "
                "your own, give its path (name.toml)"
            )
        return cls.from_dict(presets[name], name)

    @classmethod
    def find(cls, name: str) -> Hardware:
        """The preset of that name, or the file at that path."""
        return cls.load(name) if name.endswith(".toml") else cls.preset(name)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the machine as TOML, for `load`."""
        Path(path).write_text(self.to_toml(), encoding="utf-8")

    def to_toml(self) -> str:
        """The text of the machine's TOML file."""
        return "".join(f"{key} = {_toml(value)}\n" for key, value in self.to_dict().items())

    def to_dict(self) -> dict[str, Any]:
        """The machine as plain data, with the keys of the TOML file."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return plain | {"fixed": dataclasses.asdict(self.fixed)}

    def replace(self, **changes: Any) -> Hardware:
        """The same machine with some fields changed."""
        return dataclasses.replace(self, **changes)


def interpolated(points: Points, rows: float) -> float:
    """flop/s at `rows`, interpolated as in `Hardware.product_rate`."""
    n = bisect.bisect_right(points, rows, key=lambda point: point[0])
    if n == 0:
        return points[0][1] * rows / points[0][0]
    if n == len(points):
        return points[-1][1]
    (r0, f0), (r1, f1) = points[n - 1 : n + 1]
    return f0 * (f1 / f0) ** (math.log(rows / r0) / math.log(r1 / r0))


def seconds_of_each(points: Points, numbers: float) -> float:
    """Seconds per value for `numbers` values, from points of `Hardware.elementwise`; constant beyond both ends."""
    n = bisect.bisect_right(points, numbers, key=lambda point: point[0])
    if n in (0, len(points)):
        return points[max(n - 1, 0)][1]
    (n0, s0), (n1, s1) = points[n - 1 : n + 1]
    return s0 + (s1 - s0) * math.log(numbers / n0) / math.log(n1 / n0)


def _plain(value: Any) -> Any:
    """`value` with dicts and lists for mappings and tuples."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml(key)} = {_toml(entry)}" for key, entry in value.items()) + " }"
    # Strings, numbers and lists in JSON are valid TOML, except that TOML escapes one more character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read(path: str | PathLike[str]) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise HardwareError(f"cannot read it: {error.strerror}; give the path of a TOML file") from error
    except (ValueError, OverflowError) as error:  # including invalid dates and numbers that are too long
        raise HardwareError(
            f"not valid TOML: {error}; correct the file, or measure the machine with `python -m flexgen.measure`"
        ) from error
    except RecursionError:
        raise HardwareError(
            "not valid TOML: values are nested too deeply; correct the file, or measure the machine with "
            "`python -m flexgen.measure`"
        ) from None
