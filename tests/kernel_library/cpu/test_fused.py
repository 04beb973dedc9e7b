"""cpu-fused against float64, for every weight type, group, phase and number of tokens."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedq_kernels import ops
from fusedq_kernels.cpu.fused import bare_call
from fusedq_kernels.layouts.packing import pack
from fusedq_kernels.native.isa import FORCED, ISAS, this_isa
from fusedq_kernels.testing import without_nan
from fusedq_kernels.types import TILED_LAYOUTS, LogicalWeight, PackedWeight, QuantSpec, WeightType

KERNEL = "cpu-fused"
# group, K, phase: whole groups, cut ones, several blocks in one group, steps of 8, 16, 32 and 64.
SPLITS = [
    *((128, 512, 0), (128, 400, 48), (32, 256, 0), (64, 320, 32), (48, 480, 16), (16, 256, 0)),
    *((8, 144, 0), (272, 272, 0), (256, 768, 128), (96, 288, 0), (40, 200, 24)),
]
DTYPES = (torch.bfloat16, torch.float16)
TOKENS = (1, 2, 3, 4, 5, 8, 9, 15, 33, 258)
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def weight_of(
    weight_type: WeightType,
    split: tuple[int, int, int],
    scale_dtype: torch.dtype,
    n: int,
    ordered: bool = False,
) -> LogicalWeight:
    torch.manual_seed(n + split[0])
    group, k, phase = split
    groups = -(-(k + phase) // group)
    codes = torch.randint(0, 1 << weight_type.bits, (n, k), dtype=torch.uint8)
    codes = without_nan(codes, weight_type)
    scales = (torch.rand(n, groups) * 0.01 + 0.001).to(scale_dtype)
    highest = 17 if weight_type.bits == 4 else 256
    zeros = torch.randint(0, highest, (n, groups), dtype=torch.uint8)
    spec = QuantSpec(weight_type, group, scale_dtype)
    return LogicalWeight(
        codes,
        scales,
        zeros if weight_type.has_zero_points else None,
        spec,
        phase,
        torch.randperm(k).int() if ordered else None,
    )


def exact(logical: LogicalWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight in float64, by the definition of its type alone."""
    spec, (_, k) = logical.spec, logical.codes.shape
    group = (torch.arange(k) + logical.phase) // spec.group_size
    if spec.weight_type.codebook is None:
        zero = logical.zeros.double()[:, group] if logical.zeros is not None else None
        values = logical.codes.double() - (spec.weight_type.bias if zero is None else zero)
    else:
        table = torch.tensor(spec.weight_type.codebook, dtype=torch.float64).to(dtype)
        values = table.double()[logical.codes.long()]
    values *= logical.scales.double()[:, group]
    if logical.perm is None:
        return values
    return torch.zeros_like(values).index_copy_(1, logical.perm.long(), values)


