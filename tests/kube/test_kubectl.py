"""What a person does with a Model through kubectl: explain, get, wait, scale, apply again."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from control_plane import Cluster
from door import UNIT, read_one

from fastserve.errors import ManifestInvalid
from fastserve.spec.load import KINDS, read
from fastserve.spec.model import API_VERSION
from fastserve.spec.serve import Serve
from fastserve.spec.shape import fields_of
from fastserve.spec.train import Train

pytestmark = [pytest.mark.kube, pytest.mark.timeout(900)]

SMALLEST = f"""\
apiVersion: {API_VERSION}
kind: Model
metadata: {{name: small}}
spec:
  source: hf://org/name
  serve: {{}}
"""


class Shell:
    """kubectl in one namespace."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace

    def __call__(self, *words: str, text: str | None = None) -> str:
        return self.cluster.kubectl("-n", self.namespace, *words, text=text).stdout

    def refused(self, *words: str, text: str | None = None) -> str:
        done = self.cluster.kubectl("-n", self.namespace, *words, text=text, check=False)
        assert done.returncode == 1, done.stdout
        return done.stderr

    def object(self, name: str = "small") -> Any:
        return json.loads(self("get", f"model/{name}", "-o", "json"))

    def spec(self, name: str = "small") -> Any:
        return self.object(name)["spec"]


@pytest.fixture
def kubectl(definitions: Cluster, namespace: str) -> Shell:
    return Shell(definitions, namespace)


def test_explain_says_what_each_key_is(kubectl: Shell) -> None:
    for place, section in (("train", Train), ("serve", Serve)):
        said = re.sub(r"\s+", " ", kubectl("explain", f"model.spec.{place}"))
        for key, field in fields_of(section).items():
            assert f" {key} <" in said
            assert re.sub(r"\s+", " ", field.description) in said
    assert "enum: full, lora, qlora, scratch" in re.sub(r"\s+", " ", kubectl("explain", "model.spec.train"))


@pytest.mark.parametrize("kind", KINDS)
def test_explain_knows_every_kind(kubectl: Shell, kind: str) -> None:
    assert API_VERSION.partition("/")[0] in kubectl("explain", kind.lower())


def test_a_line_tells_the_story(kubectl: Shell) -> None:
    kubectl("apply", "-f", "-", text=SMALLEST)
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "Ready",
        "message": "1 of 1 replicas answer.",
        "lastTransitionTime": "2027-01-01T00:00:00Z",
        "observedGeneration": 1,
    }
    status = {"conditions": [ready], "stage": "serve", "replicas": 1, "revision": "0123abcd", "url": "http://g/v1"}
    patch = json.dumps({"status": status})
    kubectl("patch", "model/small", "--subresource=status", "--type=merge", "-p", patch)
    heading, line = (row.split() for row in kubectl("get", "models").splitlines())
    assert heading == ["NAME", "STAGE", "READY", "REPLICAS", "REVISION", "URL", "REASON", "AGE"]
    assert line[:-1] == ["small", "serve", "True", "1", "0123abcd", "http://g/v1", "Ready"]
    assert kubectl("get", "fsm", "-o", "name") == kubectl("get", "fastserve", "-o", "name")
    assert "condition met" in kubectl("wait", "--for=condition=Ready", "model/small", "--timeout=300s")


def test_status_and_wishes_have_doors_of_their_own(kubectl: Shell) -> None:
    text = SMALLEST + "status: {stage: train}\n"
    kubectl("apply", "-f", "-", text=text)
    before = kubectl.object()
    assert "status" not in before
    patch = json.dumps({"spec": {"source": "hf://other/name"}, "status": {"stage": "source"}})
    kubectl("patch", "model/small", "--subresource=status", "--type=merge", "-p", patch)
    after = kubectl.object()
    assert after["status"] == {"stage": "source"}
    assert after["spec"] == before["spec"]
    assert after["metadata"]["generation"] == before["metadata"]["generation"] == 1


def test_a_wrong_status_is_refused(kubectl: Shell) -> None:
    kubectl("apply", "-f", "-", text=SMALLEST)
    patch = json.dumps({"status": {"conditions": [{"type": "Ready", "status": "Yes"}]}})
    words = kubectl.refused("patch", "model/small", "--subresource=status", "--type=merge", "-p", patch)
    assert "status.conditions[0].status" in words


def promised(kubectl: Shell) -> tuple[int, int | None]:
    """Least and most replicas as they are stored."""
    replicas = kubectl.spec()["serve"]["replicas"]
    return replicas["min"], replicas.get("max")


