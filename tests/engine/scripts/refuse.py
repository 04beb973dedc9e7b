"""Tries to start `vllm.LLM` on each of many bad checkpoints; writes what each one raised."""

import json
import multiprocessing
import sys
from pathlib import Path

from vllm import LLM


def main(request_file: str, answer_file: str) -> None:
    answers = {}
    for name, model in json.loads(Path(request_file).read_text()).items():
        try:
            LLM(model, quantization="fusedq", max_model_len=64, skip_tokenizer_init=True)
        except Exception as error:
            answers[name] = {
                "type": type(error).__name__,
                "message": str(error),
                "children": len(multiprocessing.active_children()),
            }
        else:
            answers[name] = None
    Path(answer_file).write_text(json.dumps(answers))


# vLLM spawns worker processes that import this file again.
if __name__ == "__main__":
    main(*sys.argv[1:])
