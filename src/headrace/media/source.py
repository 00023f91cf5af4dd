"""Where a picture comes from: `data:` URLs always, `http(s):` and `file:` as far as the operator allows."""

from __future__ import annotations

import binascii
import os
import re
import stat
from dataclasses import dataclass
from dataclasses import field as default
from pathlib import Path
from urllib.parse import unquote_to_bytes

from headrace.core.errors import InvalidImage, InvalidParameter
from headrace.media.fetch import Network, fetch
from headrace.media.limits import MediaLimits, check_bytes

DATA = re.compile(
    r"data:(?:image/[a-z0-9.+-]{1,60}|application/octet-stream)?(?:;[a-z0-9=._-]{1,60}){0,3};base64,", re.I
)
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}):")
FILE = re.compile(r"file://(?:localhost)?(/[^?#]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class MediaPolicy:
    """Which pictures a request may name, and what one may cost."""

    limits: MediaLimits = default(default_factory=MediaLimits)
    allow_http: bool = False
    """http and https URLs, of hosts with public addresses."""
    folder: Path | None = None
    """file: URLs of regular files inside of it; None: of none."""
    timeout_s: float = 10.0
    """Of a fetch in all."""
    ports: tuple[int, ...] = (80, 443)
    """Of http and https: on others are services that do not expect to be asked by strangers."""
    network: Network = default(default_factory=Network)

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s <= 600:
            raise InvalidParameter("timeout_s", self.timeout_s, "more than 0, up to 600 seconds")
        for port in self.ports:
            if not 1 <= port <= 65_535:
                raise InvalidParameter("ports", port, "1 to 65535")


def read_image(url: str, policy: MediaPolicy, field: str = "image_url") -> bytes:
    """The bytes of the file that a URL names. Blocks, at most `timeout_s`. Raises InvalidImage, which names `field`."""
    found = SCHEME.match(url) if isinstance(url, str) else None
    scheme = found[1].lower() if found else ""
    if scheme == "data":
        return _data(url, policy.limits, field)
    if scheme in ("http", "https") and policy.allow_http:
        data = fetch(url, policy.limits.max_bytes, policy.timeout_s, policy.ports, policy.network, field)
        check_bytes(len(data), policy.limits, field)
        return data
    if scheme == "file" and policy.folder is not None:
        return _file(url, policy.folder, policy.limits, field)
    allowed = ["data:", *["http:", "https:"] * policy.allow_http, *["file:"] * (policy.folder is not None)]
    raise InvalidImage(field, url, f"URLs that begin with {', '.join(allowed)}")


def read_path(path: Path, limits: MediaLimits, field: str = "image") -> bytes:
    """The bytes of a regular file that the user of this machine names. Raises InvalidImage."""
    try:
        return _contents(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), limits, field)
    except (OSError, ValueError):
        raise InvalidImage(field, str(path), "a regular file that can be read") from None


def _data(url: str, limits: MediaLimits, field: str) -> bytes:
    head = DATA.match(url)
    if head is None:
        raise InvalidImage(field, url, "data:image/png;base64,… (or another type of image)")
    count = len(url) - head.end()
    check_bytes(max(0, 3 * (count // 4) - url.count("=", -2)), limits, field)
    try:
        # Padding beyond the last four is not what every version of Python refuses.
        if count % 4 == 0 and not url.endswith("==="):
            return binascii.a2b_base64(url[head.end() :], strict_mode=True)
    except ValueError:
        pass
    raise InvalidImage(field, url, "base64 of the standard alphabet, padded, without spaces")


def _file(url: str, folder: Path, limits: MediaLimits, field: str) -> bytes:
    refusal = InvalidImage(field, url, "file:///… of a regular file in the folder that the server allows")
    found = FILE.fullmatch(url)
    if found is None:
        raise refusal
    try:
        root = folder.resolve(strict=True)
        path = Path(os.fsdecode(unquote_to_bytes(found[1]))).resolve(strict=True)
        if root == path or not path.is_relative_to(root):
            raise refusal
        descriptor = _opened(root, path.relative_to(root).parts)
    except (OSError, ValueError, RuntimeError):  # Of loops of links, and names with a NUL.
        raise refusal from None
    try:
        return _contents(descriptor, limits, field)
    except OSError:
        raise refusal from None


def _opened(root: Path, parts: tuple[str, ...]) -> int:
    """A descriptor of a path below `root`, one part after the other and through no link: one that has come since the
    path was resolved leads nowhere. Raises OSError."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    here = os.open(root, flags | os.O_DIRECTORY)
    for left, part in zip(range(len(parts) - 1, -1, -1), parts, strict=True):
        more = os.O_DIRECTORY if left else os.O_NONBLOCK
        try:
            inside = os.open(part, flags | more, dir_fd=here)
        finally:
            os.close(here)
        here = inside
    return here


def _contents(descriptor: int, limits: MediaLimits, field: str) -> bytes:
    """Of a regular file, which is closed then. Raises OSError."""
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("not a regular file")
        check_bytes(found.st_size, limits, field)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(limits.max_bytes + 1)
    finally:
        os.close(descriptor)
    check_bytes(len(data), limits, field)
    return data
