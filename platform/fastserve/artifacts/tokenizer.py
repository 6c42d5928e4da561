"""A model's tokenizer, special tokens, chat template and end tokens, read without transformers.

Converters lose parts of a tokenizer (the splitter, the end token), and one lost part is an answer that never stops. So
what a source says is read here, by rules that are written down, and what cannot be read exactly is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.artifacts.file_types import read_object
from fastserve.artifacts.gguf_header import GgufHeader, read_gguf
from fastserve.artifacts.gguf_tokenizer import UNKNOWN, tokenizer_json
from fastserve.errors import SourceInvalid

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TEMPLATE_LIMIT_BYTES = 2**20
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """All that turns text into tokens and back, and tells when an answer is over."""

    tokenizer_json: str
    """Text of tokenizer.json."""

    chat_template: str | None
    """Jinja source, if the model has one."""

    special: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by their usual names: bos_token, eos_token, unk_token, pad_token."""

    stops: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Ids that end an answer, by who says so: header, tokenizer, generation config."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer itself. Raises SourceInvalid when tokenizer.json cannot be read."""
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_str(self.tokenizer_json)
        except Exception as error:
            raise SourceInvalid(
                f"tokenizer.json cannot be read ({error}); fetch the model again or replace the file"
            ) from error


@dataclass(frozen=True, slots=True)
class StopSet:
    """Every token that ends an answer."""

    ids: tuple[int, ...]
    """Ascending."""

    warnings: tuple[str, ...]
    """Where the sources disagree, in words for the plan."""


def load_tokenizer(path: Path) -> TokenizerFiles:
    """The tokenizer of a folder in Hugging Face layout or of a .gguf file.

    Raises SourceInvalid that says what is missing, or names a tokenizer that cannot be read exactly.
    """
    if path.is_dir():
        models = sorted(path.glob("*.gguf"))
        if not (path / "config.json").exists() and len(models) == 1:
            return from_gguf(read_gguf(models[0]), models[0].name)
        return from_folder(path)
    return from_gguf(read_gguf(path), path.name)


def from_folder(folder: Path) -> TokenizerFiles:
    """The tokenizer of a folder in Hugging Face layout."""
    source = folder.name
    if not (folder / "tokenizer.json").is_file():
        slow = [name for name in ("tokenizer.model", "vocab.txt", "vocab.json") if (folder / name).is_file()]
        held = f"; it has {slow[0]}, which is not read" if slow else ""
        raise SourceInvalid(
            f"{source}: has no tokenizer.json{held}; save it with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) and add it"
        )
    read_object(folder / "tokenizer.json", "tokenizer.json", source)
    config = _object(folder, "tokenizer_config.json")
    special = _special_names(config) or _special_names(_object(folder, "special_tokens_map.json"))
    files = TokenizerFiles(
        tokenizer_json=(folder / "tokenizer.json").read_text(encoding="utf-8"),
        chat_template=_template(folder, config),
        special=special,
    )
    model = _object(folder, "config.json")
    text = model.get("text_config")
    stops = {
        "config.json": _ids(model.get("eos_token_id"), "config.json")
        or _ids(text.get("eos_token_id") if isinstance(text, dict) else None, "config.json"),
        "generation_config.json": _ids(
            _object(folder, "generation_config.json").get("eos_token_id"), "generation_config.json"
        ),
    }
    if special.get("eos_token"):
        end = files.tokenizer().token_to_id(special["eos_token"])
        stops["tokenizer"] = (int(end),) if end is not None else ()
    return TokenizerFiles(
        files.tokenizer_json, files.chat_template, special, {who: ids for who, ids in stops.items() if ids}
    )


