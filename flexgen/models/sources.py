"""Where the weights of a model are stored in checkpoints, as data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


class Source(NamedTuple):
    """A stored tensor, or the part of one that has the values of a weight in their order.

    take: the index of the first value of the part in the leading dimensions of the tensor: `(3,)` is matrix 3 of a
    stack, `(3, 40)` begins in its row 40. `()` is the whole tensor. shape: the shape of a tensor of which the weight
    is a part.
    """

    name: str
    take: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(map(str, self.take))}:]" if self.take else self.name

    @property
    def skipped(self) -> int:
        """The number of values of the tensor before the part."""
        return sum(index * math.prod(self.shape[n + 1 :]) for n, index in enumerate(self.take))


@dataclass(frozen=True)
class Stacked:
    """The name of a tensor with the matrices of all experts, (experts, parts * rows, columns), or with their biases.

    part: which of the `parts` of each expert's rows are those of the matrix.
    """

    name: str
    part: int = 0
    parts: int = 1

    def source(self, expert: int, experts: int, stored: tuple[int, ...]) -> Source:
        """The source of an expert's matrix or bias, which has the shape `stored` in the tensor."""
        rows, *columns = stored
        shape = experts, self.parts * rows, *columns
        return Source(self.name, (expert, self.part * rows) if self.part else (expert,), shape)


@dataclass(frozen=True)
class OneRow:
    """The name of a tensor (1, size) whose row is a weight (size)."""

    name: str

    def source(self, size: int) -> Source:
        return Source(self.name, (0,), (1, size))


Name = str | Stacked | OneRow

Names = Mapping[str, tuple[Name, ...]]
"""The names in a family's checkpoints for each module ("q", "mlp_in", "head"), in the order in which they are tried.
`{i}` is the index of the layer, `{h}` the index of a head, `{e}` the index of an expert."""


def prefixed(
    prefixes: Sequence[str], names: Mapping[str, Name | tuple[Name, ...]]
) -> dict[str, tuple[Name, ...]]:
    """`Names` for modules that are stored with one of several prefixes.

    A checkpoint can be saved from the model with its LM head or from the bare decoder. A tuple has several names for
    a module, which belong to different layouts of checkpoints.
    """
    return {
        module: tuple(
            prefix + name if isinstance(name, str) else replace(name, name=prefix + name.name)
            for name in (given if isinstance(given, tuple) else (given,))
            for prefix in prefixes
        )
        for module, given in names.items()
    }


def tensors(modules: Iterable[str], part: str) -> tuple[Source, ...]:
    """The sources of the tensor `part` ("weight", "bias") of a module with these names."""
    return tuple(Source(f"{module}.{part}") for module in modules)
