"""Fused products with int4, int8 and published formats, compared with decoding and products of the plain matrix.

    python benchmarks/packed_linear.py
    python benchmarks/packed_linear.py --dtype float32 float16 --rows 1 8 16 24 64
    python benchmarks/packed_linear.py --shapes 8192x2048 --rows 1 8 32 --published

These figures are the reason for `fused_rows` in `kernels.groupwise_linear`: the most rows of x for which the fused
product is at least as fast as the product with an already decoded matrix. `decode` is the cost of decoding, once for
each visit of a layer. `matrix` is the product of the library with the plain matrix, `laid out` its product with a
matrix in oneDNN's layout, and `linear` the product of flexgen. `a8` is the fused product with activations rounded to
int8. `read` is the bandwidth of memory, and `peak` the rate of products of bfloat16 (or float32) without memory; next
to a product are its shares of both, and its rate relative to the fastest product of the library. `--published` adds
the formats of checkpoints, with random bytes (`kernels.encoded_linear`), and the time that predictions expect of
them: they are not measured when flexgen measures a machine. With --device cuda, the Triton kernels are measured.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import interleaved, save
from torch import Tensor

from flexgen.formats import Encoding
from flexgen.formats.block_fp8 import BlockFP8
from flexgen.formats.fp4 import MXFP4, NVFP4
from flexgen.formats.integers import AWQ, GPTQ, PackedRows
from flexgen.kernels.groupwise import dequantise, quantise
from flexgen.kernels.groupwise_linear import multiply, multiply_rounded
from flexgen.kernels.linear import linear, prelayout
from flexgen.kernels.loading import native, native_available
from flexgen.kernels.packed import Packed
from flexgen.kernels.quantized import QuantizedMatrix
from flexgen.models.dummy import DummyCheckpoint
from flexgen.models.sources import Source
from flexgen.models.spec import WeightSpec
from flexgen.quant import Stored

SHAPES = ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192))  # out, in
ROWS = (1, 2, 4, 8, 16, 32, 1024, 4096)
BITS = (4, 8)
GROUP = 64
PUBLISHED: dict[str, Encoding] = {
    "fp8 (128 x 128)": BlockFP8(".weight_scale_inv", 128, 128),
    "mxfp4": MXFP4(),
    "nvfp4": NVFP4(".weight_packed", ".weight_global_scale", divides=True),
    "int4 pack-quantized": PackedRows(4, 128, symmetric=True),
    "int4 gptq": GPTQ(4, 128, added=1),
    "int4 awq": AWQ(128),
}
MEMORY = 192 << 20  # bytes of weights in rotation, so that none stays in a processor cache
MANY_ROWS = 256  # from here on, reading weights takes no time to speak of, and one copy of them is enough
PEAK_STEPS = 200_000
LIBRARY = ("matrix", "laid out")


def rate(call: Callable[[Tensor], object], weights: Sequence[Tensor], seconds: float) -> dict[str, float]:
    """The milliseconds of one call, with the weights in rotation."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    call(weights[-1])
    if on_gpu:
        torch.cuda.synchronize()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or count < len(weights):
        call(weights[count % len(weights)])
        count += 1
        if on_gpu:
            torch.cuda.synchronize()
    return {"ms": (time.perf_counter() - began) / count * 1e3}


def read_rate(memory: Tensor) -> dict[str, float]:
    """GB/s of reading memory, the best of a few times."""
    took = []
    for _ in range(5):
        began = time.perf_counter()
        native.read(memory.data_ptr(), memory.nbytes, torch.get_num_threads())
        took.append(time.perf_counter() - began)
    return {"GB/s": memory.nbytes / min(took) / 1e9}


def peak_rate() -> dict[str, float]:
    """GFLOP/s of products without memory, the best of a few times."""
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        operations = native.multiply_registers(PEAK_STEPS, torch.get_num_threads())
        rates.append(operations / (time.perf_counter() - began))
    return {"GFLOP/s": max(rates) / 1e9}


