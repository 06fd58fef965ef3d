"""What a browser gets: the page at ``/``, the interface's description at ``/docs``, and the files that both need.

The files are read once, when the server starts: later neither a slow disk nor a made-up path holds the event loop up.
Nothing is fetched from anywhere else, so both work without a connection.
"""

import gzip
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

_STATIC = files("gpt_serve.serve") / "static"
# Scripts and styles come from here alone, and no other site may frame the page. Images are previews and masks.
_POLICY = "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Asset:
    """One file for browsers.

    Attributes:
        content: its bytes, as stored.
        media_type: its type.
        zipped: whether ``content`` is compressed by gzip.
        etag: changes with the content.
    """

    content: bytes
    media_type: str
    zipped: bool
    etag: str


def assets() -> dict[str, Asset]:
    """The files of the package's ``static`` folder by their path below it; ``.gz`` is no part of the path."""
    found: dict[str, Asset] = {}
    _collect(_STATIC, "", found)
    return found


def add_pages(app: FastAPI) -> None:
    """Add ``GET /``, ``/docs`` and ``/static/...`` to ``app``."""
    stored = assets()

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return _respond(request, stored["page.html"], _POLICY)

    @app.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
    async def docs(request: Request) -> Response:
        return _respond(request, stored["docs.html"], f"{_POLICY}; style-src 'self' 'unsafe-inline'")  # Swagger UI's

    @app.api_route("/static/{path:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def static(request: Request, path: str) -> Response:
        if path not in stored:
            raise HTTPException(404, "there is no such file")
        return _respond(request, stored[path], _POLICY)


def _collect(folder: Traversable, prefix: str, found: dict[str, Asset]) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            _collect(entry, f"{prefix}{entry.name}/", found)
        else:
            name = entry.name.removesuffix(".gz")
            media_type = _MEDIA_TYPES.get(PurePosixPath(name).suffix, "text/plain")
            content = entry.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            found[prefix + name] = Asset(content, media_type, name != entry.name, etag)


def _respond(request: Request, asset: Asset, policy: str) -> Response:
    headers = _HEADERS | {"ETag": asset.etag, "Content-Security-Policy": policy}
    if request.headers.get("if-none-match") == asset.etag:
        return Response(status_code=304, headers=headers)
    content = asset.content
    if asset.zipped and "gzip" in request.headers.get("accept-encoding", ""):
        headers |= {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
    elif asset.zipped:
        content = gzip.decompress(content)
    return Response(content, headers=headers, media_type=asset.media_type)
