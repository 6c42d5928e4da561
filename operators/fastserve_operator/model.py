"""One look at one namespace: every Model a step closer to its spec; what changed, and when, does not matter.

    asked for -> surveyed -> accepted -> observed -> moves -> told

A Model object is a wish. What `fastserve up` refuses before anything starts is refused here too, as a condition; what
was accepted before stays in force until the wish can be met, so a mistake in an edit takes no endpoint away.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from fastserve.artifacts.tokens import secrets_from
from fastserve.cluster.kube.api import ACCESS_KEYS, MODELS, PROFILES, KubeApi, Object
from fastserve.cluster.kube.cluster import KubeCluster
from fastserve.cluster.kube.events import tell
from fastserve.cluster.kube.pods import Pods, PodTrouble
from fastserve.cluster.kube.rollback import is_wished, roll_back
from fastserve.cluster.kube.tokens import read_secret
from fastserve.cluster.local import Beat
from fastserve.cluster.ray_jobs import Job
from fastserve.cluster.status import status_of
from fastserve.cluster.survey import Survey, tries_so_far
from fastserve.errors import ClusterFailed
from fastserve.plan.facts import LOCAL
from fastserve.plan.moves import Done, Refuse, Wait
from fastserve.plan.steps import ROLLED_BACK
from fastserve.spec.load import read
from fastserve.spec.model import HardwareProfile
from fastserve_operator.acceptance import Surveys
from fastserve_operator.access import tend_key
from fastserve_operator.conditions import Trouble, attempted
from fastserve_operator.story import moving_to, same, status_of_object

log = logging.getLogger("fastserve.operator")

SETTLED_SECONDS = 60.0
"""A Model that is done and serves nothing is looked at anew after so long, though nothing of it changed: an artifact
may have been deleted."""

SETTLED_AT_ONCE = 100
"""Such Models that one look takes up again; of thousands each has its turn."""

FIRST_SECONDS = 0.5
"""How long the survey of a new Model is waited for: most are done by then, and nothing need be said of it twice."""

Shared = Mapping[str, Job] | Trouble
"""The head's jobs, or why they are not known."""


