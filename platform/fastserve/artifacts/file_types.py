"""Which files may come in, because a model repository is a stranger's folder.

Pickles and Python files run code when they are loaded, `auto_map` asks the loader to fetch such code, and a path with
`..` writes where it likes. So the set of file types is closed, a name is checked before it is joined to a folder, and
the first bytes are looked at: an extension is only a claim.
"""

from __future__ import annotations

import json
import os
import stat
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastserve.errors import SourceInvalid
from fastserve.plan.keys import Role
from fastserve.units import show_bytes

MODEL_TYPES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".gguf")
DATA_TYPES = (".jsonl", ".parquet", ".txt", ".text")

# fmt: off
PICKLES = frozenset([
    ".bin", ".pt", ".pth", ".pt2", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".mar", ".nemo", ".npy", ".npz",
    ".h5", ".hdf5", ".keras", ".pb", ".msgpack", ".tar", ".tgz", ".zip",
])
"""Pickles, and containers that may hold one or run code when they are loaded."""

CODE = frozenset([
    ".py", ".pyc", ".pyo", ".pyd", ".pyx", ".so", ".dll", ".dylib", ".sh", ".exe", ".ipynb",
])
# fmt: on

PATH_LIMIT = 1024
JSON_LIMIT_BYTES = 256 * 2**20
_JSON_DEPTH = 64
_DEVICE_NAMES = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))]
)
_ESCAPES = ("%2e", "%2f", "%5c", "%00")
_PICKLE_PROTOCOLS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_REMOTE_CODE = ("auto_map", "trust_remote_code")
_KERNEL_KEY = "_implementation"
"""`attn_implementation: org/name` and its kin make transformers download and run a compiled kernel."""
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")


def allowed_types(role: Role) -> tuple[str, ...]:
    """Extensions that a source of this role may consist of, with the dot."""
    return DATA_TYPES if role == "data" else MODEL_TYPES


def check_name(path: str, source: str, remote: bool = False) -> str:
    """`path` as it is, if it can safely be joined to a folder.

    path: relative, with `/`, as the source names the file. remote: the name also stands in an address.
    Raises SourceInvalid that names `path` and `source`.
    """
    why = _why_unsafe(path) or (_why_unsafe_address(path) if remote else None)
    if why:
        raise SourceInvalid(f"{source}: the file name {path!r} {why}; rename it in the source, nothing was written")
    return path


def _why_unsafe(path: str) -> str | None:
    parts = path.split("/")
    if not path or len(path) > PATH_LIMIT:
        return f"is empty or longer than {PATH_LIMIT} characters"
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in path):
        return "has a control character"
    if path.startswith("/") or (len(path) > 1 and path[1] == ":"):
        return "is an absolute path"
    if "\\" in path:
        return "has a backslash"
    if ".." in parts:
        return "leaves the folder ('..')"
    if "" in parts or "." in parts:
        return "has an empty part"
    if any(part.split(".")[0].lower() in _DEVICE_NAMES for part in parts):
        return "is the name of a device on some systems"
    return None


def _why_unsafe_address(path: str) -> str | None:
    lowered = path.lower()
    if "#" in path or "?" in path or any(escape in lowered for escape in _ESCAPES):
        return "has a character that means something else in an address (# or ?, or an escaped one)"
    return None


def check_collisions(paths: Iterable[str], source: str) -> None:
    """Raise SourceInvalid when two names are one on a file system that ignores case or Unicode form."""
    seen: dict[str, str] = {}
    for path in paths:
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
        if folded in seen:
            raise SourceInvalid(
                f"{source}: '{seen[folded]}' and '{path}' are one file where case is ignored; rename one of them in "
                "the source"
            )
        seen[folded] = path


def refuse_type(path: str, source: str) -> None:
    """Raise SourceInvalid for a pickle or a file of code, by name."""
    suffix = Path(path).suffix.lower()
    if suffix in PICKLES:
        raise SourceInvalid(
            f"{source}: '{path}' is refused: a {suffix} file can run code when it is loaded; convert the weights to "
            ".safetensors "
            "and remove it, or name a revision or folder without it"
        )
    if suffix in CODE:
        raise SourceInvalid(
            f"{source}: '{path}' is refused: FastServe runs no code from a source; use a model whose architecture "
            "the engine "
            "knows, and remove the file or name a revision without it"
        )


