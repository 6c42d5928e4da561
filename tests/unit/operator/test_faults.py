"""Faults at every call that the operator makes, one run for each: the same end, and no stage begun twice.

What a real API server and a real Ray add is in tests/kube/test_faults.py.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from model_files import write_inputs
from small_cluster import Killed, Moments, SmallCluster, small_cluster

from fastserve.errors import StoreFull
from fastserve_operator.conditions import attempted
from fastserve_operator.model import Namespace

MODELS = "/apis/fastserve.dev/v1alpha1/namespaces/demo/models"
MODEL = f"{MODELS}/small"
STATE = "/api/v1/namespaces/demo/configmaps/small-state"
ORDERS = "/api/v1/namespaces/demo/configmaps/fastserve-gateway"
STAGES = ("source", "train", "compress", "evaluate")
LOOKS = 400
"""More than any run needs, also one whose first look waits for its data to be read on a slow machine."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six tokens, and rows for it."""
    return write_inputs(tmp_path_factory.mktemp("files"))


def spec(files: Path, context: int) -> dict[str, Any]:
    return {
        "source": f"file://{files}/model",
        "train": {"method": "full", "dataset": f"file://{files}/train.jsonl", "batchTokens": 64, "maxLength": 32},
        "compress": [{"quantize": {"format": "int8", "method": "roundToNearest"}}],
        "evaluate": {"data": f"file://{files}/held.jsonl"},
        "serve": {"context": context},
    }


@dataclass
class Run:
    """One life of a Model: asked for, served, changed, deleted. Whatever ends the operator, another one is started."""

    cluster: SmallCluster
    files: Path
    deaths: int = 0
    before_look: Callable[[], None] = lambda: None
    tended: Namespace = field(init=False)

    def __post_init__(self) -> None:
        self.tended = self.cluster.operator()

    def apply(self, context: int) -> None:
        value = {"apiVersion": "fastserve.dev/v1alpha1", "kind": "Model", "metadata": {"name": "small"}}
        self.cluster.objects.put(MODEL, {**value, "spec": spec(self.files, context)})

    def look(self) -> None:
        self.look_only()
        self.cluster.ray.go_on()

    def look_only(self) -> None:
        """Nothing that runs gets on meanwhile."""
        self.before_look()
        try:
            attempted(self.tended.tend)  # as the process does: it never ends of an error
        except Killed:
            self.deaths += 1
            self.tended = self.cluster.operator()

    def until(self, true: Callable[[], bool], what: str) -> None:
        for _ in range(LOOKS):
            if true():
                return
            self.look()
            time.sleep(0.001)  # data is read in a thread
        found = self.cluster.objects.objects.get(MODEL, {})
        raise AssertionError(f"never: {what}: {json.dumps(found, indent=1)[-3000:]}")

    def served(self, generation: int) -> bool:
        """Whether the Model says that it is served as the manifest of this generation has it, by one application."""
        conditions = self.cluster.objects.objects[MODEL].get("status", {}).get("conditions", [])
        ready = next((item for item in conditions if item["type"] == "Ready"), {})
        said = (ready.get("status"), ready.get("reason"), ready.get("observedGeneration"))
        return said == ("True", "Ready", generation) and len(self.cluster.ray.apps) == 1

    def gone(self) -> bool:
        return MODEL not in self.cluster.objects.objects

    def whole(self) -> None:
        """The whole life."""
        self.apply(16)
        self.until(lambda: self.served(1), "served")
        first = self.check_served()
        self.apply(32)
        self.until(lambda: self.served(2), "served anew")
        assert self.check_served() != first
        self.cluster.objects.delete(MODEL)
        self.until(self.gone, "deleted")
        self.check_gone()

    def check_served(self) -> str:
        """Everything is there once, and the gateway sends all requests to the one application."""
        ran = Counter(name.rsplit("-", 2)[0] for name in self.cluster.ray.ran)
        assert ran == {f"small-{stage}": 1 for stage in STAGES}, self.cluster.ray.ran
        assert not self.cluster.ray.running
        records = Counter(path.parts[-3] for path in self.cluster.folder.glob("store/artifacts/*/*/record.json"))
        assert records == dict.fromkeys(STAGES, 1)
        (app,) = self.cluster.ray.apps
        orders = json.loads(self.cluster.objects.objects[ORDERS]["data"]["config.json"])["models"]
        (revision,) = orders["small"]["revisions"]
        assert revision["weight"] == 100
        assert [target["url"].endswith(f"/{revision['digest'][:8]}/local") for target in revision["targets"]] == [True]
        assert app == f"small-{revision['digest'][:8]}-local"
        return str(app)

    def check_gone(self) -> None:
        """Nothing is left but the artifacts, what was told, and the gateway's own."""
        left = [
            path for path in self.cluster.objects.objects if "/events/" not in path and "fastserve-gateway" not in path
        ]
        assert left == []
        assert not self.cluster.ray.apps
        assert not self.cluster.ray.running
        assert json.loads(self.cluster.objects.objects[ORDERS]["data"]["config.json"])["models"] == {}


