"""Offline batch inference with vLLM's Python API on a quantized checkpoint, fused."""

import sys

from vllm import LLM, SamplingParams

PROMPTS = ["import os\n\ndef ", "class Error(Exception):\n    ", "for i in range("]


def main(model: str) -> None:
    llm = LLM(model, quantization="fusedq", max_model_len=256, enforce_eager=True)
    sampling = SamplingParams(temperature=0, max_tokens=24)
    for output in llm.generate(PROMPTS, sampling, use_tqdm=False):
        print(repr(output.prompt), "->", repr(output.outputs[0].text))


# vLLM spawns worker processes that import this file again.
if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "tests/assets/tiny-llama-awq-g128")
