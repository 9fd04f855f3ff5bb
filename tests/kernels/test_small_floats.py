"""Floats of 4 and 8 bits, by every code."""

from __future__ import annotations

import torch

from flexgen.kernels import e2m1, e4m3

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-value for value in E2M1]


def test_every_pair_of_e2m1() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = torch.tensor([[E2M1[code % 16], E2M1[code // 16]] for code in range(256)])
    found = e2m1.scaled(codes, torch.ones(1))
    assert torch.equal(found.view(256, 2), expected)
    assert torch.equal(found.signbit().view(256, 2), expected.signbit())
    scales = torch.tensor([2.0**-127, 2.0**100, 0.3, 7.0])
    assert torch.equal(e2m1.scaled(codes, scales), expected.view(4, 128) * scales[:, None])


def test_every_e4m3() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    numbers = expected.isfinite()
    assert torch.equal(e4m3.scaled(codes, torch.tensor(3.0))[numbers], expected[numbers] * 3)
    assert not e4m3.has_nan(codes[numbers])
    assert all(e4m3.has_nan(codes[n : n + 1]) for n in (0x7F, 0xFF))
