"""Where each SASS instruction of a function may lead, and which of its branches close a loop."""

import re
from collections.abc import Sequence

from fusedq_kernels.audit.sass import Instruction

_TARGET = re.compile(r"\b0x([0-9a-f]+)$")
_JUMPS = frozenset({"BRA", "JMP"})
_BRANCHES = _JUMPS | {"CALL", "WARPSYNC"}
_LEAVES = frozenset({"EXIT", "RET", "KILL"})
_INDIRECT = frozenset({"BRX", "JMX"})


def successors(program: Sequence[Instruction]) -> list[list[int]]:
    """By place in the program; a call leads to its target and to what follows it.

    An indirect branch, whose table the text does not show, leads to every other branch's target and
    behind everything that never goes on.
    """
    places = {each.address: at for at, each in enumerate(program)}
    found: list[list[int]] = []
    indirect = [at for at, each in enumerate(program) if is_indirect(each)]
    for at, each in enumerate(program):
        # A jump may have its condition among its operands.
        always = not each.predicated and (
            each.name in _LEAVES or (each.name in _JUMPS and len(each.operands) == 1)
        )
        following = [] if always or at + 1 == len(program) else [at + 1]
        target = _TARGET.search(each.text) if each.name in _BRANCHES else None
        if target:
            following.append(places[int(target[1], 16)])
        found.append([] if at in indirect else following)
    if indirect:
        ends = (at + 1 for at, to in enumerate(found[:-1]) if at + 1 not in to)
        entries = sorted({*ends, *(each for to in found for each in to[1:])})
        for at in indirect:
            found[at] = entries
    return found


def is_indirect(instruction: Instruction) -> bool:
    """Whether its text does not tell where it leads."""
    return instruction.name in _INDIRECT


def loops(program: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last place of each loop, the last one being the branch back.

    A branch back closes a loop if no way leads to it but through its target. One that returns from
    a piece of the loop which stands out of line, as the wait for a barrier does, closes none.
    """
    following = successors(program)
    backward = [(to, at) for at, each in enumerate(following) for to in each if to <= at]
    return [(to, at) for to, at in backward if at not in _reached(following, without=to)]


def _reached(following: Sequence[Sequence[int]], without: int) -> set[int]:
    """The places that the entry leads to if the program had no instruction at `without`."""
    reached, ahead = set(), [0]
    while ahead:
        at = ahead.pop()
        if at != without and at not in reached:
            reached.add(at)
            ahead += following[at]
    return reached
