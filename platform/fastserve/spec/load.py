"""The one reader of manifests: text in, typed values out, or every problem at once.

The same file must mean the same for `fastserve up FILE` and `kubectl apply -f FILE`; `spec.scalars` holds the table
of scalars, `spec.yaml_tree` the lines, `spec.problems` the words.
"""

from __future__ import annotations

import codecs
import os.path
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastserve.errors import ManifestInvalid, Problem
from fastserve.spec.ambiguous import ambiguities
from fastserve.spec.applied import lost_nulls, without_note
from fastserve.spec.model import API_VERSION, GROUP, AccessKey, HardwareProfile, Model
from fastserve.spec.nearest import KIND_HABITS, kind_advice
from fastserve.spec.problems import problems_of
from fastserve.spec.section import Section
from fastserve.spec.shape import fields_of
from fastserve.spec.source import CONTEXT_PLACE
from fastserve.spec.yaml_tree import MOST_CHARACTERS, Block, Leaf, Tree, parse, to_plain

Manifest = Model | HardwareProfile | AccessKey

Kind = type[Model] | type[HardwareProfile] | type[AccessKey]

KINDS: dict[str, Kind] = {
    "Model": Model,
    "HardwareProfile": HardwareProfile,
    "AccessKey": AccessKey,
}

_MOST_BYTES = 4 * MOST_CHARACTERS

_WRITTEN_BY_THE_SERVER = {
    "": {"status"},
    "metadata": {
        "creationTimestamp",
        "deletionGracePeriodSeconds",
        "deletionTimestamp",
        "finalizers",
        "generation",
        "managedFields",
        "ownerReferences",
        "resourceVersion",
        "selfLink",
        "uid",
    },
}
"""Keys of `kubectl get -o yaml` that are no wishes; kubectl takes them back without a word, and so does this reader."""


def read(text: str, file: str | None = None) -> list[Manifest]:
    """Every manifest in a YAML text, in its order. Plain paths of sources stay as they are.

    file: name that the messages give.
    Raises ManifestInvalid with all problems, in the order of their lines.
    """
    return _read(text, file, folder=None)