class Namespace:
    """Tends the Models and AccessKeys of one namespace."""

    def __init__(
        self, api: KubeApi, namespace: str, cluster: KubeCluster, acts: Callable[[], bool] = lambda: True
    ) -> None:
        """acts: whether this process may still act; a lease may be lost in the middle of a look."""
        self._acts = acts
        self._api = api
        self._namespace = namespace
        self._cluster = cluster
        self._home = cluster.kube_home
        self._secret = partial(read_secret, api, namespace)
        self._surveys = Surveys(cluster.kube_home, self._secret)
        self._busy = False
        self._looked_again = 0
        self._pods = Pods(api, namespace, time.time)
        self._pod_troubles: Sequence[PodTrouble] | None = None
        self._there: Collection[str] | Trouble | None = None
        """Profiles that there are machines of; None: nobody has asked at this look."""

        self._by_event: dict[str, Mapping[str, str]] = {}
        """What was told of Models that can have no status; losing it tells it once more."""

        self._settled: dict[str, tuple[Any, float]] = {}
        """Versions of Models with nothing to do, and when that was seen; losing them costs one look each."""

    def tend(self) -> bool:
        """One look at keys and Models, as `tend_keys` and `tend_models`."""
        attempted(self.tend_keys)
        return self.tend_models()

    def tend_keys(self) -> bool:
        """See to who may ask. Returns False: the next look has time. Raises ClusterFailed when the API server does not
        answer."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        keys = [key for key in self._api.list(ACCESS_KEYS, self._namespace) if not _is_deleted(key)]
        entries = [tend_key(self._api, key, now) for key in keys]
        self._cluster.admit([entry for entry in entries if entry is not None])
        return False

    def tend_models(self) -> bool:
        """One look at every Model, and what follows from it. Returns whether anything is under way or served, so that
        the next look is due soon. Raises ClusterFailed when the API server does not answer."""
        if self._cluster.key_entries is None:  # what is routed stands in the same orders as who may ask
            told = attempted(self.tend_keys)
            if isinstance(told, Trouble) and self._cluster.key_entries is None:
                raise ClusterFailed(told.message)
        self._busy = False
        self._pod_troubles = self._there = None
        self._looked_again = 0
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        models = self._home.look()
        self._forget_all_but({item["metadata"]["name"] for item in models})
        profiles = self._profiles()
        self._home.described = {profile.metadata.name: profile.spec for profile in profiles}
        shared = attempted(self._cluster.keep)
        beats = [self._tend(found, profiles, shared, now) for found in models if self._acts()]
        if self._acts():
            attempted(lambda: self._cluster.share_with_training([beat for beat in beats if beat is not None]))
        return self._busy

    def _forget_all_but(self, names: Collection[str]) -> None:
        self._surveys.keep(names)
        for kept in (self._settled, self._by_event):
            for name in kept.keys() - names:
                del kept[name]

    def _tend(self, found: Object, profiles: Sequence[HardwareProfile], shared: Shared, now: str) -> Beat | None:
        """Bring one Model a step closer to its spec. It never raises: one broken Model never touches another."""
        name = found["metadata"]["name"]
        if _is_deleted(found):
            self._busy = True
            self._surveys.forget(name)
            trouble = attempted(lambda: self._end(found, shared))
            if trouble is not None:
                self._tell(found, None, trouble, now)
            return None
        if self._is_settled(found):
            return None
        refusal = attempted(lambda: self._accept(found, profiles, shared, now))
        beat = attempted(lambda: self._look(found, shared, now))
        self._busy |= beat is not None or refusal is None or refusal.passing
        if isinstance(beat, Beat):
            failed = attempted(lambda: self._carry_out(beat))
            self._tell(found, beat, refusal or failed, now)
            if refusal is None and beat.model.spec.serve is None and all(isinstance(move, Done) for move in beat.moves):
                self._settled[name] = (self._versions(found), time.monotonic())
            return beat
        self._tell(found, None, refusal or beat, now)
        return None

    def _is_settled(self, found: Object) -> bool:
        known, at = self._settled.get(found["metadata"]["name"], (None, 0.0))
        if known != self._versions(found):
            return False
        if time.monotonic() < at + SETTLED_SECONDS or self._looked_again >= SETTLED_AT_ONCE:
            return True
        self._looked_again += 1
        return False

    def _versions(self, found: Object) -> Any:
        """All that a Model without traffic depends on but the store. Its status is the operator's own writing."""
        metadata = found["metadata"]
        marks = (metadata["uid"], metadata["generation"], metadata.get("annotations"), metadata.get("finalizers"))
        return (*marks, found.get("status"), self._home.version(metadata["name"]))

    def _accept(self, found: Object, profiles: Sequence[HardwareProfile], shared: Shared, now: str) -> Trouble | None:
        """Make what is asked for what is wanted. Returns why it is not yet."""
        name = found["metadata"]["name"]
        if self._home.is_accepted(found) and name not in self._home.damaged:
            return None
        if self._there is None:
            self._there = attempted(self._cluster.there)
        known = {LOCAL, *self._home.described} if isinstance(self._there, Trouble) else self._there
        had = self._home.model(name) is not None
        answer = self._surveys.answer(found, profiles, known, 0.0 if had else FIRST_SECONDS)
        if isinstance(answer, Survey):
            if had and is_wished(self._home, found):
                # A rollback that comes with an edit is about what was accepted before, so it is obeyed first; where Ray
                # does not answer, the edit is accepted all the same: it may be the cure.
                attempted(lambda: self._look(found, shared, now))
            self._cluster.require(answer.model)
            self._cluster.hold(found)  # before anything of it runs
            pin = self._home.pin(name)
            if pin is not None and pin.reason == ROLLED_BACK and self._home.is_retried(found):
                self._home.set_pin(name, None)  # asking again is trying again
            self._home.want(answer.model, answer.digests, tries_so_far(self._cluster.store, answer))
            self._surveys.forget(name)
            self._cluster.ask_anew(name)
            return None
        return answer if isinstance(answer, Trouble) else Trouble("Surveying", "Its sources are being read.", True)

    def _look(self, found: Object, shared: Shared, now: str) -> Beat | Trouble | None:
        name = found["metadata"]["name"]
        if name in self._home.damaged:
            why = f"what was accepted of {name} cannot be read by this version ({self._home.damaged[name]})"
            return Trouble("StoreFailed", f"{why}; what serves stays as it is", True)
        if self._home.model(name) is None:
            return None
        if isinstance(shared, Trouble):
            return shared
        beat = self._cluster.look(name, shared)
        told = roll_back(self._home, found, beat)
        if told is None:
            return beat
        reason = "RollbackAsked" if "revision" in told else "RollbackRefused"
        attempted(lambda: tell(self._api, MODELS, found, reason, told["message"], now, "revision" not in told))
        return self._cluster.look(name, shared)  # what is due follows from it

    def _carry_out(self, beat: Beat) -> None:
        with secrets_from(self._secret):
            for move in beat.moves:
                self._cluster.apply(beat.model, beat.observed, move)

    def _end(self, found: Object, shared: Shared) -> Trouble | None:
        """Let a deleted Model go when nothing of it runs. Returns what is waited for."""
        name = found["metadata"]["name"]
        self._cluster.let_go(name)
        if isinstance(shared, Trouble):  # another model's trouble with the cluster need not hold this one
            self._cluster.look_at_heads()
        waits = self._cluster.end(found)
        return None if waits is None else Trouble("Deleting", f"It was deleted; there is still {waits}.", True)

    def _tell(self, found: Object, beat: Beat | None, trouble: Trouble | None, now: str) -> None:
        """Write the status when it says something new, and an Event when it was decided now."""
        if trouble is not None and trouble.reason == "StateChanged":
            log.info("%s: %s", found["metadata"]["name"], trouble.message)
            return
        told = attempted(lambda: self._write(found, beat, trouble, now))
        if isinstance(told, Trouble):
            log.warning("the status of %s was not written: %s", found["metadata"]["name"], told.message)

    def _write(self, found: Object, beat: Beat | None, trouble: Trouble | None, now: str) -> None:
        moves = () if beat is None else beat.moves
        store, url = self._cluster.store, self._cluster.gateway.url
        story = None if beat is None else status_of(beat.model, beat.observed, beat.moves, store, url)
        rollback = attempted(lambda: self._home.rollback(found["metadata"]["name"]))
        asked = None if isinstance(rollback, Trouble) else rollback
        pods, moving = self._troubles(found, story, trouble), "" if story is None else self._moving(found)
        status = status_of_object(found, story, moves, trouble, now, asked, pods, moving)
        before = found.get("status")
        if same(status, before):
            return
        ready, had, name = _ready(status), _ready(before or {}), found["metadata"]["name"]
        if not self._api.apply_status(MODELS, found, status):
            had = self._by_event.get(name, {})  # it has no status: the Event alone tells, once
            self._by_event[name] = ready
        if (ready["reason"], ready["message"]) == (had.get("reason"), had.get("message")):
            return
        log.info("%s/%s: %s: %s", self._namespace, found["metadata"]["name"], ready["reason"], ready["message"])
        if trouble is not None or any(not isinstance(move, Wait) for move in moves):
            bad = trouble is not None and trouble.reason not in ("Surveying", "Deleting")
            warning = bad or any(isinstance(move, Refuse) for move in moves)
            tell(self._api, MODELS, found, ready["reason"], ready["message"], now, warning)

    def _troubles(
        self, found: Object, story: Mapping[str, Any] | None, trouble: Trouble | None
    ) -> Sequence[PodTrouble]:
        """What is wrong with the pods that a Model waits for. Pods are asked for once a look, and only while some Model
        is not ready."""
        waits = trouble.reason == "ClusterFailed" if trouble is not None else story is not None and _waits(story)
        if not waits:
            return ()
        mine = attempted(lambda: self._cluster.ray_clusters_of(found["metadata"]["name"]))
        return [] if isinstance(mine, Trouble) else [pod for pod in self._troubled_pods() if pod.cluster in mine]

    def _moving(self, found: Object) -> str:
        """What there is to say of a Model that is on its way to another RayCluster; empty when it is on none."""
        target = attempted(lambda: self._cluster.moves_to(found["metadata"]["name"]))
        return "" if target is None or isinstance(target, Trouble) else moving_to(*target, found, self._troubled_pods())

    def _troubled_pods(self) -> Sequence[PodTrouble]:
        """Asked for once a look, by the first who waits for pods."""
        if self._pod_troubles is None:
            listed = attempted(self._pods.troubles)
            self._pod_troubles = () if isinstance(listed, Trouble) else listed
        return self._pod_troubles

    def _profiles(self) -> list[HardwareProfile]:
        """The cluster's HardwareProfiles; one that cannot be read is as if it were not there."""
        listed = attempted(lambda: self._api.list(PROFILES, None))
        if isinstance(listed, Trouble):
            log.warning("the HardwareProfiles are not known: %s", listed.message)
            return []
        found = [attempted(partial(read, json.dumps(item))) for item in listed]
        manifests = [item for some in found if not isinstance(some, Trouble) for item in some]
        return [item for item in manifests if isinstance(item, HardwareProfile)]


def _is_deleted(found: Object) -> bool:
    return bool(found["metadata"].get("deletionTimestamp"))


def _waits(story: Mapping[str, Any]) -> bool:
    """Whether anything of a Model is not there yet."""
    return story["conditions"][0]["status"] != "True" or any(item["state"] != "ready" for item in story["revisions"])


def _ready(status: Mapping[str, object]) -> Mapping[str, str]:
    conditions = status.get("conditions")
    listed = conditions if isinstance(conditions, list) else []
    return next((item for item in listed if item["type"] == "Ready"), {})
