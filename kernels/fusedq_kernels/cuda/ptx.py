"""The decoders' assembly: PTX, as text, that turns a packed word into planes of 16-bit values.

For NVIDIA GPUs from sm_80 on. Owns the instructions; `integers.py`, `floats.py` and `codebook.py`
run them and say the same in portable Triton. Logic, shifts and permutes share one pipe at half
rate, 16-bit FMA has another one at full rate, so a bit that FMA can move is not shifted. No FMA
here rounds.

- A code under the mantissa of a power of two whose last bit is worth one (bf16 128, fp16 1024) is a
  number already (the "magic number" of FasterTransformer and Marlin), and one `lop3` both cuts out
  a pair of codes and puts the magic number over it. fp16 has room for bits 4..7 of a halfword too.
- bf16 has not. But 16 bits below 256 are that multiple of 2^-133, linear over the subnormal and the
  first normal binade, so FMA by 2^127 lifts bits 0..7 to numbers where they are.
- A float of fewer bits, its exponent and mantissa moved to where a 16-bit float has them, is that
  power of two too small by which the biases differ, subnormal ones too: FMA makes up for it.
- PRMT picks bytes of an 8-byte table by 3-bit selectors, four at a time. Two lookups and a
  selection by the codes' top bits give the low bytes of four values, three more the high bytes, and
  two permutes interleave them.

Every input is read before an output is written: outputs may share its registers.
"""

from collections.abc import Sequence

import torch

from fusedq_kernels.encodings import STORED, Codes, Floats

# By Triton's name
PTX_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SUFFIX = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}
_MAGIC = {torch.bfloat16: 128.0, torch.float16: 1024.0}
_LIFT = 2.0**127  # makes 4 to 64 steps of the lifted bits one: bf16 has no larger power of two
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10}
_AND_OR = "0xEA"  # lop3: (a & b) | c
_SELECT = "0xE4"  # lop3: a where c is set, else b


def bit_pattern(value: float, dtype: torch.dtype) -> int:
    """The 16 bits of `value` rounded to a 16-bit float dtype."""
    return torch.tensor(value, dtype=dtype).view(torch.int16).item() & 0xFFFF


