"""A model from scratch before its first step: configuration and tokenizer, the same wherever it is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from model_zoo import write_model

from fastserve.artifacts.tokenizer import load_tokenizer
from fastserve.errors import ManifestInvalid, SourceInvalid
from fastserve.spec.train import Train
from fastserve.stages.train.loading import load_network
from fastserve.stages.train.scratch import config_of, facts_of, prepare

TEXT = "The rabbit took a watch out of its waistcoat pocket, and looked at it, and then hurried on. " * 40


def section(**scratch: Any) -> Train:
    return Train.model_validate({"dataset": "x", "method": "scratch", "precision": "fp32", "scratch": scratch})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the source stage leaves of a folder without weights."""
    folder = write_model("llama", tmp_path_factory.mktemp("shape") / "model")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(TEXT)
    return path


def test_the_sources_tokenizer_is_kept_byte_for_byte(source: Path, book: Path, tmp_path: Path) -> None:
    made = prepare(source, book, section(config={"num_hidden_layers": 1}), tmp_path / "made")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (made / name).read_bytes() == (source / name).read_bytes()
    assert config_of(made)["num_hidden_layers"] == 1
    assert config_of(made)["vocab_size"] == 259
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert not list(made.glob("*.safetensors"))


def test_a_tokenizer_of_its_own_decides_the_vocabulary(source: Path, book: Path, tmp_path: Path) -> None:
    train = section(vocabulary=300)
    made = prepare(source, book, train, tmp_path / "made")
    files = load_tokenizer(made)
    tokenizer = files.tokenizer()
    config = config_of(made)
    assert config["vocab_size"] == tokenizer.get_vocab_size() <= 300
    assert config["eos_token_id"] == tokenizer.token_to_id(files.special["eos_token"])
    assert len(tokenizer.encode("waistcoat pocket").ids) < len("waistcoat pocket")
    assert tokenizer.decode(tokenizer.encode("Rabbit-hole, naïve: 12 %").ids) == "Rabbit-hole, naïve: 12 %"
    assert files.chat_template is None
    facts = facts_of(made, train)
    assert facts.vocab == config["vocab_size"]
    network = load_network(made, train, 64)
    assert network.trained["model.embed_tokens.weight"].shape[0] == config["vocab_size"]
    assert sum(parameter.numel() for parameter in network.trained.values()) == facts.parameters


def test_it_is_the_same_wherever_it_is_made(source: Path, book: Path, tmp_path: Path) -> None:
    train = section(vocabulary=300, config={"hidden_size": 16})
    folders = [prepare(source, book, train, tmp_path / name) for name in ("one", "two")]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]


def test_transformers_reads_the_tokenizer(source: Path, book: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = prepare(source, book, section(vocabulary=300), tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(made)
    ids = tokenizer("took a watch")["input_ids"]
    assert ids == load_tokenizer(made).tokenizer().encode("took a watch").ids
    assert tokenizer.eos_token_id == config_of(made)["eos_token_id"]


def test_what_does_not_fit_the_configuration_is_refused(source: Path, book: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestInvalid, match="hidden_sise"):
        prepare(source, book, section(config={"hidden_sise": 16}), tmp_path / "made")


def test_without_a_tokenizer_one_must_be_trained(source: Path, book: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(SourceInvalid, match=r"no tokenizer\.json"):
        prepare(bare, book, section(), tmp_path / "one")
    made = prepare(bare, book, section(vocabulary=300), tmp_path / "two")
    assert (made / "tokenizer.json").is_file()
