"""Which registers one SASS instruction reads and writes, by its disassembly.

`compile.disassemble` yields the text, `hazards.py` follows the flow. The tables know what
sm_90 kernels are made of; an instruction that is in none of them is taken for the worst there is,
one that writes, and reads at every operand, four registers.

A set of registers is an int with bit r for Rr; RZ is none of them.
"""

import re
from dataclasses import dataclass


def _names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


# Beside these, every instruction of the uniform datapath, whose name begins with U.
_WRITES_NONE = _names(
    # Stores, copies to shared memory, prefetches and fences.
    "ST STG STS STL STSM RED LDGSTS LDGDEPBAR ARRIVES CCTL CCTLL MEMBAR ERRBAR CGAERRBAR FENCE",
    # Barriers and waits.
    "BAR DEPBAR WARPSYNC WARPGROUP NANOSLEEP YIELD ACQBULK PREEXIT NOP",
    # Branches.
    "BRA BRX JMP JMX EXIT RET CALL BSSY BSYNC BREAK KILL BPT",
    # What writes predicates, uniform registers and convergence barriers alone.
    "ISETP FSETP DSETP HSETP2 PLOP3 R2P VOTEU ELECT R2UR S2UR REDUX",
)
# Wider ones among them are told by their modifiers.
_WRITES_ONE = _names(
    "IADD3 IMAD IABS IMNMX VIADD VIADDMNMX VIMNMX LEA LOP3 PRMT SHF SGXT BMSK FLO POPC BREV",
    "IDP VABSDIFF FADD FMUL FFMA FMNMX FSEL FSET FCHK MUFU HADD2 HMUL2 HFMA2 HMNMX2 HSET2",
    "F2F F2FP F2I FRND I2F I2FP I2IP MOV MOVM SEL SHFL VOTE MATCH S2R B2R P2R BMOV",
    "LD LDG LDS LDL LDC LDSM ATOM ATOMG ATOMS",
)
_WRITES_TWO = _names("DADD DMUL DFMA DMNMX LEPC CS2R")
# The first operand or, where that is no register, none.
_WRITES_FIRST = _names("SYNCS")
_MATRIX = _names("HMMA IMMA BMMA DMMA")
_WGMMA = _names("HGMMA QGMMA IGMMA BGMMA")
_KNOWN = _WRITES_NONE | _WRITES_ONE | _WRITES_TWO | _WRITES_FIRST | _MATRIX | _WGMMA
_STORES = _names("ST STG STS STL STSM RED ATOM ATOMG ATOMS")
_CONVERSIONS = _names("F2F F2I FRND I2F")
_WIDE_NUMBERS = _names("F64 S64 U64")
_UNKNOWN_WIDTH = 4

_PREDICATED = re.compile(r"@!?U?P\w+\s+")
_PLAIN = re.compile(r"[-~!|]*R(\d+|Z)\b")
_IN_ADDRESS = re.compile(r"(?<![A-Z_])R(\d+)(\.64)?")
_SHAPE = re.compile(r"\d+x(\d+)x\d+")


@dataclass(frozen=True, slots=True)
class Instruction:
    """`opcode` is the name with its modifiers, first the name: ("LDG", "E", "128")."""

    address: int
    text: str
    predicated: bool
    opcode: tuple[str, ...]
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.address:#x} {self.text}"

    @property
    def name(self) -> str:
        return self.opcode[0]

    @property
    def is_wgmma(self) -> bool:
        return self.name in _WGMMA

    @property
    def is_known(self) -> bool:
        """Whether the tables here name it."""
        return self.name in _KNOWN or self.name.startswith("U")


@dataclass(frozen=True, slots=True)
class Wgmma:
    """Registers of an asynchronous matrix product of a warpgroup.

    `a` is empty where the first operand comes from shared memory. `commits` says that it ends a
    group: the waits count groups.
    """

    accumulator: int
    a: int
    commits: bool


def parse(address: int, text: str) -> Instruction:
    """One line of a disassembly: "@P0 LDG.E.64 R4, desc[UR4][R2.64+0x8]"."""
    bare = _PREDICATED.sub("", text.strip(), count=1)
    opcode, _, rest = bare.partition(" ")
    operands = tuple(part.strip() for part in rest.split(",")) if rest.strip() else ()
    return Instruction(
        address, text.strip(), bare != text.strip(), tuple(opcode.split(".")), operands
    )


def wgmma_of(instruction: Instruction) -> Wgmma:
    """Its registers: of 64 rows of A, 32 bytes each, four in every thread, whatever the type."""
    width = int(_SHAPE.search(instruction.text)[1]) * 64 // 128
    if instruction.opcode[2] == "F16":
        width //= 2
    accumulator, a = instruction.operands[:2]
    return Wgmma(_registers(accumulator, width), _registers(a, 4), "gsb0" in instruction.operands)


def written(instruction: Instruction) -> int:
    """Registers that an instruction other than a wgmma writes."""
    at = _destination(instruction)
    return 0 if at is None else _registers(instruction.operands[at], _width(instruction))


def read(instruction: Instruction) -> int:
    """Registers that an instruction other than a wgmma reads."""
    at = _destination(instruction)
    found, source = 0, 0
    for position, operand in enumerate(instruction.operands):
        if position == at:
            continue
        if "[" in operand:
            for number, pair in _IN_ADDRESS.findall(operand):
                found |= _run(int(number), 2 if pair else 1)
        elif _PLAIN.match(operand):
            found |= _registers(operand, _source_width(instruction, source))
            source += 1
    return found


def _destination(instruction: Instruction) -> int | None:
    """Where among its operands the register stands that it writes."""
    if instruction.name in _WRITES_NONE or instruction.name.startswith("U"):
        return None
    # A predicate may be written beside it and stands in front then, in SHFL and atomics.
    plain = (at for at, operand in enumerate(instruction.operands) if _PLAIN.match(operand))
    first = next(plain, None)
    return None if instruction.name in _WRITES_FIRST and first != 0 else first


def _width(instruction: Instruction) -> int:
    """How many registers it writes."""
    name, modifiers = instruction.name, instruction.opcode[1:]
    if name in _MATRIX:
        half = "F16" in modifiers[1:2] or modifiers[0] in ("8816", "8832")
        return 2 if half else 4
    if name in ("LDSM", "STSM"):
        return int(modifiers[-1]) if modifiers[-1].isdecimal() else 1
    if "128" in modifiers:
        return 4
    if {"64", "WIDE"} & {*modifiers} or _converts_wide_numbers(instruction):
        return 2
    if name in _WRITES_TWO:
        return 1 if "32" in modifiers else 2
    return 1 if instruction.is_known else _UNKNOWN_WIDTH


def _source_width(instruction: Instruction, source: int) -> int:
    """How many registers it reads at its plain register operand number `source`."""
    name = instruction.name
    if name in _MATRIX:
        return (4, 2, _width(instruction))[min(source, 2)]
    if "WIDE" in instruction.opcode:
        return 2 if source == 2 else 1
    wide = name in _STORES | _WRITES_TWO or not instruction.is_known
    return _width(instruction) if wide or _converts_wide_numbers(instruction) else 1


def _converts_wide_numbers(instruction: Instruction) -> bool:
    return instruction.name in _CONVERSIONS and bool(_WIDE_NUMBERS & {*instruction.opcode})


def _registers(operand: str, width: int) -> int:
    match = _PLAIN.match(operand)
    return _run(int(match[1]), width) if match and match[1] != "Z" else 0


def _run(first: int, width: int) -> int:
    return ((1 << width) - 1) << first
