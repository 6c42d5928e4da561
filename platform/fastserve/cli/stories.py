"""Models in sentences and tables: the same words for a laptop's models and for a cluster's.

A story is what `cluster.status.status_of` tells of one model, with its `stage`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastserve.cli import render, training
from fastserve.errors import UsageInvalid

WATCH_SECONDS = 2.0


def why(found: Mapping[str, Any]) -> None:
    """Why a model is as it is: the moves that are due, each with its reason."""
    for because in found["why"]:
        render.answer(because)
    if found["rollout"] is not None:
        render.answer(found["rollout"]["message"])
    for live in found["revisions"]:
        for sentence in _places(live):
            render.answer(f"revision {live['digest'][:8]}{sentence}")
    for limit in (found["gate"] or {}).get("limits", []):
        render.answer(f"gate: {limit['sentence']}")
    for stage, state in found["stages"].items():
        if stage == "train" and (size := training.size_of(training.metrics_of(state))):
            render.answer(f"train: {size}")
        if state.get("message"):
            render.answer(f"{stage}: attempt {state.get('attempt', '-')} {state['state']}: {state['message']}")


def status(look: Callable[[], list[dict[str, Any]]], name: str | None, watch: bool, as_json: bool) -> None:
    """One line a model, or everything about the one that is named; a loss curve, where a story has one.

    look: tells the stories; of one model where it is named. watch: again and again, until Ctrl-C.
    """
    while True:
        found = look()
        if as_json:
            render.as_json(found[0] if name else found)
        elif name:
            details(found[0])
            if "curve" in found[0]:
                render.curve(found[0]["curve"], name)
        else:
            lines(found)
            if not found:
                render.say("No model is here yet; `fastserve up FILE` brings one up.")
        if not watch:
            return
        time.sleep(WATCH_SECONDS)


def require_name_to_plot(name: str | None) -> None:
    """Raise UsageInvalid when no model is named."""
    if name is None:
        raise UsageInvalid("--plot draws the loss of one model; name it, as in `fastserve status NAME --plot`")


def lines(found: Sequence[Mapping[str, Any]]) -> None:
    """One line a model."""
    rows = []
    for item in found:
        condition = item["conditions"][0]
        serving = [live for live in item["revisions"] if live["weight"] > 0]
        rows.append(
            [
                item["name"],
                item["stage"],
                condition["status"],
                sum(live["replicas"] for live in serving),
                serving[0]["digest"][:8] if serving else "-",
                item["url"] or "-",
                condition["reason"],
            ]
        )
    render.table(["NAME", "STAGE", "READY", "REPLICAS", "REVISION", "URL", "REASON"], rows)


def details(item: Mapping[str, Any]) -> None:
    """Everything about one model."""
    lines([item])
    rows = []
    for stage, state in item["stages"].items():
        progress = state.get("progress") or {}
        done = f"{100 * progress['done'] / (progress['total'] or 1):.0f}%" if progress else ""
        rows.append(
            [stage, state["state"], done, state.get("attempt", ""), (state["key"] or "")[:12], state.get("message", "")]
        )
    render.table(["STAGE", "STATE", "DONE", "ATTEMPT", "KEY", "MESSAGE"], rows)
    _training(training.metrics_of(item["stages"].get("train") or {}))
    _adapters(item["adapters"])
    for live in item["revisions"]:
        share = f"{live['weight']}% of traffic, {live['replicas']} replicas"
        render.answer(f"revision {live['digest'][:8]}: {live['state']}, {share} {live['message']}".rstrip())
        for sentence in _places(live):
            render.answer(sentence)
    if item["rollout"] is not None:
        render.answer(item["rollout"]["message"])
    for because in item["why"]:
        render.answer(because)


def _adapters(found: Sequence[Mapping[str, Any]]) -> None:
    """Each adapter, and whether requests for it are answered."""
    if found:
        rows = [
            [item["name"], item["state"], item.get("rank", ""), item.get("digest", "")[:8], item.get("message", "")]
            for item in found
        ]
        render.table(["ADAPTER", "STATE", "RANK", "DIGEST", "MESSAGE"], rows)


def _places(live: Mapping[str, Any]) -> list[str]:
    """Each place of a revision, and the last decision on how many replicas it has."""
    found = []
    for place in live["places"]:
        head = f"  {place['profile']}: {place['state']}, {place['replicas']} of {place['wanted']} replicas"
        bounds = f", {place['min']} to {place['max']} allowed" if "min" in place else ""
        why = place.get("decided") or place.get("because") or ""
        found.append(f"{head}{bounds}{': ' if why else ''}{why}")
    return found


def _training(metrics: Mapping[str, Any]) -> None:
    """How the workers of a training run share it, and how it goes."""
    workers = training.worker_rows(metrics)
    if workers:
        render.table(training.WORKER_COLUMNS, workers, title="Workers")
    for sentence in training.sentences(metrics):
        render.answer(sentence)
