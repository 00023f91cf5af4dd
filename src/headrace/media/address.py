"""URLs of pictures read strictly, and which addresses a server may ask on behalf of somebody else."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

MOST_CHARACTERS = 8192
URL = re.compile(r"(https?)://([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?", re.IGNORECASE)
CHARACTERS = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]*")
"""Those of RFC 3986, §2: no spaces, controls, backslashes, nor anything that is not ASCII."""
AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")

NOT_PUBLIC_4 = tuple(
    ipaddress.IPv4Network(one)
    for one in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        *("224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # a cloud's own services, inside each of its machines
    )
)
GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
NOT_PUBLIC_6 = tuple(
    ipaddress.IPv6Network(one) for one in ("2001::/23", "2001:db8::/32", "3fff::/20", "2620:4f:8000::/48")
)
CARRIERS_6 = (
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),
    (ipaddress.IPv6Network("2002::/16"), 80),
)
"""IPv4 addresses in IPv6 ones (mapped, NAT64, 6to4), and how many bits stand after them: what such a one reaches is the
IPv4 address. All others that carry one are outside of GLOBAL_6, or in NOT_PUBLIC_6."""


class Refusal(Exception):
    """Why a URL is not fetched: the message says what is allowed."""


@dataclass(frozen=True, slots=True)
class Address:
    """A URL that may be asked for, if the host's addresses may."""

    secure: bool
    host: str
    """A name in lower case, or an IP address in its usual form, without brackets."""
    port: int
    target: str
    """Path and query."""

    @property
    def literal(self) -> bool:
        """Whether the host is an IP address."""
        return ":" in self.host or self.host.rpartition(".")[2].isdigit()

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def read_url(url: str, ports: tuple[int, ...]) -> Address:
    """Raises Refusal for what is not plainly an http(s) URL of a host and one of `ports`."""
    if len(url) > MOST_CHARACTERS:
        raise Refusal(f"at most {MOST_CHARACTERS} characters")
    if not CHARACTERS.fullmatch(url):
        raise Refusal("a URL in the characters of RFC 3986, others percent-encoded, of a host its ASCII form")
    found = URL.fullmatch(url)
    if found is None:
        raise Refusal("http:// or https://, a host and a path")
    scheme, authority, path, query, _ = found.groups()
    if "@" in authority:
        raise Refusal("a URL without a user's name or password")
    parts = AUTHORITY.fullmatch(authority)
    if parts is None:
        raise Refusal("a host's name or IP address, and a port if need be")
    secure = scheme.lower() == "https"
    port = int(parts[2] or (443 if secure else 80))
    if port not in ports:
        raise Refusal(f"the ports {', '.join(map(str, ports))}")
    return Address(secure, _host(parts[1].lower()), port, (path or "/") + (query or ""))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, that no private network, machine or service has to itself."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # With a zone, for one.
        return False
    if isinstance(found, ipaddress.IPv4Address):
        return not any(found in one for one in NOT_PUBLIC_4)
    if found.scope_id is not None:
        return False
    for network, after in CARRIERS_6:
        if found in network:
            return is_public(str(ipaddress.IPv4Address(int(found) >> after & 0xFFFFFFFF)))
    return found in GLOBAL_6 and not any(found in one for one in NOT_PUBLIC_6)


def _host(host: str) -> str:
    if host.startswith("["):
        try:
            return str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError:
            raise Refusal("an IPv6 address in brackets") from None
    host = host.removesuffix(".")
    labels = host.split(".")
    # What ends in a number is an IPv4 address to every client, in forms that clients read differently.
    if NUMBER.fullmatch(labels[-1]):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise Refusal("an IPv4 address as four decimal numbers") from None
    if len(host) > 253 or not all(LABEL.fullmatch(one) for one in labels):
        raise Refusal("a host's name of labels of 1 to 63 letters, digits and hyphens")
    return host
