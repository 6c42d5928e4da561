"""CustomResourceDefinitions of the three kinds, generated from the sections.

With them an API server refuses most of what `fastserve validate` refuses, fills in defaults, and explains every key.
`spec.structural` says how sections become schemas, `spec.rules` what they demand across keys, `spec.status` what comes
back.

`kubectl scale` writes `spec.serve.replicas.min`: replicas is a promise, and min is the promise to keep. Where max is
left out it follows min, so scaling then means exactly; where max is written, autoscaling goes on between the two, and a
min above max is refused. Scaling max would change nothing until there is load. `min` has a default and so has
`replicas`, since scaling fails at a path that is not there; a Model without `serve` has nothing to scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from fastserve.spec import status
from fastserve.spec.load import KINDS, Kind
from fastserve.spec.model import GROUP, VERSION
from fastserve.spec.section import Section
from fastserve.spec.shape import fields_of, one_line
from fastserve.spec.structural import block_schema, name_schema

Schema = dict[str, Any]

HEADING = (
    "# Generated from the sections by `python -m fastserve.spec.generate`. Change those, not this file.\n"
    "# What it means is in platform/fastserve/spec/crd.py.\n"
)


def _column(name: str, path: str, type_: str = "string", description: str = "", priority: int = 0) -> Schema:
    column: Schema = {"name": name, "type": type_, "jsonPath": path}
    if description:
        column["description"] = description
    return {**column, "priority": priority} if priority else column


_READY = _column(
    "READY", '.status.conditions[?(@.type=="Ready")].status', description="Whether it is as the manifest asks."
)
_REASON = _column("REASON", '.status.conditions[?(@.type=="Ready")].reason', description="Why, in one word.")
_AGE = _column("AGE", ".metadata.creationTimestamp", "date")


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a definition says besides its schema."""

    plural: str
    short_name: str
    scope: str
    status: Schema
    columns: tuple[Schema, ...]
    subresources: Schema = field(default_factory=dict)


_SCALE: Schema = {
    "specReplicasPath": ".spec.serve.replicas.min",
    "statusReplicasPath": ".status.replicas",
    "labelSelectorPath": ".status.selector",
}

_DEFINED = {
    "Model": _Kind(
        plural="models",
        short_name="fsm",
        scope="Namespaced",
        status=status.of_model(),
        columns=(
            _column("STAGE", ".status.stage", description="The stage that is under way or next."),
            _READY,
            _column("REPLICAS", ".status.replicas", "integer", "Replicas that answer."),
            _column("REVISION", ".status.revision", description="Revision that serves."),
            _column("URL", ".status.url", description="Where it answers."),
            _REASON,
            _AGE,
        ),
        subresources={"scale": _SCALE},
    ),
    "HardwareProfile": _Kind(
        plural="hardwareprofiles",
        short_name="fsp",
        scope="Cluster",
        status=status.of_hardware_profile(),
        columns=(
            _column("ACCELERATOR", ".spec.accelerator.type"),
            _column("COUNT", ".spec.accelerator.count", "integer", "Accelerators in one machine."),
            _column("CPUS", ".spec.cpus", "integer"),
            _column("MEMORY", ".spec.memory"),
            _column("MACHINES", ".status.machines", "integer", "Machines that are there now."),
            _READY,
            _REASON,
            _AGE,
        ),
    ),
    "AccessKey": _Kind(
        plural="accesskeys",
        short_name="fsk",
        scope="Namespaced",
        status=status.of_access_key(),
        columns=(
            _column("MODELS", ".spec.models"),
            _column("EXPIRES", ".spec.expires"),
            _column("SECRET", ".status.secret"),
            _READY,
            _REASON,
            _AGE,
        ),
    ),
}


def crds() -> dict[str, Schema]:
    """The definition of each kind by its plural, as it is sent to an API server; the same sections give the same."""
    return {defined.plural: _definition(name, defined) for name, defined in _DEFINED.items()}


def crd_texts() -> dict[str, str]:
    """The definitions as YAML files by their plurals."""
    return {
        plural: HEADING + yaml.dump(crd, Dumper=_NoAliases, sort_keys=False, width=120, allow_unicode=True)
        for plural, crd in crds().items()
    }


class _NoAliases(yaml.SafeDumper):
    """One schema that stands in two places is written twice: a reader of the file sees it where it holds."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _definition(name: str, defined: _Kind) -> Schema:
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": list(defined.columns),
        "subresources": {"status": {}, **defined.subresources},
        "schema": {"openAPIV3Schema": _root(KINDS[name], defined.status)},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{defined.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": name,
                "listKind": f"{name}List",
                "plural": defined.plural,
                "singular": name.lower(),
                "shortNames": [defined.short_name],
                "categories": ["fastserve"],
            },
            "scope": defined.scope,
            "versions": [version],
        },
    }


def _root(kind: Kind, status_schema: Schema) -> Schema:
    """The whole object. Of metadata a definition may restrict the name alone."""
    fields = fields_of(kind)
    spec: type[Section] = kind.model_fields["spec"].annotation  # type: ignore[assignment]
    return {
        "description": one_line(kind.__doc__ or ""),
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"description": fields["apiVersion"].description, "type": "string"},
            "kind": {"description": fields["kind"].description, "type": "string"},
            "metadata": {"type": "object", "properties": {"name": name_schema()}},
            "spec": {"description": one_line(spec.__doc__ or ""), **block_schema(spec)},
            "status": status_schema,
        },
    }
