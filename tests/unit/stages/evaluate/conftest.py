from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from fastserve.artifacts.tokenizer import TokenizerFiles

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WORDS = [
    "<user>",
    "<assistant>",
    "<system>",
    "<end>",
    "<unknown>",
    "what",
    "is",
    "the",
    "capital",
    "of",
    "France",
    "Italy",
    "Paris",
    "Rome",
    "yes",
    "no",
]


@pytest.fixture
def files():
    """A tokenizer with one token a word, and a chat template."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TokenizerFiles(tokenizer.to_str(), TEMPLATE)


@pytest.fixture
def write_rows(tmp_path):
    """Writes chat rows, each a list of turns, user first."""

    def write(*rows, name="rows.jsonl"):
        lines = []
        for turns in rows:
            roles = ["user", "assistant"] * len(turns)
            messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
            lines.append(json.dumps({"messages": messages}) + "\n")
        path = tmp_path / name
        path.write_text("".join(lines), encoding="utf-8")
        return path

    return write
