"""Proof that a layer receives what the checkpoint's files hold.

Before a layer sees a tensor, the code of vLLM's model class has had it, and may have permuted, cut
or changed it. A few elements at scattered places are compared with the file's own bytes: no rule
about models is needed, and a permutation of heads or rows cannot pass.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.plan.model_code import AS_STORED, WAY_OUT

logger = logging.getLogger("vllm.fusedq")

SAMPLES = 32
# Multiples of the golden ratio: near to even spacing, and in step with no row length
PLACES = np.arange(1, SAMPLES + 1) * 0.6180339887498949 % 1


@dataclass(slots=True)
class StoredTensors:
    """What the files of a checkpoint hold; `locate` finds a file by its name, None where it is not
    on this machine."""

    checkpoint: Checkpoint
    locate: Callable[[str], Path | None]
    _files: dict[str, np.ndarray | None] = field(default_factory=dict)

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Compare a tensor that a layer received with the stored one of that full name.

        Raises:
            WeightLoadError: it has another shape, or other elements at some of the places.
        """
        info = self.checkpoint.tensors.get(name)
        if info is None:
            return
        if _sizes(tensor.shape) != _sizes(info.shape):
            raise _rearranged(name, info, f"a tensor {list(tensor.shape)}", str(list(info.shape)))
        data = self._data(info.file)
        if data is None or not tensor.numel():
            return
        places = (PLACES * tensor.numel()).astype(np.int64)
        width = info.nbytes // tensor.numel()
        wanted = data[info.start + places[:, None] * width + np.arange(width)]
        elements = tensor.reshape(-1)[torch.from_numpy(places).to(tensor.device)].cpu()
        found = elements.view(torch.uint8).numpy().reshape(SAMPLES, -1)
        if wanted.shape == found.shape and np.array_equal(wanted, found):
            return
        same = int((wanted == found).all(axis=1).sum()) if wanted.shape == found.shape else 0
        changed = f"a tensor that differs from the file at {SAMPLES - same} of {SAMPLES} places"
        raise _rearranged(name, info, changed, str(list(info.shape)))

    def release(self) -> None:
        """Let go of the files; the next comparison maps them again."""
        self._files.clear()

    def _data(self, file: str) -> np.ndarray | None:
        """The bytes of a file, mapped."""
        if file not in self._files:
            path = self.locate(file)
            self._files[file] = None if path is None else np.memmap(path, np.uint8, "r")
            if path is None:
                logger.warning(
                    "%s: %s is not on this machine: what vLLM's model code hands to the layers is "
                    "compared with the header alone.",
                    *(self.checkpoint.path, file),
                )
        return self._files[file]


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without what moves no element: dimensions of one."""
    return tuple(size for size in shape if size != 1)


def _rearranged(name: str, info: TensorInfo, found: str, stored: str) -> WeightLoadError:
    return WeightLoadError(
        f"{name}: found {found}, where {info.file} holds {stored}: vLLM's code for this model "
        f"rearranges the tensor while loading, or the file was replaced meanwhile; supported: "
        f"{AS_STORED}; {WAY_OUT}"
    )