def multiply(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    out = torch.full((*x.shape[:-1], packed.n), float("nan"), dtype=x.dtype)
    text = ops.Call.of(packed, KERNEL, x.dtype).text
    weight = (packed.qweight, packed.scales, packed.zeros)
    torch.ops.fusedq.matmul_out(out, x, *weight, bias, packed.perm, text)
    return out


def check(logical: LogicalWeight, packed: PackedWeight, dtype: torch.dtype) -> None:
    """Every number of tokens: within the bound of fp32 sums and a rounding, with equal bits."""
    weight, k = exact(logical, dtype), logical.codes.shape[1]
    x, bias = torch.randn(max(TOKENS), k).to(dtype), torch.randn(packed.n).to(dtype)
    expected = x.double() @ weight.T + bias.double()
    magnitude = x.double().abs() @ weight.abs().T + bias.double().abs()
    # A term is rounded as often as sums follow it: at most 32 in its run, one a run, and the bias.
    sums = (2 * 32 + 2 * k / 8 + 2) * 2.0**-24
    bound = expected.abs() * UNIT[dtype] + magnitude * sums * (1 + UNIT[dtype])
    alone = multiply(x[:1], packed, bias)
    for tokens in TOKENS:
        found = multiply(x[:tokens], packed, bias)
        assert ((found.double() - expected[:tokens]).abs() <= bound[:tokens]).all(), tokens
        assert torch.equal(found[:1], alone), tokens


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("weight_type", WeightType, ids=lambda t: t.value)
def test_against_float64(weight_type: WeightType, split: tuple[int, int, int]) -> None:
    scale_dtypes = [*DTYPES, torch.float32][: 2 if weight_type.has_zero_points else 3]
    for scale_dtype in scale_dtypes:
        for n, ordered in ((40, False), (200, True)):
            logical = weight_of(weight_type, split, scale_dtype, n, ordered)
            packed = pack(logical, TILED_LAYOUTS[weight_type], torch.bfloat16)
            for dtype in DTYPES:
                check(logical, packed, dtype)


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_type", WeightType, ids=lambda t: t.value)
def test_one_hot_tokens_read_the_weight_itself(
    weight_type: WeightType, dtype: torch.dtype, tokens: int
) -> None:
    """One product and zeros: code less zero point, times scale, rounded once."""
    logical = weight_of(weight_type, (32, 160, 16), torch.float16, 128)
    packed = pack(logical, TILED_LAYOUTS[weight_type], dtype)
    one_hot = torch.eye(160, dtype=dtype)
    found = torch.cat([multiply(part, packed, None) for part in one_hot.split(tokens)])
    # fp32 has the product of 8 bits of a code and 11 of a scale
    assert torch.equal(found, exact(logical, dtype).T.float().to(dtype))


@pytest.mark.parametrize("weight_type", [WeightType.UINT4B8, WeightType.UINT4], ids=str)
def test_subnormal_scales_are_exact(weight_type: WeightType) -> None:
    """Of fp16, each of the lowest numbers that it has."""
    logical = weight_of(weight_type, (32, 160, 16), torch.float16, 128)
    units = torch.arange(logical.scales.numel()).view_as(logical.scales) % 1023 + 1
    logical = replace(logical, scales=(units * 2.0**-24).half())
    packed = pack(logical, TILED_LAYOUTS[weight_type], torch.bfloat16)
    found = multiply(torch.eye(160, dtype=torch.bfloat16), packed, None)
    assert torch.equal(found, exact(logical, torch.bfloat16).T.float().bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_8_bit_float_is_exact(dtype: torch.dtype) -> None:
    """Output i holds code i throughout, so that every place of a word sees every code."""
    spec = QuantSpec(WeightType.FLOAT8_E4M3FN, 128, torch.float32)
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 128).contiguous()
    logical = LogicalWeight(codes, torch.ones(256, 1), None, spec)
    packed = pack(logical, TILED_LAYOUTS[spec.weight_type], dtype)
    numbers = codes[:, 0].view(torch.float8_e4m3fn).to(dtype)
    known = numbers.isfinite()
    for tokens in (1, 16):
        parts = torch.eye(128, dtype=dtype).split(tokens)
        found = torch.cat([multiply(part, packed, None) for part in parts])
        assert torch.equal(found[:, known], numbers[known].expand(128, -1))


def test_threads_change_no_bit() -> None:
    logical = weight_of(WeightType.UINT4, (128, 512, 0), torch.bfloat16, 1000)
    packed = pack(logical, TILED_LAYOUTS[WeightType.UINT4], torch.bfloat16)
    threads, results = torch.get_num_threads(), {}
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for tokens in (1, 7, 40, 300):
                torch.manual_seed(tokens)
                x = torch.randn(tokens, 512, dtype=torch.bfloat16)
                results.setdefault(tokens, []).append(multiply(x, packed, None))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], each) for found in results.values() for each in found)


def test_tokens_may_lie_apart_and_none_may_come() -> None:
    logical = weight_of(WeightType.NF4, (64, 256, 0), torch.float32, 64)
    packed = pack(logical, TILED_LAYOUTS[WeightType.NF4], torch.bfloat16)
    wide = torch.randn(3, 400, dtype=torch.bfloat16)
    apart = wide[:, 100:356]
    assert torch.equal(multiply(apart, packed, None), multiply(apart.contiguous(), packed, None))
    assert multiply(apart[:0], packed, None).shape == (0, 64)


def test_infinite_and_missing_numbers_are_passed_on() -> None:
    logical = weight_of(WeightType.UINT4B8, (128, 128, 0), torch.bfloat16, 128)
    packed = pack(logical, TILED_LAYOUTS[WeightType.UINT4B8], torch.bfloat16)
    for dtype in DTYPES:
        x = torch.ones(2, 128, dtype=dtype)
        x[1, 5] = float("nan")
        found = multiply(x, packed, None)
        assert found[0].isfinite().all()
        assert found[1].isnan().all()


@pytest.mark.parametrize("weight_type", WeightType, ids=lambda t: t.value)
def test_the_traced_call_gives_the_same_bits(weight_type: WeightType) -> None:
    for dtype in DTYPES:
        logical = weight_of(weight_type, (64, 320, 32), torch.float16, 96, ordered=True)
        packed = pack(logical, TILED_LAYOUTS[weight_type], dtype)
        torch._dynamo.reset()
        compiled = torch.compile(bare_call(packed, dtype), fullgraph=True, backend="aot_eager")
        x, bias = torch.randn(5, 320).to(dtype), torch.randn(96).to(dtype)
        y = torch.full((5, 96), float("nan"), dtype=dtype)
        weight = (packed.qweight, packed.scales, packed.zeros)
        compiled(y, x, *weight, bias, packed.perm)
        assert torch.equal(y, multiply(x, packed, bias))


OTHERS = [name for name, isa in ISAS.items() if isa.cpu_flags <= this_isa().cpu_flags][1:]


@pytest.mark.skipif(FORCED in os.environ, reason="runs for an instruction set of its own")
@pytest.mark.parametrize("isa", OTHERS)
def test_every_other_instruction_set_of_this_machine(isa: str, tmp_path: Path) -> None:
    """These tests once more, and those of experts, in a process that may use this one alone."""
    chosen = "hot or apart or numbers or threads or 48 or range or bits"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, __file__, Path(__file__).with_name("test_fused_experts.py")],
        env={**os.environ, FORCED: isa, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stdout[-3000:]
