"""The table of known devices, and how a live one is described."""

from types import SimpleNamespace

import pytest
import torch

from fusedq_kernels.choose import device
from fusedq_kernels.native.isa import this_isa
from fusedq_kernels.types import DeviceSpec


def test_table_is_keyed_by_name():
    assert set(device.KNOWN_DEVICES) == {
        *("a100", "a10", "l4", "l40s", "rtx3090", "rtx4090"),
        *("h100", "h200", "b200", "rtx5090"),
    }
    for name, spec in device.KNOWN_DEVICES.items():
        assert device.device_by_name(name) is spec
        assert spec.name == name
        assert spec.kind == "cuda"
        assert spec.num_sms > 0


def test_architecture_stands_for_its_first_known_device():
    assert device.device_by_name("sm_90") == DeviceSpec("sm_90", "cuda", (9, 0), 132, 232448)
    assert device.device_by_name("sm_120") == DeviceSpec("sm_120", "cuda", (12, 0), 170, 101376)


@pytest.mark.parametrize("name", ["h300", "sm_70", "", "H200"])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown device .*; known devices: a100, .* sm_120$"):
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
        ("NVIDIA A10G", "a10", {"multi_processor_count": 80}, "a10g"),
        ("NVIDIA GeForce RTX 4090", "rtx4090", {}, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx4090", {"multi_processor_count": 76}, None),
        ("NVIDIA B200", "b200", {}, "b200"),
    ],
)
def test_live_gpu_is_recognised(monkeypatch, driver_name, known, changes, name):
    spec = device.KNOWN_DEVICES[known]
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


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        device.current_device(torch.device("meta"))
