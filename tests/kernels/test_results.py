"""Memory for results."""

import pytest
import torch

from flexgen.kernels.results import HUGE_PAGE, empty_result


@pytest.mark.parametrize("shape", [(0,), (3, 5), (2, 1 << 20), (7, 300_001)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_result_is_an_ordinary_tensor(shape, dtype):
    found = empty_result(shape, dtype)
    assert found.shape == shape and found.dtype is dtype and found.is_contiguous()
    assert found.fill_(3).sum(dtype=torch.float64) == 3 * found.numel()
    if found.nbytes >= 2 * HUGE_PAGE:
        assert found.data_ptr() % HUGE_PAGE == 0
