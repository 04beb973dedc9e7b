"""Runs the PTX of a decoder on a CPU, bit by bit: straight-line code on 32-bit words."""

import re

import torch

MASK = 0xFFFFFFFF
_PAIRS = {"f16x2": torch.float16, "bf16x2": torch.bfloat16}


class Ptx:
    """Registers, special ones too, by name: int64 tensors that hold unsigned 32-bit words."""

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
            if name.startswith("fma.rn."):
                found = fma(_PAIRS[name[7:]], *arguments)
            elif name.startswith("mul.rn."):
                found = multiplied(_PAIRS[name[7:]], *arguments)
            else:
                found = getattr(self, name.replace(".", "_"))(*arguments)
            self.values[target] = found & MASK

    def _read(self, source: str) -> torch.Tensor:
        if source in self.values:
            return self.values[source]
        return torch.tensor(int(source, 0))

    def mov_b32(self, a):
        return a

    def mov_u32(self, a):
        return a

    def and_b32(self, a, b):
        return a & b

    def xor_b32(self, a, b):
        return a ^ b

    def mul_lo_u32(self, a, b):
        return (a & MASK) * b

    def shl_b32(self, a, count):
        return a << count

    def shr_u32(self, a, count):
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


def fma(dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """`a * b + c` of both halves, subnormal numbers included; raises where it would round."""
    result = torch.zeros(torch.broadcast_shapes(a.shape, b.shape, c.shape), dtype=torch.int64)
    for shift in (0, 16):
        x, y, z = (_half(each >> shift, dtype) for each in (a, b, c))
        exact = x * y + z
        rounded = exact.to(dtype)
        assert torch.equal(rounded.double(), exact), "rounds"
        result = result | ((rounded.view(torch.int16).long() & 0xFFFF) << shift)
    return result


def multiplied(dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a * b` of both halves, rounded once."""
    products = (_half(a >> shift, dtype) * _half(b >> shift, dtype) for shift in (0, 16))
    low, high = (each.to(dtype).view(torch.int16).long() & 0xFFFF for each in products)
    return low | (high << 16)


def _half(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The number in the low 16 bits, from sign, exponent and mantissa."""
    mantissa_bits, bias = {torch.float16: (10, 15), torch.bfloat16: (7, 127)}[dtype]
    mantissa = bits & ((1 << mantissa_bits) - 1)
    exponent = (bits & 0x7FFF) >> mantissa_bits
    whole = mantissa + ((exponent > 0).long() << mantissa_bits)
    power = exponent.clamp(min=1) - bias - mantissa_bits
    size = torch.ldexp(whole.double(), power)
    return torch.where(bits & 0x8000 != 0, -size, size)
