"""Why a RayCluster's pods do not run, in one word and a sentence each: what KubeRay, the scheduler and a kubelet say.

Ray itself only knows that nobody comes. What stands in a pod was written by others (an image's name, a container's last
words), so texts are taken in bounded length and without control characters, and the one word comes from the table here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastserve.cluster.kube.api import PODS, RAY_CLUSTERS, KubeApi, Object

CLUSTER_LABEL = "ray.io/cluster"
NODE_LABEL = "ray.io/node-type"
GROUP_LABEL = "ray.io/group"
MOST_CHARACTERS = 300
"""Of what others say in a message of ours."""

RECENT_SECONDS = 600.0
"""A container that ended longer ago is history: another one runs in its place."""


@dataclass(frozen=True, slots=True)
class PodTrouble:
    """Why a pod of a RayCluster does not run."""

    cluster: str
    """Name of the RayCluster."""

    group: str | None
    """Name of its group of workers, which is the profile's; None for the head, and for a whole cluster."""

    reason: str
    message: str

    def concerns(self, profiles: Iterable[str]) -> bool:
        """Whether work on these profiles waits for it: a head is needed by all work."""
        return self.group is None or self.group in profiles


@dataclass(frozen=True, slots=True)
class _Seen:
    """One thing that was seen of a pod."""

    kind: str
    """What said it: pod, scheduler, waiting, ended, cluster."""

    word: str
    """Its own word, such as ImagePullBackOff."""

    said: str


@dataclass(frozen=True, slots=True)
class _Cause:
    """A line of the table: a word of ours, what tells it, and what to do."""

    reason: str
    kind: str
    word: str
    """Pattern of the whole word."""

    said: str
    """Pattern that stands somewhere in the text."""

    advice: str


CAUSES = (
    _Cause("Evicted", "pod", "Evicted", "", "give the machine more (`ray.profiles[].memory`), or free its node"),
    _Cause(
        "PendingStorage",
        "scheduler",
        "Unschedulable",
        r"persistentvolumeclaim|volume node affinity|unbound.*volume",
        "`kubectl get pvc` shows the claim; it needs a storage class that makes a volume, or a volume of its name",
    ),
    _Cause(
        "Unschedulable",
        "scheduler",
        ".*",
        "",
        "add such a machine, ask for less (`ray.profiles`), or name another profile in the manifest",
    ),
    _Cause(
        "ImagePull",
        "waiting",
        r"ErrImagePull|ImagePullBackOff|InvalidImageName|ErrImageNeverPull|ImageInspectError|RegistryUnavailable",
        "",
        "check `ray.image`, and `image.pullSecrets` for a registry that asks who you are",
    ),
    _Cause(
        "SecretMissing",
        "waiting",
        "CreateContainerConfigError",
        r"secret|couldn't find key",
        "make that Secret in the same namespace; the pod goes on by itself",
    ),
    _Cause("OutOfMemory", "ended", "OOMKilled", "", "raise `ray.head.resources`, or the profile's `memory`"),
    _Cause(
        "CrashLoop",
        "waiting",
        "CrashLoopBackOff|RunContainerError|CreateContainerError|CreateContainerConfigError",
        "",
        "`kubectl logs --previous` of the pod has its last words",
    ),
    _Cause("CrashLoop", "ended", ".*", "", "`kubectl logs --previous` of the pod has its last words"),
    _Cause(
        "QuotaExceeded",
        "cluster",
        ".*",
        "exceeded quota",
        "raise the namespace's ResourceQuota, or lower `max` of a profile",
    ),
    _Cause("PodRefused", "cluster", ".*", "", "`kubectl describe raycluster` says who refused the pod"),
)


def cause_of(seen: Sequence[_Seen]) -> tuple[str, str] | None:
    """Reason and sentence of the first line of the table that something seen fits; None when nothing does."""
    for cause in CAUSES:
        for item in seen:
            fits = item.kind == cause.kind and re.fullmatch(cause.word, item.word) is not None
            if fits and re.search(cause.said, item.said, re.IGNORECASE) is not None:
                told = f"{item.word}: {item.said}" if item.said else item.word
                return cause.reason, f"{told.rstrip('. ')}; {cause.advice}"
    return None


