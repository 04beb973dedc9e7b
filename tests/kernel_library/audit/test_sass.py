"""Registers of single instructions, as the PTX ISA and the CUDA binary utilities describe them."""

import pytest

from fusedq_kernels.audit import sass


def registers(numbers: int) -> list[int]:
    return [number for number in range(256) if numbers >> number & 1]


def several(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("IADD3 R8, P5, R2, UR17, RZ", [8]),
        ("@!P0 LOP3.LUT R156, R8, 0xf000f, RZ, 0xc0, !PT", [156]),
        ("LOP3.LUT P0, R5, R4, 0x1, RZ, 0xc0, !PT", [5]),
        ("SHF.R.U64 R4, R2, 0x3, R3", [4]),
        ("HADD2.BF16_V2 R152, R152, -136, -136", [152]),
        ("F2FP.BF16.F32.PACK_AB R183, R154, R183", [183]),
        ("IMAD.WIDE.U32 R4, R8, 0x4, R2", [4, 5]),
        ("CS2R R24, SRZ", [24, 25]),
        ("CS2R.32 R24, SR_CLOCKLO", [24]),
        ("DFMA R6, R2, R4, R6", [6, 7]),
        ("F2F.F64.F32 R6, R2", [6, 7]),
        ("LDC.64 R10, c[0x0][0x210]", [10, 11]),
        ("LDS.U16 R85, [R18+UR17+0x16000]", [85]),
        ("LDS.64 R84, [R18]", [84, 85]),
        ("LDS.128 R84, [R18]", several(84, 4)),
        ("LDG.E.128 R4, desc[UR4][R2.64+0x10]", several(4, 4)),
        ("LDG.E.LTC128B.64 R4, desc[UR4][R2.64]", [4, 5]),
        ("LDG.E.LTC128B.STRONG.GPU R4, desc[UR4][R2.64]", [4]),
        ("LDSM.16.M88.4 R8, [R19+UR9+0x10000]", several(8, 4)),
        ("LDSM.16.MT88.2 R8, [R19]", [8, 9]),
        ("LDSM.16.M88 R8, [R19]", [8]),
        ("HMMA.16816.F32.BF16 R12, R4, R8, R12", several(12, 4)),
        ("HMMA.16816.F16 R12, R4, R8, R12", [12, 13]),
        ("S2R R0, SR_TID.X", [0]),
        ("SHFL.IDX PT, R14, R9, RZ, 0x1f", [14]),
        ("ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR4][R2.64], R5", [2]),
        ("P2R R3, PR, RZ, 0x1", [3]),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR19+0x16c00], R60", []),
        ("SYNCS.ARRIVE.TRANS64 R4, [UR17+0x34400], R8", [4]),
        ("SYNCS.ARRIVE.TRANS64 RZ, [UR17+0x34400], R8", []),
        ("R2UR UR24, R9", []),
        ("VOTEU.ANY UP0, P1", []),
        ("UIMAD.WIDE.U32 UR8, UR22, UR8, URZ", []),
        ("UTMALDG.2D [UR8], [UR18]", []),
        ("ISETP.GE.AND.EX P2, PT, R9, R188, PT, P2", []),
        ("STG.E.128 desc[UR4][R2.64], R8", []),
        ("STSM.16.MT88.4 [R4], R8", []),
        ("LDGSTS.E.BYPASS.128 [R15+0x30000], desc[UR20][R8.64], !P2", []),
        ("@!PT LDS RZ, [RZ]", []),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", []),
        ("EXIT", []),
        # Of what nobody knows, four from the first register on.
        ("FROBNICATE P0, [R2], R40, R60", several(40, 4)),
    ],
)
def test_written_registers(text, written):
    assert registers(sass.written(sass.parse(0, text))) == written


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("IADD3 R8, P5, R2, UR17, -R4", [2, 4]),
        ("FMUL R8, |R24|, -R25.reuse", [24, 25]),
        ("HMUL2.BF16_V2 R152, R152, R183.H0_H0", [152, 183]),
        ("IMAD.WIDE.U32 R4, R8, R9, R2", [2, 3, 8, 9]),
        ("DADD R6, R2, R4", several(2, 4)),
        ("LDS.128 R84, [R18+UR17+0x16000]", [18]),
        ("LDG.E.128 R4, desc[UR4][R2.64+0x10]", [2, 3]),
        ("STG.E.128 desc[UR4][R2.64], R8", [2, 3, *several(8, 4)]),
        ("STS.64 [R4], R8", [4, 8, 9]),
        ("STSM.16.MT88.4 [R4], R8", [4, *several(8, 4)]),
        ("HMMA.16816.F32.BF16 R12, R4, R8, R16", [*several(4, 4), 8, 9, *several(16, 4)]),
        ("ISETP.GE.AND P2, PT, R9, R188, PT", [9, 188]),
        ("R2UR UR24, R9", [9]),
        ("MOV R4, UR5", []),
        ("FROBNICATE R40, R60", several(60, 4)),
    ],
)
def test_read_registers(text, read):
    assert registers(sass.read(sass.parse(0, text))) == read


@pytest.mark.parametrize(
    ("text", "accumulator", "a", "commits"),
    [
        ("HGMMA.64x256x16.F32.BF16 R24, R152, gdesc[UR16], R24, gsb0", 128, several(152, 4), True),
        ("HGMMA.64x16x16.F32 R24, R8, gdesc[UR16], RZ, !UPT", 8, several(8, 4), False),
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", 32, [], True),
        (
            "HGMMA.64x64x8.F32.TF32 R24, R4, gdesc[UR8].tnspB, R24, UP0, gsb0",
            32,
            [4, 5, 6, 7],
            True,
        ),
        ("HGMMA.64x64x16.F16 R24, R4, gdesc[UR8], R24, gsb0", 16, several(4, 4), True),
        ("QGMMA.64x8x32.F32.E4M3.E4M3 R24, R4, gdesc[UR8], R24", 4, several(4, 4), False),
    ],
)
def test_registers_of_a_wgmma(text, accumulator, a, commits):
    instruction = sass.parse(0, text)
    assert instruction.is_wgmma
    found = sass.wgmma_of(instruction)
    assert registers(found.accumulator) == several(24, accumulator)
    assert (registers(found.a), found.commits) == (a, commits)
