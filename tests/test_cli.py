"""`fusedq check` prints the engine's verdict."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from checkpoints import drop, write_checkpoint
from tiny_models import CHECKPOINTS, asset
from vllm_fusedq import __version__
from vllm_fusedq.cli import app


def fusedq(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_version() -> None:
    assert fusedq("version").output.strip() == __version__


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize(("device", "kernel"), [("cpu", "cpu-wna16"), ("h200", "triton-gemm")])
def test_check_names_a_kernel_for_every_layer(name: str, device: str, kernel: str) -> None:
    result = fusedq("check", str(asset(name)), "--device", device, "-tp", "1,2")
    assert result.exit_code == 0, result.output
    assert result.output.count(f"fused: 8 (8 x {kernel})") == 2
    assert result.output.count("fallbacks: 0") == 2
    assert "layers.0-1.mlp.down_proj x2" in result.output


def test_check_refuses_with_every_problem_and_exit_code_1(tmp_path: Path) -> None:
    module = "model.layers.0.mlp"
    write_checkpoint(
        tmp_path, edits=[drop(f"{module}.up_proj.scales"), drop(f"{module}.down_proj.qzeros")]
    )
    result = fusedq("check", str(tmp_path))
    assert result.exit_code == 1
    assert "2 problems" in result.output
    assert f"{module}.up_proj" in result.output
    assert f"{module}.down_proj" in result.output


def test_check_of_one_bad_size_among_good_ones(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, intermediate=96)
    result = fusedq("check", str(tmp_path), "-tp", "1,8")
    assert result.exit_code == 1
    assert "fallbacks: 0" in result.output
    assert "tensor-parallel sizes that work" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "known devices"),
        (("-tp", "two"), "is not a list of numbers"),
        (("-tp", "0"), "start at 1"),
        (("--dtype", "float32"), "choose bfloat16 or float16"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = fusedq("check", str(tmp_path), *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_missing_directory_is_refused() -> None:
    result = fusedq("check", "no/such/model")
    assert result.exit_code == 1
    assert "not a local directory" in result.output
