"""Group-wise integers of 4 or 8 bits: x = q * scale + minimum for each group of consecutive values.

The compiled kernels and torch produce identical bits, in both directions.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from flexgen.kernels.loading import NUMBERS, announce, native, triton_kernels
from flexgen.kernels.packed import Packed

_VECTOR = 16
"""Bytes of codes that the widest compiled version processes at once. torch processes smaller groups."""
_UNIT = 2.0**-24
"""The spacing of the smallest float16 numbers."""
_UNITS = (1 - 2.0**-20) / _UNIT
"""The number of units in 1, slightly reduced, so that a rounded product does not exceed the exact integer."""
PIECE = 1 << 19
"""Values that torch decodes at once on a CPU. Memory plans do not count their temporaries, of up to 9 bytes per
value."""
_GPU_PIECE = 1 << 28
"""Values that torch decodes at once on a GPU. Most matrices are one piece, because launches would dominate the time
of smaller ones. See `decode_workspace`."""


def quantise(x: Tensor, bits: int, group: int = 64, scale_dtype: torch.dtype = torch.float16) -> Packed:
    """Round each value to the nearest of 2 ** bits levels between the minimum and the maximum of its group.

    The step between levels is stored in float16. A subnormal step is rounded up to a multiple of 2 ** -24: rounded to
    nearest, it could be 0, which loses the group, or too small for the largest values. The error of a value is at
    most half a step plus the rounding error of the minimum.

    x must be finite. Its last dimension must be a multiple of `group`, and the codes of a group must be whole bytes.
    """
    _check(bits, group, scale_dtype)
    if not x.dim() or not x.shape[-1] or x.shape[-1] % group:
        raise ValueError(f"the last dimension of {tuple(x.shape)} is not a multiple of the group, {group}")
    *outer, n = x.shape
    packed = Packed(
        values=torch.empty(*outer, n * bits // 8, dtype=torch.uint8, device=x.device),
        scales=torch.empty(*outer, n // group, dtype=scale_dtype, device=x.device),
        minimums=torch.empty(*outer, n // group, dtype=scale_dtype, device=x.device),
        bits=bits,
        group=group,
    )
    if x.device.type == "cpu" and x.dtype in NUMBERS and _has_vectors(bits, group) and announce():
        quantise_natively(x, packed)
    else:
        quantise_in_torch(x, packed)
    return packed


def dequantise(packed: Packed, out: Tensor) -> Tensor:
    """Decode `packed` to `out`, rounded to the dtype of `out`, and return it."""
    check_packed(packed)
    if out.shape != packed.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}: expected {tuple(packed.shape)}")
    tensors = out, packed.values, packed.scales, packed.minimums
    fits = all(x.is_contiguous() and x.device == out.device for x in tensors) and out.dtype in NUMBERS
    if fits and out.device.type == "cpu" and _has_vectors(packed.bits, packed.group) and announce():
        return dequantise_natively(packed, out)
    if fits and (kernels := triton_kernels(out.device)):
        return kernels.dequantise(packed, out)
    return dequantise_in_torch(packed, out)


def check_packed(packed: Packed) -> None:
    """Raise ValueError if the shapes or dtypes of the parts do not match."""
    _check(packed.bits, packed.group, packed.scales.dtype)
    *outer, n = packed.shape
    octets = torch.Size((*outer, n * packed.bits // 8))
    if packed.values.shape != octets or packed.values.dtype != torch.uint8:
        raise ValueError(
            f"values of shape {tuple(packed.values.shape)}: expected uint8 of shape {tuple(octets)}"
        )
    if (packed.minimums.shape, packed.minimums.dtype) != (packed.scales.shape, packed.scales.dtype):
        raise ValueError("scales and minimums must have the same shape and type")


def _check(bits: int, group: int, scale_dtype: torch.dtype) -> None:
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits: expected 4 or 8")
    if group < 1 or group * bits % 8:
        raise ValueError(f"group {group}: expected a number of values whose codes are whole bytes")
    if scale_dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"scales in {scale_dtype}: expected torch.float16 or torch.bfloat16")


def _has_vectors(bits: int, group: int) -> bool:
    return group * bits // 8 >= _VECTOR


def quantise_natively(x: Tensor, packed: Packed) -> None:
    """Fill `packed` with the compiled kernel."""
    x = x.contiguous()
    native.quantise(*_arguments(x, packed))


def dequantise_natively(packed: Packed, out: Tensor) -> Tensor:
    """Fill `out` (contiguous) with the compiled kernel."""
    native.dequantise(*_arguments(out, packed))
    return out


def _arguments(x: Tensor, packed: Packed) -> tuple[int, int, int, int, int, int, int, int, int, int]:
    return (
        NUMBERS[x.dtype],
        NUMBERS[packed.scales.dtype],
        packed.bits,
        packed.group,
        packed.scales.numel(),
        x.data_ptr(),
        packed.values.data_ptr(),
        packed.scales.data_ptr(),
        packed.minimums.data_ptr(),
        torch.get_num_threads(),
    )


def quantise_in_torch(x: Tensor, packed: Packed) -> None:
    """Fill `packed` with torch, on any device."""
    levels = 2**packed.bits - 1
    groups = x.float().unflatten(-1, (-1, packed.group))
    least, most = groups.aminmax(dim=-1)
    largest = torch.finfo(packed.scales.dtype).max
    # The codes are computed with the stored scale and minimum, after rounding.
    packed.minimums.copy_(least.add_(0.0).clamp_(-largest, largest))  # no negative zero
    span = most.sub_(packed.minimums).clamp_min_(0)
    scales = (span * (1 / levels)).clamp_(0, largest)
    if packed.scales.dtype == torch.float16:
        rounded_up = span.mul_(_UNITS / levels).ceil_().mul_(_UNIT)
        scales = torch.where(scales < torch.finfo(torch.float16).smallest_normal, rounded_up, scales)
    packed.scales.copy_(scales)
    codes = (groups - packed.minimums[..., None]).div_(packed.scales[..., None])
    codes.nan_to_num_(0.0, 0.0, 0.0)  # for a scale of 0
    codes.clamp_(0, levels).round_()
    if packed.bits == 4:
        low, high = codes.chunk(2, dim=-1)
        codes = torch.add(low, high, alpha=16)
    packed.values.unflatten(-1, codes.shape[-2:]).copy_(codes)


def dequantise_in_torch(packed: Packed, out: Tensor, piece: int | None = None) -> Tensor:
    """Fill `out` with torch, on any device. `decode_workspace` is the size of the temporaries.

    piece: values decoded at once; the default is `PIECE` on a CPU, and more on a GPU.
    """
    groups = packed.scales.shape[-1]
    if not groups:
        return out
    values, target = (x.unflatten(-1, (groups, -1)) for x in (packed.values, out))
    if piece is None:
        piece = PIECE if out.device.type == "cpu" else _GPU_PIECE
    _decode_pieces(values, packed.scales, packed.minimums, target, packed.bits, piece)
    return out


def decode_workspace(values: int, bits: int, group: int) -> int:
    """Bytes of temporaries when torch decodes `values` values on a GPU, for the largest piece: scales, and codes of 4
    bits."""
    at_once = min(values, _GPU_PIECE)
    scales = at_once // group * (2 if bits == 4 else 1) * torch.float32.itemsize
    return scales + (at_once if bits == 4 else 0)


def _decode_pieces(
    values: Tensor, scales: Tensor, minimums: Tensor, out: Tensor, bits: int, piece: int
) -> None:
    """Decode groups (..., octets) to `out` (..., group), in pieces along the first dimensions if one is not
    enough."""
    *lead, group = out.shape
    split = next((dim for dim, size in enumerate(lead) if size > 1), None)
    if split is not None and out.numel() > max(piece, group):
        most = max(piece * lead[split] // out.numel(), 1)
        for v, s, m, o in zip(*(x.split(most, split) for x in (values, scales, minimums, out)), strict=True):
            _decode_pieces(v, s, m, o, bits, piece)
        return
    # This needs the fewest launches. The products are exact in float32, so the result is rounded once.
    if bits == 4:
        masks, units = _nibbles(out.device)
        codes = values[..., None, :] & masks
        torch.addcmul(
            minimums[..., None, None], codes, scales[..., None, None] * units, out=out.unflatten(-1, (2, -1))
        )
    else:
        torch.addcmul(minimums[..., None], values, scales[..., None].float(), out=out)


@functools.cache
def _nibbles(device: torch.device) -> tuple[Tensor, Tensor]:
    """Two tensors (2, 1): the masks of the codes in a byte, and the value of each mask's lowest bit, in float32."""
    masks = torch.tensor([[0x0F], [0xF0]], dtype=torch.uint8, device=device)
    return masks, torch.tensor([[1.0], [1 / 16]], device=device)
