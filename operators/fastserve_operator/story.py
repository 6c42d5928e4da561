"""The status of a Model: the laptop's story of it, in the keys that the definition has."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastserve.cluster.kube.pods import PodTrouble
from fastserve.cluster.status import current_stage
from fastserve.plan.facts import LOCAL
from fastserve.plan.moves import Move
from fastserve.spec import status as schemas
from fastserve_operator import conditions
from fastserve_operator.conditions import Condition, Trouble


def status_of_object(
    found: Mapping[str, Any],
    story: Mapping[str, Any] | None,
    moves: Sequence[Move],
    trouble: Trouble | None,
    now: str,
    rollback: Mapping[str, str] | None = None,
    pods: Sequence[PodTrouble] = (),
    moving: str = "",
) -> dict[str, Any]:
    """The whole status of a Model object.

    found: the object as it is. story: as `cluster.status.status_of` tells it; None when nothing was accepted, or
    nothing could be seen. trouble: what is wrong with the object or with its cluster. now: RFC 3339. rollback: what
    came of the last one that was asked for by hand. pods: what is wrong with the pods of its Ray clusters.
    moving: a sentence on its way to another RayCluster (`moving_to`).
    """
    if trouble is not None and trouble.reason == "ClusterFailed":
        trouble = _of_head(trouble, pods)
    if story is None:
        kept = {} if trouble is None or not trouble.passing else dict(found.get("status") or {})
        ready = conditions.of_trouble(trouble or Trouble("Waiting", "It was not looked at yet.", True), found, now)
        others = [item for item in kept.get("conditions") or () if item["type"] != "Ready"]
        kept |= {"observedGeneration": found["metadata"]["generation"], "conditions": [ready, *others]}
        kept |= {"why": [ready["message"]], "rollback": rollback}
        return pruned(schemas.of_model(), kept)
    revisions = story["revisions"]
    serves = [item for item in revisions if item["weight"] > 0]
    told = _conditions(found, story, trouble, now, pods)
    if moving and any((item["type"], item["status"]) == ("Serve", "True") for item in told):
        told, more = [_moving(item, moving) for item in told], [moving]
    else:
        more = []  # what does not answer yet has other things to say
    value = {
        **story,
        "observedGeneration": found["metadata"]["generation"],
        "conditions": told,
        "why": [*_why(story, trouble), *more],
        "adapters": story.get("adapters") or None,
        "rollback": rollback,
        "stage": current_stage(moves),
        "revision": max(serves, key=lambda item: item["weight"])["digest"][:8] if serves else None,
        "replicas": sum(item["replicas"] for item in revisions) if found["spec"].get("serve") is not None else None,
    }
    return pruned(schemas.of_model(), value)


def moving_to(name: str, why: str, found: Mapping[str, Any], pods: Sequence[PodTrouble]) -> str:
    """What a model says that is served at one RayCluster and shall be at another.

    name: of the other one; empty when it cannot be made, and then `why` says why. pods: with what is wrong with them.
    """
    if not name:
        return f"It waits for a RayCluster as the chart and the manifest say now, which cannot be made: {why}"
    told = f"It moves to RayCluster {name} and is served where it is until it answers there"
    pod = _first([pod for pod in pods if pod.cluster == name], _serves_on(found))
    return f"{told}." if pod is None else f"{told}; that waits: {pod.message}"


def _moving(told: Condition, moving: str) -> Condition:
    """The condition `Serve` with what there is to say of a move."""
    if told["type"] != "Serve":
        return told
    return {**told, "message": f"{told['message']} {moving}"[: conditions.MOST_CHARACTERS]}


def _why(story: Mapping[str, Any], trouble: Trouble | None) -> list[str]:
    """Every reason: first what is wrong with what is asked for, then what is due with what was accepted."""
    told = [*([] if trouble is None else [trouble.message]), *story["why"]]
    return [conditions.in_cluster_words(because)[: conditions.MOST_CHARACTERS] for because in told]


def _of_head(trouble: Trouble, pods: Sequence[PodTrouble]) -> Trouble:
    """Why a head does not answer, where its pod says it."""
    pod = next((pod for pod in pods if pod.group is None), None)
    return trouble if pod is None else Trouble(pod.reason, f"{pod.message} ({trouble.message})", True)


def _conditions(
    found: Mapping[str, Any],
    story: Mapping[str, Any],
    trouble: Trouble | None,
    now: str,
    pods: Sequence[PodTrouble],
) -> list[Condition]:
    told = story["conditions"][0]
    ready = (
        conditions.condition("Ready", told["status"], told["reason"], told["message"], found, now)
        if trouble is None
        else conditions.of_trouble(trouble, found, now)
    )
    stages = conditions.of_stages(story["stages"], found, now)
    serving = [conditions.of_serving(story["revisions"], found, now)] if found["spec"].get("serve") is not None else []
    waits = {name.capitalize(): _pod_of_stage(name, stage, found, pods) for name, stage in story["stages"].items()}
    waits["Serve"] = _first(pods, _serves_on(found)) if story["revisions"] else None
    parts = [conditions.lifted(item, waits.get(item["type"])) for item in (*stages, *serving)]
    changed = [waits[part["type"]] for part, item in zip(parts, (*stages, *serving), strict=True) if part is not item]
    return [conditions.lifted(ready, changed[0] if changed else None), *parts]


def _pod_of_stage(
    name: str, stage: Mapping[str, Any], found: Mapping[str, Any], pods: Sequence[PodTrouble]
) -> PodTrouble | None:
    """What holds up an attempt that has not got on yet, or why it was lost. Only training has workers of its own."""
    if stage["state"] not in ("running", "lost", "failed"):
        return None
    gets_on = float((stage.get("progress") or {}).get("done") or 0) > 0
    return (
        None if stage["state"] == "running" and gets_on else _first(pods, _trains_on(found) if name == "train" else ())
    )


def _first(pods: Sequence[PodTrouble], profiles: Collection[str]) -> PodTrouble | None:
    return next((pod for pod in pods if pod.concerns(profiles)), None)


def _serves_on(found: Mapping[str, Any]) -> Collection[str]:
    return (found["spec"].get("serve") or {}).get("profiles") or (LOCAL,)


def _trains_on(found: Mapping[str, Any]) -> Collection[str]:
    workers = (found["spec"].get("train") or {}).get("workers") or ()
    return {str(worker.get("profile", LOCAL)) for worker in workers} or (LOCAL,)


def pruned(schema: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a value that a structural schema has room for: an API server would drop the rest, and no two looks
    would ever agree. Nulls and figures that are no numbers are left out,
    and letters that are none are replaced."""
    known, every = schema.get("properties", {}), schema.get("additionalProperties")
    other = _OPEN if schema.get("x-kubernetes-preserve-unknown-fields") else every
    below = {key: known.get(key, other) for key in value}
    kept = {_letters(str(key)): _pruned(below[key], item) for key, item in value.items() if below[key] is not None}
    return {key: item for key, item in kept.items() if item is not None}


def _pruned(schema: Mapping[str, Any], value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return _letters(value)
    if isinstance(value, Mapping):
        return pruned(schema, value)
    if isinstance(value, list | tuple):
        kept = [_pruned(schema.get("items", _OPEN), item) for item in value]
        return [item for item in kept if item is not None]
    return int(value) if schema.get("type") == "integer" and value is not None else value


def _letters(text: str) -> str:
    """Text as it comes back from the API server: half a letter, as a file's name may hold one, would be another one."""
    return text.encode(errors="replace").decode()


_OPEN: Mapping[str, Any] = {"x-kubernetes-preserve-unknown-fields": True}


def same(one: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    """Whether two statuses say the same; the order of their lists by key does not matter."""
    return other is not None and _ordered(one) == _ordered(other)


def _ordered(status: Mapping[str, Any]) -> dict[str, Any]:
    by = {"conditions": "type", "revisions": "digest", "adapters": "name"}
    return {
        key: sorted(item, key=lambda entry: entry[by[key]]) if key in by else item
        for key, item in status.items()
    }  # fmt: skip
