"""Lets tools watch the JIT: Triton 3.6 cannot describe a function that is a constexpr argument.

A hook in `triton.knobs.runtime` is told of a compilation by a JSON description, which Triton 3.6
fails to write (TypeError) where an argument is a `@triton.jit` function, as the decoder is. vLLM
sets such a hook once its workers are warm: a compilation then ended the engine instead of being
logged.
"""

from typing import TypeVar

import triton

Kernel = TypeVar("Kernel")


def named_for_hooks(kernel: Kernel) -> Kernel:
    """The kernel itself, whose hooks are told a function's name in its place."""
    if not isinstance(kernel, triton.runtime.JITFunction):
        return kernel  # The interpreter compiles nothing
    call_hook = kernel._call_hook

    def call_named(hook: object, *arguments: object) -> object:
        # Which of them are the constants differs between releases
        return call_hook(hook, *(_named(argument) for argument in arguments))

    kernel._call_hook = call_named
    return kernel


def _named(argument: object) -> object:
    if not isinstance(argument, dict):
        return argument
    return {
        key: f"{value.module}:{value.fn.__qualname__}"
        if isinstance(value, triton.runtime.JITFunction)
        else value
        for key, value in argument.items()
    }
