"""What FastServe writes back into an object: the `status` of the three kinds, as structural schemas.

The operator writes these keys and nobody else does. Words that may grow (states, reasons) have no closed set, so that
an operator of the next version can write them before the definitions are replaced.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _text(description: str, **more: Any) -> Schema:
    return {"description": description, "type": "string", **more}


def _count(description: str, **more: Any) -> Schema:
    return {"description": description, "type": "integer", "format": "int64", "minimum": 0, **more}


def _figure(description: str) -> Schema:
    return {"description": description, "type": "number"}


def _open(description: str) -> Schema:
    """Figures whose names every stage has of its own."""
    return {"description": description, "type": "object", "x-kubernetes-preserve-unknown-fields": True}


def _block(description: str, properties: Schema, required: tuple[str, ...] = ()) -> Schema:
    schema = {"description": description, "type": "object", "properties": properties}
    return {**schema, "required": list(required)} if required else schema


def _list_by(key: str, description: str, item: Schema) -> Schema:
    """A list in which `key` stands once."""
    keyed = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
    return {"description": description, "type": "array", "items": item, **keyed}


def _conditions() -> Schema:
    """As metav1.Condition."""
    condition = {
        "type": _text("What the condition is of: Ready, or a stage.", maxLength=316),
        "status": _text("True, False or Unknown.", enum=["True", "False", "Unknown"]),
        "observedGeneration": _count("Generation of the object that the condition speaks of."),
        "lastTransitionTime": _text("When status last changed.", format="date-time"),
        "reason": _text(
            "The cause in one word, for machines: Ready, Working, GateFailed, InsufficientMemory.",
            minLength=1,
            maxLength=1024,
            pattern="^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
        ),
        "message": _text("The cause in a sentence, and what to do.", maxLength=32768),
    }
    required = ("type", "status", "lastTransitionTime", "reason", "message")
    return _list_by("type", "One a stage, and Ready.", _block("How one thing stands.", condition, required))


def _seen() -> Schema:
    return {
        "observedGeneration": _count("Generation of the object that this status speaks of."),
        "conditions": _conditions(),
    }


def _stages() -> Schema:
    progress = {
        "done": _figure("So many are done."),
        "total": _figure("Of so many."),
        "unit": _text("What is counted: steps, rows, bytes, layers."),
        "ratePerSecond": _figure("So many a second."),
        "etaSeconds": _figure("Seconds that are left at this speed."),
        "note": _text("What is being done now."),
        "metrics": _open("Figures of the moment, such as loss."),
        "at": _figure("Time of the last report, in Unix seconds."),
    }
    stage = {
        "state": _text("waiting, running, committed, failed or lost."),
        "key": _text("Digest of what decides the result; a stage with a known key is not run again."),
        "attempt": _count("Number of the attempt, from 1."),
        "progress": _block("How far it is.", progress),
        "digest": _text("Digest of the artifact."),
        "sizeBytes": _count("Size of the artifact."),
        "metrics": _open("What the stage measured."),
        "reason": _text("Why it failed, in one word."),
        "message": _text("Why it failed, and what to do."),
    }
    return {
        "description": "Each stage by its name: source, train, compress, evaluate.",
        "type": "object",
        "additionalProperties": {"type": "object", "properties": stage},
    }


def _gate() -> Schema:
    limit = {
        "name": _text("Name of the limit."),
        "outcome": _text("pass, fail or inconclusive."),
        "limit": _figure("The limit; shares as shares."),
        "measured": _open("What was measured: its middle and its interval."),
        "sentence": _text("The figures in a sentence."),
    }
    gate = {
        "outcome": _text("pass, fail or inconclusive."),
        "reasons": {"description": "Why, in sentences.", "type": "array", "items": {"type": "string"}},
        "limits": {
            "description": "Every limit that was judged.",
            "type": "array",
            "items": {"type": "object", "properties": limit},
        },
    }
    return _block("What the gate says of the candidate.", gate)


def _place() -> Schema:
    place = {
        "profile": _text("Hardware profile."),
        "state": _text("starting, ready, failed or stopping."),
        "replicas": _count("Replicas that answer."),
        "wanted": _count("Replicas there shall be, as autoscaling decided."),
        "message": _text("Why it is not ready."),
    }
    return _block("A revision on the machines of one profile.", place, ("profile",))


def _rollout() -> Schema:
    """Where it stands; figures of the moment are the gateway's to tell, or the status would be written every second."""
    rollout = {
        "revision": _text("Digest of the new revision."),
        "from": _text("Digest of the revision that it is to replace."),
        "weight": _count("Percent of traffic of the new one.", maximum=100),
        "step": _count("Number of the step, from 1."),
        "steps": {"description": "Percent of traffic by step.", "type": "array", "items": _count("Percent.")},
        "holdSeconds": _figure("How long each step is watched."),
    }
    return _block("A new revision that takes over step by step.", rollout)


