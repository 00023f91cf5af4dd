"""URLs of pictures that are meant to reach what they must not: private addresses in every spelling, names that lead
there, names that change, redirects, files outside of their folder.

    python -m tests.robustness.image_urls [--short] [--json FILE]

Real sockets: a trap listens on the loopback addresses, and a server beside it plays the open internet. Every connection
goes through one function, which counts those to an address that is no public one, and lets none leave this machine.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import random
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

from headrace.core.errors import InvalidImage
from headrace.media.fetch import Network, open_socket, system_addresses
from headrace.media.limits import MediaLimits
from headrace.media.source import MediaPolicy, read_image
from tests.robustness.score import Score, finish

TRICKS, SHORT_TRICKS = 500, 150
PUBLIC = ("93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946")
"""Stand for the open internet: connections to them go to a server of ours."""
BODY = b"\x89PNG a picture"
SECRET = b"not for strangers"
V4 = (
    *(
        "127.0.0.1",
        "127.1.2.3",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
    ),
    *("100.64.0.1", "100.100.100.200", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.7", "203.0.113.9"),
    *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "168.63.129.16"),
)
V6 = (
    *("::1", "::", "fc00::1", "fd00:ec2::254", "fe80::1", "febf::1", "fec0::1", "ff02::1", "ff0e::1", "2001:db8::1"),
    *("100::1", "3fff::1", "5f00::1", "64:ff9b:1::1", "2001:10::1", "2001:20::1", "2001:2::1", "2620:4f:8000::1"),
)


@dataclass(frozen=True)
class Trick:
    family: str
    url: str
    names: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    """What a name resolves to the first time, the second …; the last one from then on."""
    good: bool = False
    """Fetches the picture, as it should."""


def four(address: str) -> list[str]:
    """Spellings of an IPv4 address that some client or other reads as it."""
    whole = int(ipaddress.IPv4Address(address))
    a, b, c, d = whole.to_bytes(4, "big")
    wide = "".join(chr(0xFF10 + int(one)) if one.isdigit() else one for one in address)
    return [
        *(address, f"{address}.", str(whole), hex(whole), f"0{whole:o}", f"{a}.{b * 65_536 + c * 256 + d}"),
        *(
            f"{a}.{b}.{c * 256 + d}",
            f"{a:#x}.{b:#x}.{c:#x}.{d:#x}",
            f"{a:#04o}.{b:#o}.{c:#o}.{d:#o}".replace("0o", "0"),
        ),
        *(f"{a:03}.{b:03}.{c:03}.{d:03}", f"{a:#x}.{b}.{c}.{d}", f"{a + 256}.{b}.{c}.{d}", str(whole + 2**32)),
        *(wide, address.replace(".", "。"), address.replace(".", "%2e"), f"%{ord(address[0]):x}{address[1:]}"),
        *(f"{address}..", f".{address}", f"{address}\u200b", f"[{address}]", address.replace("1", "①"), f"0{address}"),
        *(f"[::ffff:{address}]", f"[::{address}]", f"[64:ff9b::{address}]", f"[::ffff:0:{address}]"),
        *(f"[2002:{a:02x}{b:02x}:{c:02x}{d:02x}::1]", f"[2001:0:{a:02x}{b:02x}:{c:02x}{d:02x}::1]"),
        *(f"[64:ff9b:1::{address}]", f"[fe80::{address}]", f"[0:0:0:0:0:FFFF:{a:02X}{b:02X}:{c:02X}{d:02X}]"),
    ]


def six(address: str) -> list[str]:
    found = ipaddress.IPv6Address(address)
    spelt = [address, found.exploded, address.upper(), f"{address}%25eth0", f"{address}%eth0", f"{address}%1"]
    return [*(f"[{one}]" for one in spelt), address, f"[[{address}]]", f"[{address}"]


def spellings() -> Iterator[str]:
    """Hosts that are, or may be taken for, addresses that are not public."""
    for address in V4:
        yield from four(address)
    for address in V6:
        yield from six(address)


def tricks(port: int, count: int, seed: int = 0) -> list[Trick]:
    """So many, some of each family; `port`: where the trap listens."""
    draw = random.Random(seed)
    hosts = list(spellings())
    ends = (":80/", "/", f":{port}/", f":{port}/a.png", f":{port}/latest/meta-data/", f":{port}")
    found = [Trick("spelling", f"{draw.choice(('http', 'HTTP', 'http'))}://{one}{draw.choice(ends)}") for one in hosts]
    found += [Trick("secure", f"https://{one}:{draw.choice((443, port))}/") for one in draw.sample(hosts, 40)]
    addresses = [*V4, *V6, *(f"::ffff:{one}" for one in V4), *(f"64:ff9b::{one}" for one in V4[:6])]
    for number, one in enumerate(addresses):
        name = f"name{number}.example"
        found.append(Trick("name", f"http://{name}:{port}/", {name: [[one]]}))
        mixed = [PUBLIC[0], one] if number % 2 else [one, PUBLIC[1]]
        found.append(Trick("mixed name", f"http://{name}:{port}/", {name: [mixed]}))
        found.append(Trick("changing name", f"http://{name}/picture", {name: [[PUBLIC[0]], [one]]}, good=True))
        again = f"http://{name}/to?{quote(f'http://{name}:{port}/', safe='')}"
        found.append(Trick("changing name, redirected", again, {name: [[PUBLIC[0]], [one]]}))
    for target in (*(f"http://{one}:{port}/" for one in draw.sample(hosts, 60)), *_of_one_line(schemes(port))):
        found.append(Trick("redirect", f"http://{PUBLIC[0]}/to?{quote(target, safe='')}"))
    found += [Trick("form", one) for one in (*schemes(port), *forms(port))]
    by_family: dict[str, list[Trick]] = {}
    for trick in found:
        by_family.setdefault(trick.family, []).append(trick)
    for some in by_family.values():
        draw.shuffle(some)
    # One of each family in turn, until there are enough.
    most = max(map(len, by_family.values()))
    turns = [some[turn] for turn in range(most) for some in by_family.values() if turn < len(some)]
    return turns[:count]


def _of_one_line(urls: Sequence[str]) -> list[str]:
    """Those that a header can hold."""
    return [one for one in urls if one.isprintable()]


def schemes(port: int) -> list[str]:
    """Of others than http and https, or none."""
    here = f"127.0.0.1:{port}/"
    others = (
        "ftp",
        "gopher",
        "dict",
        "ldap",
        "tftp",
        "ws",
        "jar:http",
        "url:http",
        "view-source:http",
        "netdoc",
        "ssh",
    )
    return [
        *(f"{one}://{here}" for one in others),
        *("file:///etc/passwd", "file://127.0.0.1/etc/passwd", "data:text/html,x", "data:image/png,x", "javascript:1"),
        *(
            f" http://{here}",
            f"http:\\\\{here}",
            f"http:/{here}x",
            f"http:{here}",
            f"http:///{here}",
            f"http://{here}\n",
        ),
        *(f"\thttp://{here}", f"ht\ntp://{here}", f"http\x00://{here}", f"http://\t{here}", f"ｈttp://{here}"),
    ]


def forms(port: int) -> list[str]:
    """Authorities, paths and ports that parsers disagree about."""
    trap = f"127.0.0.1:{port}"
    good = PUBLIC[0]
    return [
        *(f"http://{good}@{trap}/", f"http://{good}:80@{trap}/", f"http://{trap}@{good}/", f"http://@{trap}/"),
        *(
            f"http://{good}\\@{trap}/",
            f"http://{good}%40{trap}/",
            f"http://{good}?@{trap}\\",
        ),
        *(
            f"http://{good}\r\nHost: {trap}\r\n/",
            f"http://{good}/\r\nX: y",
            f"http://{good}/%0d%0a x",
            f"http://{good} {trap}/",
        ),
        *(
            f"http://{good}:80:{port}/@",
            f"http://{good}:{port} /",
            f"http://{good}:+80/",
            f"http://{good}:-1/",
            "http://:80/",
        ),
        *(
            f"http://{good}:0/",
            f"http://{good}:65616/",
            f"http://{good}:22/",
            f"http://{good}:٨٠/",
            f"http://{good}:99999999/",
        ),
        *(
            "http://",
            "http:///",
            "http://./",
            "http://../",
            "http://%00/",
            "http://[]/",
            "http://[::/",
            "http://-a.example/",
        ),
        *(f"http://localhost:{port}/", f"http://LOCALHOST.:{port}/", f"http://localhost\u3002:{port}/", "http://a..b/"),
        *(
            f"http://{'a' * 64}.example/",
            f"http://{'a.' * 130}example/",
            f"http://{good}/{'x' * 9000}",
            f"http://{trap}\\.example/",
        ),
        *(
            f"http://{good}/\u202e",
            "http://exämple.example/",
            "http://xn--/",
            f"http://{good}&@{trap}/",
            f"http://{trap}%2f.example/",
        ),
    ]


def controls() -> list[Trick]:
    """What is fetched: without these, refusing everything would pass."""
    name, host = "pictures.example", {"pictures.example": [list(PUBLIC)]}
    twice = quote("http://pictures.example/picture", safe="")
    return [
        Trick("control", f"http://{PUBLIC[0]}/picture", good=True),
        Trick("control", f"HTTP://{PUBLIC[0]}:80/picture?size=1#part", good=True),
        Trick("control", f"http://{PUBLIC[0]}#@127.0.0.1@x/", good=True),
        Trick("control", f"http://[{PUBLIC[1]}]/picture", good=True),
        Trick("control", f"http://[::ffff:{PUBLIC[0]}]/picture", good=True),
        Trick("control", f"http://{name}/picture", host, good=True),
        Trick("control", f"http://{name.upper()}./chunked", host, good=True),
        Trick("control", f"http://{name}/to?{twice}", host, good=True),
        Trick("control", f"http://{name}/to?/to%3F%2Fpicture", host, good=True),
    ]


# ---------------------------------------------------------------- the two servers


class _Public(BaseHTTPRequestHandler):
    """A picture, whole or in chunks, and redirects to wherever the query says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.send_response(302 if path == "/to" else 200)
        if path == "/to":
            self.send_header("Location", unquote(query).encode().decode("latin-1"))
        body = BODY
        if path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            body = b"".join(b"1\r\n%c\r\n" % one for one in BODY) + b"0\r\n\r\n"
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Trap:
    """Listens on 127.0.0.1 and, where there is one, ::1; counts who comes."""

    def __init__(self) -> None:
        self.hits = 0
        self._listeners = [socket.create_server(("127.0.0.1", 0))]
        self.port: int = self._listeners[0].getsockname()[1]
        if socket.has_dualstack_ipv6():
            with suppress(OSError):
                self._listeners.append(socket.create_server(("::1", self.port), family=socket.AF_INET6))
        self._threads = [threading.Thread(target=self._count, args=(one,), daemon=True) for one in self._listeners]
        for thread in self._threads:
            thread.start()

    def _count(self, listener: socket.socket) -> None:
        while True:
            try:
                come, _ = listener.accept()
            except OSError:
                return
            self.hits += 1
            with come:
                come.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(SECRET), SECRET))

    def close(self) -> None:
        for listener in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()


