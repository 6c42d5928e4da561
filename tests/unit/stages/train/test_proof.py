"""The proof before the first step: right gradients pass, wrong ones and unequal collectives stop the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from fastserve.errors import StageFailed
from fastserve.plan.shares import SharePlan, WorkerFacts, plan_shares
from fastserve.spec.train import Train
from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.engine import Engine, make_engine
from fastserve.stages.train.group import CPU, Group
from fastserve.stages.train.loading import load_network
from fastserve.stages.train.network import DTYPES, Network
from fastserve.stages.train.proof import Proof, Reference, SomeBlocks, WholeModel, prove, relative_error
from fastserve.stages.train.start import rectangle
from fastserve.stages.train.task import Task

NewTask = Callable[..., Task]
SAMPLES = ([0, 3], [5], [7, 1, 2])


def section(**changed: Any) -> Train:
    return Train.model_validate({"dataset": "rows.jsonl", "precision": "fp32", "method": "full", **changed})


def plan_of(task: Task, speeds: list[float]) -> SharePlan:
    workers = [WorkerFacts(f"rank-{rank}", "local", speed, 1 << 40) for rank, speed in enumerate(speeds)]
    return plan_shares(workers, task.facts, task.train.batch_tokens)


def reference(
    kind: str, network: Network, corpus: Corpus, samples: list[list[int]], group: Group, train: Train
) -> Reference:
    rectangles = [rectangle(corpus, part, False, CPU) if part else None for part in samples]
    dtype = DTYPES[train.precision]
    if kind == "blocks":
        return SomeBlocks(network, rectangles, group, train.precision, dtype)
    everything = [rectangle(corpus, [sample for part in samples for sample in part], False, CPU)]
    alone = everything if train.precision == "fp32" else rectangles
    return WholeModel(network, rectangles, group, train.precision, dtype, alone, judge=1 % group.size)


def proved(
    kind: str,
    task: Task,
    model: Path,
    corpus: Corpus,
    samples: tuple[list[int], ...] = SAMPLES,
    spoil: Callable[[Engine, Group], None] = lambda engine, group: None,
) -> Callable[[], Any]:
    """What a rank does: prove with shares 1:3:6, and look whether anything was touched."""

    def rank() -> Any:
        group = Group.current()
        train = task.train
        network = load_network(model, train, task.longest)
        held = reference(kind, network, corpus, [list(part) for part in samples[: group.size]], group, train)
        engine = make_engine(network, train, plan_of(task, [1.0, 3.0, 6.0][: group.size]), group)
        spoil(engine, group)
        before = {name: chunk.plain().clone() for name, chunk in engine.state().items()}
        try:
            found: Any = prove(held, engine)
        except StageFailed as error:
            found = str(error)
        after = {name: chunk.plain() for name, chunk in engine.state().items()}
        same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        training = all(module.training for module in engine.model.modules())
        return found, same, training, float(engine.norm())

    return rank


@pytest.mark.parametrize("kind", ["model", "blocks"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_engines_gradient_is_the_gradient_on_unequal_shares(
    tiny_model: Path, corpus: Corpus, new_task: NewTask, kind: str, method: str
) -> None:
    task = new_task(method=method)
    for found, same, training, norm in run_ranks(proved(kind, task, tiny_model, corpus), 3):
        assert isinstance(found, Proof), found
        assert found.scope == kind
        assert found.tolerance == 1e-5
        assert 0 < found.gradient_error <= 2e-6
        assert found.collectives > 0
        assert set(found.to_json()) == {"gradientError", "tolerance", "scope", "collectives"}
        assert same, "parameters and moments are as they were"
        assert training
        assert norm == 0, "nothing is left for the first step"


@pytest.mark.parametrize("kind", ["model", "blocks"])
def test_a_rank_without_samples_takes_part(tiny_model: Path, corpus: Corpus, new_task: NewTask, kind: str) -> None:
    task = new_task(method="full")
    for found, _, _, _ in run_ranks(proved(kind, task, tiny_model, corpus, ([0, 3], [], [7])), 3):
        assert isinstance(found, Proof), found
        assert found.gradient_error <= 2e-6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_halved_precisions_have_their_own_tolerance(
    tiny_model: Path, corpus: Corpus, new_task: NewTask, precision: str
) -> None:
    task = new_task(method="full", precision=precision)
    for found, _, _, _ in run_ranks(proved("model", task, tiny_model, corpus), 2):
        assert isinstance(found, Proof), found
        assert found.gradient_error <= 1e-2 < found.tolerance


def test_one_worker_proves_itself_too(tiny_model: Path, corpus: Corpus, new_task: NewTask) -> None:
    found, same, _, _ = proved("model", new_task(method="full"), tiny_model, corpus)()
    assert isinstance(found, Proof)
    assert found.gradient_error <= 2e-6
    assert found.collectives == 0
    assert same


def louder(engine: Engine, group: Group) -> None:
    """Rank 1 counts its samples for a thousandth more: the kind of error that no loss curve shows."""
    if group.rank == 1:
        backward = engine.backward
        engine.backward = lambda loss: backward(loss * 1.001)  # type: ignore[method-assign]


def test_a_gradient_that_is_a_thousandth_off_stops_the_run_on_every_rank(
    tiny_model: Path, corpus: Corpus, new_task: NewTask
) -> None:
    for found, same, _, _ in run_ranks(proved("model", new_task(method="full"), tiny_model, corpus, spoil=louder), 3):
        assert "differs from the unsharded one by" in found
        assert "above 1e-05 in fp32" in found
        assert same


def forgetful(engine: Engine, group: Group) -> None:
    """The last rank loses a number of its slice."""
    if group.rank == group.size - 1:
        backward = engine.backward

        def lossy(loss: torch.Tensor) -> None:
            backward(loss)
            for chunk in engine.gradients().values():
                chunk.plain()[0] = 0.0

        engine.backward = lossy  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["model", "blocks"])
def test_a_lost_number_of_a_slice_is_found(tiny_model: Path, corpus: Corpus, new_task: NewTask, kind: str) -> None:
    for found, _, _, _ in run_ranks(proved(kind, new_task(method="full"), tiny_model, corpus, spoil=forgetful), 3):
        assert "differs from the unsharded one" in found


def talkative(engine: Engine, group: Group) -> None:
    """Rank 2 says of itself that it issued one collective more."""
    if group.rank == 2:
        kind = type(engine)
        log = kind.collectives.fget  # type: ignore[attr-defined]
        other = type("Other", (kind,), {"collectives": property(lambda self: [*log(self), ("gather", 1)])})
        engine.__class__ = other


def test_unequal_collectives_stop_the_run_and_name_the_rank(
    tiny_model: Path, corpus: Corpus, new_task: NewTask
) -> None:
    for found, _, _, _ in run_ranks(proved("model", new_task(method="full"), tiny_model, corpus, spoil=talkative), 3):
        assert "rank 2 issues other collectives than rank 0 (8 and 7" in found


def test_an_error_is_relative_and_forgives_rounding_alone() -> None:
    assert relative_error([(0.0, 1.0), (0.0, 4.0)]) == 0.0
    assert relative_error([(1e-8, 1.0), (0.0, 4.0)]) == pytest.approx(1e-4)
    # Where a gradient is 0 but for rounding, the whole gradient is the measure.
    assert relative_error([(1e-14, 1e-14), (0.0, 1.0)]) == pytest.approx(1e-4)
    assert relative_error([(0.0, 0.0)]) == 0.0
    assert relative_error([(1.0, 0.0)]) == math.inf
    assert relative_error([(math.nan, 1.0)]) == math.inf
    assert math.isnan(relative_error([(0.0, math.nan)]))
