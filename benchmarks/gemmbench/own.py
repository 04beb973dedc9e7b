"""Our kernel, and the same work unfused: cuBLAS in 16 bit, dequantize first and then multiply."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
import triton

import fusedq_kernels
from fusedq_kernels import reference
from fusedq_kernels.choose import device as devices
from fusedq_kernels.choose.heuristics import select
from fusedq_kernels.choose.slices import slice_rows
from fusedq_kernels.cuda.sliced import dequantize
from fusedq_kernels.dtype import DType
from fusedq_kernels.types import DeviceSpec, GemmShape, LogicalWeight, Policy
from gemmbench.contender import Prepared, fused_dram_bytes, tensor_bytes
from gemmbench.triton_kernels import tiled_gemm
from gemmbench.weights import packed_bytes, packed_for_gpu

_KERNEL = "triton-gemm"


def device_spec(device: torch.device) -> DeviceSpec:
    """The device behind the measurements; a CPU runs Triton's interpreter as if it were an H200."""
    if device.type == "cpu":
        return devices.device_by_name("h200")
    return devices.current_device(device)


@dataclass(frozen=True)
class Fused:
    """`torch.ops.fusedq.matmul` as a model calls it, in batch-invariant mode, or always sliced."""

    name: str = "fusedq"
    batch_invariant: bool = False
    kernel: str = _KERNEL

    def version(self) -> str:
        return f"triton {triton.__version__}"

    def prepare(self, logical: LogicalWeight, act_dtype: torch.dtype) -> Prepared:
        packed = packed_for_gpu(logical, act_dtype)
        n, k = logical.codes.shape
        size = packed_bytes(packed)
        device = device_spec(logical.codes.device)

        policy = Policy(batch_invariant=self.batch_invariant)

        def source(m: int) -> str:
            if self.kernel != _KERNEL:
                return f"{slice_rows(n, k)} outputs per slice"
            return select(GemmShape(m, n, k), logical.spec, device, policy).source

        def run(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return fusedq_kernels.matmul(x, packed, bias, self.kernel, policy)

        return Prepared(run, size, fused_dram_bytes(size, n, k), source, with_bias=run)


@dataclass(frozen=True)
class Cublas:
    """`x @ w.T` with the weight already in 16 bit: no quantization at all."""

    name: str = "cublas"

    def version(self) -> str:
        cuda = torch.version.cuda
        return f"torch {torch.__version__}" + (f", CUDA {cuda}" if cuda else "")

    def prepare(self, logical: LogicalWeight, act_dtype: torch.dtype) -> Prepared:
        w = reference.dequantize(logical, act_dtype).to(act_dtype)
        size, (n, k) = tensor_bytes(w), w.shape
        return Prepared(
            lambda x: torch.mm(x, w.t()),
            size,
            fused_dram_bytes(size, n, k),
            lambda m: DType.of(act_dtype).value,
        )


@dataclass(frozen=True)
class Unfused:
    """A kernel that writes the dequantized weight to memory, then `multiply` on what it wrote."""

    name: str
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def version(self) -> str:
        return f"triton {version('triton')}, torch {torch.__version__}"

    def prepare(self, logical: LogicalWeight, act_dtype: torch.dtype) -> Prepared:
        packed = packed_for_gpu(logical, act_dtype)
        n, k = logical.codes.shape
        buffer = torch.empty((n, k), dtype=act_dtype, device=logical.codes.device)
        size = packed_bytes(packed)
        fused = fused_dram_bytes(size, n, k)
        return Prepared(
            lambda x: self.multiply(x, dequantize(packed, buffer)),
            size,
            # The 16-bit weight is written once and read once more.
            lambda m: fused(m) + 2 * tensor_bytes(buffer),
            lambda m: f"dequantizes {tensor_bytes(buffer) / 1e6:.0f} MB per call",
        )


OWN = (
    Fused(),
    Fused("fusedq-invariant", batch_invariant=True),
    Fused("fusedq-sliced", kernel="sliced-cublas"),
    Cublas(),
    Unfused("dequant+cublas", lambda x, w: torch.mm(x, w.t())),
    Unfused("dequant+tiled", tiled_gemm),
)