def from_gguf(header: GgufHeader, name: str) -> TokenizerFiles:
    """The tokenizer inside a .gguf header. name: of the file, for messages."""
    try:
        tokens = header.texts("tokenizer.ggml.tokens")
        text = json.dumps(tokenizer_json(header), ensure_ascii=False)
    except SourceInvalid as error:
        raise SourceInvalid(f"{name}: {error}") from None
    kinds = header.wholes("tokenizer.ggml.token_type")
    special: dict[str, str] = {}
    for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        number = _token_id(header, key, len(tokens), name)
        if number is not None:
            special[role] = tokens[number]
    if "unk_token" not in special and UNKNOWN in kinds:
        special["unk_token"] = tokens[kinds.index(UNKNOWN)]
    ends = [_token_id(header, key, len(tokens), name) for key in ("eos", "eot", "eom")]
    stops = tuple(dict.fromkeys(number for number in ends if number is not None))
    template = header.metadata.get("tokenizer.chat_template")
    if template is not None and (not isinstance(template, str) or len(template) > _TEMPLATE_LIMIT_BYTES):
        raise SourceInvalid(
            f"{name}: its chat template is no text of at most {_TEMPLATE_LIMIT_BYTES} characters; replace the file"
        )
    return TokenizerFiles(text, template, special, {"header": stops} if stops else {})


def stop_set(files: TokenizerFiles, turn_end: int | None) -> StopSet:
    """Union of all tokens that end an answer, and a warning where they disagree.

    turn_end: id that the chat template writes after an assistant's turn (`data.template.turn_end`), or None.
    """
    said = {who: ids for who, ids in files.stops.items() if ids}
    union = {number for ids in said.values() for number in ids}
    warnings: list[str] = []
    if turn_end is not None:
        for who, ids in said.items():
            if turn_end not in ids and who != "config.json":
                shown = " and ".join(map(str, ids))
                both = "both" if len(ids) == 1 else "all"
                warnings.append(f"end token: {who} says {shown}, template ends turns with {turn_end}, {both} will stop")
        union.add(turn_end)
    elif len({ids for who, ids in said.items() if who != "config.json"}) > 1:
        claims = ", ".join(f"{who} says {' and '.join(map(str, ids))}" for who, ids in said.items())
        warnings.append(f"end token: {claims}, all will stop")
    if not union:
        warnings.append(
            "no end token is known: answers end only at max_tokens; set eos_token in the source's tokenizer_config.json"
        )
    if files.chat_template is None:
        warnings.append("the model has no chat template: it completes text, and chat requests are refused")
    return StopSet(tuple(sorted(union)), tuple(dict.fromkeys(warnings)))


def write_tokenizer(files: TokenizerFiles, folder: Path, turn_end: int | None, max_context: int) -> dict[str, str]:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers reads them.

    The end token is the turn's end where there is one, and padding never stays empty. Returns the special tokens
    written.
    """
    special = dict(files.special)
    tokenizer = files.tokenizer()
    end = tokenizer.id_to_token(turn_end) if turn_end is not None else None
    if end is not None:
        special["eos_token"] = end
    if "pad_token" not in special and "eos_token" in special:
        special["pad_token"] = special["eos_token"]
    (folder / "tokenizer.json").write_text(files.tokenizer_json, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_context,
        **{name: special[name] for name in _NAMES if name in special},
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    if files.chat_template is not None:
        (folder / "chat_template.jinja").write_text(files.chat_template, encoding="utf-8")
    return special


def _token_id(header: GgufHeader, key: str, count: int, name: str) -> int | None:
    number = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if number is None:
        return None
    if not isinstance(number, int) or isinstance(number, bool):
        raise SourceInvalid(f"{name}: its {key} token {number!r:.40} is not a whole number; replace the file")
    return number if number < count else None  # 2^32 - 1 stands for "none" in some converters


def _object(folder: Path, name: str) -> dict[str, Any]:
    return read_object(folder / name, name, folder.name) if (folder / name).is_file() else {}


def _special_names(config: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            found[name] = text
    return found


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        if beside.stat().st_size > _TEMPLATE_LIMIT_BYTES:
            raise SourceInvalid(
                f"{folder.name}: 'chat_template.jinja' has more than {_TEMPLATE_LIMIT_BYTES} bytes; replace it"
            )
        return beside.read_text(encoding="utf-8")
    value = config.get("chat_template") or _object(folder, "chat_template.json").get("chat_template")
    if isinstance(value, list):  # several by name; `default` is the one for chat
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _ids(value: Any, name: str) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int and item >= 0 for item in items):
        raise SourceInvalid(
            f"'{name}': eos_token_id {value!r:.60} is neither a whole number nor a list of them; correct it"
        )
    return tuple(items)
