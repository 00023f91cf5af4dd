"""Where a server is: its base URL, read once for all who send requests to one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from headrace.core.errors import ConfigError

ALLOWED = "http://HOST[:PORT][/PATH] or https://…"
VISIBLE = re.compile(r"[!-~]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """The base of a server's routes."""

    secure: bool
    """https."""
    host: str
    port: int
    prefix: str
    """Of every route's path, without a slash at its end."""
    user: str | None = None
    password: str | None = None

    @property
    def authority(self) -> str:
        """HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Without credentials; equal for equal servers."""
        return f"{'https' if self.secure else 'http'}://{self.authority}{self.prefix}"


def read_address(url: str) -> ServerAddress:
    """One that ends in /v1 names the same server as one that does not. Raises ConfigError, which never repeats a
    password."""
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError:
        raise ConfigError(f"the server's URL cannot be read, allowed: {ALLOWED}") from None
    if parts.scheme not in ("http", "https") or not VISIBLE.fullmatch(host):
        raise ConfigError(f"the server's URL names no host, allowed: {ALLOWED}")
    if parts.query or parts.fragment or (parts.path and not VISIBLE.fullmatch(parts.path)):
        raise ConfigError(f"the server's URL has more than a path behind the host, allowed: {ALLOWED}")
    secure = parts.scheme == "https"
    prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return ServerAddress(
        secure, host, port if port is not None else 443 if secure else 80, prefix, parts.username, parts.password
    )
