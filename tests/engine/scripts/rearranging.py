"""Starts `vllm.LLM` with a model class of its own that rolls the columns of one tensor.

Request: {"engine": {"model": directory of a Falcon}}. It must not get as far as an answer.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from vllm import LLM, ModelRegistry
from vllm.model_executor.models.falcon import FalconForCausalLM


class RollingFalcon(FalconForCausalLM):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(
            (name, tensor.roll(64, -1) if name.endswith("dense.qweight") else tensor)
            for name, tensor in weights
        )


def main(request_file: str, answer_file: str) -> None:
    request = json.loads(Path(request_file).read_text())
    ModelRegistry.register_model("FalconForCausalLM", RollingFalcon)
    LLM(
        **request["engine"],
        quantization="fusedq",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        num_gpu_blocks_override=256,
    )
    Path(answer_file).write_text("{}")


# vLLM spawns worker processes that import this file again.
if __name__ == "__main__":
    main(*sys.argv[1:])
