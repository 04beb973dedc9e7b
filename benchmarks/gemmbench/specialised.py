"""The kernel of `specialised_kernel.py` beside the others: which weights, how it is launched.

An experiment: no plan names it. On a CPU it compiles (`compiled`), and the tests run it by an
emulation of its barriers and copies; whether a GPU computes the same has to be seen there first.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusedq_kernels.audit.compile import TRITON_NAMES, audited_groups
from fusedq_kernels.choose.waves import group_tiles
from fusedq_kernels.cuda.ptx import integer_ptx
from fusedq_kernels.dtype import DType
from fusedq_kernels.encodings import STORED, Codes
from fusedq_kernels.geometry import BLOCK_K, GroupGeometry, group_geometry
from fusedq_kernels.types import Layout, LogicalWeight, PackedWeight, QuantSpec, WeightType
from gemmbench import specialised_kernel as kernels
from gemmbench.contender import Prepared, Unavailable, fused_dram_bytes
from gemmbench.weights import packed_bytes, packed_for_gpu

HOPPER = (9, 0)
_PAIRS = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}
_OPTIONS = {"num_warps": 4, "maxnreg": kernels.LAUNCH_REGISTERS}


@dataclass(frozen=True)
class Sizes:
    """Tokens of a tile, stages of both rings, tokens of y that one copy stores."""

    block_m: int
    x_stages: int
    words_stages: int = 4
    y_tokens: int = 128


# Of 227 KB: x 160 or 128, words 32, y 32.
WIDE, NARROW = Sizes(256, 5), Sizes(128, 8)


def half_ptx(codes: Codes, dtype: torch.dtype, half: int) -> str:
    """PTX of planes `2 half` and `2 half + 1` of a P4 word `$2`, scaled, in `$0` and `$1`.

    The upper 16 bits of `$3` are the scale, in `dtype`; the low byte is a stored zero point.
    """
    registers, *statements = integer_ptx(codes, dtype).strip("{} ;").split("; ")
    wanted, kept = {f"${2 * half}", f"${2 * half + 1}"}, []
    for statement in reversed(statements):
        _, target, *operands = statement.replace(",", "").split()
        if target in wanted:
            kept.insert(0, statement)
            wanted.update(operands)
    names = {"$0": "first", "$1": "second", "$2": "first", "$3": "second", "$4": "$2", "$5": "$3"}
    decode = re.sub(r"\$\d", lambda found: names[found[0]], "; ".join(kept))
    scaled = (
        f"mul.rn.{_PAIRS[dtype]} ${i}, {name}, pair" for i, name in enumerate(("first", "second"))
    )
    pair = "prmt.b32 pair, $3, 0, 0x3232"
    return f"{{ {registers}, first, second, pair; {decode}; {pair}; {'; '.join(scaled)}; }}"


def constants(
    spec: QuantSpec, groups: GroupGeometry, sizes: Sizes, act_dtype: torch.dtype, has_bias: bool
) -> dict[str, object]:
    """The constexpr arguments of `specialised_kernel`."""
    low, high = (half_ptx(spec.weight_type.encoding, act_dtype, half) for half in range(2))
    return {
        "GROUP": group_tiles(sizes.block_m),
        "X_STAGES": sizes.x_stages,
        "WORDS_STAGES": sizes.words_stages,
        "STEPS_PER_GROUP": spec.group_size // BLOCK_K if groups.num_groups > 1 else 0,
        "PAIRED": spec.weight_type.encoding.zero is not STORED,
        "DECODE_LOW": low,
        "DECODE_HIGH": high,
        "HAS_BIAS": has_bias,
        "CONSUMER": kernels.CONSUMER_REGISTERS,
        "PRODUCER": kernels.PRODUCER_REGISTERS,
    }


def blocks(
    sizes: Sizes, act_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, list[int], object]]:
    """Dtype, block shape and layout in shared memory of what each descriptor fetches or stores."""
    rows = gl.NVMMASharedLayout(128, 16, 2)
    return {
        "x_desc": (act_dtype, [sizes.block_m, kernels.STEP_K], rows),
        "words_desc": (torch.int32, [kernels.BLOCK_N, 16], gl.NVMMASharedLayout(64, 32, 2)),
        "y_desc": (act_dtype, [sizes.y_tokens, kernels.BLOCK_N // 2], rows),
    }


def unsupported(spec: QuantSpec, k: int, phase: int, act_dtype: torch.dtype) -> str:
    """Why it does not multiply by such weights; empty where it does."""
    if spec.weight_type not in (WeightType.UINT4, WeightType.UINT4B8):
        return f"no {spec.weight_type.value}"
    groups = group_geometry(k, spec.group_size, phase)
    if groups.step != BLOCK_K or groups.pad:
        return f"groups of {spec.group_size} from phase {phase} on begin inside a block"
    if spec.scale_dtype is not DType.of(act_dtype):
        return f"scales in {spec.scale_dtype} beside activations in {DType.of(act_dtype)}"
    return ""


def prepare(packed: PackedWeight, sizes: Sizes) -> Callable[..., torch.Tensor]:
    """`run(x, bias)` on the current device for a weight that is not `unsupported`."""
    spec, n = packed.spec, packed.n
    groups = group_geometry(packed.k, spec.group_size, packed.phase)
    num_blocks, n_padded, width = packed.qweight.shape
    words = packed.qweight.view(num_blocks * n_padded, width)
    programs = torch.cuda.get_device_properties(words.device).multi_processor_count

    def run(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = x.new_empty((x.shape[0], n))
        described = {
            name: TensorDescriptor.from_tensor(tensor, block, layout)
            for tensor, (name, (_, block, layout)) in zip(
                (x, words, y), blocks(sizes, x.dtype).items(), strict=True
            )
        }
        tiles_m, tiles_n = triton.cdiv(x.shape[0], sizes.block_m), n_padded // kernels.BLOCK_N
        kernels.specialised_kernel[(min(programs, tiles_m * tiles_n),)](
            **described,
            scales_ptr=packed.scales,
            bias_ptr=bias,
            N=n,
            n_padded=n_padded,
            first_step=groups.first_step,
            num_blocks=num_blocks,
            tiles_m=tiles_m,
            tiles_n=tiles_n,
            **constants(spec, groups, sizes, x.dtype, bias is not None),
            **_OPTIONS,
        )
        return y

    return run


def compiled(
    spec: QuantSpec, sizes: Sizes, act_dtype: torch.dtype, has_bias: bool
) -> triton.compiler.CompiledKernel:
    """For sm_90, as `prepare` launches it; groups of `AUDIT_K` or more are one per channel."""
    kernel, groups = kernels.specialised_kernel, audited_groups(spec)
    own = constants(spec, groups, sizes, act_dtype, has_bias)
    act = TRITON_NAMES[act_dtype]
    types = {"scales_ptr": "*i32", "bias_ptr": f"*{act}"}
    for name, (dtype, block, layout) in blocks(sizes, act_dtype).items():
        types[name] = f"tensordesc<{TRITON_NAMES.get(dtype, 'i32')}{block},{layout!r}>"
    if not has_bias:
        own["bias_ptr"] = None
    signature = {
        name: "constexpr" if name in own else types.get(name, "i32") for name in kernel.arg_names
    }
    aligned = {
        (each.num,): [["tt.divisibility", 16]]
        for each in kernel.params
        if each.name in ("scales_ptr", "n_padded")
    }
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=own, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(_OPTIONS))


@dataclass(frozen=True)
class WarpSpecialised:
    """A contender for prefill on Hopper."""

    name: str
    sizes: Sizes

    def version(self) -> str:
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER:
            raise Unavailable("written for GPUs of compute capability 9.0")
        return f"triton {triton.__version__}"

    def prepare(self, logical: LogicalWeight, act_dtype: torch.dtype) -> Prepared:
        packed = packed_for_gpu(logical, act_dtype)
        reason = unsupported(packed.spec, packed.k, packed.phase, act_dtype)
        if reason or packed.layout is not Layout.P4:
            raise Unavailable(reason)
        run, size = prepare(packed, self.sizes), packed_bytes(packed)
        detail = f"{self.sizes.block_m}x{kernels.BLOCK_N} stages {self.sizes.x_stages}"
        dram = fused_dram_bytes(size, packed.n, packed.k)
        return Prepared(run, size, dram, lambda m: detail, with_bias=run)


SPECIALISED = (
    WarpSpecialised("warp-specialised 256x128", WIDE),
    WarpSpecialised("warp-specialised 128x128", NARROW),
)
