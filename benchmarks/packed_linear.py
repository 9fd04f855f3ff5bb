"""Fused products with int4 and int8 weights, compared with decoding and with products of the plain matrix.

    python benchmarks/packed_linear.py

These figures are the reason for `fused_rows` in `kernels.groupwise_linear`: the most rows of x for which the fused
product is at least as fast as the product with an already decoded matrix. `decode` is the cost of decoding, once for
each visit of a layer. If the CPU supports it, torch's own int4 product, with another layout and bfloat16 scales, is
measured too. On a GPU (--device cuda), the Triton kernels are measured.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from record import interleaved, save
from torch import Tensor

from flexgen.kernels.groupwise import dequantise, quantise
from flexgen.kernels.groupwise_linear import multiply
from flexgen.kernels.loading import native, native_available

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))  # out, in
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
BITS = (4, 8)
GROUP = 64
MEMORY = 192 << 20  # bytes of weights in rotation, so that none stays in a processor cache


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


def cases_of(
    shape: tuple[int, int], dtype: torch.dtype, rows: Sequence[int], device: str, seconds: float
) -> dict[str, Callable[[], dict[str, float]]]:
    out_size, in_size = shape
    weight = (torch.randn(shape) * 0.02).to(device)
    copies = max(MEMORY // (weight.numel() * dtype.itemsize), 1)
    plain = [weight.to(dtype) for _ in range(copies)]
    x = {count: torch.randn(count, in_size).to(device, dtype) for count in rows}
    cases: dict[str, Callable[[], dict[str, float]]] = {}
    for count in rows:
        cases[f"matrix, {count} rows"] = partial(rate, partial(F.linear, x[count]), plain, seconds)
    out = torch.empty_like(plain[0])
    for bits in BITS:
        stored = [quantise(weight, bits, GROUP) for _ in range(MEMORY // (weight.numel() * bits // 8))]
        cases[f"decode int{bits}"] = partial(rate, partial(dequantise, out=out), stored, seconds)
        for count in rows:
            call = partial(multiply, x[count])
            cases[f"fused int{bits}, {count} rows"] = partial(rate, call, stored, seconds)
    if device == "cpu" and dtype is torch.bfloat16:
        codes = torch.randint(0, 16, shape, dtype=torch.int32)
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.ones(in_size // GROUP, out_size, 2, dtype=dtype)
        copied = [theirs.clone() for _ in range(MEMORY // theirs.nbytes)]
        for count in rows:
            call = partial(_multiply_as_torch, x[count], scales=scales)
            cases[f"torch int4, {count} rows"] = partial(rate, call, copied, seconds)
    return cases


def _multiply_as_torch(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--seconds", type=float, default=0.1, help="minimum time of one measurement")
    args = parser.parse_args()
    if args.device == "cpu" and not native_available():
        parser.error("the compiled kernels are not built or are disabled")
    results = []
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        found = interleaved(cases_of(shape, dtype, args.rows, args.device, args.seconds), args.repeats)
        name = str(dtype).removeprefix("torch.")
        print(f"\n{shape[0]} x {shape[1]}, {name}, GFLOP/s")
        for case, figures in found.items():
            ms = figures["ms"]["median"]
            if case.startswith("decode"):
                print(f"{case:<24}{ms:>8.2f} ms")
            else:
                flops = 2 * shape[0] * shape[1] * int(case.split()[-2])
                print(f"{case:<24}{flops / ms / 1e6:>8.0f}   {ms:>8.2f} ms")
        results.append({"shape": list(shape), "dtype": name, "figures": found})
    variant = native.variant() if args.device == "cpu" else torch.cuda.get_device_name()
    name = "packed_linear" if args.device == "cpu" else "packed_linear_gpu"
    print(save(name, {"kernels": variant, "group": GROUP, "products": results}))


if __name__ == "__main__":
    main()
