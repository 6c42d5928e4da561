"""Which machines of the Ray cluster a run's workers go to, and what they compute with."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastserve.errors import InsufficientHardware
from fastserve.plan.brought import Kind
from fastserve.spec.train import Train
from fastserve.stages.train.place import LOCAL, PROFILE_LABEL
from fastserve.stages.train.size import Size


@dataclass(frozen=True, slots=True)
class Machines:
    """The machines that workers may go to, as Ray knows them, and kinds of which some are still to come."""

    count: int
    accelerated: bool
    """Whether every worker gets an accelerator."""

    smallest: Kind | None = None
    """Of the kinds that are brought for these workers the one with the fewest CPUs; None where none are."""

    @property
    def one(self) -> bool:
        """Whether all workers share a machine."""
        return self.count <= 1


def machines(
    train: Train, nodes: Sequence[Mapping[str, Any]], kinds: Mapping[str, Kind] = MappingProxyType({})
) -> Machines:
    """What of `ray.nodes()` is there for the profiles of `train.workers`, or is brought for them.

    kinds: machines by profile that the cluster brings when a worker asks for one. Where `local` is one of them it is a
    profile like others; elsewhere it means every machine. Beside such kinds a node without CPUs is a mere head.

    Raises InsufficientHardware when no machine carries the label of a profile and none is brought, unless the run is
    elastic: then Ray waits for it.
    """
    alive = [node for node in nodes if node.get("Alive")]
    profiles = {workers.profile for workers in train.workers}
    found = {profile: [node for node in alive if _is_of(node, profile, kinds)] for profile in profiles}
    missing = sorted(profile for profile, those in found.items() if not those and profile not in kinds)
    if missing and (train.elastic is None or len(missing) == len(profiles)):
        known = sorted({_profile(node) for node in alive} | set(kinds))
        raise InsufficientHardware(
            f"no machine of the Ray cluster is of profile {missing[0]} (there are: {', '.join(known) or 'none'}); "
            f"start its nodes with the label {PROFILE_LABEL}={missing[0]}, or change spec.train.workers"
        )
    used = {str(node.get("NodeID", number)): node for number, node in enumerate(alive) if _profile(node) in profiles}
    if LOCAL in profiles and LOCAL not in kinds:
        used = {str(node.get("NodeID", number)): node for number, node in enumerate(alive)}
    used = {name: node for name, node in used.items() if not kinds or _places(node.get("Resources", {}), False)}
    to_come = [kinds[profile] for profile in profiles if profile in kinds]
    amounts = [node.get("Resources", {}).get("GPU", 0) for node in used.values()]
    amounts += [kind.accelerators for kind in to_come]
    accelerated = bool(amounts) and all(amount >= 1 for amount in amounts)
    return Machines(len(used), accelerated, min(to_come, key=lambda kind: kind.cpus, default=None))


def usable_places(
    listed: Mapping[str, int],
    held: Mapping[str, int],
    nodes: Sequence[Mapping[str, Any]],
    free: Mapping[str, Mapping[str, float]],
    accelerated: bool,
    kinds: Collection[str] = (),
) -> dict[str, int] | None:
    """Places for workers by profile, those of this run included; None where `local` stands beside other profiles, so
    that one machine is of several.

    listed: workers that the manifest lists by profile. held: workers of this run by profile. nodes: `ray.nodes()`.
    free: resources that nobody has taken, by node. kinds: profiles that machines are brought of. A profile on which
    nobody else is has as many places as are listed: machines that are not there may come, and Ray asks for them.
    """
    is_anywhere = LOCAL in listed and LOCAL not in kinds
    if is_anywhere and len(listed) > 1:
        return None
    found = {}
    for profile, count in listed.items():
        those = [node for node in nodes if node.get("Alive") and _is_of(node, profile, kinds)]
        there = sum(_places(node.get("Resources", {}), accelerated) for node in those)
        left = sum(_places(free.get(str(node.get("NodeID")), {}), accelerated) for node in those)
        ours = sum(held.values()) if is_anywhere else held.get(profile, 0)
        found[profile] = count if left + ours >= there else left + ours
    return found


def _places(resources: Mapping[str, float], accelerated: bool) -> int:
    """Workers that these resources are enough for."""
    return int(min(resources.get("CPU", 0), resources.get("GPU", 0) if accelerated else math.inf))


def selectors(
    train: Train, size: Size, kinds: Mapping[str, Kind] = MappingProxyType({})
) -> list[dict[str, str]] | None:
    """Label selectors, one for each worker of this size; None when any machine will do. kinds: as for `machines`.

    A run of fixed size gets exactly its workers' profiles, and so does one that leaves machines to others. An elastic
    one of its whole size gets machines of any of them: Ray takes the first so many selectors when it shrinks, and those
    might ask for the very machine that was lost.
    """
    profiles = [workers.profile for workers in train.workers for _ in range(workers.count)]
    anywhere = set() if LOCAL in kinds else {LOCAL}
    if set(profiles) == anywhere:
        return None
    if not size.whole:
        profiles = [profile for profile, count in size.workers.items() for _ in range(count)]
    if train.elastic is None or not size.whole:
        return [{} if profile in anywhere else {PROFILE_LABEL: profile} for profile in profiles]
    if anywhere & set(profiles):
        return None
    names = sorted(set(profiles))
    wanted = names[0] if len(names) == 1 else f"in({','.join(names)})"
    return [{PROFILE_LABEL: wanted} for _ in profiles]


def worker_threads(workers: int, nodes: int, kind: Kind | None = None) -> int:
    """Threads of each worker, so that the workers of one machine together have one thread a core.

    Cores are this machine's real ones: the CPUs that Ray counts are logical, and more threads than cores would spin
    against each other (measured with 32 on 2 cores: a third of the tokens/s). kind: of the machines that are brought
    for the workers, where any are; their CPUs are real, and Ray puts as many workers on one as there is room for.
    """
    if kind is not None:
        together = min(workers, kind.cpus, kind.accelerators or math.inf)
        return max(1, int(kind.cpus // max(1, together)))
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


def _is_of(node: Mapping[str, Any], profile: str, kinds: Collection[str]) -> bool:
    """Whether a worker of this profile may go to a node."""
    return (profile == LOCAL and LOCAL not in kinds) or profile == _profile(node)
