"""Where the seconds of flexgen's job go: products by their number of rows, attention, and the rest."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flexgen.kernels import half_linear
from flexgen.runtime.kvcache import KVCache

ROWS = 16, 64, 128, 192, 256
"""Products of more rows than one number, and at most the next one, are counted together."""


class Profile:
    """Times the products in half types and the attention of this process, from now on. `attention` includes the
    writes of the cache."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = defaultdict(float)
        self._flops: Counter[int] = Counter()
        self._calls: Counter[int] = Counter()
        self._attention = 0.0
        multiply, attend = half_linear.multiply_all_natively, KVCache.attend

        def timed_products(
            x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
        ) -> list[Tensor]:
            began = time.perf_counter()
            found = multiply(x, weights, biases)
            rows = x.numel() // x.shape[-1]
            most = next((most for most in ROWS if rows <= most), 0)
            self._seconds[most] += time.perf_counter() - began
            self._flops[most] += 2 * rows * sum(weight.numel() for weight in weights)
            self._calls[most] += 1
            return found

        def timed_attention(cache: KVCache, *args: Any) -> Tensor:
            began = time.perf_counter()
            found = attend(cache, *args)
            self._attention += time.perf_counter() - began
            return found

        half_linear.multiply_all_natively = timed_products
        KVCache.attend = timed_attention  # type: ignore[method-assign, assignment]

    def of(self, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `run`, with its "profile"."""
        self._seconds.clear()
        self._flops.clear()
        self._calls.clear()
        self._attention = 0.0
        result = run()
        products = {
            f"up to {most} rows" if most else f"more than {ROWS[-1]} rows": {
                "s": self._seconds[most],
                "calls": self._calls[most],
                "flops_per_s": self._flops[most] / self._seconds[most],
            }
            for most in (*ROWS, 0)
            if self._calls[most]
        }
        rest = result["seconds"] - sum(self._seconds.values()) - self._attention
        parts = {"products_s": sum(self._seconds.values()), "attention_s": self._attention, "rest_s": rest}
        return result | {"profile": {**parts, "products": products}}
