"""The commands on a cluster: the same stories, with the API server in place of the home folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastserve.cli import render, stories
from fastserve.errors import ClusterFailed, UsageInvalid

if TYPE_CHECKING:
    from fastserve.cluster.kube.door import Door

LOOK_SECONDS = 1.0
ROLLBACK_SECONDS = 600.0
SILENT_SECONDS = 120.0
"""After so long without an answer it is said that no operator may be there."""


def status(door: Door, name: str | None, watch: bool, as_json: bool, plot: bool) -> None:
    """One line a model of the namespace, or everything about one of them; with `plot` its loss curve too, as far as
    the log of its training says it."""
    if plot:
        stories.require_name_to_plot(name)

    def look() -> list[dict[str, Any]]:
        found = [door.story(name)] if name else door.stories()
        return [item | {"curve": _curve(door, item)} for item in found] if plot else found

    stories.status(look, name, watch, as_json)


def _curve(door: Door, story: dict[str, Any]) -> list[Mapping[str, Any]]:
    from fastserve.cluster.kube.logs import curve_of

    return curve_of(door, story)


def why(door: Door, name: str, as_json: bool) -> None:
    """Why a model is as it is: what the operator said that is due, each with its reason."""
    found = door.story(name)
    if as_json:
        told = ("why", "conditions", "gate", "rollout", "pin", "rollback")
        render.as_json({"name": name, **{key: found[key] for key in told}})
        return
    stories.why(found)
    outcome = found["rollback"] or {}
    if outcome and "revision" not in outcome:
        render.answer(f"rollback to '{outcome['asked']}': {outcome['message']}")


def logs(door: Door, name: str, stage: str | None, tail: int) -> None:
    """The end of a stage's log, of the serving replicas' log, or of the newest stage."""
    from fastserve.cluster.kube.logs import log_of

    render.answer("\n".join(log_of(door, name, stage, tail).splitlines()[-tail:]))


def rollback(door: Door, name: str, revision: str | None, as_json: bool) -> None:
    """Ask for an earlier revision and wait until it has the traffic."""
    asked = door.ask_rollback(name, revision)
    told: dict[str, Any] | None = None
    start = time.monotonic()
    while True:
        found = door.story(name)
        outcome = found["rollback"] or {}
        if outcome.get("asked") == asked:
            if "revision" not in outcome:
                raise UsageInvalid(outcome["message"].removeprefix("The rollback is refused: "))
            if told is None:
                told = outcome
                _say(
                    f"rolling {name} back to revision {told['revision'][:8]}; it stays until the manifest changes",
                    as_json,
                )
            if _has_all(found, told["revision"]):
                break
        _require_patience(door, found, told, start)
        time.sleep(LOOK_SECONDS)
    if as_json:
        render.as_json({"name": name, "revision": told["revision"]})
    else:
        render.answer(f"{name} serves revision {told['revision'][:8]}")


def _has_all(found: dict[str, Any], digest: str) -> bool:
    return {item["digest"]: item["weight"] for item in found["revisions"] if item["weight"]} == {digest: 100}


def _require_patience(door: Door, found: dict[str, Any], told: dict[str, Any] | None, start: float) -> None:
    """Raise ClusterFailed when nothing has come of a rollback for too long; what was asked for stays asked for."""
    waited = time.monotonic() - start
    if told is None and waited > SILENT_SECONDS:
        ready = found["conditions"][0]
        raise ClusterFailed(
            f"nobody has taken the rollback up in {SILENT_SECONDS:.0f}s: {ready['message']} It stays asked for; "
            f"`{door.kubectl} annotate model {found['name']} fastserve.dev/rollback-` takes it back"
        )
    if waited > ROLLBACK_SECONDS:
        revision = (told or {}).get("revision", "")[:8]
        raise ClusterFailed(f"revision {revision} did not come up; `fastserve why {found['name']}` says why")


def retry(door: Door, name: str, as_json: bool) -> None:
    """Ask again for the stages that have failed."""
    door.ask_again(name)
    if as_json:
        render.as_json({"name": name, "asked": "again"})
    else:
        render.say(f"{name} is asked for again; `fastserve status {name} -n {door.namespace}` shows how it goes")


def down(door: Door, name: str | None, as_json: bool) -> None:
    """Delete one Model and wait until nothing of it runs. Its artifacts stay."""
    if name is None:
        raise UsageInvalid(
            "on a cluster `down` ends one model; name it. "
            f"`{door.kubectl} delete models --all` ends all models of the namespace, whoever brought them up"
        )
    door.delete(name)
    said = ""
    while (found := door.find_story(name)) is not None:
        ready = found["conditions"][0]
        if ready["reason"] == "Deleting" and ready["message"] != said:
            said = ready["message"]
            _say(f"{name}: {said}", as_json)
        time.sleep(LOOK_SECONDS)
    if as_json:
        render.as_json({"stopped": [name]})
    else:
        render.say(f"stopped: {name}")


def _say(text: str, as_json: bool) -> None:
    if not as_json:
        render.say(text)
