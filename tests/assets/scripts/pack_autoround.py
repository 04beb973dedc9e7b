"""Quantizes a small random model with AutoRound by one of its packings, each layer otherwise.

Writes its stored tensors and, as metadata, its quantization config and the SHA-256 of each weight,
fp32 `[N, K]`, by the modules that AutoRound itself would run.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# Asymmetric 8 bits have to be asked for
os.environ["AR_ALLOW_W8_ASYM"] = "1"

import common
import torch
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from make_reference import digest
from safetensors.torch import load_file, save_file

# Of one decoder block, 32 x 32 in attention and 32 x 64 in the MLP; what else it has stays as it is
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
SCHEMES = {
    "auto_round": {
        "self_attn.q_proj": {"bits": 2},
        "self_attn.k_proj": {"bits": 3},
        "self_attn.v_proj": {"bits": 5},
        "self_attn.o_proj": {"bits": 4, "group_size": -1},
        "mlp.down_proj": {"bits": 8, "sym": False},
    },
    "auto_round:auto_gptq": {
        "self_attn.q_proj": {"bits": 2},
        "self_attn.k_proj": {"bits": 3, "sym": True},
        "self_attn.v_proj": {"bits": 5},
        "self_attn.o_proj": {"bits": 6, "sym": True},
        "mlp.gate_proj": {"bits": 4, "sym": True, "group_size": 32},
        "mlp.up_proj": {"bits": 4},
        "mlp.down_proj": {"bits": 8, "sym": True},
        "lm_head": {"bits": 7, "sym": True},
    },
    "auto_round:auto_awq": {
        "self_attn.q_proj": {"bits": 4},
        "self_attn.k_proj": {"bits": 5},
        "self_attn.v_proj": {"bits": 6},
        "self_attn.o_proj": {"bits": 7, "sym": True},
    },
}
PLAIN = {"bits": 16}


def full_name(name: str) -> str:
    return f"model.layers.0.{name}" if "." in name else name


def quantize(folder: Path, packing: str) -> None:
    common.save_random_llama(folder / "plain", layers=1, **SIZES)
    options = {full_name(name): scheme for name, scheme in SCHEMES[packing].items()}
    if "lm_head" not in options:
        # A part of a name, which the tool stores as a regex
        options |= dict.fromkeys(("gate_proj", "up_proj"), PLAIN)
    # Rounding to nearest, as `iters` 0 does, stores what tuning would
    tool = AutoRound(
        str(folder / "plain"),
        scheme="W4A16",
        group_size=16,
        sym=False,
        iters=0,
        layer_config=options,
        quant_lm_head="lm_head" in options,
        device_map="cpu",
        disable_opt_rtn=True,
        disable_model_free=True,
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
    )
    tool.quantize_and_save(str(folder / "quantized"), format=packing)


def values(parts: dict[str, torch.Tensor], packing: str, bits: int, size: int) -> torch.Tensor:
    """fp32 `[N, K]`. With fp32 scales the tool computes in fp32."""
    scales = parts["scales"].float()
    n = scales.shape[1]
    if "awq" in packing:
        return dequantize_gemm(parts["qweight"], parts["qzeros"], scales, bits, size).T
    k = parts["qweight"].shape[0] * 32 // bits
    tool = qlinear_torch_zp if "gptq" in packing else qlinear_torch
    module = tool.QuantLinear(bits, size, k, n, bias=False)
    module.qweight, module.qzeros, module.scales = parts["qweight"], parts["qzeros"], scales
    return module(torch.eye(k)).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packing", choices=SCHEMES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        quantize(Path(folder), args.packing)
        (saved,) = (path.parent for path in Path(folder, "quantized").rglob("config.json"))
        config = json.loads((saved / "config.json").read_text())
        stored = load_file(saved / "model.safetensors")
    settings, tensors, digests = config["quantization_config"], {}, {}
    for name, scheme in SCHEMES[args.packing].items():
        module = full_name(name)
        found = {key: value for key, value in stored.items() if key.startswith(f"{module}.")}
        parts = {key.removeprefix(f"{module}."): value for key, value in found.items()}
        size = scheme.get("group_size", settings["group_size"])
        size = SIZES["hidden_size"] if size == -1 else size
        tensors |= found
        # Scales may be negative here, and a sum makes +0 of their -0
        digests[module] = digest(values(parts, args.packing, scheme["bits"], size) + 0.0)
    metadata = {
        "tool": f"auto-round {version('auto-round')}",
        "quantization_config": json.dumps(settings),
        "values_sha256": json.dumps(digests),
    }
    save_file(tensors, args.out, metadata=metadata)


if __name__ == "__main__":
    main()
