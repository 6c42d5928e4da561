"""A light reader of GGUF headers, because a plan must know a model's shape before any heavy library is loaded.

The format: github.com/ggml-org/ggml, docs/gguf.md. Every length in it is a claim of the file, so each is compared with
the bytes that are really left before anything is read or allocated. A vocabulary of 49,000 tokens takes 40 ms.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fastserve.errors import SourceInvalid

HEADER_LIMIT_BYTES = 512 * 2**20
ENTRY_LIMIT = 2**16
TENSOR_LIMIT = 10**6
_NAME_LIMIT_BYTES = 2**16
_DIMENSION_LIMIT = 4
_SIZE_LIMIT = 2**63

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type number to struct code."""

_BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
"""Type number to name, elements a block, bytes a block."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    """As in the file: the fastest dimension first."""

    type_name: str
    offset: int
    """First byte, counted from the start of the data."""

    size_bytes: int

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a checked file says of itself."""

    version: int
    metadata: Mapping[str, Any]
    """Values by key: numbers, texts, lists. Text that is not UTF-8 has its bad bytes replaced."""

    tensors: Mapping[str, GgufTensor]
    header_bytes: int
    """Bytes before the first tensor."""

    spans: Mapping[str, tuple[int, int]]
    """First byte of each metadata entry in the file, and the one behind its last."""

    tensor_span: tuple[int, int]
    """The same for the list of tensors."""

    def text(self, key: str, default: str = "") -> str:
        """A text value. Raises SourceInvalid when the key holds something else."""
        return str(self._typed(key, str, default))

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number. Raises SourceInvalid when the key is missing without a default, or holds something else."""
        return int(self._typed(key, int, default))

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty when the key is missing."""
        return self._listed(key, str)

    def wholes(self, key: str) -> list[int]:
        """A list of whole numbers; empty when the key is missing."""
        return self._listed(key, int)

    def numbers(self, key: str) -> list[float]:
        """A list of numbers; empty when the key is missing."""
        return self._listed(key, float)

    def _typed(self, key: str, kind: type, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise SourceInvalid(f"the GGUF header has no '{key}'; use a file made by a current converter")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise SourceInvalid(
                f"the GGUF header's '{key}' is {value!r:.40}, not of type {kind.__name__}; replace the file"
            )
        return value

    def _listed(self, key: str, kind: type) -> list[Any]:
        value = self.metadata.get(key, [])
        if not isinstance(value, list) or (value and type(value[0]) is not kind):
            raise SourceInvalid(f"the GGUF header's '{key}' is not a list of type {kind.__name__}; replace the file")
        return value


class Truncated(Exception):
    """The bytes at hand end inside the header."""


def read_gguf(path: Path, name: str | None = None) -> GgufHeader:
    """The header of a .gguf file whose every claim holds.

    name: what to call the file in messages; its own name when left out.
    Raises SourceInvalid: not GGUF, big-endian or of an unknown version; a length beyond the file; a key or tensor given
    twice; an unknown type; a tensor outside the file or over another.
    """
    shown = name or path.name
    size_bytes = path.stat().st_size
    if size_bytes < 24:
        raise _torn(shown, f"has only {size_bytes} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        try:
            return parse_gguf(mapped, size_bytes, shown)
        except Truncated as error:
            raise _torn(shown, f"ends inside its header: {error}") from error


def parse_gguf(data: bytes | mmap.mmap, size_bytes: int, shown: str) -> GgufHeader:
    """The header in the first bytes of a file.

    data: the file's beginning. size_bytes: of the whole file.
    Raises Truncated when `data` ends before the header does, else as `read_gguf`.
    """
    cursor = _Cursor(data, shown)
    if bytes(data[:4]) != b"GGUF":
        raise _torn(shown, f"is not a GGUF file: it begins with {bytes(data[:4])!r}")
    cursor.at = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise _torn(shown, f"has GGUF version {version}; 2 and 3 are read (a huge number means big-endian)")
    tensor_count, entry_count = cursor.scalar("Q"), cursor.scalar("Q")
    if entry_count > ENTRY_LIMIT or tensor_count > TENSOR_LIMIT:
        raise _torn(
            shown,
            f"says it has {entry_count} entries and {tensor_count} tensors; at most {ENTRY_LIMIT} and {TENSOR_LIMIT} "
            "are read",
        )
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(entry_count):
        begin = cursor.at
        key = cursor.text(_NAME_LIMIT_BYTES)
        if key in metadata:
            raise _torn(shown, f"gives '{key}' twice")
        metadata[key] = cursor.value(key)
        spans[key] = (begin, cursor.at)
    begin = cursor.at
    raw = [_tensor(cursor, shown) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8 or alignment > 2**20:
        raise _torn(shown, f"has the alignment {alignment!r:.20}")
    header_bytes = -(-cursor.at // alignment) * alignment
    return GgufHeader(
        version=version,
        metadata=metadata,
        tensors=_check_layout(raw, size_bytes - header_bytes, alignment, shown),
        header_bytes=header_bytes,
        spans=spans,
        tensor_span=(begin, cursor.at),
    )


class _Cursor:
    """Reads on from `at`, and never past the end."""

    def __init__(self, data: bytes | mmap.mmap, shown: str) -> None:
        self.data = data
        self.at = 0
        self._shown = shown
        self._end = min(len(data), HEADER_LIMIT_BYTES)

    def take(self, size_bytes: int) -> bytes:
        begin = self.at
        if size_bytes > self._end - begin:
            if begin + size_bytes > HEADER_LIMIT_BYTES:
                raise _torn(self._shown, f"says that {size_bytes} bytes follow at byte {begin} of its header")
            raise Truncated(f"{size_bytes} bytes should follow at byte {begin}, {self._end - begin} are left")
        self.at = begin + size_bytes
        return self.data[begin : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self, limit_bytes: int = HEADER_LIMIT_BYTES) -> str:
        length = self.scalar("Q")
        if length > limit_bytes:
            raise _torn(self._shown, f"has a text of {length} bytes at byte {self.at} of its header")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, key: str) -> Any:
        kind = self.scalar("I")
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise _torn(self._shown, f"gives '{key}' the unknown type {kind}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            size = struct.calcsize("<" + code)
            if count > HEADER_LIMIT_BYTES // size:
                raise _torn(self._shown, f"says '{key}' has {count} items")
            return list(struct.unpack(f"<{count}{code}", self.take(count * size)))
        if inner != _STRING:
            raise _torn(self._shown, f"gives '{key}' items of type {inner}, which are not read")
        if count > HEADER_LIMIT_BYTES // 8:
            raise _torn(self._shown, f"says '{key}' has {count} items")
        return self._texts(count)

    def _texts(self, count: int) -> list[str]:
        """Hot: a vocabulary and its merges are 100,000 texts, so nothing is looked up or sliced twice."""
        data, end, at = self.data, self._end, self.at
        unpack: Callable[[Any, int], tuple[Any, ...]] = struct.Struct("<Q").unpack_from
        found: list[str] = []
        for _ in range(count):
            begin = at + 8
            if begin > end:
                self.take(8)
            length = unpack(data, at)[0]
            at = begin + length
            if at > end:
                self.at = begin
                self.take(length)
            found.append(data[begin:at].decode("utf-8", errors="replace"))
            self.at = at
        return found


def _tensor(cursor: _Cursor, shown: str) -> GgufTensor:
    name = cursor.text(_NAME_LIMIT_BYTES)
    dimensions = cursor.scalar("I")
    if dimensions > _DIMENSION_LIMIT:
        raise _torn(shown, f"gives tensor '{name}' {dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(dimensions))
    kind, offset = cursor.scalar("I"), cursor.scalar("Q")
    if kind not in _BLOCKS:
        raise _torn(shown, f"gives tensor '{name}' the type {kind}, which is not read")
    type_name, block, block_bytes = _BLOCKS[kind]
    elements = prod(shape)  # at most four factors below 2^64: a bounded product
    if elements >= _SIZE_LIMIT or (shape and shape[0] % block):
        raise _torn(shown, f"gives tensor '{name}' a shape that its type {type_name} cannot have")
    return GgufTensor(
        name=name, shape=shape, type_name=type_name, offset=offset, size_bytes=elements // block * block_bytes
    )


def _check_layout(raw: list[GgufTensor], data_bytes: int, alignment: int, shown: str) -> dict[str, GgufTensor]:
    reached, before = 0, "the header"
    for tensor in sorted(raw, key=lambda item: (item.offset, item.size_bytes)):
        if tensor.offset % alignment:
            raise _torn(shown, f"puts tensor '{tensor.name}' at byte {tensor.offset}, which is not aligned")
        if tensor.offset + tensor.size_bytes > data_bytes:
            raise _torn(
                shown,
                f"puts tensor '{tensor.name}' up to byte {tensor.offset + tensor.size_bytes}, but only "
                f"{max(data_bytes, 0)} bytes follow the header",
            )
        if tensor.offset < reached:
            raise _torn(shown, f"lets tensor '{tensor.name}' overlap with '{before}'")
        reached, before = tensor.offset + tensor.size_bytes, tensor.name
    tensors = {tensor.name: tensor for tensor in raw}
    if len(tensors) != len(raw):
        raise _torn(shown, "gives a tensor twice")
    return tensors


def _torn(shown: str, what: str) -> SourceInvalid:
    return SourceInvalid(f"'{shown}' {what}; the file is torn or forged: fetch it again or replace it")
