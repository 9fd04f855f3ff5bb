"""Memory for results."""

from pathlib import Path

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


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages"
)
@pytest.mark.parametrize("nbytes", [2 * HUGE_PAGE, 3 * HUGE_PAGE + 5, 48 << 20])
def test_large_results_ask_for_huge_pages(nbytes):
    assert "hg" in flags_of(empty_result((nbytes,), torch.uint8).data_ptr())


def flags_of(address):
    """The flags of the mapping with that address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name:
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = begin <= address < end
        elif inside and name == "VmFlags:":
            return values
    raise AssertionError(f"no mapping with address {address:#x}")
