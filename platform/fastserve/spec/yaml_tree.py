"""YAML text as a tree that remembers lines, so that every later message can say where.

Only what a manifest needs is read: mappings, lists, scalars, anchors and merge keys. Tags that would make objects are
refused, and so is a text that is small itself but huge when its aliases are spread out (a "billion laughs" file).
Events are read one by one, so a bad file is refused at the place where it goes wrong and no deep recursion can happen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from fastserve.errors import ManifestInvalid, Problem
from fastserve.spec.scalars import Scalar, read_plain

MOST_CHARACTERS = 1_000_000
"""A Kubernetes object may not be larger than about 1.5 MB; no hand-written manifest comes near."""

MOST_VALUES = 20_000
"""Values in one file, aliases spread out."""

DEEPEST = 40
"""Nesting; the deepest key of a manifest stands eight deep."""

_TEXT_TAGS = ("!", "tag:yaml.org,2002:str")
_PLAIN_TAGS = (None, "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", "!")
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml where PyYAML has it: the parser that kubectl's is a translation of."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A scalar."""

    value: Scalar
    raw: str
    """As it stands in the file, without quotes."""

    plain: bool
    """Whether it stands there without quotes, so that its form decided its type."""

    line: int
    size: int = 1


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    items: tuple[Tree, ...]
    line: int
    size: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A key with its value."""

    line: int
    """Line of the key."""

    node: Tree


@dataclass(frozen=True, slots=True)
class Block:
    """A mapping; all its keys are text."""

    entries: dict[str, Entry]
    line: int
    size: int


Tree = Leaf | Items | Block


@dataclass(slots=True)
class Documents:
    """What a file holds."""

    trees: list[Tree] = field(default_factory=list)
    """Documents that are not empty."""

    problems: list[Problem] = field(default_factory=list)
    """Keys that are given twice, are not text, and the like; the trees are whole without them."""


def parse(text: str, file: str | None = None) -> Documents:
    """All documents of `text`.

    Raises ManifestInvalid with one problem when the text is not YAML, or too large to be a manifest.
    """
    reader = _Reader(file)
    text = text.removeprefix("\ufeff")
    reader.check_characters(text)
    try:
        reader.read(yaml.parse(text, Loader=_PARSER))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        reader.stop(_not_yaml(error, text, line), line)
    except yaml.YAMLError:
        reader.stop("is not YAML; check the characters, and save the file as UTF-8", None)
    return reader.documents


def to_plain(tree: Tree) -> Any:
    """The values alone: dict, list and scalars."""
    if isinstance(tree, Block):
        return {key: to_plain(entry.node) for key, entry in tree.entries.items()}
    if isinstance(tree, Items):
        return [to_plain(item) for item in tree.items]
    return tree.value


def join(path: str, key: str | int) -> str:
    """`spec.serve` and `replicas` as `spec.serve.replicas`; `spec.compress` and 0 as `spec.compress[0]`."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key


