from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import model_files
import pytest

import fastserve
from fastserve.artifacts.safetensors_header import check, check_index, total
from fastserve.errors import SourceInvalid


def one(**changed: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changed}


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    return path


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    tensors = {
        "__metadata__": {"format": "pt"},
        "a": one(),
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]},
        "c": {"dtype": "F4", "shape": [4], "data_offsets": [10, 12]},
        "d": {"dtype": "I64", "shape": [0, 3], "data_offsets": [12, 12]},
    }
    header = check(write(tmp_path, model_files.safetensors(tensors)))
    assert header.weight_bytes == 12
    assert header.tensors["a"].elements == 2
    assert total({"x": header}) == (7, 12)


def test_what_the_library_writes_is_sound(tmp_path: Path) -> None:
    import numpy
    from safetensors.numpy import save_file

    save_file({"a": numpy.ones((3, 4), "float16"), "b": numpy.zeros(7)}, tmp_path / "x.safetensors", {"format": "pt"})
    assert check(tmp_path / "x.safetensors").weight_bytes == 24 + 56


@pytest.mark.parametrize(
    ("tensors", "data_bytes", "why"),
    [
        ({"a": one()}, 7, "only 7 bytes follow"),
        ({"a": one()}, 9, "belong to no tensor"),
        ({"a": one(), "b": one()}, 8, "overlap"),
        ({"a": one(), "b": one(data_offsets=[4, 12])}, 12, "overlap"),
        ({"a": one(), "b": one(data_offsets=[9, 17])}, 17, "unused bytes"),
        ({"a": one(data_offsets=[8, 0])}, 8, "shape and dtype need"),
        ({"a": one(data_offsets=[0, 4])}, 4, "shape and dtype need"),
        ({"a": one(data_offsets=[-8, 0])}, 8, "data_offsets"),
        ({"a": one(data_offsets=[0, 2**64])}, 8, "data_offsets"),
        ({"a": one(data_offsets=[0.0, 8.0])}, 8, "data_offsets"),
        ({"a": one(data_offsets=[0, 8, 9])}, 8, "data_offsets"),
        ({"a": one(shape=[2**62, 4])}, 8, "more elements"),
        ({"a": one(shape=[True])}, 8, "shape"),
        ({"a": one(shape=[-2])}, 8, "shape"),
        ({"a": one(shape=[1] * 1000)}, 8, "shape"),
        ({"a": one(dtype="F128")}, 8, "unknown dtype 'F128'"),
        ({"a": one(dtype=["F32"])}, 8, "unknown dtype"),
        ({"a": one(dtype="F4", shape=[3], data_offsets=[0, 1])}, 1, "shape and dtype need"),
        ({"a": one(extra=1)}, 8, "something else"),
        ({"a": [0, 8]}, 8, "something else"),
        ({"a": one(), "__metadata__": {"x": 1}}, 8, "__metadata__"),
    ],
)
def test_a_claim_that_does_not_hold_is_refused(
    tmp_path: Path, tensors: dict[str, object], data_bytes: int, why: str
) -> None:
    with pytest.raises(SourceInvalid, match=why) as caught:
        check(write(tmp_path, model_files.safetensors(tensors, data_bytes)))
    assert "model.safetensors" in str(caught.value)
    assert "fetch it again or replace it" in str(caught.value)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"[]", "not a JSON object"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a": 1, "a": 1}', "gives 'a' twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [], "data_offsets": [0, 4]}}', "gives 'dtype' twice"),
    ],
)
def test_a_header_that_is_not_what_the_format_says_is_refused(tmp_path: Path, header: bytes, why: str) -> None:
    with pytest.raises(SourceInvalid, match=why):
        check(write(tmp_path, model_files.safetensors(header=header, data_bytes=4)))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = model_files.safetensors()
    for kept in range(0, len(whole), 7):
        with pytest.raises(SourceInvalid):
            check(write(tmp_path, whole[:kept]))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 25 * 10**6 + 1])
def test_a_header_of_absurd_length_is_refused_at_once_and_in_little_memory(tmp_path: Path, length: int) -> None:
    path = write(tmp_path, struct.pack("<Q", length) + b"{}")
    with path.open("r+b") as file:
        file.truncate(2**36)  # sparse: as if the bytes were there
    # VmHWM counts from exec on; ru_maxrss would hand down this process's own peak.
    code = (
        "import pathlib, sys\n"
        "from fastserve.artifacts.safetensors_header import check\n"
        "from fastserve.errors import SourceInvalid\n"
        "try: check(pathlib.Path(sys.argv[1]))\n"
        "except SourceInvalid: print(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    )
    environment = {"PYTHONPATH": str(Path(fastserve.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, env=environment
    )
    assert int(done.stdout) * 1024 < 200 * 10**6
    with pytest.raises(SourceInvalid, match="at most 25000000 are read"):
        check(path)


def test_an_index_names_only_what_is_there(tmp_path: Path) -> None:
    header = check(write(tmp_path, model_files.safetensors({"a": one()})))
    check_index({"weight_map": {"a": "x.safetensors"}}, {"x.safetensors": header}, "i")
    for index, why in (
        ({"weight_map": {"a": "y.safetensors"}}, r"'y\.safetensors', which is not there"),
        ({"weight_map": {"a": "../x.safetensors"}}, "is not there"),
        ({"weight_map": {"b": "x.safetensors"}}, "does not hold it"),
        ({"weight_map": ["x"]}, "no weight_map"),
        ({}, "no weight_map"),
    ):
        with pytest.raises(SourceInvalid, match=why):
            check_index(json.loads(json.dumps(index)), {"x.safetensors": header}, "i")
