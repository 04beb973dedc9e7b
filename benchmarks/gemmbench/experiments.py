"""The open questions of the kernel's design, each with its prediction and what would refute it.

An entry is data: weights, numbers of tokens, and what is measured side by side. `experiments.py`
one folder up runs them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fusedq_kernels.types import TileConfig, WeightType
from gemmbench.contender import Contender
from gemmbench.numerics import ACCUMULATION, BIT_EQUALITY, Numerics
from gemmbench.variants import MULTIPLIED, PORTABLE, Variant, describe


@dataclass(frozen=True)
class Case:
    """Weights that are measured alike; `group_size` None is the weight type's usual one."""

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    weight_type: WeightType = WeightType.UINT4B8
    group_size: int | None = None
    act_dtype: str = "bfloat16"


@dataclass(frozen=True)
class Experiment:
    """`names` are contenders of `comparison.py`, measured beside the variants."""

    title: str
    prediction: str
    refuted_by: str
    cases: tuple[Case, ...] = ()
    variants: tuple[Contender, ...] = ()
    names: tuple[str, ...] = ()
    numerics: Numerics | None = None


# (out_features, in_features): qkv, o, gate_up and down of Llama-3 8B, gate_up of 70B, a square.
_QKV, _O, _GATE_UP, _DOWN = (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)
_KV, _GATE_UP_70B, _SQUARE, _UP = (1024, 4096), (57344, 8192), (8192, 8192), (14336, 4096)


def _tiles(tiles: Sequence[TileConfig], **options: object) -> tuple[Variant, ...]:
    return tuple(Variant(describe(tile).replace(" split 1", ""), tile, **options) for tile in tiles)


def _tile(block_m: int, block_n: int, num_warps: int, num_stages: int, **more) -> TileConfig:
    return TileConfig(block_m, block_n, 1, num_warps, num_stages, **more)


def _scaling(block_m: int, block_n: int, num_stages: int, num_warps: int = 8) -> TileConfig:
    return _tile(block_m, block_n, num_warps, num_stages, scale_weights=True, x_descriptor=True)


