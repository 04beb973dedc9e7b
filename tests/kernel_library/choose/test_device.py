"""The table of known devices, and how a live one is described."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fusedq_kernels.choose import device
from fusedq_kernels.choose.boards import BOARDS
from fusedq_kernels.native.isa import this_isa
from fusedq_kernels.types import DeviceSpec

# Off the vendors' sheets, and of one SM off the architectures' whitepapers.
CUDA_CORES = {
    **{"v100": 5120, "t4": 2560, "a100": 6912, "a10": 9216, "a40": 10752, "a6000": 10752},
    **{"rtx3090": 10496, "jetson-orin": 2048, "l40s": 18176, "l4": 7424, "rtx4090": 16384},
    **{"rtx6000-ada": 18176, "h100": 16896, "h200": 16896, "h800": 16896, "gh200": 16896},
    **{"rtx5090": 21760, "rtxpro6000": 24064, "dgx-spark": 6144, "jetson-thor": 2560},
}
HALF_AN_SM = {(7, 0), (7, 5), (8, 0)}
# Of these the sheets do not say.
LDS_KIB = {"mi300x": 64, "mi355x": 160}
SMS = {
    "mi300x": 304,
    "mi355x": 256,
    "a10g": 80,
    "h20": 78,
    "b200": 148,
    "gb200": 152,
    "b300": 148,
    "gb300": 152,
}
GIGABYTES = {
    **{"v100": 32, "t4": 16, "a100": 80, "a10": 24, "a10g": 24, "a40": 48, "a6000": 48},
    **{"rtx3090": 24, "jetson-orin": 64, "l40s": 48, "l4": 24, "rtx4090": 24, "rtx6000-ada": 48},
    **{"h100": 80, "h200": 141, "h20": 96, "h800": 80, "gh200": 96, "b200": 180, "gb200": 186},
    **{"b300": 270, "gb300": 279, "jetson-thor": 128, "rtx5090": 32, "rtxpro6000": 96},
    **{"dgx-spark": 128, "mi300x": 192, "mi355x": 288},
}


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_is_as_its_sheet_says(name: str) -> None:
    board = BOARDS[name]
    spec = board.device
    assert device.device_by_name(name) == spec
    kind = "hip" if name in LDS_KIB else "cuda"
    assert (spec.name, spec.kind, spec.capability) == (name, kind, board.capability)
    assert kind == "cuda" or spec.smem_per_block == LDS_KIB[name] << 10
    cores = 64 if board.capability in HALF_AN_SM else 128
    assert spec.num_sms == (CUDA_CORES[name] / cores if name in CUDA_CORES else SMS[name])
    # A sheet's gigabytes are GiB of some boards, less what ECC takes, and 10^9 bytes of others.
    assert 0.93 < board.memory_bytes / (GIGABYTES[name] << 30) < 1.01 or (
        0.99 < board.memory_bytes / (GIGABYTES[name] * 10**9) < 1.08
    )
    assert board.source


def test_those_that_run_are_the_known_devices() -> None:
    assert BOARDS.keys() - device.KNOWN_DEVICES.keys() == {"t4", "v100", "mi300x", "mi355x"}
    assert device.MEMORY_BYTES.keys() == BOARDS.keys()


def test_architecture_stands_for_its_first_known_device():
    assert device.device_by_name("sm_90") == DeviceSpec("sm_90", "cuda", (9, 0), 132, 232448)
    assert device.device_by_name("sm_87").num_sms == 16
    assert device.device_by_name("sm_103") == DeviceSpec("sm_103", "cuda", (10, 3), 148, 232448)
    assert device.device_by_name("sm_110") == DeviceSpec("sm_110", "cuda", (11, 0), 20, 232448)
    assert device.device_by_name("sm_121") == DeviceSpec("sm_121", "cuda", (12, 1), 48, 101376)
    assert device.device_by_name("sm_120") == DeviceSpec("sm_120", "cuda", (12, 0), 170, 101376)


@pytest.mark.parametrize("name", ["h300", "sm_70", "", "H200"])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown device .*; known devices: a100, .* sm_121$"):
        device.device_by_name(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_found_without_one() -> None:
    assert device.current_gpu() is None


@pytest.mark.parametrize(("compiled", "isa"), [(True, this_isa().name), (False, "")])
def test_cpu_device(monkeypatch, compiled, isa):
    monkeypatch.setattr(device, "available", lambda _: compiled)
    device.cpu_device.cache_clear()
    expected = DeviceSpec("cpu", "cpu", cpu_isa=isa)
    assert device.cpu_device() == expected
    assert device.current_device(torch.device("cpu")) == expected
    device.cpu_device.cache_clear()


@pytest.mark.parametrize(
    ("driver_name", "known", "changes", "name"),
    [
        ("NVIDIA H200", "h200", {}, "h200"),
        ("NVIDIA H100 80GB HBM3", "h100", {}, "h100"),
        ("NVIDIA H100 PCIe", "h100", {"multi_processor_count": 114}, "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100", {}, "a100"),
        ("NVIDIA A10G", "a10g", {}, "a10g"),
        ("NVIDIA A40", "a40", {}, "a40"),
        ("NVIDIA A40-48Q", "a40", {"multi_processor_count": 42}, "a40-48q"),
        ("NVIDIA RTX A6000", "a6000", {}, "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada", {}, "rtx6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtxpro6000", {}, "rtxpro6000"),
        ("NVIDIA H20", "h20", {}, "h20"),
        ("NVIDIA H800", "h800", {}, "h800"),
        ("NVIDIA GH200 480GB", "gh200", {}, "gh200"),
        ("NVIDIA GB200", "gb200", {}, "gb200"),
        ("NVIDIA GB300", "gb300", {}, "gb300"),
        ("NVIDIA B300 SXM6 AC", "b300", {}, "b300"),
        ("NVIDIA GB10", "dgx-spark", {}, "dgx-spark"),
        ("NVIDIA Thor", "jetson-thor", {}, "jetson-thor"),
        ("Orin (nvgpu)", "jetson-orin", {}, "jetson-orin"),
        ("Tesla T4", "t4", {}, "t4"),
        ("Tesla V100-SXM2-32GB", "v100", {}, "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090", {}, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx4090", {"multi_processor_count": 76}, None),
        ("NVIDIA B200", "b200", {}, "b200"),
    ],
)
def test_live_gpu_is_recognised(monkeypatch, driver_name, known, changes, name):
    spec = device.device_by_name(known)
    properties = {
        "name": driver_name,
        "major": spec.capability[0],
        "minor": spec.capability[1],
        "multi_processor_count": spec.num_sms,
        "shared_memory_per_block_optin": spec.smem_per_block,
    }
    properties |= changes
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties)
    )
    found = device.current_device(torch.device("cuda", 0))
    assert found.name == (name or "rtx4090-laptop-gpu")
    assert found.num_sms == properties["multi_processor_count"]
    assert (found.capability, found.smem_per_block) == (spec.capability, spec.smem_per_block)
    assert found.kind == "cuda"
    assert found.cpu_isa == ""


@pytest.mark.parametrize("feature", ["", ":sramecc+:xnack-"])
def test_an_amd_gpu_goes_by_its_architecture(monkeypatch, feature):
    properties = SimpleNamespace(gcnArchName="gfx942" + feature, multi_processor_count=304)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = device.current_device(torch.device("cuda", 0))
    assert found == replace(BOARDS["mi300x"].device, name="gfx942")


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        device.current_device(torch.device("meta"))
