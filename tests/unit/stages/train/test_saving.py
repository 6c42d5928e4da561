"""Checkpoints beside the steps: whole or absent whoever dies, raised alike on every worker, the same for every plan."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks
import s3_servers
import torch
from ranks import RankFailed, run_ranks
from slow_stores import TroubledStore, kill_at, nothing

import fastserve
from fastserve.artifacts import attempts
from fastserve.artifacts.folder_store import FolderStore
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.cluster.processes import free_port
from fastserve.errors import AttemptFenced, StoreFailed, StoreFull
from fastserve.plan.stages import Stage, StageRequest
from fastserve.stages.train import state
from fastserve.stages.train.chunk import Chunk
from fastserve.stages.train.group import Group
from fastserve.stages.train.saving import Saver
from fastserve.stages.train.state import RunState

KEY = "c" * 64
BASE = f"artifacts/train/{KEY}/checkpoints/"
SHAPES = {"embed.weight": (17, 6), "block.norm": (6,), "block.weight": (6, 5), "head.bias": (1,)}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made; empty again after every test that does not say otherwise."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def asked(attempt: int = 1) -> StageRequest:
    return StageRequest("m", Stage.TRAIN, KEY, attempt, {})


def whole(step: int = 0) -> dict[str, torch.Tensor]:
    """All state, in one dimension, after `step` steps."""
    numbers = itertools.count(1)
    return {
        f"{kind}.{name}": torch.arange(torch.Size(shape).numel(), dtype=torch.float32) + 1000 * next(numbers) + step / 8
        for kind in ("parameters", "exp_avg", "exp_avg_sq")
        for name, shape in SHAPES.items()
    }


def cut(tensors: dict[str, torch.Tensor], shares: Sequence[float], rank: int) -> dict[str, torch.Tensor]:
    """This rank's slices of one flat buffer a kind, cut by `shares`; what it has nothing of is absent."""
    found: dict[str, torch.Tensor] = {}
    for kind in ("parameters", "exp_avg", "exp_avg_sq"):
        mine = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{kind}.")}
        total = sum(tensor.numel() for tensor in mine.values())
        begin, end = (round(total * sum(shares[:place]) / sum(shares)) for place in (rank, rank + 1))
        at = 0
        for name, tensor in mine.items():
            first, last = max(begin - at, 0), min(end - at, tensor.numel())
            if first < last:
                found[name] = Chunk.make(tensor[first:last].clone(), first, tensor.numel())
            at += tensor.numel()
    return found


def run_of(step: int, **more: Any) -> RunState:
    print_ = state.fingerprint("t" * 64, {name: torch.empty(shape) for name, shape in SHAPES.items()})
    return RunState(
        step, [{"step": at + 1, "loss": 1.0} for at in range(step)], {"method": "full"}, fingerprint=print_, **more
    )


def saved_by(store: Store, shares: Sequence[float], step: int = 4, attempt: int = 1, **more: Any) -> None:
    """A rank's whole life: save once, wait."""
    group = Group.current()
    saver = Saver(store, asked(attempt), group, keep=2)
    try:
        saver.save(cut(whole(step), shares, group.rank), run_of(step, **more))
        saver.wait()
    finally:
        saver.close()


def loaded_by(store: Store, shares: Sequence[float], step: int = 4) -> tuple[bool, int]:
    """Whether this rank's slices are those that were saved, and how many files it fetched for them."""
    fetched: list[str] = []

    class Counted(FolderStore):
        def get_file(self, name: str, into: Path, sha256: str | None = None) -> Any:
            fetched.append(name)
            return super().get_file(name, into, sha256)

    rank = Group.current().rank
    wanted = cut(whole(step), shares, rank)
    empty = cut({name: torch.zeros_like(tensor) for name, tensor in whole().items()}, shares, rank)
    run = state.load(Counted(Path(store.uri.removeprefix("file://"))), asked(), step, empty)
    assert run == run_of(step)
    same = all(torch.equal(empty[name].plain(), tensor.plain()) for name, tensor in wanted.items())
    return same and empty.keys() == wanted.keys(), sum(name.endswith(".distcp") for name in fetched)


