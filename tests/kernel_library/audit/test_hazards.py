"""Machine code with and without registers that are touched under a running wgmma.

`sass/` holds what Triton 3.6.0 and its ptxas made for sm_90 of the kernel as it was before it
waited for the sum of each K block (bf16; group size or per channel; "s": the scale multiplies the
weights). On an H200 those of FAILED gave wrong outputs, other ones in each run, and those of RIGHT
the right ones in all.
"""

import gzip
from pathlib import Path

import pytest

from fusedq_kernels.audit import hazards, sass

FOLDER = Path(__file__).with_name("sass")
FAILED = [
    "uint4b8-g128-256x128s-bias",
    "uint4-g128-256x128s-bias",
    "uint4-g128-64x128s-bias",
    "nf4-channel-64x128-bias",
]
RIGHT = [
    "uint4b8-g128-256x128s",
    "uint4-g128-64x128s",
    "uint4b8-g64-256x128s-bias",
    "nf4-channel-16x128-bias",
]

FIRST = "HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR16], R24, gsb0"
SECOND = "HGMMA.64x16x16.F32.BF16 R24, R44, gdesc[UR16], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, {:#x}"


def found(*lines: str) -> list[tuple[str, list[int]]]:
    """What touches which registers, of code in 16 bytes per instruction that ends in an exit."""
    program = [(16 * at, text) for at, text in enumerate((*lines, "EXIT"))]
    return [
        (each.touched_by.text, [r for r in range(256) if each.registers >> r & 1])
        for each in hazards.find_hazards(program)
    ]


def recorded(name: str) -> list[tuple[int, str]]:
    with gzip.open(FOLDER / f"{name}.sass.gz", "rt") as file:
        lines = (line.rstrip("\n").split(" ", 1) for line in file)
        return [(int(address, 16), text) for address, text in lines]


@pytest.mark.parametrize(
    ("write", "registers"),
    [
        ("MOV R43, RZ", [43]),
        ("@!P0 MOV R40, RZ", [40]),
        ("LDS.64 R42, [R2]", [42, 43]),
        ("LDS.64 R43, [R2]", [43]),
        ("LDG.E.128 R36, desc[UR4][R2.64]", []),
        ("LDG.E.128 R37, desc[UR4][R2.64]", [40]),
        ("LDSM.16.M88.4 R40, [R2]", [40, 41, 42, 43]),
        ("IMAD.WIDE R38, R2, R3, R4", []),
        ("IMAD.WIDE R39, R2, R3, R4", [40]),
        ("FROBNICATE R38", [40, 41]),
        ("MOV R44, R40", []),
        ("MOV R31, RZ", [31]),
        ("LDS.128 R22, [R2]", [24, 25]),
        ("STG.E.64 desc[UR4][R2.64], R30", [30, 31]),
        ("FADD R4, R23, R31", [31]),
        ("STG.E desc[UR4][R2.64], R32", []),
    ],
)
def test_registers_touched_before_the_wait(write, registers):
    """A reads R40 to R43, the sum is R24 to R31; the first may be read."""
    assert found(FIRST, write, WAIT.format(0)) == ([(write, registers)] if registers else [])
    assert found(FIRST, WAIT.format(0), write) == []
    assert found(write, FIRST, WAIT.format(0)) == []


def test_a_wait_retires_older_groups_alone():
    code = [FIRST, SECOND, WAIT.format(1), "MOV R40, RZ"]
    assert found(*code) == []
    assert found(*code, "MOV R45, RZ", WAIT.format(0), "MOV R46, RZ") == [("MOV R45, RZ", [45])]


def test_a_group_is_committed_by_its_last_product():
    open_ = FIRST.removesuffix(", gsb0")
    # Both are one group; of two groups the wait would leave the second alone.
    assert found(open_, SECOND, WAIT.format(1), "MOV R40, RZ") == [("MOV R40, RZ", [40])]
    assert found(open_, SECOND, WAIT.format(0), "MOV R40, RZ") == []
    # No wait counts what is not committed.
    assert found(open_, WAIT.format(0), "MOV R40, RZ") == [("MOV R40, RZ", [40])]


def test_a_fence_waits_for_nothing():
    assert found(FIRST, "WARPGROUP.ARRIVE", "MOV R40, RZ") == [("MOV R40, RZ", [40])]


