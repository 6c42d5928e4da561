"""RayClusters that the operator makes from the chart's template: one for all models of a namespace, and one for each
Model that asks for its own.

KubeRay leaves the pods of a RayCluster as they are when its image or the shape of a machine changes, until they die;
then head and workers differ. So a RayCluster is never changed in such a way: another one is made beside it, work goes
there (`plan.moving`), and the old one is deleted when nothing runs in it. Only how many machines of a kind there may
be, and new kinds, are written into the one that runs.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fastserve.cluster.kube.api import (
    CONFIG_MAPS,
    MANAGED_BY,
    MANAGER,
    MODELS,
    RAY_CLUSTERS,
    SECRETS,
    KindUnknown,
    KubeApi,
    Object,
    is_ours,
    owner_reference,
)
from fastserve.cluster.kube.events import tell
from fastserve.cluster.kube.heads import DEDICATED, SHARED, Heads, MissingHead, NamedHead, own_pool
from fastserve.cluster.kube.ray import TOKEN_KEY, Address, RayClusterHead, in_cluster, is_up, service_of
from fastserve.errors import FastServeError, NameConflict
from fastserve.plan.digest import digest_of
from fastserve.spec.model import Model

POOL_LABEL = "fastserve.dev/pool"
"""`shared` or `dedicated`; a dedicated one says in MODEL_LABEL whose it is."""

MODEL_LABEL = "fastserve.dev/model"
PARTS = "fastserve.dev/parts"
"""Annotation of a RayCluster: digests of what it was made from, of its head and of each group."""

TEMPLATE_KEY = "raycluster.json"
MOST_LETTERS = 53
"""Of a RayCluster's name; KubeRay puts more behind it."""

_COUNTS = ("replicas", "minReplicas", "maxReplicas")


@dataclass(frozen=True, slots=True)
class Template:
    """What RayClusters are made from."""

    owner: Object
    """The ConfigMap that it stands in."""

    value: Object
    """A RayCluster without a name."""

    @property
    def parts(self) -> dict[str, str]:
        """Digests of what cannot change in a RayCluster that runs: of the head, under an empty name, and of each group
        of machines by name."""
        spec = self.value["spec"]
        head = {key: item for key, item in spec.items() if key != "workerGroupSpecs"}
        found = {"": digest_of(head)[:16]}
        for group in spec.get("workerGroupSpecs") or ():
            kept = {key: item for key, item in group.items() if key not in _COUNTS}
            found[group["groupName"]] = digest_of(kept)[:16]
        return found


