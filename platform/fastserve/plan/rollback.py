"""Which revision a rollback by hand means; the laptop's command and a cluster's annotation mean the same."""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.errors import UsageInvalid
from fastserve.plan.observed import Observed, Pin
from fastserve.plan.steps import routed

PREVIOUS = "previous"
"""The word for the revision before, where something has to be written."""


def rollback_target(name: str, observed: Observed, known: Sequence[str], wanted: str, revision: str | None) -> str:
    """Digest of the revision that is asked for.

    known: digests of the model's revisions, oldest first. wanted: digest of the one that the manifest asks for.
    revision: its first digits; None or `previous` for the one that a rollout is to replace, else the newest one
    before that which serves, of those that have had all the traffic. Raises UsageInvalid when that is not one revision.
    """
    if revision is not None and revision != PREVIOUS:
        found = [digest for digest in known if digest.startswith(revision)]
        if len(found) != 1:
            shown = ", ".join(digest[:8] for digest in known) or "none"
            raise UsageInvalid(f"'{revision}' is not one revision of {name}; the revisions are, oldest first: {shown}")
        return found[0]
    serving = routed(observed)
    if len(serving) > 1:
        return next(digest for digest in serving if digest != wanted)
    before = known[: known.index(serving[0])] if serving and serving[0] in known else []
    if not before:
        raise UsageInvalid(f"{name} has no revision before the one that serves; `fastserve status {name}` lists them")
    proven = [digest for digest in before if observed.known_revisions.get(digest, {}).get("proven")]
    return (proven or before)[-1]  # the other ones may be those that never came up, or were rolled back


def pin_of(target: str, wanted: str, stepped: bool) -> Pin | None:
    """The pin that makes a revision serve; None where the manifest asks for it anyway.

    target: as `rollback_target` tells. stepped: the manifest has a rollout. Then also the wanted revision is pinned, so
    that it goes in at once: whoever names it has seen how it does.
    """
    return None if target == wanted and not stepped else Pin(target, wanted)
