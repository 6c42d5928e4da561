"""The token cache: rows are tokenised once, whoever trains on them and however often a run begins anew.

What comes out depends on the content of the rows, the tokenizer, the template and the limits alone, so their digest
names it in the store. It is whole when its marker is there: corpus.json, created last and once, with the sha256 of
every file.

    tokens/<digest>/corpus.json
    tokens/<digest>/<random>/{ids,trained,starts}.bin

Every writer has a folder of its own, so two at once never mix files; whose marker is first, that one counts. Both are
right, since both wrote the same.
"""

from __future__ import annotations

import logging
import secrets
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from fastserve.artifacts.attempts import dump, load
from fastserve.artifacts.record import FileEntry, digest_of_files
from fastserve.artifacts.store import Store, check_name
from fastserve.artifacts.tokenizer import TokenizerFiles, load_tokenizer
from fastserve.artifacts.transfer import download, upload
from fastserve.data.samples import RENDERED_ON, Sample, SampleStream
from fastserve.errors import ArtifactNotFound, DigestMismatch, StoreFailed
from fastserve.plan.digest import digest_of
from fastserve.spec.train import Train
from fastserve.stages.train.corpus import Corpus
from fastserve.telemetry.progress import Reporter

FORMAT = 1
"""Raised when the same rows would give other tokens, flags or files."""

MASKING = "assistant turns with their end tokens; all of a text but its first token"
"""What is trained, in words; it is part of the digest, so that another method is another corpus."""

_FILES: Mapping[str, Any] = {"ids.bin": np.int32, "trained.bin": np.bool_, "starts.bin": np.int64}
_BUFFERED_TOKENS = 1 << 18
_REPORT_EVERY_SAMPLES = 512
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CorpusRef:
    """A tokenised data set in the store: where it is and what it holds."""

    digest: str
    """Of all that decides about its tokens, 64 hex digits."""

    folder: str
    """Prefix of its files in the store, with `/` at the end."""

    files: tuple[FileEntry, ...]

    rows: int
    """Rows read; a piece of a text file counts as one."""

    used: int
    """Rows that train: samples of the corpus."""

    truncated: int
    """Used rows that were cut at maxLength."""

    tokens: int
    """Tokens of all samples."""

    trained_tokens: int
    """Tokens whose loss counts."""

    longest: int
    """Tokens of the longest sample."""

    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows that do not train, by cause."""

    @property
    def samples(self) -> int:
        """Samples of the corpus."""
        return self.used

    @property
    def counts(self) -> dict[str, Any]:
        """What became of the rows, as status and records show it."""
        return {
            "read": self.rows,
            "used": self.used,
            "truncated": self.truncated,
            "leftOut": dict(self.left_out),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Back from plain values. Raises KeyError, TypeError or ValueError for anything else."""
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']!r}")
        fields = {name: item for name, item in value.items() if name != "format"}
        return cls(**{**fields, "files": tuple(FileEntry(**entry) for entry in value["files"])})


def tokenised(
    store: Store,
    data: Path,
    digest: str,
    model_folder: Path,
    train: Train,
    report: Reporter,
    *,
    scratch: Path | None = None,
) -> CorpusRef:
    """The rows at `data` as tokens of the model in `model_folder`, from the store, or tokenised now and kept there.

    data: a local file or folder; digest: of its content.
    train: `max_length` and `over_length` are read.
    scratch: a folder with room for five bytes a token; absent: the system's own.

    Memory does not grow with the data set. Raises DatasetInvalid for a row that cannot be read and for rows that teach
    nothing, SourceInvalid for a tokenizer that cannot be read, StoreFull or StoreFailed when the store cannot take it.
    """
    files = load_tokenizer(model_folder)
    name = corpus_digest(digest, files, train)
    found = _find(store, name)
    if found is not None:
        return found
    stream = SampleStream(
        [data],
        files.tokenizer(),
        files.chat_template,
        train.max_length,
        special=files.special,
        over_length=train.over_length,
        digests=False,
    )
    with tempfile.TemporaryDirectory(prefix="fastserve-tokens-", dir=scratch) as temporary:
        folder = Path(temporary) / "corpus"
        folder.mkdir()
        longest = _write(stream, folder, report)
        facts = stream.facts
        counts = {
            "rows": facts.rows,
            "used": facts.used,
            "truncated": facts.truncated,
            "tokens": facts.tokens,
            "trained_tokens": facts.trained_tokens,
            "longest": longest,
            "left_out": dict(facts.left_out),
        }
        return _keep(store, name, folder, counts)


def corpus_digest(data_digest: str, files: TokenizerFiles, train: Train) -> str:
    """Digest of all that decides about the tokens, 64 hex digits."""
    return digest_of(
        {
            "format": FORMAT,
            "data": data_digest,
            "tokenizer": files.tokenizer_json,
            "template": files.chat_template,
            "special": dict(files.special),
            "maxLength": train.max_length,
            "overLength": train.over_length,
            "masking": MASKING,
            "renderedOn": RENDERED_ON.isoformat(),
        }
    )


