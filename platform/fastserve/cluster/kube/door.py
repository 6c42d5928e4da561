"""What a person does with the Models of a namespace: ask for one, ask again, roll back, let one go.

Each is one write to one object, with the person's own rights. Nothing is decided here; the operator looks, and what
came of it is read from the same object.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastserve.cluster.kube.api import ACCESS_KEYS, MODELS, PROFILES, RAY_CLUSTERS, Object, Resource
from fastserve.cluster.kube.config import Reached
from fastserve.cluster.kube.home import RETRY
from fastserve.cluster.kube.ray import promised_by
from fastserve.cluster.kube.rollback import ROLLBACK
from fastserve.cluster.kube.story import KubeModels, story_of
from fastserve.errors import ClusterFailed, StateChanged, UsageInvalid
from fastserve.plan.facts import LOCAL
from fastserve.plan.rollback import PREVIOUS
from fastserve.spec.hardware import HardwareProfileSpec
from fastserve.spec.load import Manifest, dump
from fastserve.spec.model import AccessKey, HardwareProfile, Metadata, Model

RESOURCES: Mapping[type, Resource] = {Model: MODELS, HardwareProfile: PROFILES, AccessKey: ACCESS_KEYS}
TRIES = 20
"""Of a small change, when somebody else wrote the object in between; the operator writes its status now and then."""


class Door:
    """A namespace of a cluster, as a person may change it."""

    def __init__(self, reached: Reached) -> None:
        self.reached = reached
        self.api = reached.api
        self.namespace = reached.namespace
        self.models = KubeModels(reached.api, reached.namespace)

    @property
    def kubectl(self) -> str:
        """How a command of kubectl for this place begins."""
        return " ".join(["kubectl", *self.reached.kubectl_flags])

    def stories(self) -> list[dict[str, Any]]:
        """How every Model stands, as `kube.story.story_of` tells it."""
        return [story_of(found) for found in self.models.all()]

    def story(self, name: str) -> dict[str, Any]:
        """How one Model stands. Raises UsageInvalid when there is none of that name."""
        return story_of(self.models.get(name))

    def find_story(self, name: str) -> dict[str, Any] | None:
        """How one Model stands; None when there is none of that name."""
        found = self.models.find(name)
        return None if found is None else story_of(found)

    # -- asking ----------------------------------------------------------------------------------------------------

    def require_here(self, manifests: Sequence[Manifest]) -> None:
        """Raise UsageInvalid when a manifest names another namespace than this one."""
        for item in manifests:
            named = item.metadata.namespace
            if named is not None and named != self.namespace and not isinstance(item, HardwareProfile):
                raise UsageInvalid(
                    f"{item.kind} {item.metadata.name} is for namespace {named}, and this is {self.namespace}; "
                    f"add -n {named}, or take metadata.namespace out"
                )

    def apply(self, manifest: Manifest, dry_run: bool = False) -> Object:
        """Server-side apply, as `kubectl apply --server-side` does it; a null that switches a limit off is kept.

        dry_run: the API server says what it thinks of it and keeps nothing. Raises ManifestInvalid when it is refused,
        StateChanged when somebody else has written a key otherwise.
        """
        value = dump(manifest)
        if not isinstance(manifest, HardwareProfile):
            value["metadata"] = {**value["metadata"], "namespace": self.namespace}
        try:
            return self.api.apply(RESOURCES[type(manifest)], value, dry_run)
        except StateChanged as error:
            told = str(error).removesuffix("; the next look decides again")
            raise StateChanged(
                f"{told}; look at what it says there, then take it over with "
                f"`{self.kubectl} apply --server-side --force-conflicts --field-manager=fastserve -f FILE`"
            ) from error
        except ClusterFailed:
            self.models.require_namespace()
            raise

    def ask_rollback(self, name: str, revision: str | None) -> str:
        """Ask for an earlier revision. Returns the value of the annotation, which the status repeats when it is
        obeyed."""
        asked = f"{revision or PREVIOUS}@{time.time_ns() // 1000}"
        self._annotate(name, ROLLBACK, asked)
        return asked

    def ask_again(self, name: str) -> None:
        """Ask again for the stages of a Model that have failed."""
        self._annotate(name, RETRY, str(time.time_ns() // 1000))

    def delete(self, name: str) -> None:
        """Let a Model go; its finalizer holds it until nothing of it runs. Raises UsageInvalid when there is none."""
        if not self.api.delete(MODELS, self.namespace, name):
            self.models.get(name)

    def _annotate(self, name: str, key: str, value: str) -> None:
        """Write one annotation of the Model as it was read, so that what was wished for is not another one's wish."""
        first = self.models.get(name)
        found = first
        for left in reversed(range(TRIES)):
            metadata = found["metadata"]
            patch = {"metadata": {"annotations": {key: value}}}
            try:
                self.api.merge(MODELS, self.namespace, name, patch, metadata["resourceVersion"])
                return
            except StateChanged:
                found = self.models.get(name)
                if not left or found["metadata"]["generation"] != first["metadata"]["generation"]:
                    raise StateChanged(
                        f"{name} was changed by somebody else just now; look at `fastserve why {name}` and try again"
                    ) from None

    # -- what there is ---------------------------------------------------------------------------------------------

    def profiles(self) -> list[HardwareProfile]:
        """The cluster's HardwareProfiles; one that cannot be read is as if it were not there."""
        return [item for item in map(_profile, self.api.list(PROFILES, None)) if item is not None]

    def there(self, described: Sequence[str]) -> set[str]:
        """Names of the profiles that the namespace's RayClusters have machines of, or grow to. What cannot be seen
        refuses nobody: then all that are described."""
        try:
            clusters = self.api.list(RAY_CLUSTERS, self.namespace)
        except ClusterFailed:
            clusters = []
        found = {machine.profile for cluster in clusters for machine in promised_by(cluster)}
        return {LOCAL, *(found or described)}


def _profile(found: Object) -> HardwareProfile | None:
    try:
        return HardwareProfile(
            api_version="fastserve.dev/v1alpha1",
            kind="HardwareProfile",
            metadata=Metadata(name=found["metadata"]["name"]),
            spec=HardwareProfileSpec.model_validate(found["spec"], by_alias=True, by_name=False),
        )
    except (ValueError, KeyError):
        return None
