"""What each worker of a run does: load, go to the newest checkpoint, step until done.

Workers tell what happened by returning, not by raising, whenever trying again cannot help: Ray Train restarts a group
whose worker raises, which is right for a killed machine and wrong for a loss that is not a number.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.errors import AttemptFenced, InsufficientMemory, NotExecutable, StageFailed, StoreFull
from fastserve.plan.environment import service_links
from fastserve.stages.train import pause
from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.group import Group
from fastserve.stages.train.place import Place, ray_place
from fastserve.stages.train.saving import Saver
from fastserve.stages.train.start import start
from fastserve.stages.train.steps import Run
from fastserve.stages.train.task import Ended, NotFinite, Task
from fastserve.stages.train.tokens import open_corpus

_MOST_TRIES = 4
"""Times that a run is taken up in place; it has to get further each time."""

_LOG = logging.getLogger(__name__)


def run_worker(config: Mapping[str, Any]) -> dict[str, Any]:
    """Entry of a Ray Train worker.

    config: `task` (a Task), `corpus` and `validation` (CorpusRefs, the second may be None).
    """
    task: Task = config["task"]
    for name in service_links(os.environ):
        del os.environ[name]  # of a Service named `nccl` or `torch`: libraries read such names when they are first used
    torch.set_num_threads(task.threads)
    store = open_store(task.store_uri)
    place = ray_place()
    corpus = open_corpus(store, config["corpus"])
    held_out = open_corpus(store, config["validation"]) if config["validation"] is not None else None
    folder = Path()
    if task.config is None:
        record = attempts.find(store, task.request.input_stages["model"], task.request.inputs["model"])
        if record is None:
            lost = "the model to train is no longer in the store; run `fastserve up` again"
            return {"step": 0, "reason": "ArtifactNotFound", "message": lost, "early": False}
        # On this machine the store's own folder, else a copy in the cache; digests were checked by the driver.
        folder = attempts.fetch(store, record, verify=False) / "model"
    group = Group.current(place.device)
    with pause.watched(store, task.request, task.part, first=group.rank == 0) as paused:
        ended = train(
            store, task, corpus, folder, group, held_out=held_out, place=place, notice=_preemption(), paused=paused
        )
    return {"step": ended.step, "reason": ended.reason, "message": ended.message, "early": ended.early}


def train(
    store: Store,
    task: Task,
    corpus: Corpus,
    folder: Path,
    group: Group,
    on_step: Callable[[Mapping[str, Any]], None] = lambda row: None,
    *,
    held_out: Corpus | None = None,
    place: Place | None = None,
    notice: Callable[[], bool] | None = None,
    paused: Callable[[], bool] = lambda: False,
) -> Ended:
    """Train the model in `folder` from the newest checkpoint to the last step, on this worker of `group`.

    on_step: told each row of the curve as it is made. held_out: samples of train.validation. notice: asked by all
    workers together now and then, whether machines are about to be taken away. paused: whether this worker knows that
    all shall stop after this step; then the state is saved, and the run ends with the reason PAUSED.

    A loss or gradient that is no finite number sends the run back to its last checkpoint, once. What all workers meet
    alike and would meet again is returned; what may have befallen one of them alone (a store that could not be reached,
    a checkpoint that came damaged) is raised, so that the whole group begins anew.
    """

    def once() -> Ended | NotFinite:
        saver = Saver(store, task.request, group, keep=task.train.checkpoint.keep)
        try:
            started = start(store, task, corpus, folder, group, place or Place(device=group.device))
            return Run(store, task, corpus, held_out, group, started, saver, notice, paused).to_end(on_step)
        except NotFinite as error:
            saver.wait()  # the last good checkpoint may still be on its way
            return NotFinite(error.step, str(error))  # without the frames that hold the model
        finally:
            saver.close()

    failed_at = 0
    try:
        for _ in range(_MOST_TRIES):
            ended = once()
            if isinstance(ended, Ended):
                return ended
            if ended.step <= failed_at:
                break
            failed_at = ended.step
            _LOG.warning("%s; the run goes back to its last checkpoint", ended)
            gc.collect()
        raise StageFailed(
            f"{ended}, again after the run went back to its last checkpoint; lower learningRate, add warmupSteps, or "
            "use precision: fp32"
        )
    except (StageFailed, NotExecutable, InsufficientMemory, AttemptFenced, StoreFull) as error:
        return Ended(-1, error.reason, str(error))


def _preemption() -> Callable[[], bool] | None:
    """Whether Ray says that a machine of this run is about to be taken away; None where this Ray cannot say."""
    import ray.train

    ask = getattr(ray.train, "get_preemption_info", None)
    return None if ask is None else lambda: ask() is not None