class RayClusters(Heads):
    """The RayClusters of one namespace."""

    def __init__(self, api: KubeApi, namespace: str, template: str, python: str, address: Address = in_cluster) -> None:
        """template: name of the ConfigMap with the template. python: what runs a stage. address: how a head's Service
        is reached."""
        self._api = api
        self._namespace = namespace
        self._template = template
        self._python = python
        self._address = address
        self._pools: dict[str, list[NamedHead]] = {}
        self._best: dict[str, NamedHead] = {}
        self._next: dict[str, tuple[str, str]] = {}
        self._rolling: dict[str, str] = {}
        self._wanted: set[str] = set()
        self._told: set[str] = set()

    def look(self, dedicated: Mapping[str, Object]) -> None:
        """Find the RayClusters, make those that are missing, and write the numbers of machines into those that fit."""
        try:
            found = self._api.list(RAY_CLUSTERS, self._namespace, labels=f"{MANAGED_BY}={MANAGER},{POOL_LABEL}")
        except KindUnknown:  # KubeRay was taken away, and its clusters with it
            found = []
        by_pool: dict[str, list[Object]] = {}
        for item in sorted(found, key=lambda item: str(item["metadata"].get("creationTimestamp", ""))):
            by_pool.setdefault(_pool(item), []).append(item)
        self._pools = {pool: [self._named(item, pool) for item in items] for pool, items in by_pool.items()}
        self._best, self._next, self._rolling, self._wanted = {}, {}, {}, set()
        template, why = self._read()
        owners = {SHARED: None, **{own_pool(name): item for name, item in sorted(dedicated.items())}}
        for pool, owner in owners.items():
            self._best[pool] = self._tend(pool, owner, by_pool.get(pool, []), template, why)

    def _tend(
        self, pool: str, owner: Object | None, there: Sequence[Object], template: Template | None, why: str
    ) -> NamedHead:
        """Bring about the RayCluster of one pool. Returns the one that work shall go to."""
        alive = [item for item in there if not item["metadata"].get("deletionTimestamp")]
        fitting: Object | None = None
        if template is not None:
            fits = [item for item in alive if _parts(item).items() <= template.parts.items()]
            try:
                fitting = self._grown(fits[-1], template) if fits else self._make(pool, owner, template, there)
            except FastServeError as error:
                fitting, why = (fits[-1] if fits else None), str(error)
        if template is not None:
            self._next[pool] = ("", why) if fitting is None else (fitting["metadata"]["name"], "")
        if fitting is not None:
            self._put(pool, self._named(fitting, pool))
            self._wanted.add(fitting["metadata"]["name"])
        up = [item for item in alive if is_up(item)]
        best = fitting if fitting is not None and (is_up(fitting) or not up) else next(iter((up or alive)[-1:]), None)
        if best is None:
            missing = NamedHead(pool, pool, MissingHead(why), is_up=False, was_up=False)
            self._pools.setdefault(pool, []).append(missing)
            return missing
        found = self._named(best, pool)
        if template is not None and best is not fitting:
            next_one = why if fitting is None else f"RayCluster {fitting['metadata']['name']} is not up yet"
            self._rolling[found.name] = (
                f"it is to be replaced by one as the chart says now, and works on meanwhile: {next_one}. Where "
                f"machines are short, `kubectl delete raycluster {found.name}` makes room; then nothing is served "
                "until the next one is up"
            )
            self._tell(best, self._rolling[found.name])
        self._put(pool, found)
        self._wanted.add(found.name)
        return found

    def _tell(self, found: Object, sentence: str) -> None:
        """An Event of a RayCluster that is to go, once for each thing to say; an Event that is lost harms nobody."""
        if sentence in self._told:
            return
        self._told.add(sentence)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with contextlib.suppress(FastServeError):
            tell(self._api, RAY_CLUSTERS, found, "Replacing", sentence, now, warning=False)

    def _put(self, pool: str, found: NamedHead) -> None:
        """Among the heads of a pool, each once."""
        kept = [item for item in self._pools.get(pool, []) if item.name != found.name]
        self._pools[pool] = [*kept, found]

    def all(self) -> Sequence[NamedHead]:
        """Every RayCluster of ours, those that are on their way out included."""
        return [head for heads in self._pools.values() for head in heads]

    def of(self, pool: str) -> NamedHead:
        """The RayCluster that a pool's work shall go to: the newest that fits the template, once its head is up."""
        missing = MissingHead(f"there is no RayCluster yet in namespace {self._namespace}; the next look makes it")
        return self._best.get(pool) or NamedHead(pool, pool, missing, is_up=False, was_up=False)

    def next_of(self, pool: str) -> tuple[str, str] | None:
        """The newest RayCluster that fits the template, up or not; empty where it cannot be made, and then why. None
        without a template, and before the first look for a pool."""
        return self._next.get(pool)

    def wanted(self) -> frozenset[str]:
        """For each pool the one that work goes to, and the one that it shall go to once it is up."""
        return frozenset(self._wanted)

    def end(self, head: NamedHead) -> None:
        """Delete a RayCluster; its pods go with it."""
        self._api.delete(RAY_CLUSTERS, self._namespace, head.name)

    def rolling(self) -> dict[str, str]:
        """A sentence for each RayCluster that works on while its successor is not up yet, by name."""
        return dict(self._rolling)

    def require(self, model: Model) -> None:
        """Both kinds can be had here."""

    def _named(self, found: Object, pool: str) -> NamedHead:
        name = found["metadata"]["name"]
        head = RayClusterHead(self._api, self._namespace, name, self._python, self._address)
        return NamedHead(name, pool, SeenHead(head, found), is_up(found), bool(service_of(found)))

    def _read(self) -> tuple[Template | None, str]:
        """The template, or why there is none."""
        found = self._api.get(CONFIG_MAPS, self._namespace, self._template)
        if found is None:
            return None, (
                f"there is no RayCluster named in the ConfigMap {self._template} of namespace {self._namespace}, since "
                "there is no such ConfigMap; install the chart there with ray.enabled"
            )
        try:
            value = json.loads(found["data"][TEMPLATE_KEY])
            template = Template(found, {"metadata": value.get("metadata") or {}, "spec": value["spec"]})
            _ = template.parts
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return (
                None,
                f"ConfigMap {self._template}: {TEMPLATE_KEY} holds no RayCluster ({error!r}); upgrade the chart",
            )
        return template, ""

    def _make(self, pool: str, owner: Object | None, template: Template, there: Sequence[Object]) -> Object:
        """Make a RayCluster. A second try at the same look would give it the same name, so there are never two."""
        name = _name(pool, template, there)
        value = copy.deepcopy(template.value)
        labels = {**(value["metadata"].get("labels") or {}), MANAGED_BY: MANAGER, POOL_LABEL: SHARED}
        reference = owner_reference(CONFIG_MAPS, template.owner)
        if owner is not None:
            labels |= {POOL_LABEL: DEDICATED, MODEL_LABEL: owner["metadata"]["name"]}
            reference = owner_reference(MODELS, owner)
            _give_token(value["spec"], self._token(owner))
        value["metadata"] = {
            "name": name,
            "namespace": self._namespace,
            "labels": labels,
            "annotations": {PARTS: json.dumps(template.parts, sort_keys=True)},
            "ownerReferences": [reference],
        }
        return self._api.create(RAY_CLUSTERS, value)

    def _grown(self, found: Object, template: Template) -> Object:
        """Write into a RayCluster that fits how many machines there may be, and kinds of machine that are new. What the
        autoscaler wrote stays."""
        groups = {group["groupName"]: group for group in found["spec"].get("workerGroupSpecs") or ()}
        wanted: list[Object] = []
        for group in template.value["spec"].get("workerGroupSpecs") or ():
            there = groups.get(group["groupName"])
            counts = {key: group[key] for key in _COUNTS if key in group}
            wanted.append(copy.deepcopy(group) if there is None else {**there, **counts})
        if wanted == list(groups.values()):
            return found
        token = _token_name(found["spec"])
        for group in wanted:
            if group["groupName"] not in groups and token:
                _give_token({"workerGroupSpecs": [group]}, token)
        metadata = found["metadata"]
        patch = {
            "metadata": {"annotations": {PARTS: json.dumps(template.parts, sort_keys=True)}},
            "spec": {"workerGroupSpecs": wanted},
        }
        return self._api.merge(RAY_CLUSTERS, self._namespace, metadata["name"], patch, metadata["resourceVersion"])

    def _token(self, owner: Object) -> str:
        """Name of the Secret with the token of a Model's own RayCluster; made once."""
        name, reference = f"{owner['metadata']['name']}-ray-token", owner_reference(MODELS, owner)
        found = self._api.get(SECRETS, self._namespace, name)
        if found is None:
            metadata = {
                "name": name,
                "namespace": self._namespace,
                "labels": {MANAGED_BY: MANAGER},
                "ownerReferences": [reference],
            }
            data = {TOKEN_KEY: base64.b64encode(secrets.token_hex(24).encode()).decode()}
            found = self._api.create(SECRETS, {"metadata": metadata, "type": "Opaque", "data": data})
        if not is_ours(found, owner["metadata"]["uid"]):
            raise NameConflict(
                f"the Secret {name} is there and was not made for this Model; it is left alone: rename or remove it"
            )
        return name


