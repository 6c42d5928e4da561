"""`fastserve up` and `fastserve plan` on a cluster: the manifest is asked for there, and followed until it is ready."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve import errors
from fastserve.cli import render
from fastserve.cli.manifests import read_as_written, require_keys_open
from fastserve.cli.screen import Screen
from fastserve.cluster.home import Home
from fastserve.cluster.survey import survey
from fastserve.errors import ClusterFailed, FastServeError, SourceNotFound, UsageInvalid
from fastserve.plan import gate as gates
from fastserve.plan.facts import LOCAL
from fastserve.plan.observed import Committed
from fastserve.plan.sheet import Sheet
from fastserve.plan.stages import Stage
from fastserve.spec.load import Manifest
from fastserve.spec.model import AccessKey, HardwareProfile, Model

if TYPE_CHECKING:
    from fastserve.cluster.kube.door import Door

LOOK_SECONDS = 1.0
AGAIN_SECONDS = 30.0
"""How long a refusal from before may still stand in the status after it was asked again."""

AWAY_SECONDS = 300.0
"""How long an API server that has answered before is waited for."""

SILENT_SECONDS = 20.0
"""After so long without a look it is said that no operator may be there."""


def up(door: Door, file: Path, *, port: int | None, store: str | None, as_json: bool) -> None:
    """Ask for the objects of a manifest and follow its Models until they are ready or refused."""
    if port is not None or store is not None:
        raise UsageInvalid(
            "--port and --store are for this machine; on a cluster the chart's values gateway and store.uri say both"
        )
    _, manifests = _read(door, file)
    order = [HardwareProfile, Model, AccessKey]
    manifests.sort(key=lambda item: order.index(type(item)))
    for item in manifests:
        door.apply(item, dry_run=True)  # whatever is refused is refused before anything is changed
    models = [item for item in manifests if isinstance(item, Model)]
    before = {item.name: door.models.find(item.name) for item in models}
    again = set()
    for item in manifests:
        applied = door.apply(item)
        if isinstance(item, Model) and _is_refused_as_it_is(before[item.name], applied):
            door.ask_again(item.name)  # asking again is trying again, as on a laptop
            again.add(item.name)
        if not as_json:
            render.say(f"{item.kind} {item.metadata.name} is asked for in namespace {door.namespace}")
    if models:
        Follow(door, models, again, as_json).to_the_end()
    elif as_json:
        render.as_json([{"kind": item.kind, "name": item.metadata.name} for item in manifests])


def plan(door: Door, file: Path, as_json: bool) -> None:
    """Show what `up` would do with each Model: the API server is asked, and the cluster's machines are planned with."""
    manifests, asked = _read(door, file)
    for item in asked:
        door.apply(item, dry_run=True)
    own = [item for item in manifests if isinstance(item, HardwareProfile)]
    names = {item.metadata.name for item in own}
    profiles = [*own, *(item for item in door.profiles() if item.metadata.name not in names)]
    there = door.there([item.metadata.name for item in profiles])
    sheets = [_sheet(door, item, profiles, there) for item in manifests if isinstance(item, Model)]
    render.sheets(sheets, as_json)
    if not as_json and LOCAL not in {item.metadata.name for item in profiles}:
        render.say("No HardwareProfile is named local, so what is planned for local is planned for this machine.")


def _read(door: Door, file: Path) -> tuple[list[Manifest], list[Manifest]]:
    """The objects with paths of this machine, for a plan, and with paths as they are written, to be asked for."""
    here, asked = read_as_written(file)
    door.require_here(asked)
    require_keys_open(asked)
    return here, asked


def _sheet(door: Door, model: Model, profiles: Sequence[HardwareProfile], there: set[str]) -> Sheet:
    """The plan of one Model, with what the cluster has made of it already."""
    found = door.models.find(model.name)
    stages = ((found or {}).get("status") or {}).get("stages") or {}
    made = {
        stage["key"]: Committed(
            Stage(name), stage["key"], stage["digest"], int(stage.get("sizeBytes") or 0), stage.get("metrics") or {}
        )
        for name, stage in stages.items()
        if stage.get("state") == "committed"
    }
    with tempfile.TemporaryDirectory(prefix="fastserve-plan-") as folder:
        home = Home(folder)
        try:
            return survey(home, home.store_uri, model, profiles, there, made).sheet
        except SourceNotFound as error:
            raise SourceNotFound(
                f"{error}; a plan reads sources from this machine. What only the cluster can read is checked there: "
                f"`fastserve up FILE -n {door.namespace}` asks for it, `fastserve why {model.name}` tells"
            ) from error


