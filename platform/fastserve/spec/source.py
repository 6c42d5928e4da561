"""Where weights and data come from.

A source is named, never opened, here. A plain path means something only beside the manifest that holds it, so the
reader of a file passes `CONTEXT_PLACE`, and the path becomes a `file:///` URI before anybody else sees it.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ValidationInfo, field_validator, model_validator

from fastserve.spec.section import Form, Name, Section, wrong_at

SCHEMES = ("hf", "s3", "file", "pvc", "package")
CONTEXT_PLACE = "place"
"""Key of the validation context under which a function turns a plain path into a `file:///` URI."""

_ALLOWED = ", ".join(f"{scheme}://" for scheme in SCHEMES)
_HUB_PAGES = ("https://huggingface.co/", "http://huggingface.co/", "https://hf.co/")
_SHAPES = {
    "hf": "hf://org/name",
    "s3": "s3://bucket/path",
    "file": "file:///path",
    "pvc": "pvc://claim/path",
    "package": "package://distribution/path",
}


class Source(Section):
    """A model or data set, by URI. In the manifest a plain text stands for `{uri: text}`."""

    uri: str
    """hf://org/name[@revision], s3://bucket/path, file:///path (or a plain path on a laptop), pvc://claim/path,
    package://distribution/path."""

    revision: str | None = None
    """Commit, tag or branch of an hf:// source; resolved to a commit once."""

    token_secret: Name | None = None
    """Name of the Secret that holds the token.
    On a laptop the token is read from HF_TOKEN or the AWS variables instead."""

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str, info: ValidationInfo) -> str:
        if not uri.strip():
            raise ValueError(f"is empty; write {_ALLOWED} or a path")
        scheme, separator, rest = uri.partition("://")
        if not separator:
            place = (info.context or {}).get(CONTEXT_PLACE)
            return str(place(uri)) if place else uri
        for page in _HUB_PAGES:
            if uri.startswith(page):
                name = "/".join(uri.removeprefix(page).split("/")[:2])
                raise ValueError(f"'{uri}' is a web page; write hf://{name}")
        if scheme not in SCHEMES:
            raise ValueError(f"'{scheme}://' is not a source; write {_ALLOWED} or a path")
        if not rest.strip("/"):
            raise ValueError(f"'{uri}' names nothing behind {scheme}://; write {_SHAPES[scheme]}")
        if scheme == "file" and not rest.startswith("/"):
            raise ValueError(f"'{uri}' is not absolute; write file:///path, or the path alone")
        if scheme == "hf" and uri.endswith("@"):
            raise ValueError(f"'{uri}' has no revision behind @; write one, or remove the @")
        return uri

    @model_validator(mode="after")
    def _one_revision(self) -> Self:
        if self.revision is None:
            return self
        if not self.revision.strip():
            raise wrong_at("revision", "is empty; write a commit, tag or branch, or remove it")
        if self.scheme != "hf":
            raise wrong_at("revision", f"is for hf:// sources, and this is {self.scheme}://; remove it")
        if "@" in self.uri:
            raise wrong_at("revision", "stands beside a revision behind @ in uri; keep one of the two")
        return self

    @property
    def scheme(self) -> str:
        """`hf`, `s3`, `file`, `pvc` or `package`; a plain path is `file`."""
        scheme, separator, _ = self.uri.partition("://")
        return scheme if separator else "file"


def _from_text(value: Any) -> Any:
    return {"uri": value} if isinstance(value, str) else value


SourceRef = Annotated[
    Source, BeforeValidator(_from_text, json_schema_input_type=str | Source), Form("source", "hf://org/name")
]
"""`source: hf://org/name` or `source: {uri: ..., revision: ..., tokenSecret: ...}`."""
