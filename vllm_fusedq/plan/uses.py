"""What is done with a weight, by which kernel and in which launches.

Nothing else of this package asks a kernel's record for a launch.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusedq_kernels.call import Call
from fusedq_kernels.catalogue import KERNELS, Kernel, Op
from fusedq_kernels.types import DeviceSpec, GemmShape, Launch

SHOWN_TOKENS = {"decode": 1, "prefill": 2048}
"""For which numbers of tokens a plan shows the launch: a sequence's next one, a long prompt."""


@dataclass(frozen=True, slots=True)
class Use:
    """The work of operator `op` with one weight on one device.

    `call` is what the operator is told, the kernel included. `launches` are those that a plan
    shows, each with its number of tokens: of `SHOWN_TOKENS`, and the fewest that reach another
    kernel's. `workspace_bytes` is the most GPU memory that any number of tokens takes beside
    tokens and outputs.
    """

    op: Op
    call: Call
    device: DeviceSpec
    launches: tuple[tuple[int, Launch], ...]
    workspace_bytes: int

    @classmethod
    def of(cls, call: Call, device: DeviceSpec, op: Op | None = None) -> Use:
        """A call of a kernel that `catalogue.refusals` has passed; `op` is the kernel's own."""
        kernel, problem = KERNELS[call.kernel], (call.n, call.k, call.spec, device, call.policy)
        launches = {tokens: _launch(call, device, tokens) for tokens in SHOWN_TOKENS.values()}
        workspace = kernel.most_scratch(*problem)
        if (other := kernel.beside(*problem)) is not None:
            launches[other.min_tokens] = other.launch
            workspace = max(workspace, _scratch_bytes(call, other.launch, other.min_tokens))
        return cls(op or kernel.op, call, device, tuple(sorted(launches.items())), workspace)

    @property
    def kernel(self) -> Kernel:
        return KERNELS[self.call.kernel]

    @property
    def beside(self) -> tuple[int, Launch] | None:
        """The launch of another kernel that measured rows lead to, and the fewest tokens."""
        return next((each for each in self.launches if each[1].kernel != self.call.kernel), None)

    def launch(self, tokens: int) -> Launch:
        """What so many tokens run."""
        return _launch(self.call, self.device, tokens)

    def scratch_bytes(self, tokens: int) -> int:
        """The largest of what that launch allocates beside 16-bit tokens and outputs."""
        return _scratch_bytes(self.call, self.launch(tokens), tokens)


def _launch(call: Call, device: DeviceSpec, tokens: int) -> Launch:
    shape = GemmShape(tokens, call.n, call.k)
    return KERNELS[call.kernel].launch(shape, call.spec, device, call.policy)


def _scratch_bytes(call: Call, launch: Launch, tokens: int) -> int:
    return KERNELS[launch.kernel].scratch_bytes(launch, GemmShape(tokens, call.n, call.k))
