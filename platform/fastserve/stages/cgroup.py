"""Memory that the container of this process leaves: cgroups of version 1 and 2.

A container's use counts every page of a file that it has read. The kernel takes such pages back before it refuses
anybody memory, so they are free: a machine that has copied a few models would else seem to be full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Names:
    """Files of a version of cgroups, and what its memory.stat calls pages of files."""

    limit: str
    usage: str
    pages: tuple[str, ...]


FIRST = Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
SECOND = Names("memory.max", "memory.current", ("active_file", "inactive_file"))


def free_bytes() -> int:
    """Main memory that may still be used, the limits of this process's cgroups included."""
    free: int = psutil.virtual_memory().available
    for folder, names in _own():
        most, used = _number(folder / names.limit), _number(folder / names.usage)
        if most is not None and used is not None:
            free = min(free, most - used + pages_of_files(folder, names))
    return max(0, free)


def pages_of_files(folder: Path, names: Names) -> int:
    """Bytes of a cgroup's use that the kernel can take back."""
    stat = folder / "memory.stat"
    return sum(statistic(stat, name) for name in names.pages)


def statistic(file: Path, name: str) -> int:
    """A number of a file of `name number` lines; 0 where it is not."""
    try:
        for line in file.read_text().splitlines():
            key, *values = line.split()
            if key == name:
                return int(values[0])
    except (OSError, ValueError, IndexError):
        pass
    return 0


def let_engines_reclaim() -> None:
    """Let vLLM's engines on CPUs count pages of files as free, in this process and in those that it forks.

    vLLM takes what the container uses, pages of files included, from its limit, and refuses to start when the KV cache
    is larger than the rest.
    """
    from vllm.utils import cpu_resource_utils

    cpu_resource_utils.get_cgroup_memory_usage = used_for_good(cpu_resource_utils.get_cgroup_memory_usage)


def used_for_good(usage: Callable[[], int | None]) -> Callable[[], int | None]:
    """`usage`, in bytes, less the pages of files. Wrapped twice it is as wrapped once."""
    if isinstance(usage, _ForGood):
        return usage
    return _ForGood(usage)


@dataclass(frozen=True, slots=True)
class _ForGood:
    usage: Callable[[], int | None]

    def __call__(self) -> int | None:
        used = self.usage()
        if used is None:
            return None
        root, names = (ROOT, SECOND) if (ROOT / SECOND.limit).exists() else (ROOT / "memory", FIRST)
        return max(0, used - pages_of_files(root, names))


def _own() -> Iterator[tuple[Path, Names]]:
    """This process's cgroups, up to the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = ROOT, SECOND
        elif "memory" in controllers.split(","):
            root, names = ROOT / "memory", FIRST
        else:
            continue
        folder = root / path.lstrip("/")
        # Inside a container the path is the host's, and only the root is to be seen.
        for place in {folder, *(parent for parent in folder.parents if root in (parent, *parent.parents)), root}:
            yield place, names


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < 1 << 60 else None
