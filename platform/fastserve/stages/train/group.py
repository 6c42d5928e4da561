"""The workers of a run, and the three things they say to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Group:
    """A worker's place among all workers; with one worker nothing is sent."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Group:
        """The group that Ray Train has set up for this process, or a group of one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(rank=dist.get_rank(), size=dist.get_world_size())

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace `tensor`, in place, by its sum over all workers."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)

    def from_first(self, tensor: torch.Tensor) -> None:
        """Replace `tensor`, in place, by the first worker's."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def number_from_first(self, number: int) -> int:
        """The first worker's `number`."""
        tensor = torch.tensor([number], dtype=torch.int64)
        self.from_first(tensor)
        return int(tensor.item())