class _Block:
    """Statements in the order of writing, and the registers that they name."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.statements: list[str] = []
        self.registers: list[str] = []

    def put(self, target: str, instruction: str, *operands: str | int) -> str:
        """`target = instruction(operands)`; target is a new register, an old one or an output."""
        if target[0] != "$" and target not in self.registers:
            self.registers.append(target)
        texts = (f"0x{each:08X}" if isinstance(each, int) else each for each in operands)
        self.statements.append(f"{instruction} {target}, {', '.join(texts)}")
        return target

    def pair(self, target: str, value: float) -> str:
        """`value` in both halves."""
        return self.put(target, "mov.b32", bit_pattern(value, self.dtype) * 0x00010001)

    def fma(self, target: str, factor: str, other: str, addend: str) -> str:
        return self.put(target, f"fma.rn.{_SUFFIX[self.dtype]}", factor, other, addend)

    def text(self) -> str:
        lines = (f".reg .b32 {', '.join(self.registers)}", *self.statements)
        return "{ " + " ".join(f"{line};" for line in lines) + " }"


def integer_ptx(codes: Codes, dtype: torch.dtype, quarters: bool = False) -> str:
    """PTX of `code - zero`: the planes `$0`, `$1` .. of a P4 word `$4` or of a P8 word `$2`.

    With `quarters`, for bf16 and a zero point of the type alone, planes 1 and 3 of P4 are a quarter
    of it. A stored zero point is the low byte of the operand behind the word, whose second byte is
    zero: at most 16 beside 4-bit codes, 255 beside 8-bit ones.
    """
    block = _Block(dtype)
    if codes.bits == 4:
        _nibbles(block, codes, quarters)
    else:
        _octets(block, codes)
    return block.text()


def _offset(block: _Block, codes: Codes, metadata: str) -> str:
    """Minus the magic number and the zero point."""
    magic = _MAGIC[block.dtype]
    if codes.zero is not STORED:
        return block.pair("offset", -magic - codes.zero)
    high = bit_pattern(-magic, block.dtype) >> 8
    return block.put("offset", "prmt.b32", metadata, high * 0x01010101, "0x4040")


def _nibbles(block: _Block, codes: Codes, quarters: bool) -> None:
    bf16, magic = block.dtype is torch.bfloat16, _MAGIC[block.dtype]
    magic_bits = bit_pattern(magic, block.dtype) * 0x00010001
    one = block.pair("one", 1.0)
    offset = _offset(block, codes, "$5")
    if bf16:
        lift, quarter = block.pair("lift", _LIFT), block.pair("quarter", magic / 4)
        step, high_offset = block.pair("step", 4.0), offset
        if quarters:
            quarter = block.pair("quarter", -codes.zero / 4)
    else:
        step = block.pair("step", 1 / 16)
        high_offset = block.fma("high", offset, one, block.pair("rest", magic - magic / 16))
    block.put("upper", "shr.u32", "$4", "8")
    for plane, word in ((0, "$4"), (2, "upper")):
        block.put(f"p{plane}", "lop3.b32", word, 0x000F000F, magic_bits, _AND_OR)
        high = f"p{plane + 1}"
        if bf16:
            block.fma(high, block.put(high, "and.b32", word, 0x00F000F0), lift, quarter)
        else:
            block.put(high, "lop3.b32", word, 0x00F000F0, magic_bits, _AND_OR)
    for plane in (0, 2):
        block.fma(f"${plane}", f"p{plane}", one, offset)
        if quarters:
            block.put(f"${plane + 1}", "mov.b32", f"p{plane + 1}")
        else:
            block.fma(f"${plane + 1}", f"p{plane + 1}", step, high_offset)


def _octets(block: _Block, codes: Codes) -> None:
    bf16 = block.dtype is torch.bfloat16
    if bf16:
        # Less a 64th of the zero point while codes are 64ths: no 9-bit number in between.
        lift, step, nothing = block.pair("lift", _LIFT), block.pair("step", 64.0), "nothing"
        block.pair(nothing, -0.0)
        if codes.zero is STORED:
            block.put("offset", "prmt.b32", "$3", 0, "0x4040")
            block.fma("offset", "offset", block.pair("drop", -_LIFT), nothing)
        else:
            block.pair("offset", -codes.zero / 64)
    else:
        step, nothing = block.pair("one", 1.0), _offset(block, codes, "$3")
    above = 0 if bf16 else (bit_pattern(_MAGIC[block.dtype], block.dtype) >> 8) * 0x01010101
    for plane, selector in enumerate(("0x4240", "0x4341")):
        block.put(f"p{plane}", "prmt.b32", "$2", above, selector)
    for plane in range(2):
        if bf16:
            block.fma(f"p{plane}", f"p{plane}", lift, "offset")
    for plane in range(2):
        block.fma(f"${plane}", f"p{plane}", step, nothing)


def missing_lift(floats: Floats, dtype: torch.dtype) -> int:
    """How many doublings a float lacks whose bits are where `dtype` has them."""
    return (1 << (14 - _MANTISSA[dtype])) - (1 << (floats.exponent - 1))


def float_ptx(floats: Floats, dtype: torch.dtype, lifted: bool = True) -> str:
    """PTX of floats of 4 or 8 bits: the planes `$0`, `$1` .. of a P4 word `$4` or a P8 word `$2`.

    NaN becomes a number. Without `lifted` all are 2**-`missing_lift` of what they are.
    """
    block, count = _Block(dtype), 16 // floats.bits
    word, down = f"${count}", 15 - _MANTISSA[dtype] - floats.exponent
    sizes = ((1 << 15) - (1 << (16 - floats.bits))) >> down
    if lifted:
        lift = block.pair("lift", 2.0 ** missing_lift(floats, dtype))
        nothing = block.pair("nothing", -0.0)
    if count == 4:
        if down >= floats.bits:
            _spread_nibbles(block, down, sizes)
        else:
            _nibbles_to_bytes(block, sizes >> 8)
        count = 0
    for plane in range(count):
        up = 16 - floats.bits * (plane + 1)
        p, sign = f"p{plane}", _shifted(block, "sign", word, up)
        size = block.put(p, "and.b32", _shifted(block, p, word, up - down), sizes * 0x00010001)
        block.put(p, "lop3.b32", sign, 0x80008000, size, _AND_OR)
    for plane in range(16 // floats.bits):
        if lifted:
            block.fma(f"${plane}", f"p{plane}", lift, nothing)
        else:
            block.put(f"${plane}", "mov.b32", f"p{plane}")
    return block.text()


def product_ptx(dtype: torch.dtype) -> str:
    """PTX of the product of the pairs `$1` and `$2`, rounded once: `$0`."""
    block = _Block(dtype)
    block.fma("$0", "$1", "$2", block.pair("nothing", -0.0))
    return block.text()


def scale_ptx(doublings: int, dtype: torch.dtype) -> str:
    """PTX of two bf16 scales `$1`, numbers of E4M3, doubled so often: two of `dtype`, `$0`.

    fp16's exponents are the lower five bits of those that bf16 has from 96 to 127, where a
    multiplication brings them first, and stand three bits higher.
    """
    block, bf16 = _Block(torch.bfloat16), dtype is torch.bfloat16
    factor = block.pair("factor", 2.0 ** (doublings if bf16 else doublings - 16))
    product = block.fma("$0" if bf16 else "p", "$1", factor, block.pair("nothing", -0.0))
    if not bf16:
        moved = block.put("moved", "shl.b32", product, "3")
        block.put("$0", "lop3.b32", moved, product, 0x7FF87FF8, _SELECT)
    return block.text()


def _spread_nibbles(block: _Block, down: int, sizes: int) -> None:
    """Planes `p0` to `p3`: a multiplication copies a nibble to where its sign and its size go."""
    block.put("upper", "shr.u32", "$4", "8")
    for plane in range(4):
        p, at = f"p{plane}", 4 * (plane % 2)
        block.put(p, "and.b32", "upper" if plane > 1 else "$4", 0x000F000F << at)
        block.put(p, "mul.lo.u32", p, (1 << (12 - at)) + (1 << (12 - down - at)))
        block.put(p, "and.b32", p, (0x8000 | sizes) * 0x00010001)


def _nibbles_to_bytes(block: _Block, sizes: int) -> None:
    """Planes `p0` to `p3` of floats whose low byte is zero: each nibble becomes a high byte."""
    up = (sizes & -sizes).bit_length() - 1
    for half, low in (("low", 0), ("high", 4)):
        size = block.put(half, "and.b32", _shifted(block, half, "$4", up - low), sizes * 0x01010101)
        sign = _shifted(block, "sign", "$4", 4 - low)
        block.put(half, "lop3.b32", sign, 0x80808080, size, _AND_OR)
    for plane, selector in enumerate(("0x2404", "0x2404", "0x3414", "0x3414")):
        block.put(f"p{plane}", "prmt.b32", "high" if plane % 2 else "low", 0, selector)


def _shifted(block: _Block, target: str, word: str, up: int) -> str:
    """`word` by so many bits to the left, or to the right below zero."""
    if up == 0:
        return word
    return block.put(target, "shl.b32" if up > 0 else "shr.u32", word, str(abs(up)))


def lookup_ptx(table: Sequence[int]) -> str:
    """PTX that turns a PL4 word `$4` into plane j in `$j`: `table[nibble 2j + b]` in half b.

    `table` has 16 entries of 16 bits.
    """
    block = _Block()
    # No lane is below itself, so this is zero, which the compiler does not know: what it knows to
    # be constant it keeps in a uniform register and copies before each PRMT.
    block.put("zero", "mov.u32", "%lanemask_lt")
    block.put("zero", "shr.u32", "zero", "31")
    for i in range(4):
        for byte, shift in (("l", 0), ("h", 8)):
            entries = table[4 * i : 4 * i + 4]
            packed = sum(((entry >> shift) & 0xFF) << (8 * j) for j, entry in enumerate(entries))
            if i % 2:
                block.put(f"{byte}{i}", "mov.b32", packed)
            else:
                block.put(f"{byte}{i}", "xor.b32", "zero", packed)
    # Selectors of three bits, and the top bit of each code choosing byte i or i + 4.
    block.put("s0", "and.b32", "$4", 0x77777777)
    block.put("t0", "shr.u32", "$4", "1")
    block.put("t0", "lop3.b32", "t0", 0x44444444, 0x32103210, _AND_OR)
    block.put("s1", "shr.u32", "s0", "16")
    block.put("t1", "shr.u32", "t0", "16")
    for half in range(2):
        for byte in "lh":
            block.put("a", "prmt.b32", f"{byte}0", f"{byte}1", f"s{half}")
            block.put("b", "prmt.b32", f"{byte}2", f"{byte}3", f"s{half}")
            block.put(byte, "prmt.b32", "a", "b", f"t{half}")
        block.put(f"${2 * half}", "prmt.b32", "l", "h", "0x5140")
        block.put(f"${2 * half + 1}", "prmt.b32", "l", "h", "0x7362")
    return block.text()
