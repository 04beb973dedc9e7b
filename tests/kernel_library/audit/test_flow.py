"""Ways through hand-made code, 16 bytes to an instruction."""

import pytest

from fusedq_kernels.audit.compile import main_loop
from fusedq_kernels.audit.flow import loops, successors
from fusedq_kernels.audit.sass import parse

PRODUCT = "HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR16], R24, gsb0"
# A K loop whose wait for a barrier stands out of line, behind the exit, within a loop of segments.
KERNEL = (
    "NOP",
    "MOV R4, RZ",
    "MOV R5, RZ",
    "@!P0 BRA 0x90",
    PRODUCT,
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "@P1 BRA 0x20",
    "@P2 BRA 0x10",
    "EXIT",
    "@!P0 BRA 0x90",
    "BRA 0x40",
)


def test_a_way_back_from_out_of_line_closes_no_loop() -> None:
    program = [parse(16 * at, text) for at, text in enumerate(KERNEL)]
    assert loops(program) == [(2, 6), (1, 7), (9, 9)]


def test_the_main_loop_is_the_innermost_with_the_products() -> None:
    lines = [(16 * at, text) for at, text in enumerate(KERNEL)]
    assert main_loop(lines) == lines[2:7]
    assert main_loop(lines[:2]) == []


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("MOV R4, RZ", [1]),
        ("BRA 0x20", [2]),
        ("@!P0 BRA 0x20", [1, 2]),
        ("BRA.U !UP0, 0x20", [1, 2]),
        ("EXIT", []),
        ("@P0 EXIT", [1]),
        ("RET.REL.NODEC R20 0x0", []),
        ("CALL.REL.NOINC 0x20", [1, 2]),
        ("BSSY B0, 0x20", [1]),
        ("LDC R4, c[0x0][0x20]", [1]),
    ],
)
def test_where_an_instruction_leads(text, places) -> None:
    program = [parse(0, text), parse(16, "NOP"), parse(32, "EXIT")]
    assert successors(program)[0] == places


def test_an_indirect_branch_leads_to_every_piece_of_code() -> None:
    texts = ("NOP", "BRX R2 -0x40", "MOV R1, R2", "EXIT", "@P0 BRA 0x20", "EXIT", "NOP")
    program = [parse(16 * at, text) for at, text in enumerate(texts)]
    # Behind itself and both ends, and where the other branch leads.
    assert successors(program) == [[1], [2, 4, 6], [3], [], [5, 2], [], []]
