"""The storage of new keys and values in pages."""

import pytest
import torch

from flexgen.kernels.new_tokens import store_tokens


@pytest.fixture
def in_version(version, monkeypatch):
    if version == "torch":
        monkeypatch.setattr("flexgen.kernels.new_tokens.announce", lambda: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_token_is_copied_to_its_place_and_nothing_else_changes(in_version, dtype, rows):
    fused = torch.randint(0, 200, (rows, 1, 5 * 2, 6)).to(dtype)
    _, k, v = (
        each.transpose(1, 2) for each in fused.split([6, 2, 2], dim=2)
    )  # two heads of keys, and of values
    shape = rows, 2, 4, 6
    pages = [tuple(torch.randint(0, 200, shape).to(dtype) for _ in range(2)) for _ in range(3)]
    before = [tuple(x.clone() for x in page) for page in pages]
    store_tokens(pages, 6, k, v)  # place 2 of page 1
    for n, (page, old) in enumerate(zip(pages, before, strict=True)):
        for found, expected, new in zip(page, old, (k, v), strict=True):
            if n == 1:
                expected[:, :, 2] = new[:, :, 0]
            assert found.equal(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("by_head", [True, False])
def test_several_tokens_of_rows_with_lengths_of_their_own(in_version, dtype, by_head):
    k, v = (torch.randint(0, 200, (3, 5, 2, 6)).to(dtype).transpose(1, 2) for _ in range(2))
    if by_head:
        k, v = k.contiguous(), v.contiguous()
    pages = [tuple(torch.zeros(3, 2, 4, 6, dtype=dtype) for _ in range(2)) for _ in range(3)]
    lengths = [0, 7, 3]
    store_tokens(pages, torch.tensor(lengths), k, v)
    for new, stored in zip((k, v), zip(*pages, strict=True), strict=True):
        whole = torch.cat(stored, dim=2)
        for row, length in enumerate(lengths):
            assert whole[row, :, length : length + 5].equal(new[row])
        assert whole.count_nonzero() == new.count_nonzero(), "nothing else changes"


def test_values_in_another_dtype_are_converted(in_version):
    pages = [(torch.zeros(1, 2, 4, 6), torch.zeros(1, 2, 4, 6))]
    k = torch.randn(1, 2, 1, 6).bfloat16()
    store_tokens(pages, 3, k, k)
    assert pages[0][0][:, :, 3:].equal(k.float()) and pages[0][1][:, :, :3].count_nonzero() == 0
