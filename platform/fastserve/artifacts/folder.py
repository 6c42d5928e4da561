"""Sources on this machine: `file://`, plain paths, patterns, and what installed packages carry (`package://`)."""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote

from fastserve.artifacts.file_types import allowed_types, check_name, choose, regular_files
from fastserve.artifacts.record import FileEntry, digest_of_files
from fastserve.artifacts.resolved import Resolved, SourceFile, Tick, copy_checked, read_head
from fastserve.errors import SourceInvalid, SourceNotFound
from fastserve.plan.keys import Role, ident_of
from fastserve.spec.source import Source

_PATTERN = "*?["
_REMEMBERED = 4096


class FolderSource:
    """A file, a folder, or a pattern such as `/data/*.jsonl`."""

    scheme = "file"

    def __init__(self, source: Source, role: Role, base: Path | None = None, digest_cache: Path | None = None) -> None:
        """base: where a relative path begins; the working folder when left out. digest_cache: a small JSON file."""
        self._role = role
        self._ident = ident_of(source)
        self._base = base or Path.cwd()
        self._digests = _Digests(digest_cache)
        self._uri = source.uri

    def resolve(self, digest: str | None = None) -> Resolved:
        """List and hash what is there."""
        del digest  # what lies on a disk has no history
        try:
            root, paths, single = self._find()
            names = choose(paths, self._role, self._ident)
            files = tuple(self._file(root, name) for name in names)
        except PermissionError as error:
            raise SourceNotFound(
                f"{self._ident}: '{error.filename}' may not be read by this user; give it the right to"
            ) from error
        self._digests.save()
        entries = [FileEntry(file.path, file.size_bytes, file.stamp) for file in files]
        return Resolved(self._ident, self.scheme, self._role, digest_of_files(entries), files, single)

    def pull(self, file: SourceFile, target: Path, tick: Tick) -> None:
        """Copy one file."""
        copy_checked(Path(file.at), file, target, tick)

    def head(self, file: SourceFile, size_bytes: int) -> bytes:
        """First bytes of one file."""
        return read_head(Path(file.at), size_bytes)

    def place(self, resolved: Resolved) -> Path | None:
        """The file or the folder itself, unless the folder holds more than what was chosen from it."""
        first = resolved.files[0]
        if resolved.single:
            return Path(first.at)
        root = Path(first.at.removesuffix(first.path))
        if any(letter in self._uri for letter in _PATTERN) and not self._local().is_dir():
            return None
        types = allowed_types(resolved.role)
        there = {name for name in regular_files(root, self._ident) if Path(name).suffix.lower() in types}
        return root if there == {file.path for file in resolved.files} else None

    def _find(self) -> tuple[Path, list[str], bool]:
        """Folder, paths below it, and whether it is a single file."""
        path = self._local()
        if path.is_file():
            return path.resolve().parent if path.is_symlink() else path.parent, [path.name], True
        if path.is_dir():
            return path, regular_files(path, self._ident), False
        if any(letter in str(path) for letter in _PATTERN):
            return self._match(path)
        if path.exists():
            raise SourceInvalid(f"{self._ident}: is neither a file nor a folder")
        raise SourceNotFound(f"{self._ident}: there is nothing at {path}{_nearest(path)}")

    def _local(self) -> Path:
        text = self._uri
        if text.startswith("file://"):
            text = text.removeprefix("file://")
            if "%" in text and not Path(text).exists():
                text = unquote(text)
        return self._base / Path(text).expanduser()

    def _match(self, pattern: Path) -> tuple[Path, list[str], bool]:
        fixed = list(_until_pattern(pattern.parts))
        root = Path(*fixed)
        found = [Path(match) for match in glob.glob(str(pattern), recursive=True)]
        paths = [match.relative_to(root).as_posix() for match in found if match.is_file()]
        if not paths:
            raise SourceNotFound(
                f"{self._ident}: nothing matches {pattern}; correct the pattern or put the files there"
            )
        inside = root.resolve()
        for path in paths:
            if not (root / path).resolve().is_relative_to(inside):
                raise SourceInvalid(
                    f"{self._ident}: '{path}' is a link that leaves the folder; copy the file itself into the folder"
                )
        return root, sorted(paths), False

    def _file(self, root: Path, name: str) -> SourceFile:
        path = root / name
        size_bytes, sha256 = self._digests.of(path)
        return SourceFile(path=name, size_bytes=size_bytes, at=str(path), stamp=sha256)


