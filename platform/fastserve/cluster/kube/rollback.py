"""A rollback on a cluster: an annotation says what is wished, and each new value of it is obeyed once.

    kubectl annotate model NAME --overwrite fastserve.dev/rollback=previous@$(date +%s)

A value is `previous` or the first digits of a revision; what stands behind `@` only makes it another value. It becomes
the pin that a laptop's `fastserve rollback` writes, in one write with a note that it was obeyed, so it is neither
forgotten nor done twice, and a changed manifest ends it. Taking the annotation off changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.cluster.kube.home import KubeHome
from fastserve.cluster.local import Beat
from fastserve.errors import UsageInvalid
from fastserve.plan import keys
from fastserve.plan.pipeline import wanted_revision
from fastserve.plan.rollback import PREVIOUS, pin_of, rollback_target

ROLLBACK = "fastserve.dev/rollback"
"""Annotation of a Model."""


def rollback_asked(found: Mapping[str, Any]) -> str:
    """The wish as it stands in the annotation; empty when there is none."""
    return str((found["metadata"].get("annotations") or {}).get(ROLLBACK) or "").strip()


def is_wished(home: KubeHome, found: Mapping[str, Any]) -> bool:
    """Whether the annotation has a value that was neither obeyed nor refused yet."""
    asked = rollback_asked(found)
    return bool(asked) and (home.rollback(found["metadata"]["name"]) or {}).get("asked") != asked


def roll_back(home: KubeHome, found: Mapping[str, Any], beat: Beat) -> dict[str, str] | None:
    """Obey the annotation of a Model object if its value is a new one.

    beat: a look at the model as it was accepted. Returns what came of it: `asked`, `message`, and `revision` unless it
    was refused; None when there was nothing to do. Raises StateChanged when somebody wrote in between.
    """
    name, asked = found["metadata"]["name"], rollback_asked(found)
    if not is_wished(home, found):
        return None
    wanted = wanted_revision(beat.model, beat.observed, keys.stage_keys(beat.model, beat.observed.digests))
    word = asked.partition("@")[0] or PREVIOUS
    try:
        if wanted is None:
            raise UsageInvalid(f"{name} has no revision of what its manifest asks for yet")
        target = rollback_target(name, beat.observed, list(home.revisions(name)), wanted.digest, word)
    except UsageInvalid as error:
        refused = {"asked": asked, "message": f"The rollback is refused: {error}."}
        home.refuse_rollback(name, refused)
        return refused
    stepped = beat.model.spec.serve is not None and beat.model.spec.serve.rollout is not None
    told = f"Revision {target[:8]} was asked for"
    of = f" in place of {wanted.digest[:8]}" if target != wanted.digest else ", which is what the manifest asks for"
    done = {"asked": asked, "revision": target, "message": f"{told}{of}."}
    home.set_rollback(name, done, pin_of(target, wanted.digest, stepped))
    return done
