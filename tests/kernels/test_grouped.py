"""Products of groups: torch's, on the CPU, where it has them too, and the compiled ones of the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from flexgen.kernels import grouped, half_linear
from flexgen.kernels.grouped import available, each_linear, grouped_linear, stacked
from flexgen.kernels.grouped_matrices import grouped_matrices
from flexgen.kernels.linear import linear
from flexgen.kernels.loading import native_available
from flexgen.kernels.tape import record, replay
from flexgen.quant import codec_for

compiled = pytest.mark.skipif(not native_available(), reason="the compiled kernels are not built")
SPANS = [(0, 1), (1, 4), (4, 5), (5, 17)]


def _matrices(count: int, step: int, shape: tuple[int, int], first: int = 0) -> list[torch.Tensor]:
    """Views of one buffer, as in a weight slot: a matrix begins every `step` values."""
    buffer = torch.randn(first + count * step, generator=torch.Generator().manual_seed(0)).bfloat16()
    numel = shape[0] * shape[1]
    return [buffer[first + n * step :][:numel].view(shape) for n in range(count)]


@pytest.mark.parametrize("step", [16 * 24, 16 * 24 + 64])
def test_matrices_at_equal_distances_are_a_stack(step: int) -> None:
    matrices = _matrices(5, step, (16, 24), first=8)
    stack = stacked(matrices)
    assert stack is not None and torch.equal(stack, torch.stack(matrices))
    assert stack.data_ptr() == matrices[0].data_ptr(), "a view"


def test_other_matrices_are_not() -> None:
    matrices = _matrices(5, 16 * 24, (16, 24))
    assert stacked([*matrices[:2], *matrices[3:]]) is None, "a gap"
    assert stacked(matrices[::-1]) is None
    assert stacked([*matrices[:4], matrices[4].clone()]) is None, "another buffer"
    assert stacked([*matrices[:4], object()]) is None, "an encoded matrix"
    assert stacked(_matrices(3, 16 * 20, (16, 20))) is None, "rows of 40 bytes"
    assert stacked(_matrices(3, 16 * 24, (16, 24), first=1)) is None, "an odd address"
    assert stacked([matrix.t() for matrix in _matrices(3, 24 * 24, (24, 24))]) is None


def test_each_row_is_multiplied_with_the_matrix_of_its_group() -> None:
    stack = stacked(_matrices(4, 16 * 24 + 64, (16, 24)))
    assert stack is not None
    ends = torch.tensor([3, 3, 9, 10], dtype=torch.int32)  # the second group is empty
    x = torch.randn(10, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = grouped_linear(x, stack, ends)
    begin = 0
    for end, matrix in zip(ends.tolist(), stack, strict=True):
        torch.testing.assert_close(found[begin:end], x[begin:end] @ matrix.T)
        begin = end


def test_only_a_gpu_has_them_in_the_engine() -> None:
    assert not available(torch.device("cpu"), torch.bfloat16)


def _encoded(matrix: torch.Tensor, codec: str) -> Any:
    made = codec_for(codec, matrix.shape)
    assert made is not None
    encoded = made.encode(matrix)
    decoded = torch.empty_like(matrix)
    made.decode(encoded, decoded)
    return made.matrix(encoded, matrix.shape, matrix.dtype, lambda: decoded)


def _columns(shape: tuple[int, int], dtype: torch.dtype) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator).to(dtype) for _ in SPANS] for _ in range(2)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of the compiled kernel."""
    made: list[Any] = []
    multiply = grouped._multiply_natively
    monkeypatch.setattr(grouped, "_multiply_natively", lambda *given: made.append(given) or multiply(*given))
    return made


def _assert_equal_products(
    x: torch.Tensor, columns: list[list[Any]], spans: list[tuple[int, int]], out_size: int
) -> None:
    found = each_linear(x, spans, columns, out_size)
    for column, y in zip(columns, found, strict=True):
        assert y.dtype is x.dtype
        for (begin, end), matrix in zip(spans, column, strict=True):
            torch.testing.assert_close(y[begin:end], linear(x[begin:end], matrix), rtol=1e-2, atol=1e-2)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codec", ["int4", "int8"])