def choose(paths: Sequence[str], role: Role, source: str, remote: bool = False) -> list[str]:
    """The files to bring in, sorted: allowed types only, everything harmless left where it is.

    A folder with safetensors keeps its .gguf files out; a folder of .gguf files only must hold one.
    Raises SourceInvalid for an unsafe name, a pickle, a file of code, or when nothing usable is there.
    """
    for path in paths:
        check_name(path, source, remote)
        refuse_type(path, source)
    wanted = [path for path in paths if Path(path).suffix.lower() in allowed_types(role) and not _hidden(path)]
    check_collisions(wanted, source)
    kinds = {Path(path).suffix.lower() for path in wanted}
    if role == "data":
        wanted = [path for path in wanted if not _is_about(path)]
        if not wanted:
            raise SourceInvalid(f"{source}: holds no file of rows; it needs {_listed(DATA_TYPES)}")
        return sorted(wanted)
    if role == "adapter" and "adapter_config.json" not in wanted:
        raise SourceInvalid(
            f"{source}: is no adapter: it has no adapter_config.json; save it with peft's save_pretrained"
        )
    if ".safetensors" in kinds:
        return sorted(
            path for path in wanted if not path.lower().endswith(".gguf") and not _is_second_copy(path, wanted)
        )
    models = [path for path in wanted if path.lower().endswith(".gguf")]
    if len(models) > 1:
        raise SourceInvalid(
            f"{source}: holds {len(models)} .gguf files and no .safetensors; name one of them, such as "
            f"{_joined(source, sorted(models)[0])}"
        )
    if models:
        return models
    if role == "model" and "config.json" in wanted:
        return sorted(wanted)  # the shape of a model without its weights: enough to make one from scratch
    if role == "model":
        missing = [name for name in ("config.json", "tokenizer.json") if name not in wanted]
        raise SourceInvalid(
            f"{source}: holds no weights; a model needs *.safetensors{''.join(f', {name}' for name in missing)}, or "
            "one .gguf file"
        )
    raise SourceInvalid(
        f"{source}: holds no weights; an adapter needs adapter_config.json and adapter_model.safetensors"
    )


def check_content(path: Path, name: str, source: str) -> None:
    """Look into a file that came in: its first bytes must fit its extension, and JSON must not ask for code.

    path: a local file. name: what the source calls it.
    Raises SourceInvalid that names it.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
    suffix = Path(name).suffix.lower()
    disguise = _disguise(head, suffix)
    if disguise:
        raise SourceInvalid(
            f"{source}: '{name}' is {disguise} under another name; it is refused, replace it by a real {suffix} file"
        )
    expected = {".gguf": b"GGUF", ".parquet": b"PAR1"}.get(suffix)
    if expected and not head.startswith(expected):
        raise SourceInvalid(
            f"{source}: '{name}' is not a {suffix} file: it begins with {head[:4]!r}; fetch it again or replace it"
        )
    if suffix == ".json":
        if size_bytes > JSON_LIMIT_BYTES:
            raise SourceInvalid(
                f"{source}: '{name}' has {show_bytes(size_bytes)}; at most {show_bytes(JSON_LIMIT_BYTES)} are read"
            )
        check_json(path.read_bytes(), name, source)


def check_json(data: bytes, name: str, source: str) -> Any:
    """The value of a JSON file, if nothing in it asks for code from the source.

    Raises SourceInvalid when it is no JSON, too deep, or asks for code (`auto_map`, `trust_remote_code`, a kernel)
    anywhere.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceInvalid(f"{source}: '{name}' is not JSON ({error}); fetch it again or replace it") from error
    # Walking a vocabulary of 100,000 entries is skipped when none of the words can occur, escaped or not.
    suspicious = any(word.encode() in data for word in (*_REMOTE_CODE, _KERNEL_KEY)) or b"\\u" in data
    if isinstance(value, dict | list) and (suspicious or len(data) < 2**20):
        _refuse_remote_code(value, name, source)
    return value


