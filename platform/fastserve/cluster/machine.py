"""What this machine has: the profile `local`, discovered rather than declared."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import psutil

from fastserve.plan.facts import Hardware

_ASKING_SECONDS = 20


def local_hardware() -> Hardware:
    """Cores, memory and accelerators that this process may use, cgroup limits included (cgroup v1 and v2)."""
    kind, memories = _accelerators(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Hardware(
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=min(psutil.virtual_memory().total, _cgroup_bytes()),
        accelerators=len(memories),
        accelerator_memory_bytes=min(memories, default=0),
        accelerator_type=kind,
    )


@functools.cache
def _accelerators(visible: str | None) -> tuple[str, tuple[int, ...]]:
    """Type of the first accelerator, and bytes of each, as the driver's own tool tells them; asked once a process.

    visible: CUDA_VISIBLE_DEVICES, where it is set; what it hides is not counted.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "", ()
    command = [tool, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_ASKING_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "", ()  # a tool without a driver: the machine has none that can be used
    return listed(told, visible)


def listed(told: str, visible: str | None) -> tuple[str, tuple[int, ...]]:
    """Type of the first accelerator, and bytes of each.

    told: lines of `index, uuid, name, MiB`. visible: indices or the beginnings of uuids, with commas; None for all.
    """
    rows = [[field.strip() for field in line.split(",")] for line in told.splitlines()]
    rows = [row for row in rows if len(row) == 4 and row[3].isdigit()]
    if visible is not None:
        wanted = [name.strip() for name in visible.split(",") if name.strip()]
        chosen = [[row for row in rows if row[0] == name or row[1].startswith(name)] for name in wanted]
        rows = [match[0] for match in chosen if match]
    return (rows[0][2] if rows else ""), tuple(int(row[3]) * 2**20 for row in rows)


def _cgroup_bytes() -> int:
    """The memory limit of this process's own cgroup; a number beyond any machine when there is none."""
    unlimited = 1 << 62
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (Path("/sys/fs/cgroup") / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(int(text), unlimited)
    return unlimited
