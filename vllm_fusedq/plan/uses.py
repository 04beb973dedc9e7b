"""What is done with a weight, by which kernel and in which launches.

Nothing else of this package asks a kernel's record for a launch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusedq_kernels.call import Call, Stacks
from fusedq_kernels.catalogue import KERNELS, Kernel, Op
from fusedq_kernels.choose.experts import Load
from fusedq_kernels.types import DeviceSpec, GemmShape, Launch

# More than any batch has.
_ANY_TOKENS = 1 << 20
SHOWN_TOKENS = {"decode": 1, "prefill": 2048}
"""For which numbers of tokens a plan shows the launch: a sequence's next one, a long prompt."""


@dataclass(frozen=True, slots=True)
class Together:
    """What a weight of experts runs together with: w13 (`is_up`) or w2 of both `stacks`.

    A token asks `top_k` of `all_experts`, those of the layer on all ranks together; `ordered` says
    whether w13 and w2 have an activation order.
    """

    stacks: Stacks
    is_up: bool
    top_k: int
    all_experts: int
    ordered: tuple[bool, bool]


@dataclass(frozen=True, slots=True)
class Use:
    """The work of operator `op` with one weight on one device.

    `call` is what the operator is told, the kernel included. `launches` are those that a plan
    shows, each with its number of tokens: of `SHOWN_TOKENS`, and the fewest that reach another
    kernel's. `workspace_bytes` is the most GPU memory that any number of tokens takes beside
    tokens and outputs. A weight of experts has those of both `together`.
    """

    op: Op
    call: Call
    device: DeviceSpec
    launches: tuple[tuple[int, Launch], ...]
    workspace_bytes: int
    together: Together | None = None

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

    def joined(self, together: Together) -> Use:
        """The same once the other weight is known; all is left to a kernel without launches."""
        layer, kernel, device = together, self.kernel, self.device
        if kernel.experts_launch is None:
            return replace(self, together=together)
        sizes = (layer.stacks, layer.top_k, layer.all_experts, device)
        use = replace(
            self,
            together=together,
            workspace_bytes=kernel.expert_scratch(*sizes, _ANY_TOKENS, layer.ordered),
        )
        shown = sorted(SHOWN_TOKENS.values())
        return replace(use, launches=tuple((tokens, use.launch(tokens)) for tokens in shown))

    @property
    def kernel(self) -> Kernel:
        return KERNELS[self.call.kernel]

    @property
    def beside(self) -> tuple[int, Launch] | None:
        """The launch of another kernel that measured rows lead to, and the fewest tokens."""
        return next((each for each in self.launches if each[1].kernel != self.call.kernel), None)

    def launch(self, tokens: int) -> Launch:
        """What so many tokens run; of experts, this weight's part of it."""
        if (layer := self.together) is not None:
            load = Load(tokens, layer.top_k, layer.all_experts)
            if launch := self.kernel.expert_launch(layer.stacks, load, self.device):
                tile = launch.up if layer.is_up else launch.down
                return Launch(self.call.kernel, tile, launch.source)
        return _launch(self.call, self.device, tokens)

    def scratch_bytes(self, tokens: int) -> int:
        """The largest of what that launch allocates beside 16-bit tokens and outputs.

        Of experts, at most: what all that is between their products takes.
        """
        if (layer := self.together) is not None and self.kernel.experts_launch is not None:
            sizes = (layer.stacks, layer.top_k, layer.all_experts, self.device)
            return self.kernel.expert_scratch(*sizes, tokens, layer.ordered)
        return _scratch_bytes(self.call, self.launch(tokens), tokens)


def _launch(call: Call, device: DeviceSpec, tokens: int) -> Launch:
    shape = GemmShape(tokens, call.n, call.k)
    return KERNELS[call.kernel].launch(shape, call.spec, device, call.policy)


def _scratch_bytes(call: Call, launch: Launch, tokens: int) -> int:
    return KERNELS[launch.kernel].scratch_bytes(launch, GemmShape(tokens, call.n, call.k))
