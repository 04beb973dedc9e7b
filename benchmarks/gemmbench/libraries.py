"""Kernel libraries of their own: GemLite and bitsandbytes, each given the codes of our weight."""

from dataclasses import dataclass

import torch

from fusedq_kernels.types import LogicalWeight, WeightType
from gemmbench.contender import (
    Prepared,
    Unavailable,
    fused_dram_bytes,
    package_version,
    tensor_bytes,
)

# bitsandbytes divides its fp4 table by 12, our scales are divided instead.
_BNB_SCALE = {WeightType.NF4: 1.0, WeightType.FP4: 12.0}
_BNB_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class GemLite:
    """GemLite's automatic choice among its GEMV, split-K and GEMM kernels."""

    name: str = "gemlite"

    def version(self) -> str:
        found = package_version("gemlite")
        _gemlite()
        return found

    def prepare(self, logical: LogicalWeight, act_dtype: torch.dtype) -> Prepared:
        spec = logical.spec
        if spec.weight_type.codebook is not None:
            raise Unavailable(f"gemlite has no {spec.weight_type.value}")
        gemlite = _gemlite()
        n, k = logical.codes.shape
        dtype = {torch.float16: gemlite.DType.FP16, torch.bfloat16: gemlite.DType.BF16}[act_dtype]
        layer = gemlite.GemLiteLinear(
            W_nbits=spec.weight_type.bits,
            group_size=spec.group_size,
            in_features=k,
            out_features=n,
            input_dtype=dtype,
            output_dtype=dtype,
        )
        zeros = spec.weight_type.bias if logical.zeros is None else logical.zeros.to(act_dtype)
        layer.pack(logical.codes, logical.scales.to(act_dtype), zeros)
        size = tensor_bytes(layer.W_q, layer.scales, layer.zeros)
        return Prepared(layer, size, fused_dram_bytes(size, n, k), lambda m: "its own choice")


def _gemlite():
    try:
        import gemlite
    except Exception as error:  # It asks the GPU driver while it is imported.
        raise Unavailable(f"import gemlite: {type(error).__name__}: {error}") from error
    return gemlite


@dataclass(frozen=True)
class BitsAndBytes:
    """`bitsandbytes.matmul_4bit`, which dequantizes and calls cuBLAS where it thinks it faster."""

    name: str = "bitsandbytes"

    def version(self) -> str:
        return package_version("bitsandbytes")

    def prepare(self, logical: LogicalWeight, act_dtype: torch.dtype) -> Prepared:
        spec = logical.spec
        if spec.weight_type not in _BNB_SCALE:
            raise Unavailable(f"bitsandbytes has no {spec.weight_type.value}")
        n, k = logical.codes.shape
        if spec.group_size not in _BNB_BLOCK_SIZES or k % spec.group_size:
            raise Unavailable(f"bitsandbytes has no blocks of {spec.group_size} in rows of {k}")
        import bitsandbytes
        from bitsandbytes.functional import QuantState, get_4bit_type

        codes = logical.codes.reshape(-1, 2)
        packed = (codes[:, :1] << 4) | codes[:, 1:]
        scale = _BNB_SCALE[spec.weight_type]
        state = QuantState(
            absmax=(logical.scales.float() * scale).reshape(-1).contiguous(),
            shape=torch.Size((n, k)),
            code=get_4bit_type(spec.weight_type.value, device=logical.codes.device),
            blocksize=spec.group_size,
            quant_type=spec.weight_type.value,
            dtype=act_dtype,
        )
        size = tensor_bytes(packed, state.absmax)
        return Prepared(
            lambda x: bitsandbytes.matmul_4bit(x, packed, state),
            size,
            fused_dram_bytes(size, n, k),
            lambda m: _bnb_kernel(logical.codes.device, act_dtype, m, n, k),
        )


def _bnb_kernel(device: torch.device, act_dtype: torch.dtype, m: int, n: int, k: int) -> str:
    """Which of its two ways bitsandbytes takes, as far as it can be asked."""
    if device.type != "cuda":
        return "its own choice"
    from bitsandbytes.backends.cuda import ops

    fused = getattr(ops, "_gemm_4bit_use_custom_cuda", None)
    max_m = getattr(ops, "_gemm_4bit_custom_max_m", None)
    if fused is None or max_m is None:
        return "its own choice"
    runs_fused = m <= max_m and fused(device.index or 0, act_dtype, m, n, k)
    return "fused" if runs_fused else "dequantize, then cuBLAS"


LIBRARIES = (GemLite(), BitsAndBytes())
