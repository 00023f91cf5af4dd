"""The page for people at `/`: a few static files, and the figures of its live line.

Its files hold nothing secret and are open; `/page/live.json` asks for a key as every other route does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

FOLDER: Final = Path(__file__).parent / "page"
INDEX: Final = "index.html"
TYPES: Final[Mapping[str, str]] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
}
ASSETS: Final = (
    "api.js",
    "icon.svg",
    "inline.js",
    "live.js",
    "markdown.js",
    "memory.js",
    "page.css",
    "page.js",
    "settings.js",
    "sse.js",
    "turn.js",
)
"""All that is ever read from the folder, beside the page itself: a name from outside never becomes a path."""

OPEN_PATHS: Final = frozenset(f"/page/{name}" for name in ASSETS)
"""Raw paths that need no API key. `/` is another: it is open where `wants_page` holds."""

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS: Final[Mapping[str, str]] = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_QUALITY_ZERO: Final = re.compile(r"\s*q\s*=\s*0(\.0{0,3})?\s*", re.IGNORECASE)


class LiveSource(Protocol):
    """What the live line asks of the service."""

    def live(self) -> Mapping[str, object]:
        """`running` and `waiting` requests, `tokens_per_s` of all of them, `model`, and whether it is `ready`."""


@dataclass(frozen=True, slots=True)
class PageFile:
    """A static file, as it is sent."""

    body: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, name: str) -> PageFile:
        """Raises OSError where the installation lacks the file."""
        path = FOLDER / name
        body = path.read_bytes()
        return cls(body, TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')

    def response(self, request: Request, *, vary: str = "") -> Response:
        """200, or 304 where the browser has this very file. A HEAD gets the headers alone (the server sees to that)."""
        # no-cache: kept, but asked for again each time, so that a new version's files are never mixed with old ones.
        headers = {**SECURITY_HEADERS, "etag": self.etag, "cache-control": "no-cache"}
        if vary:
            headers["vary"] = vary
        if _names_etag(request.headers.get("if-none-match", ""), self.etag):
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.media_type, headers=headers)


def wants_page(accept: str) -> bool:
    """Whether an Accept header names text/html (`*/*` does not: that is what programs send)."""
    for part in accept.split(","):
        media_type, *parameters = part.split(";")
        if media_type.strip().lower() == "text/html":
            return not any(_QUALITY_ZERO.fullmatch(parameter) for parameter in parameters)
    return False


def index_file() -> PageFile:
    """The page itself; its `response(request, vary="Accept")` answers a GET or HEAD of `/` that `wants_page`.

    Raises OSError where it is missing."""
    return PageFile.read(INDEX)


def page_routes(service: LiveSource) -> APIRouter:
    """`/page/{name}` for the names of `ASSETS`, and `/page/live.json`. Raises OSError where a file is missing."""
    router = APIRouter(include_in_schema=False)
    files: Mapping[str, PageFile] = {name: PageFile.read(name) for name in ASSETS}

    @router.get("/page/live.json")
    async def live() -> Response:
        return JSONResponse(dict(service.live()), headers={"cache-control": "no-store"})

    def add(name: str, file: PageFile) -> None:
        async def send(request: Request) -> Response:
            return file.response(request)

        router.add_api_route(f"/page/{name}", send, methods=["GET", "HEAD"])

    for name, file in files.items():
        add(name, file)
    return router


def _names_etag(if_none_match: str, etag: str) -> bool:
    """RFC 9110 §13.1.2: any of the tags, compared weakly, or `*`."""
    tags = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    return etag in tags or "*" in tags