class PackageSource(FolderSource):
    """`package://distribution/path`: what an installed Python package carries beside its code."""

    scheme = "package"

    def _find(self) -> tuple[Path, list[str], bool]:
        name, _, wanted = self._uri.removeprefix("package://").partition("/")
        wanted = wanted.rstrip("/")
        try:
            distribution = metadata.distribution(name)
        except (metadata.PackageNotFoundError, ValueError) as error:
            raise SourceNotFound(
                f"{self._ident}: no package '{name}' is installed here{_nearest_package(name)}; install it (`pip "
                f"install {name}`), "
                "or correct the name: package://distribution/path"
            ) from error
        carried = [file.as_posix() for file in distribution.files or [] if not _is_housekeeping(file.as_posix())]
        if not wanted:
            raise SourceNotFound(
                f"{self._ident}: names no path; write package://{name}/path, such as {_weights(carried)}"
            )
        check_name(wanted, self._ident)
        root = Path(str(distribution.locate_file("")))
        if wanted in carried:
            path = root / wanted
            if not path.is_file():
                raise SourceNotFound(
                    f"{self._ident}: the package lists it, but it is gone from {root}; install the package again"
                )
            return path.parent, [path.name], True
        below = [path.removeprefix(wanted + "/") for path in carried if path.startswith(wanted + "/")]
        if not below:
            raise SourceNotFound(
                f"{self._ident}: package '{name}' carries no '{wanted}'; it carries {_weights(carried)}"
            )
        gone = [path for path in below if not (root / wanted / path).is_file()]
        if gone:
            raise SourceNotFound(
                f"{self._ident}: the package lists '{gone[0]}', but it is gone; install the package again"
            )
        return root / wanted, sorted(below), False


class _Digests:
    """sha256 of local files, remembered as long as size, times and inode stay: a second look at 93 MB costs nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, list[object]] = {}
        self._changed = False
        if path is not None:
            try:
                known = json.loads(path.read_text())
                self._known = known if isinstance(known, dict) else {}
            except (OSError, ValueError):
                self._known = {}  # it is only a memory: without it everything is hashed again

    def of(self, path: Path) -> tuple[int, str]:
        """Size in bytes and sha256."""
        status = path.stat()
        signs = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        key = str(path.resolve())
        known = self._known.get(key)
        if isinstance(known, list) and known[:-1] == signs:
            return status.st_size, str(known[-1])
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._known.pop(key, None)
        self._known[key] = [*signs, sha256]
        self._changed = True
        return status.st_size, sha256

    def save(self) -> None:
        """Keep what was learned, replacing the file in one step."""
        if self._path is None or not self._changed:
            return
        kept = dict(list(self._known.items())[-_REMEMBERED:])
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(kept))
            os.replace(temporary, self._path)
        except OSError:
            temporary.unlink(missing_ok=True)  # a full disk must not stop a run that does not need the memory
        self._changed = False


def _until_pattern(parts: tuple[str, ...]) -> tuple[str, ...]:
    for index, part in enumerate(parts):
        if any(letter in part for letter in _PATTERN):
            return parts[:index]
    return parts


def _nearest(path: Path) -> str:
    """`; did you mean ...?`, or what the nearest folder holds."""
    try:
        beside = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return f", and {path.parent} is no folder either; correct the path"
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else "; correct the path or put the file there"


def _nearest_package(name: str) -> str:
    installed = sorted({str(item.name) for item in metadata.distributions() if item.name})
    close = difflib.get_close_matches(name, installed, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _is_housekeeping(path: str) -> bool:
    """The package's own code and records, which installing it has brought already and a source does not consist of."""
    parts = path.split("/")
    return (
        parts[0].endswith((".dist-info", ".data"))
        or ".." in parts
        or "__pycache__" in parts
        or parts[-1] == "__init__.py"
    )


def _weights(carried: list[str]) -> str:
    shown = [path for path in carried if path.endswith((".gguf", ".safetensors", "config.json", ".jsonl", ".parquet"))]
    return ", ".join((shown or carried)[:3]) or "no files"