@contextmanager
def a_run(files: Path, folder: Path, moments: Moments | None = None) -> Iterator[Run]:
    folder.mkdir()
    # What was read of the sources is kept over all runs, as a scratch folder that outlives its operator.
    (files / "scratch").mkdir(exist_ok=True)
    (folder / "scratch").symlink_to(files / "scratch")
    with small_cluster(folder) as cluster:
        cluster.moments = moments or Moments()
        yield Run(cluster, files)


def die() -> None:
    raise Killed


def lives(
    files: Path, folder: Path, at: range, only: str = "", reads: bool = False, after: bool = False
) -> Iterator[tuple[Run, Moments]]:
    """A run for each call at which something happens, until there is no such call any more."""
    for number in at:
        moments = Moments(number, after, only=only, reads=reads)
        with a_run(files, folder / str(number), moments) as run:
            yield run, moments
        if moments.count < number:
            assert number > 1, "nothing was counted"
            return


def test_the_operator_may_die_after_any_write(files: Path, tmp_path: Path) -> None:
    died = 0
    for run, moments in lives(files, tmp_path, range(1, 500), after=True):
        moments.happens = die
        run.whole()
        died += run.deaths
    assert died > 50


@pytest.mark.parametrize("seed", range(5))
def test_it_may_die_again_and_again(files: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with a_run(files, tmp_path / "run") as run:

        class Often(Moments):
            def around(self, what: str, call: Callable[[], Any], reads: bool = False) -> Any:
                if chance.random() < 0.04:
                    raise Killed
                answer = call()
                if chance.random() < 0.04:
                    raise Killed
                return answer

        run.cluster.moments = Often()
        run.tended = run.cluster.operator()
        run.whole()
        assert run.deaths > 3


@pytest.mark.parametrize("minutes", [-10, 10])
def test_a_clock_that_is_wrong_changes_nothing(
    files: Path, tmp_path: Path, minutes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other operator's clock is wrong; the stages' clocks, and Ray's, are right."""
    right = time.time
    for run, moments in lives(files, tmp_path, range(1, 500, 13), after=True):

        def die_late(run: Run = run) -> None:
            off = 0 if run.deaths % 2 else 60.0 * minutes
            monkeypatch.setattr(time, "time", lambda: right() + off)
            raise Killed

        moments.happens = die_late
        run.whole()
        monkeypatch.setattr(time, "time", right)


def test_another_writer_may_come_in_between_at_any_write(files: Path, tmp_path: Path) -> None:
    """Somebody annotates the Model and writes into its state, or its status, just before we do."""
    for run, moments in lives(files, tmp_path, range(1, 500, 4), only="kube"):
        objects = run.cluster.objects

        def touch(objects: Any = objects) -> None:
            for path in (MODEL, STATE, ORDERS):
                if path in objects.objects:
                    metadata = {"annotations": {"somebody": "was here"}}
                    objects.answer("PATCH", path, {}, {"metadata": metadata}, "application/merge-patch+json")
            if MODEL in objects.objects:
                objects.objects[MODEL]["status"] = {"conditions": [], "stage": "what?"}

        moments.happens = touch
        run.whole()


def test_the_state_may_be_deleted_by_hand_at_any_time(files: Path, tmp_path: Path) -> None:
    """What was made is in the store, so nothing is made twice; it is served again."""
    for run, moments in lives(files, tmp_path, range(1, 500, 4), only="kube"):
        objects = run.cluster.objects
        moments.happens = lambda objects=objects: objects.objects.pop(STATE, None)
        run.whole()


def test_the_api_server_may_be_away_at_any_call(files: Path, tmp_path: Path) -> None:
    for run, moments in lives(files, tmp_path, range(1, 900, 11), only="kube", reads=True):
        objects = run.cluster.objects

        def away(objects: Any = objects, moments: Moments = moments) -> None:
            objects.down = True
            moments.at, moments.happens = moments.count + 7, lambda: back(objects)

        moments.happens = away
        try:
            run.whole()
        finally:
            objects.down = False


def back(objects: Any) -> None:
    objects.down = False


def test_ray_may_be_away_at_any_call(files: Path, tmp_path: Path) -> None:
    for run, moments in lives(files, tmp_path, range(1, 500, 6), only="ray", reads=True):

        def away(run: Run = run) -> None:
            run.cluster.ray.down = 4

        moments.happens = away
        run.whole()


def test_the_store_may_be_full_at_any_write(files: Path, tmp_path: Path) -> None:
    for run, moments in lives(files, tmp_path, range(1, 500), only="store"):
        told: list[str] = []

        def full(run: Run = run, moments: Moments = moments, told: list[str] = told) -> None:
            told.append(str(run.cluster.objects.objects[MODEL]["status"]["conditions"]))
            if len(told) < 3:
                moments.at = moments.count + 1
            raise StoreFull("no space left in the store; free space there")

        moments.happens = full
        run.whole()
        assert not told or "StoreFull" in told[-1]


def test_it_may_be_deleted_at_any_write(files: Path, tmp_path: Path) -> None:
    """Also while a stage runs: nothing of it goes on, and nothing of it is left."""
    for run, moments in lives(files, tmp_path, range(1, 500, 3)):
        objects = run.cluster.objects
        moments.happens = lambda objects=objects: objects.delete(MODEL) if MODEL in objects.objects else None
        run.apply(16)
        for _ in range(LOOKS):
            run.look_only()
            if run.gone() or run.served(1):
                break
            if "deletionTimestamp" not in objects.objects[MODEL]["metadata"]:
                run.cluster.ray.go_on()
            time.sleep(0.001)
        if not run.gone():
            objects.delete(MODEL)
            run.until(run.gone, "deleted")
        run.look()
        run.check_gone()


def test_a_leader_that_lost_its_lease_in_the_middle_of_a_look_writes_nothing(files: Path, tmp_path: Path) -> None:
    """It finds out at any call; the next look, when it leads again, goes on."""
    for seed in range(8):
        chance = random.Random(seed)
        with a_run(files, tmp_path / str(seed)) as run:
            leads = [True]
            late: list[str] = []

            class Losing(Moments):
                def around(
                    self,
                    what: str,
                    call: Callable[[], Any],
                    reads: bool = False,
                    leads: list[bool] = leads,
                    late: list[str] = late,
                    chance: random.Random = chance,
                ) -> Any:
                    if not reads and not leads[0] and not what.startswith("store"):
                        late.append(what)
                    answer = call()
                    leads[0] = leads[0] and chance.random() > 0.05
                    return answer

            run.cluster.moments = Losing()
            run.cluster.acts = lambda leads=leads: leads[0]  # type: ignore[misc]
            run.before_look = lambda leads=leads: leads.__setitem__(0, True)
            run.tended = run.cluster.operator()
            run.whole()
            assert late == []


def test_two_that_both_believe_they_lead_do_no_harm(files: Path, tmp_path: Path) -> None:
    """One is stopped right before any of its writes, where no lease is asked any more. Another one has three looks;
    then the first goes on with what it had in mind."""
    for run, moments in lives(files, tmp_path, range(1, 500, 3)):
        other = run.cluster.operator()

        def meanwhile(run: Run = run, other: Namespace = other) -> None:
            for _ in range(3):
                other.tend()
                run.cluster.ray.go_on()
            run.tended = other

        moments.happens = meanwhile
        run.whole()


@pytest.mark.parametrize("takes", [True, False])
def test_a_model_that_breaks_the_definition_has_a_status_or_one_event(
    files: Path, tmp_path: Path, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an object that was stored by an older definition the API server can apply no status; some it can merge."""
    with a_run(files, tmp_path / "run") as run:
        objects = run.cluster.objects
        answer = objects.answer

        def server(method: str, path: str, query: Any, body: Any, content: str) -> tuple[int, Any]:
            if path != f"{MODELS}/old/status":
                return answer(method, path, query, body, content)
            if content == "application/apply-patch+yaml":
                return 500, {"message": "failed to create typed live object: .spec.train: expected map, got &{yes}"}
            if not takes:
                return 422, {"message": "spec.train: Invalid value"}
            return answer(method, path.removesuffix("/status"), query, body, content)

        monkeypatch.setattr(objects, "answer", server)
        old = {"apiVersion": "fastserve.dev/v1alpha1", "kind": "Model", "metadata": {"name": "old"}}
        objects.put(f"{MODELS}/old", {**old, "spec": {"source": 3, "train": "yes"}, "status": {"stage": "odd"}})

        def told() -> list[str]:
            if takes:
                status = objects.objects[f"{MODELS}/old"]["status"]
                return [item["reason"] for item in status.get("conditions", []) if item["type"] == "Ready"]
            return [item["reason"] for path, item in objects.objects.items() if "/events/" in path]

        run.until(lambda: "ManifestInvalid" in told(), "it is said")
        for _ in range(3):
            run.look()
        assert told().count("ManifestInvalid") == 1
        assert not takes or "stage" not in objects.objects[f"{MODELS}/old"]["status"]
