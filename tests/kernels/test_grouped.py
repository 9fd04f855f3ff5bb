"""Grouped products and the stacks that they need, on the CPU, where torch has them too."""

from __future__ import annotations

import pytest
import torch

from flexgen.kernels.grouped import available, grouped_linear, stacked


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