@contextmanager
def public_server() -> Iterator[int]:
    """Its port, on 127.0.0.1."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Public)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Wires:
    """The one way out: names as a trick has them, connections counted."""

    public_port: int
    private: list[str] = field(default_factory=list)
    """Addresses that are not public and were to be connected to."""
    lookups: int = 0

    def network(self, names: Mapping[str, Sequence[Sequence[str]]]) -> Network:
        asked: dict[str, int] = {}

        def resolve(host: str, port: int) -> Sequence[str]:
            self.lookups += 1
            if host == "localhost":
                return system_addresses(host, port)
            if host not in names:
                raise OSError("no such name")
            turn = asked[host] = asked.get(host, -1) + 1
            return names[host][min(turn, len(names[host]) - 1)]

        return Network(resolve, self._connect)

    def _connect(self, address: str, port: int, timeout_s: float) -> socket.socket:
        found = ipaddress.ip_address(address)
        plain = getattr(found, "ipv4_mapped", None) or found
        if str(plain) in PUBLIC:
            return open_socket("127.0.0.1", self.public_port, timeout_s)
        self.private.append(address)
        if plain.is_loopback:
            return open_socket(address, port, timeout_s)
        raise OSError("nothing leaves this machine")


# ---------------------------------------------------------------- the attack


def attack(score: Score, count: int) -> None:
    """So many tricks, the controls, and the files, one after the other."""
    with ExitStack() as stack:
        trap = Trap()
        stack.callback(trap.close)
        wires = Wires(stack.enter_context(public_server()))
        policy = MediaPolicy(MediaLimits(max_bytes=4096), allow_http=True, timeout_s=20, ports=(80, 443, trap.port))
        wrong: list[str] = []
        known = [*tricks(trap.port, count), *controls()]
        for trick in known:
            judge(trick, replace(policy, network=wires.network(trick.names)), wrong)
        # With the system's own way out, for what stays on this machine whatever happens.
        own = [Trick("system", f"http://{one}:{trap.port}/") for one in (*four("127.0.0.1"), *six("::1"), "localhost")]
        for trick in own:
            judge(trick, policy, wrong)
        open_socket("127.0.0.1", trap.port, 20).close()
        told = judge_files(Path(stack.enter_context(tempfile.TemporaryDirectory())), wrong)
    good = sum(trick.good for trick in known)
    score.note(f"{len(known) + len(own)} URLs and {told} of files, {good} of them good; {wires.lookups} lookups")
    score.zero("connections to addresses that are not public", len(wires.private), len(known))
    score.check("connections that the trap saw", trap.hits, "1, our own", trap.hits == 1)
    score.zero("URLs fetched or refused otherwise than they must be", len(wrong), len(known) + len(own) + told)
    for one in (*wrong[:10], *(f"connected to {one}" for one in wires.private[:10])):
        score.note(one)


def judge(trick: Trick, policy: MediaPolicy, wrong: list[str]) -> None:
    shown = f"{trick.family}: {trick.url!r}"[:200]
    try:
        data = read_image(trick.url, policy, "image_url")
    except InvalidImage as error:
        text = str(error)
        if trick.good or not text.startswith("image_url: got ") or "allowed: " not in text or "\n" in text:
            wrong.append(f"{shown} refused: {text}")
    except Exception as error:
        wrong.append(f"{shown} raised {error!r}")
    else:
        if not trick.good or data != BODY:
            wrong.append(f"{shown} fetched {data[:40]!r}")


def judge_files(folder: Path, wrong: list[str]) -> int:
    """file: URLs around an allowed folder. Returns how many."""
    inside, outside = folder / "inside", folder / "outside"
    for one in (inside / "deep", outside, folder / "inside2"):
        one.mkdir(parents=True)
    for one in (inside / "a b.png", inside / "deep/é.png"):
        one.write_bytes(BODY)
    for one in (outside / "s.png", folder / "inside2/s.png"):
        one.write_bytes(SECRET)
    (inside / "link.png").symlink_to(outside / "s.png")
    (inside / "way").symlink_to(outside)
    (inside / "kept.png").symlink_to("a b.png")
    (inside / "loop").symlink_to("loop")
    (inside / "null").symlink_to("/dev/null")
    os.mkfifo(inside / "pipe.png")
    root = f"file://{inside}"
    good = (
        f"{root}/a%20b.png",
        f"{root}/deep/../a%20b.png",
        f"FILE://localhost{inside}/deep/%C3%A9.png",
        f"{root}/kept.png",
    )
    below = (
        *(
            "link.png",
            "way/s.png",
            "loop",
            "null",
            "pipe.png",
            "deep",
            "",
            "..",
            "../outside/s.png",
            "../inside2/s.png",
        ),
        *("%2e%2e/outside/s.png", "..%2Foutside%2Fs.png", "deep/../../outside/s.png", "a%20b.png%00.jpg", "a b.png\0"),
        *("a%2520b.png", "a%20b.png?x", "a%20b.png#x", "x" * 5000, "/../outside/s.png", "missing.png", "%ff%fe"),
        *("way/../s.png", "%2e%2e/inside2/s.png", "..\\outside\\s.png"),
    )
    others = (
        *(root, f"{root}2/s.png", f"file://host{inside}/a%20b.png", "file:a%20b.png", f"file:{inside}/a%20b.png"),
        *(
            f"file:\\\\{inside}/a%20b.png",
            f"file:///{'../' * 20}etc/passwd",
            "file:///proc/self/environ",
            "file:///dev/zero",
        ),
        *("file://", "file:///", "file:", "file:////outside/s.png", f"file:///proc/self/cwd/../..{outside}/s.png"),
    )
    bad = (*(f"{root}/{one}" for one in below), *others)
    policy = MediaPolicy(folder=inside)
    for url in bad:
        judge(Trick("file", url), policy, wrong)
    for url in good:
        judge(Trick("file", url, good=True), policy, wrong)
        judge(Trick("file, not allowed", url), MediaPolicy(), wrong)
    return len(bad) + 2 * len(good)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few seconds' part of it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    given = parser.parse_args(arguments)
    score = Score("image URLs")
    attack(score, SHORT_TRICKS if given.short else TRICKS)
    return finish(score, given.json)


if __name__ == "__main__":
    sys.exit(main())
