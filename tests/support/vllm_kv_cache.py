"""vLLM's own sizes of the KV cache: its models built from config.json without weights, its specs.

    python vllm_kv_cache.py < [{"name": ..., "config": {...}, "tp": 8, "kv_cache_dtype": "auto",
                                "device": "gpu", "length": 32768}, ...]

prints what a sequence takes, in bytes, for each. vLLM's CPU backend builds the layers; for "gpu" it
takes a GPU's block size, scheduling and dtype of recurrent states.
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as moe
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.core import kv_cache_utils
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

BATCHED_TOKENS = 8192
# FlashAttention's
GPU_BLOCK = 16
_IMAGES = "transformers.models.qwen2_vl.image_processing_qwen2_vl"
_GROUPS = ("_TP", "_PP", "_EP", "_DP", "_DCP", "_PCP", "_WORLD")


def sequence_bytes(ask: dict[str, Any], folder: Path) -> dict[str, int]:
    """Bytes of one sequence on a rank, and of one that is as long again."""
    with _ranks(ask["tp"]):
        config = _engine_config(ask, folder)
        with set_current_vllm_config(config), torch.device("meta"):
            initialize_model(config)
        current_platform.update_block_size_for_backend(config)
        groups = kv_cache_utils.get_kv_cache_groups(config, get_kv_cache_spec(config))
        found = {}
        for name, length in (("once", ask["length"]), ("twice", 2 * ask["length"])):
            config.model_config.max_model_len = length
            found[name] = kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)
        return found


def _engine_config(ask: dict[str, Any], folder: Path) -> VllmConfig:
    (folder / "config.json").write_text(json.dumps(ask["config"]))
    on_gpu = ask["device"] == "gpu"
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=ask["length"],
        max_num_batched_tokens=BATCHED_TOKENS,
        kv_cache_dtype=ask["kv_cache_dtype"],
        block_size=GPU_BLOCK if on_gpu else None,
        enforce_eager=True,
    ).create_engine_config()
    config.scheduler_config.async_scheduling = on_gpu
    config.parallel_config.tensor_parallel_size = ask["tp"]
    config.cache_config.kv_cache_layout = "LBNHC"
    return config


def _ranks(size: int) -> Any:
    """The first of `size` tensor-parallel ranks, without the others."""

    def group(members: int) -> SimpleNamespace:
        inner = SimpleNamespace(size=lambda: members, rank=lambda: 0)
        places = dict.fromkeys(("rank", "rank_in_group", "local_rank"), 0)
        ends = {"is_first_rank": True, "is_last_rank": True}
        return SimpleNamespace(
            world_size=members, device_group=inner, cpu_group=inner, **places, **ends
        )

    members = {name: size if name in ("_TP", "_EP", "_WORLD") else 1 for name in _GROUPS}
    return patch.multiple(parallel_state, **{name: group(n) for name, n in members.items()})


def main() -> None:
    # Inspecting a model's class needs no process of its own here
    registry._run_in_subprocess = lambda inspect: inspect()
    # Qwen3.5's code imports that of its images, which asks for torchvision
    sys.modules[_IMAGES] = MagicMock()
    # Which kernel would run experts changes no cache
    moe.select_unquantized_moe_backend = lambda *args, **kwargs: (None, None)
    answers = []
    plain = CPUAttentionBackend.get_supported_kernel_block_sizes
    with tempfile.TemporaryDirectory() as folder:
        for ask in json.load(sys.stdin):
            on_gpu = ask["device"] == "gpu"
            blocks = staticmethod(lambda spec=None: [MultipleOf(GPU_BLOCK)])
            CPUAttentionBackend.get_supported_kernel_block_sizes = blocks if on_gpu else plain
            torch.cpu._is_avx512_bf16_supported = lambda on_gpu=on_gpu: not on_gpu
            answers.append(sequence_bytes(ask, Path(folder)))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
