"""`pvc://CLAIM/path`: what lies on a volume claim of a cluster, which the chart mounts into the operator's pods and
into Ray's, for reading, in a folder of the claim's name.
"""

from __future__ import annotations

import os
from pathlib import Path

from fastserve.artifacts.folder import FolderSource
from fastserve.errors import SourceInvalid, SourceNotFound

FOLDER = "FASTSERVE_SOURCES"
"""Variable with the folder in which the claims are mounted; pods have it, a laptop has not."""


def mounted_claims() -> frozenset[str] | None:
    """Names of the claims that this process can read; None where there are no claims at all."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return None
    try:
        return frozenset(item.name for item in Path(folder).iterdir() if item.is_dir())
    except OSError:
        return frozenset()


class ClaimSource(FolderSource):
    """A file, a folder or a pattern on a claim."""

    scheme = "pvc"

    def _local(self) -> Path:
        """Where it lies. Raises SourceInvalid for a path that leaves the claim."""
        claim, _, path = self._uri.removeprefix("pvc://").partition("/")
        if claim not in (mounted_claims() or ()):
            raise SourceNotFound(
                f"{self._ident}: the claim {claim} is not mounted here; add it to the chart's value ray.sourceClaims"
            )
        root = Path(os.environ[FOLDER], claim).resolve()
        found = root / path
        if not found.resolve().is_relative_to(root):
            raise SourceInvalid(f"{self._ident}: leaves the claim {claim}; name a path on it")
        return found
