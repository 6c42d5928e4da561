"""The samples as flat arrays that all workers of a machine read from the same pages, and the tensors made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from fastserve.data.samples import Sample
from fastserve.stages.train.division import packed_rows


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Samples below one another, filled up at the right, or packed behind one another in a few rows.

    Neither needs a mask: a token never looks at what follows it, and where positions begin anew, transformers keeps it
    from what stands before (`masking_utils.find_packed_sequence_indices`).
    """

    ids_BL: torch.Tensor  # noqa: N815 - shape-suffixed: B samples of at most L tokens
    """Token ids, int64, shape [samples, longest], or [rows, longest row] when packed."""

    predicts_K: torch.Tensor  # noqa: N815
    """Places in the flattened rectangle whose next token is trained, int64, shape [trained tokens]."""

    targets_K: torch.Tensor  # noqa: N815
    """Those next tokens, int64, shape [trained tokens]."""

    positions_BL: torch.Tensor | None = None  # noqa: N815
    """Place of each token within its sample, int64, the shape of `ids_BL`; only when packed."""

    mask: torch.Tensor | None = None
    """Always None: the architectures that may be packed make the right mask of the positions alone."""

    def to(self, device: torch.device) -> Rectangle:
        """The same on `device`; itself when it lies there already."""
        if self.ids_BL.device == device:
            return self
        tensors = (self.ids_BL, self.predicts_K, self.targets_K, self.positions_BL, self.mask)
        return Rectangle(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors))


@dataclass(frozen=True)
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

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each sample, shape [samples]."""
        lengths = np.empty(len(self.starts) - 1, np.int32)
        np.subtract(self.starts[1:], self.starts[:-1], out=lengths, casting="unsafe")
        return lengths

    def tokens(self, samples: Sequence[int]) -> int:
        """Tokens of `samples` together."""
        return int(self.lengths[np.asarray(samples, np.int64)].sum(dtype=np.int64))

    def trained_tokens(self, samples: Sequence[int]) -> int:
        """Trained tokens of `samples` together."""
        return sum(int(np.count_nonzero(self.trained[self._span(sample)])) for sample in samples)

    def rectangle(self, samples: Sequence[int]) -> Rectangle:
        """`samples` below one another."""
        ids = np.zeros((len(samples), int(self.lengths[np.asarray(samples)].max())), np.int64)
        trained = np.zeros_like(ids, np.bool_)
        for row, sample in enumerate(samples):
            span = self._span(sample)
            ids[row, : span.stop - span.start] = self.ids[span]
            trained[row, : span.stop - span.start] = self.trained[span]
        trained[:, 0] = False  # nothing precedes it that could predict it
        return _rectangle(ids, trained)

    def packed(self, samples: Sequence[int]) -> Rectangle:
        """`samples` behind one another in a few rows of about equal length; positions begin anew with each.

        Exact for the architectures that `packing.require_packable` lets through, with sdpa and eager attention.
        """
        lengths = self.lengths[np.asarray(samples)].tolist()
        rows = packed_rows(lengths)
        ids = np.zeros((len(rows), max(sum(lengths[place] for place in row) for row in rows)), np.int64)
        trained = np.zeros_like(ids, np.bool_)
        positions = np.zeros_like(ids)
        for row, places in enumerate(rows):
            begin = 0
            for place in places:
                span, end = self._span(samples[place]), begin + lengths[place]
                ids[row, begin:end] = self.ids[span]
                trained[row, begin:end] = self.trained[span]
                positions[row, begin:end] = np.arange(end - begin)
                begin = end
            positions[row, begin:] = np.arange(ids.shape[1] - begin)  # what fills the row up is a sample of its own
        trained[positions == 0] = False
        return _rectangle(ids, trained, torch.from_numpy(positions))

    def _span(self, sample: int) -> slice:
        return slice(int(self.starts[sample]), int(self.starts[sample + 1]))


def _rectangle(
    ids: npt.NDArray[np.int64], trained: npt.NDArray[np.bool_], positions: torch.Tensor | None = None
) -> Rectangle:
    places = np.flatnonzero(trained)
    return Rectangle(
        ids_BL=torch.from_numpy(ids),
        predicts_K=torch.from_numpy(places - 1),
        targets_K=torch.from_numpy(ids.reshape(-1)[places]),
        positions_BL=positions,
    )
