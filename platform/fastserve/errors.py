"""Every error a user can meet, drawn as one tree.

FastServeError                     exit  reason
├── ManifestInvalid                2     one or more Problems, each with path, line and suggestion
├── UsageInvalid                   2     the command line's arguments do not fit together
├── SourceNotFound                 2     a source or data set is not where the manifest says
├── SourceInvalid                  2     a source is there but unsafe, torn or of a refused type
├── DatasetInvalid                 2     a row cannot be read, or nothing is left to learn from
├── NotExecutable                  3     the manifest is right, but this version cannot run that part yet
│   └── PvcNotMounted              3     a pvc:// source is on a claim that the cluster's pods do not have
├── DoesNotFit                     3     the plan needs more than the hardware has
│   ├── InsufficientMemory
│   └── InsufficientHardware
├── GateRefused                    4     the candidate may not take traffic
│   ├── GateFailed
│   ├── GateInconclusive
│   └── RolledBack                       under traffic it was worse than the revision it was to replace
└── ClusterFailed                  5     something that ran broke
    ├── StageFailed
    ├── EngineFailed
    ├── StoreFailed                      the artifact store could not be read or written
    │   ├── StoreFull
    │   ├── ArtifactNotFound
    │   ├── DigestMismatch               bytes are not what their record says
    │   └── AttemptFenced                a newer attempt owns this key, or it is already committed
    ├── SecretMissing                    the Secret that a source names is not there, or is none of that kind
    ├── PortInUse
    ├── HomeInUse                        another `fastserve up` owns this home folder
    ├── NameConflict                     an object of the wanted name is there and not ours
    └── StateChanged                     somebody else wrote an object first; the next look decides again

Messages end with what to do, in the manifest's own words. `reason` is the machine-readable word
that also stands in `status.conditions[].reason`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a manifest."""

    path: str
    """Where, in the manifest's own words: `spec.serve.replicas.min`."""

    message: str
    """What is wrong and what to do."""

    line: int | None = None
    """Line in the file, counted from 1; None when the text has no such place."""

    suggestion: str | None = None
    """The nearest right key or value, alone, for machines."""

    file: str | None = None
    """File the manifest was read from."""

    def __str__(self) -> str:
        place = self.file or "manifest"
        if self.line is not None:
            place += f":{self.line}"
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class FastServeError(Exception):
    """Root of all errors that a user can act on."""

    exit_code = 1

    @property
    def reason(self) -> str:
        """Machine-readable CamelCase word for conditions."""
        return type(self).__name__


class ManifestInvalid(FastServeError):
    """The manifest cannot be understood; carries every problem found in one go."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UsageInvalid(FastServeError):
    """The command line's arguments do not fit together."""

    exit_code = 2


class SourceNotFound(FastServeError):
    """A source or data set is not where the manifest says."""

    exit_code = 2


class SourceInvalid(FastServeError):
    """A source exists but is unsafe, torn or of a refused type."""

    exit_code = 2


class DatasetInvalid(FastServeError):
    """A data set cannot be used; the message names file and line."""

    exit_code = 2


class NotExecutable(FastServeError):
    """The manifest is right, but this version cannot run that part yet."""

    exit_code = 3

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class PvcNotMounted(NotExecutable):
    """A pvc:// source is on a claim that the pods of this cluster do not have."""


class DoesNotFit(FastServeError):
    """The plan needs more than the hardware has."""

    exit_code = 3


class InsufficientMemory(DoesNotFit):
    """Not enough memory; the message holds the byte table."""


class InsufficientHardware(DoesNotFit):
    """No machine of the wanted profile, or too few."""


class GateRefused(FastServeError):
    """The candidate may not take traffic."""

    exit_code = 4


class GateFailed(GateRefused):
    """A gate's limit is broken beyond doubt."""


class GateInconclusive(GateRefused):
    """The measurement cannot decide; more rows or rounds are needed."""


class RolledBack(GateRefused):
    """Under traffic the candidate was worse than the revision that it was to replace."""


class ClusterFailed(FastServeError):
    """Something that ran broke."""

    exit_code = 5


class StageFailed(ClusterFailed):
    """A stage failed on every allowed attempt."""


class EngineFailed(ClusterFailed):
    """The serving engine did not come up or died for good."""


class StoreFailed(ClusterFailed):
    """The artifact store could not be read or written."""


class StoreFull(StoreFailed):
    """No space left in the artifact store; nothing torn was left behind."""


class ArtifactNotFound(StoreFailed):
    """No committed record under this key."""


class DigestMismatch(StoreFailed):
    """Bytes are not what their record says."""


class AttemptFenced(StoreFailed):
    """A newer attempt owns this key, or the key is already committed."""


class SecretMissing(ClusterFailed):
    """The Secret that a source's tokenSecret names is not there, or holds no token; when it comes, things go on."""


class PortInUse(ClusterFailed):
    """A port that was asked for by number is taken."""


class HomeInUse(ClusterFailed):
    """Another `fastserve up` owns this home folder."""


class NameConflict(ClusterFailed):
    """A Kubernetes object of the wanted name exists and was not made by FastServe; it is left alone."""


class StateChanged(ClusterFailed):
    """A Kubernetes object changed or vanished between the look and the write; the next look decides again."""
