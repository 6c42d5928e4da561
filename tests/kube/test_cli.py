"""`fastserve` and `kubectl fastserve` on a real API server, with the operator as a process and a person's rights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from control_plane import Cluster
from model_files import model_folder

from fastserve.spec.model import API_VERSION

pytestmark = [pytest.mark.kube, pytest.mark.timeout(900)]

NOBODY = "http://127.0.0.1:9"
"""No Ray head answers there: what needs one is told as a condition, and all else goes on."""

RBAC = "rbac.authorization.k8s.io/v1"
LOOK = [{"apiGroups": ["fastserve.dev"], "resources": ["models"], "verbs": ["get", "list"]}]
"""Who may only look."""

WORK = [
    {"apiGroups": ["fastserve.dev"], "resources": ["models"], "verbs": ["get", "list", "create", "patch", "delete"]},
    {"apiGroups": ["fastserve.dev"], "resources": ["accesskeys"], "verbs": ["get", "list", "create", "delete"]},
    {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]},
]
"""What docs/guides/kubernetes.md says that the commands need, but for forwarded ports."""


@dataclass
class Done:
    code: int
    out: str
    err: str


@dataclass
class Person:
    """Somebody at a shell: PATH with the plugin, a kubeconfig, a namespace."""

    cluster: Cluster
    namespace: str
    folder: Path
    kubeconfig: Path
    log: Path = field(default_factory=Path)

    def run(self, *words: str, text: str | None = None) -> Done:
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "KUBECONFIG": str(self.kubeconfig),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "NO_COLOR": "1",
        }
        done = subprocess.run(words, env=environment, input=text, capture_output=True, text=True, timeout=300)
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def fastserve(self, *words: str, text: str | None = None) -> Done:
        """On the cluster, in the namespace of the test."""
        return self.run(str(self.folder / "bin" / "fastserve"), *words, "-n", self.namespace, text=text)

    def kubectl(self, *words: str, text: str | None = None) -> str:
        """As administrator."""
        return self.cluster.kubectl("-n", self.namespace, *words, text=text).stdout

    def manifest(self, name: str, spec: dict[str, Any]) -> str:
        path = self.folder / f"{name}.json"
        value = {"apiVersion": API_VERSION, "kind": "Model", "metadata": {"name": name}, "spec": spec}
        path.write_text(json.dumps(value))
        return str(path)

    def model(self, name: str) -> Any:
        return json.loads(self.kubectl("get", f"model/{name}", "-o", "json"))

    def until(self, true: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + 300
        while not (found := true()):
            said = self.log.read_text()[-3000:] if self.log.is_file() else ""
            assert time.monotonic() < end, f"{what}\n{said}"
            time.sleep(0.2)
        return found


@pytest.fixture
def person(definitions: Cluster, namespace: str, tmp_path: Path) -> Person:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kubectl").symlink_to(Path(definitions.kubectl_path).resolve())
    for name, entry in (("fastserve", "main"), ("kubectl-fastserve", "plugin")):
        program = tmp_path / "bin" / name
        program.write_text(f"#!{sys.executable}\nfrom fastserve.cli.main import {entry}\n{entry}()\n")
        program.chmod(0o755)
    return Person(definitions, namespace, tmp_path, definitions.kubeconfig)


@pytest.fixture
def tended(person: Person, operator_kubeconfig: Path) -> Iterator[Person]:
    """With an operator at work, with the chart's rights."""
    words = [sys.executable, "-m", "fastserve_operator", "--namespace", person.namespace]
    words += ["--store", str(person.folder / "store"), "--scratch", str(person.folder / "scratch")]
    words += ["--ray-address", NOBODY]
    person.log = person.folder / "operator.log"
    environment = {**os.environ, "KUBECONFIG": str(operator_kubeconfig)}
    with open(person.log, "wb") as log:
        process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield person
    finally:
        process.terminate()
        process.wait(300)


def somebody(person: Person, name: str, rules: list[dict[str, Any]]) -> Person:
    """Somebody with these rights and no others."""
    subject = {"kind": "ServiceAccount", "name": name, "namespace": person.namespace}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    role = {"apiVersion": RBAC, "kind": "Role", "metadata": {"name": name}, "rules": rules}
    binding = {"apiVersion": RBAC, "kind": "RoleBinding", "metadata": {"name": name}, "roleRef": reference}
    person.kubectl("create", "serviceaccount", name)
    for item in (role, {**binding, "subjects": [subject]}):
        person.kubectl("create", "-f", "-", text=json.dumps(item))
    account = person.cluster.as_account(person.namespace, name)
    return Person(person.cluster, person.namespace, person.folder, account, person.log)


def test_the_plugin_tells_what_the_object_says_to_whom_may_look(tended: Person) -> None:
    refused = tended.fastserve("up", tended.manifest("chat", {"source": "file:///nowhere/at/all", "serve": {}}))
    assert refused.code == 2, refused.err
    assert "/nowhere/at/all" in refused.err
    message = tended.model("chat")["status"]["conditions"][0]["message"]
    plugin = ("kubectl", "fastserve")
    assert message in tended.run(*plugin, "why", "chat", "-n", tended.namespace).out
    me = somebody(tended, "looker", LOOK)
    assert message in me.fastserve("why", "chat").out
    shown = json.loads(me.fastserve("status", "chat", "-o", "json").out)
    assert (shown["conditions"][0]["reason"], shown["why"][0]) == ("SourceNotFound", message)
    for words, verb, resource in (
        (("rollback", "chat"), "patch", "models"),
        (("retry", "chat"), "patch", "models"),
        (("down", "chat"), "delete", "models"),
        (("keys", "list"), "list", "accesskeys"),
        (("up", tended.manifest("other", {"source": "hf://a/b"})), "patch", "models"),
        (("logs", "chat"), "list", "rayclusters"),
    ):
        done = me.fastserve(*words)
        assert done.code == 5, done.err
        for word in ("403", f'cannot {verb} resource "{resource}"', "ask for a Role"):
            assert word in done.err
    assert tended.fastserve("down", "chat").code == 0
    assert tended.kubectl("get", "models", "-o", "name") == ""


