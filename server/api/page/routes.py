"""The page for browsers: static files from the folder `files`, read once.

Invariant: the files hold nothing of the server, so they need no key; all that they show comes from the other routes.
They load nothing from elsewhere and run no inline script, and the headers below hold a browser to that.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.http.errors import MethodError, NotFoundError
from server.api.http.middleware import PAGE_PATH, wants_page

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parent / "files"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",  # asked for again each time, and answered by 304: no file of an older version is used
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page; `etag` is of its bytes."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> PageFile:
        """Read a file of a known type."""
        content = path.read_bytes()
        return cls(content, TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')

    def response(self, request: Request) -> Response:
        """The file, or 304 where the client has these bytes."""
        headers = {**HEADERS, "ETag": self.etag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in known:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


INDEX = PageFile.read(FOLDER / "index.html")
FILES = {path.name: PageFile.read(path) for path in FOLDER.iterdir() if path.name != "index.html"}


@router.get("/")
async def index(request: Request) -> Response:
    """The page, for a browser. Other clients are told that only POST is here."""
    if not wants_page(request.headers):
        raise MethodError("this path does not take this method", headers={"Allow": "POST"})
    response = INDEX.response(request)
    response.headers["Vary"] = "Accept"
    return response


@router.get(PAGE_PATH + "{name}")
async def file(name: str, request: Request) -> Response:
    """One of the files that the page loads."""
    if name not in FILES:
        raise NotFoundError("the page has no such file; GET / is the page")
    return FILES[name].response(request)
