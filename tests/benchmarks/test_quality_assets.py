"""The table in docs/quality.md is what the committed documents say."""

import json
from pathlib import Path

import jsonschema
import pytest

import quality_assets

FOLDER = quality_assets.ROOT / "benchmarks" / "results" / "cpu" / "quality"
SCHEMA = quality_assets.ROOT / "docs" / "schemas" / "quality.v1.json"


def test_the_table_and_the_csv_are_those_of_the_documents() -> None:
    found = quality_assets.rows(FOLDER)
    page = quality_assets.PAGE.read_text()
    assert quality_assets.with_table(page, found) == page
    assert (FOLDER / "quality.csv").read_text() == quality_assets.as_csv(found)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_the_documents_follow_the_schema(path: Path) -> None:
    jsonschema.validate(json.loads(path.read_text()), json.loads(SCHEMA.read_text()))
