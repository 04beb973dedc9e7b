"""Reads a repository of the Hugging Face hub without downloading a weight.

One request lists the files, each small file is read whole, and of each safetensors file only the
header and the tensors that are metadata, by HTTP range requests. Endpoint, token and proxies are
the hub client's own settings (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, ...).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_fusedq.checkpoint.safetensors_header import TensorInfo, header_bytes, parse_header
from vllm_fusedq.errors import CheckpointError, RepositoryError

REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

Progress = Callable[[int, int], None]
"""Called with how many headers have been read, and of how many."""

# Nearly every header lies in the first piece, so that a file usually costs one request.
FIRST_PIECE = 1 << 16
MAX_SMALL_FILE = 100_000_000
CONNECTIONS = 8
TIMEOUT_SECONDS = 20
RETRIES = 2

_DOWNLOAD = "or download the model and name its directory"


def offline_snapshot(repository: str, revision: str | None) -> Path | None:
    """Where the hub client's cache holds the repository; asked only where the client is offline."""
    from huggingface_hub import constants, errors, snapshot_download

    if not constants.HF_HUB_OFFLINE:
        return None
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None


class HubFiles:
    """One commit of a repository; `files.LocalFiles` is its local twin.

    Raises:
        RepositoryError: the repository does not exist, is closed to this user or out of reach.
    """

    def __init__(
        self, repository: str, revision: str | None = None, progress: Progress | None = None
    ) -> None:
        from huggingface_hub import HfApi

        self.name = repository
        self._progress = progress
        with _explained(repository):
            info = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT_SECONDS)
        self._commit = info.sha or revision or "main"
        self._names = [file.rfilename for file in info.siblings or ()]

    def names(self) -> list[str]:
        return list(self._names)

    def label(self, name: str) -> str:
        return f"{self.name}/{name}"

    def read(self, name: str) -> bytes:
        """A whole small file.

        Raises:
            RepositoryError: it does not exist, is no small file or cannot be read.
        """
        if name not in self._names:
            raise RepositoryError(f"{self.label(name)}: the repository has no such file")
        body, size = self._get(name, 0, MAX_SMALL_FILE)
        if size > MAX_SMALL_FILE:
            raise RepositoryError(
                f"{self.label(name)}: {size} bytes, more than the {MAX_SMALL_FILE} that any "
                "configuration file takes"
            )
        if len(body) < size:
            raise RepositoryError(
                f"{self.label(name)}: the server sent {len(body)} of {size} bytes; try again"
            )
        return body

    def headers(self, names: list[str]) -> Iterator[dict[str, TensorInfo]]:
        """The header of each safetensors file, in the order of `names`."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            pending = [pool.submit(self._header, name) for name in names]
            try:
                for done, future in enumerate(as_completed(pending), 1):
                    future.result()
                    if self._progress is not None:
                        self._progress(done, len(names))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return (future.result() for future in pending)

    def pieces(self, tensors: list[TensorInfo]) -> Iterable[bytes]:
        """What the files hold where these tensors are."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(self._piece, tensors))

    def _piece(self, info: TensorInfo) -> bytes:
        return self._get(info.file, info.start, info.start + info.nbytes)[0]

    def _header(self, name: str) -> dict[str, TensorInfo]:
        raw, size = self._get(name, 0, FIRST_PIECE)
        stop = 8 + header_bytes(self.label(name), raw[:8], size)
        if stop > len(raw):
            raw += self._get(name, len(raw), stop)[0]
        if len(raw) < stop:
            raise RepositoryError(
                f"{self.label(name)}: the server sent {len(raw)} of the {stop} bytes of the "
                "header; try again"
            )
        return parse_header(self.label(name), Path(name).name, raw[8:stop], size)

    def _get(self, name: str, start: int, stop: int) -> tuple[bytes, int]:
        """Bytes `[start, stop)` of a file, fewer where it ends before; and the file's size."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        url = hf_hub_url(self.name, name, revision=self._commit)
        # Without it a compressed answer would be counted in other bytes than the file's
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        headers["Range"] = f"bytes={start}-{stop - 1}"
        with (
            _explained(self.label(name)),
            http_stream_backoff(
                "GET", url, headers=headers, timeout=TIMEOUT_SECONDS, max_retries=RETRIES
            ) as response,
        ):
            hf_raise_for_status(response)
            size = _file_size(response)
            if size is None:
                # Reading on would download weights
                raise RepositoryError(
                    f"{self.label(name)}: the server does not answer range requests (status "
                    f"{response.status_code}); use another HF_ENDPOINT, {_DOWNLOAD}"
                )
            return _read_at_most(response.iter_bytes(), stop - start), size


def _file_size(response: Any) -> int | None:
    match = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
    return int(match.group(1)) if response.status_code == 206 and match else None


def _read_at_most(pieces: Iterable[bytes], limit: int) -> bytes:
    body = bytearray()
    for piece in pieces:
        body += piece
        if len(body) >= limit:
            break
    return bytes(body[:limit])


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Every way in which the hub says no, as a RepositoryError with a way out."""
    from huggingface_hub import errors

    try:
        yield
    except CheckpointError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise RepositoryError(
            f"{what}: the hub client is offline (HF_HUB_OFFLINE); unset it, {_DOWNLOAD}"
        ) from error
    except errors.GatedRepoError as error:
        raise RepositoryError(
            f"{what}: the repository is gated and closed to you; ask for access on its page and "
            f"log in (`hf auth login` or HF_TOKEN), {_DOWNLOAD}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise RepositoryError(f"{what}: the repository has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise RepositoryError(
            f"{what}: no such local directory, and no such repository on the hub, or a private "
            f"one; check the name, log in (`hf auth login` or HF_TOKEN), {_DOWNLOAD}"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        if status in (401, 403):
            raise RepositoryError(
                f"{what}: the hub does not accept your token, or closes this to you ({status}); "
                f"log in (`hf auth login` or HF_TOKEN), {_DOWNLOAD}"
            ) from error
        raise RepositoryError(
            f"{what}: the hub answered with an error ({status}); try again later, {_DOWNLOAD}"
        ) from error
    except (OSError, errors.HTTPError, ValueError) as error:
        # HTTPError is the base of the HTTP library's own errors, whichever library it is
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RepositoryError(
            f"{what}: the hub cannot be reached ({reason}); check the network and HF_ENDPOINT, "
            f"{_DOWNLOAD}"
        ) from error
