"""Which machines of the Ray cluster a run's workers go to, and what they compute with."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastserve.errors import InsufficientHardware
from fastserve.spec.train import Train
from fastserve.stages.train.place import LOCAL, PROFILE_LABEL
from fastserve.stages.train.size import Size


@dataclass(frozen=True, slots=True)
class Machines:
    """The machines that workers may go to, as Ray knows them."""

    count: int
    accelerated: bool
    """Whether every worker gets an accelerator."""

    @property
    def one(self) -> bool:
        """Whether all workers share a machine."""
        return self.count <= 1


def machines(train: Train, nodes: Sequence[Mapping[str, Any]]) -> Machines:
    """What of `ray.nodes()` is there for the profiles of `train.workers`.

    Raises InsufficientHardware when no machine carries the label of a profile, unless the run is elastic: then Ray
    waits for it.
    """
    alive = [node for node in nodes if node.get("Alive")]
    profiles = {workers.profile for workers in train.workers}
    found = {profile: [node for node in alive if _is_of(node, profile)] for profile in profiles}
    missing = sorted(profile for profile, those in found.items() if not those)
    if missing and (train.elastic is None or len(missing) == len(profiles)):
        known = sorted({_profile(node) for node in alive})
        raise InsufficientHardware(
            f"no machine of the Ray cluster is of profile {missing[0]} (there are: {', '.join(known) or 'none'}); "
            f"start its nodes with the label {PROFILE_LABEL}={missing[0]}, or change spec.train.workers"
        )
    used = {str(node.get("NodeID", number)): node for number, node in enumerate(alive) if _profile(node) in profiles}
    if LOCAL in profiles:
        used = {str(node.get("NodeID", number)): node for number, node in enumerate(alive)}
    accelerated = bool(used) and all(node.get("Resources", {}).get("GPU", 0) >= 1 for node in used.values())
    return Machines(len(used), accelerated)


def usable_places(
    listed: Mapping[str, int],
    held: Mapping[str, int],
    nodes: Sequence[Mapping[str, Any]],
    free: Mapping[str, Mapping[str, float]],
    accelerated: bool,
) -> dict[str, int] | None:
    """Places for workers by profile, those of this run included; None where `local` stands beside other profiles, so
    that one machine is of several.

    listed: workers that the manifest lists by profile. held: workers of this run by profile. nodes: `ray.nodes()`.
    free: resources that nobody has taken, by node. A profile on which nobody else is has as many places as are listed:
    machines that are not there may come, and Ray asks for them.
    """
    if LOCAL in listed and len(listed) > 1:
        return None
    found = {}
    for profile, count in listed.items():
        those = [node for node in nodes if node.get("Alive") and _is_of(node, profile)]
        there = sum(_places(node.get("Resources", {}), accelerated) for node in those)
        left = sum(_places(free.get(str(node.get("NodeID")), {}), accelerated) for node in those)
        ours = held.get(profile, 0) if profile != LOCAL else sum(held.values())
        found[profile] = count if left + ours >= there else left + ours
    return found


def _places(resources: Mapping[str, float], accelerated: bool) -> int:
    """Workers that these resources are enough for."""
    return int(min(resources.get("CPU", 0), resources.get("GPU", 0) if accelerated else math.inf))


def selectors(train: Train, size: Size) -> list[dict[str, str]] | None:
    """Label selectors, one for each worker of this size; None when any machine will do.

    A run of fixed size gets exactly its workers' profiles, and so does one that leaves machines to others. An elastic
    one of its whole size gets machines of any of them: Ray takes the first so many selectors when it shrinks, and those
    might ask for the very machine that was lost.
    """
    profiles = [workers.profile for workers in train.workers for _ in range(workers.count)]
    if set(profiles) == {LOCAL}:
        return None
    if not size.whole:
        profiles = [profile for profile, count in size.workers.items() for _ in range(count)]
    if train.elastic is None or not size.whole:
        return [{} if profile == LOCAL else {PROFILE_LABEL: profile} for profile in profiles]
    if LOCAL in profiles:
        return None
    names = sorted(set(profiles))
    wanted = names[0] if len(names) == 1 else f"in({','.join(names)})"
    return [{PROFILE_LABEL: wanted} for _ in profiles]


def worker_threads(workers: int, nodes: int) -> int:
    """Threads of each worker, so that the workers of one machine together have one thread a core.

    Cores are this machine's real ones: the CPUs that Ray counts are logical, and more threads than cores would spin
    against each other (measured with 32 on 2 cores: a third of the tokens/s).
    """
    return max(1, len(os.sched_getaffinity(0)) // math.ceil(workers / max(1, nodes)))


def worker_environment(threads: int, one_machine: bool) -> dict[str, str]:
    """Environment of the workers."""
    platform = str(Path(__file__).resolve().parents[3])
    environment = {
        "OMP_NUM_THREADS": str(threads),
        # Threads that spin while they wait take the cores from each other as soon as anything else wants one (measured
        # with 2 threads on 2 cores beside other work: 4 s a step, against 0.2 s when they sleep).
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # The package as this process found it, installed or not.
        "PYTHONPATH": os.pathsep.join(
            dict.fromkeys([platform, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
        ),
    }
    if one_machine:
        # Otherwise gloo asks the resolver for this machine's name, which in a container often leads nowhere.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return environment


def _profile(node: Mapping[str, Any]) -> str:
    return str((node.get("Labels") or {}).get(PROFILE_LABEL, LOCAL))


def _is_of(node: Mapping[str, Any], profile: str) -> bool:
    return profile in (LOCAL, _profile(node))