def read_file(path: Path) -> list[Manifest]:
    """Every manifest in a file; plain paths of sources are taken from the manifest's folder and become `file:///` URIs.

    Raises ManifestInvalid with all problems, also when there is no such file.
    """
    name = str(path)
    try:
        with path.open("rb") as opened:
            data = opened.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise _one(name, "there is no such file; check the path") from None
    except IsADirectoryError:
        raise _one(name, "is a folder; name one file in it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "the path is not one"
        raise _one(name, f"cannot be read ({reason}); check its permissions") from None
    if len(data) > _MOST_BYTES:
        raise _one(name, "is far too large to be a manifest; name the right file")
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _one(name, "is not UTF-8 text; save the file as UTF-8", line) from None
    return _read(text, name, folder=path.absolute().parent)


def dump(manifest: Manifest) -> dict[str, Any]:
    """A manifest as JSON values with the manifest's keys; read again, it is equal.

    It holds what was written and none of the defaults; quantities have their units (`90s`, `24GiB`, `5%`).
    """
    values = manifest.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return _without_nothing(values, type(manifest))


def _without_nothing(values: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    """Drop each null that means the same as leaving the key out; a limit of a gate that null switches off stays."""
    fields = fields_of(section)
    kept: dict[str, Any] = {}
    for key, value in values.items():
        field = fields.get(key)
        below = field.shape.section if field else None
        if value is None and (field is None or field.default is None):
            continue
        if below is not None and isinstance(value, list):
            kept[key] = [_without_nothing(item, below) for item in value]
        elif below is not None and isinstance(value, dict):
            kept[key] = _without_nothing(value, below)
        else:
            kept[key] = value
    return kept


def _read(text: str, file: str | None, folder: Path | None) -> list[Manifest]:
    documents = parse(text, file)
    problems = list(documents.problems)
    manifests: list[Manifest] = []
    for tree in documents.trees:
        manifest, found = _manifest(tree, file, folder)
        problems += found
        if manifest is not None:
            manifests.append(manifest)
    problems += _same_names(documents.trees, file)
    if not documents.trees and not problems:
        problems.append(Problem("", f"holds no manifest; begin with `apiVersion: {API_VERSION}`", file=file))
    if problems:
        raise ManifestInvalid(sorted(problems, key=lambda problem: problem.line or 0))
    return manifests


def _manifest(tree: Tree, file: str | None, folder: Path | None) -> tuple[Manifest | None, list[Problem]]:
    if not isinstance(tree, Block):
        message = f"is not a manifest; begin with `apiVersion: {API_VERSION}`, one key a line"
        return None, [Problem("", message, tree.line, file=file)]
    kind, problems = _kind(tree, file)
    if kind is None:
        return None, problems
    wishes = _wishes(tree)
    problems += ambiguities(wishes, kind, file=file)
    problems += lost_nulls(tree, kind, file)
    context = {CONTEXT_PLACE: lambda path: _place(path, folder)} if folder else {}
    try:
        manifest: Manifest | None = kind.model_validate(to_plain(wishes), by_alias=True, by_name=False, context=context)
    except ValidationError as error:
        manifest = None
        named = {problem.path for problem in problems}
        problems += [problem for problem in problems_of(error, wishes, kind, file) if problem.path not in named]
    return manifest, problems


def _kind(tree: Block, file: str | None) -> tuple[Kind | None, list[Problem]]:
    """The class to read a document as; also after a misspelled kind, so that the rest is checked in the same go."""
    entry = tree.entries.get("kind")
    names = ", ".join(KINDS)
    if entry is None:
        return None, [Problem("kind", f"is missing; write one of {names}", tree.line, file=file)]
    leaf = entry.node
    if not isinstance(leaf, Leaf) or not isinstance(leaf.value, str):
        return None, [Problem("kind", f"is not a kind; write one of {names}", entry.line, file=file)]
    if leaf.value in KINDS:
        return KINDS[leaf.value], []
    near = kind_advice(leaf.value, KINDS)
    version = tree.entries.get("apiVersion")
    ours = version is None or (isinstance(version.node, Leaf) and version.node.raw.startswith(GROUP))
    if ours or near:
        message = f"{leaf.value} is unknown; write {near or f'one of {names}'}"
    else:
        message = f"{leaf.value} is not a kind of FastServe ({names}); keep it in a file of its own"
    meant = KINDS[near] if near and leaf.value not in KIND_HABITS else None
    return meant, [Problem("kind", message, entry.line, near, file)]


def _wishes(tree: Block) -> Block:
    """The manifest without what only the API server writes."""
    entries = {key: entry for key, entry in tree.entries.items() if key not in _WRITTEN_BY_THE_SERVER[""]}
    metadata = entries.get("metadata")
    if metadata is not None and isinstance(metadata.node, Block):
        kept = {k: e for k, e in metadata.node.entries.items() if k not in _WRITTEN_BY_THE_SERVER["metadata"]}
        block = without_note(Block(kept, metadata.node.line, metadata.node.size))
        entries["metadata"] = type(metadata)(metadata.line, block)
    return Block(entries, tree.line, tree.size)


def _same_names(trees: list[Tree], file: str | None) -> list[Problem]:
    first: dict[tuple[str, str], int] = {}
    problems = []
    for tree in trees:
        kind, line = _text_at(tree, "kind")
        name, line = _text_at(tree, "metadata", "name")
        if kind is None or name is None:
            continue
        if (kind, name) in first:
            message = f"another {kind} is named {name}, in line {first[kind, name]}; rename one of them"
            problems.append(Problem("metadata.name", message, line, file=file))
        else:
            first[kind, name] = line
    return problems


def _text_at(tree: Tree, *path: str) -> tuple[str | None, int]:
    line = tree.line
    for key in path:
        entry = tree.entries.get(key) if isinstance(tree, Block) else None
        if entry is None:
            return None, line
        tree, line = entry.node, entry.line
    return (tree.value if isinstance(tree, Leaf) and isinstance(tree.value, str) else None), line


def _place(path: str, folder: Path | None) -> str:
    """A plain path, from the manifest's folder or the user's home, as a URI; blanks stay blanks."""
    absolute = os.path.normpath(os.path.join(folder or "", os.path.expanduser(path)))
    return f"file://{absolute}"


def _one(file: str, message: str, line: int | None = None) -> ManifestInvalid:
    return ManifestInvalid([Problem("", message, line, file=file)])