class Follow:
    """The Models of one manifest, from asked for to ready."""

    def __init__(self, door: Door, models: Sequence[Model], again: set[str], as_json: bool) -> None:
        """again: names of those that were asked for again, though nothing of them changed."""
        self._door = door
        self._models = {model.name: model for model in models}
        self._again = again
        self._json = as_json
        self._screen = Screen(quiet=as_json)
        self._since = time.monotonic()
        self._said: dict[str, str] = {}
        self._compared: set[str] = set()

    def to_the_end(self) -> None:
        """Until all are ready or refused. Raises the first refusal as the error that it stands for."""
        try:
            with self._screen:
                found = self._until_settled()
        except KeyboardInterrupt:
            names = ", ".join(self._models)
            render.say(f"\n{names} goes on without this command; `fastserve down {names}` would end it")
            raise
        if self._json:
            render.as_json(found[0] if len(found) == 1 else found)
        for story in found:
            refusal = refusal_of(story)
            if refusal is not None:
                raise refusal
        if not self._json:
            for story in found:
                self._show_ready(story)

    def _until_settled(self) -> list[dict[str, Any]]:
        found = self._stories()
        while True:
            for story in found:
                self._show(story)
            if all(self._is_settled(story) for story in found):
                return found
            time.sleep(LOOK_SECONDS)
            found = self._patiently()

    def _stories(self) -> list[dict[str, Any]]:
        return [self._door.story(name) for name in self._models]

    def _patiently(self) -> list[dict[str, Any]]:
        """The stories, also after an API server that is away for a while: what was asked for goes on without it."""
        end, said = time.monotonic() + AWAY_SECONDS, False
        while True:
            try:
                return self._stories()
            except ClusterFailed as error:
                if time.monotonic() > end:
                    raise
                if not said:
                    self._screen.say(f"{error.reason}: {error}; trying again")
                said = True
            time.sleep(LOOK_SECONDS)

    def _is_settled(self, story: Mapping[str, Any]) -> bool:
        ready = story["conditions"][0]
        if ready["reason"] == "Ready" and ready["status"] == "True":
            return True
        if refusal_of(story) is None:
            return False
        return story["name"] not in self._again or time.monotonic() > self._since + AGAIN_SECONDS

    def _show(self, story: Mapping[str, Any]) -> None:
        """Bars of its stages, and each new sentence once."""
        name, ready = story["name"], story["conditions"][0]
        self._screen.show(story)
        silent = ready["reason"] == "NotLookedAt" and time.monotonic() < self._since + SILENT_SECONDS
        told = ready["message"]
        if not silent and self._said.get(name) != told:
            self._said[name] = told
            self._screen.say(f"{name}: {told}")
        if name not in self._compared:
            self._compare(story)

    def _compare(self, story: Mapping[str, Any]) -> None:
        """The table of parent against candidate, as soon as it is measured."""
        evaluate = self._models[story["name"]].spec.evaluate
        state = story["stages"].get(Stage.EVALUATE.value) or {}
        metrics = state.get("metrics")
        if evaluate is None or self._json or state.get("state") != "committed" or not metrics:
            return
        self._compared.add(story["name"])
        render.comparison(metrics, gates.decide(metrics, evaluate.gate), console=render.err)

    def _show_ready(self, story: Mapping[str, Any]) -> None:
        name, serve = story["name"], self._models[story["name"]].spec.serve
        render.say(f"\n{name} is ready", style="bold green")
        if serve is None:
            return
        render.say(f"  URL   {story['url']}")
        if serve.task == "generate":
            render.say(f"  `fastserve chat {name} -n {self._door.namespace}` talks to it")


def refusal_of(story: Mapping[str, Any]) -> FastServeError | None:
    """The refusal that a story ends with, as the error that it stands for; None when there is none."""
    ready = story["conditions"][0]
    kind = getattr(errors, str(ready["reason"]), None)
    if ready["status"] == "Unknown" or not (isinstance(kind, type) and issubclass(kind, FastServeError)):
        return None
    message = f"{story['name']}: {ready['message']}"
    if issubclass(kind, errors.ManifestInvalid | errors.NotExecutable):
        return kind([errors.Problem("", message)])
    return kind(message)


def _is_refused_as_it_is(before: Mapping[str, Any] | None, applied: Mapping[str, Any]) -> bool:
    """Whether a Model was refused and is asked for again as it was."""
    if before is None or before["metadata"]["generation"] != applied["metadata"]["generation"]:
        return False
    conditions = (before.get("status") or {}).get("conditions") or ()
    ready = next((item for item in conditions if item["type"] == "Ready"), None)
    return ready is not None and refusal_of({"name": "", "conditions": [ready]}) is not None
