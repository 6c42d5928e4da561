"""`fastserve` on a cluster, with the operator at work: kubeconfig, HTTP, objects, decisions are real; pods are not."""

from __future__ import annotations

import _thread
import hashlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import port_forward
import pytest
from kube_objects import kubeconfig, served
from model_files import write_model
from small_cluster import SmallCluster, small_cluster

from fastserve.cli import on_cluster, render, up_on_cluster
from fastserve.cli.main import run
from fastserve.cli.place import as_plugin

MODELS = "/apis/fastserve.dev/v1alpha1/namespaces/demo/models"
HEAD = "apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {name: NAME}\nspec:\n"


@dataclass
class Result:
    code: int
    out: str
    err: str


@dataclass
class World:
    """A cluster with an operator that looks again and again, and a person in front of it."""

    cluster: SmallCluster
    folder: Path
    kubeconfig: Path
    over: threading.Event = field(default_factory=threading.Event)
    looks: threading.Lock = field(default_factory=threading.Lock)
    """Held during a look; who holds it has an operator that does nothing."""

    def tend(self) -> None:
        tended = self.cluster.operator()
        while not self.over.is_set():
            with self.looks:
                tended.tend()
                self.cluster.ray.go_on()
            self.over.wait(0.01)

    def __call__(self, *words: str) -> Result:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            render.out.file, render.err.file = out, err
            code = run(list(words))
        assert "Traceback" not in err.getvalue()
        return Result(code, out.getvalue(), err.getvalue())

    def manifest(self, spec: str, name: str = "chat") -> str:
        path = self.folder / f"{name}.yaml"
        source = f"  source: file://{self.folder}/model\n"
        path.write_text(HEAD.replace("NAME", name) + source + spec)
        return str(path)

    def object(self, name: str = "chat") -> Any:
        return self.cluster.objects.objects[f"{MODELS}/{name}"]

    def until(self, true: Callable[[], object], what: str) -> None:
        end = time.monotonic() + 300
        while not true():
            assert time.monotonic() < end, what
            time.sleep(0.02)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for module in (on_cluster, up_on_cluster):
        monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)
    write_model(tmp_path / "model")
    monkeypatch.delenv("FASTSERVE_DEBUG", raising=False)
    with small_cluster(tmp_path) as cluster, served(cluster.objects) as api:
        cluster.objects.put("/api/v1/namespaces/demo", {"metadata": {"name": "demo"}})
        found = World(cluster, tmp_path, kubeconfig(api, tmp_path / "kubeconfig"))
        monkeypatch.setenv("KUBECONFIG", str(found.kubeconfig))
        monkeypatch.setenv("FASTSERVE_HOME", str(tmp_path / "home"))
        thread = threading.Thread(target=found.tend)
        thread.start()
        try:
            yield found
        finally:
            found.over.set()
            thread.join()
            render.out.file, render.err.file = sys.stdout, sys.stderr


def test_up_follows_to_ready_and_every_command_tells_the_same(world: World) -> None:
    file = world.manifest("  serve: {context: 16}\n")
    up = world("up", file, "--cluster")
    assert up.code == 0, up.err
    assert "chat is ready" in up.err
    revision = world.object()["status"]["revision"]
    status = world("status", "--cluster")
    assert status.out.splitlines()[0].split() == ["NAME", "STAGE", "READY", "REPLICAS", "REVISION", "URL", "REASON"]
    url = "http://fastserve-gateway.demo.svc:8100/v1"
    assert status.out.splitlines()[1].split() == ["chat", "-", "True", "1", revision, url, "Ready"]
    told = f"Revision {revision} serves all traffic, as the manifest asks."
    assert told in world("why", "chat", "--context", "small").out
    assert told in world("status", "chat", "-n", "demo").out
    found = json.loads(world("why", "chat", "--cluster", "-o", "json").out)
    assert found["why"] == [told]
    assert found["conditions"][0]["message"] == told
    listed = json.loads(world("status", "--kubeconfig", str(world.kubeconfig), "-o", "json").out)
    assert [item["name"] for item in listed] == ["chat"]
    assert not (world.folder / "home").exists(), "nothing of this machine's home was touched"


def test_the_plugin_means_the_cluster_without_a_word(world: World) -> None:
    assert world("up", world.manifest("  serve: {}\n"), "--cluster").code == 0
    with as_plugin():
        assert "serves all traffic" in world("why", "chat").out
        refused = world("why", "chat", "--home", "x")
    assert (refused.code, "--home is a folder of this machine" in refused.err) == (2, True)
    assert "is up in" in world("why", "chat").err, "and without it, this machine"


