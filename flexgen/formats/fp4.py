"""Floats of 4 bits in small groups: MXFP4 (gpt-oss) and NVFP4 (NVIDIA's releases)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen.formats.encoding import E8M0, Encoding, Part, Settings, check_groups
from flexgen.kernels import e2m1, e4m3
from flexgen.kernels.encoded_linear import Code, EncodedForm

_MX_GROUP = 32
_NV_GROUP = 16


@dataclass(frozen=True)
class MXFP4(Encoding):
    """e2m1 values, and a power of two for each 32 of a row, stored as its exponent plus 127 (e8m0).

    by_group: whether the codes have a dimension for the groups, (out, in / 32, 16).
    """

    codes: str = "_blocks"
    scale: str = "_scales"
    by_group: bool = True

    host_bytes = 14

    @property
    def name(self) -> str:
        return "mxfp4"

    @property
    def mark(self) -> tuple[str, torch.dtype]:
        return self.codes, torch.uint8

    @property
    def form(self) -> EncodedForm:
        return EncodedForm(Code.E2M1, _MX_GROUP)

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        rows, columns = shape
        check_groups(columns, _MX_GROUP)
        groups = columns // _MX_GROUP
        codes = (rows, groups, _MX_GROUP // 2) if self.by_group else (rows, columns // 2)
        return (
            Part(self.codes, (torch.uint8,), codes),
            Part(self.scale, (torch.uint8, E8M0), (rows, groups)),
        )

    def values(self, parts: Sequence[Tensor], begin: int, end: int) -> Tensor:
        codes, scales = (part[begin:end] for part in parts)
        factors = scales.view(E8M0).to(torch.float32)
        return e2m1.scaled(codes.flatten(1), factors).flatten(1)


@dataclass(frozen=True)
class NVFP4(Encoding):
    """e2m1 values, an e4m3 scale for each 16 of a row, and a float32 scale of the matrix.

    divides: whether the scale of the matrix divides values (llm-compressor) or multiplies them (ModelOpt).
    """

    codes: str
    overall: str
    divides: bool

    host_bytes = 16

    @property
    def name(self) -> str:
        return "nvfp4"

    @property
    def mark(self) -> tuple[str, torch.dtype]:
        return self.codes, torch.uint8

    @property
    def form(self) -> EncodedForm:
        return EncodedForm(Code.E2M1, _NV_GROUP, divides=self.divides)

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        rows, columns = shape
        check_groups(columns, _NV_GROUP)
        return (
            Part(self.codes, (torch.uint8,), (rows, columns // 2)),
            Part(".weight_scale", (e4m3.E4M3,), (rows, columns // _NV_GROUP)),
            Part(self.overall, (torch.float32,), (1,)),
        )

    def values(self, parts: Sequence[Tensor], begin: int, end: int) -> Tensor:
        codes, scales, overall = parts
        factor = overall.reciprocal() if self.divides else overall
        factors = e4m3.scaled(scales[begin:end].view(torch.uint8), factor)
        return e2m1.scaled(codes[begin:end], factors).flatten(1)


def read_mxfp4(settings: Settings) -> tuple[Encoding, ...]:
    """The encodings of `quant_method: mxfp4`."""
    return (MXFP4(),)
