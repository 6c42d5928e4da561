"""What this machine has: the profile `local`, discovered rather than declared."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from fastserve.plan.facts import Hardware


def local_hardware() -> Hardware:
    """Cores and memory that this process may use, cgroup limits included (cgroup v1 and v2). Accelerators are not
    counted yet."""
    return Hardware(cpus=len(os.sched_getaffinity(0)), memory_bytes=min(psutil.virtual_memory().total, _cgroup_bytes()))


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
