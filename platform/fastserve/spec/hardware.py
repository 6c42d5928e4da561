"""Named kinds of machine: unequal on purpose, priced, and measured rather than believed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fastserve.spec.section import Bytes, Flag, Number, Positive, Section


class Accelerator(Section):
    """The accelerators of one machine of a profile."""

    type: str
    """Name of the accelerator, such as L4, A100 or H100."""

    memory: Annotated[Bytes, Field(gt=0)]
    """Memory of one accelerator, such as 24GiB."""

    count: Positive = 1
    """Accelerators in one machine."""


class HardwareProfileSpec(Section):
    """What a machine of this profile has and costs."""

    accelerator: Accelerator | None = None
    """Absent: the machine computes on its CPUs."""

    cpus: Positive
    """CPU cores."""

    memory: Annotated[Bytes, Field(gt=0)]
    """Main memory, such as 32GiB."""

    price_per_hour: Annotated[Number, Field(ge=0)] | None = None
    """Price of one machine for an hour, in any one currency; used to compare profiles."""

    spot: Flag = False
    """Whether the machine may be taken away at short notice."""

    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a Kubernetes node of this profile carries, for who reads it. Nothing is placed by them: pods go where
    the worker group of the profile's name says (`ray.profiles[].nodeSelector` of the chart)."""
