"""Where a worker finds the files that its layers were loaded from."""

from pathlib import Path


def test_a_directory_holds_its_files_and_the_hubs_cache_those_of_a_repository(
    tmp_path: Path,
) -> None:
    from vllm_fusedq.integration.worker import _downloaded

    file, commit = "model.safetensors", "0" * 40
    repository = tmp_path / "cache" / "models--maker--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / file).touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    cache = str(tmp_path / "cache")
    assert _downloaded(str(snapshot), None, None, file) == snapshot / file
    assert _downloaded("maker/model", None, cache, file) == snapshot / file
    assert _downloaded("maker/model", commit, cache, file) == snapshot / file
    assert _downloaded("maker/model", "1" * 40, cache, file) is None
    assert _downloaded("maker/model", None, cache, "other.safetensors") is None
    assert _downloaded(str(tmp_path), None, cache, file) is None
