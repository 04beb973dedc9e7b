"""Kernels without decoding multiply by the words as they lie in memory, and by nothing else."""

import pytest
import torch

from fusedq_kernels.call import Call
from fusedq_kernels.catalogue import CPU_FUSED, TRITON_GEMM
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.cuda.gemm import kernel_constants
from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import group_geometry
from fusedq_kernels.layouts.packing import pack
from fusedq_kernels.native import build
from fusedq_kernels.types import GemmShape, Launch, PackedWeight, QuantSpec, TileConfig, WeightType
from vllm_fusedq.measure import undecoded
from vllm_fusedq.measure.random_weights import random_weight
from vllm_fusedq.measure.undecoded import ALONE, UNDECODED, without_decoding
from vllm_fusedq.measure.undecoded_triton import decoding, words_as_values

# Two bf16 ones, and as good as one fp32 one
ONES = 0x3F803F80
SPECS = [
    *(
        QuantSpec(WeightType.UINT4B8, 64, DType.BFLOAT16),
        QuantSpec(WeightType.UINT4, 32, DType.FLOAT16),
    ),
    *(
        QuantSpec(WeightType.UINT8, 128, DType.BFLOAT16),
        QuantSpec(WeightType.NF4, 64, DType.FLOAT32),
    ),
    *(QuantSpec(WeightType.FLOAT8_E4M3FN, 128, DType.FLOAT32),),
]


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled in a few seconds, unoptimized, into a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("CXXFLAGS", "-O0")
        build._key.cache_clear()
        undecoded.load()
    build._key.cache_clear()


def weight_of_ones(spec: QuantSpec, dtype: torch.dtype, kernel: str) -> tuple[Call, PackedWeight]:
    logical = random_weight(96, 256, spec, torch.device("cpu"))
    packed = pack(logical, CPU_FUSED.layout(spec.weight_type), dtype)
    packed.qweight.fill_(ONES)
    return Call.of(packed, kernel, dtype), packed


def found_and_expected(
    call: Call, packed: PackedWeight, launch: Launch, tokens: int, spec: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel without decoding gives, and tokens summed by group times the scales."""
    scales = random_weight(96, 256, spec, torch.device("cpu")).scales.float()
    x = undecoded.random_tokens(tokens, 256, call.dtype.torch, torch.device("cpu"))
    sums = x.float().view(tokens, -1, spec.group_size).sum(dim=2)
    alone, bare = without_decoding(call, launch, [packed], tokens)
    assert (alone.name, bare.name) == (ALONE, UNDECODED)
    found = torch.full((tokens, 96), torch.nan, dtype=x.dtype)
    bare.runs[0](torch.empty(0), found)
    return found.float(), sums @ scales.T


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.weight_type.value)
def test_on_a_cpu(
    operator: None,
    monkeypatch: pytest.MonkeyPatch,
    spec: QuantSpec,
    dtype: torch.dtype,
    tokens: int,
) -> None:
    call, packed = weight_of_ones(spec, dtype, CPU_FUSED.name)
    launch = Launch(CPU_FUSED.name, None, "rule")
    found, expected = found_and_expected(call, packed, launch, tokens, spec)
    assert (found - expected).abs().max() <= 0.01 * expected.abs().max()


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.weight_type.value)
def test_in_tritons_interpreter(spec: QuantSpec, tokens: int) -> None:
    call, packed = weight_of_ones(spec, torch.bfloat16, TRITON_GEMM.name)
    launch = TRITON_GEMM.launch(GemmShape(tokens, 96, 256), spec, device_by_name("h200"))
    found, expected = found_and_expected(call, packed, launch, tokens, spec)
    assert (found - expected).abs().max() <= 0.01 * expected.abs().max()


def test_the_kernel_alone_is_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[0]
    monkeypatch.setattr(undecoded, "load", lambda: None)
    packed = pack(
        random_weight(96, 256, spec, torch.device("cpu")),
        CPU_FUSED.layout(spec.weight_type),
        torch.bfloat16,
    )
    call = Call.of(packed, CPU_FUSED.name, torch.bfloat16)
    alone, _ = without_decoding(call, Launch(CPU_FUSED.name, None, "rule"), [packed], 3)
    found = torch.empty(3, 96, dtype=torch.bfloat16)
    alone.runs[0](torch.empty(0), found)
    x = undecoded.random_tokens(3, 256, torch.bfloat16, torch.device("cpu"))
    torch.testing.assert_close(
        found,
        torch.ops.fusedq.matmul(
            x, packed.qweight, packed.scales, packed.zeros, None, None, call.text
        ),
    )


def test_other_kernels_have_none() -> None:
    spec = SPECS[0]
    call, packed = weight_of_ones(spec, torch.bfloat16, "cpu-striped")
    assert without_decoding(call, Launch("cpu-striped", None, "rule"), [packed], 1) == ()


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(WeightType.UINT4B8, 32, DType.BFLOAT16),
        QuantSpec(WeightType.FLOAT4_E2M1F, 16, DType.FLOAT8_E4M3FN, row_scaled=True),
    ],
    ids=lambda spec: spec.weight_type.value,
)
def test_a_kernel_with_a_decoder_of_its_own_form_is_without_decoding_too(spec: QuantSpec) -> None:
    groups = group_geometry(256, spec.group_size, 0)
    tile = TileConfig(16, 128, 1, 4, 4)
    with decoding({spec.weight_type: words_as_values}):
        found = kernel_constants(spec, groups, tile, torch.bfloat16, False)
    assert found["DECODE"] is words_as_values
    # What a form leaves to the scale, is not left to it then
    assert (found["QUARTERS"], found["HEADROOM"]) == (False, 0)
    own = kernel_constants(spec, groups, tile, torch.bfloat16, False)
    assert own["QUARTERS"] or own["HEADROOM"]