def packed_bytes(packed: Packed) -> int:
    return packed.values.nbytes + packed.scales.nbytes + packed.minimums.nbytes


def published_matrices(
    encoding: Encoding, shape: tuple[int, int], dtype: torch.dtype
) -> list[QuantizedMatrix]:
    """Matrices of random bytes."""
    checkpoint, matrices = DummyCheckpoint(encodings=[encoding]), []
    while sum(matrix.nbytes for matrix in matrices) < MEMORY:
        name = f"{len(matrices)}.weight"
        encoded = checkpoint.encoded(WeightSpec(name, shape, (Source(name),), unit="expert"))
        assert encoded is not None
        parts = [checkpoint.read(part, dtype) for part in encoded.parts]
        out = torch.empty(shape, dtype=dtype)
        matrices.append(Stored(encoding).matrix(parts, shape, dtype, partial(decoded, encoding, parts, out)))
    return matrices


def expected_ms(encoding: Encoding, shape: tuple[int, int], rows: int, read: float) -> float:
    """The milliseconds that predictions expect of a fused product. read: GB/s of reading memory."""
    nbytes = Stored(encoding).expected_product(rows, on_host=True)
    assert nbytes is not None
    return math.prod(shape) * nbytes / read / 1e6


def decoded(encoding: Encoding, parts: Sequence[Tensor], out: Tensor) -> Tensor:
    encoding.decode(parts, out)
    return out


def add_published(
    cases: dict[str, Callable[[], dict[str, float]]],
    nbytes: dict[str, int],
    shape: tuple[int, int],
    x: dict[int, Tensor],
    seconds: float,
) -> None:
    """Add the cases of `PUBLISHED`. "decoded" is a product that decodes the matrix first."""
    for name, encoding in PUBLISHED.items():
        matrices = published_matrices(encoding, shape, next(iter(x.values())).dtype)
        nbytes[name] = nbytes[f"{name} decoded"] = matrices[0].nbytes
        for count, rows in x.items():
            cases[f"{name}, {count} rows"] = partial(rate, partial(_multiply, rows), matrices, seconds)
        one = x[min(x)]
        cases[f"{name} decoded, {len(one)} rows"] = partial(
            rate, partial(_decode_first, one), matrices[:1], seconds
        )


def _multiply(x: Tensor, matrix: QuantizedMatrix) -> Tensor:
    return matrix.multiply(x)


def _decode_first(x: Tensor, matrix: QuantizedMatrix) -> Tensor:
    return linear(x, matrix.decoded())