def test_a_rollback_goes_back_and_a_changed_manifest_ends_it(world: World) -> None:
    revisions = []
    for context in (16, 32):
        assert world("up", world.manifest(f"  serve: {{context: {context}}}\n"), "--cluster").code == 0
        revisions.append(world.object()["status"]["revision"])
    first, second = revisions
    assert first != second
    back = world("rollback", "chat", "--cluster")
    assert back.code == 0, back.err
    assert f"chat serves revision {first}" in back.out
    why = json.loads(world("why", "chat", "--cluster", "-o", "json").out)
    assert why["pin"]["insteadOf"].startswith(second)
    assert why["rollback"]["revision"].startswith(first)
    again = world("rollback", "chat", "--cluster")
    assert (again.code, "no revision before" in again.err) == (2, True)
    assert world("rollback", "chat", second, "--cluster", "-o", "json").code == 0
    world.until(lambda: "pin" not in world.object()["status"], "the wanted one needs no pin")
    assert world("rollback", "chat", first, "--cluster").code == 0
    assert world("up", world.manifest("  serve: {context: 8}\n"), "--cluster").code == 0
    status = world.object()["status"]
    assert "pin" not in status
    assert status["revision"] not in revisions


def test_the_annotation_alone_is_enough_and_is_obeyed_once(world: World) -> None:
    for context in (16, 32):
        assert world("up", world.manifest(f"  serve: {{context: {context}}}\n"), "--cluster").code == 0
    second = world.object()["status"]["revision"]

    def annotate(word: str) -> None:
        value = {key: item for key, item in world.object().items() if key != "status"}
        value["metadata"] = {**value["metadata"], "annotations": {"fastserve.dev/rollback": word}}
        world.cluster.objects.put(f"{MODELS}/chat", value)

    annotate("previous")
    world.until(lambda: world.object()["status"].get("rollback", {}).get("asked") == "previous", "obeyed")
    world.until(lambda: world.object()["status"]["revision"] != second, "rolled back")
    assert world("up", world.manifest("  serve: {context: 8}\n"), "--cluster").code == 0
    third = world.object()["status"]["revision"]
    annotate("previous")  # the same value: it was obeyed
    assert world("up", world.manifest("  serve: {context: 8}\n"), "--cluster").code == 0
    assert world.object()["status"]["revision"] == third
    annotate("zzz@1")
    world.until(lambda: world.object()["status"]["rollback"]["asked"] == "zzz@1", "answered")
    refused = "'zzz' is not one revision of chat"
    assert refused in world.object()["status"]["rollback"]["message"]
    assert refused in world("why", "chat", "--cluster").out
    assert world.object()["status"]["revision"] == third
    reasons = {item["reason"] for path, item in world.cluster.objects.objects.items() if "/events/" in path}
    assert {"RollbackAsked", "RollbackRefused"} <= reasons


def test_what_the_operator_refuses_ends_up_with_the_laptops_exit_code(world: World) -> None:
    refused = world("up", world.manifest("  train: {method: lora, dataset: file:///nowhere.jsonl}\n"), "--cluster")
    assert (refused.code, "/nowhere.jsonl" in refused.err) == (2, True), refused.err
    assert "/nowhere.jsonl" in world("why", "chat", "--cluster").out
    shown = json.loads(world("status", "chat", "--cluster", "-o", "json").out)
    assert shown["conditions"][0]["reason"] == "SourceNotFound"


def test_asking_again_for_what_was_refused_tries_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up_on_cluster, "AGAIN_SECONDS", 1.0)
    rows = world.folder / "rows.jsonl"
    file = world.manifest(f"  train: {{method: full, dataset: 'file://{rows}', batchTokens: 64, maxLength: 32}}\n")
    assert world("up", file, "--cluster").code == 2
    turns = [{"role": "user", "content": "a a"}, {"role": "assistant", "content": "b b"}]
    rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(20)))
    monkeypatch.setattr(up_on_cluster, "AGAIN_SECONDS", 60.0)
    assert world("up", file, "--cluster").code == 0
    assert "fastserve.dev/retry" in world.object()["metadata"]["annotations"]
    before = world.object()["metadata"]["annotations"]
    assert world("retry", "chat", "--cluster").code == 0
    assert world.object()["metadata"]["annotations"] != before
    assert "`fastserve up FILE` tries again" in world("retry", "chat").err


def test_down_waits_until_nothing_of_it_runs(world: World) -> None:
    assert world("up", world.manifest("  serve: {}\n"), "--cluster").code == 0
    many = world("down", "--cluster")
    assert (many.code, "delete models --all" in many.err) == (2, True)
    assert world("down", "chat", "--cluster").code == 0
    assert f"{MODELS}/chat" not in world.cluster.objects.objects
    assert world.cluster.ray.apps == {}
    gone = world("down", "chat", "--cluster")
    assert (gone.code, "there is none at all" in gone.err) == (2, True)