def test_what_the_api_server_refuses_is_told_and_nothing_is_stored(person: Person) -> None:
    wrong = {"source": "hf://a/b", "serve": {"replicas": {"min": 3, "max": 2}}}
    early = person.fastserve("up", person.manifest("early", wrong))
    assert (early.code, "above max" in early.err) == (2, True), "the reader refuses first"
    person.kubectl("apply", "-f", "-", text=Path(person.manifest("chat", {"source": "hf://a/b"})).read_text())
    taken = person.fastserve("up", person.manifest("chat", {"source": "hf://other/one"}))
    assert taken.code == 5
    for word in (".spec.source", "kubectl-client-side-apply", "--force-conflicts"):
        assert word in taken.err
    assert person.model("chat")["spec"]["source"] == "hf://a/b"
    labels = {"apiVersion": API_VERSION, "kind": "Model", "metadata": {"name": "odd", "labels": {"a b": "c"}}}
    odd = person.fastserve("up", "-", text=json.dumps({**labels, "spec": {"source": "hf://a/b"}}))
    assert (odd.code, "Model odd is refused by the API server" in odd.err, "a b" in odd.err) == (2, True, True), odd.err
    other = {"apiVersion": API_VERSION, "kind": "Model", "metadata": {"name": "x", "namespace": "elsewhere"}}
    done = person.fastserve("up", "-", text=json.dumps({**other, "spec": {"source": "hf://a/b"}}))
    assert (done.code, "-n elsewhere" in done.err) == (2, True)


def test_a_key_is_made_and_a_null_is_kept_with_the_rights_that_the_guide_names(tended: Person) -> None:
    me = somebody(tended, "worker", WORK)
    made = me.fastserve("keys", "create", "team", "--model", "chat")
    assert made.code == 0, made.err
    assert made.out.startswith("fs-")
    assert me.fastserve("keys", "list").out.splitlines()[1].split() == ["team", "chat", "never"]
    nobody = me.fastserve("chat", "chat", "hello")
    assert (nobody.code, "no model named chat" in nobody.err) == (2, True)
    gate = {"klDivergence": None, "speedup": 1.1}
    spec = {"source": "file:///nowhere", "evaluate": {"data": "file:///rows.jsonl", "gate": gate}}
    assert me.fastserve("up", tended.manifest("gated", spec)).code == 2
    assert tended.model("gated")["spec"]["evaluate"]["gate"]["klDivergence"] is None
    assert me.fastserve("retry", "gated").code == 0
    assert me.fastserve("down", "gated").code == 0
    assert me.fastserve("keys", "revoke", "team").code == 0


def test_a_rollback_is_asked_for_by_an_annotation_that_nobody_overwrites(tended: Person) -> None:
    """Without a Ray head the wish waits; that it is obeyed, and how, is in tests/unit/cli/test_on_cluster.py."""
    for name, content in model_folder().items():
        (tended.folder / "model").mkdir(exist_ok=True)
        (tended.folder / "model" / name).write_bytes(content)
    file = tended.manifest("chat", {"source": f"file://{tended.folder}/model"})
    tended.kubectl("apply", "--server-side", "-f", file)
    tended.until(lambda: "ClusterFailed" in json.dumps(tended.model("chat").get("status", {})), "it is not accepted")
    tended.kubectl("annotate", "model/chat", "fastserve.dev/rollback=previous")
    tended.kubectl("apply", "--server-side", "-f", file)
    assert tended.model("chat")["metadata"]["annotations"]["fastserve.dev/rollback"] == "previous"
    status = tended.model("chat")["status"]
    patch = {"status": {**status, "why": ["Because."], "rollback": {"asked": "previous", "message": "No."}}}
    tended.kubectl("patch", "model/chat", "--subresource=status", "--type=merge", "-p", json.dumps(patch))
    assert tended.fastserve("retry", "chat").code == 0


def test_places_that_are_not_there(person: Person) -> None:
    near = person.run(str(person.folder / "bin" / "fastserve"), "status", "-n", person.namespace[:-1])
    assert (near.code, person.namespace in near.err) == (2, True)
    assert person.fastserve("status").out.split() == [
        *("NAME", "STAGE", "READY", "REPLICAS", "REVISION", "URL", "REASON"),
    ]  # fmt: skip
    person.kubectl("apply", "-f", "-", text=Path(person.manifest("chat", {"source": "hf://a/b"})).read_text())
    near = person.fastserve("why", "chta")
    assert (near.code, "did you mean chat?" in near.err) == (2, True)
    assert "No operator has looked at it yet" in person.fastserve("why", "chat").out
    context = person.fastserve("status", "--context", "nowhere")
    assert (context.code, "there is no context nowhere" in context.err) == (2, True)
    none = Person(person.cluster, person.namespace, person.folder, Path("/nonexistent/config"))
    nothing = none.fastserve("status")
    assert (nothing.code, "there is no kubeconfig at /nonexistent/config" in nothing.err) == (2, True)
    value = json.loads(person.kubectl("config", "view", "--raw", "--flatten", "-o", "json"))
    value["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    away = person.folder / "away"
    away.write_text(json.dumps(value))
    silent = Person(person.cluster, person.namespace, person.folder, away).fastserve("status")
    assert (silent.code, "does not answer" in silent.err, "is it up?" in silent.err) == (5, True, True)
