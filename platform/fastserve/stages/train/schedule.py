"""The learning rate of each step."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    total_steps: int,
    peak: float,
    schedule: Literal["constant", "linear", "cosine"],
    warmup_steps: int = 0,
) -> float:
    """Learning rate of `step`, counted from 0.

    It rises in a line over `warmup_steps`, reaches `peak`, then stays (constant), or falls to 0 at the end of the run
    in a line (linear) or along half a cosine (Loshchilov and Hutter, 2017, arXiv 1608.03983).
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, 1 - done)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
