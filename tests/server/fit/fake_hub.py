"""A hub of one model on this machine, for the real client: listing, side files, and ranges of weights files.

Invariant: it counts the bytes of weights files that it sends, and refuses to send one whole.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = "someone/tiny-moe"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The address, and the bytes of weights files that were sent."""

    address: str = ""
    sent: list[int] = field(default_factory=list)


@contextmanager
def served_hub(checkpoint: Path) -> Iterator[Hub]:
    """Serve the files of a checkpoint as the hub's model `NAME`."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{NAME}"):
                if "/tree/" in path:
                    tree = [
                        {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT}
                        for file in sorted(checkpoint.iterdir())
                        if file.is_file()
                    ]
                    self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, with_body)
                    return
                files = [{"rfilename": file.name} for file in sorted(checkpoint.iterdir()) if file.is_file()]
                body = {"id": NAME, "sha": COMMIT, "siblings": files, "private": False, "tags": [], "downloads": 0}
                self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"}, with_body)
                return
            file = checkpoint / path.rpartition("/")[2]
            if not path.startswith(f"/{NAME}/resolve/") or not file.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
                return
            content = file.read_bytes()
            headers = {"ETag": f'"{file.name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            status = 200
            if file.suffix == ".safetensors" and with_body:
                wanted = self.headers.get("Range", "")
                if not wanted.startswith("bytes="):
                    self._send(400, b"a whole weights file was asked for", {}, with_body)
                    return
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                content, status = content[int(first) : int(last) + 1], 206
                hub.sent.append(len(content))
            self._send(status, content, headers, with_body)

        def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
