"""The home of a cluster: the same small values as a laptop's folder, kept in Kubernetes objects.

    Model                     what is asked for
    ConfigMap <model>-state   what was accepted, and what a laptop keeps in `models/<model>/`: the manifest as accepted
                              (`model.json`), digests of the sources, weights, pin, revisions, the applications that
                              Serve must have (`serving__<app>.json`), forgiven attempts

A file of the folder is a key of the ConfigMap, with `__` for a slash, and replaced whole. Every write names the
resourceVersion of the look that it follows from, so a second writer is never overwritten: the write fails, and the
next look decides again. The ConfigMap belongs to its Model and goes with it. What can be found out again (facts of
sources by digest) stays in a scratch folder and may be lost at any time.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastserve.cluster.home import Home
from fastserve.cluster.kube.api import (
    CONFIG_MAPS,
    MANAGED_BY,
    MANAGER,
    MODELS,
    KubeApi,
    Object,
    is_ours,
    owner_reference,
)
from fastserve.errors import NameConflict, StateChanged, StoreFailed
from fastserve.plan.observed import Pin
from fastserve.plan.revision import Revision
from fastserve.spec.hardware import HardwareProfileSpec
from fastserve.spec.load import dump
from fastserve.spec.model import Model

RETRY = "fastserve.dev/retry"
"""Annotation of a Model; a new value asks again for stages that have failed."""

STATES = f"{MANAGED_BY}={MANAGER},fastserve.dev/model"
"""Label selector of the ConfigMaps."""

ACCEPTED = "accepted.json"
ROLLBACK_FILE = "rollback.json"
SLASH = "__"


class KubeHome(Home):
    """The state of one namespace."""

    def __init__(self, api: KubeApi, namespace: str, scratch: Path, store_uri: str) -> None:
        """scratch: folder for what can be found out again."""
        super().__init__(scratch)
        self._api = api
        self.namespace = namespace
        self._store_uri = store_uri
        self._models: dict[str, Object] = {}
        self._states: dict[str, Object] = {}
        self._read_ones: dict[str, tuple[str, Model]] = {}
        self._up: dict[str, tuple[Revision, float]] | None = None
        self.damaged: dict[str, str] = {}
        """Models of which something that is kept cannot be read by this version, and why. What is served of them stays
        as it is, and the Model object is surveyed anew."""

        self.described: dict[str, HardwareProfileSpec] = {}
        """The cluster's HardwareProfiles, as they are now."""

    def look(self, models: Sequence[Object] | None = None) -> list[Object]:
        """Take a fresh look at the namespace; returns its Model objects. Until the next look, reads are of this one
        and of what was written since."""
        found = self._api.list(MODELS, self.namespace) if models is None else models
        self._models = {item["metadata"]["name"]: item for item in found}
        states = self._api.list(CONFIG_MAPS, self.namespace, labels=STATES)
        self._states, self._up = {}, None
        self.damaged = {}
        for state in states:
            model = state["metadata"]["labels"]["fastserve.dev/model"]
            owner = self._models.get(model)
            if owner is not None and is_ours(state, owner["metadata"]["uid"]):
                self._states[model] = state
        for name in self._states:
            self.model(name)
        for name in self._read_ones.keys() - self._states.keys():
            del self._read_ones[name]
        return list(found)

    @property
    def store_uri(self) -> str:
        """Where artifacts are kept: what the operator was started with."""
        return self._store_uri

    def object_of(self, name: str) -> Object:
        """The Model object, as the last look saw it."""
        return self._models[name]

    def profiles(self, name: str) -> dict[str, HardwareProfileSpec]:
        """The cluster's HardwareProfiles: a model is not applied with some of its own."""
        return dict(self.described)

    # -- what was accepted -----------------------------------------------------------------------------------------

    def model(self, name: str) -> Model | None:
        """What is wanted of a model; None when nothing is, or nothing that this version can read. The same text is read
        once."""
        text = self._text_of(name, "model.json")
        if text is None:
            return None
        known = self._read_ones.get(name)
        if known is None or known[0] != text:
            try:
                known = (text, Model.model_validate(self._read(name, "model.json")))
            except (ValueError, StoreFailed) as error:  # written by another version, or by hand
                self._read_ones.pop(name, None)
                self.damaged[name] = str(error)
                return None
            self._read_ones[name] = known
        self.damaged.pop(name, None)
        return known[1]

    def model_names(self) -> list[str]:
        """Models that are wanted now."""
        return sorted(name for name, state in self._states.items() if "model.json" in (state.get("data") or {}))

    def ended(self, name: str) -> Model | None:
        """What was wanted last of a model that is wanted no longer; None when it is wanted, never was, or was wanted in
        words that this version cannot read."""
        try:
            return super().ended(name)
        except (ValueError, StoreFailed):
            return None

    # -- what the serving cluster must have ------------------------------------------------------------------------

    def serving(self) -> dict[str, Revision]:
        """Revisions that must be up, by name. They are read once a look, however many models ask."""
        return {name: revision for name, (revision, _) in self._served().items()}

    def serving_since(self) -> dict[str, float]:
        """Unix seconds at which each revision was asked to be up, by its name."""
        return {name: since for name, (_, since) in self._served().items()}

    def _served(self) -> dict[str, tuple[Revision, float]]:
        if self._up is None:
            self._up = {}
            for model, state in self._states.items():
                for key in state.get("data") or {}:
                    if not key.startswith(f"serving{SLASH}"):
                        continue
                    try:
                        value = self._read(model, key)
                        revision = (Revision.from_json(value), float(value.get("since") or 0.0))
                    except (ValueError, KeyError, TypeError, AttributeError, StoreFailed) as error:
                        self.damaged[model] = f"{key}: {error}"
                        continue
                    self._up[key.removeprefix(f"serving{SLASH}").removesuffix(".json")] = revision
        return self._up

    def version(self, name: str) -> str:
        """Changes whenever anything that is kept of a model does."""
        state = self._states.get(name)
        return "" if state is None else str(state["metadata"]["resourceVersion"])

    def is_accepted(self, found: Mapping[str, Any]) -> bool:
        """Whether the Model object, as it is now, is the one that was accepted."""
        return bool(self.read_json(f"models/{found['metadata']['name']}/{ACCEPTED}") == asking(found))

    def is_retried(self, found: Mapping[str, Any]) -> bool:
        """Whether the annotation that asks again has another value than when the Model was accepted. Another spec alone
        is no such asking: it may only scale."""
        accepted = self.read_json(f"models/{found['metadata']['name']}/{ACCEPTED}")
        return accepted is not None and accepted["retry"] != asking(found)["retry"]

    def want(self, model: Model, resolved: Mapping[str, str], forgiven: Mapping[str, int]) -> None:
        """Accept a manifest, in one write. Raises NameConflict, StateChanged."""
        self._write(
            model.name,
            {
                "model.json": dump(model),
                "resolved.json": dict(resolved),
                "forgiven.json": dict(forgiven),
                ACCEPTED: asking(self._models[model.name]),
            },
        )

    # -- a rollback that was asked for -----------------------------------------------------------------------------

    def rollback(self, name: str) -> dict[str, str] | None:
        """What came of the last rollback that somebody asked for; None when nobody has."""
        value = self.read_json(f"models/{name}/{ROLLBACK_FILE}")
        return None if value is None else dict(value)

    def set_rollback(self, name: str, told: Mapping[str, str], pin: Pin | None) -> None:
        """Roll back, or end a rollback, and note that this was asked for, in one write."""
        self._write(name, {"pin.json": None if pin is None else asdict(pin), ROLLBACK_FILE: dict(told)})

    def refuse_rollback(self, name: str, told: Mapping[str, str]) -> None:
        """Note that a rollback was asked for that cannot be; what holds stays."""
        self._write(name, {ROLLBACK_FILE: dict(told)})

    # -- small files -----------------------------------------------------------------------------------------------

    def read_json(self, name: str) -> Any:
        """The value of a key; None when there is none."""
        if name.startswith("serving/"):
            return next((self._read(model, _key(name)) for model in self._states if self._has(model, name)), None)
        if name.startswith("models/"):
            _, model, rest = name.split("/", 2)
            return self._read(model, _key(rest))
        return super().read_json(name)

    def write_json(self, name: str, value: Any, mode: int = 0o600) -> None:
        """Replace a key whole. Raises NameConflict when the ConfigMap's name is taken, StateChanged when somebody
        wrote in between."""
        if name.startswith("serving/"):
            self._write(value["model"], {_key(name): value})
        elif name.startswith("models/"):
            _, model, rest = name.split("/", 2)
            self._write(model, {_key(rest): value})
        else:
            super().write_json(name, value, mode)

    def remove(self, name: str) -> None:
        """Take a key away, if it is there."""
        if name.startswith("serving/"):
            for model in [model for model in self._states if self._has(model, name)]:
                self._write(model, {_key(name): None})
        elif name.startswith("models/"):
            _, model, rest = name.split("/", 2)
            if self._read(model, _key(rest)) is not None:
                self._write(model, {_key(rest): None})
        else:
            super().remove(name)

    def listed(self, pattern: str) -> list[str]:
        """Names that fit a pattern; `*` stands for anything but a slash."""
        if not pattern.startswith(("models/", "serving/")):
            return super().listed(pattern)
        _, model, *_ = pattern.split("/")
        named = pattern.startswith("models/") and "*" not in model  # then one ConfigMap alone can have them
        states = {model: self._states.get(model) or {}} if named else self._states
        names = [name for model, state in states.items() for name in _names(model, state)]
        return sorted(
            name for name in names if name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)
        )

    def _has(self, model: str, name: str) -> bool:
        return _key(name) in (self._states[model].get("data") or {})

    def _text_of(self, model: str, key: str) -> str | None:
        state = self._states.get(model) or {}
        text = (state.get("data") or {}).get(key)
        return None if text is None else str(text)

    def _read(self, model: str, key: str) -> Any:
        text = self._text_of(model, key)
        if text is None:
            return None
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            where = f"ConfigMap {self.namespace}/{_state_name(model)}"
            raise StoreFailed(f"{where}: {key} is damaged ({error}); remove that key") from error

    def _write(self, model: str, values: Mapping[str, Any]) -> None:
        if any(key.startswith(f"serving{SLASH}") for key in values):
            self._up = None
        state = self._states.get(model)
        if state is None:
            self._states[model] = self._create(
                model, {key: value for key, value in values.items() if value is not None}
            )
            return
        data = {key: None if value is None else _text(value) for key, value in values.items()}
        have = state.get("data") or {}
        if all(have.get(key) == text for key, text in data.items()):
            return
        metadata = state["metadata"]
        self._states[model] = self._api.merge(
            CONFIG_MAPS, self.namespace, metadata["name"], {"data": data}, metadata["resourceVersion"]
        )

    def _create(self, model: str, values: Mapping[str, Any]) -> Object:
        owner = self._models.get(model)
        if owner is None:
            raise StateChanged(f"Model {model} is gone; the next look decides again")
        metadata: Object = {
            "name": _state_name(model),
            "namespace": self.namespace,
            "labels": {MANAGED_BY: MANAGER, "fastserve.dev/model": model},
            "ownerReferences": [owner_reference(MODELS, owner)],
        }
        data = {key: _text(value) for key, value in values.items()}
        try:
            return self._api.create(CONFIG_MAPS, {"metadata": metadata, "data": data})
        except StateChanged:
            there = self._api.get(CONFIG_MAPS, self.namespace, metadata["name"])
            if there is not None and is_ours(there, owner["metadata"]["uid"]):
                # Who took a label off hid it from every look.
                labels, version = {"metadata": {"labels": metadata["labels"]}}, there["metadata"]["resourceVersion"]
                self._api.merge(CONFIG_MAPS, self.namespace, metadata["name"], labels, version)
                raise
            if there is None:
                raise
            raise NameConflict(
                f"the ConfigMap {metadata['name']} is there and was not made for this Model; it is left alone: "
                "rename or remove it, or give the Model another name"
            ) from None


def asking(found: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one asking for a Model from the next."""
    metadata = found["metadata"]
    return {
        "uid": metadata["uid"],
        "generation": metadata["generation"],
        "retry": (metadata.get("annotations") or {}).get(RETRY, ""),
    }


def _state_name(model: str) -> str:
    return f"{model}-state"


def _key(name: str) -> str:
    """A file's name as a key of a ConfigMap, which takes no slash."""
    return name.replace("/", SLASH)


def _names(model: str, state: Object) -> list[str]:
    """The files that a ConfigMap's keys stand for."""
    files = [key.replace(SLASH, "/") for key in state.get("data") or {}]
    return [file if file.startswith("serving/") else f"models/{model}/{file}" for file in files]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
