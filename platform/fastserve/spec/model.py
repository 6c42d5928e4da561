"""The three kinds of manifest: Model, HardwareProfile, AccessKey."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastserve.spec.access import AccessKeySpec
from fastserve.spec.compress import CompressStep
from fastserve.spec.evaluate import Evaluate
from fastserve.spec.hardware import HardwareProfileSpec
from fastserve.spec.section import Name, Section
from fastserve.spec.serve import Serve
from fastserve.spec.source import SourceRef
from fastserve.spec.train import Train

GROUP = "fastserve.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

MOST_STEPS = 32
"""Compress steps. An API server takes a rule only over a list that ends somewhere."""


class Metadata(Section):
    """Name and labels, as everywhere in Kubernetes."""

    name: Name
    """Name of the object: lower-case letters, digits and `-`."""

    namespace: Name | None = None
    """Namespace on a cluster; a laptop has none."""

    labels: dict[str, str] = Field(default_factory=dict)
    """Labels."""

    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations."""


class ModelSpec(Section):
    """From a source to an endpoint. Every stage is optional; what is absent is skipped."""

    source: SourceRef
    """The model to begin with: a folder in Hugging Face layout or a single .gguf file."""

    cluster: Literal["shared", "dedicated"] = "shared"
    """On Kubernetes: at the namespace's Ray cluster, or at one of its own that goes with this Model.
    A laptop has one."""

    train: Train | None = None
    """Fine-tune it."""

    compress: Annotated[list[CompressStep], Field(max_length=MOST_STEPS)] = Field(default_factory=list)
    """Make it smaller, step by step."""

    evaluate: Evaluate | None = None
    """Measure it against its parent; the gate decides whether it may take traffic."""

    serve: Serve | None = None
    """Answer requests with it."""


class Model(Section):
    """One model, from data to an endpoint."""

    api_version: Literal["fastserve.dev/v1alpha1"]
    """Group and version of the manifest."""

    kind: Literal["Model"]
    """Kind of the manifest."""

    metadata: Metadata
    """Name and labels."""

    spec: ModelSpec
    """What is wanted."""

    @property
    def name(self) -> str:
        """The model's name."""
        return self.metadata.name


class HardwareProfile(Section):
    """A named kind of machine."""

    api_version: Literal["fastserve.dev/v1alpha1"]
    """Group and version of the manifest."""

    kind: Literal["HardwareProfile"]
    """Kind of the manifest."""

    metadata: Metadata
    """Name and labels."""

    spec: HardwareProfileSpec
    """What the machine has and costs."""


class AccessKey(Section):
    """A key for one consumer."""

    api_version: Literal["fastserve.dev/v1alpha1"]
    """Group and version of the manifest."""

    kind: Literal["AccessKey"]
    """Kind of the manifest."""

    metadata: Metadata
    """Name and labels."""

    spec: AccessKeySpec
    """What the key may do."""


Manifest = Annotated[Model | HardwareProfile | AccessKey, Field(discriminator="kind")]
"""Any of the three kinds."""
