"""Where pictures come from: data: URLs read strictly, files of one folder, and the web as far as it is public."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import InvalidImage, InvalidParameter
from headrace.media.address import Refusal, is_public, read_url
from headrace.media.fetch import Network, open_socket
from headrace.media.limits import MediaLimits
from headrace.media.source import MediaPolicy, read_image, read_path
from tests.robustness import image_urls
from tests.robustness.score import Score

POLICY = MediaPolicy(MediaLimits(max_bytes=1000))
PUBLIC = "93.184.216.34"
BODY = b"a picture, or so"
PNG = "data:image/png;base64,"
NOT_BASE64 = (
    "AAA",
    "AA=A",
    "AAAA=",
    "AA==AA==",
    "A A=",
    "AAAA\n",
    "AAA%3D",
    "AA-_",
    "ＡＡＡＡ",
    "=",
    "A===",
    "AAAA====",
)


# ---------------------------------------------------------------- data:


@given(st.binary(min_size=1, max_size=1000), st.sampled_from([PNG, "DATA:;base64,", "data:image/jpeg;a=b;base64,"]))
def test_data_urls(data: bytes, head: str) -> None:
    assert read_image(head + base64.b64encode(data).decode(), POLICY) == data


@pytest.mark.parametrize(
    "url",
    [
        *("data:", "data:,", "data:image/png,abcd", "data:text/html;base64,AAAA", "data:image/png;base64;AAAA", PNG),
        *(PNG + one for one in NOT_BASE64),
        *("data:image/png;base64 ,AAAA", " data:image/png;base64,AAAA", "data:image/svg+xml;charset=utf-8,<svg/>"),
        f"data:image/{'x' * 100};base64,AAAA",
    ],
)
def test_data_urls_that_are_refused(url: str) -> None:
    with pytest.raises(InvalidImage, match=r"^content\[1\]: got .*, allowed: "):
        read_image(url, POLICY, "content[1]")


def test_the_size_of_data_is_checked_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(read_image(PNG + base64.b64encode(bytes(1000)).decode(), POLICY)) == 1000
    monkeypatch.setattr("binascii.a2b_base64", lambda *_, **__: pytest.fail("decoded"))
    for count in (1001, 1002, 100_000):
        with pytest.raises(InvalidImage, match=rf"{count} bytes.*1 to 1000 bytes"):
            read_image(PNG + base64.b64encode(bytes(count)).decode(), POLICY)


def test_nothing_else_is_taken_unless_it_is_allowed() -> None:
    for url in (
        "http://a.example/",
        "https://a.example/",
        "file:///etc/passwd",
        "ftp://a/",
        "a.png",
        "",
        "://",
        5,
        None,
    ):
        with pytest.raises(InvalidImage, match=r"begin with data:$"):
            read_image(url, POLICY)  # type: ignore[arg-type]
    allowed = replace(POLICY, allow_http=True, folder=Path("/"))
    with pytest.raises(InvalidImage, match=r"begin with data:, http:, https:, file:$"):
        read_image("ftp://a/", allowed)
    for wrong in ({"timeout_s": 0.0}, {"ports": (0,)}):
        with pytest.raises(InvalidParameter, match=next(iter(wrong))):
            MediaPolicy(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- files


def test_a_file_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(BODY)
    policy = replace(POLICY, folder=tmp_path)
    assert read_image(f"file://{tmp_path}/a%20b.png", policy) == BODY
    (tmp_path / "large.png").write_bytes(bytes(1001))
    (tmp_path / "empty.png").touch()
    for name, said in (("large.png", "1001 bytes"), ("empty.png", "0 bytes"), ("none.png", "regular file")):
        with pytest.raises(InvalidImage, match=said):
            read_image(f"file://{tmp_path}/{name}", policy)


def test_a_link_that_comes_between_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the picture is exchanged for a link right after the path was resolved."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for one in (inside / "deep", outside):
        one.mkdir(parents=True)
        (one / "a.png").write_bytes(BODY)
    real = os.open

    def exchanged(path: str, flags: int, *more: int, **options: int) -> int:
        if path == "deep" and not (inside / "deep").is_symlink():
            (inside / "deep").rename(tmp_path / "moved")
            (inside / "deep").symlink_to(outside)
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", exchanged)
    with pytest.raises(InvalidImage, match="regular file"):
        read_image(f"file://{inside}/deep/a.png", replace(POLICY, folder=inside))
    assert (inside / "deep").is_symlink()


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.png").write_bytes(BODY)
    os.mkfifo(tmp_path / "pipe")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in ("deep/a.png", "pipe", "deep", "deep/none", "none/a"):
        try:
            read_image(f"file://{tmp_path}/{name}", replace(POLICY, folder=tmp_path))
        except InvalidImage:
            continue
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_path_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(BODY)
    (tmp_path / "link").symlink_to("a.png")
    assert read_path(tmp_path / "link", POLICY.limits) == BODY
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "pipe", "", "a\0b"):
        with pytest.raises(InvalidImage, match=r"^picture: got .*a regular file"):
            read_path(tmp_path / name, POLICY.limits, "picture")


# ---------------------------------------------------------------- addresses


@given(st.ip_addresses(v=4))
def test_public_is_never_what_the_standard_library_calls_private(address: object) -> None:
    if is_public(str(address)):
        assert getattr(address, "is_global") and not getattr(address, "is_multicast")  # noqa: B009
        assert is_public(f"::ffff:{address}") and is_public(f"64:ff9b::{address}") and not is_public(f"::{address}")


@given(st.ip_addresses(v=6))
def test_public_of_the_new_kind(address: object) -> None:
    known = str(address).startswith(("64:ff9b::", "::ffff:", "2002:"))
    if is_public(str(address)) and not known:
        assert getattr(address, "is_global") and not getattr(address, "is_multicast")  # noqa: B009


def test_an_address_that_carries_another_is_judged_by_it() -> None:
    assert all(map(is_public, ("93.184.216.34", "2002:5db8:d822::1", "64:ff9b::5db8:d822", "2606:2800::1")))
    carried = (
        "2002:7f00:1::1",
        "2002:a9fe:a9fe::",
        "64:ff9b::7f00:1",
        "::ffff:a9fe:a9fe",
        "::5db8:d822",
        "2001::5db8:d822",
    )
    assert not any(map(is_public, (*carried, "2606:2800::1%eth0", "93.184.216.34:80", "", "a")))


def test_urls_are_read_as_they_are() -> None:
    found = read_url("HTTPS://Example.COM.:443/a/../b?c=%20#d", (80, 443))
    assert (found.secure, found.host, found.port, found.target) == (True, "example.com", 443, "/a/../b?c=%20")
    assert found.host_header == "example.com" and not found.literal
    found = read_url("http://[2606:2800:0:0::1]:8080?q", (8080,))
    assert (found.host, found.target, found.host_header, found.literal) == (
        "2606:2800::1",
        "/?q",
        "[2606:2800::1]:8080",
        True,
    )


@given(st.text(alphabet="ht:/.0127[]@\\%#?x-", max_size=40))
def test_any_url_is_read_or_refused(tail: str) -> None:
    try:
        found = read_url(f"http://{tail}", (80, 443))
    except Refusal:
        return
    assert found.host and not set(found.host) & set("@\\/#?% []") and "#" not in found.target


# ---------------------------------------------------------------- the web

Server = Callable[[socket.socket], None]


@contextmanager
def serving(answer: Server) -> Iterator[Network]:
    """A network whose every public address is a server of ours."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                come, _ = listener.accept()
            except OSError:
                return
            with come:
                try:
                    answer(come)
                except OSError:
                    continue

    def connect(address: str, port: int, timeout_s: float) -> socket.socket:
        assert address == PUBLIC
        return open_socket("127.0.0.1", listener.getsockname()[1], timeout_s)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield Network(lambda host, port: [PUBLIC], connect)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def asked(come: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data and (piece := come.recv(4096)):
        data += piece
    return data


def saying(*pieces: bytes) -> Server:
    def answer(come: socket.socket) -> None:
        asked(come)
        for piece in pieces:
            come.sendall(piece)

    return answer


def get(network: Network, url: str = "http://a.example/x", timeout_s: float = 30.0) -> bytes:
    return read_image(url, replace(POLICY, allow_http=True, network=network, timeout_s=timeout_s), "url")


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def test_the_request_names_the_host_and_nothing_of_us() -> None:
    heard: list[bytes] = []

    def answer(come: socket.socket) -> None:
        heard.append(asked(come))
        come.sendall(OK + b"Content-Length: 16\r\n\r\n" + BODY)

    with serving(answer) as network:
        assert get(network, "http://a.example:80/x%20y?z#w") == BODY
    lines = heard[0].decode().split("\r\n")
    assert lines[:2] == ["GET /x%20y?z HTTP/1.1", "Host: a.example"]
    assert {one.split(":")[0] for one in lines[2:] if one} == {"User-Agent", "Accept", "Accept-Encoding", "Connection"}


@pytest.mark.parametrize(
    "pieces",
    [
        (OK + b"\r\n", BODY),
        (CHUNKED + b"10\r\n", BODY, b"\r\n0\r\n\r\n"),
        (b"HTTP/1.0 200\r\n\r\n", BODY),
        (b"HTTP/1.1 100 Continue\r\n\r\n", OK + b"content-length: 16\r\n\r\n", BODY, b"more"),
    ],
)
def test_answers_in_every_frame(pieces: Sequence[bytes]) -> None:
    with serving(saying(*pieces)) as network:
        assert get(network) == BODY


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ((b"",), "good HTTP"),
        ((b"SSH-2.0-x\r\n",), "good HTTP"),
        ((b"HTTP/1.1 404 No\r\n\r\nx",), "404"),
        ((b"HTTP/1.1 206 Part\r\n\r\nx",), "206"),
        ((b"HTTP/1.1 304 Same\r\n\r\n",), "304"),
        ((OK + b"Content-Length: 17\r\n\r\n", BODY), "as long as it says"),
        ((OK + b"Content-Length: 1001\r\n\r\n", BODY), "at most 1000 bytes"),
        ((OK + b"Content-Length: 99999999999999999999\r\n\r\n", BODY), "one length"),
        ((OK + b"Content-Length: -1\r\n\r\n", BODY), "one length"),
        ((OK + b"Content-Length: 16\r\nContent-Length: 3\r\n\r\n", BODY), "one length"),
        ((OK + b"Content-Encoding: gzip\r\n\r\n", BODY), "not compressed"),
        ((OK + b"\r\n", bytes(1001)), "at most 1000 bytes"),
        ((CHUNKED + b"100\r\n" + bytes(256) + b"\r\n",) * 5, "good HTTP"),
        ((CHUNKED, *(b"100\r\n" + bytes(256) + b"\r\n",) * 5, b"0\r\n\r\n"), "1000 bytes"),
        ((CHUNKED + b"zz\r\n",), "good HTTP"),
        ((CHUNKED + b"10\r\nabc",), "good HTTP"),
        ((OK, *(b"X: y\r\n",) * 200, b"\r\n", BODY), "good HTTP"),
        ((OK + b"X: " + bytes(70_000),), "good HTTP"),
        ((*(b"HTTP/1.1 100 Continue\r\nX: " + b"y" * 60_000 + b"\r\n\r\n",) * 20,), "no longer than"),
        ((OK + b"\r\n",), "1 to 1000 bytes"),
        ((b"HTTP/1.1 302 To\r\n\r\n",), "one good URL"),
        ((b"HTTP/1.1 302 To\r\nLocation: /a\r\nLocation: /b\r\n\r\n",), "one good URL"),
        ((b"HTTP/1.1 302 To\r\nLocation: /a b\r\n\r\n",), "one good URL"),
        ((b"HTTP/1.1 301 To\r\nLocation: /again\r\n\r\n",), "at most 3 redirects"),
        ((b"HTTP/1.1 307 To\r\nLocation: file:///etc/passwd\r\n\r\n",), "http://"),
        ((b"HTTP/1.1 308 To\r\nLocation: data:image/png;base64,AAAA\r\n\r\n",), "http://"),
        ((b"HTTP/1.1 303 To\r\nLocation: http://[::1]/\r\n\r\n",), "public addresses"),
        ((b"HTTP/1.1 303 To\r\nLocation: //127.0.0.1/\r\n\r\n",), "public addresses"),
    ],
)  # fmt: skip
def test_answers_that_are_refused(pieces: Sequence[bytes], said: str) -> None:
    with serving(saying(*pieces)) as network, pytest.raises(InvalidImage, match=rf"^url: got .*{said}"):
        get(network)