class SeenHead:
    """The head of a RayCluster as the last look saw it, so that nobody reads the object again."""

    def __init__(self, head: RayClusterHead, found: Object) -> None:
        self._head = head
        self._found = found
        self._endpoint: Any = None

    def load(self) -> Any:
        """The head. Raises ClusterFailed while it has no head service yet, or its token is missing."""
        if self._endpoint is None:
            self._endpoint = self._head.endpoint(self._found)
        return self._endpoint

    def start(self) -> Any:
        """The head; KubeRay starts it."""
        return self.load()

    def stop(self) -> None:
        """KubeRay stops it."""


def _pool(found: Object) -> str:
    labels = found["metadata"]["labels"]
    return own_pool(labels.get(MODEL_LABEL, "")) if labels[POOL_LABEL] == DEDICATED else SHARED


def _parts(found: Object) -> dict[str, str]:
    """What a RayCluster was made from; what nobody knows fits no template."""
    text = (found["metadata"].get("annotations") or {}).get(PARTS, "")
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return {str(key): str(item) for key, item in value.items()} if isinstance(value, dict) else {"": "unknown"}


def _name(pool: str, template: Template, there: Sequence[Object]) -> str:
    """A name that no other RayCluster of the pool has or had while these are there."""
    mark = digest_of([pool, template.parts, sorted(item["metadata"]["uid"] for item in there)])[:6]
    word = re.sub(r"^(?=[0-9])", "m-", pool.partition(".")[2] or "fastserve")
    return f"{word[: MOST_LETTERS - len(mark) - 1].rstrip('-')}-{mark}"


def _containers(spec: Mapping[str, Any]) -> list[Object]:
    """Every block with an environment: containers of head and workers, and the autoscaler's options."""
    pods = [spec["headGroupSpec"]] if "headGroupSpec" in spec else []
    pods += spec.get("workerGroupSpecs") or []
    found = [item for pod in pods for item in pod["template"]["spec"]["containers"]]
    return [*found, spec["autoscalerOptions"]] if spec.get("autoscalerOptions") else found


def _token_refs(spec: Mapping[str, Any]) -> list[Object]:
    """Each place that names the Secret with the token."""
    env = [item for block in _containers(spec) for item in block.get("env") or ()]
    return [
        item["valueFrom"]["secretKeyRef"]
        for item in env
        if item["name"] == "RAY_AUTH_TOKEN" and (item.get("valueFrom") or {}).get("secretKeyRef")
    ]


def _token_name(spec: Mapping[str, Any]) -> str:
    return next((str(ref["name"]) for ref in _token_refs({"headGroupSpec": spec["headGroupSpec"]})), "")


def _give_token(spec: Mapping[str, Any], name: str) -> None:
    """Let a RayCluster take its token from another Secret."""
    for ref in _token_refs(spec):
        ref["name"] = name