def cases_of(
    shape: tuple[int, int],
    dtype: torch.dtype,
    rows: Sequence[int],
    device: str,
    seconds: float,
    published: bool = False,
) -> tuple[dict[str, Callable[[], dict[str, float]]], dict[str, int]]:
    """The cases by name, and the bytes of the matrix in the cases of each form."""
    out_size, in_size = shape
    weight = (torch.randn(shape) * 0.02).to(device)
    plain = [weight.to(dtype) for _ in range(max(MEMORY // (weight.numel() * dtype.itemsize), 1))]
    x = {count: torch.randn(count, in_size).to(device, dtype) for count in rows}
    cases: dict[str, Callable[[], dict[str, float]]] = {}
    nbytes = dict.fromkeys(("matrix", "linear", "laid out"), plain[0].nbytes)
    if device == "cpu":
        memory = torch.ones(MEMORY >> 20 << 20, dtype=torch.uint8)
        cases["read"] = partial(read_rate, memory)
        cases["peak"] = peak_rate
    has_layout = device == "cpu" and dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    laid_out = [prelayout(each) for each in plain] if has_layout else []
    for count in rows:
        some = slice(1 if count >= MANY_ROWS else None)
        cases[f"matrix, {count} rows"] = partial(rate, partial(F.linear, x[count]), plain[some], seconds)
        if device == "cpu":
            cases[f"linear, {count} rows"] = partial(rate, partial(linear, x[count]), plain[some], seconds)
        if laid_out:
            cases[f"laid out, {count} rows"] = partial(
                rate, partial(linear, x[count]), laid_out[some], seconds
            )
    out = torch.empty_like(plain[0])
    for bits in BITS:
        kept = [quantise(weight, bits, GROUP) for _ in range(MEMORY // (weight.numel() * bits // 8))]
        nbytes[f"int{bits}"] = nbytes[f"int{bits} a8"] = packed_bytes(kept[0])
        cases[f"decode int{bits}"] = partial(rate, partial(dequantise, out=out), kept, seconds)
        for count in rows:
            some = slice(1 if count >= MANY_ROWS else None)
            cases[f"int{bits}, {count} rows"] = partial(
                rate, partial(multiply, x[count]), kept[some], seconds
            )
            if device == "cpu":
                rounded = partial(multiply_rounded, x[count])
                cases[f"int{bits} a8, {count} rows"] = partial(rate, rounded, kept[some], seconds)
    if published:
        add_published(cases, nbytes, shape, x, seconds)
    return cases, nbytes


def print_table(
    shape: tuple[int, int], nbytes: Mapping[str, int], found: Mapping[str, Mapping[str, Any]]
) -> None:
    medians = {case: next(iter(figures.values()))["median"] for case, figures in found.items()}
    read, peak = medians.get("read"), medians.get("peak")
    for case, figures in found.items():
        if "ms" not in figures:
            print(f"{case:<24}{medians[case]:>8.1f} {next(iter(figures))}")
            continue
        ms = medians[case]
        line = f"{case:<24}{ms:>8.3f} ms"
        if not case.startswith("decode"):
            form, count = case.split(", ")
            rows = int(count.split()[0])
            gflops = 2 * shape[0] * shape[1] * rows / ms / 1e6
            best = min(medians[f"{name}, {count}"] for name in LIBRARY if f"{name}, {count}" in medians)
            line += f"{gflops:>8.0f} GFLOP/s{best / ms:>8.2f} of library"
            line += f"{gflops / peak:>8.0%} of peak" if peak else ""
            line += f"{nbytes[form] / ms / 1e6 / read:>8.0%} of read" if read else ""
            if read and form in PUBLISHED:
                line += f"{expected_ms(PUBLISHED[form], shape, rows, read):>8.3f} ms expected"
        print(line)


def _shape(text: str) -> tuple[int, int]:
    out_size, in_size = map(int, text.split("x"))
    return out_size, in_size


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--seconds", type=float, default=0.05, help="minimum time of one measurement")
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, help="such as 8192x2048: out, in")
    parser.add_argument("--published", action="store_true", help="also the formats of quantized checkpoints")
    parser.add_argument("--out", help="write the results to this file")
    args = parser.parse_args()
    if args.device == "cpu" and not native_available():
        parser.error("the compiled kernels are not built or are disabled")
    results = []
    for shape, name in itertools.product(args.shapes, args.dtype):
        cases, nbytes = cases_of(
            shape, getattr(torch, name), args.rows, args.device, args.seconds, args.published
        )
        found = interleaved(cases, args.repeats)
        print(f"\n{shape[0]} x {shape[1]}, {name}")
        print_table(shape, nbytes, found)
        results.append({"shape": list(shape), "dtype": name, "bytes": nbytes, "figures": found})
    variant = native.variant() if args.device == "cpu" else torch.cuda.get_device_name()
    name = "packed_linear" if args.device == "cpu" else "packed_linear_gpu"
    name += "_published" if args.published else ""
    path = Path(args.out) if args.out else None
    print(save(name, {"kernels": variant, "group": GROUP, "products": results}, path))


if __name__ == "__main__":
    main()
