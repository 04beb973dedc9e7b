"""Where a checkpoint's files lie: in a directory, or in a repository of the hub."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from vllm_fusedq.checkpoint.hub import REPOSITORY_ID, HubFiles, Progress, offline_snapshot
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo, read_header
from vllm_fusedq.errors import CheckpointError

CONFIG_FILE = "config.json"


class CheckpointFiles(Protocol):
    """Where a checkpoint lies; `label` is what messages call a file of it."""

    name: str

    def names(self) -> list[str]: ...

    def label(self, name: str) -> str: ...

    def read(self, name: str) -> bytes: ...

    def headers(self, names: list[str]) -> Iterable[dict[str, TensorInfo]]: ...

    def pieces(self, tensors: list[TensorInfo]) -> Iterable[bytes]: ...


class LocalFiles:
    """The files of a directory."""

    def __init__(self, root: Path) -> None:
        self.name = str(root)
        self.root = root

    def names(self) -> list[str]:
        try:
            return os.listdir(self.root)
        except OSError as error:
            raise CheckpointError(
                f"{self.name}: cannot be read: {error.strerror or error}"
            ) from error

    def label(self, name: str) -> str:
        return str(self.root / name)

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{self.label(name)}: cannot be read: {error.strerror or error}"
            ) from error

    def headers(self, names: list[str]) -> Iterable[dict[str, TensorInfo]]:
        return (read_header(self.root / name) for name in names)

    def pieces(self, tensors: list[TensorInfo]) -> Iterable[bytes]:
        """What the files hold where these tensors are."""
        for info in tensors:
            try:
                with (self.root / info.file).open("rb") as file:
                    file.seek(info.start)
                    yield file.read(info.nbytes)
            except OSError as error:
                raise CheckpointError(
                    f"{self.label(info.file)}: cannot be read: {error.strerror or error}"
                ) from error


def open_files(
    model: str | Path, revision: str | None = None, progress: Progress | None = None
) -> CheckpointFiles:
    """A directory, or a repository of the hub; one in the client's cache where that is offline.

    Raises:
        CheckpointError: `model` is neither.
        RepositoryError: the repository cannot be read.
    """
    name = str(model)
    if name and os.path.isdir(name):
        return LocalFiles(Path(name))
    if REPOSITORY_ID.fullmatch(name) and not os.path.exists(name):
        if snapshot := offline_snapshot(name, revision):
            return LocalFiles(snapshot)
        if isinstance(model, str):
            return HubFiles(name, revision, progress)
        raise CheckpointError(
            f"{name}: no such directory; if it is a repository of the hub, download it with "
            f"`hf download {name}` and name the directory that this prints"
        )
    if os.path.isfile(name):
        raise CheckpointError(
            f"{name}: a file; name the directory of {CONFIG_FILE} and the weights"
        )
    raise CheckpointError(
        f"{name!r}: not a local directory, and not the id of a repository on the hub (owner/name); "
        "download the model, for example with `hf download`, and name the directory"
    )
