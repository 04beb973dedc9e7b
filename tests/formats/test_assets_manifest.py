"""The committed checkpoints are the ones that the manifest describes."""

import hashlib
import json

import pytest

from tiny_models import ASSETS, BITSANDBYTES, CHECKPOINTS, MIXED, TIED, UNQUANTIZED

MANIFEST = json.loads((ASSETS / "manifest.json").read_text())


@pytest.mark.parametrize("name", [UNQUANTIZED, *CHECKPOINTS, *MIXED, *TIED, *BITSANDBYTES])
def test_every_file_has_the_hash_of_the_manifest(name: str) -> None:
    listed = MANIFEST["checkpoints"][name]["files"]
    assert sorted(listed) == sorted(path.name for path in (ASSETS / name).iterdir())
    for file, entry in listed.items():
        data = (ASSETS / name / file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size"], entry["sha256"])


def test_the_model_is_clearly_better_than_a_unigram_model() -> None:
    losses = MANIFEST["training"]["heldout_nats_per_token"]
    assert losses["model_bf16"] < losses["unigram"] - 1
    for name in [*CHECKPOINTS, *MIXED, *BITSANDBYTES]:
        entry = MANIFEST["checkpoints"][name]
        assert entry["heldout_nats_per_token"] < losses["model_bf16"] + 0.05
        assert entry["tool_version"]
        assert entry["command"]


def test_the_assets_stay_small() -> None:
    sizes = {path: path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()}
    # The trained model and its checkpoints take 7.6 MB of it, layers by single tools the rest
    assert sum(sizes.values()) < 8_300_000
    for name in [*CHECKPOINTS, *MIXED, *TIED, *BITSANDBYTES]:
        assert sum(size for path, size in sizes.items() if path.parent.name == name) < 1_000_000
