"""What the tiers of a machine can hold."""

from __future__ import annotations

from flexgen.policy import Tier


class Limits(dict[Tier, int | None]):
    """Bytes that each tier can hold, None for no limit.

    host: bytes that the GPU and CPU tiers can hold together where both are host memory, None where they are not.
    """

    host: int | None = None
