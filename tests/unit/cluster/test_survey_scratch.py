"""What a plan knows of a model from scratch, whose weights nobody has yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastserve.cluster.home import Home
from fastserve.cluster.survey import survey
from fastserve.errors import FastServeError, ManifestInvalid, SourceInvalid
from fastserve.spec.load import read_file
from fastserve.spec.model import Model

ROOT = Path(__file__).parents[3]
MANIFEST = ROOT / "deployments" / "03-from-scratch.yaml"


def model(**train: Any) -> Model:
    found = read_file(MANIFEST)[0]
    assert isinstance(found, Model)
    plain = found.model_dump(mode="json", by_alias=True, exclude_none=True)
    plain["spec"]["train"] |= train
    plain["spec"]["train"] = {key: value for key, value in plain["spec"]["train"].items() if value is not None}
    return Model.model_validate(plain)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def test_the_course_counts_the_tokens_that_will_be_trained(home: Home) -> None:
    found = survey(home, str(home.path / "store"), model())
    rows = {line.role: line.facts for line in found.sheet.datasets}
    # 136,438 characters at about three a token; at one byte a token there would be as many tokens.
    assert 40_000 < rows["train.dataset"].tokens < 60_000
    assert set(rows) == {"train.dataset", "train.validation.data"}
    assert found.sheet.refusals == ()
    again = survey(home, str(home.path / "store"), model())
    assert again.sheet.datasets == found.sheet.datasets


def test_another_vocabulary_gives_other_tokens(home: Home) -> None:
    store = str(home.path / "store")
    small = survey(home, store, model(scratch={"vocabulary": 300})).sheet.datasets[0].facts
    large = survey(home, store, model(scratch={"vocabulary": 2000})).sheet.datasets[0].facts
    assert small.tokens > 1.5 * large.tokens


@pytest.mark.parametrize(
    ("train", "kind", "says"),
    [
        ({"method": "full", "scratch": None}, SourceInvalid, "train it with method: scratch"),
        ({"scratch": {"vocabulary": 300, "config": {"hidden": 3}}}, ManifestInvalid, "no key of the source's config"),
        ({"scratch": {}}, SourceInvalid, r"no tokenizer\.json"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_runs(
    home: Home, train: dict[str, Any], kind: type[FastServeError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        survey(home, str(home.path / "store"), model(**train))
