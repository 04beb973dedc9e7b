"""Every error that a user can cause.

FusedQError
├── CheckpointError          a file is missing, unreadable, damaged or unsafe
│   └── RepositoryError      a repository on the hub is out of reach, unknown or closed
├── UnsupportedCheckpoint    the checkpoint as a whole uses something that is not supported
├── PreflightError           one or more layers cannot run fused (`.problems`, one per layer)
├── WeightLoadError          a tensor does not fit its layer, is missing, or holds bad values
├── KernelError              a kernel does not run here, or does not compute what PyTorch does
├── OutputError              what was asked for cannot be written: no room, no permission
├── ComparisonError          two models, or the texts they are given, allow no comparison
├── EngineError              vLLM's engine ended without an answer
├── MissingExtra             an optional dependency that a command needs is not installed
└── SettingsError            a wrong `--additional-config '{"fusedq": ...}'`

All derive from RuntimeError: pydantic would wrap a ValueError raised while vLLM builds its
configuration, and bury the message.
"""

from collections.abc import Sequence
from dataclasses import dataclass


class FusedQError(RuntimeError):
    """Base of all errors that this package raises for its user."""


class CheckpointError(FusedQError):
    """A checkpoint file is missing, unreadable, damaged or unsafe to read."""


class RepositoryError(CheckpointError):
    """A repository on the Hugging Face hub is out of reach, does not exist or is closed."""


class UnsupportedCheckpoint(FusedQError):
    """The checkpoint uses a method or an option that is not supported."""


class WeightLoadError(FusedQError):
    """A checkpoint tensor does not fit its layer or holds values that cannot be right."""


class KernelError(FusedQError):
    """A kernel that a layer needs does not run on this machine, or gives wrong results on it."""


class OutputError(FusedQError):
    """A result cannot be written; says nothing about the checkpoint."""


class ComparisonError(FusedQError):
    """Two models, or the texts that they are given, allow no comparison."""


class EngineError(FusedQError):
    """vLLM's engine ended without an answer: no memory, or a model that it does not take."""


class DeviceMemoryError(FusedQError):
    """What a command was asked to measure does not fit the memory of the device."""


class MissingExtra(FusedQError):
    """An optional dependency that a command needs is not installed."""


class SettingsError(FusedQError):
    """The fusedq section of vLLM's additional config is wrong."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why one layer is refused: what was found, what is supported, what to do."""

    layer: str
    found: str
    supported: str
    fix: str

    def __str__(self) -> str:
        layer = self.layer or "tensors without a module's name"
        return f"{layer}: found {self.found}; supported: {self.supported}; {self.fix}"


class PreflightError(FusedQError):
    """One or more layers cannot run fused; carries every problem, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' * (count != 1)} in this checkpoint:\n{lines}")

    @classmethod
    def single(cls, layer: str, found: str, supported: str, fix: str) -> "PreflightError":
        """The error of one problem."""
        return cls([Problem(layer, found, supported, fix)])

    def __reduce__(self) -> tuple[type["PreflightError"], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)
