"""Log-likelihoods of texts, from a model's logits, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from flexgen.layout.prefix import SHORTEST

ROWS = 32
"""The number of texts whose logits are in memory at a time. Logits take far more memory than texts."""


def log_likelihoods(logits: Tensor, ids: Sequence[int] | Tensor) -> Tensor:
    """The natural logarithm of each id's probability, given the ids before it: (tokens - 1) float32.

    The first id has no probability, because no id comes before it.

    logits: (tokens, vocab) in any floating dtype, the model's output for `ids`.
    ids: (tokens).

    Raises ValueError unless there is one row of logits for each id.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64)
    if logits.dim() != 2 or ids.shape != logits.shape[:1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and ids {tuple(ids.shape)}; "
            "they must be (tokens, vocab) and (tokens)"
        )
    return torch.log_softmax(logits[:-1].float(), dim=-1).gather(-1, ids[1:, None]).squeeze(-1)


def score(
    forward: Callable[[Sequence[Sequence[int]]], Tensor],
    texts: Sequence[Sequence[int]],
    rows: int = ROWS,
    call_positions: float = math.inf,
) -> list[Tensor]:
    """`log_likelihoods` of every text (ids), in the order of `texts`.

    forward: returns the logits (texts, longest, vocab) of texts of any lengths, from the start of each row, as
        `OptLM.forward` does for lists. It is called with at most `rows` texts at a time: texts that share a long
        beginning, such as the answers to one question, or texts of similar lengths.
    call_positions: the number of positions that `forward` computes in the time that a further call takes. With
        infinity, texts are not grouped by what they share.
    """
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    for chosen in calls_of(texts, rows, call_positions):
        for n, logits in zip(chosen, forward([texts[n] for n in chosen]), strict=True):
            found[n] = log_likelihoods(logits[: len(texts[n])], texts[n])
    return found


def calls_of(texts: Sequence[Sequence[int]], rows: int, call_positions: float) -> Iterator[list[int]]:
    """The numbers of the texts of each call. The arguments are those of `score`."""
    rest = list(range(len(texts)))
    if math.isfinite(call_positions) and len(texts) > 1:
        groups, rest = _groups([tuple(text) for text in texts], rows, call_positions)
        yield from groups
    rest.sort(key=lambda n: -len(texts[n]))
    yield from (rest[begin : begin + rows] for begin in range(0, len(rest), rows))


def _groups(
    texts: Sequence[tuple[int, ...]], rows: int, call_positions: float
) -> tuple[list[list[int]], list[int]]:
    """Groups of texts that are worth a call of their own, and the other texts.

    In the order of their ids, texts with a common beginning are adjacent. From the first text on, the group is the
    one with the fewest computed positions for each of its texts.
    """
    order = sorted(range(len(texts)), key=texts.__getitem__)
    in_all = _common(texts[order[0]], texts[order[-1]])  # any call shares these
    groups, rest = [], []
    begin = 0
    while begin < len(order):
        shared, total, best, size = len(texts[order[begin]]) - 1, 0, math.inf, 1
        for count, n in enumerate(order[begin : begin + rows], 1):
            if count > 1:
                shared = min(shared, len(texts[n]) - 1, _common(texts[order[begin + count - 2]], texts[n]))
            total += len(texts[n])
            if count > 1 and shared >= SHORTEST:
                each = (call_positions + total - (count - 1) * shared) / count
                if each < best and each < call_positions / rows + total / count - in_all:
                    best, size = each, count
        chosen = order[begin : begin + size]
        if size > 1:
            groups.append(chosen)
        else:
            rest += chosen
        begin += size
    return groups, rest


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """The number of ids with which both texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def perplexity(scores: Iterable[Tensor]) -> float:
    """The reciprocal of the geometric mean of the probabilities of all tokens.

    scores: log-likelihoods (tokens) of texts or of parts of texts.

    Raises ValueError if there is no token.
    """
    # In float64, because a sum over many texts would lose precision in float32.
    every = torch.cat([score.double() for score in scores] or [torch.empty(0)])
    if not len(every):
        raise ValueError("scores have no tokens; give texts of at least two tokens")
    return float(torch.exp(-every.mean()))
