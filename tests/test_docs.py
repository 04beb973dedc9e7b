"""The documentation is what the code says."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("serving_configs/*.md")])


@pytest.fixture(scope="module")
def catalogue() -> ModuleType:
    path = ROOT / "scripts" / "error_catalogue.py"
    spec = importlib.util.spec_from_file_location("error_catalogue", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_error_catalogue_is_up_to_date(catalogue: ModuleType) -> None:
    written = (ROOT / "docs" / "errors.md").read_text()
    assert written == catalogue.catalogue(), "run python scripts/error_catalogue.py"


def test_the_catalogue_follows_names_and_both_branches(
    tmp_path: Path, catalogue: ModuleType
) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        'LIMIT = "two"\n'
        "def check(size, odd):\n"
        '    kind = "odd" if odd else "even"\n'
        '    where = f"in {kind} rows"\n'
        '    raise SettingsError(f"found {size} {where}; at most {LIMIT}" + ", as planned")\n'
        "def other(layer):\n"
        '    return Problem(layer, found="a", supported="b", fix=f"c {layer.name}")\n'
    )
    assert list(catalogue.messages(source)) == [
        ("SettingsError", "found <size> in (odd | even) rows; at most two, as planned"),
        ("problem", "a", "b", "c <name>"),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target
