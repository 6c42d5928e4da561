from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest

from fastserve.artifacts.file_types import check_collisions, check_content, check_name, choose, regular_files
from fastserve.errors import SourceInvalid

MODEL = ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "a/b.pt",
        "x.pth",
        "x.pkl",
        "x.PICKLE",
        "x.ckpt",
        "x.pt2",
        "x.npy",
        "x.npz",
        "model.tar",
        "x.zip",
    ],
)
@pytest.mark.parametrize("role", ["model", "data", "adapter"])
def test_a_file_that_may_run_code_when_loaded_is_refused_by_name(name: str, role: str) -> None:
    with pytest.raises(SourceInvalid, match="can run code when it is loaded") as caught:
        choose([*MODEL, name], role, "hf://acme/model")  # type: ignore[arg-type]
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["modeling_acme.py", "pkg/__init__.py", "x.so", "run.sh", "x.pyc"])
def test_code_beside_the_weights_is_refused_by_name(name: str) -> None:
    with pytest.raises(SourceInvalid, match="runs no code from a source") as caught:
        choose([*MODEL, name], "model", "hf://acme/model")
    assert name in str(caught.value)


def test_harmless_files_stay_where_they_are() -> None:
    beside = ["README.md", ".gitattributes", "onnx/model.onnx", "logo.png", ".cache/x.json", "model.gguf"]
    assert choose([*MODEL, *beside], "model", "x") == MODEL


def test_the_same_weights_in_another_layout_stay_out() -> None:
    names = [*MODEL, "consolidated.safetensors", "original/consolidated.00.safetensors", "original/params.json"]
    assert choose(names, "model", "x") == MODEL
    assert choose(["config.json", "consolidated.safetensors"], "model", "x") == [
        "config.json",
        "consolidated.safetensors",
    ]


def test_a_folder_of_several_gguf_files_asks_for_one() -> None:
    with pytest.raises(SourceInvalid, match=r"name one of them, such as hf://acme/x/a\.gguf@main"):
        choose(["a.gguf", "b.gguf"], "model", "hf://acme/x@main")
    assert choose(["a.gguf", "README.md", "config.json"], "model", "x") == ["a.gguf"]


def test_a_folder_without_weights_says_what_is_missing() -> None:
    with pytest.raises(SourceInvalid, match=r"no weights; a model needs \*\.safetensors, config\.json"):
        choose(["tokenizer.json", "README.md"], "model", "x")


def test_a_shape_without_weights_is_brought_in_for_a_model_from_scratch() -> None:
    assert choose(["config.json", "README.md"], "model", "x") == ["config.json"]


def test_an_adapter_needs_its_configuration() -> None:
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert choose(names, "adapter", "x") == names
    with pytest.raises(SourceInvalid, match=r"no adapter_config\.json"):
        choose(MODEL, "adapter", "x")
    with pytest.raises(SourceInvalid, match=r"needs adapter_config\.json and adapter_model\.safetensors"):
        choose(["adapter_config.json"], "adapter", "x")


def test_a_data_set_consists_of_rows_only() -> None:
    assert choose(["b.jsonl", "a.parquet", "c.txt", "LICENSE.txt", "dataset_infos.json"], "data", "x") == [
        "a.parquet",
        "b.jsonl",
        "c.txt",
    ]
    with pytest.raises(SourceInvalid, match=r"needs \.jsonl, \.parquet, \.txt or \.text"):
        choose(["rows.csv"], "data", "x")


@pytest.mark.parametrize(
    "path",
    ["../evil.json", "a/../../b.json", "/etc/x.json", "C:/x.json", "a\\b.json", "a\0b.json", "a\nb.json", "a//b.json",
     "./a.json", "", "a/", "con", "a/NUL.json", "a\u2028b.json", "x" * 2000],
)  # fmt: skip
def test_a_path_that_could_leave_the_folder_is_refused_by_name(path: str) -> None:
    with pytest.raises(SourceInvalid, match="nothing was written"):
        check_name(path, "x")


