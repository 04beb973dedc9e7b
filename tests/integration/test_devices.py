"""What planning is told of the device that vLLM runs on."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.platforms.interface import UnspecifiedPlatform

from checkpoints import write_checkpoint
from fusedq_kernels.choose.device import device_by_name
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import PreflightError
from vllm_fusedq.integration import devices
from vllm_fusedq.integration.config import FusedQConfig
from vllm_fusedq.integration.verify import verify
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model


def platform(monkeypatch: pytest.MonkeyPatch, name: str, major: int, minor: int) -> None:
    """A vLLM built for another platform than the one here, with a GPU."""
    there = SimpleNamespace(
        device_name=name,
        is_cpu=lambda: False,
        is_unspecified=lambda: False,
        is_cuda=lambda: name == "cuda",
        is_rocm=lambda: name == "rocm",
        get_device_capability=lambda: SimpleNamespace(major=major, minor=minor),
    )
    monkeypatch.setattr(devices, "current_platform", there)


def test_a_known_architecture_has_the_size_of_its_first_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    platform(monkeypatch, "cuda", 9, 0)
    assert devices.announced_device() == device_by_name("sm_90")


@pytest.mark.parametrize(("major", "minor"), [(7, 5), (8, 7), (10, 3), (12, 1)])
def test_an_architecture_without_a_known_device_is_announced_all_the_same(
    monkeypatch: pytest.MonkeyPatch, major: int, minor: int
) -> None:
    platform(monkeypatch, "cuda", major, minor)
    found = devices.announced_device()
    assert (found.name, found.kind) == (f"sm_{major}{minor}", "cuda")
    assert found.capability == (major, minor)


def test_a_gpu_of_another_maker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    platform(monkeypatch, "xpu", 0, 0)
    expected = "found a vLLM for xpu; supported: NVIDIA GPUs of compute capability 8.0 and newer"
    with pytest.raises(PreflightError, match=expected):
        devices.announced_device()


def test_the_workers_see_which_gpu_of_amd_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before, what does not depend on it is refused; vLLM for ROCm does not tell its settings."""
    platform(monkeypatch, "rocm", 9, 4)
    announced = devices.announced_device()
    assert announced.kind == "hip"
    write_checkpoint(tmp_path, "gptq-sym")
    FusedQConfig().maybe_update_config(str(tmp_path))
    with pytest.raises(PreflightError, match="never run; supported: NVIDIA GPUs"):
        plan_model(read_checkpoint(tmp_path), Target(announced, torch.bfloat16))


def test_a_vllm_that_finds_no_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's CUDA build does where no driver answers; `fusedq verify` asks before the engine."""
    monkeypatch.setattr(devices, "current_platform", UnspecifiedPlatform())
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, "1")
    expected = "found no device that this build of vLLM runs on; supported: NVIDIA GPUs .* and CPUs"
    with pytest.raises(PreflightError, match=expected):
        verify("nowhere", "bfloat16", {}, 256)
