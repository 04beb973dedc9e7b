"""serving_configs/: what vLLM's own parser makes of them, and whether the models fit."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from published import MODELS, write_headers
from vllm_fusedq.cli import app
from vllm_parser import parse

CONFIGS = Path(__file__).resolve().parent.parent / "serving_configs"
LONG = {"Kimi-K2"}
FILES = sorted(path.name for path in CONFIGS.glob("*.yaml"))


class Listed(NamedTuple):
    model: str
    format: str
    count: int
    device: str


def listed() -> dict[str, Listed]:
    """The README's table, by file."""
    rows = {}
    for line in (CONFIGS / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0].endswith(".yaml"):
            count, _, device = cells[3].partition(" x ")
            rows[cells[0]] = Listed(cells[1], cells[2], int(count), device)
            assert cells[4] == "checked only", "say where it was run, and change this test"
    return rows


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / name).read_text())


def test_every_file_is_listed() -> None:
    assert sorted(listed()) == FILES
    assert len(FILES) >= 15


@pytest.mark.parametrize("name", FILES)
def test_vllm_parses_every_value_as_it_is_written(name: str) -> None:
    from vllm.entrypoints.cli.serve import validate_parsed_serve_args

    values = read(name)
    args = parse("--config", str(CONFIGS / name))
    validate_parsed_serve_args(args)
    for key, value in values.items():
        found = getattr(args, key.replace("-", "_"))
        assert found == value or str(found) == str(value), key
    assert args.quantization == "fusedq"


@pytest.mark.parametrize("name", FILES)
def test_every_value_departs_from_a_default_and_says_why(name: str) -> None:
    defaults = parse()
    for line in (CONFIGS / name).read_text().splitlines():
        match = re.fullmatch(r"([a-z-]+): (\S+)(  # .+)?", line)
        if line.startswith("#") or match is None:
            assert line.startswith("#"), line
            continue
        key = match.group(1)
        assert str(getattr(defaults, key.replace("-", "_"))) != match.group(2), key
        assert key == "model" or match.group(3), f"{key} gives no reason"


@pytest.mark.parametrize("name", FILES)
def test_every_model_runs_fused_and_fits(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    row, values = listed()[name], read(name)
    if row.model in LONG and not request.config.getoption("--all-models"):
        pytest.skip("208,034 tensors; needs --all-models")
    write_headers(tmp_path, MODELS[row.model], row.format)
    tp, pp = (values.get(f"{way}-parallel-size", 1) for way in ("tensor", "pipeline"))
    assert tp * pp == row.count
    arguments = ["check", str(tmp_path), "--json", "--device", row.device]
    arguments += ["-tp", str(tp), "-pp", str(pp)]
    if values.get("enable-expert-parallel"):
        arguments.append("--expert-parallel")
    for key in ("dtype", "max-model-len", "gpu-memory-utilization"):
        if key in values:
            arguments += [f"--{key}", str(values[key])]
    result = CliRunner().invoke(app, [*arguments, "--max-num-seqs", "2"])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["results"]
    assert found["counts"]["fused"] == MODELS[row.model].fused
    ignored = MODELS[row.model].experts and MODELS[row.model].experts.ignored
    told = {"a linear layer that the checkpoint leaves unquantized"} if ignored else set()
    assert {warning["message"] for warning in found["warnings"]} == told
    assert found["capacity"]["remains"] is None or found["capacity"]["remains"] > 0
