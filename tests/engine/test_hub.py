"""A repository of the hub that cannot run fused is refused before vLLM downloads a weight."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import drop, write_checkpoint
from hub_server import Hub, serving_hub
from local_server import environment

pytestmark = pytest.mark.engine


def test_refused_before_the_download(tmp_path: Path, scripts: Path) -> None:
    write_checkpoint(tmp_path / "served", "awq", edits=[drop("model.layers.0.mlp.up_proj.scales")])
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    with serving_hub(Hub(tmp_path / "served")) as hub:
        request.write_text(json.dumps({"repository": hub.repository}))
        env = environment(
            HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "cache"), HF_TOKEN=""
        )
        command = [sys.executable, str(scripts / "refuse.py"), str(request), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert answer.exists(), done.stderr[-4000:]
    refusal = json.loads(answer.read_text())["repository"]
    assert refusal is not None, "it was served"
    assert refusal["type"] == "PreflightError", refusal
    assert "model.layers.0.mlp.up_proj: found no tensor scales" in refusal["message"]
    assert hub.sent_of("config.json") > 0
    # One request for the header's first piece, no more; the file is smaller than the piece
    assert [name for name, _ in hub.sent].count("model.safetensors") == 1
