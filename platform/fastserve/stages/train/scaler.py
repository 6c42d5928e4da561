"""The scale of the loss in fp16, whose small gradients would vanish and whose large ones overflow.

Micikevicius et al., 2018, arXiv 1710.03740, section 3.2: the scale is halved when a gradient overflows, and doubled
after many steps without. A batch whose gradient overflowed is computed again with the smaller scale, so that no sample
is lost and a step is always a step of the optimizer.
"""

from __future__ import annotations

from typing import Any

FIRST = 2.0**16
GROWS_AFTER = 2000
"""Steps without an overflow after which the scale is doubled."""

LEAST = 2.0**-14
"""A gradient that overflows at this scale is no matter of scaling."""


class LossScale:
    """What the loss is multiplied with before backward; 1, and nothing else, unless the precision is fp16."""

    def __init__(self, precision: str, factor: float = FIRST, good_steps: int = 0) -> None:
        self.dynamic = precision == "fp16"
        self.factor = factor if self.dynamic else 1.0
        self.good_steps = good_steps
        """Steps since the scale was last changed."""

    @classmethod
    def of(cls, precision: str, factor: float, extra: dict[str, Any]) -> LossScale:
        """As a checkpoint left it."""
        return cls(precision, factor, int(extra.get("goodSteps", 0)))

    def overflowed(self) -> bool:
        """Halve the scale; False when it cannot be that."""
        if not self.dynamic or self.factor <= LEAST:
            return False
        self.factor, self.good_steps = self.factor / 2, 0
        return True

    def stepped(self) -> None:
        """A step was taken."""
        self.good_steps += 1
        if self.dynamic and self.good_steps >= GROWS_AFTER:
            self.factor, self.good_steps = self.factor * 2, 0