@pytest.mark.parametrize("path", ["a#b.json", "a?b.json", "%2e%2e/a.json", "a%5Cb.json", "a%00.json"])
def test_a_name_that_means_something_else_in_an_address_is_refused_from_afar_only(path: str) -> None:
    with pytest.raises(SourceInvalid, match="in an address"):
        check_name(path, "x", remote=True)
    assert check_name(path, "x") == path


@pytest.mark.parametrize(
    ("one", "other"), [("A.json", "a.json"), ("stra\u00dfe.txt", "STRASSE.txt"), ("\u00e9.txt", "e\u0301.txt")]
)
def test_two_names_that_are_one_elsewhere_are_refused(one: str, other: str) -> None:
    with pytest.raises(SourceInvalid, match="one file where case is ignored"):
        check_collisions([one, other], "x")


def _torch_zip() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    return held.getvalue()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "rows.jsonl", "tokenizer.model", "model.gguf", "x.txt"]
)
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (_torch_zip(), "a zip archive"),
        (pickle.dumps(print, protocol=2), "a pickle"),
        (pickle.dumps({"a": [1] * 50}, protocol=4), "a pickle"),
        (b"\x7fELF" + b"\0" * 20, "a program"),
        (b"\x1f\x8b\x08" + b"\0" * 20, "a compressed archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_a_pickle_or_archive_under_another_name_is_refused(tmp_path: Path, name: str, data: bytes, what: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(SourceInvalid, match=what) as caught:
        check_content(path, name, "x")
    assert name in str(caught.value)


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x5A4D, 0x2123, 0x8B1F])
def test_a_header_length_that_looks_like_a_signature_is_no_disguise(tmp_path: Path, length: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(length.to_bytes(8, "little") + b'{"__metadata__": {}}')
    check_content(path, "model.safetensors", "x")


@pytest.mark.parametrize(
    "value",
    [
        {"auto_map": {"AutoModel": "acme--model.Model"}},
        {"a": {"b": [{"auto_map": "x"}]}},
        {"text_config": {"trust_remote_code": True}},
        [{"trust_remote_code": "yes"}],
        {"attn_implementation": "acme/kernel"},
    ],
)
def test_json_that_asks_for_code_is_refused_however_deep(tmp_path: Path, value: object) -> None:
    path = tmp_path / "file"
    for text in (json.dumps(value), json.dumps(value).replace("auto", "\\u0061uto").replace("trust", "\\u0074rust")):
        path.write_text(text)
        with pytest.raises(SourceInvalid, match="asks for code from elsewhere"):
            check_content(path, "config.json", "x")


def test_a_token_that_reads_like_a_setting_is_no_setting(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(
        json.dumps({"model": {"vocab": {"auto_map": 7, "trust_remote_code": 8}}, "trust_remote_code": False})
    )
    check_content(path, "tokenizer.json", "x")
    with pytest.raises(SourceInvalid, match="asks for code"):
        check_content(path, "config.json", "x")


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000, '{"a": ' * 200 + "1" + "}" * 200, "\xff\xfe"])
def test_json_that_is_none_or_too_deep_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(SourceInvalid, match=r"'config\.json'"):
        check_content(path, "config.json", "x")


def test_a_link_that_leaves_the_folder_is_refused_and_one_that_stays_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.json").write_text("{}")
    (folder / "real.json").write_text("{}")
    (folder / "alias.json").symlink_to("real.json")
    assert regular_files(folder, "x") == ["alias.json", "real.json"]
    (folder / "out.json").symlink_to("../secret.json")
    with pytest.raises(SourceInvalid, match=r"'out\.json' is a link that leaves the folder"):
        regular_files(folder, "x")


@pytest.mark.parametrize("kind", ["folder", "nothing", "pipe"])
def test_what_is_no_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    if kind == "folder":
        (folder / "odd").symlink_to(folder / "sub")
    elif kind == "nothing":
        (folder / "odd").symlink_to(folder / "gone")
    else:
        os.mkfifo(folder / "odd")
    with pytest.raises(SourceInvalid, match="'odd' is"):
        regular_files(folder, "x")