def test_products_follow_each_other_on_one_sum_only():
    assert found(FIRST, SECOND, WAIT.format(0)) == []
    other_sum = "HGMMA.64x16x16.F32.BF16 R40, R4, gdesc[UR16], RZ, !UPT, gsb0"
    assert found(FIRST, other_sum) == [(other_sum, [40, 41, 42, 43])]
    overlapping = "HGMMA.64x8x16.F32.BF16 R24, R4, gdesc[UR16], R24, gsb0"
    assert found(FIRST, overlapping) == [(overlapping, [24, 25, 26, 27])]
    of_the_sum = "HGMMA.64x16x16.F32.BF16 R48, R28, gdesc[UR16], RZ, !UPT, gsb0"
    assert found(FIRST, of_the_sum) == [(of_the_sum, [28, 29, 30, 31])]


@pytest.mark.parametrize(("pending", "registers"), [(0, []), (1, [45]), (2, [40, 45])])
def test_the_next_round_of_a_loop(pending, registers):
    loop = ["NOP", "MOV R40, RZ", "MOV R45, RZ", FIRST, SECOND, WAIT.format(pending)]
    touched = found(*loop, "@P0 BRA 0x10")
    assert sorted(each for _, numbers in touched for each in numbers) == registers


def test_every_way_counts():
    """A branch around the wait, a spin loop out of line, and the end of one of two ways."""
    around = [FIRST, "@P0 BRA 0x30", WAIT.format(0), "MOV R40, RZ"]
    assert found(*around) == [("MOV R40, RZ", [40])]
    by_operand = [FIRST, "BRA.U !UP0, 0x30", WAIT.format(0), "MOV R40, RZ"]
    assert found(*by_operand) == [("MOV R40, RZ", [40])]
    spin = [FIRST, "@!P0 BRA 0x50", WAIT.format(0), "MOV R40, RZ", "EXIT", "@!P0 BRA 0x50"]
    assert found(*spin, "BRA 0x20") == []
    assert found(*spin, "BRA 0x30") == [("MOV R40, RZ", [40])]
    assert found(FIRST, "@P0 EXIT", WAIT.format(0), "MOV R40, RZ") == []
    # Nothing leads to what stands behind a jump.
    assert found(FIRST, "BRA 0x30", "MOV R40, RZ", WAIT.format(0)) == []


def test_what_may_run_at_a_place():
    program = [(16 * at, text) for at, text in enumerate((FIRST, SECOND, WAIT.format(1), "EXIT"))]
    running = [hazards.count_running(program, address) for address, _ in program]
    assert running == [0, 1, 2, 1]


def test_a_register_counts_once():
    program = [(16 * at, text) for at, text in enumerate((FIRST, "MOV R40, RZ", "MOV R40, R1"))]
    both = hazards.find_hazards(program)
    assert (len(both), hazards.count_registers(both)) == (2, 1)
    assert str(both[0]) == f"R40: 0x10 MOV R40, RZ while 0x0 {FIRST} may run"


def test_code_without_wgmma_has_none():
    assert found("HMMA.16816.F32.BF16 R12, R4, R8, R12", "MOV R4, R12") == []


@pytest.mark.parametrize("name", FAILED)
def test_kernels_that_failed_on_a_gpu_are_named(name):
    """In each the next block's decoding writes A of seven of eight products."""
    assert hazards.count_registers(hazards.find_hazards(recorded(name))) == 28


@pytest.mark.parametrize("name", RIGHT)
def test_kernels_that_were_right_on_a_gpu_pass(name):
    code = recorded(name)
    assert sum(sass.parse(*each).is_wgmma for each in code) >= 8
    assert hazards.find_hazards(code) == ()


@pytest.mark.parametrize("name", FAILED + RIGHT)
def test_every_instruction_of_the_kernels_is_known(name):
    assert {
        each.name for each in (sass.parse(*line) for line in recorded(name)) if not each.is_known
    } == set()


def test_code_that_an_indirect_branch_leads_to_is_searched():
    branch, leave = "BRX R2 -0x10", "EXIT"
    assert found(branch, leave, FIRST, "MOV R40, RZ") == [("MOV R40, RZ", [40])]
    with pytest.raises(ValueError, match=r"an indirect branch, .* 0x10 BRX R2 -0x10"):
        found(FIRST, branch, leave, "MOV R1, RZ")
