"""The first and the second call of each attention backend for each shape: the setup time for a new shape."""

from __future__ import annotations

import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu_day import arguments, write

BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)


def seconds(q: torch.Tensor, k: torch.Tensor, causal: bool) -> float:
    """Seconds of one call, until it ends on the device."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    scaled_dot_product_attention(q, k, k, is_causal=causal)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> int:
    args = arguments(__doc__)
    rows, heads, lengths = (2, 2, (8, 9)) if args.toy else (16, 32, (512, 511, 384, 509))
    shapes = {f"prompt of {n}": (n, n) for n in lengths} | {f"token after {n}": (1, n) for n in lengths}
    found: dict[str, dict[str, object]] = {}
    for dtype in (torch.float16, torch.bfloat16):
        for backend in BACKENDS:
            for name, (new, context) in shapes.items():
                q, k = (torch.randn(rows, heads, n, 64, device="cuda", dtype=dtype) for n in (new, context))
                result: dict[str, object] = {}
                try:
                    with sdpa_kernel(backend):
                        for call in ("first", "second"):
                            result[call] = seconds(q, k, causal=new > 1)
                except RuntimeError as error:  # not supported for this GPU, dtype or shape
                    result["refused"] = str(error).splitlines()[0]
                key = f"{backend.name.lower()} {str(dtype).removeprefix('torch.')}"
                found.setdefault(key, {})[name] = result
    write(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
