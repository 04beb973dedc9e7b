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

from fusedq_kernels.audit.sass import Instruction, Wgmma, parse, read, wgmma_of, written

_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
_TARGET = re.compile(r"0x([0-9a-f]+)$")
_JUMPS = frozenset({"BRA", "JMP"})
_BRANCHES = _JUMPS | {"CALL", "WARPSYNC"}
_LEAVES = frozenset({"EXIT", "RET", "KILL"})
_INDIRECT = frozenset({"BRX", "JMX"})

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
        ValueError: a branch goes where its text does not tell.
    """
    program = [parse(address, text) for address, text in instructions]
    products = {at: wgmma_of(each) for at, each in enumerate(program) if each.is_wgmma}
    if not products:
        return ()
    return tuple(
        Hazard(touched, program[at], program[other])
        for at, running in enumerate(_running_before(program, products))
        for other in running
        if (touched := _touched(program[at], products.get(at), products[other]))
    )


def count_registers(hazards: Iterable[Hazard]) -> int:
    """How many registers they are about, each counted once."""
    registers = 0
    for hazard in hazards:
        registers |= hazard.registers
    return registers.bit_count()


def _touched(instruction: Instruction, product: Wgmma | None, running: Wgmma) -> int:
    """What of a running wgmma an instruction, itself a wgmma where `product` is one, must not."""
    used = running.a | running.accumulator
    if product is None:
        return written(instruction) & used | read(instruction) & running.accumulator
    if product.accumulator == running.accumulator:
        used = running.a
    return product.accumulator & used | product.a & running.accumulator


def _running_before(
    program: Sequence[Instruction], products: Mapping[int, Wgmma]
) -> list[_Running]:
    """What may run when each instruction begins."""
    successors = _successors(program)
    before: list[_Running | None] = [None] * len(program)
    before[0] = {}
    changed = [0]
    while changed:
        at = changed.pop()
        after = _after(program[at], at, products.get(at), before[at])
        for successor in successors[at]:
            known = before[successor]
            merged = after if known is None else _fewest(known, after)
            if merged != known:
                before[successor] = merged
                changed.append(successor)
    return [each or {} for each in before]


def _after(instruction: Instruction, at: int, product: Wgmma | None, before: _Running) -> _Running:
    if product is not None:
        return {each: groups + product.commits for each, groups in {**before, at: 0}.items()}
    wait = _WAIT.search(instruction.text)
    if wait is None:
        return before
    pending = int(wait[1], 16)
    return {each: groups for each, groups in before.items() if groups <= pending}


def _fewest(some: _Running, others: _Running) -> _Running:
    fewest = {**others, **some}
    return {each: min(groups, others.get(each, groups)) for each, groups in fewest.items()}


def _successors(program: Sequence[Instruction]) -> list[list[int]]:
    """The places where each instruction may lead; a call to its target and to what follows it."""
    places = {each.address: at for at, each in enumerate(program)}
    found = []
    for at, each in enumerate(program):
        if each.name in _INDIRECT:
            raise ValueError(f"an indirect branch, which the audit cannot follow: {each}")
        # A jump may have its condition among its operands.
        always = not each.predicated and (
            each.name in _LEAVES or (each.name in _JUMPS and len(each.operands) == 1)
        )
        following = [] if always or at + 1 == len(program) else [at + 1]
        target = _TARGET.search(each.text) if each.name in _BRANCHES else None
        if target:
            following.append(places[int(target[1], 16)])
        found.append(following)
    return found
