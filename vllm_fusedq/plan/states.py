"""Bytes of the state that a linear-attention, Mamba or convolution layer keeps of a sequence.

The shapes are those of vLLM's `MambaStateShapeCalculator`: the last inputs of a short convolution,
`kernel - 1` of them, and a recurrent matrix per head. vLLM keeps the convolution's at the
activations' dtype and the recurrence at `recurrent_bytes`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.plan.attention import setting

# Blocks of a sequence where prefixes are cached, vLLM's default: the last state and the one before
_COPIES = 2
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Nemotron-H is exact with float32 only, which vLLM takes unless its config says otherwise
_FLOAT32_MARK = "hybrid_override_pattern"
_STATED_DTYPES = ("mamba_ssm_dtype", "mamba_ssm_cache_dtype")


@dataclass(frozen=True, slots=True)
class State:
    """`size` bytes on one rank; vLLM holds `copies` of it for a sequence, one where it caches no
    prefixes."""

    size: int
    copies: int


@dataclass(frozen=True, slots=True)
class _Shape:
    """Elements of the convolution's inputs and of the recurrence on one rank."""

    convolution: int
    recurrent: int
    copies: int = _COPIES


def state_of(checkpoint: Checkpoint, tp_size: int, act_bytes: int, on_cpu: bool) -> State | None:
    """The state of one layer; None for a recurrence whose shapes are not known here."""
    for key, shape_of in _SHAPES.items():
        if setting(checkpoint, key) is not None:
            if (shape := shape_of(checkpoint, tp_size)) is None:
                return None
            recurrent = shape.recurrent * _recurrent_bytes(checkpoint, act_bytes, on_cpu)
            return State(shape.convolution * act_bytes + recurrent, shape.copies)
    return None


def _recurrent_bytes(checkpoint: Checkpoint, act_bytes: int, on_cpu: bool) -> int:
    stated = next((s for key in _STATED_DTYPES if (s := setting(checkpoint, key))), None)
    if stated in _DTYPE_BYTES:
        return _DTYPE_BYTES[stated]
    exact = on_cpu or setting(checkpoint, _FLOAT32_MARK) is not None
    return 4 if exact else act_bytes


def _gated_delta_net(checkpoint: Checkpoint, tp: int) -> _Shape:
    keys = setting(checkpoint, "linear_num_key_heads", 16)
    values = setting(checkpoint, "linear_num_value_heads", 32)
    key_dim = setting(checkpoint, "linear_key_head_dim", 128)
    value_dim = setting(checkpoint, "linear_value_head_dim", 128)
    channels = (2 * keys * key_dim + values * value_dim) // tp
    kernel = setting(checkpoint, "linear_conv_kernel_dim", 4)
    return _Shape(channels * (kernel - 1), values // tp * value_dim * key_dim)


def _mamba_2(
    heads_key: str, dim_key: str, state_key: str, kernel_key: str, groups_key: str
) -> Callable[[Checkpoint, int], _Shape | None]:
    """A Mamba-2 mixer whose config has these keys; ranks that outnumber its groups repeat them."""

    def shape(checkpoint: Checkpoint, tp: int) -> _Shape | None:
        heads, state = checkpoint.number(heads_key), checkpoint.number(state_key)
        groups, kernel = setting(checkpoint, groups_key, 1), setting(checkpoint, kernel_key, 4)
        inner = _inner_size(checkpoint, heads_key, dim_key)
        if heads is None or state is None or inner is None:
            return None
        groups += 0 if groups % tp == 0 else tp - groups
        channels = (inner + 2 * groups * state) // tp
        # Beside them a checkpoint inside the prompt
        return _Shape(channels * (kernel - 1), heads // tp * (inner // heads) * state, _COPIES + 1)

    return shape


def _inner_size(checkpoint: Checkpoint, heads_key: str, dim_key: str) -> int | None:
    heads, dim = checkpoint.number(heads_key), checkpoint.number(dim_key)
    if (stated := checkpoint.number("mamba_d_ssm", "intermediate_size_ssm")) is not None:
        return stated
    return heads * dim if heads and dim else _expanded(checkpoint)


def _expanded(checkpoint: Checkpoint) -> int | None:
    hidden = checkpoint.number("hidden_size")
    factor = setting(checkpoint, "mamba_expand", setting(checkpoint, "expand", 2))
    return hidden and int(factor * hidden)


def _mamba_1(state_key: str, kernel_key: str) -> Callable[[Checkpoint, int], _Shape | None]:
    def shape(checkpoint: Checkpoint, tp: int) -> _Shape | None:
        inner = _expanded(checkpoint)
        state, kernel = checkpoint.number(state_key), setting(checkpoint, kernel_key, 4)
        if inner is None or state is None:
            return None
        return _Shape(inner // tp * (kernel - 1), inner // tp * state)

    return shape


def _short_convolution(checkpoint: Checkpoint, tp: int) -> _Shape | None:
    channels = checkpoint.number("conv_dim", "hidden_size")
    kernel = setting(checkpoint, "conv_L_cache", 3)
    return None if channels is None else _Shape(channels // tp * (kernel - 1), 0)


# By a key that only configs of the family have, the more telling first
_SHAPES: dict[str, Callable[[Checkpoint, int], _Shape | None]] = {
    "linear_num_value_heads": _gated_delta_net,
    "conv_L_cache": _short_convolution,
    "mamba_num_heads": _mamba_2(
        "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "conv_kernel", "n_groups"
    ),
    "mamba_n_heads": _mamba_2(
        "mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_d_conv", "mamba_n_groups"
    ),
    "mamba_d_state": _mamba_1("mamba_d_state", "mamba_d_conv"),
    "n_groups": _mamba_2("num_heads", "head_dim", "state_size", "conv_kernel", "n_groups"),
    "state_size": _mamba_1("state_size", "conv_kernel"),
}
