"""The workers of a run, and the few things they say to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Group:
    """A worker's place among all workers; with one worker nothing is sent."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    """Where this worker computes, and where what it sends has to lie."""

    @classmethod
    def current(cls, device: torch.device = CPU) -> Group:
        """The group that Ray Train has set up for this process, or a group of one."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(device=device)
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), device=device)

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace `tensor`, in place, by its sum over all workers."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)

    def from_first(self, tensor: torch.Tensor) -> None:
        """Replace `tensor`, in place, by the first worker's."""
        self.from_rank(0, tensor)

    def from_rank(self, rank: int, tensor: torch.Tensor) -> None:
        """Replace `tensor`, in place, by that of the worker `rank`."""
        if self.size > 1:
            dist.broadcast(tensor, src=rank)

    def number_from_first(self, number: int) -> int:
        """The first worker's `number`."""
        tensor = torch.tensor([number], dtype=torch.int64, device=self.device)
        self.from_first(tensor)
        return int(tensor.item())

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Every worker's `values`, by rank, shape [size][values]; the same on all."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size == 1:
            return [mine.tolist()]
        told = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(told, mine)
        return [numbers.tolist() for numbers in told]
