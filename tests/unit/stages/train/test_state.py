"""State at rest: the same run under any plan, and a refusal with names where it is another run's."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine_models as tiny
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from fastserve.artifacts.checkpoints import fetch_checkpoint, put_checkpoint
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.errors import DigestMismatch, StageFailed
from fastserve.plan.stages import Stage, StageRequest
from fastserve.stages.train import state
from fastserve.stages.train.fsdp2 import Fsdp2
from fastserve.stages.train.group import Group
from fastserve.stages.train.network import Network
from fastserve.stages.train.saving import Saver
from fastserve.stages.train.shard import Sharded
from fastserve.stages.train.state import RunState

REQUEST = StageRequest("m", Stage.TRAIN, "d" * 64, 1, {})
BATCH = 9
SAVED_AT, STEPS = 3, 4
PLANS = {
    "3 ranks 5:1:1": ([5, 1, 1], (2, 3, 4)),
    "3 ranks 0:1:3": ([0, 1, 3], (1, 4, 4)),
    "2 ranks": ([1, 2], (4, 5)),
    "1 rank": ([1], (9,)),
}


def step(engine: Any, at: int, counts: Sequence[int]) -> float:
    """The optimizer step after `at` steps; returns the mean loss of the whole batch."""
    batch = tiny.samples(BATCH, seed=100 + at)
    group = Group.current()
    engine.clear()
    loss = tiny.accumulate(engine, tiny.micro_batches(batch, [counts], group.rank))
    engine.scale(1 / tiny.trained_tokens(batch))
    engine.step(1e-3, 1.0)
    return sum(row[0] for row in group.gather_numbers([loss])) / tiny.trained_tokens(batch)


def first_part(
    store: Store, build: Callable[[], Network], shares: Sequence[float], counts: Sequence[int], kind: Any = Sharded
) -> list[float]:
    """Steps, a checkpoint, and the losses of the steps after it, undisturbed."""
    network, group = build(), Group.current()
    run = RunState(SAVED_AT, fingerprint=state.fingerprint("t", network.trained), loss_scale=8.0, extra={"seen": [1]})
    engine = kind(network, shares, group)
    for at in range(SAVED_AT):
        step(engine, at, counts)
    saver = Saver(store, REQUEST, group, keep=1)
    saver.save(engine.state(), run)
    losses = [step(engine, at, counts) for at in range(SAVED_AT, SAVED_AT + STEPS)]
    saver.wait()
    saver.close()
    return losses


def second_part(
    store: Store, build: Callable[[], Network], shares: Sequence[float], counts: Sequence[int], kind: Any = Sharded
) -> list[float]:
    """The steps after the checkpoint, under another plan."""
    network = build()
    with torch.no_grad():
        for parameter in network.trained.values():
            parameter.zero_()  # all that counts comes from the checkpoint
    mine = state.fingerprint("t", network.trained)
    engine = kind(network, shares, Group.current())
    run = state.load(store, REQUEST, SAVED_AT, engine.state(), fingerprint=mine)
    assert (run.step, run.loss_scale, run.extra) == (SAVED_AT, 8.0, {"seen": [1]})
    engine.resume(run.step)
    return [step(engine, at, counts) for at in range(SAVED_AT, SAVED_AT + STEPS)]


@pytest.fixture(scope="module", params=["full", "lora"])
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(store, network, losses that follow): saved in the background while the run went on."""
    build = {"full": lambda: tiny.full("llama-tied"), "lora": tiny.lora}[request.param]
    store = open_store(str(tmp_path_factory.mktemp("begun") / "store"))
    return store, build, run_ranks(lambda: first_part(store, build, [1, 3, 6], (1, 3, 5)), 3)[0]


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_goes_on_under_another_plan_as_if_nothing_had_happened(begun: Any, plan: str) -> None:
    store, build, wanted = begun
    shares, counts = PLANS[plan]
    for losses in run_ranks(lambda: second_part(store, build, shares, counts), len(shares)):
        assert losses == pytest.approx(wanted, rel=6e-7)


def test_the_parameters_for_the_export_are_those_of_the_checkpoint(begun: Any, tmp_path: Path) -> None:
    store, build, _ = begun
    folder = fetch_checkpoint(store, Stage.TRAIN, REQUEST.key, SAVED_AT, tmp_path / "fetched")
    parameters = state.read_parameters(folder)
    shapes = {name: parameter.shape for name, parameter in build().trained.items()}
    assert {name: tensor.shape for name, tensor in parameters.items()} == shapes
    assert {tensor.dtype for tensor in parameters.values()} == {torch.float32}


@pytest.mark.parametrize(("before", "after"), [(Fsdp2, Sharded), (Sharded, Fsdp2)])
def test_each_engine_goes_on_from_the_others_checkpoint(store: Store, before: Any, after: Any) -> None:
    def build() -> Network:
        return tiny.full("llama-tied")

    def first() -> list[float]:
        return first_part(store, build, [1, 1], (4, 5), before)

    wanted = run_ranks(first, 2)[0]
    for losses in run_ranks(lambda: second_part(store, build, [1, 1], (5, 4), after), 2):
        assert losses == pytest.approx(wanted, rel=6e-7)


