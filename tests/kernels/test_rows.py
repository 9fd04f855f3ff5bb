"""Rows of a matrix by their indices."""

import pytest
import torch

from flexgen.kernels.loading import native_available
from flexgen.kernels.rows import MOST, gather_rows
from flexgen.kernels.tape import record, replay


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (MOST + 1,), (0,)])
def test_rows(dtype, shape):
    x = torch.arange(35).view(7, 5).to(dtype)
    indices = torch.arange(torch.Size(shape).numel()).view(shape) * 3 % 7
    found = gather_rows(x, indices)
    assert found.dtype is dtype and found.equal(x[indices])
    assert gather_rows(x.t(), indices % 5).equal(x.t()[indices % 5])


@pytest.mark.parametrize("index", [7, -1, 1 << 40])
@pytest.mark.parametrize("count", [1, MOST + 1])
def test_other_indices_are_errors(count, index):
    with pytest.raises((RuntimeError, IndexError)):
        gather_rows(torch.zeros(7, 5), torch.full((count,), index))


@pytest.mark.skipif(not native_available(), reason="no compiled kernels here")
def test_a_tape_reads_the_indices_of_each_replay():
    x, indices = torch.randn(7, 5), torch.tensor([[2]])
    y, tape = record(lambda: gather_rows(x, indices))
    indices.fill_(5)
    replay([tape], 0)
    assert y.equal(x[indices])
