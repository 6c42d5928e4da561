"""The samples as three flat arrays, which Ray shares between the workers of a machine without copying them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fastserve.data.samples import Sample


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Samples below one another, filled up at the right. No mask: a token never looks at what follows it."""

    ids_BL: torch.Tensor  # noqa: N815 - shape-suffixed: B samples of at most L tokens
    """Token ids, int64, shape [samples, longest]."""

    predicts_K: torch.Tensor  # noqa: N815
    """Places in the flattened rectangle whose next token is trained, int64, shape [trained tokens]."""

    targets_K: torch.Tensor  # noqa: N815
    """Those next tokens, int64, shape [trained tokens]."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids of all samples, which of them are trained, and where each sample begins."""

    ids: npt.NDArray[np.int32]
    """Shape [tokens of all samples]."""

    trained: npt.NDArray[np.bool_]
    """Shape [tokens of all samples]."""

    starts: npt.NDArray[np.int64]
    """Shape [samples + 1]; the last entry is the number of tokens."""

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Corpus:
        """The arrays of `samples`, in their order."""
        lengths = [len(sample.ids) for sample in samples]
        return cls(
            ids=np.fromiter((token for sample in samples for token in sample.ids), np.int32, sum(lengths)),
            trained=np.fromiter((flag for sample in samples for flag in sample.trained), np.bool_, sum(lengths)),
            starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(lengths, np.int64))]),
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, shape [samples]."""
        return [int(length) for length in np.diff(self.starts)]

    def trained_tokens(self, samples: Sequence[int]) -> int:
        """Trained tokens of `samples` together."""
        return sum(int(self.trained[self.starts[i] : self.starts[i + 1]].sum()) for i in samples)

    def rectangle(self, samples: Sequence[int]) -> Rectangle:
        """`samples` below one another."""
        lengths = [int(self.starts[i + 1] - self.starts[i]) for i in samples]
        ids = np.zeros((len(samples), max(lengths)), np.int64)
        trained = np.zeros_like(ids, np.bool_)
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            span = slice(int(self.starts[sample]), int(self.starts[sample]) + length)
            ids[row, :length] = self.ids[span]
            trained[row, :length] = self.trained[span]
        trained[:, 0] = False  # nothing precedes it that could predict it
        places = np.flatnonzero(trained)
        return Rectangle(
            ids_BL=torch.from_numpy(ids),
            predicts_K=torch.from_numpy(places - 1),
            targets_K=torch.from_numpy(ids.reshape(-1)[places]),
        )