def alone(store: Store, run: RunState, **tensors: torch.Tensor) -> None:
    saver = Saver(store, REQUEST, Group(), keep=1)
    saver.save({f"parameters.{name}": tensor for name, tensor in tensors.items()}, run)
    saver.wait()
    saver.close()


@pytest.mark.parametrize(
    ("tokenizer", "shape", "said"),
    [
        (
            "other",
            (2, 3),
            r"resuming with another tokenizer: the checkpoint of step 5 .*tokenizer\.json same….*begin afresh",
        ),
        (
            "same",
            (3, 3),
            r"resuming another model: 1 trained tensors differ .*; a has shape \[2, 3\] there and \[3, 3\] now",
        ),
    ],
)
def test_another_runs_state_is_refused_by_what_differs(
    store: Store, tokenizer: str, shape: tuple[int, ...], said: str
) -> None:
    alone(store, RunState(5, fingerprint=state.fingerprint("same", {"a": torch.ones(2, 3)})), a=torch.ones(2, 3))
    now = {"parameters.a": torch.empty(shape)}
    with pytest.raises(StageFailed, match=said):
        state.load(store, REQUEST, 5, now, fingerprint=state.fingerprint(tokenizer, {"a": torch.empty(shape)}))


def test_a_tensor_that_is_gone_is_named(store: Store) -> None:
    alone(store, RunState(1, fingerprint=state.fingerprint("t", {"a": torch.ones(2)})), a=torch.ones(2))
    with pytest.raises(StageFailed, match=r"b has shape none there and \[1\] now"):
        state.load(store, REQUEST, 1, {}, fingerprint=state.fingerprint("t", {"a": torch.ones(2), "b": torch.ones(1)}))


def test_another_format_is_refused_with_what_to_do(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    (folder / state.TENSORS).mkdir(parents=True)
    (folder / state.TENSORS / ".metadata").write_bytes(b"")
    (folder / state.FACTS).write_text(json.dumps({"format": 1, "step": 3, "curve": [], "export": {}}))
    put_checkpoint(store, REQUEST.stage, REQUEST.key, 3, folder, 1)
    with pytest.raises(StageFailed, match=r"format 1, this version reads 2; change anything under spec\.train"):
        state.load(store, REQUEST, 3, {})


def test_all_that_a_run_keeps_comes_back(store: Store) -> None:
    run = RunState(
        step=2,
        curve=[{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.25, "note": 'a "ü"\n'}],
        export={"method": "full"},
        best_step=1,
        best_loss=2.5,
        loss_scale=1024.0,
        extra={"patience": 3},
        fingerprint=state.fingerprint("t", {"a": torch.ones(2, 2)}),
    )
    alone(store, run, a=torch.ones(2, 2))
    into = torch.zeros(2, 2)
    assert state.load(store, REQUEST, 2, {"parameters.a": into}) == run
    assert into.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    alone(store, replace(run, step=3, curve=[]), a=torch.ones(2, 2))
    assert state.load(store, REQUEST, 3, {"parameters.a": into}).curve == []


def test_a_damaged_checkpoint_is_named_once_and_then_passed_over(store: Store) -> None:
    for at in (1, 2):
        saver = Saver(store, REQUEST, Group(), keep=2)
        saver.save({"parameters.a": torch.full((2,), float(at))}, RunState(at))
        saver.wait()
        saver.close()
    victim = next(name for name in store.names("artifacts/") if "/2/" in name and name.endswith(".distcp"))
    store.write(victim, store.read(victim)[:-1] + b"?")
    into = torch.zeros(2)
    with pytest.raises(DigestMismatch, match="distcp is damaged"):
        state.load(store, REQUEST, state.newest(store, REQUEST), {"parameters.a": into})
    assert state.newest(store, REQUEST) == 1
    assert state.load(store, REQUEST, 1, {"parameters.a": into}).step == 1
    assert into.tolist() == [1.0, 1.0]


def test_the_tokenizers_digest_is_that_of_its_file(tiny_model: Path, tmp_path: Path) -> None:
    before = state.tokenizer_digest(tiny_model)
    (tmp_path / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes() + b"\n")
    assert before != state.tokenizer_digest(tmp_path)


def test_loading_leaves_no_folder_behind(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    alone(store, RunState(1, fingerprint=state.fingerprint("t", {"a": torch.ones(2)})), a=torch.ones(2))
    state.load(store, REQUEST, 1, {"parameters.a": torch.zeros(2)})
    with pytest.raises(StageFailed):
        state.load(store, REQUEST, 1, {}, fingerprint=state.fingerprint("other", {}))
    assert list(place.iterdir()) == []
    assert not dist.is_initialized()
