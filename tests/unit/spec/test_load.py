"""The reader on whole files: what is accepted, what is refused, and all of it in one go."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from fastserve.errors import ManifestInvalid, Problem
from fastserve.spec.access import AccessKeySpec
from fastserve.spec.load import dump, read, read_file
from fastserve.spec.model import AccessKey, HardwareProfile, Model

CASES = Path(__file__).parents[2] / "data" / "cases"
SMALLEST = {"Model": "{source: a}", "HardwareProfile": "{cpus: 1, memory: 1GiB}", "AccessKey": "{models: [a]}"}
HEAD = "apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {name: a}\n"


def problems_of(text: str) -> tuple[Problem, ...]:
    with pytest.raises(ManifestInvalid) as caught:
        read(text, "m.yaml")
    return caught.value.problems


def problems_of_file(path: Path) -> tuple[Problem, ...]:
    with pytest.raises(ManifestInvalid) as caught:
        read_file(path)
    return caught.value.problems


def model(spec: str) -> Model:
    (manifest,) = read(f"{HEAD}spec: {spec}\n")
    assert isinstance(manifest, Model)
    return manifest


def only(spec: str) -> Problem:
    (problem,) = problems_of(f"{HEAD}spec: {spec}\n")
    return problem


class TestCase21NumbersThatAreNot:
    def test_the_number_forms_of_the_manifest_page_are_numbers(self) -> None:
        bond, key = read_file(CASES / "21-scalars.yaml")
        assert isinstance(bond, Model)
        assert isinstance(key, AccessKey)
        assert (bond.metadata.name, key.metadata.name, key.spec.models) == ("007", "on", ["007"])
        assert bond.spec.source.revision == "1e5f2c"
        assert bond.spec.train is not None
        assert bond.spec.train.learning_rate == 0.0002
        assert bond.spec.train.steps == 100_000
        assert isinstance(bond.spec.train.steps, int)
        assert bond.spec.train.batch_tokens == 131_072
        assert key.spec.token_budget is not None
        assert key.spec.token_budget.tokens == 2_500_000_000
        assert key.spec.expires == datetime.date(2031, 1, 9)

    def test_dumped_they_are_json_numbers(self) -> None:
        bond, key = (json.loads(json.dumps(dump(manifest))) for manifest in read_file(CASES / "21-scalars.yaml"))
        train = bond["spec"]["train"]
        assert (train["learningRate"], train["steps"], train["batchTokens"]) == (0.0002, 100_000, 131_072)
        assert key["spec"]["tokenBudget"]["tokens"] == 2_500_000_000
        assert key["spec"]["expires"] == "2031-01-09"

    @pytest.mark.parametrize("form", ["2.0e-4", "0.0002", "2E-4", "2e-4", "200e-6"])
    def test_every_form_of_a_number_means_the_same(self, form: str) -> None:
        text = (CASES / "21-scalars.yaml").read_text()
        assert read(text.replace("2e-4", form)) == read(text)

    @pytest.mark.parametrize("form", ["1.5e0", "1e5x", '"100"', "yes", "[1]", "{a: 1}"])
    def test_steps_that_are_not_whole_name_steps(self, form: str) -> None:
        text = (CASES / "21-scalars.yaml").read_text().replace("steps: 1e5", f"steps: {form}")
        (problem,) = problems_of(text)
        assert problem.path == "spec.train.steps"
        assert "whole number" in problem.message
        assert problem.line == 6

    def test_unquoted_words_are_refused_in_one_go_with_what_to_write(self) -> None:
        found = [(p.path, p.line, p.suggestion) for p in problems_of_file(CASES / "21-unquoted.yaml")]
        assert found == [
            ("metadata.name", 3, '"off"'),
            ("spec.source.revision", 7, '"0755"'),
            ("spec.serve.adapters[1].name", 8, '"no"'),
        ]

    def test_unquoted_words_are_shown_with_what_they_are_read_as(self) -> None:
        off, octal, no = (p.message for p in problems_of_file(CASES / "21-unquoted.yaml"))
        assert "off is false" in off
        assert "493" in octal
        assert "no is false" in no
        assert all("put it in quotes" in message for message in (off, octal, no))

    def test_a_clock_time_is_not_a_duration(self) -> None:
        problem = only("{source: a, serve: {rollout: {hold: 1:30}}}")
        assert problem.path == "spec.serve.rollout.hold"
        assert "write 90s" in problem.message

    def test_a_word_in_quotes_is_text(self) -> None:
        manifest = model('{source: a, serve: {adapters: [{name: "no", source: s3://acme/lora}]}}')
        assert manifest.spec.serve is not None
        assert manifest.spec.serve.adapters[0].name == "no"

    @pytest.mark.parametrize(("form", "choice"), [("0123", "write 123 or 83"), ("08", "write 8"), ("0_17", "17 or 15")])
    def test_a_number_that_begins_with_a_zero_is_never_guessed(self, form: str, choice: str) -> None:
        problem = only(f"{{source: a, train: {{dataset: b, seed: {form}}}}}")
        assert problem.path == "spec.train.seed"
        assert choice in problem.message

    @pytest.mark.parametrize(
        "form", ["2027-6-30", "30.06.2027", "20270630", "1e9", "2027-06-30T00:00:00Z", "2027-02-30"]
    )
    def test_a_day_has_one_form(self, form: str) -> None:
        (problem,) = problems_of(
            f"{HEAD.replace('Model', 'AccessKey')}spec: {{models: [a], expires: {form}}}\n",
        )
        assert problem.path == "spec.expires"
        assert "YYYY-MM-DD" in problem.message

    @pytest.mark.parametrize("form", ['"yes"', "1", '"true"'])
    def test_a_flag_is_true_or_false(self, form: str) -> None:
        problem = only(f"{{source: a, serve: {{engine: {{prefixCaching: {form}}}}}}}")
        assert "true or false" in problem.message

    @pytest.mark.parametrize(("form", "value"), [("on", True), ("no", False), ("true", True)])
    def test_a_flag_takes_the_words_that_kubectl_takes(self, form: str, value: bool) -> None:
        serve = model(f"{{source: a, serve: {{engine: {{prefixCaching: {form}}}}}}}").spec.serve
        assert serve is not None
        assert serve.engine.prefix_caching is value


class TestCase20HabitsOfOtherHouses:
    def test_every_key_of_kubeai_is_named_with_ours(self) -> None:
        found = {p.path: (p.line, p.suggestion) for p in problems_of_file(CASES / "20-kubeai-habits.yaml")}
        assert found == {
            "spec.source": (4, "source"),
            "spec.resourceProfile": (5, "serve.profiles"),
            "spec.minReplicas": (6, "serve.replicas"),
            "spec.maxReplicas": (7, "serve.replicas"),
            "spec.features": (8, "serve.task"),
            "spec.engine": (9, "serve.engine"),
            "spec.args": (10, "serve.engine"),
            "spec.url": (11, "source"),
            "spec.targetRequests": (12, "serve.target"),
        }

    def test_the_extra_arguments_have_a_place(self) -> None:
        by_path = {p.path: p.message for p in problems_of_file(CASES / "20-kubeai-habits.yaml")}
        assert "extraArgs" in by_path["spec.args"]
        assert "extraArgs" in by_path["spec.engine"]
        assert "missing" in by_path["spec.source"]

    def test_a_foreign_block_is_named_once(self) -> None:
        missing, predictor = problems_of_file(CASES / "20-kserve-habits.yaml")
        assert (missing.path, predictor.path) == ("spec.source", "spec.predictor")
        assert predictor.suggestion == "source"
        assert "`source` for storageUri" in predictor.message
        assert "`serve.replicas` for minReplicas" in predictor.message

    def test_an_object_of_kserve_is_named_by_its_kind(self) -> None:
        (problem,) = problems_of("apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\nmetadata: {name: a}\n")
        assert (problem.path, problem.suggestion, problem.line) == ("kind", "Model", 2)


class TestKeys:
    @pytest.mark.parametrize(
        ("spec", "path", "suggestion"),
        [
            ("{source: a, trian: {}}", "spec.trian", "train"),
            ("{source: a, serve: {replica: {min: 0}}}", "spec.serve.replica", "replicas"),
            ("{source: a, train: {dataset: b, batch_tokens: 1}}", "spec.train.batch_tokens", "batchTokens"),
            ("{source: a, train: {dataset: b, BatchTokens: 1}}", "spec.train.BatchTokens", "batchTokens"),
            ("{source: a, replicas: {min: 0}}", "spec.replicas", "serve.replicas"),
            ("{source: a, train: {dataset: b, rank: 8}}", "spec.train.rank", "train.lora.rank"),
            ("{source: a, train: {dataset: b, num_train_epochs: 1}}", "spec.train.num_train_epochs", "train.epochs"),
            ("{source: a, quantize: {format: int8}}", "spec.quantize", "compress"),
            ("{source: {url: b}}", "spec.source.url", "uri"),
            ("{source: a, zzz: 1}", "spec.zzz", None),
        ],
    )
    def test_an_unknown_key_names_the_right_one(self, spec: str, path: str, suggestion: str | None) -> None:
        found = {p.path: p for p in problems_of(f"{HEAD}spec: {spec}\n")}
        assert found[path].suggestion == suggestion
        assert "unknown key" in found[path].message

    def test_an_unknown_key_in_another_kind_is_not_searched_in_models(self) -> None:
        (problem,) = problems_of(f"{HEAD.replace('Model', 'AccessKey')}spec: {{models: [a], url: b}}\n")
        assert problem.suggestion is None
        assert "one of: models" in problem.message

    def test_a_block_with_nothing_in_it_must_say_so(self) -> None:
        problem = only("{source: a, serve: }")
        assert problem.path == "spec.serve"
        assert "serve: {}" in problem.message

    def test_a_limit_that_null_switches_off_stays_off(self) -> None:
        manifest = model("{source: a, evaluate: {data: b, gate: {klDivergence: null}}}")
        assert manifest.spec.evaluate is not None
        assert manifest.spec.evaluate.gate is not None
        assert manifest.spec.evaluate.gate.kl_divergence is None
        assert read(json.dumps(dump(manifest))) == [manifest]

    def test_limits_of_tasks_are_keys_of_their_own(self) -> None:
        tasks = "tasks: [{name: triage, data: c}]"
        manifest = model(f"{{source: a, evaluate: {{data: b, {tasks}, gate: {{task.triage: {{min: 0.8}}}}}}}}")
        assert manifest.spec.evaluate is not None
        assert manifest.spec.evaluate.gate is not None
        assert manifest.spec.evaluate.gate.tasks["triage"].min == 0.8
        assert dump(manifest)["spec"]["evaluate"]["gate"] == {"task.triage": {"min": 0.8}}

    @pytest.mark.parametrize(
        ("gate", "path"),
        [
            ("{task.triage: {minn: 1}}", "spec.evaluate.gate.task.triage.minn"),
            ("{task.triage: {min: 2}}", "spec.evaluate.gate.task.triage.min"),
            ("{task.triage: 3}", "spec.evaluate.gate.task.triage"),
            ("{task.triage: {}}", "spec.evaluate.gate.task.triage"),
            ("{task.other: {min: 1}}", "spec.evaluate.gate.task.other"),
            ("{task.triage: {min: 01}}", "spec.evaluate.gate.task.triage.min"),
            ("{tasks: {triage: {min: 1}}}", "spec.evaluate.gate.tasks"),
        ],
    )
    def test_a_wrong_limit_is_named_as_it_is_written(self, gate: str, path: str) -> None:
        evaluate = f"    data: b\n    tasks: [{{name: triage, data: c}}]\n    gate: {gate}\n"
        text = f"{HEAD}spec:\n  source: a\n  evaluate:\n{evaluate}"
        (problem,) = problems_of(text)
        assert (problem.path, problem.line) == (path, 9)


class TestKinds:
    def test_three_kinds_may_stand_in_one_file(self) -> None:
        text = (
            f"{HEAD}spec: {{source: a, serve: {{}}}}\n---\n"
            f"{HEAD.replace('Model', 'HardwareProfile')}spec: {{cpus: 8, memory: 32GiB}}\n---\n"
            f"{HEAD.replace('Model', 'AccessKey')}spec: {{models: [a]}}\n"
        )
        assert [type(manifest) for manifest in read(text)] == [Model, HardwareProfile, AccessKey]

    @pytest.mark.parametrize(
        ("kind", "near"), [("model", "Model"), ("Modle", "Model"), ("HardwareProfil", "HardwareProfile")]
    )
    def test_a_misspelled_kind_names_the_right_one(self, kind: str, near: str) -> None:
        (problem,) = problems_of(f"{HEAD.replace('Model', kind)}spec: {SMALLEST[near]}\n")
        assert (problem.path, problem.line, problem.suggestion) == ("kind", 2, near)

    def test_a_misspelled_kind_does_not_hide_what_else_is_wrong(self) -> None:
        paths = [p.path for p in problems_of(f"{HEAD.replace('Model', 'model')}spec: {{source: a, trian: {{}}}}\n")]
        assert paths == ["kind", "spec.trian"]

    def test_a_kind_of_kubernetes_belongs_in_another_file(self) -> None:
        (problem,) = problems_of("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {a: b}\n")
        assert "file of its own" in problem.message

    @pytest.mark.parametrize(
        "text", ["a: 1\n", "apiVersion: fastserve.dev/v1alpha1\n", "kind: [Model]\n", "kind: on\n"]
    )
    def test_a_missing_kind_is_one_problem(self, text: str) -> None:
        (problem,) = problems_of(text)
        assert problem.path == "kind"
        assert "Model, HardwareProfile, AccessKey" in problem.message

    @pytest.mark.parametrize("text", ["- a\n", "just words\n", "3\n", "[]\n"])
    def test_what_is_no_mapping_is_no_manifest(self, text: str) -> None:
        (problem,) = problems_of(text)
        assert "is not a manifest" in problem.message
        assert problem.line == 1

    @pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n---\n", "\ufeff", "null\n"])
    def test_an_empty_file_holds_no_manifest(self, text: str) -> None:
        (problem,) = problems_of(text)
        assert "holds no manifest" in problem.message

    def test_two_of_one_kind_and_name_are_refused_with_both_lines(self) -> None:
        (problem,) = problems_of(f"{HEAD}spec: {{source: a}}\n---\n{HEAD}spec: {{source: b}}\n")
        assert (problem.path, problem.line) == ("metadata.name", 8)
        assert "line 3" in problem.message

    def test_a_model_and_a_key_may_share_a_name(self) -> None:
        text = f"{HEAD}spec: {{source: a}}\n---\n{HEAD.replace('Model', 'AccessKey')}spec: {{models: [a]}}\n"
        assert len(read(text)) == 2

    def test_problems_of_all_documents_come_at_once_in_order(self) -> None:
        text = f"{HEAD}spec: {{}}\n---\n{HEAD.replace('name: a', 'name: b')}spec: {{source: a, x: 1}}\n"
        assert [(p.path, p.line) for p in problems_of(text)] == [("spec.source", 4), ("spec.x", 9)]

    def test_what_the_api_server_wrote_is_no_wish(self) -> None:
        text = (
            "apiVersion: fastserve.dev/v1alpha1\nkind: Model\n"
            "metadata: {name: a, uid: 1f, generation: 3, creationTimestamp: 2027-01-01, managedFields: [{}]}\n"
            "spec: {source: b}\nstatus: {stages: {train: {state: Done}}}\n"
        )
        assert read(text) == read(f"{HEAD}spec: {{source: b}}\n")

    @pytest.mark.parametrize("others", ["", ", owner: a"])
    def test_what_kubectl_noted_is_no_wish(self, others: str) -> None:
        noted = "kubectl.kubernetes.io/last-applied-configuration: '{}'"
        text = f"{HEAD}spec: {{source: b}}\n".replace("name: a", f"name: a, annotations: {{{noted}{others}}}")
        (model,) = read(text)
        assert model.metadata.annotations == ({"owner": "a"} if others else {})

    def test_another_version_is_refused(self) -> None:
        problem = problems_of(f"{HEAD.replace('fastserve.dev/v1alpha1', 'kubeai.org/v1')}spec: {{source: a}}\n")[0]
        assert (problem.path, problem.suggestion) == ("apiVersion", "fastserve.dev/v1alpha1")


class TestFiles:
    def write(self, folder: Path, text: str | bytes) -> Path:
        path = folder / "a b.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("data", "file://{folder}/data"),
            ("./data/", "file://{folder}/data"),
            ("data/*.jsonl", "file://{folder}/data/*.jsonl"),
            ("my data.gguf", "file://{folder}/my data.gguf"),
            ("../x", "file://{parent}/x"),
            ("/srv/x", "file:///srv/x"),
            ("~/x", "file://{home}/x"),
            ("ümlaut%20", "file://{folder}/ümlaut%20"),
            ("file:///srv/x", "file:///srv/x"),
            ("hf://org/name@main", "hf://org/name@main"),
            ("s3://b/p", "s3://b/p"),
            ("package://p/q", "package://p/q"),
            ("pvc://c/p", "pvc://c/p"),
        ],
    )
    def test_a_plain_path_is_taken_from_the_folder_of_the_manifest(
        self, tmp_path: Path, written: str, meant: str
    ) -> None:
        meant = meant.format(folder=tmp_path, parent=tmp_path.parent, home=Path.home())
        for source in (f'"{written}"', f'{{uri: "{written}"}}'):
            (manifest,) = read_file(self.write(tmp_path, f"{HEAD}spec: {{source: {source}}}\n"))
            assert isinstance(manifest, Model)
            assert manifest.spec.source.uri == meant

    def test_every_source_of_a_model_is_placed(self, tmp_path: Path) -> None:
        spec = (
            "{source: a, train: {dataset: b}, compress: [{quantize: {format: int8, calibration: {data: c}}}], "
            "evaluate: {data: d, tasks: [{name: t, data: e}]}, serve: {adapters: [{name: f, source: g}]}}"
        )
        (manifest,) = read_file(self.write(tmp_path, f"{HEAD}spec: {spec}\n"))
        assert json.dumps(dump(manifest)).count(f"file://{tmp_path}/") == 6

    def test_without_a_file_a_plain_path_stays(self) -> None:
        assert model("{source: data}").spec.source.uri == "data"

    def test_the_messages_name_the_file(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, f"{HEAD}spec: {{}}\n")
        (problem,) = problems_of_file(path)
        assert str(problem).startswith(f"{path}:4: spec.source: is missing")

    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
    @pytest.mark.parametrize("end", [b"\n", b"\r\n"])
    def test_marks_and_line_ends_of_windows_do_no_harm(self, tmp_path: Path, mark: bytes, end: bytes) -> None:
        text = f"{HEAD}spec:\n  source: s3://a/b\n  serve: {{}}\n".encode()
        path = self.write(tmp_path, mark + text.replace(b"\n", end))
        assert read_file(path) == read(text.decode())

    def test_another_encoding_is_refused_with_its_line(self, tmp_path: Path) -> None:
        (problem,) = problems_of_file(self.write(tmp_path, HEAD.encode() + b"spec: {source: \xfc}\n"))
        assert problem.line == 4
        assert "UTF-8" in problem.message

    def test_a_missing_file_is_one_clear_problem(self, tmp_path: Path) -> None:
        (problem,) = problems_of_file(tmp_path / "none.yaml")
        assert "no such file" in problem.message

    def test_a_folder_is_no_manifest(self, tmp_path: Path) -> None:
        (problem,) = problems_of_file(tmp_path)
        assert "is a folder" in problem.message

    @pytest.mark.timeout(10)
    def test_a_file_without_an_end_is_no_manifest(self) -> None:
        (problem,) = problems_of_file(Path("/dev/zero"))
        assert "far too large" in problem.message

    @pytest.mark.parametrize("name", ["a\0b", "a" * 300])
    def test_an_impossible_path_is_one_clear_problem(self, tmp_path: Path, name: str) -> None:
        (problem,) = problems_of_file(tmp_path / name)
        assert "cannot be read" in problem.message


def test_the_page_of_the_manifest_is_read_in_full() -> None:
    text = (Path(__file__).parents[2] / "data" / "every-section.yaml").read_text()
    support_chat, l4, search_team = read(text)
    assert isinstance(support_chat, Model)
    assert isinstance(l4, HardwareProfile)
    assert isinstance(search_team, AccessKey)
    assert support_chat.spec.train is not None
    assert support_chat.spec.train.worker_count == 6
    assert l4.spec.accelerator is not None
    assert l4.spec.accelerator.memory == 24 * 2**30
    assert search_team.spec.token_budget is not None
    assert search_team.spec.token_budget.window == 30 * 86_400


def test_a_manifest_made_in_python_can_be_dumped_and_read() -> None:
    made = AccessKey(
        api_version="fastserve.dev/v1alpha1",
        kind="AccessKey",
        metadata={"name": "a"},
        spec=AccessKeySpec(models=["a"], expires=None, token_budget=None),
    )
    assert dump(made)["spec"] == {"models": ["a"]}
    assert read(json.dumps(dump(made))) == [made]
