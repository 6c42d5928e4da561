"""A slice of a flattened tensor that torch's distributed checkpoint saves and loads whatever the plan.

Under uneven shares a worker holds any run of a parameter's numbers, also half a row. DTensor can not say that: its
placements derive sizes from a chunk rule. What the checkpoint needs is only where the slice begins in the whole, and it
asks for that through a protocol whose names begin with underscores (torch/distributed/_checkpointable.py): torch is
pinned, and a test saves under one plan and loads under another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Chunk(torch.Tensor):  # type: ignore[misc]  # mypy does not look into torch
    """A view of numbers `offset` to `offset + numel()` of a flattened tensor of `total` numbers.

    Loading writes into the memory of the view. Results of operations on it are plain tensors.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    offset: int
    """Where the slice begins in the flattened whole."""

    total: int
    """Numbers in the whole."""

    @staticmethod
    def make(view: torch.Tensor, offset: int, total: int) -> Chunk:
        """view: shape [numbers], contiguous; its memory is shared, not copied.

        Raises ValueError when it has another shape or does not lie inside the whole.
        """
        if view.ndim != 1 or not view.is_contiguous():
            raise ValueError(f"a chunk is a contiguous run of numbers, not {tuple(view.shape)}")
        if offset < 0 or offset + view.numel() > total:
            raise ValueError(f"numbers {offset} to {offset + view.numel()} do not lie in a whole of {total}")
        chunk: Chunk = torch.Tensor._make_subclass(Chunk, view.detach())
        chunk.offset, chunk.total = offset, total
        return chunk

    def plain(self) -> torch.Tensor:
        """The same memory as an ordinary tensor, shape [numbers]."""
        return self.as_subclass(torch.Tensor)

    def size(self, dim: int | None = None) -> Any:
        """The whole's size: the loader compares it with what is stored."""
        return torch.Size([self.total]) if dim is None else self.total

    def _place(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.offset]), torch.Size([self.numel()]))

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        """What is to be written under the name `fqn`: one shard."""
        data = TensorWriteData(
            chunk=self._place(),
            properties=TensorProperties.create_from_tensor(torch.empty(0, dtype=self.dtype)),
            size=torch.Size([self.total]),
        )
        index = MetadataIndex(fqn, torch.Size([self.offset]))
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Where this slice lies in the whole."""
        return [self._place()]

    def __get_tensor_shard__(self, _: MetadataIndex) -> torch.Tensor:
        """The memory that is read from, or loaded into."""
        return self.plain()
