"""A run of one worker: resumed at the next step, exported from its last checkpoint, refused where it must be."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastserve.artifacts import attempts
from fastserve.artifacts.checkpoints import fetch_checkpoint, newest_checkpoint
from fastserve.artifacts.store import Store
from fastserve.errors import UsageInvalid
from fastserve.plan.stages import Stage
from fastserve.stages.train import state
from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.export import export
from fastserve.stages.train.group import Group
from fastserve.stages.train.machines import worker_environment
from fastserve.stages.train.order import Order
from fastserve.stages.train.task import Ended, Task
from fastserve.stages.train.worker import run_worker, train

NewTask = Callable[..., Task]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def killer(at_step: int) -> Callable[[Mapping[str, Any]], None]:
    def on_step(row: Mapping[str, Any]) -> None:
        if row["step"] == at_step:
            raise Killed

    return on_step


def curve_of(store: Store, task: Task, into: Path) -> list[dict[str, Any]]:
    folder = fetch_checkpoint(store, Stage.TRAIN, task.request.key, task.total_steps, into)
    return state.read_facts(folder).curve


# Without dropout: its masks follow from how the batch is cut, and the cut from measured speeds.
@pytest.mark.parametrize("section", [{"method": "full"}, {"method": "lora", "lora": {"rank": 4}}])
def test_a_killed_run_goes_on_at_the_next_step_as_if_nothing_had_happened(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask, tmp_path: Path, section: dict[str, Any]
) -> None:
    wanted = {"steps": 9, "checkpoint": {"everySteps": 3, "keep": 1}, **section}
    calm_store = tmp_path / "calm"
    calm_store.mkdir()
    first = new_task(attempt=1, **wanted)
    with pytest.raises(Killed):
        train(store, first, corpus, tiny_model, Group(), on_step=killer(5))
    until = time.monotonic() + 60  # it is written beside the steps, and the disk may be busy
    while newest_checkpoint(store, Stage.TRAIN, first.request.key) != 3:
        assert time.monotonic() < until, "the checkpoint of step 3 was not committed"
        time.sleep(0.05)
    seen: list[int] = []
    second = new_task(attempt=2, **wanted)
    ended = train(store, second, corpus, tiny_model, Group(), on_step=lambda row: seen.append(row["step"]))
    assert ended == Ended(9)
    assert seen == [4, 5, 6, 7, 8, 9]
    resumed = curve_of(store, second, tmp_path / "resumed")

    from fastserve.artifacts.stores import open_store

    calm = open_store(str(calm_store))
    attempts.claim(calm, first.request)
    assert train(calm, first, corpus, tiny_model, Group()) == Ended(9)
    undisturbed = curve_of(calm, first, tmp_path / "undisturbed")
    assert [row["tokens"] for row in resumed] == [row["tokens"] for row in undisturbed]
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in undisturbed], abs=1e-6)


def test_every_sample_is_seen_once_an_epoch_and_the_loss_falls(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask, tmp_path: Path
) -> None:
    task = new_task(method="full", epochs=4)
    assert train(store, task, corpus, tiny_model, Group()).reason == ""
    curve = curve_of(store, task, tmp_path / "last")
    assert sum(row["tokens"] for row in curve) == 4 * sum(corpus.lengths)
    assert [row["step"] for row in curve] == list(range(1, task.total_steps + 1))
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    expected = Order(corpus.lengths, 400, 0).since(0)
    for row in curve:
        assert row["trainedTokens"] == corpus.trained_tokens(next(expected).samples)


def test_bf16_learns_as_well_as_fp32(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask, tmp_path: Path
) -> None:
    task = new_task(method="full", precision="bf16", epochs=4)
    assert train(store, task, corpus, tiny_model, Group()).reason == ""
    curve = curve_of(store, task, tmp_path / "last")
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]


def test_a_loss_that_is_not_a_number_ends_the_run_without_a_checkpoint(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask, tmp_path: Path
) -> None:
    poisoned = tmp_path / "model"
    shutil.copytree(tiny_model, poisoned)
    weights = load_file(poisoned / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    ended = train(store, new_task(steps=3), corpus, poisoned, Group())
    assert (ended.reason, ended.step) == ("StageFailed", -1)
    assert "at step 1 on rank 0" in ended.message
    assert newest_checkpoint(store, Stage.TRAIN, "a" * 64) is None


def test_a_run_whose_key_has_a_newer_attempt_gives_way_at_its_next_checkpoint(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask
) -> None:
    late = new_task(attempt=1, steps=4, checkpoint={"everySteps": 2})
    new_task(attempt=2, steps=4)
    assert train(store, late, corpus, tiny_model, Group()).reason == "AttemptFenced"


@pytest.mark.parametrize("section", [{"method": "qlora"}, {"precision": "fp8"}])
def test_what_this_version_cannot_train_is_refused_by_name(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask, section: dict[str, Any]
) -> None:
    ended = train(store, new_task(steps=1, **section), corpus, tiny_model, Group())
    assert ended.reason == "NotExecutable"
    assert next(iter(section.values())) in ended.message


def test_progress_is_left_for_the_stages_process(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask
) -> None:
    task = new_task(steps=3)
    train(store, task, corpus, tiny_model, Group())
    news = json.loads(store.read(f"artifacts/train/{'a' * 64}/attempts/1/workers.json"))
    assert (news["done"], news["total"], news["unit"]) == (3, 3, "steps")
    assert set(news["metrics"]) >= {"loss", "tokensPerSecond", "learningRate"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=torch.arange(3, 40)[None]).logits
    return result


def trained_export(store: Store, task: Task, corpus: Corpus, model: Path, into: Path) -> Path:
    assert train(store, task, corpus, model, Group()) == Ended(task.total_steps)
    checkpoint = fetch_checkpoint(store, Stage.TRAIN, task.request.key, task.total_steps, into / "checkpoint")
    folder = into / "artifact"
    folder.mkdir()
    export(model, state.read_facts(checkpoint), state.read_parameters(checkpoint), folder)
    return folder


def test_the_merged_model_is_the_source_with_its_adapter(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = trained_export(store, new_task(steps=5, lora={"rank": 4, "alpha": 8}), corpus, tiny_model, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(folder / "model")
    source = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = logits(source)
    adapted = PeftModel.from_pretrained(source, folder / "adapter")
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-5)
    assert not torch.allclose(logits(merged), before, atol=1e-3)
    assert len((folder / "curve.jsonl").read_text().splitlines()) == 5


def test_all_but_the_weights_is_copied_byte_for_byte(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask, tmp_path: Path
) -> None:
    folder = trained_export(store, new_task(steps=1), corpus, tiny_model, tmp_path)
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            assert (folder / "model" / file.name).read_bytes() == file.read_bytes()
    assert json.loads((folder / "model" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


@pytest.mark.parametrize("tied_name_stored", [False, True])
def test_full_training_writes_tied_weights_under_every_stored_name(
    store: Store, tiny_model: Path, corpus: Corpus, new_task: NewTask, tmp_path: Path, tied_name_stored: bool
) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "source"
    shutil.copytree(tiny_model, source)
    if tied_name_stored:
        weights = load_file(source / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    folder = trained_export(store, new_task(steps=3, method="full"), corpus, source, tmp_path)
    weights = load_file(folder / "model" / "model.safetensors")
    assert set(weights) == set(load_file(source / "model.safetensors"))
    if tied_name_stored:
        assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    AutoModelForCausalLM.from_pretrained(folder / "model")
    assert not (folder / "adapter").exists()


def test_workers_of_one_machine_talk_over_loopback_alone() -> None:
    assert worker_environment(1, one_machine=True)["GLOO_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in worker_environment(1, one_machine=False)


def test_services_of_a_cluster_are_gone_before_a_worker_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Public case 16; what Ray Train sets for the worker itself stays."""
    monkeypatch.setenv("NCCL_PORT", "tcp://10.96.0.10:8000")
    monkeypatch.setenv("NCCL_SERVICE_HOST", "10.96.0.10")
    monkeypatch.setenv("MASTER_SERVICE_HOST", "10.96.0.11")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UsageInvalid):
        run_worker({"task": SimpleNamespace(threads=torch.get_num_threads(), store_uri="gopher://nowhere")})
    assert not {"NCCL_PORT", "NCCL_SERVICE_HOST", "MASTER_SERVICE_HOST"} & set(os.environ)
    assert os.environ["MASTER_PORT"] == "29500"