def read_object(path: Path, name: str, source: str) -> dict[str, Any]:
    """A JSON object of a source, checked as `check_json` does. Raises SourceInvalid when it is something else."""
    value = check_json(path.read_bytes(), name, source)
    if not isinstance(value, dict):
        raise SourceInvalid(f"{source}: '{name}' is not a JSON object; fetch it again or replace it")
    return value


def _refuse_remote_code(value: Any, name: str, source: str) -> None:
    # In a vocabulary these words may be tokens, which have a number each; as settings they never are numbers there.
    tokens = Path(name).name in _VOCABULARIES
    pending: list[tuple[Any, int]] = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if depth > _JSON_DEPTH:
            raise SourceInvalid(
                f"{source}: '{name}' is nested deeper than {_JSON_DEPTH} levels; it is refused, replace the file"
            )
        if isinstance(item, list):
            pending.extend((inner, depth + 1) for inner in item if isinstance(inner, dict | list))
            continue
        for key, inner in item.items():
            a_token = tokens and type(inner) is int
            if inner and not a_token and (key in _REMOTE_CODE or (key.endswith(_KERNEL_KEY) and "/" in str(inner))):
                raise SourceInvalid(
                    f"{source}: '{name}' asks for code from elsewhere ('{key}'); FastServe runs none: use a model "
                    "whose "
                    f"architecture the engine knows, or remove '{key}' from the file if the model works without it"
                )
            if isinstance(inner, dict | list):
                pending.append((inner, depth + 1))


def regular_files(folder: Path, source: str) -> list[str]:
    """Relative paths, with `/`, of all regular files below a local folder, sorted.

    Raises SourceInvalid for a symbolic link that leaves the folder and for anything that is neither file nor folder.
    """
    root = folder.resolve()
    found: list[str] = []
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name != ".git")
        for name in [*folders, *names]:
            path = Path(parent) / name
            shown = path.relative_to(root).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise SourceInvalid(
                    f"{source}: '{shown}' is a link that leaves the folder; copy the file itself into the folder"
                )
            if path.is_symlink() and path.is_dir():
                raise SourceInvalid(f"{source}: '{shown}' is a link to a folder; copy the folder itself to its place")
        for name in names:
            path = Path(parent) / name
            shown = path.relative_to(root).as_posix()
            if not path.exists():
                raise SourceInvalid(f"{source}: '{shown}' is a link to nothing; remove it or put the file in its place")
            if not stat.S_ISREG(path.stat().st_mode):
                raise SourceInvalid(f"{source}: '{shown}' is neither a file nor a folder; remove it from the source")
            found.append(shown)
    return sorted(found)


def _disguise(head: bytes, suffix: str) -> str | None:
    if suffix == ".safetensors" and head[8:9] == b"{":
        return None  # its first eight bytes are a length, and may by chance be any of the signatures below
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "a zip archive (as torch.save writes it)"
    if head.startswith(_PICKLE_PROTOCOLS):
        return "a pickle"
    if head.startswith(b"\x7fELF") or (suffix not in (".txt", ".text", ".jinja") and head.startswith((b"MZ", b"#!"))):
        return "a program"
    if head.startswith((b"\x1f\x8b\x08", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf")):
        return "a compressed archive"
    if head.startswith(b"version https://"):
        return "a Git LFS pointer (the large file itself was never fetched: run `git lfs pull`)"
    return None


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _is_second_copy(path: str, beside: Sequence[str]) -> bool:
    """Whether these are the same weights once more, in their makers' own layout."""
    in_layout = any(name.startswith("model") and name.endswith(".safetensors") for name in beside)
    return in_layout and (
        path.startswith("original/") or (path.startswith("consolidated") and path.endswith(".safetensors"))
    )


def _is_about(path: str) -> bool:
    """Whether a .txt beside data is about the data rather than data."""
    return Path(path).name.lower() in ("license.txt", "readme.txt", "notice.txt", "requirements.txt", "citation.txt")


def _listed(types: Sequence[str]) -> str:
    return ", ".join(types[:-1]) + f" or {types[-1]}"


def _joined(source: str, path: str) -> str:
    address, at, revision = source.partition("@") if source.startswith("hf://") else (source, "", "")
    return f"{address.rstrip('/')}/{path}{at}{revision}"
