"""Why a RayCluster's pods do not run, in one word and a sentence each: what KubeRay, the scheduler and a kubelet say.

Ray itself only knows that nobody comes. What stands in a pod was written by others (an image's name, a container's last
words), so texts are taken in bounded length and without control characters, and the one word comes from the table here.

A volume that cannot be mounted and a sandbox that cannot be made stand in Events alone. An API server finds the Events
of one pod by reading all of the namespace, so only a pod that is stuck is asked about, and not at every look.
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastserve.cluster.kube.api import EVENTS, PODS, RAY_CLUSTERS, KubeApi, Object
from fastserve.errors import ClusterFailed

log = logging.getLogger(__name__)

CLUSTER_LABEL = "ray.io/cluster"
NODE_LABEL = "ray.io/node-type"
GROUP_LABEL = "ray.io/group"
MOST_CHARACTERS = 300
"""Of what others say in a message of ours."""

RECENT_SECONDS = 600.0
"""A container that ended longer ago is history: another one runs in its place."""

EVENT_SECONDS = 300.0
"""So is an Event: a kubelet says what still holds every two minutes."""

STUCK_SECONDS = 20.0
"""A pod that has a node for so long, and of which nothing has begun, is stuck: Events may say on what."""

ASK_SECONDS = 15.0
"""Between two questions for the Events of the same pod."""

MOST_ASKED = 4
"""Stuck pods of one group that are asked about: those of a group wait for the same."""


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
    """What said it: pod, scheduler, waiting, ended, event, cluster."""

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


_MOUNT = "FailedMount|FailedAttachVolume|FailedMapVolume"

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
        "SecretMissing",
        "event",
        _MOUNT,
        r"(?:secret|configmap) \S+ not found|references non-existent (?:secret|config) key",
        "make what it names in the same namespace; the pod goes on by itself",
    ),
    _Cause(
        "MountFailed",
        "event",
        _MOUNT,
        "",
        "look whether the volume's storage answers from that node and no other node holds it; "
        "`kubectl get pvc,pv,volumeattachments` shows who has it",
    ),
    _Cause(
        "SandboxFailed",
        "event",
        "FailedCreatePodSandBox|NetworkNotReady",
        "",
        "the node's network plugin or container runtime fails: repair it, or `kubectl cordon` the node and delete the "
        "pod",
    ),
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
        self._told: dict[str, tuple[float, Sequence[Object]]] = {}
        """Events of pods that are stuck, by the pod's uid, and when they were asked for."""

    def troubles(self) -> tuple[PodTrouble, ...]:
        """What is wrong, that of heads first. Raises ClusterFailed when the API server does not answer."""
        pods, now = self._api.list(PODS, self._namespace, labels=CLUSTER_LABEL), self._now()
        told = self._events([pod for pod in pods if is_stuck(pod, now)], now)
        found = [
            trouble
            for pod in pods
            if (trouble := trouble_of_pod(pod, now, told.get(pod["metadata"]["uid"], ()))) is not None
        ]
        clusters = self._api.list(RAY_CLUSTERS, self._namespace)
        found += [trouble for cluster in clusters if (trouble := trouble_of_cluster(cluster)) is not None]
        return tuple(sorted(found, key=lambda item: (item.group is not None, item.cluster, str(item.group))))

    def _events(self, stuck: Sequence[Object], now: float) -> Mapping[str, Sequence[Object]]:
        """The warnings about some of the pods that are stuck, by uid."""
        asked: Counter[tuple[Any, Any]] = Counter()
        told: dict[str, tuple[float, Sequence[Object]]] = {}
        for pod in stuck:
            uid, labels = pod["metadata"]["uid"], pod["metadata"].get("labels") or {}
            group = (labels.get(CLUSTER_LABEL), labels.get(GROUP_LABEL))
            asked[group] += 1
            if asked[group] > MOST_ASKED:
                continue
            told[uid] = self._told.get(uid, (-math.inf, ()))
            if now >= told[uid][0] + ASK_SECONDS:
                told[uid] = (now, self._warnings(uid))
        self._told = told
        return {uid: events for uid, (_, events) in told.items()}

    def _warnings(self, uid: str) -> Sequence[Object]:
        try:
            return self._api.list(EVENTS, self._namespace, fields=f"involvedObject.uid={uid},type=Warning")
        except ClusterFailed as error:
            # Such as an older chart's rights: what the pods say themselves is told without them.
            log.warning("the Events of pod %s are not known: %s", uid, error)
            return ()


def is_stuck(pod: Mapping[str, Any], now: float) -> bool:
    """Whether a pod has had a node for a while and nothing of it has begun. now: Unix seconds."""
    status = pod.get("status") or {}
    if status.get("phase") != "Pending" or pod["metadata"].get("deletionTimestamp"):
        return False
    waiting = [((item.get("state") or {}).get("waiting") or {}).get("reason") for item in _containers(status)]
    if any(reason not in ("ContainerCreating", "PodInitializing") for reason in waiting):
        return False
    conditions = {item.get("type"): item for item in status.get("conditions") or ()}
    if conditions.get("PodReadyToStartContainers", {}).get("status") == "True":
        return False  # its volumes and its sandbox are there: an image is on its way
    scheduled = conditions.get("PodScheduled", {})
    since = _unix(scheduled.get("lastTransitionTime"))
    return scheduled.get("status") == "True" and since is not None and now >= since + STUCK_SECONDS


def trouble_of_pod(pod: Mapping[str, Any], now: float, events: Iterable[Mapping[str, Any]] = ()) -> PodTrouble | None:
    """What is wrong with a pod; None while it runs, or is about to.

    now: Unix seconds. events: warnings about it, where it is stuck; the newest count first.
    """
    metadata, status = pod.get("metadata") or {}, pod.get("status") or {}
    labels = metadata.get("labels") or {}
    if metadata.get("deletionTimestamp") or status.get("phase") == "Succeeded":
        return None
    cause = cause_of([*_seen(status, now), *_seen_in(events, now)])
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
    for container in _containers(status):
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


def _seen_in(events: Iterable[Mapping[str, Any]], now: float) -> Iterator[_Seen]:
    """What Events say, the newest first; one that was last seen long ago is history."""
    timed = [(_last_seen(event) or 0.0, event) for event in events]
    for at, event in sorted(timed, key=lambda item: item[0], reverse=True):
        if now < at + EVENT_SECONDS:
            yield _Seen("event", _clean(event.get("reason")), _clean(event.get("message")))


def _last_seen(event: Mapping[str, Any]) -> float | None:
    """Unix seconds. Kubelets write lastTimestamp; who uses the newer kind of Events a series, or a time alone."""
    series, metadata = event.get("series") or {}, event.get("metadata") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    told = [at for time in (*times, metadata.get("creationTimestamp")) if (at := _unix(time)) is not None]
    return max(told, default=None)


def _containers(status: Mapping[str, Any]) -> list[Object]:
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _is_recent(at: object, now: float) -> bool:
    ended = _unix(at)
    return ended is not None and now < ended + RECENT_SECONDS


def _unix(at: object) -> float | None:
    """Unix seconds of a time in RFC 3339; None for what is none."""
    try:
        return datetime.fromisoformat(str(at)).timestamp()
    except (ValueError, OverflowError):
        return None


def _clean(text: object) -> str:
    """What somebody else wrote, on one line and not too long."""
    words = "" if text is None else str(text)[: 4 * MOST_CHARACTERS]
    plain = "".join(" " if unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp") else letter for letter in words)
    short = " ".join(plain.split())
    return short if len(short) <= MOST_CHARACTERS else f"{short[: MOST_CHARACTERS - 1]}…"