class TestScale:
    def test_it_changes_the_promise(self, kubectl: Shell) -> None:
        kubectl("apply", "-f", "-", text=SMALLEST)
        assert "scaled" in kubectl("scale", "model/small", "--replicas=2")
        assert promised(kubectl) == (2, None)
        kubectl("scale", "model/small", "--replicas=0", "--current-replicas=2")
        assert promised(kubectl) == (0, None)

    def test_above_a_written_max_the_rule_speaks(self, kubectl: Shell) -> None:
        kubectl("apply", "-f", "-", text=SMALLEST.replace("serve: {}", "serve: {replicas: {max: 3}}"))
        kubectl("scale", "model/small", "--replicas=3")
        words = kubectl.refused("scale", "model/small", "--replicas=4")
        assert "spec.serve.replicas.min" in words
        assert "is above max; lower min or raise max" in words

    def test_a_model_that_does_not_serve_has_nothing_to_scale(self, kubectl: Shell) -> None:
        kubectl("apply", "-f", "-", text=SMALLEST.replace("  serve: {}\n", ""))
        kubectl.refused("scale", "model/small", "--replicas=2")
        assert "serve" not in kubectl.spec()

    def test_an_autoscaler_reads_what_is_there(self, kubectl: Shell) -> None:
        kubectl("apply", "-f", "-", text=SMALLEST)
        patch = json.dumps({"status": {"replicas": 1, "selector": "fastserve.dev/model=small"}})
        kubectl("patch", "model/small", "--subresource=status", "--type=merge", "-p", patch)
        path = f"/apis/{API_VERSION}/namespaces/{kubectl.namespace}/models/small/scale"
        scale = kubectl.cluster.get(path)
        assert scale["spec"] == {"replicas": 1}
        assert scale["status"] == {"replicas": 1, "selector": "fastserve.dev/model=small"}

    def test_applying_the_manifest_again_leaves_it_scaled(self, kubectl: Shell) -> None:
        """The manifest says nothing of replicas, so they belong to who scaled."""
        kubectl("apply", "-f", "-", text=SMALLEST)
        kubectl("scale", "model/small", "--replicas=2")
        kubectl("apply", "-f", "-", text=SMALLEST.replace("serve: {}", "serve: {context: 512}"))
        assert promised(kubectl) == (2, None)


GATE = f"""\
apiVersion: {API_VERSION}
kind: Model
metadata: {{name: small}}
spec:
  source: hf://org/name
  evaluate:
    data: rows.jsonl
    gate: {{klDivergence: LIMIT, speedup: MORE}}
"""


def gate(limit: str, more: str = "1.1") -> str:
    return GATE.replace("LIMIT", limit).replace("MORE", more)


class TestNulls:
    """A null switches a limit off; without the key the default would hold.

    Server-side apply keeps it. Client-side apply leaves out every null before anything is sent, and a patch with null
    means "remove the key", so the default comes back: then the reader says so, instead of judging by a limit that the
    manifest switched off.
    """

    CHANGES = (("null", "null"), ("0.2", "null"))

    @pytest.mark.parametrize(("first", "second"), CHANGES)
    def test_server_side_apply_keeps_it(self, kubectl: Shell, first: str, second: str) -> None:
        kubectl("apply", "--server-side", "-f", "-", text=gate(first))
        kubectl("apply", "--server-side", "-f", "-", text=gate(second, more="1.2"))
        stored = kubectl.spec()["evaluate"]["gate"]
        assert (stored["klDivergence"], stored["speedup"]) == (None, 1.2)
        assert read_one(kubectl.object()) == read(gate(second, more="1.2"))[0]

    @pytest.mark.parametrize(("first", "second"), CHANGES)
    def test_client_side_apply_loses_it_and_the_reader_says_so(self, kubectl: Shell, first: str, second: str) -> None:
        kubectl("apply", "-f", "-", text=gate(first))
        kubectl("apply", "-f", "-", text=gate(second, more="1.2"))
        assert kubectl.spec()["evaluate"]["gate"]["klDivergence"] == 0.1
        with pytest.raises(ManifestInvalid) as caught:
            read_one(kubectl.object())
        (problem,) = caught.value.problems
        assert problem.path == "spec.evaluate.gate.klDivergence"
        assert "--server-side" in problem.message

    def test_what_to_do_instead_works(self, kubectl: Shell) -> None:
        kubectl("apply", "-f", "-", text=gate("null"))
        kubectl("apply", "-f", "-", text=gate("1e9"))
        assert read_one(kubectl.object()) == read(gate("1e9"))[0]
        kubectl("apply", "-f", "-", text=gate("null"))
        kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", text=gate("null"))
        assert read_one(kubectl.object()) == read(gate("null"))[0]

    def test_create_keeps_it(self, kubectl: Shell) -> None:
        kubectl("create", "-f", "-", text=gate("null"))
        assert read_one(kubectl.object()) == read(gate("null"))[0]


class TestRoundTrip:
    @pytest.mark.parametrize("flags", [(), ("--server-side",)], ids=["client", "server"])
    @pytest.mark.parametrize(
        "change", ["", "  train: {dataset: s3://acme/rows.jsonl}\n"], ids=["smallest", "with-train"]
    )
    def test_what_is_got_can_be_read_and_applied_again(
        self, kubectl: Shell, flags: tuple[str, ...], change: str
    ) -> None:
        text = SMALLEST + change
        kubectl("apply", *flags, "-f", "-", text=text)
        got = kubectl("get", "model/small", "-o", "yaml")
        assert read_one(UNIT.documents(got)[0]) == read(text)[0]
        kubectl("apply", *flags, "-f", "-", text=got.replace("  creationTimestamp", "  # creationTimestamp"))
        assert kubectl.object()["metadata"]["generation"] == 1

    def test_applying_twice_changes_nothing(self, kubectl: Shell) -> None:
        text = (UNIT.ROOT / "tests/data/every-section.yaml").read_text().partition("---")[0]
        for flags in ((), (), ("--server-side", "--force-conflicts"), ("--server-side",)):
            kubectl("apply", *flags, "-f", "-", text=text)
            found = kubectl.object("support-chat")
            assert found["metadata"]["generation"] == 1
            assert read_one(found) == read(text)[0]
