"""Quantizes a small random model with GPTQModel in the format gptq_v2, each layer otherwise.

Writes its stored tensors and, as metadata, its quantization config and the SHA-256 of each weight,
fp32 `[N, K]`, by GPTQModel's own dequantization.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

# Read at import: on two cores the default is one worker, fewer than the loader asks for.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")

import common
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from make_reference import decode_gptq, digest
from safetensors.torch import load_file, save_file

# What the committed checkpoints lack; a scheme per linear layer of two decoder blocks
SCHEMES = {
    "0.self_attn.q_proj": {"bits": 2, "group_size": 32, "sym": True},
    "0.self_attn.k_proj": {"bits": 2, "group_size": 32, "sym": False},
    "0.self_attn.v_proj": {"bits": 3, "group_size": 32, "sym": False},
    "0.self_attn.o_proj": {"bits": 4, "group_size": -1, "sym": False},
    "0.mlp.gate_proj": {"bits": 8, "group_size": 32, "sym": False},
    "0.mlp.up_proj": {"bits": 8, "group_size": -1, "sym": True},
    "0.mlp.down_proj": {"bits": 4, "group_size": 16, "sym": True},
    "1.self_attn.q_proj": {"bits": 2, "group_size": 32, "sym": False, "desc_act": True},
    "1.self_attn.k_proj": {"bits": 3, "group_size": 32, "sym": True, "desc_act": True},
    "1.self_attn.v_proj": {"bits": 3, "group_size": 32, "sym": False, "desc_act": True},
    "1.self_attn.o_proj": {"bits": 8, "group_size": 32, "sym": False, "desc_act": True},
    "1.mlp.gate_proj": {"bits": 8, "group_size": 32, "sym": True, "desc_act": True},
    "1.mlp.up_proj": {"bits": 4, "group_size": 32, "sym": False, "desc_act": True},
}
EXCLUDED = "1.mlp.down_proj"


def quantize(folder: Path) -> None:
    common.save_random_llama(folder / "plain", layers=2)
    dynamic = {rf"+:.*\.layers\.{re.escape(name)}": dict(each) for name, each in SCHEMES.items()}
    dynamic[rf"-:.*\.layers\.{re.escape(EXCLUDED)}"] = {}
    config = QuantizeConfig(
        bits=4,
        group_size=32,
        desc_act=False,
        act_group_aware=False,
        device="cpu",
        format="gptq_v2",
        dynamic=dynamic,
    )
    model = GPTQModel.load(str(folder / "plain"), config, dtype=torch.float16)
    rows = torch.randint(2, 512, (32, 64))
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    model.quantize(samples, batch_size=8)
    model.save(str(folder / "quantized"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        quantize(Path(folder))
        saved = Path(folder) / "quantized"
        config = json.loads((saved / "config.json").read_text())
        stored = load_file(saved / "model.safetensors")
    settings, tensors, digests = config["quantization_config"], {}, {}
    for name in SCHEMES:
        module = f"model.layers.{name}"
        found = {key: value for key, value in stored.items() if key.startswith(f"{module}.")}
        parts = {key.removeprefix(f"{module}."): value for key, value in found.items()}
        linear = decode_gptq(parts, settings, module)
        linear.check()
        tensors |= found
        digests[module] = digest(linear.weight)
    metadata = {
        "tool": f"gptqmodel {version('gptqmodel')}",
        "quantization_config": json.dumps(settings),
        "values_sha256": json.dumps(digests),
    }
    save_file(tensors, args.out, metadata=metadata)


if __name__ == "__main__":
    main()