class _Reader:
    def __init__(self, file: str | None) -> None:
        self._file = file
        self._anchors: dict[str, Tree | None] = {}
        self._events: Iterator[Any] = iter(())
        self._size = 0
        self.documents = Documents()

    def stop(self, message: str, line: int | None, path: str = "") -> NoReturn:
        raise ManifestInvalid([Problem(path, message, line, file=self._file)]) from None

    def check_characters(self, text: str) -> None:
        if len(text) > MOST_CHARACTERS:
            self.stop(
                f"is longer than {MOST_CHARACTERS:,} characters; a manifest is short: is this the right file?", None
            )
        odd = _UNPRINTABLE.search(text)
        if odd:
            line = text.count("\n", 0, odd.start()) + 1
            self.stop(f"is not YAML: character U+{ord(odd[0]):04X} is not text; remove it", line)

    def read(self, events: Iterator[Any]) -> None:
        self._events = events
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                self._anchors = {}
                tree = self._tree(next(events), "", 0)
                if not (isinstance(tree, Leaf) and tree.plain and tree.value is None):
                    self.documents.trees.append(tree)

    def _problem(self, path: str, message: str, line: int, suggestion: str | None = None) -> None:
        self.documents.problems.append(Problem(path, message, line, suggestion, self._file))

    def _tree(self, event: Any, path: str, depth: int) -> Tree:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), path, line)
        if depth > DEEPEST:
            self.stop(f"is nested deeper than {DEEPEST} levels; a manifest is flat: is this the right file?", line)
        if event.anchor:
            self._anchors[event.anchor] = None
        tree: Tree
        if isinstance(event, yaml.ScalarEvent):
            tree = self._leaf(event, path, line)
        else:
            if event.tag not in _PLAIN_TAGS:
                self._refuse_tag(event.tag, path, line)
            is_list = isinstance(event, yaml.SequenceStartEvent)
            tree = self._items(path, line, depth) if is_list else self._block(path, line, depth)
        if event.anchor:
            self._anchors[event.anchor] = tree
        return tree

    def _count(self, size: int, line: int) -> None:
        self._size += size
        if self._size > MOST_VALUES:
            self.stop(f"holds more than {MOST_VALUES:,} values, aliases spread out; write fewer, or no aliases", line)

    def _alias(self, anchor: str, path: str, line: int) -> Tree:
        if anchor not in self._anchors:
            self.stop(f"*{anchor} stands before &{anchor}, or there is none; write the value itself", line, path)
        tree = self._anchors[anchor]
        if tree is None:
            self.stop(f"*{anchor} stands inside what it names; write the value itself", line, path)
        self._count(tree.size, line)
        return tree

    def _refuse_tag(self, tag: str, path: str, line: int) -> None:
        shown = tag.replace("tag:yaml.org,2002:", "!!")
        self._problem(path, f"has the tag {shown}, and tags mean nothing in a manifest; remove the tag", line)

    def _leaf(self, event: Any, path: str, line: int) -> Leaf:
        self._count(1, line)
        raw: str = event.value
        if event.tag in _TEXT_TAGS or (event.tag is None and event.style):
            return Leaf(raw, raw, False, line)
        if event.tag is not None:
            self._refuse_tag(event.tag, path, line)
        return Leaf(raw if event.style else read_plain(raw), raw, not event.style, line)

    def _items(self, path: str, line: int, depth: int) -> Items:
        self._count(1, line)
        items: list[Tree] = []
        for event in self._events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            items.append(self._tree(event, join(path, len(items)), depth + 1))
        return Items(tuple(items), line, 1 + sum(item.size for item in items))

    def _block(self, path: str, line: int, depth: int) -> Block:
        self._count(1, line)
        entries: dict[str, Entry] = {}
        merged: dict[str, Entry] = {}
        for event in self._events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self._tree(event, path, depth + 1)
            key_line = event.start_mark.line + 1
            name = key.raw if isinstance(key, Leaf) else "?"
            node = self._tree(next(self._events), join(path, name), depth + 1)
            if isinstance(key, Leaf) and key.plain and name == "<<":
                merged = {**self._merged(node, path, key_line), **merged}
            elif self._is_text(key, path, key_line):
                if name in entries:
                    first = entries[name].line
                    self._problem(join(path, name), f"is given twice, first in line {first}; remove one", key_line)
                else:
                    entries[name] = Entry(key_line, node)
        all_entries = {**merged, **entries}
        return Block(all_entries, line, 1 + sum(1 + entry.node.size for entry in all_entries.values()))

    def _merged(self, node: Tree, path: str, line: int) -> dict[str, Entry]:
        """Keys that `<<` brings in; of several blocks the first wins."""
        blocks = node.items if isinstance(node, Items) else (node,)
        merged: dict[str, Entry] = {}
        for block in blocks:
            if isinstance(block, Block):
                merged = {**block.entries, **merged}
            else:
                self._problem(join(path, "<<"), "takes a block or a list of blocks; write `<<: *name`", line)
        return merged

    def _is_text(self, key: Tree, path: str, line: int) -> bool:
        if isinstance(key, Leaf) and isinstance(key.value, str):
            return True
        if isinstance(key, Leaf):
            quoted = f'"{key.raw}"'
            self._problem(join(path, key.raw), f"as a key is not text; put it in quotes: {quoted}", line, quoted)
        else:
            self._problem(path, "has a list or a block as a key; write a word", line)
        return False


def _not_yaml(error: yaml.MarkedYAMLError, text: str, line: int | None) -> str:
    lines = text.splitlines()
    shown = lines[line - 1] if line and line <= len(lines) else ""
    if shown.lstrip(" ").startswith("\t"):
        return "is not YAML: the line begins with a tab; write blanks instead"
    return f"is not YAML: {error.problem or 'it cannot be read'}; check the indentation, quotes and brackets here"