class Pods:
    """The pods of one namespace's RayClusters, as far as something is wrong with them."""

    def __init__(self, api: KubeApi, namespace: str, now: Callable[[], float]) -> None:
        """now: Unix seconds."""
        self._api = api
        self._namespace = namespace
        self._now = now

    def troubles(self) -> tuple[PodTrouble, ...]:
        """What is wrong, that of heads first. Raises ClusterFailed when the API server does not answer."""
        pods = self._api.list(PODS, self._namespace, labels=CLUSTER_LABEL)
        found = [trouble for pod in pods if (trouble := trouble_of_pod(pod, self._now())) is not None]
        clusters = self._api.list(RAY_CLUSTERS, self._namespace)
        found += [trouble for cluster in clusters if (trouble := trouble_of_cluster(cluster)) is not None]
        return tuple(sorted(found, key=lambda item: (item.group is not None, item.cluster, str(item.group))))


def trouble_of_pod(pod: Mapping[str, Any], now: float) -> PodTrouble | None:
    """What is wrong with a pod; None while it runs, or is about to. now: Unix seconds."""
    metadata, status = pod.get("metadata") or {}, pod.get("status") or {}
    labels = metadata.get("labels") or {}
    if metadata.get("deletionTimestamp") or status.get("phase") == "Succeeded":
        return None
    cause = cause_of(list(_seen(status, now)))
    if cause is None:
        return None
    group = None if labels.get(NODE_LABEL) == "head" else _clean(labels.get(GROUP_LABEL))
    whose = "the head" if group is None else f"profile {group}"
    reason, told = cause
    where = f"pod {_clean(metadata.get('name'))} of {whose}"
    return PodTrouble(_clean(labels.get(CLUSTER_LABEL)), group, reason, f"{where}: {told}")


def trouble_of_cluster(cluster: Mapping[str, Any]) -> PodTrouble | None:
    """Why KubeRay cannot make a RayCluster's pods; None when it can."""
    name = _clean((cluster.get("metadata") or {}).get("name"))
    conditions = (cluster.get("status") or {}).get("conditions") or []
    failed = [item for item in conditions if item.get("type") == "ReplicaFailure" and item.get("status") == "True"]
    cause = cause_of([_Seen("cluster", _clean(item.get("reason")), _clean(item.get("message"))) for item in failed])
    return None if cause is None else PodTrouble(name, None, cause[0], f"RayCluster {name}: {cause[1]}")


def _seen(status: Mapping[str, Any], now: float) -> Iterator[_Seen]:
    if status.get("phase") == "Failed" and status.get("reason"):
        yield _Seen("pod", _clean(status["reason"]), _clean(status.get("message")))
    for item in status.get("conditions") or ():
        if item.get("type") == "PodScheduled" and item.get("status") == "False":
            yield _Seen("scheduler", _clean(item.get("reason")), _clean(item.get("message")))
    containers: list[Object] = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    for container in containers:
        state, last = container.get("state") or {}, container.get("lastState") or {}
        for ended in (state.get("terminated"), last.get("terminated")):
            if not ended or ended.get("exitCode") == 0 or not _is_recent(ended.get("finishedAt"), now):
                continue
            # One that ended once and runs again matters only where memory was the cause: what ran in it is gone.
            if ended.get("reason") == "OOMKilled" or "running" not in state:
                said = ended.get("message") or f"exit code {ended.get('exitCode')}"
                yield _Seen("ended", _clean(ended.get("reason") or "Error"), _clean(said))
        waiting = state.get("waiting")
        if waiting:
            yield _Seen("waiting", _clean(waiting.get("reason")), _clean(waiting.get("message")))


def _is_recent(at: object, now: float) -> bool:
    try:
        return now < datetime.fromisoformat(str(at)).timestamp() + RECENT_SECONDS
    except (ValueError, OverflowError):
        return False


def _clean(text: object) -> str:
    """What somebody else wrote, on one line and not too long."""
    words = "" if text is None else str(text)[: 4 * MOST_CHARACTERS]
    plain = "".join(" " if unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp") else letter for letter in words)
    short = " ".join(plain.split())
    return short if len(short) <= MOST_CHARACTERS else f"{short[: MOST_CHARACTERS - 1]}…"
