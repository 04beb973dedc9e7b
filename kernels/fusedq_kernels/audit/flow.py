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

    Raises:
        ValueError: a branch goes where its text does not tell.
    """
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
