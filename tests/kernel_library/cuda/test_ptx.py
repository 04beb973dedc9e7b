"""The decoders' assembly, which only a GPU runs, by an emulation of its instructions."""

import re
from itertools import product

import pytest
import torch

from fusedq_kernels.cuda.codebook import table_bits
from fusedq_kernels.cuda.floats import HEADROOM
from fusedq_kernels.cuda.ptx import (
    float_ptx,
    integer_ptx,
    lookup_ptx,
    missing_lift,
    product_ptx,
    scale_ptx,
)
from fusedq_kernels.encodings import STORED, Codebook, Codes, Floats
from fusedq_kernels.types import WeightType
from ptx_emulation import Ptx, fma

CODEBOOKS = [each for each in WeightType if isinstance(each.encoding, Codebook)]
FLOATS = [each for each in WeightType if isinstance(each.encoding, Floats)]
E2M1 = WeightType.FLOAT4_E2M1F.encoding
INTEGERS = [each for each in WeightType if isinstance(each.encoding, Codes)]
STORING = [each for each in INTEGERS if each.encoding.zero is STORED]
FIXED = [each for each in INTEGERS if each.encoding.zero is not STORED]
DTYPES = [torch.float16, torch.bfloat16]
HALVES = torch.arange(1 << 16)
# All 2^16 halfwords in either half of a word, beside another halfword.
WORDS = torch.cat([HALVES | (HALVES * 40503 & 0xFFFF) << 16, HALVES << 16 | HALVES ^ 0xA5A5])
TEXTS = [
    *(lookup_ptx(table_bits(each, dtype)) for each in CODEBOOKS for dtype in DTYPES),
    *(integer_ptx(each.encoding, dtype) for each in INTEGERS for dtype in DTYPES),
    integer_ptx(WeightType.UINT4B8.encoding, torch.bfloat16, quarters=True),
    *(float_ptx(each.encoding, *how) for each in FLOATS for how in product(DTYPES, (True, False))),
    *(scale_ptx(missing_lift(E2M1, dtype) - HEADROOM, dtype) for dtype in DTYPES),
    *(product_ptx(dtype) for dtype in DTYPES),
]

_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
NUMBERS = {
    WeightType.FLOAT8_E4M3FN: (
        torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    ),
    WeightType.FLOAT4_E2M1F: [*_E2M1, *(-size for size in _E2M1)],
}

by_name = pytest.mark.parametrize("weight_type", INTEGERS, ids=lambda t: t.value)
with_dtype = pytest.mark.parametrize("dtype", DTYPES)


def bits_of(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype).view(torch.int16).long() & 0xFFFF


def test_the_emulation_follows_the_ptx_manual():
    words = {"a": torch.tensor([0x33221100]), "b": torch.tensor([0xF7665544])}
    ptx = Ptx(**words)
    ptx.run("{ .reg .b32 d; prmt.b32 d, a, b, 0x0F74; lop3.b32 $0, a, b, 0x0F0F0F0F, 0xEA; }")
    assert ptx.values["d"].tolist() == [0x00FFF744]
    assert ptx.values["$0"].tolist() == [(0x33221100 & 0xF7665544) | 0x0F0F0F0F]


@with_dtype
def test_the_emulation_multiplies_and_adds_like_torch(dtype):
    """All finite 16-bit numbers, the subnormal ones too, times one and times a power of two."""
    numbers = HALVES[HALVES.short().view(dtype).isfinite()]
    zero, one, half = (int(bits_of(torch.tensor(each), dtype)) for each in (-0.0, 1.0, 0.5))
    both = numbers * 0x10001
    as_is = fma(dtype, both, torch.tensor(one * 0x10001), torch.tensor(zero * 0x10001))
    assert torch.equal(as_is, both)
    even = numbers[
        numbers.short().view(dtype).double().mul(0.5).to(dtype).mul(2)
        == numbers.short().view(dtype)
    ]
    found = fma(dtype, even, torch.tensor(half), torch.tensor(zero))
    assert torch.equal(found & 0xFFFF, bits_of(even.short().view(dtype) * 0.5, dtype))
    with pytest.raises(AssertionError, match="rounds"):
        fma(dtype, torch.tensor(1), torch.tensor(half), torch.tensor(zero))


@with_dtype
@pytest.mark.parametrize("weight_type", CODEBOOKS, ids=lambda t: t.value)
def test_every_code_is_looked_up_at_every_place(weight_type, dtype):
    below = (1 << torch.arange(len(WORDS)) % 32) - 1
    ptx = Ptx(**{"$4": WORDS, "%lanemask_lt": below})
    ptx.run(lookup_ptx(table_bits(weight_type, dtype)))
    table = bits_of(torch.tensor(weight_type.codebook), dtype)
    for plane in range(4):
        even, odd = ((WORDS >> (8 * plane + shift)) & 15 for shift in (0, 4))
        assert torch.equal(ptx.values[f"${plane}"], table[even] | (table[odd] << 16))