def test_ctrl_c_leaves_it_there_and_says_so(world: World) -> None:

    def interrupt() -> None:
        """Ctrl-C once it is followed."""
        path = f"{MODELS}/chat"
        world.until(lambda: world.cluster.objects.calls[-3:] == [("GET", path)] * 3, "it is not followed")
        _thread.interrupt_main()

    hand = threading.Thread(target=interrupt)
    with world.looks:
        hand.start()
        left = world("up", world.manifest("  serve: {}\n"), "--cluster")
        hand.join()
    assert left.code == 130
    assert "chat goes on without this command" in left.err
    world.until(lambda: world.object().get("status", {}).get("revision"), "it comes up all the same")


def test_keys_are_made_shown_and_taken_away(world: World) -> None:
    made = world("keys", "create", "team", "--model", "chat", "--expires", "2990-01-01", "--cluster")
    assert made.code == 0, made.err
    assert made.out.startswith("fs-")
    assert made.out.strip() not in json.dumps(
        [item for path, item in world.cluster.objects.objects.items() if "/secrets/" not in path]
    )
    assert world("keys", "list", "--cluster").out.splitlines()[1].split() == ["team", "chat", "2990-01-01"]
    taken = world("keys", "create", "team", "--model", "chat", "--cluster")
    assert (taken.code, "there is an AccessKey named team" in taken.err) == (2, True)
    assert world("keys", "revoke", "team", "--cluster").code == 0
    near = world("keys", "revoke", "team", "--cluster")
    assert (near.code, "there is no AccessKey named team" in near.err) == (2, True)


def test_an_api_server_that_is_away_for_a_while_ends_no_following(world: World) -> None:
    objects, path = world.cluster.objects, f"{MODELS}/chat"

    def take_away() -> None:
        world.until(lambda: objects.calls[-3:] == [("GET", path)] * 3, "it is not followed")
        objects.down = True
        before = len(objects.calls)
        world.until(lambda: len(objects.calls) > before + 2, "it is not asked again")
        objects.down = False

    hand = threading.Thread(target=take_away)
    with world.looks:
        hand.start()
        threading.Thread(target=lambda: (hand.join(), world.looks.release())).start()
        up = world("up", world.manifest("  serve: {}\n"), "--cluster")
        world.looks.acquire()
    assert up.code == 0, up.err
    assert "trying again" in up.err


