"""Where errors become conditions: the one place that catches everything.

A manifest that cannot be run, a source that is not there, a cluster that does not answer: each is something to say in
`status.conditions`, never a reason to stop looking. What is caught here belongs to one object, so no other object
notices.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastserve.cluster.kube.pods import PodTrouble
from fastserve.errors import ClusterFailed, FastServeError, ManifestInvalid, NotExecutable

MOST_CHARACTERS = 2000
"""Of a message; a status is no log."""

log = logging.getLogger("fastserve.operator")

Result = TypeVar("Result")
Condition = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trouble:
    """What went wrong with one object, as its condition says it."""

    reason: str
    message: str
    passing: bool
    """The world is to blame and may come right by itself; whether the object is ready is then not known."""


def attempted(what: Callable[[], Result]) -> Result | Trouble:
    """What the call returns, or what went wrong in it; it never raises."""
    try:
        return what()
    except FastServeError as error:
        return trouble_of(error)
    except Exception as error:
        log.exception("an error that nobody expected")
        return Trouble("InternalError", f"{type(error).__name__}: {error}; the operator's log says more", True)


def trouble_of(error: FastServeError) -> Trouble:
    """The reason is the error's own name; the message names the manifest's keys, not lines that nobody sees."""
    if isinstance(error, ManifestInvalid | NotExecutable):
        told = "; ".join(f"{item.path}: {item.message}" if item.path else item.message for item in error.problems)
        return Trouble(error.reason, told, False)
    return Trouble(error.reason, str(error), isinstance(error, ClusterFailed))


def condition(kind: str, status: str, reason: str, message: str, found: Mapping[str, Any], now: str) -> Condition:
    """One condition of an object; its time is kept while its status stays.

    found: the object as it is. now: RFC 3339.
    """
    before = (found.get("status") or {}).get("conditions") or ()
    same = next((item for item in before if item["type"] == kind and item["status"] == status), None)
    return {
        "type": kind,
        "status": status,
        "reason": cause(reason, message),
        "message": in_cluster_words(message)[:MOST_CHARACTERS],
        "observedGeneration": found["metadata"]["generation"],
        "lastTransitionTime": same["lastTransitionTime"] if same else now,
    }


def of_trouble(trouble: Trouble, found: Mapping[str, Any], now: str) -> Condition:
    """`Ready` of an object that something is wrong with."""
    return condition("Ready", "Unknown" if trouble.passing else "False", trouble.reason, trouble.message, found, now)


def of_stages(stages: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any], now: str) -> list[Condition]:
    """One condition a stage, of its name: True when it is committed, False when it is not.

    stages: as `cluster.status` tells them.
    """
    return [_of_stage(name, stage, found, now) for name, stage in stages.items()]


def _of_stage(name: str, stage: Mapping[str, Any], found: Mapping[str, Any], now: str) -> Condition:
    kind, state = name.capitalize(), stage["state"]
    if state == "committed":
        message = f"The {name} artifact {stage['digest'][:8]} is there."
        return condition(kind, "True", "Committed", message, found, now)
    if state == "running":
        return condition(kind, "False", "Running", f"Attempt {stage['attempt']} is running.", found, now)
    if state in ("failed", "lost"):
        message = f"Attempt {stage['attempt']} {state}: {stage['message'] or 'it said nothing'}"
        return condition(kind, "False", stage["reason"] or "StageFailed", message, found, now)
    return condition(kind, "False", "Waiting", "It has not begun.", found, now)


def of_serving(revisions: Sequence[Mapping[str, Any]], found: Mapping[str, Any], now: str) -> Condition:
    """`Serve`: whether a revision answers with traffic on it.

    revisions: as `cluster.status` tells them.
    """
    carrying = [item for item in revisions if item["weight"] > 0]
    answering = [item for item in carrying if item["state"] == "ready"]
    if answering:
        named = ", ".join(item["digest"][:8] for item in answering)
        return condition("Serve", "True", "Serving", f"Revision {named} answers.", found, now)
    told = next((item for item in revisions if item.get("message")), None)
    if told is not None:
        return condition("Serve", "False", told["state"].capitalize(), told["message"], found, now)
    state = revisions[0]["state"].capitalize() if revisions else "Waiting"
    return condition("Serve", "False", state, "No revision answers yet.", found, now)


_CAUSES = (
    ("OutOfMemory", re.compile(r"out ?of ?memory|\bOOM\b|running low on memory|killed by signal 9", re.IGNORECASE)),
    ("Unschedulable", re.compile(r"to be scheduled|cannot be (?:fulfilled|scheduled)|infeasible", re.IGNORECASE)),
    ("ImagePull", re.compile(r"ErrImagePull|ImagePullBackOff")),
)
_VAGUE = {"Lost", "StageFailed", "EngineFailed", "Failed", "Starting"}
"""Reasons that say that something failed, not what."""


def cause(reason: str, message: str) -> str:
    """The reason, or a better one where Ray or Serve says more: OutOfMemory, Unschedulable, ImagePull."""
    if reason in _VAGUE:
        return next((name for name, pattern in _CAUSES if pattern.search(message)), reason)
    return reason


_PATIENT = {*_VAGUE, "Running", "Waiting", "Working", "ClusterFailed"}
"""Reasons that say that something is not there yet, not why."""


def lifted(told: Condition, pod: PodTrouble | None) -> Condition:
    """A condition with what a pod says, where it would only say that something is not there yet."""
    if pod is None or told["status"] == "True" or told["reason"] not in _PATIENT:
        return told
    return {**told, "reason": pod.reason, "message": pod.message[:MOST_CHARACTERS]}


_ADVICE = (
    (
        re.compile(r"refuses this home's token \(403\): it belongs to another home.*"),
        "refuses the token (403): its Secret was changed since the head's pod began; put the old token back, or delete "
        "the RayCluster, and another one is made",
    ),
    (re.compile(r"`fastserve up` tries again"), "a new value of the annotation fastserve.dev/retry tries again"),
    (re.compile(r"[;,:]? (?:try again, or )?(?:and )?run `fastserve [^;.]*"), ""),
    (re.compile(r"`fastserve (?=(?:logs|status|why|rollback)\b)"), "`kubectl fastserve "),
)


def in_cluster_words(message: str) -> str:
    """A message without the advice that holds on a laptop alone, and with the commands of a cluster."""
    for pattern, words in _ADVICE:
        message = pattern.sub(words, message)
    return message