@pytest.mark.parametrize("where", ["lookup", "connection", "headers", "body"])
def test_a_slow_server_is_left_at_the_deadline(where: str) -> None:
    ended = threading.Event()

    def drips(come: socket.socket) -> None:
        asked(come)
        if where != "headers":
            come.sendall(OK + b"\r\n")
        while not ended.wait(0.02):
            come.sendall(b"x")  # Each byte comes soon after the one before.

    def waits(host: str, port: int) -> Sequence[str]:
        ended.wait(30)
        return [PUBLIC]

    def connects(address: str, port: int, timeout_s: float) -> socket.socket:
        assert timeout_s <= 0.3
        raise TimeoutError

    with serving(drips) as network:
        if where == "lookup":
            network = replace(network, resolve=waits)
        elif where == "connection":
            network = replace(network, connect=connects)
        started = time.monotonic()
        with pytest.raises(InvalidImage, match=r"within 0\.3 s"):
            get(network, timeout_s=0.3)
        ended.set()
        assert time.monotonic() - started < 20


def test_the_next_address_is_tried_where_one_is_dead() -> None:
    with serving(saying(OK + b"\r\n", BODY)) as network:

        def connect(address: str, port: int, timeout_s: float) -> socket.socket:
            if address != PUBLIC:
                raise ConnectionRefusedError
            return network.connect(address, port, timeout_s)

        for found, good in (([f"93.184.216.{n}" for n in (1, 2, 3)] + [PUBLIC], True), (["93.184.216.1"], False)):
            other = replace(network, resolve=lambda host, port, found=found: found, connect=connect)  # type: ignore[misc]
            if good:
                assert get(other) == BODY
            else:
                with pytest.raises(InvalidImage, match="can be reached"):
                    get(other)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls_proves_the_host_name(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=a.example"
    more = ["-addext", "subjectAltName=DNS:a.example", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *more], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    names: list[str | None] = []
    context.sni_callback = lambda _, name, __: names.append(name)

    def answer(come: socket.socket) -> None:
        with context.wrap_socket(come, server_side=True) as wrapped:
            saying(OK + b"Content-Length: 16\r\n\r\n", BODY)(wrapped)

    with serving(answer) as network:
        trusting = replace(network, tls=lambda: ssl.create_default_context(cafile=str(certificate)))
        assert get(trusting, "https://a.example/") == BODY and names == ["a.example"]
        for other, url in (
            (trusting, "https://b.example/"),
            (network, "https://a.example/"),
            (trusting, f"https://{PUBLIC}/"),
        ):
            with pytest.raises(InvalidImage, match="can be reached"):
                get(other, url)


def test_a_short_form_of_the_url_tricks() -> None:
    score = Score("image URLs")
    image_urls.attack(score, image_urls.SHORT_TRICKS)
    assert score.passed, "\n".join([score.failures, *score.notes])
