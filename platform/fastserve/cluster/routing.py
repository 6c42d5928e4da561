"""The gateway's orders: which revisions a model has, with which share of its requests, and where they answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from fastserve.artifacts.store import Store
from fastserve.cluster.adapters import carriers
from fastserve.cluster.home import Home
from fastserve.errors import FastServeError
from fastserve.gateway.config import Revision, Served, Target
from fastserve.spec.model import Model

Targets = Callable[[str, str, Sequence[str]], tuple[Target, ...]]
"""From a model's name, a revision's digest and the manifest's profiles to where the revision answers."""


def routes_of(
    home: Home, store: Store, targets: Targets, unroutable: Callable[[str, FastServeError], None]
) -> dict[str, Served]:
    """The orders for every model that is to be served, and for its adapters, by name.

    unroutable: takes the name of a model whose orders cannot be found out, and why; the others go on unless it raises.
    """
    models: dict[str, Served] = {}
    for name in home.model_names():
        try:
            models |= _routes_of_one(home, store, targets, name)
        except FastServeError as error:
            unroutable(name, error)
    return models


def _routes_of_one(home: Home, store: Store, targets: Targets, name: str) -> dict[str, Served]:
    """The orders for one model and its adapters; empty when it is not to be served."""
    model = home.model(name)
    if model is None or model.spec.serve is None:
        return {}
    serve = model.spec.serve
    revisions = tuple(
        Revision(digest, weight, targets(name, digest, serve.profiles))
        for digest, weight in sorted(home.weights(name).items())
        if weight > 0
    )
    created = home.created(name)
    models = {name: Served(serve.task, created, revisions)}
    for adapter, able in _carriers(home, store, model).items():
        carrying = tuple(revision for revision in revisions if revision.digest in able)
        models[adapter] = Served(serve.task, created, carrying, parent=name)
    return models


def _carriers(home: Home, store: Store, model: Model) -> Mapping[str, Collection[str]]:
    """Digests of the revisions that can serve each adapter, by its name."""
    if model.spec.serve is None or not model.spec.serve.adapters:
        return {}
    return carriers(store, model, home.resolved(model.name), home.revisions(model.name))
