"""A tokenizer of one's own: what a model that begins from random weights reads its data set with.

Byte-level byte-pair encoding (Sennrich et al., 2016, arXiv 1508.07909; on bytes as in GPT-2, Radford et al., 2019). The
256 bytes are always in it, so there is no text that it cannot write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fastserve.data.rows import data_files, read_rows
from fastserve.data.running_text import is_running_text, text_blocks
from fastserve.errors import DatasetInvalid, ManifestInvalid, Problem

END_OF_TEXT = "<|endoftext|>"
FEWEST = 257
"""256 bytes and the end token."""


def train_tokenizer(data: Path, vocabulary: int, into: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, trained on everything that the rows at `data` say.

    vocabulary: most tokens, END_OF_TEXT and the 256 bytes among them; a small text gives fewer.
    into: folder, made when it is not there.

    The text passes by once and is not held. The same text and size give the same bytes. Raises DatasetInvalid for rows
    that cannot be read or say nothing, ManifestInvalid for a vocabulary below FEWEST.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocabulary < FEWEST:
        problem = f"is {vocabulary}; it needs {FEWEST} or more, since 256 bytes and an end token are always in it"
        raise ManifestInvalid([Problem("spec.train.scratch.vocabulary", problem)])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(END_OF_TEXT, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = _texts(data)
    first = next(texts, None)
    if first is None:
        raise DatasetInvalid(f"{data.name}: the data set is empty; give it rows")
    tokenizer.train_from_iterator(_after(first, texts), trainer)
    into.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(into / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
    }
    (into / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _texts(data: Path) -> Iterator[str]:
    for file in data_files(data):
        if is_running_text(file):
            yield from text_blocks(file)
            continue
        for row in read_rows(file):
            if row.text:
                yield row.text
            yield from (str(message["content"]) for message in row.messages if message["content"])


def _after(first: str, texts: Iterator[str]) -> Iterator[str]:
    yield first
    yield from texts