@pytest.mark.parametrize("out_size", [96, 200, 7])  # whole pieces, a part of one, less than one
def test_encoded_matrices_in_one_call(
    out_size: int, codec: str, dtype: torch.dtype, calls: list[Any]
) -> None:
    columns = [[_encoded(m, codec) for m in column] for column in _columns((out_size, 128), dtype)]
    x = torch.randn(17, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    _assert_equal_products(x, columns, SPANS, out_size)
    assert len(calls) == 1, "two columns of matrices are one call"


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_in_one_call(
    dtype: torch.dtype, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_linear, "native_rows", lambda dtype: 12)
    x = torch.randn(17, 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    _assert_equal_products(x, _columns((200, 100), dtype), SPANS, 200)
    assert len(calls) == 1
    _assert_equal_products(x, _columns((200, 100), dtype), [(0, 1), (1, 2), (2, 4), (4, 17)], 200)
    assert len(calls) == 1, "thirteen rows are multiplied by a library"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matrices_in_different_forms_are_multiplied_one_by_one(dtype: torch.dtype, calls: list[Any]) -> None:
    plain, other = _columns((64, 128), dtype)
    x = torch.randn(17, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    mixed = [_encoded(plain[0], "int4"), _encoded(plain[1], "int8"), *plain[2:]]
    _assert_equal_products(x, [mixed, other], SPANS, 64)
    assert not calls


@compiled
def test_many_rows_of_an_encoded_matrix_are_multiplied_with_the_decoded_one(calls: list[Any]) -> None:
    columns = [[_encoded(m, "int4") for m in column] for column in _columns((64, 128), torch.float32)]
    most = columns[0][0].fused_rows(torch.float32)
    spans = [(0, 1), (1, 2), (2, 3), (3, 4 + most)]
    x = torch.randn(4 + most, 128, generator=torch.Generator().manual_seed(1))
    _assert_equal_products(x, columns, spans, 64)
    assert not calls


@compiled
def test_rows_do_not_depend_on_the_threads() -> None:
    columns = [[_encoded(m, "int4") for m in column] for column in _columns((2000, 512), torch.float32)]
    x = torch.randn(17, 512, generator=torch.Generator().manual_seed(1))
    multiply, before = partial(each_linear, x, SPANS, columns, 2000), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = multiply()
        torch.set_num_threads(3)
        assert all(map(torch.equal, multiply(), alone))
    finally:
        torch.set_num_threads(before)


CODECS = ["none", "int8", "int4"]


@compiled
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_all_groups_on_the_cpu(
    codec: str, dtype: torch.dtype, biased: bool, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_linear, "native_rows", lambda dtype: 64)
    shape, ends = (200, 128), torch.tensor([1, 1, 4, 17], dtype=torch.int32)  # the second group is empty
    generator = torch.Generator().manual_seed(0)
    plain = [(torch.randn(shape, generator=generator) / 8).to(dtype) for _ in ends]
    biases = [torch.randn(200, generator=generator).to(dtype) for _ in ends] if biased else None
    matrices = plain if codec == "none" else [_encoded(matrix, codec) for matrix in plain]
    group = grouped_matrices(matrices, biases, dtype)
    if codec == "none" and dtype is torch.float32:
        assert group is None, "a library multiplies float32"
        return
    assert group is not None and group.serves(16)
    x = torch.randn(17, 128, generator=generator).to(dtype)
    y, tape = record(lambda: group.multiply(x, ends))
    assert tape is not None
    for found in ([1, 1, 4, 17], [0, 5, 5, 17], [17, 17, 17, 17]):
        ends.copy_(torch.tensor(found))
        replay([tape], 0)
        begin = 0
        for n, end in enumerate(found):
            wide = plain[n] if codec == "none" else matrices[n].decoded()
            exact = x[begin:end].double() @ wide.double().T + (0 if biases is None else biases[n].double())
            tolerance = 1e-4 if dtype is torch.float32 else 4e-2 if dtype is torch.bfloat16 else 1e-2
            torch.testing.assert_close(y[begin:end].double(), exact, rtol=tolerance, atol=tolerance)
            begin = end


@compiled
def test_matrices_that_no_kernel_multiplies_at_once_are_no_group_on_the_cpu() -> None:
    plain = [torch.randn(64, 128).bfloat16() for _ in range(3)]
    assert grouped_matrices([*plain[:2], _encoded(plain[2], "int4")], None, torch.bfloat16) is None
    assert grouped_matrices(plain, None, torch.float16) is None
    assert grouped_matrices([matrix.t() for matrix in plain], None, torch.bfloat16) is None
    assert grouped_matrices(plain, [torch.randn(64)] * 3, torch.bfloat16) is None
