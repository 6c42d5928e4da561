"""The tokenizer of a .gguf header as the text of a tokenizer.json.

GGUF names the splitter that a byte-level BPE needs (`tokenizer.ggml.pre`) and leaves its rules to the reader: they are
in llama.cpp's src/llama-vocab.cpp, and in the original models' tokenizer.json. The rules known here are exact; any
other name is refused, since a wrong splitter gives nearly the right tokens, which nobody notices.
"""

from __future__ import annotations

from typing import Any

from fastserve.artifacts.gguf_header import GgufHeader
from fastserve.errors import SourceInvalid

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of the format."""

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES_ONLY = {**_BYTE_LEVEL, "use_regex": False}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTES_ONLY]}


_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]}
_SPLITTERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTE_LEVEL,
    "phi-2": _BYTE_LEVEL,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _split(_LLAMA3),
    "llama3": _split(_LLAMA3),
    "llama-v3": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
    "deepseek-r1-qwen": _split(_QWEN2),
}
_NORMALISED = ("qwen2", "deepseek-r1-qwen")
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3")
_ADD_BOS = ("llama-bpe", "llama3", "llama-v3", "deepseek-r1-qwen")


def tokenizer_json(header: GgufHeader) -> dict[str, Any]:
    """The value of tokenizer.json. Raises SourceInvalid for a tokenizer that is not known exactly."""
    tokens = header.texts("tokenizer.ggml.tokens")
    kinds = header.wholes("tokenizer.ggml.token_type")
    if not tokens:
        raise SourceInvalid(
            "the GGUF header has no tokens (tokenizer.ggml.tokens); use a file made by a current converter"
        )
    if kinds and len(kinds) != len(tokens):
        raise SourceInvalid(f"the GGUF header has {len(tokens)} tokens but {len(kinds)} token types; replace the file")
    model = header.text("tokenizer.ggml.model")
    if model == "gpt2":
        parts = _byte_level(header, tokens)
    elif model == "llama":
        parts = _sentencepiece(header, tokens)
    else:
        raise SourceInvalid(
            f"the GGUF tokenizer model '{model}' is not known; use one of gpt2 or llama, or a folder in Hugging Face "
            "layout"
        )
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens(tokens, kinds), **parts}


def added_tokens(tokens: list[str], kinds: list[int]) -> list[dict[str, Any]]:
    """Entries for tokens that are found in text as a whole: control tokens, and those that the model's makers added."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": number, "content": tokens[number], **plain, "special": kind in (CONTROL, UNKNOWN)}
        for number, kind in enumerate(kinds)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN) and tokens[number]
    ]


def _byte_level(header: GgufHeader, tokens: list[str]) -> dict[str, Any]:
    pre = header.text("tokenizer.ggml.pre", "default")
    if pre not in _SPLITTERS:
        raise SourceInvalid(
            f"the GGUF tokenizer's splitter (tokenizer.ggml.pre) '{pre}' is not known; known are "
            f"{', '.join(_SPLITTERS)}: "
            "use the model's folder in Hugging Face layout instead"
        )
    merges = [merge.split(" ") for merge in header.texts("tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise SourceInvalid("the GGUF header gives a token twice; replace the file")
    for merge in merges:
        if len(merge) != 2 or any(part not in vocabulary for part in merge) or "".join(merge) not in vocabulary:
            raise SourceInvalid(
                f"the GGUF header's merge {' '.join(merge)!r:.60} does not join two tokens to a third; replace the file"
            )
    return {
        "normalizer": {"type": "NFC"} if pre in _NORMALISED else None,
        "pre_tokenizer": _SPLITTERS[pre],
        "post_processor": _with_bos(header, tokens, pre in _ADD_BOS),
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
        "model": _bpe(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS_FIRST),
    }


def _sentencepiece(header: GgufHeader, tokens: list[str]) -> dict[str, Any]:
    """BPE of SentencePiece: the pieces' scores give the order in which neighbours are joined."""
    scores = header.numbers("tokenizer.ggml.scores")
    kinds = header.wholes("tokenizer.ggml.token_type")
    if len(scores) != len(tokens) or not kinds:
        raise SourceInvalid(
            "the GGUF header has no score and type for each token; use a file made by a current converter"
        )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    ranked: list[tuple[float, int, int, list[str]]] = []
    for token, number in vocabulary.items():
        if kinds[number] != NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[number], vocabulary[left], vocabulary[right], [left, right]))
    ranked.sort(key=lambda item: item[:3])
    prefixed = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    start = [{"type": "Prepend", "prepend": "▁"}] if prefixed else []
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    unknown = tokens[kinds.index(UNKNOWN)] if UNKNOWN in kinds else None
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*start, blank]},
        "pre_tokenizer": None,
        "post_processor": _with_bos(header, tokens, default=True),
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            **_bpe(vocabulary, [item[3] for item in ranked]),
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], ignore_merges: bool = False) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": vocabulary,
        "merges": merges,
    }


def _with_bos(header: GgufHeader, tokens: list[str], default: bool) -> dict[str, Any] | None:
    """Puts the start token before a text, where the header or the kind of tokenizer asks for it."""
    number = header.metadata.get("tokenizer.ggml.bos_token_id")
    wanted = header.metadata.get("tokenizer.ggml.add_bos_token", default)
    if not wanted or not isinstance(number, int) or number >= len(tokens):
        return None
    bos = tokens[number]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }
