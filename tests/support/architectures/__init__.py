"""Tiny models of vLLM's decoders that transformers can make, by a name for people."""

from architectures.base import Architecture
from architectures.dense import DENSE
from architectures.hybrid import HYBRID
from architectures.images import IMAGES

ARCHITECTURES: dict[str, Architecture] = DENSE | HYBRID | IMAGES

__all__ = ["ARCHITECTURES", "Architecture"]