def _pin() -> Schema:
    pin = {
        "revision": _text("Digest of the revision that serves."),
        "insteadOf": _text("Digest of the one that the manifest asks for."),
        "reason": _text("RolledBack, or ByHand."),
        "message": _text("What was found, with its figures."),
    }
    return _block("A rollback, while it holds.", pin)


def _rollback() -> Schema:
    rollback = {
        "asked": _text("The annotation's value."),
        "revision": _text("Digest of the revision that it means; nothing when it was refused."),
        "message": _text("What came of it, in a sentence."),
    }
    return _block("What came of the last new value of the annotation fastserve.dev/rollback.", rollback)


def _revisions() -> Schema:
    revision = {
        "digest": _text("Digest of everything that decides what is served."),
        "state": _text("starting, ready, failed or stopping."),
        "gate": _text("What the gate said of it: pass, fail or inconclusive."),
        "weight": _count("Percent of traffic.", maximum=100),
        "replicas": _count("Replicas that answer."),
        "message": _text("Why it is not ready."),
        "places": _list_by("profile", "Where it runs.", _place()),
    }
    item = _block("One revision.", revision, ("digest",))
    return _list_by("digest", "Revisions that a rollback may go to, the newest first.", item)


def _adapters() -> Schema:
    adapter = {
        "name": _text("Its name, which requests ask for as the model."),
        "state": _text("waiting, running, committed, failed or lost; serving when a revision with traffic applies it."),
        "digest": _text("Digest of its artifact."),
        "rank": _count("Its rank."),
        "revisions": {
            "description": "Digests of the revisions with traffic that apply it.",
            "type": "array",
            "items": {"type": "string"},
        },
        "reason": _text("Why it was not brought in, in one word."),
        "message": _text("Why it was not brought in, and what to do."),
    }
    return _list_by("name", "Adapters that the manifest names.", _block("One adapter.", adapter, ("name",)))


def of_model() -> Schema:
    """Status of a Model."""
    return _block(
        "What is there, written by FastServe.",
        {
            **_seen(),
            "stage": _text("The stage that is under way or next."),
            "stages": _stages(),
            "gate": _gate(),
            "adapters": _adapters(),
            "revision": _text("Revision that serves, its first 8 digits."),
            "revisions": _revisions(),
            "rollout": _rollout(),
            "pin": _pin(),
            "rollback": _rollback(),
            "why": {
                "description": "Why it is as it is and what is due, in sentences.",
                "type": "array",
                "items": {"type": "string"},
            },
            "replicas": _count("Replicas that answer, over all revisions."),
            "selector": _text("Labels of the pods that serve, as text: what autoscalers ask for."),
            "url": _text("Where it answers."),
        },
    )


def of_hardware_profile() -> Schema:
    """Status of a HardwareProfile."""
    machines = _count("Machines of this profile that are there now.")
    return _block("What is there, written by FastServe.", {**_seen(), "machines": machines})


def of_access_key() -> Schema:
    """Status of an AccessKey; the key itself stands in the Secret alone."""
    return _block(
        "What is there, written by FastServe.",
        {
            **_seen(),
            "secret": _text("Name of the Secret that holds the key."),
            "sha256": _text("SHA-256 of the key, as the gateway knows it."),
        },
    )