_DECODE_TILES = [_tile(m, n, 4, ns) for m, n in ((8, 64), (8, 128), (16, 128)) for ns in (3, 4, 6)]
# One warpgroup a program, then two, which wait for each other at barriers.
_PREFILL_TILES = [
    *(_scaling(128, 64, 3, num_warps=4), _scaling(128, 64, 2, num_warps=4)),
    *(_scaling(128, 128, 3, num_warps=4), _scaling(128, 128, 2, num_warps=4)),
    *(_scaling(256, 64, 3, num_warps=4), _scaling(256, 128, 3)),
]
_PORTABLE_TILES = [_tile(m, n, 4, 4) for m, n in ((8, 64), (8, 128), (16, 128))]
EXPERIMENTS: dict[int, Experiment] = {
    1: Experiment(
        "Is decoding one token bound by HBM, and does the compiler need help?",
        "pct_twin 85 to 100 for every tile on the two large weights, assembly 10 to 24 % faster "
        "than Triton's own code at one token, 4 stages as fast as 6",
        "pct_twin under 85 with without-dequant at 100: instructions are the limit; assembly no "
        "faster: ship the portable decoder alone",
        (Case((_GATE_UP, _GATE_UP_70B, _O), (1, 8, 16)),),
        (
            *_tiles(_DECODE_TILES),
            *(
                replace(each, name=f"{each.name} portable", decoders=tuple(PORTABLE.items()))
                for each in _tiles(_PORTABLE_TILES)
            ),
        ),
        ("fusedq", "without-dequant", "cublas"),
    ),
    2: Experiment(
        "Which tile for prefill, and from how many tokens is dequantize + cuBLAS faster?",
        "256x128 at 0.8 of cuBLAS from 2048 tokens on, 128x64 10 % faster than 128x128 at 512; "
        "sliced-cublas overtakes between 700 and 1,200 tokens",
        "128x64 no faster at 512: two programs per SM do not pay beyond 256 tokens",
        (Case((_UP, _SQUARE), (512, 1024, 2048, 4096)),),
        _tiles(
            [
                *(_scaling(256, 128, 3), _scaling(128, 128, 3)),
                _scaling(128, 64, 3, num_warps=4),
            ],
            split_k=1,
        ),
        ("fusedq", "fusedq-sliced", "cublas", "dequant+cublas"),
    ),
    3: Experiment(
        "Does a row get the same bits from every tile?",
        "0 differing outputs between tiles of 16 tokens and more; tiles of 8 may differ where "
        "Triton compiles them to mma.sync",
        "any difference between tiles of 16, 32 and 64 tokens: batch-invariant mode needs one tile",
        numerics=BIT_EQUALITY,
    ),
    4: Experiment(
        "Which split do weights of few outputs want?",
        "that of the rules within 3 % of the best; 1024x4096 wants 8 up to 16 tokens, 4 at 64, 2 "
        "at 128",
        "another split faster by 5 %: the share of the sums in choose/waves.py is wrong there",
        (Case((_O, _KV, _QKV), (1, 16, 64, 128)),),
        tuple(Variant(f"split {split}", split_k=split) for split in (1, 2, 4, 8, 16)),
        ("fusedq", "cublas"),
    ),
    5: Experiment(
        "How exactly do the tensor cores accumulate?",
        "1e-7 with exact codes, also where the scale multiplies the weights; 3.5e-6 with the magic "
        "number left in",
        "1e-6 and more with exact codes: the accumulator truncates, and long K wants segments",
        numerics=ACCUMULATION,
    ),
    6: Experiment(
        "What does the NF4 table cost?",
        "72 to 80 % of the twin up to 16 tokens, without-dequant 100 %; 25 us for gate_up",
        "85 % and more: the lookups are cheaper than counted; within 10 % of uint4b8 in groups of "
        "64 is the target",
        tuple(
            Case((_GATE_UP, _GATE_UP_70B, _DOWN), (1, 8, 16, 64), weight_type, 64)
            for weight_type in (WeightType.NF4, WeightType.UINT4B8)
        ),
        names=("fusedq", "bitsandbytes", "without-dequant", "dequant-twice", "cublas"),
    ),
    7: Experiment(
        "What does exact prefill cost at 128 tokens?",
        "fp32 group scales 10 to 25 % slower than scaled weights",
        "5 % or less: no scaled weights up to 128 tokens",
        (Case((_QKV, _O, _GATE_UP, _DOWN), (96, 128)),),
        (
            *_tiles([_tile(128, 64, 4, 3), _tile(128, 128, 8, 3), _tile(64, 128, 8, 4)]),
            *_tiles([_scaling(128, 128, 3), _scaling(64, 128, 4)]),
        ),
        ("fusedq", "cublas"),
    ),
    8: Experiment(
        "Do 8 bits, fp16 and zero points keep to the same bounds?",
        "pct_twin as in experiment 1 for all of them; uint4 within 5 % of uint4b8; 8 bits per "
        "channel 1.8 times cuBLAS",
        "uint4 slower than uint4b8 by 5 %, or fp16 slower than bf16 by 5 %",
        tuple(
            Case((_GATE_UP, _DOWN), (1, 8, 16), *more)
            for more in (
                (WeightType.UINT8B128, -1),
                (WeightType.UINT8B128, 128),
                (WeightType.UINT4, 128),
                (WeightType.UINT4B8, 128),
                (WeightType.UINT4B8, 128, "float16"),
            )
        ),
        names=("fusedq", "without-dequant", "cublas"),
    ),
    9: Experiment(
        "Is one warpgroup a program, two programs an SM, the better prefill tile?",
        "128x128 with 4 warps 10 to 20 % faster than 256x128 with 8 at 512 to 2048 tokens, equal "
        "at 8192; 128x64 between the two; 256x64 with 4 warps slower than all, as shared memory "
        "holds one program",
        "256x128 with 8 warps within 3 % of the best from 512 tokens on: barriers are not what "
        "its stalls cost",
        (Case((_O, _GATE_UP), (256, 512, 1024, 2048, 4096, 8192)),),
        _tiles(_PREFILL_TILES, split_k=1),
        ("fusedq", "cublas"),
    ),
    10: Experiment(
        "What does a small weight lose around its loop, and to shifts?",
        "the time over K, drawn to K = 0, is 3.0 to 3.6 us unsplit, 0.4 us more with 4 splits at "
        "one token and 0.9 us more at 16; multiplied, with 11 % fewer instructions on the ALU and "
        "as many in all, 0 to 4 % faster at K = 8192",
        "under 2 us at K = 0: the loop itself is slow where it is short; multiplied slower: the "
        "high half of a product is no instruction at full rate, shifts stay",
        (Case(tuple((4096, k) for k in (1024, 2048, 4096, 8192)), (1, 16)),),
        (
            *(Variant(f"split {split}", split_k=split) for split in (1, 4, 8)),
            Variant("split 4 multiplied", split_k=4, decoders=tuple(MULTIPLIED.items())),
        ),
        ("fusedq", "without-dequant", "cublas"),
    ),
    11: Experiment(
        "Does a kernel whose warps have work of their own prefill at the speed of cuBLAS?",
        "256x128 at 0.95 of cuBLAS and ahead of fusedq from 1,024 tokens on, as a block's decoding "
        "is a tenth of what its products take and nothing waits for all warps; 128x128 better at "
        "512 tokens and fewer",
        "under 0.9 of cuBLAS at 4,096: what the tensor cores wait for is x from L2, not barriers",
        (
            Case((_O, _GATE_UP, _DOWN), (256, 512, 1024, 2048, 4096, 8192)),
            Case((_O,), (2048,), WeightType.UINT4, 128, "float16"),
        ),
        names=(
            *("fusedq", "fusedq-sliced", "cublas"),
            *("warp-specialised 256x128", "warp-specialised 128x128"),
        ),
    ),
}


def dry(experiment: Experiment, shape: tuple[int, int]) -> Experiment:
    """The same comparison, tiny: one shape, and of each case the fewest tokens, at most 66."""
    cases = [
        replace(case, shapes=(shape,), tokens=(min(case.tokens[0], 66),))
        for case in experiment.cases
    ]
    return replace(experiment, cases=tuple(dict.fromkeys(cases)))
