"""The 4-bit codebooks and their lookup, down to the assembly that only a GPU runs."""

import re

import pytest
import torch

from fusedq_kernels.cuda.codebook import lookup_asm, table_bits
from fusedq_kernels.types import WeightType

CODEBOOKS = [each for each in WeightType if each.codebook is not None]
DTYPES = [torch.float16, torch.bfloat16]
MASK = 0xFFFFFFFF


def test_nf4_is_made_of_normal_quantiles():
    """bitsandbytes `create_normal_map`: areas of equal probability on either side of zero."""
    offset = 0.9677083
    upper, lower = (
        torch.special.ndtri(torch.linspace(offset, 0.5, count, dtype=torch.float64)[:-1])
        for count in (9, 8)
    )
    values = torch.cat([-lower, torch.zeros(1), upper]).sort().values
    expected = (values / values.abs().max()).tolist()
    assert WeightType.NF4.codebook == pytest.approx(expected, abs=1e-6)


def test_fp4_is_sign_exponent_and_mantissa():
    """bitsandbytes: bias 3, one subnormal, the exponent stored upside down; in units of 1/12."""
    for code, entry in enumerate(WeightType.FP4.codebook):
        sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
        value = 2.0 ** (4 - exponent) * (1 + mantissa / 2) if exponent else mantissa / 16
        assert entry == (-value if sign else value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp4_is_exact_in_16_bits(dtype):
    table = torch.tensor(WeightType.FP4.codebook)
    assert torch.equal(table.to(dtype).float(), table)


class Ptx:
    """Runs straight-line PTX on int64 tensors that hold unsigned 32-bit words."""

    def __init__(self, **operands: torch.Tensor) -> None:
        self.values = dict(operands)

    def run(self, text: str) -> None:
        statements = [each.strip() for each in text.strip(" {}").split(";")]
        for statement in filter(None, statements):
            name, *operands = re.split(r",?\s+", statement)
            if name == ".reg":
                continue
            target, *sources = operands
            arguments = [self._read(source) for source in sources]
            self.values[target] = getattr(self, name.replace(".", "_"))(*arguments) & MASK

    def _read(self, source: str) -> torch.Tensor:
        if source in self.values:
            return self.values[source]
        return torch.tensor(int(source, 0))

    def mov_b32(self, a):
        return a

    def and_b32(self, a, b):
        return a & b

    def shr_b32(self, a, count):
        return a >> count

    def lop3_b32(self, a, b, c, table):
        result = torch.zeros_like(a)
        for row in range(8):
            if (int(table) >> row) & 1:
                bits = (each if (row >> i) & 1 else ~each for i, each in enumerate((c, b, a)))
                x, y, z = bits
                result = result | (x & y & z)
        return result

    def prmt_b32(self, a, b, selector):
        a, b, selector = torch.broadcast_tensors(a, b, selector)
        octets = torch.stack([(each >> (8 * i)) & 255 for each in (a, b) for i in range(4)])
        result = torch.zeros_like(selector)
        for i in range(4):
            nibble = (selector >> (4 * i)) & 15
            octet = octets.gather(0, (nibble & 7)[None])[0]
            sign = torch.where(octet > 127, 255, 0)
            result = result | (torch.where(nibble > 7, sign, octet) << (8 * i))
        return result


def test_the_emulation_follows_the_ptx_manual():
    words = {"a": torch.tensor([0x33221100]), "b": torch.tensor([0xF7665544])}
    ptx = Ptx(**words)
    ptx.run("{ .reg .b32 d; prmt.b32 d, a, b, 0x0F74; lop3.b32 $0, a, b, 0x0F0F0F0F, 0xEA; }")
    assert ptx.values["d"].tolist() == [0x00FFF744]
    assert ptx.values["$0"].tolist() == [(0x33221100 & 0xF7665544) | 0x0F0F0F0F]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_type", CODEBOOKS, ids=lambda t: t.value)
def test_assembly_looks_up_every_code_at_every_place(weight_type, dtype):
    halves = torch.arange(1 << 16)
    # All 2^16 halfwords in either half of a word, beside another halfword.
    words = torch.cat([halves | (halves * 40503 & 0xFFFF) << 16, halves << 16 | halves ^ 0xA5A5])
    ptx = Ptx(**{"$4": words})
    ptx.run(lookup_asm(table_bits(weight_type, dtype)))
    table = torch.tensor(weight_type.codebook).to(dtype).view(torch.int16).long() & 0xFFFF
    for plane in range(4):
        even, odd = ((words >> (8 * plane + shift)) & 15 for shift in (0, 4))
        assert torch.equal(ptx.values[f"${plane}"], table[even] | (table[odd] << 16))


def test_assembly_reads_its_input_before_it_writes_an_output():
    statements = lookup_asm(range(16)).split(";")
    last_read = max(i for i, each in enumerate(statements) if "$4" in each)
    first_write = min(i for i, each in enumerate(statements) if re.search(r"\$[0-3]", each))
    assert last_read < first_write
