"""Machines that a cluster brings when they are asked for, as a stage is told of them.

A Ray head knows the machines that are there. Which kinds its autoscaler would add it tells nobody, so whoever starts a
stage says it in a variable: without it a run on machines that have all been given back would be refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

VARIABLE = "FASTSERVE_MACHINES"
"""Kinds of machine by profile, as JSON; not set where none are brought, as on a laptop."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One machine of a profile."""

    cpus: float
    accelerators: float = 0.0


def told(kinds: Mapping[str, Kind]) -> dict[str, str]:
    """The variable for a stage; none where no machine is brought."""
    if not kinds:
        return {}
    values = {profile: [kind.cpus, kind.accelerators] for profile, kind in sorted(kinds.items())}
    return {VARIABLE: json.dumps(values)}


def brought(environment: Mapping[str, str]) -> dict[str, Kind]:
    """What `told` wrote. Raises ValueError for anything else."""
    values = json.loads(environment.get(VARIABLE) or "{}")
    return {str(profile): Kind(float(cpus), float(accelerators)) for profile, (cpus, accelerators) in values.items()}
