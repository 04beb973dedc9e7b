"""torchvision's names alone, for engines where models that also see images read text.

vLLM's files of such models import it, and its build for CPUs is on no package index.
"""

import sys
from enum import Enum
from types import ModuleType
from typing import ClassVar


class _StandIn(ModuleType):
    """A module in which every name is an empty class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


__version__ = "0.28.0"
MODES = "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS"
SUBMODULES = "io ops transforms transforms.functional transforms.v2 transforms.v2.functional"

for _name in SUBMODULES.split():
    _module = _StandIn(f"{__name__}.{_name}")
    _module.InterpolationMode = Enum("InterpolationMode", MODES)
    sys.modules[_module.__name__] = _module
    _parent, _, _last = _module.__name__.rpartition(".")
    setattr(sys.modules[_parent], _last, _module)