@pytest.fixture(scope="module")
def by_three(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A checkpoint that three ranks saved at shares 1:3:6."""
    store = open_store(str(tmp_path_factory.mktemp("by-three") / "store"))
    run_ranks(lambda: saved_by(store, [1, 3, 6]), 3)
    return store


@pytest.mark.parametrize("shares", [[5, 1, 1], [1, 3, 6], [0, 1, 1], [2, 1]])
def test_what_one_plan_saved_any_other_loads(by_three: Store, shares: list[float]) -> None:
    answers = run_ranks(lambda: loaded_by(by_three, shares), len(shares))
    assert all(same for same, _ in answers)
    if shares == [1, 3, 6]:
        assert [files for _, files in answers] == [1, 1, 1]
    if shares == [0, 1, 1]:
        assert answers[0][1] == 0


def test_one_process_loads_and_exports_what_three_saved(by_three: Store, tmp_path: Path) -> None:
    from fastserve.artifacts.checkpoints import fetch_checkpoint

    assert loaded_by(by_three, [1]) == (True, 3)
    folder = fetch_checkpoint(by_three, Stage.TRAIN, KEY, 4, tmp_path / "fetched")
    parameters = state.read_parameters(folder)
    assert {name: tuple(tensor.shape) for name, tensor in parameters.items()} == SHAPES
    for name, tensor in parameters.items():
        assert torch.equal(tensor.flatten(), whole(4)[f"parameters.{name}"])


def test_one_process_saves_what_two_load(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    saved_by(store, [1])
    assert all(same for same, _ in run_ranks(lambda: loaded_by(store, [1, 2]), 2))


def test_a_worker_without_a_share_of_the_state_saves_along(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    run_ranks(lambda: saved_by(store, [0, 1]), 2)
    assert loaded_by(store, [1])[0]


def test_the_state_goes_on_while_it_is_saved(tmp_path: Path) -> None:
    """save returns before anything is put, and what is changed afterwards is not in the checkpoint."""

    def life() -> None:
        returned = threading.Event()
        store = TroubledStore(tmp_path / "store", lambda name: raise_unless(returned.wait(100)))
        group = Group.current()
        saver = Saver(store, asked(), group, keep=1)
        tensors = cut(whole(4), [1, 2], group.rank)
        run = run_of(4)
        saver.save(tensors, run)
        returned.set()
        for tensor in tensors.values():
            tensor.plain().zero_()
        run.step, run.extra["late"] = 5, True
        run.curve.append({"step": 5, "loss": 0.0})
        saver.check()
        saver.wait()
        saver.close()

    run_ranks(life, 2)
    assert loaded_by(open_store(str(tmp_path / "store")), [1])[0]


def test_the_newest_and_the_best_are_kept_and_buffers_are_used_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    saver = Saver(store, asked(), Group(), keep=2)
    pointers = []
    for step in range(1, 6):
        saver.save(cut(whole(step), [1], 0), run_of(step, best_step=2, best_loss=0.5))
        pointers.append({name: tensor.data_ptr() for name, tensor in saver._buffers.items()})
    saver.wait()
    saver.close()
    assert pointers[0] == pointers[-1]
    assert sorted({int(name.removeprefix(BASE).split("/")[0]) for name in store.names(BASE)}) == [2, 4, 5]
    assert state.newest(store, asked()) == 5
    assert state.newest(store, asked(), below=4) == 2


def test_three_ranks_save_to_a_bucket_and_two_load(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_servers.moto_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        uri = server.make_bucket("training")
        run_ranks(lambda: saved_by(open_store(uri), [1, 3, 6]), 3)
        assert all(run_ranks(lambda: loaded_from_bucket(uri), 2))
        assert len(open_store(uri).names(BASE)) == 3 + 3  # a file a rank; marker, metadata, facts


def loaded_from_bucket(uri: str) -> bool:
    rank, shares = Group.current().rank, [2, 1]
    into = cut({name: torch.zeros_like(tensor) for name, tensor in whole().items()}, shares, rank)
    state.load(open_store(uri), asked(), 4, into)
    return all(torch.equal(into[name].plain(), tensor.plain()) for name, tensor in cut(whole(4), shares, rank).items())


TROUBLES = {
    StoreFull: lambda name: raise_(StoreFull("no space left; free space")),
    StoreFailed: lambda name: raise_(StoreFailed("the line is cut; look at it")),
}


def raise_unless(true: bool) -> None:
    if not true:
        raise StoreFailed("save waits for the store")


def raise_(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("kind", [StoreFull, StoreFailed])
@pytest.mark.parametrize("on_rank", [0, 1])
def test_what_goes_wrong_on_one_worker_is_raised_alike_on_all(
    tmp_path: Path, kind: type[StoreFailed], on_rank: int
) -> None:
    def life() -> list[Any]:
        group = Group.current()
        trouble = TROUBLES[kind] if group.rank == on_rank else nothing
        store = TroubledStore(tmp_path / "store", trouble)
        saver = Saver(store, asked(), group, keep=1)
        tensors = cut(whole(1), [1, 1], group.rank)
        saver.save(tensors, run_of(1))
        seen: list[Any] = []
        end = time.monotonic() + 100
        while not seen and time.monotonic() < end:
            try:
                saver.check()
            except StoreFailed as error:
                seen += [type(error), str(error)]
        store.trouble = nothing
        saver.save(tensors, run_of(1))
        saver.wait()
        saver.close()
        return seen

    first, second = run_ranks(life, 2)
    assert first == second
    assert first[0] is kind
    assert first[1].endswith(("free space", "look at it"))
    store = open_store(str(tmp_path / "store"))
    assert state.newest(store, asked()) == 1
    assert len({name.split("/")[5] for name in store.names(BASE)}) == 2  # the marker and one upload


@pytest.fixture
def disk(tmp_path: Path, missing: Callable[[str], None]) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    with contextlib.ExitStack() as held:
        try:
            folder = held.enter_context(s3_servers.tiny_disk(tmp_path / "disk"))
        except RuntimeError as error:
            missing(str(error))
            raise
        yield folder


def test_a_full_disk_of_one_worker_stops_all_with_the_store_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Path
) -> None:
    """The worker's slices go through a folder of its own machine."""
    store = open_store(str(tmp_path / "store"))
    saved_by(store, [1], step=2)

    def life() -> str:
        group = Group.current()
        saver = Saver(store, asked(), group, keep=1)
        if group.rank:
            monkeypatch.setattr(tempfile, "tempdir", str(disk))
        large = torch.ones(1_500_000)
        saver.save({"parameters.a": Chunk.make(large, group.rank * len(large), 2 * len(large))}, run_of(4))
        with pytest.raises(StoreFull) as caught:
            saver.wait()
        saver.close()
        return str(caught.value)

    said = run_ranks(life, 2)
    assert said[0] == said[1]
    assert "of worker 1" in said[0]
    assert "TMPDIR" in said[0]
    assert list(disk.glob("fastserve-*")) == []
    assert {name.removeprefix(BASE).split("/")[0] for name in store.names(BASE)} == {"2"}


def test_of_two_runs_at_one_output_the_older_ends_at_its_next_checkpoint_and_changes_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    attempts.claim(store, asked(1))

    def older() -> str:
        group = Group.current()
        saver = Saver(store, asked(1), group, keep=1)
        saver.save(cut(whole(2), [1, 2], group.rank), run_of(2))
        saver.wait()
        if group.rank == 0:
            attempts.claim(store, asked(2))
        group.number_from_first(0)
        saver.save(cut(whole(4), [1, 2], group.rank), run_of(4))
        try:
            saver.wait()
        except AttemptFenced as error:
            return str(error)
        finally:
            saver.close()
        return ""

    said = run_ranks(older, 2)
    assert said[0] == said[1]
    assert "attempt 2 is claimed" in said[0]
    assert [name.removeprefix(BASE).split("/")[0] for name in store.names(BASE)] == ["2"] * 5
    saved_by(store, [1], step=4, attempt=2)
    assert state.newest(store, asked(2)) == 4


def test_a_run_that_is_fenced_while_it_uploads_leaves_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    attempts.claim(store, asked(1))
    saved_by(store, [1], step=2)

    def overtake(name: str) -> None:
        if name.endswith(".metadata"):
            attempts.claim(store, asked(2))

    with pytest.raises(AttemptFenced):
        saved_by(TroubledStore(tmp_path / "store", overtake), [1], step=4)
    assert {name.removeprefix(BASE).split("/")[0] for name in store.names(BASE)} == {"2"}


DEATHS = [
    (1, kill_at("__1_0.distcp"), nothing, 2),
    (1, nothing, kill_at("__1_0.distcp"), 2),
    (0, kill_at(".metadata"), nothing, 2),
    (0, kill_at("checkpoint.json"), nothing, 2),
    (0, nothing, kill_at("checkpoint.json"), 4),
]


@pytest.mark.parametrize(("rank", "before", "after", "newest"), DEATHS)
def test_a_worker_killed_in_the_middle_of_a_save_leaves_nothing_torn(
    tmp_path: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    before: Callable[[str], None],
    after: Callable[[str], None],
    newest: int,
) -> None:
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 20.0)
    store = open_store(str(tmp_path / "store"))
    saved_by(store, [1], step=2)

    def life() -> None:
        mine = Group.current().rank == rank
        place = TroubledStore(tmp_path / "store", before, after) if mine else store
        try:
            saved_by(place, [1, 2], step=4)
        except StoreFailed as error:
            (tmp_path / "seen").write_text(str(error))

    with pytest.raises(RankFailed, match="died without an answer"):
        run_ranks(life, 2)
    assert "a worker was lost while the checkpoint of step 4" in (tmp_path / "seen").read_text()
    assert state.newest(store, asked()) == newest
    assert loaded_by(store, [1], step=newest)[0]
    assert len(list(temporary.iterdir())) == 0 if newest == 4 else len(list(temporary.iterdir())) <= 1
    # The next group goes on, and its first checkpoint sweeps up.
    for step in (4, 6):
        run_ranks(lambda step=step: saved_by(store, [2, 1], step=step), 2)
    uploads = {tuple(name.removeprefix(BASE).split("/")[:2]) for name in store.names(BASE)}
    assert sorted(step for step, name in uploads if name != "checkpoint.json") == ["4", "6"]
    assert list(temporary.iterdir()) == []


