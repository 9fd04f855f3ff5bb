"""Log-likelihoods of texts, from a model's logits, and perplexity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

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
    forward: Callable[[Sequence[Sequence[int]]], Tensor], texts: Sequence[Sequence[int]], rows: int = ROWS
) -> list[Tensor]:
    """`log_likelihoods` of every text (ids), in the order of `texts`.

    forward: returns the logits (texts, longest, vocab) of texts of any lengths, from the start of each row, as
        `OptLM.forward` does for lists. It is called with at most `rows` texts at a time, of similar lengths.
    """
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    longest_first = sorted(range(len(texts)), key=lambda n: -len(texts[n]))
    for begin in range(0, len(texts), rows):
        chosen = longest_first[begin : begin + rows]
        for n, logits in zip(chosen, forward([texts[n] for n in chosen]), strict=True):
            found[n] = log_likelihoods(logits[: len(texts[n])], texts[n])
    return found


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
