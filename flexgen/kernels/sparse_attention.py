"""Sparse attention of one new token per row: scores over all keys, sums over a few values.

FlexGen (arXiv 2303.06865, section 4.2): softmax is over all tokens. The cached tokens with the largest probabilities
and the new token are chosen, and their probabilities are not normalised again. The query heads that share a K/V head
choose the same tokens, by the sum of their probabilities. If each query head chose its own tokens, they would
together read nearly all values. With one query head per K/V head, this is FlexGen's choice.

Choice and sum are two calls, so that a caller can load the chosen values in between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen.kernels.attention import check_pages, probabilities_in_torch, weigh_in_torch
from flexgen.kernels.heads import Pages
from flexgen.kernels.loading import NUMBERS, announce, native
from flexgen.kernels.scoring import Length, Scoring, longest

_ROUNDING = 1e-9
"""A share of a count is rounded down if it exceeds an integer by less than this: 0.1 of 30 is 3."""


@dataclass(frozen=True)
class Choice:
    """The chosen tokens of each row and K/V head, the new one last, and their probabilities for each query head.

    `positions` (rows, kv_heads, most) int64; `weights` (rows, heads, most) float32. A row with fewer tokens to choose
    from than others is padded with the new token at weight zero.
    """

    positions: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Sparsity:
    """The rule that chooses cached tokens of a row.

    Tokens are chosen in blocks of `unit` consecutive positions, aligned to `unit`. From the blocks that contain a
    token of the row, it chooses the `share` in (0, 1] with the largest sums of probabilities.
    """

    share: float
    unit: int = 1

    def chosen_blocks(self, blocks: int) -> int:
        """The number of chosen blocks from `blocks`: the ceiling of the share, and at least one if there are any."""
        return min(max(math.ceil(self.share * blocks - _ROUNDING), 1), blocks)

    def most(self, length: int) -> int:
        """The maximum number of tokens that `choose` chooses from `length`, including the new one."""
        return self.chosen_blocks(-(-(length - 1) // self.unit)) * self.unit + 1


def choose(
    q: Tensor, pages: Pages, length: Length, starts: Tensor | None, scoring: Scoring, sparsity: Sparsity
) -> Choice:
    """Score the keys of the first `length` positions and choose tokens. Does not read values.

    The other arguments are those of `decode_attention`. The last position of a row is the new token. Compiled
    kernels compute scores in float32, torch in the dtype of q. Raises ValueError unless scores are plain and without
    a window, and q has one new token.
    """
    if not scoring.plain or scoring.window is not None or q.shape[2] != 1:
        raise ValueError("sparse attention needs one new token, and plain scores without a window")
    check_pages(q, pages, length)
    if q.device.type == "cpu" and q.dtype in NUMBERS and announce():
        return choose_natively(q, pages, length, starts, scoring, sparsity)
    return choose_in_torch(q, pages, length, starts, scoring, sparsity)


def attend_chosen(choice: Choice, pages: Pages) -> Tensor:
    """The weighted sum of the chosen values, (rows, heads, 1, head_dim). The compiled kernel reads only these.

    torch multiplies whole pages, with zeros for the other tokens, whose values must be finite.
    """
    values = pages[0][1]
    if values.device.type == "cpu" and values.dtype in NUMBERS and announce():
        return attend_chosen_natively(choice, pages)
    return attend_chosen_in_torch(choice, pages)


def choose_natively(
    q: Tensor, pages: Pages, length: Length, starts: Tensor | None, scoring: Scoring, sparsity: Sparsity
) -> Choice:
    """`choose` with the compiled kernel. It reads keys once, in their pages, and skips padding."""
    rows, heads, _, head_dim = q.shape
    whole = longest(length, 0)
    kv_heads, most = pages[0][0].shape[1], sparsity.most(whole)
    ends = length.contiguous() if isinstance(length, Tensor) else None
    q = q.contiguous()
    positions = torch.empty(rows, kv_heads, most, dtype=torch.int64)
    weights = torch.empty(rows, heads, most, dtype=torch.float32)
    if starts is not None:
        starts = starts.to("cpu", torch.int64).contiguous()
        if starts.shape != (rows,) or (rows and int(starts.min()) < 0):
            raise ValueError(f"starts must be {rows} integers of at least 0, one per row")
    native.choose(
        NUMBERS[q.dtype],
        q.data_ptr(),
        (rows, heads, kv_heads, head_dim),
        [k.data_ptr() for k, _ in pages],
        [k.shape[2] for k, _ in pages],
        whole,
        0 if starts is None else starts.data_ptr(),
        0 if ends is None else ends.data_ptr(),
        scoring.scale,
        sparsity.share,
        sparsity.unit,
        most,
        positions.data_ptr(),
        weights.data_ptr(),
        torch.get_num_threads(),
    )
    return Choice(positions, weights)


def attend_chosen_natively(choice: Choice, pages: Pages) -> Tensor:
    """`attend_chosen` with the compiled kernel. It reads only the chosen values."""
    rows, heads, most = choice.weights.shape
    _, kv_heads, _, head_dim = pages[0][1].shape
    out = torch.empty(rows, heads, 1, head_dim, dtype=pages[0][1].dtype)
    native.attend_chosen(
        NUMBERS[out.dtype],
        (rows, heads, kv_heads, head_dim),
        most,
        choice.positions.data_ptr(),
        choice.weights.data_ptr(),
        [v.data_ptr() for _, v in pages],
        [v.shape[2] for _, v in pages],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def choose_in_torch(
    q: Tensor, pages: Pages, length: Length, starts: Tensor | None, scoring: Scoring, sparsity: Sparsity
) -> Choice:
    """`choose` in torch, on every device. It does not wait for the device."""
    rows, heads = q.shape[:2]
    kv_heads, device, unit = pages[0][0].shape[1], q.device, sparsity.unit
    most = longest(length, sum(k.shape[2] for k, _ in pages)) - 1
    group, blocks = heads // kv_heads, -(-most // unit)
    probabilities = probabilities_in_torch(q, pages, length, starts, scoring).unflatten(0, (rows, kv_heads))
    starts = torch.zeros(rows, dtype=torch.int64, device=device) if starts is None else starts.to(device)
    ranked = torch.zeros(rows, kv_heads, blocks * unit, dtype=torch.float32, device=device)
    torch.sum(probabilities[..., :most], dim=2, out=ranked[..., :most])
    if isinstance(length, Tensor):  # the new token of a row may be at a place of other rows' cached tokens
        cached = length - 1
        ranked.masked_fill_((torch.arange(blocks * unit, device=device) >= cached[:, None])[:, None], 0.0)
    else:
        cached = torch.full((rows,), most, device=device)
    if unit > 1:
        ranked = ranked.view(rows, kv_heads, blocks, unit).sum(-1)
    first, end, number = starts // unit, (cached + unit - 1) // unit, torch.arange(blocks, device=device)
    others = (number < first[:, None]) | (number >= end[:, None])
    ranked.masked_fill_(others[:, None], -1.0)  # less than a probability that was rounded to zero
    best = ranked.topk(sparsity.chosen_blocks(blocks), dim=-1).indices
    # Rows have different numbers of blocks, which only the device knows.
    counts = torch.where(starts < cached, end - first, 0)
    keep = (counts.double() * sparsity.share - _ROUNDING).ceil().clamp_min(1).minimum(counts)
    chosen = torch.arange(best.shape[-1], device=device) < keep[:, None]
    positions = (best[..., None] * unit + torch.arange(unit, device=device)).flatten(2)
    real = chosen[:, None].expand_as(best).repeat_interleave(unit, dim=-1)
    new = cached[:, None, None].expand(rows, kv_heads, 1)
    real = real & (positions >= starts[:, None, None]) & (positions < new)
    positions = torch.cat((torch.where(real, positions, new), new), dim=-1)
    real = torch.nn.functional.pad(real, (0, 1), value=True)
    weights = probabilities.gather(3, positions[:, :, None].expand(-1, -1, group, -1)) * real[:, :, None]
    return Choice(positions, weights.flatten(1, 2))


def attend_chosen_in_torch(choice: Choice, pages: Pages) -> Tensor:
    """`attend_chosen` in torch, on every device."""
    values = pages[0][1]
    rows, kv_heads, most = choice.positions.shape
    heads, head_dim, total = choice.weights.shape[1], values.shape[3], sum(v.shape[2] for _, v in pages)
    group = heads // kv_heads
    weights = torch.zeros(rows, kv_heads, group, total, dtype=torch.float32, device=values.device)
    there = choice.positions[:, :, None].expand(-1, -1, group, -1)
    # The weights are added, because rows with fewer tokens are padded with zeros for the new token.
    weights.scatter_add_(3, there, choice.weights.view(rows, kv_heads, group, most))
    probabilities = weights.flatten(0, 1).to(values.dtype)
    return weigh_in_torch(probabilities, pages).view(rows, heads, 1, head_dim)
