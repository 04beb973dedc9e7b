"""One deliberate fault."""

from typing import NamedTuple


class Fault(NamedTuple):
    """`old`, which occurs once in `file`, becomes `new`; then at least one of `tests` fails."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def put_into(self, text: str) -> str:
        """The text of the file with the fault; ValueError where it has no single place for it."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} has {count} places for the fault: {self.what}")
        return text.replace(self.old, self.new)
