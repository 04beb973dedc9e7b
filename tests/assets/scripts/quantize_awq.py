"""Quantizes a model with AutoAWQ (activation-aware scales and clipping, gemm packing)."""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import torch
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer
from transformers import AutoTokenizer

SETTINGS = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}


class CpuAwqQuantizer(AwqQuantizer):
    """AutoAWQ's quantizer, without its damage to weights that already are on the CPU.

    The scale search keeps the original weights as `v.cpu()`, which copies from a GPU but not from
    the CPU. There the search's first in-place multiplication changes the originals too.
    """

    def _compute_best_scale(self, x, w_mean, x_mean, module2inspect, *args, **kwargs):
        handle = module2inspect.register_state_dict_post_hook(clone_values)
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *args, **kwargs)
        finally:
            handle.remove()


def clone_values(module, state_dict, prefix, local_metadata) -> None:
    for name, value in state_dict.items():
        state_dict[name] = value.clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoAWQForCausalLM.from_pretrained(
        str(args.model), torch_dtype=torch.float32, device_map="cpu", safetensors=True
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = common.calibration_windows(tokenizer)
    model.quantize(
        tokenizer,
        quant_config=SETTINGS,
        quantizer_cls=CpuAwqQuantizer,
        calib_data=rows.tolist(),
        max_calib_samples=len(rows),
        max_calib_seq_len=rows.shape[1],
    )
    # The search runs in fp32, which CPUs have kernels for; AWQ checkpoints are fp16.
    model.model.half()
    model.model.config.torch_dtype = torch.float16
    model.save_quantized(str(args.out))
    common.finish_directory(args.model, args.out)


if __name__ == "__main__":
    main()
