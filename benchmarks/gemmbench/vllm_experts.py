"""vLLM's own weight-only kernels for experts, on weights packed as its oracle packs them."""

from dataclasses import dataclass

import torch

from fusedq_kernels.types import WeightType
from gemmbench.contender import Unavailable, package_version
from gemmbench.expert_contenders import PreparedExperts
from gemmbench.expert_layers import RandomExperts, rows_of
from gemmbench.vllm_linear import pack_words

_MARLIN_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class MarlinExperts:
    """`fused_marlin_moe`: stock vLLM's first choice for int4 experts on NVIDIA GPUs."""

    name: str = "marlin-moe"

    def version(self) -> str:
        return package_version("vllm")

    def prepare(self, layer: RandomExperts, act_dtype: torch.dtype) -> PreparedExperts:
        shape, spec = layer.shape, layer.spec
        _need_gpu(layer)
        if spec.weight_type is not WeightType.UINT4B8:
            raise Unavailable(f"compared for uint4b8 only, got {spec.weight_type.value}")
        if spec.group_size not in _MARLIN_GROUPS or shape.inner % spec.group_size:
            found = f"{shape.inner} inner features in groups of {spec.group_size}"
            raise Unavailable(f"Marlin needs whole groups of 32, 64 or 128, got {found}")
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
        from vllm.model_executor.layers.quantization.utils import marlin_utils
        from vllm.scalar_type import scalar_types

        def marlin(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            n, k = codes.shape
            words = pack_words(codes, 4).t().contiguous()
            rows = scales.t().contiguous().to(act_dtype)[None]
            scales = marlin_utils.marlin_moe_permute_scales(rows, k, n, spec.group_size)
            return ops.gptq_marlin_moe_repack(words[None], k, n, 4)[0], scales[0]

        ups, downs = [], []
        for number in range(shape.count):
            gate, up, down = layer.expert(number)
            ups.append(marlin(rows_of(gate, up, "codes"), rows_of(gate, up, "scales")))
            downs.append(marlin(down.codes, down.scales))
        (w1, s1), (w2, s2) = (map(torch.stack, zip(*side, strict=True)) for side in (ups, downs))
        workspace = marlin_utils.marlin_make_workspace_new(layer.device, 4)
        places = layer.expert_map

        def run(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return fused_marlin_moe(
                *(x, w1, w2, None, None, s1, s2, weights, ids, scalar_types.uint4b8.id),
                global_num_experts=shape.all_experts,
                expert_map=places,
                workspace=workspace,
            )

        return PreparedExperts(run, lambda m: "fused_marlin_moe")


@dataclass(frozen=True)
class TritonExperts:
    """`fused_experts` with int4 weights: vLLM's own choice between moe_wna16.cu and Triton."""

    name: str = "moe-wna16"

    def version(self) -> str:
        return package_version("vllm")

    def prepare(self, layer: RandomExperts, act_dtype: torch.dtype) -> PreparedExperts:
        shape, spec = layer.shape, layer.spec
        _need_gpu(layer)
        if spec.weight_type is not WeightType.UINT4B8:
            raise Unavailable(f"compared for uint4b8 only, got {spec.weight_type.value}")
        if shape.inner % spec.group_size:
            raise Unavailable(f"{shape.inner} inner features cut groups of {spec.group_size}")
        from vllm.model_executor.layers.fused_moe.config import int4_w4a16_moe_quant_config
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        ups, downs = [], []
        for number in range(shape.count):
            gate, up, down = layer.expert(number)
            codes = rows_of(gate, up, "codes")
            ups.append((_bytes(codes), rows_of(gate, up, "scales").to(act_dtype)))
            downs.append((_bytes(down.codes), down.scales.to(act_dtype)))
        (w1, s1), (w2, s2) = (map(torch.stack, zip(*side, strict=True)) for side in (ups, downs))
        config = int4_w4a16_moe_quant_config(s1, s2, block_shape=[0, spec.group_size])
        places = layer.expert_map

        def run(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return fused_experts(
                *(x, w1, w2, weights, ids),
                global_num_experts=shape.all_experts,
                expert_map=places,
                quant_config=config,
            )

        return PreparedExperts(run, lambda m: "fused_experts")


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    """Codes `[N, K]` as uint8 `[N, K / 2]`, the first of two in the lower bits."""
    return pack_words(codes, 4).view(torch.uint8)


def _need_gpu(layer: RandomExperts) -> None:
    if layer.device.type != "cuda":
        raise Unavailable("vLLM's kernels for int4 experts need a CUDA device")


VLLM_EXPERTS = (MarlinExperts(), TritonExperts())