@pytest.fixture
def gateway(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A gateway behind a forwarded port that knows the keys of its orders, and repeats what was said to it."""
    keys: list[str] = []

    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("{}")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = f"{body['model']} heard {body['messages'][-1]['content']}"
            event = json.dumps({"choices": [{"delta": {"content": text}}]})
            self._answer(f"data: {event}\n\ndata: [DONE]\n\n")

        def _answer(self, text: str) -> None:
            key = self.headers["Authorization"].removeprefix("Bearer ")
            orders = world.cluster.objects.objects["/api/v1/namespaces/demo/configmaps/fastserve-gateway"]
            known = hashlib.sha256(key.encode()).hexdigest() in orders["data"]["config.json"]
            keys.append(key if known else "")
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    port_forward.install(world.folder / "bin", {"fastserve-gateway:8100": server.server_port})
    monkeypatch.setenv("PATH", f"{world.folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    yield keys
    server.shutdown()
    thread.join()
    server.server_close()


def test_chat_takes_a_key_that_may_be_read_else_one_of_its_own_that_goes(world: World, gateway: list[str]) -> None:
    early = world("chat", "chat", "hello", "--cluster")
    assert (early.code, "no model named chat" in early.err) == (2, True)
    assert world("up", world.manifest("  serve: {}\n"), "--cluster").code == 0
    said = world("chat", "chat", "hello", "--cluster")
    assert (said.code, said.out) == (0, "chat heard hello\n"), said.err
    first = gateway[-1]
    assert not [path for path in world.cluster.objects.objects if "/accesskeys/" in path], "it went"
    key = world("keys", "create", "team", "--model", "chat", "--cluster").out.strip()
    told = world("chat", "chat", "hello", "--cluster", "-o", "json")
    assert json.loads(told.out) == {"model": "chat", "content": "chat heard hello"}
    assert gateway[-1] == key != first
    nowhere = world("chat", "chat", "hello", "--cluster", "--url", "http://127.0.0.1:9/v1")
    assert (nowhere.code, "name another address with --url" in nowhere.err) == (5, True)


def test_a_plan_knows_the_clusters_machines_and_what_is_made(world: World) -> None:
    file = world.manifest("  serve: {profiles: [l4]}\n")
    unknown = world("plan", file, "--cluster")
    assert (unknown.code, "l4" in unknown.err) == (3, True)
    profile = {"cpus": 8, "memory": "64GiB", "accelerator": {"type": "L4", "count": 1, "memory": "24GiB"}}
    value = {"apiVersion": "fastserve.dev/v1alpha1", "kind": "HardwareProfile", "metadata": {"name": "l4"}}
    world.cluster.objects.put("/apis/fastserve.dev/v1alpha1/hardwareprofiles/l4", value | {"spec": profile})
    planned = world("plan", file, "--cluster")
    assert planned.code == 0, planned.err
    assert f"{MODELS}/chat" not in world.cluster.objects.objects, "nothing was asked for"
    assert "of 24 GiB there are" in planned.out
    assert world("up", world.manifest("  serve: {}\n"), "--cluster").code == 0
    (source,) = [line for line in world("plan", file, "--cluster").out.splitlines() if line.startswith("source")]
    assert source.split()[1] == "committed"
    nowhere = world.manifest("  train: {method: lora, dataset: file:///on/the/cluster.jsonl}\n")
    refused = world("plan", nowhere, "--cluster")
    assert (refused.code, "reads sources from this machine" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("why", "chatt", "--cluster"), ["no model named chatt is in namespace demo", "did you mean chat?"]),
        (("status", "-n", "dmo"), ["there is no namespace dmo", "did you mean demo?"]),
        (("status", "--context", "smal"), ["there is no context smal", "did you mean small?"]),
        (("status", "--context", "gone"), ["does not answer", "context gone", "is it up?"]),
        (("status", "--kubeconfig", "none.yaml"), ["there is no kubeconfig at none.yaml", "KUBECONFIG"]),
        (("status", "chat", "--plot", "--cluster"), ["chat has no train stage", "leave --plot out"]),
        (("status", "--plot", "--cluster"), ["name it, as in `fastserve status NAME --plot`"]),
        (("status", "--cluster", "--home", "x"), ["--home"]),
        (("chat", "chat", "hello", "--url", "http://x/v1"), ["--url is for a cluster"]),
        (("logs", "chat", "trian", "--cluster"), ["there is no stage trian", "train"]),
        (("logs", "chat", "--cluster"), ["no RayCluster with a head", "--ray-address"]),
        (("up", "FILE", "--cluster", "--port", "8000"), ["--port and --store are for this machine"]),
        (("up", "FILE", "-n", "other"), ["is for namespace demo", "-n demo"]),
    ],
)
def test_what_cannot_be_is_said_with_a_way_out(world: World, words: tuple[str, ...], said: list[str]) -> None:
    file = world.manifest("  serve: {}\n")
    assert world("up", file, "--cluster").code == 0
    named = Path(file)
    named.write_text(named.read_text().replace("{name: chat}", "{name: chat, namespace: demo}"))
    result = world(*(file if word == "FILE" else word for word in words))
    assert result.code in (2, 5)
    for word in said:
        assert word in result.err


@pytest.mark.parametrize(
    ("line", "names"),
    [("why --cluster ch", ["chat"]), ("why --context gone ch", []), ("why --cluster zz", []), ("why ch", ["chart"])],
)
def test_the_shell_is_told_the_names_of_the_place(
    world: World, monkeypatch: pytest.MonkeyPatch, line: str, names: list[str]
) -> None:
    world.cluster.objects.put(f"{MODELS}/chat", {"metadata": {"name": "chat"}})
    (world.folder / "home" / "models" / "chart").mkdir(parents=True)
    (world.folder / "home" / "models" / "chart" / "model.json").write_text("{}")
    monkeypatch.setenv("_FASTSERVE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"fastserve {line}")
    monkeypatch.setenv("COMP_CWORD", str(len(line.split())))
    assert world().out.split() == names


def test_an_operator_that_is_not_there_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world("up", world.manifest("  serve: {}\n"), "--cluster").code == 0
    monkeypatch.setattr(on_cluster, "SILENT_SECONDS", 0.1)
    model = {"apiVersion": "fastserve.dev/v1alpha1", "kind": "Model", "spec": {"source": "hf://a/b"}}
    with world.looks:
        nobody = world("rollback", "chat", "--cluster")
        world.cluster.objects.put(f"{MODELS}/new", model | {"metadata": {"name": "new"}})
        new = world("why", "new", "--cluster")
    assert (nobody.code, "nobody has taken the rollback up" in nobody.err) == (5, True)
    assert "No operator has looked at it yet" in new.out
