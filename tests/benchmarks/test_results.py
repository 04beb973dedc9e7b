"""What a result file says of the sources that made it."""

import subprocess
from pathlib import Path

import pytest

from gemmbench import results


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that no repository knows."""
    for folder in results.SOURCES:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def test_sources_outside_a_repository_are_told_apart(tree: Path) -> None:
    first = results.commit()
    assert first.startswith("tree-")
    assert results.commit() == first
    (tree / "kernels" / "a.py").write_text("x = 2\n")
    assert results.commit() != first


def test_changed_sources_are_told_apart_from_their_commit(tree: Path) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "first")):
        subprocess.run(["git", "-C", tree, *command], check=True)
    clean = results.commit()
    assert "+" not in clean
    (tree / "kernels" / "a.py").write_text("x = 2\n")
    changed = results.commit()
    assert changed.startswith(f"{clean}+")
    (tree / "kernels" / "a.py").write_text("x = 3\n")
    assert results.commit() not in (clean, changed)
