"""Sources on a Hugging Face hub, on a server that speaks its protocol (HF_ENDPOINT), or offline in its local cache."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastserve.artifacts.file_types import check_name, choose
from fastserve.artifacts.resolved import Resolved, SourceFile, Tick, copy_checked, digest_of_hub, read_head
from fastserve.artifacts.tokens import hub_token, variables_of
from fastserve.errors import SourceInvalid, SourceNotFound, StageFailed
from fastserve.plan.keys import Role, ident_of
from fastserve.spec.source import Source

_UNKNOWN = -1
PUBLIC_HUB = "https://huggingface.co"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._/+-]{0,254}")


@dataclass(frozen=True, slots=True)
class Address:
    """The parts of `hf://[datasets/]org/name[/path][@revision]`."""

    repository: str
    kind: str
    """`model` or `dataset`, as the hub says."""

    path: str
    """A file, folder or pattern inside the repository; empty for all of it."""

    revision: str


def parse_address(source: Source, role: Role) -> Address:
    """Read an hf:// address. Raises SourceInvalid that shows the form."""
    ident = ident_of(source)
    body, _, revision = source.uri.removeprefix("hf://").partition("@")
    revision = revision or source.revision or "main"
    parts = [part for part in body.split("/") if part]
    kind = "dataset" if role == "data" else "model"
    if parts and parts[0] in ("datasets", "models"):
        kind = parts.pop(0).removesuffix("s")
    names, path = parts[:2], "/".join(parts[2:])
    if not names or not all(_NAME.fullmatch(name) and ".." not in name for name in names):
        raise SourceInvalid(
            f"{ident}: is not the name of a repository; write hf://org/name, hf://org/name/path or hf://org/name@revision"
        )
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise SourceInvalid(f"{ident}: '{revision}' is not a commit, tag or branch")
    if path:
        check_name(path.replace("*", "x").replace("?", "x"), ident, remote=True)
    return Address("/".join(names), kind, path, revision)


