"""A checkpoint's layers, planned and loaded as a worker does it, without vLLM."""

from pathlib import Path

import torch
from safetensors import safe_open

from checkpoints import Truth
from fusedq_kernels.choose.device import cpu_device, device_by_name
from fusedq_kernels.layouts.packing import unpack
from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.layer import LayerPlan, Target
from vllm_fusedq.plan.model import plan_model

DEVICES = ("cpu", "gpu")
TARGETS = {
    "cpu": Target(cpu_device(), torch.float16, keeps_activations=True),
    "cpu-wna16": Target(cpu_device(), torch.float16, "cpu-wna16", keeps_activations=True),
    "gpu": Target(device_by_name("h200"), torch.float16, keeps_activations=True),
}


def plans_of(
    checkpoint: Checkpoint, device: str, tp_size: int = 1, rank: int = 0
) -> tuple[LayerPlan, ...]:
    return plan_model(checkpoint, TARGETS[device], tp_size, ranks=[rank]).layers


def load(plan: LayerPlan, path: Path) -> LayerLoader:
    loader = LayerLoader.create(plan, torch.float16, torch.device("cpu"))
    with safe_open(path / "model.safetensors", "pt") as file:
        # vLLM hands a tensor over once, also where several ranges of its rows make up a shard
        tensors = {
            (part.shard_id, stored.name): f"{part.module}.{stored.name}"
            for part, fmt in zip(plan.shard.parts, plan.formats, strict=True)
            for stored in fmt.tensors
        }
        for (shard_id, suffix), name in tensors.items():
            loader.add(suffix, file.get_tensor(name), shard_id)
    loader.check_complete()
    return loader


def assert_exact(loader: LayerLoader, truths: dict[str, Truth]) -> None:
    """The resident weight unpacks to exactly the rank's rows of the checkpoint's truth."""
    logical = unpack(loader.packed)
    offset = 0
    for part in loader.plan.shard.parts:
        r = part.region
        codes, zeros, scales = truths[part.module].slice(r.n_start, r.n_stop, r.k_start, r.k_stop)
        rows = slice(offset, offset + r.n)
        torch.testing.assert_close(logical.codes[rows], codes, rtol=0, atol=0)
        found = logical.scales[rows].to(scales.dtype)
        torch.testing.assert_close(found.float(), scales.float(), rtol=0, atol=0)
        if logical.row_scales is not None:
            assert (logical.row_scales[rows] == truths[part.module].scale_of_all).all()
        if zeros is not None:
            torch.testing.assert_close(logical.zeros[rows], zeros, rtol=0, atol=0)
        offset += r.n
