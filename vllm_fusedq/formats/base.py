"""The rules that every checkpoint format obeys: which modules are quantized, what is refused.

A format's tensor names, config keys and bit order live in its own files; what a quantized layer is
as data lives in `layer.py`, what a packing answers in `packing.py`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Self

from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.checkpoint.safetensors_header import PLAIN_DTYPES, TensorInfo
from vllm_fusedq.errors import UnsupportedCheckpoint
from vllm_fusedq.formats.headers import describe_layer
from vllm_fusedq.formats.kv_cache import (
    KV_CACHE_SCHEME,
    KvTensors,
    kv_tensor,
    kv_tensors,
    scheme_deviation,
)
from vllm_fusedq.formats.layer import LayerFormat, Scheme
from vllm_fusedq.formats.shared.refusals import (
    check_expert,
    check_plain,
    check_stacks,
    packed_though_excluded,
    quantized_router,
    quantized_vocabulary,
    tied_though_quantized,
)
from vllm_fusedq.formats.shared.rows import Support
from vllm_fusedq.formats.shared.vocabulary import is_head, is_input_embedding, is_lm_head, is_tied
from vllm_fusedq.names import expert_module, with_other_prefix, without_prefix

USE_VLLM = "drop `--quantization fusedq` to use vLLM's own support, if it has any"

ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})

_BLOCK = re.compile(r"(.*?)\.\d+(?=\.|$)")


class CheckpointFormat(ABC):
    """One quantization method of checkpoints. Plain data inside: instances can be pickled.

    A subclass names its tensors and config keys and answers `claims` and `scheme`, whose packing
    may be another method's; headers and config together decide here whether a module counts as
    quantized.
    """

    name: ClassVar[str]
    other_names: ClassVar[tuple[str, ...]] = ()
    """What configs called the same method before."""
    config_sources: ClassVar[tuple[str, ...]] = ()
    """Where this method's config may come from without naming the method."""
    markers: ClassVar[frozenset[str]]
    """Tensor suffixes that only a quantized module has."""
    reads_stacks: ClassVar[bool] = False
    """Whether a tool stores its tensors of all experts of a layer at once, by a first dimension."""
    leftovers: ClassVar[frozenset[str]] = frozenset()
    """Further suffixes that show, without a weight, that a module was quantized once."""
    support: ClassVar[tuple[Support, ...]]
    """What users are told of the method, a row for each kind of checkpoint."""
    exclusion: ClassVar[str]
    """What in the config excludes modules, for messages."""
    head_setting: ClassVar[str] = ""
    """What in the config says that an lm_head is quantized; empty where nothing can."""
    embedding_setting: ClassVar[str] = ""
    """What in the config says that an input embedding is quantized; empty where nothing can."""
    grouping: ClassVar[str] = "group_size"
    """What sets the group size where such models are quantized, for messages."""
    without_order: ClassVar[str] = "without activation reordering"
    """How such a model is quantized without activation reordering, for messages."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.quant_config
        self.excluded: list[str] = []

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Read the config of a checkpoint.

        Raises:
            UnsupportedCheckpoint: an option that concerns every layer is not supported, or no
                module holds packed tensors.
        """
        self = cls(checkpoint)
        self.check_config()
        check_stacks(self)
        if self.kv_cache_scheme and (deviation := scheme_deviation(self.kv_cache_scheme)):
            raise self.refusal(
                f"{KV_CACHE_SCHEME} with {deviation}",
                "a KV cache of 8-bit floats, symmetric, one static scale per tensor",
                f"set {KV_CACHE_SCHEME} to null in the config and remove the scales to serve with "
                f"a 16-bit KV cache, or {USE_VLLM}",
            )
        if not self.packed:
            raise self.refusal(
                f"no module with packed tensors ({', '.join(sorted(self.markers))})",
                "checkpoints that are already quantized",
                "quantize the model first, or serve it without `--quantization fusedq`",
            )
        return self

    @abstractmethod
    def check_config(self) -> None:
        """Raise UnsupportedCheckpoint for options that concern the whole checkpoint."""

    @abstractmethod
    def claims(self, module: str) -> bool:
        """Whether the config says that this linear module is quantized."""

    def lists(self, module: str) -> bool:
        """Whether the config excludes this name, matched as the method's tools do."""
        return False

    def claims_head(self, module: str) -> bool:
        """Whether the config says that this lm_head is quantized; few methods can."""
        return False

    def claims_embedding(self, module: str) -> bool:
        """Whether the config says that this input embedding is quantized; few methods can."""
        return False

    @abstractmethod
    def scheme(self, module: str) -> Scheme:
        """The scheme of a claimed module; PreflightError where the config refuses this module."""

    def activations(self, module: str) -> str:
        """How the config quantizes the activations of a claimed module, in words; "" if not."""
        return ""

    def modules(self) -> list[str]:
        """Modules of the checkpoint that are quantized, or that the config says are."""
        found = []
        for module, stored in self.checkpoint.modules().items():
            weight = stored.get("weight")
            matrix = weight is not None and len(weight.shape) == 2
            damaged = weight is None and self.leftovers & stored.keys()
            if module in self.packed or ((matrix or damaged) and self.claims_any(module)):
                found.append(module)
        return found

    def layer_of(self, module: str) -> LayerFormat | None:
        """Describe a linear module under its checkpoint name; None if it is left unquantized.

        Raises:
            PreflightError: the module cannot run fused; carries all of its problems.
        """
        stored = self.checkpoint.modules().get(module, {})
        packed = self.packed.get(module, [])
        if packed:
            check_expert(module)
            self._check_router(module)
        if is_head(module):
            return self._head_for(module, stored, packed)
        if not self.claims(module) or (not packed and self.is_router(module)):
            if not packed:
                return None
            raise packed_though_excluded(module, packed, self.exclusion)
        if not packed:
            check_plain(module, stored, self.exclusion)
            return None
        return self._described(module, stored)

    def claims_any(self, module: str) -> bool:
        """Whether the config says that a linear module, lm_head or embedding is quantized."""
        if is_lm_head(module):
            return self.claims_head(module)
        if is_input_embedding(module):
            return self.claims_embedding(module)
        return not is_head(module) and self.claims(module)

    def is_router(self, module: str) -> bool:
        """Whether it chooses among experts or weighs shared ones; no tool quantizes those."""
        parent, _, name = module.rpartition(".")
        return name in ROUTERS and parent in self._with_experts

    def excludes(self, module: str) -> bool:
        """Whether the config leaves a module unquantized, by its name or with another prefix."""
        return self.lists(module) or self.listed_as(module) is not None

    def listed_as(self, module: str) -> str | None:
        """The name with another prefix by which the config excludes a module that is stored whole.

        Tools moved language models below others: a list may begin its names as the file does not.
        """
        weight = self.checkpoint.modules().get(module, {}).get("weight")
        plain = weight is not None and weight.dtype in PLAIN_DTYPES
        whole = plain or module in self.packed
        name = with_other_prefix(module, self._unprefixed) if whole else None
        return None if name is None or self.lists(module) else name

    def refusal(self, found: str, supported: str, fix: str = USE_VLLM) -> UnsupportedCheckpoint:
        return UnsupportedCheckpoint(
            f"{self.checkpoint.path}: found {found}; supported by {self.name}: {supported}; {fix}"
        )

    def check_group_size(self, found: object) -> int:
        """-1 (all of K) or a positive multiple of 8; refuses anything else."""
        if type(found) is int and (found == -1 or (found > 0 and found % 8 == 0)):
            return found
        raise self.refusal(
            f"group_size {found!r:.80}",
            "group_size -1 or a multiple of 8",
            f"quantize again with {self.grouping} 32, 64 or 128, or {USE_VLLM}",
        )

    def check_names(self, key: str, section: Mapping[str, Any] | None = None) -> list[str]:
        """A config entry that lists names; absent and null are an empty list."""
        found = (self.config if section is None else section).get(key) or []
        if isinstance(found, list) and all(isinstance(name, str) and name for name in found):
            return found
        raise self.refusal(f"{key} {found!r:.80}", f"{key} as a list of names")

    def check_regex(self, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern)
        except re.error as error:
            raise self.refusal(
                f"the regex {pattern!r:.80} ({error})",
                "regexes of Python's re",
                "correct the config",
            ) from error

    def block_of(self, module: str) -> str | None:
        """The list of repeated blocks that a module lies in ("model.layers"), None outside one."""
        match = _BLOCK.match(module)
        return match.group(1) if match else None

    @property
    def tensor_names(self) -> frozenset[str]:
        """Suffixes of tensors that vLLM's code for a model may know by other names."""
        return self.markers

    @property
    def kv_cache_scheme(self) -> dict[str, Any] | None:
        """How the config quantizes the KV cache, in compressed-tensors' words; None if not."""
        return self.config.get(KV_CACHE_SCHEME) or None

    @cached_property
    def kv_tensors(self) -> KvTensors:
        """The scales of the KV cache by the attention module that they belong to."""
        return kv_tensors(self.checkpoint)

    @cached_property
    def packed(self) -> dict[str, list[str]]:
        """The modules that hold packed tensors, and the suffixes that show it."""
        found = {m: self.markers & stored.keys() for m, stored in self.checkpoint.modules().items()}
        return {module: sorted(suffixes) for module, suffixes in found.items() if suffixes}

    @cached_property
    def expert_modules(self) -> list[str]:
        """Those of single experts, in the order of the files."""
        return [module for module in self.modules() if expert_module(module)]

    @cached_property
    def quantized_blocks(self) -> frozenset[str]:
        """The lists of repeated blocks of which at least one module is packed."""
        return frozenset(block for m in self.packed if (block := self.block_of(m)) is not None)

    @cached_property
    def _unprefixed(self) -> dict[str, str]:
        """The names in `excluded` by what they are without their prefix."""
        return {without_prefix(name): name for name in self.excluded}

    @cached_property
    def _with_experts(self) -> frozenset[str]:
        """The blocks that hold experts, like model.layers.0.mlp."""
        parts = (module.split(".") for module in self.checkpoint.modules())
        return frozenset(
            ".".join(names[: names.index("experts")]) for names in parts if "experts" in names
        )

    def _check_router(self, module: str) -> None:
        if self.is_router(module):
            raise quantized_router(module, self.exclusion)

    def _head_for(
        self, module: str, stored: Mapping[str, TensorInfo], packed: list[str]
    ) -> LayerFormat | None:
        """`layer_of` an lm_head or an embedding."""
        lm_head, claimed = is_lm_head(module), self.claims_any(module)
        setting = self.head_setting if lm_head else self.embedding_setting
        if not packed:
            # A tied model has no lm_head, whatever its config says of it
            if claimed and module in self.modules() and not (lm_head and is_tied(self.checkpoint)):
                check_plain(module, stored, setting)
            return None
        if claimed:
            if lm_head and is_tied(self.checkpoint):
                raise tied_though_quantized(module)
            return self._described(module, stored)
        if setting and (lm_head or is_input_embedding(module)):
            raise packed_though_excluded(module, packed, setting)
        raise quantized_vocabulary(module, packed, USE_VLLM)

    def _described(self, module: str, stored: Mapping[str, TensorInfo]) -> LayerFormat:
        scheme = self.scheme(module)
        # Some tools name the KV cache's scales after the layers that make keys and values
        own = {name: info for name, info in stored.items() if not kv_tensor(f"{module}.{name}")}
        layer = describe_layer(module, own, scheme, format=self.name, exclusion=self.exclusion)
        return replace(layer, activations=self.activations(module))
