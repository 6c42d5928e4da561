"""What accelerators can do, from their vendors' data sheets: a first guess of speed, and what is refused on which.

Speed is measured as soon as anything runs; these figures only make a plan possible before that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KEPT_UP = 0.4
"""Part of the data sheet's figure that training keeps up; an assumption (published runs are between 0.3 and 0.5)."""

UNKNOWN_OPERATIONS_S = 1.0e14
"""What an accelerator that is not listed keeps up; an allowance, not measured."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One kind of accelerator."""

    operations_s: float
    """Dense 16-bit matrix operations a second with fp32 accumulation, as the data sheet says."""

    bf16: bool = True
    """Whether it computes bf16 (NVIDIA: from Ampere)."""

    fp8: bool = False
    """Whether it computes fp8 (NVIDIA: from Ada and Hopper)."""


KNOWN = {
    "B200": Accelerator(2250e12, fp8=True),
    "H200": Accelerator(989e12, fp8=True),
    "H100": Accelerator(989e12, fp8=True),
    "L40S": Accelerator(362e12, fp8=True),
    "A100": Accelerator(312e12),
    "V100": Accelerator(125e12, bf16=False),
    "A10": Accelerator(125e12),
    "L4": Accelerator(121e12, fp8=True),
    "T4": Accelerator(65e12, bf16=False),
}
"""By the words of `accelerator.type`. From NVIDIA's data sheet of each: figures without sparsity, and of the SXM form
where there is one."""


def known(accelerator_type: str) -> Accelerator | None:
    """The accelerator that a type such as `L4`, `nvidia-l4` or `A100-SXM4-80GB` names; None when it is not listed."""
    words = re.split(r"[^A-Z0-9]+", accelerator_type.upper())
    return next((KNOWN[word] for word in words if word in KNOWN), None)


def operations_s(accelerator_type: str) -> float:
    """Operations a second that training may keep up on it."""
    found = known(accelerator_type)
    return UNKNOWN_OPERATIONS_S if found is None else found.operations_s * KEPT_UP


def computes(accelerator_type: str | None, precision: str) -> bool:
    """Whether it computes a precision of `train.precision`; what is not listed is believed. None: a CPU."""
    if accelerator_type is None:
        return precision != "fp8"
    found = known(accelerator_type)
    return found is None or {"bf16": found.bf16, "fp8": found.fp8}.get(precision, True)