def check_integers(weight_type, dtype, words, zeros, quarters=False):
    """Every plane of `words` less `zeros`, down to the sign of zero, for a layout of `bits`.

    With `quarters`, a quarter of planes 1 and 3.
    """
    bits = weight_type.bits
    planes = 16 // bits
    # Whatever the scale in the high half
    metadata = (torch.arange(len(words)) * 40503 & 0xFFFF) << 16 | zeros
    ptx = Ptx(**{f"${planes}": words, f"${planes + 1}": metadata})
    ptx.run(integer_ptx(weight_type.encoding, dtype, quarters))
    for plane in range(planes):
        part = 0.25 if quarters and plane % 2 else 1
        codes = [(words >> (bits * plane + shift)) & ((1 << bits) - 1) for shift in (0, 16)]
        low, high = (bits_of((each - zeros) * part, dtype) for each in codes)
        assert torch.equal(ptx.values[f"${plane}"], low | (high << 16))


@with_dtype
@pytest.mark.parametrize("weight_type", FIXED, ids=lambda t: t.value)
def test_every_integer_less_a_constant_is_exact(weight_type, dtype):
    zeros = torch.full_like(WORDS, weight_type.bias)
    check_integers(weight_type, dtype, WORDS, zeros)


def test_a_quarter_of_every_integer_is_exact():
    zeros = torch.full_like(WORDS, 8)
    check_integers(WeightType.UINT4B8, torch.bfloat16, WORDS, zeros, quarters=True)


@with_dtype
@pytest.mark.parametrize("weight_type", STORING, ids=lambda t: t.value)
def test_every_integer_less_every_zero_point_is_exact(weight_type, dtype):
    """A zero point of GPTQ v1 may be 16, one more than a code."""
    zeros = torch.arange({4: 17, 8: 256}[weight_type.bits])
    codes = torch.arange(1 << 8)
    # Any byte at any place: what else a word holds changes nothing, as all halfwords show below.
    words = torch.stack([codes, codes + 85, codes ^ 0xFF, codes * 7]) & 255
    words = sum(octet << (8 * i) for i, octet in enumerate(words))
    words, every = words.repeat(len(zeros)), zeros.repeat_interleave(len(words))
    check_integers(weight_type, dtype, words, every)
    for zero in (8, len(zeros) - 1):
        check_integers(weight_type, dtype, WORDS, torch.full_like(WORDS, zero))


@with_dtype
@pytest.mark.parametrize("weight_type", FLOATS, ids=lambda t: t.value)
def test_every_float_is_exact_at_every_place(weight_type, dtype):
    """Down to the sign of zero, whatever else the word holds; NaN has no answer."""
    bits, planes = weight_type.bits, 16 // weight_type.bits
    ptx = Ptx(**{f"${planes}": WORDS})
    ptx.run(float_ptx(weight_type.encoding, dtype))
    table = bits_of(torch.tensor(NUMBERS[weight_type]), dtype)
    for plane in range(planes):
        for shift in (0, 16):
            code = (WORDS >> (bits * plane + shift)) & ((1 << bits) - 1)
            found = (ptx.values[f"${plane}"] >> shift) & 0xFFFF
            known = ~torch.tensor(NUMBERS[weight_type]).isnan()[code]
            assert torch.equal(found[known], table[code[known]])


@with_dtype
def test_a_scale_lifts_every_unlifted_float(dtype):
    """Every E2M1 in either half times every E4M3, less the headroom, down to the sign of zero."""
    scales = torch.tensor(NUMBERS[WeightType.FLOAT8_E4M3FN])
    scales = scales[~scales.isnan()]
    stored = bits_of(scales, torch.bfloat16)
    lifting = Ptx(**{"$1": stored | stored.flip(0) << 16})
    lifting.run(scale_ptx(missing_lift(E2M1, dtype) - HEADROOM, dtype))
    codes = torch.arange(16)
    weight = Ptx(**{"$4": codes * 0x1111 | codes.flip(0) * 0x11110000})
    weight.run(float_ptx(E2M1, dtype, lifted=False))
    both = Ptx(**{"$1": weight.values["$2"][:, None], "$2": lifting.values["$0"][None, :]})
    both.run(product_ptx(dtype))
    values = torch.tensor(NUMBERS[WeightType.FLOAT4_E2M1F])
    for shift, by, of in ((0, values, scales), (16, values.flip(0), scales.flip(0))):
        expected = by[:, None] * of * 2.0**-HEADROOM
        assert torch.equal((both.values["$0"] >> shift) & 0xFFFF, bits_of(expected, dtype))
        assert torch.equal(expected.to(dtype).double(), expected.double())


@pytest.mark.parametrize("text", TEXTS)
def test_inputs_are_read_before_an_output_is_written(text):
    """The compiler may give an output the register of an input."""
    statements = [re.split(r",?\s+", each.strip(" {}")) for each in text.split(";")]
    outputs = {each[1] for each in statements if len(each) > 1 and each[1].startswith("$")}
    reads = [
        i for i, each in enumerate(statements) if {o for o in each[2:] if o[0] == "$"} - outputs
    ]
    writes = [i for i, each in enumerate(statements) if outputs & set(each[1:2])]
    assert len(outputs) in (1, 2, 4)
    assert max(reads) <= min(writes)
    assert not any(outputs & set(each[2:]) for each in statements)


@by_name
def test_a_pair_of_codes_takes_one_logic_instruction(weight_type):
    """And no shift but one for the upper half of P4."""
    for dtype in DTYPES:
        text = integer_ptx(weight_type.encoding, dtype)
        used = re.findall(r"\b(lop3|and|xor|shr|shl|prmt|or)\.", text)
        per_row = weight_type.encoding.zero is STORED
        assert len(used) - per_row == {4: 4 + 1, 8: 2}[weight_type.bits]
