"""Where a worker runs: its hardware profile, its device, and the memory that training may use there.

Ray Train's ranks do not follow the list of workers that it was given, so each rank looks for itself.
"""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from fastserve.stages.cgroup import free_bytes, statistic
from fastserve.stages.train.group import CPU, Group

PROFILE_LABEL = "fastserve.dev/profile"
"""Label of a Ray node: the hardware profile that it is a machine of."""

LOCAL = "local"
"""Profile of a machine that carries no label."""

_NODE_BITS = 48
"""Of a machine's name, as a number that a float holds exactly."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs."""

    profile: str = LOCAL
    node: str = ""
    """Names the machine; workers with an equal one share its memory."""

    device: torch.device = CPU


def ray_place() -> Place:
    """The place of the Ray Train worker that this process is."""
    import ray
    from ray.train.torch import get_device

    context = ray.get_runtime_context()
    labels = context.get_node_labels() or {}
    return Place(labels.get(PROFILE_LABEL, LOCAL), context.get_node_id(), get_device())


def memory_bytes(place: Place, group: Group) -> int:
    """Memory that training may use in this process, what the process has already included. Collective.

    What the workers of one machine find free they share evenly. An accelerator belongs to one worker alone.
    """
    node = place.node or socket.gethostname()
    number = int(hashlib.sha256(node.encode()).hexdigest()[: _NODE_BITS // 4], 16)
    accelerated = place.device.type == "cuda"
    told = group.gather_numbers([number, 0 if accelerated else free_bytes(), 0 if accelerated else resident_bytes()])
    if accelerated:
        free, _ = torch.cuda.mem_get_info(place.device)
        return int(free + torch.cuda.memory_reserved(place.device))
    here = [row for row in told if row[0] == number]
    return int((min(row[1] for row in here) + sum(row[2] for row in here)) / len(here))


def used_bytes(group: Group) -> int:
    """Memory that this process uses now: resident, or the most that was allocated on its accelerator.

    What the workers of a machine map together counts for each of them in part.
    """
    if group.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(group.device))
    common = 1024 * statistic(Path("/proc/self/status"), "RssShmem:")
    return resident_bytes() - common * (group.size - 1) // group.size


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)
