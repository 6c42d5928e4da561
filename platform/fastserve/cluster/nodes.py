"""The machines of a Ray cluster by hardware profile, from the head's REST API.

A node says with the label `fastserve.dev/profile` what it is a machine of. A home's own head carries `local`; a node
without the label trains, where a worker of profile `local` may go anywhere, and serves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastserve.cluster.ray_rest import RayRest
from fastserve.plan.brought import Kind, told
from fastserve.plan.facts import LOCAL, Hardware
from fastserve.spec.hardware import HardwareProfileSpec

PROFILE_LABEL = "fastserve.dev/profile"
"""Label of a Ray node: the hardware profile that it is a machine of."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One node of the Ray cluster that is alive."""

    profile: str
    """Empty where the node does not say."""

    cpus: float
    """As Ray counts them; on a laptop there are more than cores."""

    accelerators: float

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Machine:
        """From a row of the head's answer."""
        resources = value.get("resources_total") or {}
        labels = value.get("labels") or {}
        profile = str(labels.get(PROFILE_LABEL) or "")
        return cls(profile, float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)))


def machines(dashboard_url: str, token: str) -> list[Machine]:
    """The nodes that are alive. Raises ClusterFailed when the head does not answer."""
    rest = RayRest(dashboard_url, token)
    response = rest.call("GET", "/api/v0/nodes?detail=1&limit=10000")
    if not response.is_success:
        raise rest.failed(response, "list its nodes")
    with rest.understood():
        rows = response.json()["data"]["result"]["result"]
        return [Machine.from_json(row) for row in rows if row.get("state") == "ALIVE"]


def with_promised(alive: Sequence[Machine], promised: Sequence[Machine]) -> list[Machine]:
    """The machines that are alive, and those that an autoscaler would add when they are asked for.

    promised: all machines that there may be of each profile, those that are alive included.
    """
    found = list(alive)
    for profile in sorted({machine.profile for machine in promised}):
        may_be = [machine for machine in promised if machine.profile == profile]
        found += may_be[sum(machine.profile == profile for machine in alive) :]
    return found


def kinds_of(promised: Sequence[Machine]) -> dict[str, str]:
    """The variable that tells a stage which kinds of machine an autoscaler would add; none where it would add none."""
    return told({machine.profile: Kind(machine.cpus, machine.accelerators) for machine in promised if machine.profile})


def profiles_of(found: Sequence[Machine]) -> set[str]:
    """Profiles that there is a machine of."""
    return {machine.profile for machine in found if machine.profile}


def room(found: Sequence[Machine], profile: str, hardware: Hardware, accelerators: int) -> int:
    """Replicas that the machines of a profile hold at most.

    hardware: of one of them. accelerators: of one replica. Without accelerators a replica computes on all cores of its
    machine, so there is one on each; the machine `local` is asked for as many as the manifest says.
    """
    those = [machine for machine in found if machine.profile == profile]
    if hardware.accelerators:
        return sum(int(machine.accelerators // max(1, accelerators)) for machine in those)
    if profile == LOCAL:
        return sum(int(machine.cpus) for machine in those)
    return sum(machine.cpus >= 1 for machine in those)


def hardware_of(profile: str, described: Mapping[str, HardwareProfileSpec], local: Hardware) -> Hardware:
    """What one machine of a profile has. A profile that nobody describes is taken to be like this machine."""
    spec = described.get(profile)
    if spec is None:
        return local
    accelerator = spec.accelerator
    return Hardware(
        cpus=spec.cpus,
        memory_bytes=spec.memory,
        accelerators=0 if accelerator is None else accelerator.count,
        accelerator_memory_bytes=0 if accelerator is None else accelerator.memory,
        accelerator_type="" if accelerator is None else accelerator.type,
    )
