"""`--additional-config '{"fusedq": {...}}'` is validated."""

import pytest

from fusedq_kernels.device import cpu_device, device_by_name
from fusedq_kernels.heuristics import kernels_for
from fusedq_kernels.types import KernelName
from vllm_fusedq.errors import SettingsError
from vllm_fusedq.settings import Settings, parse_settings


def test_default_is_the_rule() -> None:
    assert parse_settings({}) == Settings(kernel="auto")
    assert parse_settings({}).device(cpu_device(fused_op=True)) == cpu_device(fused_op=True)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([], 'additional-config "fusedq": found list; supported: an object'),
        ({"kernels": "auto"}, "unknown key 'kernels'; supported: kernel"),
        ({"kernel": "marlin"}, "kernel 'marlin' does not exist; supported: auto, triton-gemm"),
    ],
)
def test_wrong_settings_are_refused(section: object, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        parse_settings(section)
    assert message in str(error.value)


def test_striped_kernel_can_be_asked_for_on_a_cpu() -> None:
    device = Settings("cpu-striped").device(cpu_device(fused_op=True))
    assert kernels_for(device) == (KernelName.CPU_STRIPED,)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = Settings("triton-gemm").device(cpu_device(fused_op=True))
    assert kernels_for(device) == (KernelName.TRITON_GEMM,)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SettingsError, match="interpreter only; set TRITON_INTERPRET=1"):
        Settings("triton-gemm").device(cpu_device(fused_op=True))


def test_a_gpu_runs_no_cpu_kernel() -> None:
    with pytest.raises(SettingsError, match="'cpu-wna16' does not run on h200; supported there"):
        Settings("cpu-wna16").device(device_by_name("h200"))
