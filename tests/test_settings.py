"""`--additional-config '{"fusedq": {...}}'` is validated."""

from pathlib import Path

import pytest

from fusedq_kernels.catalogue import kernels_for
from fusedq_kernels.choose.device import cpu_device, device_by_name
from fusedq_kernels.native.isa import this_isa
from vllm_fusedq.errors import SettingsError
from vllm_fusedq.settings import Settings, parse_settings, this_cpu


def test_default_is_the_rule() -> None:
    assert parse_settings({}) == Settings(kernel="auto")
    assert parse_settings({}).planned_device(cpu_device()) == cpu_device()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([], 'additional-config "fusedq": found list; supported: an object'),
        ({"kernels": "auto"}, "unknown key 'kernels'; supported: kernel, prefill, report, check_"),
        ({"kernel": "marlin"}, "kernel 'marlin' does not exist; supported: auto, triton-gemm"),
        ({"kernel": "sliced-cublas"}, "kernel 'sliced-cublas' does not exist; supported: auto, t"),
        ({"prefill": "sliced"}, "prefill is 'sliced'; supported: auto, fused"),
        ({"activations": "int8"}, "activations is 'int8'; supported: auto, 16-bit"),
        ({"device": "cuda:1"}, "device is 'cuda:1'; supported: auto, experimental"),
        (
            {"device": "experimental", "check_kernels": False},
            "check_kernels is false on an experimental device; supported: true",
        ),
        ({"check_kernels": "no"}, "check_kernels is 'no'; supported: true, false"),
        ({"prefill": None}, "prefill is None; supported: auto, fused"),
    ],
)
def test_wrong_settings_are_refused(section: object, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        parse_settings(section)
    assert message in str(error.value)


def test_sliced_prefill_can_be_forbidden() -> None:
    assert parse_settings({}).sliced_prefill
    assert not parse_settings({"prefill": "fused"}).sliced_prefill
    assert not parse_settings({"kernel": "triton-gemm"}).sliced_prefill


def test_an_experimental_device_takes_consent() -> None:
    assert not parse_settings({}).experimental
    assert parse_settings({"device": "experimental"}).experimental


def test_a_report_goes_where_it_can_be_written(tmp_path: Path) -> None:
    report = str(tmp_path / "plan.json")
    assert parse_settings({"report": report}) == Settings(report=report)


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (3, "report is 3; supported: the name of a file"),
        ("", "report is ''; supported: the name of a file"),
        ("/no/such/folder/plan.json", "cannot be written; supported: a file in a directory that"),
        ("/", "report '/' cannot be written"),
    ],
)
def test_wrong_reports_are_refused(report: object, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        parse_settings({"report": report})
    assert message in str(error.value)


def test_striped_kernel_can_be_asked_for_on_a_cpu() -> None:
    assert Settings("cpu-striped").planned_device(cpu_device()) == cpu_device()


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDQ_CPU_ISA", "avx1024")
    for each in (cpu_device, this_isa):
        each.cache_clear()
    with pytest.raises(SettingsError, match="FUSEDQ_CPU_ISA is 'avx1024'; this machine has "):
        this_cpu()


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = Settings("triton-gemm").planned_device(cpu_device())
    assert [each.name for each in kernels_for(device)] == ["triton-gemm"]
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SettingsError, match="interpreter only; set TRITON_INTERPRET=1"):
        Settings("triton-gemm").planned_device(cpu_device())


def test_a_gpu_runs_no_cpu_kernel() -> None:
    with pytest.raises(SettingsError, match="'cpu-wna16' does not run on h200; supported there"):
        Settings("cpu-wna16").planned_device(device_by_name("h200"))