def test_a_save_that_never_ends_is_given_up(tmp_path: Path) -> None:
    def life() -> str:
        group = Group.current()
        sleepy = TroubledStore(tmp_path / "store", lambda name: time.sleep(30 if group.rank else 0))
        saver = Saver(sleepy, asked(), group, keep=1, patience_seconds=1.0)
        saver.save(cut(whole(2), [1, 2], group.rank), run_of(2))
        try:
            saver.wait()
        except StoreFailed as error:
            return str(error)
        return ""

    assert all(run_ranks(life, 2))
    assert state.newest(open_store(str(tmp_path / "store")), asked()) == 0


HANGS = """
import itertools, json, os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from slow_stores import TroubledStore
from fastserve.plan.stages import Stage, StageRequest
from fastserve.stages.train.group import Group
from fastserve.stages.train.saving import Saver
from fastserve.stages.train.state import RunState
folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
pids, mine = {}, None
for case, rank in itertools.product(cases, (0, 1)):  # forked, so that all this is imported once
    pid = os.fork()
    if not pid:
        mine = case, rank
        break
    pids[case, rank] = pid
if mine:
    case, rank = mine
    first, last, port = cases[case]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the parent's is read to its end
    os.dup2(os.open(folder / f"{case}.{rank}.errors", os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(RANK=str(rank), MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    store = TroubledStore(folder / case, lambda name: time.sleep(0 if rank else 600))
    saver = Saver(store, StageRequest("m", Stage.TRAIN, "c" * 64, 1, {}), Group.current(), 1)
    saver.save({"parameters.a": torch.ones(3)}, RunState(1))
    if rank != first:
        time.sleep(600)
    time.sleep(1)
    if last == "close":
        saver.close()
    (folder / f"{case}.end").write_text(str(time.time()))
else:
    for case, (first, _, _) in cases.items():
        while not (found := os.waitpid(pids[case, first], os.WNOHANG))[0]:
            time.sleep(0.02)
        took = time.time() - float((folder / f"{case}.end").read_text())
        print(json.dumps([case, os.waitstatus_to_exitcode(found[1]), took]), flush=True)
"""


def test_a_save_under_way_does_not_hold_up_the_end_of_the_process(tmp_path: Path) -> None:
    """Rank 0's thread is in the store, which takes for ever; that of rank 1 waits for it in a collective. Each case is
    who ends first, and how."""
    cases = {f"{first} {last}": (first, last, free_port()) for first, last in ((0, "drop"), (1, "close"), (1, "drop"))}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(fastserve.__file__).parents[1]), str(Path(ranks.__file__).parent)]),
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path),
    }
    parent = subprocess.Popen(
        [sys.executable, "-c", HANGS, str(tmp_path), json.dumps(cases)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = parent.communicate(timeout=180)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()
    told = [json.loads(line) for line in output.splitlines()]
    assert [case for case, _, _ in told] == [*cases], errors
    for case, code, took_seconds in told:
        assert code == 0, (tmp_path / f"{case}.{cases[case][0]}.errors").read_text()
        assert took_seconds < 20, case  # the store would take 600
