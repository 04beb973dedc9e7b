"""Checkpoints on the hub: only headers are read, and every refusal has a way out."""

import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from checkpoints import add, write_checkpoint
from hub_server import Hub, serving_hub
from vllm_fusedq.checkpoint import hub as hub_reader
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import CheckpointError, RepositoryError

MODEL = "some-owner/some-model"


def point_client_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does to the hub client when it is imported."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    root = tmp_path / "served"
    # A megabyte that must not be downloaded
    write_checkpoint(root, "awq", layers=2, edits=[add("model.pad.weight", torch.zeros(1 << 18))])
    with serving_hub(Hub(root)) as hub:
        point_client_at(monkeypatch, hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()
        yield hub
    huggingface_hub.close_session()


def test_a_repository_reads_like_its_directory(hub: Hub) -> None:
    here, there = read_checkpoint(hub.root), read_checkpoint(MODEL)
    assert there.path == MODEL
    assert there.config == here.config
    assert there.quant_config == here.quant_config
    assert list(there.tensors.items()) == list(here.tensors.items())


def test_tensors_that_are_metadata_are_read(hub: Hub) -> None:
    """bitsandbytes stores the sizes of a layer in one."""
    write_checkpoint(hub.root, "bnb-nf4", layers=2)
    here, there = read_checkpoint(hub.root), read_checkpoint(MODEL)
    assert len(here.metadata) == 14
    assert there.metadata == here.metadata
    size = (hub.root / "model.safetensors").stat().st_size
    headers, pieces = min(size, hub_reader.FIRST_PIECE), sum(map(len, here.metadata.values()))
    assert hub.sent_of(".safetensors") == headers + pieces


def test_no_weight_is_downloaded(hub: Hub) -> None:
    read_checkpoint(MODEL)
    weights = hub.root / "model.safetensors"
    assert weights.stat().st_size > 1 << 20
    assert hub.sent_of(".safetensors") == hub_reader.FIRST_PIECE


def test_a_header_longer_than_the_first_piece(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_reader, "FIRST_PIECE", 100)
    assert read_checkpoint(MODEL).tensors == read_checkpoint(hub.root).tensors
    header = int.from_bytes((hub.root / "model.safetensors").read_bytes()[:8], "little")
    assert hub.sent_of(".safetensors") == 8 + header


def test_progress_counts_headers(hub: Hub) -> None:
    seen: list[tuple[int, int]] = []
    read_checkpoint(MODEL, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]


def test_a_revision_is_asked_for(hub: Hub) -> None:
    assert read_checkpoint(MODEL, revision="main").tensors
    with pytest.raises(RepositoryError, match=f"{MODEL}: the repository has no such revision"):
        read_checkpoint(MODEL, revision="v2")


def test_an_unknown_repository(hub: Hub) -> None:
    with pytest.raises(RepositoryError, match=r"some-owner/other: no such local directory, and no"):
        read_checkpoint("some-owner/other")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ((403, "GatedRepo"), "the repository is gated and closed to you; ask for access on its"),
        ((401, "RepoNotFound"), r"or a private one; check the name, log in \(`hf auth login`"),
        ((401, ""), r"the hub does not accept your token, or closes this to you \(401\); log in"),
        ((418, ""), r"the hub answered with an error \(418\); try again later, or download"),
    ],
)
def test_refusals_of_the_hub(hub: Hub, error: tuple[int, str], message: str) -> None:
    hub.error = error
    with pytest.raises(RepositoryError, match=message):
        read_checkpoint(MODEL)


def test_a_file_that_the_repository_lacks(hub: Hub) -> None:
    (hub.root / "config.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{MODEL}: no config.json there: not a checkpoint"):
        read_checkpoint(MODEL)


def test_a_server_without_ranges_sends_no_weights(hub: Hub) -> None:
    hub.ranges = False
    with pytest.raises(RepositoryError, match=r"does not answer range requests \(status 200\)"):
        read_checkpoint(MODEL)


def test_an_answer_that_is_cut_short(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_reader, "FIRST_PIECE", 100)
    files = hub_reader.HubFiles(MODEL)
    hub.cut = 1
    with pytest.raises(RepositoryError, match=r"the server sent \d+ of the \d+ bytes of the head"):
        list(files.headers(["model.safetensors"]))


def test_a_configuration_file_that_is_cut_short(hub: Hub) -> None:
    hub.cut = 10
    with pytest.raises(
        RepositoryError, match=r"config.json: the server sent \d+ of \d+ bytes; try"
    ):
        read_checkpoint(MODEL)


def test_a_configuration_file_of_absurd_size(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_reader, "MAX_SMALL_FILE", 10)
    with pytest.raises(RepositoryError, match=r"config.json: .* bytes, more than the 10 that any"):
        read_checkpoint(MODEL)


def test_a_damaged_remote_header_is_named(hub: Hub) -> None:
    path = hub.root / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{MODEL}/model.safetensors: .* file is truncated"):
        read_checkpoint(MODEL)


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(RepositoryError, match=r"offline \(HF_HUB_OFFLINE\); unset it, or download"):
        read_checkpoint(MODEL)


def test_offline_with_the_repository_in_the_cache(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub client keeps blobs, and snapshots of links to them."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = Path(huggingface_hub.snapshot_download(MODEL, cache_dir=tmp_path / "cache"))
    assert (snapshot / "model.safetensors").is_symlink()
    there = read_checkpoint(MODEL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    sent = len(hub.sent)
    found = read_checkpoint(MODEL)
    assert len(hub.sent) == sent
    assert found.path == str(snapshot)
    assert list(found.tensors.items()) == list(there.tensors.items())


def test_no_server(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_client_at(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}")
    with pytest.raises(RepositoryError, match=r"cannot be reached \(.*check the network and HF_EN"):
        read_checkpoint(MODEL)