def open_corpus(store: Store, ref: CorpusRef, cache: Path | None = None, verify: bool = False) -> Corpus:
    """The corpus as memory-mapped arrays: in a folder store in place, else from a copy that is fetched once.

    cache: folder of such copies; absent: that of artifacts. verify: compare every file's sha256 too.
    Raises DigestMismatch, naming the file, when it is damaged, ArtifactNotFound when it is gone.
    """
    folder = download(store, ref.folder, ref.files, digest_of_files(ref.files), cache, verify)
    ids, trained, starts = (np.memmap(folder / name, kind, mode="r") for name, kind in _FILES.items())
    return Corpus(ids=ids, trained=trained, starts=starts)


def _write(samples: SampleStream, folder: Path, report: Reporter) -> int:
    """Append all samples to the files of `folder`; returns the length of the longest."""
    longest = tokens = 0
    with _open(folder) as (ids_file, trained_file, starts_file):
        ids, trained, starts = array("i"), bytearray(), array("q", [0])

        def flush() -> None:
            for file, part in ((ids_file, ids), (trained_file, trained), (starts_file, starts)):
                file.write(part)
                del part[:]

        for number, sample in enumerate(_told(samples, report), start=1):
            ids.extend(sample.ids)
            trained.extend(sample.trained)
            tokens += len(sample.ids)
            longest = max(longest, len(sample.ids))
            starts.append(tokens)
            if len(ids) >= _BUFFERED_TOKENS or number % _BUFFERED_TOKENS == 0:
                flush()
        flush()
    return longest


@contextmanager
def _open(folder: Path) -> Iterator[list[BinaryIO]]:
    files: list[BinaryIO] = [(folder / name).open("wb") for name in _FILES]
    try:
        yield files
    finally:
        for file in files:
            file.close()


def _told(stream: SampleStream, report: Reporter) -> Iterator[Sample]:
    for number, sample in enumerate(stream):
        if number % _REPORT_EVERY_SAMPLES == 0:
            facts = stream.facts
            report.update(0, 1, "steps", note=f"tokenising: {facts.rows:,} rows, {facts.tokens:,} tokens")
        yield sample


def _keep(store: Store, name: str, folder: Path, counts: Mapping[str, Any]) -> CorpusRef:
    """Put the files into the store, then the marker; returns what is there in the end, a quicker writer's or this one.

    Raises StoreFull or StoreFailed; what was put there in vain is removed.
    """
    own = f"tokens/{name}/{secrets.token_hex(8)}/"
    created, failure = (
        False,
        StoreFailed(f"{store.uri}: {_marker(name)} was removed while it was written; run it again"),
    )
    try:
        ref = CorpusRef(digest=name, folder=own, files=upload(store, own, folder), **counts)
        created = store.create(_marker(name), dump(ref.to_json(), _marker(name)))
    except StoreFailed as error:
        failure = error  # perhaps because a quicker writer has removed these files
    finally:
        if not created:
            _remove(store, own)
    if created:
        _remove_others(store, ref)
        return ref
    winner = _find(store, name)
    if winner is None:
        raise failure
    return winner


def _find(store: Store, name: str) -> CorpusRef | None:
    """What is in the store under the digest `name`; a torn one is removed, and counts as none."""
    try:
        value = load(store.read(_marker(name)), store, _marker(name))
        ref = CorpusRef.from_json(value)
        for entry in ref.files:
            check_name(entry.path)
        whole = (
            ref.digest == name and sorted(entry.path for entry in ref.files) == sorted(_FILES) and _is_there(store, ref)
        )
    except ArtifactNotFound:
        return None
    except (DigestMismatch, KeyError, TypeError, ValueError):
        whole = False
    if whole:
        return ref
    _LOG.warning("tokens %s passed over: files are missing or damaged; they are made anew", name[:12])
    store.delete(_marker(name))
    return None


def _is_there(store: Store, ref: CorpusRef) -> bool:
    """Whether all files are in the store, in a folder store with their sizes."""
    listed = store.names(ref.folder)
    if any(ref.folder + entry.path not in listed for entry in ref.files):
        return False
    folder = store.folder(ref.folder)
    return folder is None or all((folder / entry.path).stat().st_size == entry.size_bytes for entry in ref.files)


def _marker(name: str) -> str:
    return f"tokens/{name}/corpus.json"


def _remove_others(store: Store, ref: CorpusRef) -> None:
    """What killed writers left; one that still writes finds this one's marker."""
    base = f"tokens/{ref.digest}/"
    folders = {
        base + name.removeprefix(base).partition("/")[0] + "/"
        for name in store.names(base)
        if name != _marker(ref.digest)
    }
    for folder in sorted(folders - {ref.folder}):
        _remove(store, folder)


def _remove(store: Store, prefix: str) -> None:
    """Remove what nobody reads; that it stays is no reason to fail."""
    try:
        store.delete_under(prefix)
    except StoreFailed as error:
        _LOG.warning("%s stays in the store: %s", prefix, error)
