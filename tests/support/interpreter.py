"""Triton's interpreter at twice its speed."""

from __future__ import annotations

from triton.runtime import interpreter
from triton.runtime.interpreter import _LangPatchScope


def patch_once_per_launch() -> None:
    """Keep the interpreter from patching the language anew in each call of a device function.

    A launch has patched it for its kernel, and undoes that at its end. What a device function
    would set again is the same, unless its module knows the language by other modules.
    """
    patch = interpreter._patch_lang
    known: set[str] = set()

    def patch_what_is_not(fn: object) -> _LangPatchScope:
        modules = {
            value.__name__
            for value in fn.__globals__.values()
            if value is interpreter.tl or value is interpreter.tl.core
        }
        if modules and modules <= known:
            return _LangPatchScope()
        scope = patch(fn)
        known.update(modules)
        restore = scope.restore

        def undo() -> None:
            known.clear()
            restore()

        scope.restore = undo
        return scope

    interpreter._patch_lang = patch_what_is_not
