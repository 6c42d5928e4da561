"""The checkpoint's protocol, whose names begin with underscores: saved under one plan, loaded under another."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks

from fastserve.stages.train.chunk import Chunk

WHOLE = torch.arange(60, dtype=torch.float32)


def cuts(*sizes: int) -> list[slice]:
    begins = [sum(sizes[:rank]) for rank in range(len(sizes))]
    return [slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True)]


def test_saved_by_three_unequal_ranks_and_loaded_by_others(tmp_path: Path) -> None:
    def save() -> None:
        span = cuts(6, 18, 36)[dist.get_rank()]
        dcp.save({"w": Chunk.make(WHOLE[span].clone(), span.start, 60)}, checkpoint_id=tmp_path)

    def load() -> list[float]:
        span = cuts(50, 0, 10)[dist.get_rank()]
        mine = torch.full((60,), -1.0)[span].clone()
        state = {"w": Chunk.make(mine, span.start, 60)} if mine.numel() else {}
        dcp.load(state, checkpoint_id=tmp_path)
        return mine.tolist()

    run_ranks(save, 3)
    assert [number for part in run_ranks(load, 3) for number in part] == WHOLE.tolist()


def test_a_whole_tensor_reads_what_chunks_have_written(tmp_path: Path) -> None:
    def save() -> None:
        span = cuts(0, 45, 15)[dist.get_rank()]
        mine = WHOLE[span].clone()
        dcp.save({"w": Chunk.make(mine, span.start, 60)} if mine.numel() else {}, checkpoint_id=tmp_path)

    run_ranks(save, 3)
    whole = {"w": torch.empty(60)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(whole, checkpoint_id=tmp_path)
    assert torch.equal(whole["w"], WHOLE)


def test_torch_still_asks_through_the_names_that_we_answer_to() -> None:
    from torch.distributed._checkpointable import _Checkpointable

    asked = {name for name, _ in inspect.getmembers(_Checkpointable, inspect.isfunction) if name.endswith("__")}
    ours = {"__create_write_items__", "__create_chunk_list__", "__get_tensor_shard__"}
    assert ours <= asked
    assert isinstance(Chunk.make(WHOLE, 0, 60), _Checkpointable)


def test_a_chunk_shares_its_memory_and_says_the_size_of_the_whole() -> None:
    memory = torch.zeros(4)
    chunk = Chunk.make(memory[1:3], 10, 99)
    chunk.plain().fill_(7)
    assert memory.tolist() == [0, 7, 7, 0]
    assert (chunk.offset, chunk.total, chunk.size(), chunk.numel()) == (10, 99, torch.Size([99]), 2)
    assert type(chunk + 1) is torch.Tensor


@pytest.mark.parametrize(("view", "offset"), [(torch.zeros(2, 2), 0), (torch.zeros(8)[::2], 0), (torch.zeros(4), 7)])
def test_what_is_no_run_of_the_whole_is_refused(view: torch.Tensor, offset: int) -> None:
    with pytest.raises(ValueError, match=r"whole|contiguous"):
        Chunk.make(view, offset, 10)
