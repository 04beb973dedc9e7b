"""Tensors of a checkpoint by their names, pieces of stacks among them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.checkpoint.safetensors_header import Piece
from vllm_fusedq.load.partial import reading


def stored_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """One tensor of a checkpoint on this machine.

    Raises:
        CheckpointError: its file cannot be read.
    """
    info = checkpoint.tensors[name]
    path = Path(checkpoint.path) / info.file
    with reading(path), safe_open(path, "pt") as file:
        if info.piece is None:
            return file.get_tensor(name)
        return piece_of(file.get_slice(info.piece.tensor), info.piece)


def stored_tensors(
    checkpoint: Checkpoint, names: Iterable[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors, read when they are asked for."""
    for name in names:
        yield name, stored_tensor(checkpoint, name)


def piece_of(whole: torch.Tensor, piece: Piece) -> torch.Tensor:
    """What the piece says of the stored tensor, or of a slice of a file that stands for one."""
    return whole[piece.index] if piece.rows is None else whole[piece.index, slice(*piece.rows)]
