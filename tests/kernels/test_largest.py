"""The largest score of each row: the compiled kernel and the version in torch agree with a plain search."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flexgen.kernels.largest import NO_INDEX, largest, largest_in_torch, largest_natively
from flexgen.kernels.loading import native, native_available

needs_kernel = pytest.mark.skipif(not native_available(), reason="no compiled kernels here")
VARIANTS = native.variants() if native_available() else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")
SCORES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-24, 3e4, INF, -INF])


def searched(rows):
    """The definition: the first index of the largest value, in Python."""
    return [NO_INDEX if any(x != x for x in row) else row.index(max(row)) for row in rows]


@needs_kernel
@pytest.mark.parametrize("variant", VARIANTS)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 70).flatmap(lambda n: st.lists(st.lists(SCORES, min_size=n, max_size=n), min_size=1)),
    nan=st.none() | st.integers(0, 1 << 16),
)
@example(torch.bfloat16, [[-INF] * 33], None)
@example(torch.bfloat16, [[1.0] * 40], 39)
@example(torch.float32, [[NAN] * 3, [NAN, 2.0, INF]], None)
def test_it_is_the_first_of_the_largest_values(variant, dtype, rows, nan):
    if nan is not None:
        row = rows[nan % len(rows)]
        row[nan % len(row)] = NAN
    scores, before = torch.tensor(rows).to(dtype), native.variant()
    native.set_variant(variant)
    try:
        found = largest_natively(scores)
    finally:
        native.set_variant(before)
    assert found.dtype is torch.int64 and found.tolist() == searched(scores.tolist())
    assert found.equal(largest_in_torch(scores))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_whole_vocabulary(version, dtype):
    scores = torch.randn(5, 32_003, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert largest(scores).tolist() == searched(scores.tolist())


@pytest.mark.parametrize("form", ["a part of each row", "every second", "transposed", "no rows"])
def test_rows_in_other_forms(form):
    scores = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    views = {
        "a part of each row": scores[:, 3:30],
        "every second": scores[:, ::2],
        "transposed": scores.t(),
        "no rows": scores[:0],
    }
    assert largest(views[form]).tolist() == searched(views[form].tolist())


@needs_kernel
def test_the_result_does_not_depend_on_the_threads(monkeypatch):
    scores = torch.randn(9, 32_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert largest(scores).tolist() == searched(scores.tolist())
