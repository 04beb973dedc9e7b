"""Registers that are touched while a wgmma may still be using them, in the machine code of sm_90.

A wgmma runs on while the warp goes on: until a wait retires its group it reads the registers of its
first operand and writes those of its sum (PTX ISA, asynchronous warpgroup matrix instructions).
What writes either, or reads the sum, meanwhile makes outputs wrong, other ones in each run. The PTX
may ask for that, and ptxas serialises the products where it notices. `find_hazards` lists what is
left, on every way through a function, the back edges of loops included; code without a wgmma has
none.

In SASS a wgmma with `gsb0` ends a group, `WARPGROUP.DEPBAR.LE gsb0, n` waits until at most n groups
run, and `WARPGROUP.ARRIVE` is the fence before one, which waits for none. Products that add to the
same registers follow each other and need no wait.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fusedq_kernels.audit.flow import is_indirect, successors
from fusedq_kernels.audit.sass import Instruction, parse, read, wgmma_of, written

_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")

# Of each wgmma that may run, by its place in the code: how many groups have been committed since,
# its own among them, on the way where they are fewest. A wait for n groups leaves those up to n.
_Running = Mapping[int, int]


class Hazard(NamedTuple):
    """`registers` of a running `wgmma` that `touched_by` writes or reads; a set as in `sass.py`."""

    registers: int
    touched_by: Instruction
    wgmma: Instruction

    def __str__(self) -> str:
        names = ", ".join(f"R{number}" for number in range(256) if self.registers >> number & 1)
        return f"{names}: {self.touched_by} while {self.wgmma} may run"


def find_hazards(instructions: Iterable[tuple[int, str]]) -> tuple[Hazard, ...]:
    """Every hazard of one function.

    Args:
        instructions: all of them in order, each address and text, as `compile.disassemble` yields.

    Raises:
        ValueError: a wgmma may run where a branch goes where its text does not tell.
    """
    program = [parse(*each) for each in instructions]
    if not any(each.is_wgmma for each in program):
        return ()
    return tuple(
        Hazard(touched, program[at], program[other])
        for at, running in enumerate(_running_before(program))
        for other in running
        if (touched := _touched(program[at], program[other]))
    )


def count_running(instructions: Iterable[tuple[int, str]], address: int) -> int:
    """How many wgmmas may run when the instruction at `address` of a function begins."""
    program = [parse(*each) for each in instructions]
    at = next(at for at, each in enumerate(program) if each.address == address)
    return len(_running_before(program)[at])


def count_registers(hazards: Iterable[Hazard]) -> int:
    """How many registers they are about, each counted once."""
    registers = 0
    for hazard in hazards:
        registers |= hazard.registers
    return registers.bit_count()


def _touched(instruction: Instruction, running: Instruction) -> int:
    """The registers of a running wgmma that an instruction touches and must not."""
    theirs = wgmma_of(running)
    used = theirs.a | theirs.accumulator
    if not instruction.is_wgmma:
        return written(instruction) & used | read(instruction) & theirs.accumulator
    own = wgmma_of(instruction)
    if own.accumulator == theirs.accumulator:
        used = theirs.a
    return own.accumulator & used | own.a & theirs.accumulator


def _running_before(program: Sequence[Instruction]) -> list[_Running]:
    """What may run when each instruction begins."""
    following = successors(program)
    before: list[_Running | None] = [None] * len(program)
    before[0] = {}
    changed = [0]
    while changed:
        at = changed.pop()
        after = _after(program[at], at, before[at])
        for successor in following[at]:
            known = before[successor]
            merged = after if known is None else _fewest(known, after)
            if merged != known:
                before[successor] = merged
                changed.append(successor)
    for each, running in zip(program, before, strict=True):
        if running and is_indirect(each):
            raise ValueError(f"an indirect branch, which the audit cannot follow: {each}")
    return [each or {} for each in before]


def _after(instruction: Instruction, at: int, before: _Running) -> _Running:
    if instruction.is_wgmma:
        commits = wgmma_of(instruction).commits
        return {each: groups + commits for each, groups in {**before, at: 0}.items()}
    wait = _WAIT.search(instruction.text)
    if wait is None:
        return before
    pending = int(wait[1], 16)
    return {each: groups for each, groups in before.items() if groups <= pending}


def _fewest(some: _Running, others: _Running) -> _Running:
    fewest = {**others, **some}
    return {each: min(groups, others.get(each, groups)) for each, groups in fewest.items()}
