"""A small HTTP server that speaks as much of the hub's protocol as its client library asks for."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Serves the directory `root` as the repository `repository`; remembers what it sent.

    `error` is (status, X-Error-Code) that answers everything; `ranges` False ignores Range; `cut`
    sends that many bytes less of a file than were asked for.
    """

    root: Path
    repository: str = "some-owner/some-model"
    error: tuple[int, str] | None = None
    ranges: bool = True
    cut: int = 0
    url: str = ""
    sent: list[tuple[str, int]] = field(default_factory=list)

    def sent_of(self, suffix: str) -> int:
        return sum(count for name, count in self.sent if name.endswith(suffix))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: object) -> None:
        self.hub = hub
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        hub = self.hub
        if hub.error:
            self._answer(hub.error[0], b"{}", {"X-Error-Code": hub.error[1]})
        elif self.path.split("?")[0] in (
            f"/api/models/{hub.repository}",
            f"/api/models/{hub.repository}/revision/main",
        ):
            siblings = [{"rfilename": path.name} for path in sorted(hub.root.iterdir())]
            answer = {"id": hub.repository, "sha": COMMIT, "siblings": siblings}
            self._answer(200, json.dumps(answer).encode())
        elif self.path.startswith(
            (
                f"/api/models/{hub.repository}/tree/main",
                f"/api/models/{hub.repository}/tree/{COMMIT}",
            )
        ):
            files = [
                {"type": "file", "oid": COMMIT, "path": path.name, "size": path.stat().st_size}
                for path in sorted(hub.root.iterdir())
            ]
            self._answer(200, json.dumps(files).encode())
        elif self.path.startswith("/api/models/"):
            code = "RevisionNotFound" if "/revision/" in self.path else "RepoNotFound"
            self._answer(404, b"", {"X-Error-Code": code})
        elif self.path.startswith(
            (f"/{hub.repository}/resolve/{COMMIT}/", f"/{hub.repository}/resolve/main/")
        ):
            name = self.path.rsplit("/", 1)[1]
            if not (hub.root / name).exists():
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            elif name.endswith(".safetensors"):
                # The hub sends weights from elsewhere
                self._answer(302, b"", {"Location": f"{hub.url}/cdn/{name}"})
            else:
                self._file(name)
        elif self.path.startswith("/cdn/"):
            self._file(self.path.removeprefix("/cdn/"))
        else:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def _file(self, name: str) -> None:
        body = (self.hub.root / name).read_bytes()
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        status = 200
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match and self.hub.ranges:
            start, stop = int(match.group(1)), min(int(match.group(2)) + 1, len(body))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
            status, body = 206, body[start : stop - self.hub.cut]
        if self.command == "GET":
            self.hub.sent.append((name, len(body)))
        self._answer(status, body, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving_hub(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
