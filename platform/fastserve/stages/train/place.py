"""Where a worker runs: its hardware profile, its device, and the memory that training may use there.

Ray Train's ranks do not follow the list of workers that it was given, so each rank looks for itself.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from fastserve.stages.train.group import CPU, Group

PROFILE_LABEL = "fastserve.dev/profile"
"""Label of a Ray node: the hardware profile that it is a machine of."""

LOCAL = "local"
"""Profile of a machine that carries no label."""

_CGROUP = Path("/sys/fs/cgroup")
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
    common = 1024 * _statistic(Path("/proc/self/status"), "RssShmem:")
    return resident_bytes() - common * (group.size - 1) // group.size


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def free_bytes() -> int:
    """Main memory that may still be used, the limits of this process's cgroups (v1 and v2) included."""
    free: int = psutil.virtual_memory().available
    for folder, limit, usage, reclaimable in _memory_cgroups():
        most, used = _number(folder / limit), _number(folder / usage)
        if most is not None and used is not None:
            free = min(free, most - used + _statistic(folder / "memory.stat", reclaimable))
    return max(0, free)


def _memory_cgroups() -> Iterator[tuple[Path, str, str, str]]:
    """This process's cgroups up to the root: folder, and the files of limit, usage, and what can be taken back."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = _CGROUP, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = _CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.lstrip("/")
        # Inside a container the path is the host's, and only the root is to be seen.
        for place in {folder, *(parent for parent in folder.parents if root in (parent, *parent.parents)), root}:
            yield place, *names


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < 1 << 60 else None


def _statistic(file: Path, name: str) -> int:
    try:
        for line in file.read_text().splitlines():
            key, *values = line.split()
            if key == name:
                return int(values[0])
    except (OSError, ValueError, IndexError):
        pass
    return 0
