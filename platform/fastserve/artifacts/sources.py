"""Where models and data come from: resolved once to a digest, then fetched with that digest or not at all.

`resolve` looks and pins, `outline` brings only what a plan needs (small files and the heads of large ones), `fetch`
brings everything. Each file's name, type and first bytes are checked before anything else reads it.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from fastserve.artifacts import safetensors_header
from fastserve.artifacts.claims import ClaimSource, mounted_claims
from fastserve.artifacts.file_types import check_content, read_object
from fastserve.artifacts.folder import FolderSource, PackageSource
from fastserve.artifacts.gguf_header import Truncated, parse_gguf
from fastserve.artifacts.resolved import Opened, Resolved, SourceFile, sparse
from fastserve.errors import DigestMismatch, SourceInvalid, SourceNotFound, StoreFull
from fastserve.plan.keys import Role, ident_of
from fastserve.spec.source import Source

__all__ = ["Progress", "Resolved", "SourceFile", "check_model_files", "fetch", "outline", "resolve"]

Progress = Callable[[int, int], None]
"""Takes bytes done and bytes in all; may be called from any thread, one at a time."""

_PARALLEL = 4
_FIRST_HEAD_BYTES = 4 * 2**20
_WEIGHTS = (".safetensors", ".gguf")


def resolve(
    source: Source, base: Path | None = None, *, role: Role = "model", digest_cache: Path | None = None
) -> Resolved:
    """What `source` is now: its digest and its files, names and types checked. What lies on this machine is looked
    into.

    base: folder at which a relative path begins. digest_cache: JSON file that remembers digests of local files.
    Raises SourceNotFound, SourceInvalid.
    """
    opened = _open(source, role, base, digest_cache)
    resolved = opened.resolve()
    if resolved.scheme in ("file", "package", "pvc"):
        for file in resolved.files:
            check_content(Path(file.at), file.path, resolved.ident)
        if role != "data":
            check_model_files({file.path: Path(file.at) for file in resolved.files}, resolved.ident)
    return resolved


def fetch(
    source: Source,
    expect_digest: str,
    into: Path,
    *,
    role: Role = "data",
    base: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Bring a source to `into`: the folder itself, or the one file in it when the source names a file.

    into: an empty or absent folder; nothing is written outside it.
    Raises SourceNotFound, SourceInvalid, DigestMismatch when the source is no longer what was resolved, StageFailed for
    what may pass (the network), StoreFull.
    """
    opened = _open(source, role, base, None)
    resolved = opened.resolve(expect_digest)
    if resolved.digest != expect_digest:
        raise DigestMismatch(
            f"{resolved.ident} has changed since it was resolved ({resolved.digest[:12]} instead of "
            f"{expect_digest[:12]}); "
            "run `fastserve up` again to use what is there now"
        )
    _bring(opened, resolved, resolved.files, into, progress)
    if role != "data":
        check_model_files({file.path: into / file.path for file in resolved.files}, resolved.ident)
    return into / resolved.files[0].path if resolved.single else into


def outline(source: Source, resolved: Resolved, into: Path, *, base: Path | None = None) -> Path:
    """What a plan needs of a model: like `fetch`, but large files have only their heads and take no space.

    into: a folder that is made, or replaced, in one step. A source on this machine is not copied as long as its
    folder holds
    nothing else: its own place is returned, so do not write there.
    """
    opened = _open(source, resolved.role, base, None)
    place = opened.place(resolved)
    if place is not None:
        return place
    opened.resolve(resolved.digest)
    part = into.with_name(f"{into.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    small = tuple(file for file in resolved.files if not file.path.lower().endswith(_WEIGHTS))
    try:
        _bring(opened, resolved, small, part, None)
        for file in resolved.files:
            if file not in small:
                target = part / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                head = _safetensors_head if file.path.lower().endswith(".safetensors") else _gguf_head
                sparse(head(opened, file), file.size_bytes, target)
        check_model_files({file.path: part / file.path for file in resolved.files}, resolved.ident)
        shutil.rmtree(into, ignore_errors=True)  # what an interrupted call left there
        part.rename(into)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return into / resolved.files[0].path if resolved.single else into


def check_model_files(paths: Mapping[str, Path], source: str) -> None:
    """Check every safetensors file, and that index files name what is there.

    paths: local files by their name in the source.
    Raises SourceInvalid that names the file.
    """
    try:
        headers = {
            name: safetensors_header.check(path, name)
            for name, path in sorted(paths.items())
            if name.lower().endswith(".safetensors")
        }
        for name, path in paths.items():
            if name.lower().endswith(".safetensors.index.json"):
                parent = PurePosixPath(name).parent
                beside = {
                    PurePosixPath(shard).name: header
                    for shard, header in headers.items()
                    if PurePosixPath(shard).parent == parent
                }
                safetensors_header.check_index(read_object(path, name, source), beside, name)
    except SourceInvalid as error:
        raise SourceInvalid(str(error) if str(error).startswith(source) else f"{source}: {error}") from None


def _open(source: Source, role: Role, base: Path | None, digest_cache: Path | None) -> Opened:
    scheme = source.scheme
    if scheme == "hf":
        from fastserve.artifacts.huggingface import HubSource

        return HubSource(source, role)
    if scheme == "s3":
        from fastserve.artifacts.s3_source import S3Source

        return S3Source(source, role)
    if scheme == "package":
        return PackageSource(source, role, base, digest_cache)
    if scheme == "file":
        return FolderSource(source, role, base, digest_cache)
    if mounted_claims() is not None:
        return ClaimSource(source, role, base, digest_cache)
    raise SourceNotFound(
        f"{ident_of(source)}: a volume claim exists only on a Kubernetes cluster, and this is none: it needs a "
        "cluster; "
        "here use file://, hf://, s3:// or package://"
    )


def _bring(
    opened: Opened, resolved: Resolved, files: tuple[SourceFile, ...], into: Path, progress: Progress | None
) -> None:
    total_bytes, done_bytes = sum(file.size_bytes for file in files), 0
    lock = threading.Lock()

    def tick(size_bytes: int) -> None:
        nonlocal done_bytes
        with lock:
            done_bytes += size_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)

    def one(file: SourceFile) -> None:
        target = into / file.path
        if not target.resolve().is_relative_to(into.resolve()):
            raise SourceInvalid(
                f"{resolved.ident}: the file name {file.path!r} leaves the folder; rename it in the source"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        opened.pull(file, target, tick)
        check_content(target, file.path, resolved.ident)

    into.mkdir(parents=True, exist_ok=True)
    try:
        with ThreadPoolExecutor(_PARALLEL) as pool:
            for _ in pool.map(one, files):
                pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(f"no space left in {into} for {resolved.ident} ({total_bytes} bytes); free some") from error
        raise SourceNotFound(
            f"{resolved.ident}: {error.strerror or error}: '{error.filename}'; check that it can be read"
        ) from error


def _safetensors_head(opened: Opened, file: SourceFile) -> bytes:
    length = safetensors_header.header_length(opened.head(file, 8), file.path)
    return opened.head(file, min(length, file.size_bytes))


def _gguf_head(opened: Opened, file: SourceFile) -> bytes:
    """As much as the header needs, found by asking for more until it parses."""
    wanted = _FIRST_HEAD_BYTES
    while True:
        head = opened.head(file, min(wanted, file.size_bytes))
        try:
            parse_gguf(head, file.size_bytes, file.path)
            return head
        except Truncated as error:
            if len(head) >= file.size_bytes or len(head) < wanted:
                raise SourceInvalid(f"'{file.path}' ends inside its header: {error}; fetch it again") from None
            wanted *= 4