class HubSource:
    """One repository at one commit."""

    def __init__(self, source: Source, role: Role) -> None:
        self._ident = ident_of(source)
        self._role = role
        self._address = parse_address(source, role)
        self._endpoint = (os.environ.get("HF_ENDPOINT", "").strip() or PUBLIC_HUB).rstrip("/")
        self._offline = is_offline(os.environ)
        # Said explicitly, or the hub's library would look for a token of its own and send that.
        self._token = hub_token(source.token_secret, variables_of(source.token_secret, os.environ))
        self._commit = ""

    def resolve(self, digest: str | None = None) -> Resolved:
        """Find the commit and its files: on the hub, or offline in the local cache."""
        revision = digest[:40] if digest else self._address.revision
        self._commit, listed = self._cached(revision) if self._offline else self._listed(revision)
        path = self._address.path
        single = path in listed
        if single:
            names, start = [path], path.rpartition("/")[0]
        elif any(letter in path for letter in "*?"):
            fixed = re.split(r"[*?]", path)[0]
            names, start = [name for name in listed if _matches(name, path)], fixed.rpartition("/")[0]
        else:
            names, start = [name for name in listed if not path or name.startswith(path + "/")], path
        if not names:
            raise SourceNotFound(
                f"{self._ident}: the repository has no '{path}' at {self._commit[:12]}; it has "
                f"{', '.join(sorted(listed)[:5]) or 'nothing'}"
            )
        start += "/" if start else ""
        chosen = choose([name.removeprefix(start) for name in names], self._role, self._ident, remote=True)
        files = tuple(
            SourceFile(name, self._size(listed[start + name]), start + name, listed[start + name].stamp)
            for name in chosen
        )
        return Resolved(self._ident, "hf", self._role, digest_of_hub(self._commit, self._role, path), files, single)

    def pull(self, file: SourceFile, target: Path, tick: Tick) -> None:
        """Download into the hub's cache, where other tools find it too, and copy from there."""
        from huggingface_hub import hf_hub_download

        counter = _Counter(tick, file.size_bytes)
        with self._errors(SourceNotFound if self._offline else StageFailed):
            cached = hf_hub_download(
                self._address.repository,
                file.at,
                repo_type=self._address.kind,
                revision=self._commit,
                cache_dir=cache_folder(os.environ),
                endpoint=self._endpoint,
                token=self._token.reveal() if self._token else False,
                local_files_only=self._offline,
                tqdm_class=counter.bar(),
            )
        copy_checked(Path(cached), file, target, lambda size_bytes: None)
        counter.finish()
        self._remember_revision()

    def head(self, file: SourceFile, size_bytes: int) -> bytes:
        """First bytes of a file, by a range request; a server that ignores the range is cut off."""
        from huggingface_hub import get_session
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import hf_raise_for_status

        if self._offline:
            return read_head(self._snapshot(self._commit) / file.at, size_bytes)
        headers = build_hf_headers(token=self._token.reveal() if self._token else False)
        headers["range"] = f"bytes=0-{size_bytes - 1}"
        headers["accept-encoding"] = "identity"
        received = bytearray()
        with (
            self._errors(SourceNotFound),
            get_session().stream("GET", self._url(file.at), headers=headers, follow_redirects=True) as answer,
        ):
            hf_raise_for_status(answer)
            for chunk in answer.iter_bytes():
                received += chunk
                if len(received) >= size_bytes:
                    break
        return bytes(received[:size_bytes])

    def place(self, resolved: Resolved) -> Path | None:
        """Nowhere: the cache's links lead out of their folder."""

    def _listed(self, revision: str) -> tuple[str, dict[str, SourceFile]]:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint, token=self._token.reveal() if self._token else False)
        with self._errors(SourceNotFound):
            found: Any = api.repo_info(
                self._address.repository,
                repo_type=self._address.kind,
                revision=revision,
                files_metadata=True,
                timeout=30,
            )
        commit = str(found.sha or "")
        if not _COMMIT.fullmatch(commit):
            raise SourceInvalid(
                f"{self._ident}: {self._endpoint} did not say which commit '{revision}' is; check HF_ENDPOINT"
            )
        files = {}
        for item in found.siblings or []:
            stamp = (item.lfs.sha256 if item.lfs else item.blob_id) or ""
            files[item.rfilename] = SourceFile(
                item.rfilename, _UNKNOWN if item.size is None else int(item.size), item.rfilename, stamp
            )
        return commit, files

    def _remember_revision(self) -> None:
        """Note in the cache which commit a branch was, for offline use: files are asked for by commit."""
        revision = self._address.revision
        note = self._cache() / "refs" / revision
        if self._offline or _COMMIT.fullmatch(revision) or (note.is_file() and note.read_text() == self._commit):
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f"{note.name}.{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(self._commit)
        os.replace(temporary, note)

    def _cache(self) -> Path:
        """The repository's folder in the cache: huggingface.co/docs/huggingface_hub/guides/manage-cache."""
        return cache_folder(os.environ) / f"{self._address.kind}s--{self._address.repository.replace('/', '--')}"

    def _size(self, file: SourceFile) -> int:
        """Bytes of a file, asked for alone where the hub's listing has no sizes."""
        if file.size_bytes != _UNKNOWN:
            return file.size_bytes
        from huggingface_hub import get_hf_file_metadata

        token = self._token.reveal() if self._token else False
        with self._errors(SourceNotFound):
            return int(get_hf_file_metadata(self._url(file.at), token=token, endpoint=self._endpoint).size or 0)

    def _url(self, path: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(
            self._address.repository,
            path,
            repo_type=self._address.kind,
            revision=self._commit,
            endpoint=self._endpoint,
        )

    def _cached(self, revision: str) -> tuple[str, dict[str, SourceFile]]:
        snapshot = self._snapshot(revision)
        files = {}
        for path in sorted(snapshot.rglob("*")):
            if path.is_file():
                name = path.relative_to(snapshot).as_posix()
                blob = path.resolve().name  # the cache names a blob by its sha256 or git sha1
                stamp = blob if path.is_symlink() and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob) else ""
                files[name] = SourceFile(name, path.stat().st_size, name, stamp)
        return snapshot.name, files

    def _snapshot(self, revision: str) -> Path:
        """The cache's folder of a revision."""
        repository = self._cache()
        commit = revision
        if not _COMMIT.fullmatch(revision):
            with contextlib.suppress(OSError):
                commit = (repository / "refs" / revision).read_text().strip()
        snapshot = repository / "snapshots" / commit
        if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
            raise SourceNotFound(
                f"{self._ident}: offline (HF_HUB_OFFLINE is set), and '{revision}' of {self._address.repository} is "
                "not in the local cache "
                f"{cache_folder(os.environ)}; unset HF_HUB_OFFLINE, fill the cache with `hf download "
                f"{self._address.repository}`, "
                "or use a file:// or package:// source"
            )
        return snapshot

    @contextlib.contextmanager
    def _errors(self, passing: type[SourceNotFound] | type[StageFailed]) -> Iterator[None]:
        """The hub's errors in our words. passing: what an error becomes that may pass by itself."""
        import httpx
        from huggingface_hub import errors

        where = f"{self._ident}: the hub at {self._endpoint}"
        advice = (
            "check the name; if it is private, set a token (HF_TOKEN, or tokenSecret on a cluster) that may read it"
        )
        if self._token:
            advice = f"check the name, and that the token in {self._token.name} may read it"
        try:
            yield
        except errors.GatedRepoError:
            raise SourceNotFound(
                f"{where} lets only some accounts read it: accept its terms there, and set their token; {advice}"
            ) from None
        except errors.RepositoryNotFoundError:
            raise SourceNotFound(
                f"{where} shows no such {self._address.kind} without a fitting token; {advice}"
            ) from None
        except errors.RevisionNotFoundError:
            raise SourceNotFound(
                f"{where} has no revision '{self._address.revision}' of it; correct the revision"
            ) from None
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise SourceNotFound(f"{where} refused access ({status}); {advice}") from None
            if status in (404, 410):
                raise SourceNotFound(f"{where} has no such file or revision ({status}); {advice}") from None
            raise passing(
                f"{where} answered with status {status}; try again later, or use another HF_ENDPOINT"
            ) from None
        except errors.LocalEntryNotFoundError:
            raise passing(
                f"{where} cannot be reached, or a file is missing in the local cache; check the network and "
                "HF_ENDPOINT, then try again"
            ) from None
        except (httpx.HTTPError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
            raise passing(
                f"{where} cannot be reached ({type(error).__name__}); check the network and HF_ENDPOINT, or work "
                "offline: "
                "set HF_HUB_OFFLINE=1 with a filled cache, or use a file:// or package:// source"
            ) from None


def is_offline(environment: Mapping[str, str]) -> bool:
    """Whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids the network."""
    words = (environment.get(name, "").strip().upper() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(word in ("1", "ON", "YES", "TRUE") for word in words)


def cache_folder(environment: Mapping[str, str]) -> Path:
    """The hub's cache on this machine, by the variables that its own tools read."""
    if environment.get("HF_HUB_CACHE"):
        return Path(environment["HF_HUB_CACHE"]).expanduser()
    home = environment.get("HF_HOME") or f"{environment.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(home).expanduser() / "hub"


def _matches(name: str, pattern: str) -> bool:
    """Shell pattern over a path; `*` stops at `/`."""
    names, patterns = name.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(
        fnmatchcase(part, piece) for part, piece in zip(names, patterns, strict=True)
    )


class _Counter:
    """Hands on what the hub's library would show in a progress bar, and never more than the file's size."""

    def __init__(self, tick: Tick, size_bytes: int) -> None:
        self._tick = tick
        self._left_bytes = size_bytes

    def add(self, size_bytes: float) -> None:
        """So many bytes more have come."""
        step = min(int(size_bytes), self._left_bytes)
        if step > 0:
            self._left_bytes -= step
            self._tick(step)

    def finish(self) -> None:
        """The file is there, from wherever it came."""
        self.add(self._left_bytes)

    def bar(self) -> type[Any]:
        """A progress bar for the library that prints nothing."""
        from huggingface_hub.utils.tqdm import tqdm

        add = self.add

        class Silent(tqdm):
            def __init__(self, *args: Any, **settings: Any) -> None:
                super().__init__(*args, **{**settings, "disable": True})  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                add(n or 0)

        return Silent
