"""Who comes in, what a body may be, and what an error looks like."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from headrace.core.errors import (
    CodedError,
    DeadlineExceeded,
    HeadraceError,
    InvalidJson,
    InvalidParameter,
    NotReady,
    QueueFull,
    UnsupportedModel,
)
from headrace.server.config import ServeConfig
from headrace.server.errors import (
    MAX_BODY_BYTES,
    error_response,
    on_error,
    on_http_exception,
    on_unexpected,
    on_validation,
    openai_error,
)
from headrace.server.limits import Guard, read_json
from tests.server.edge_server import Answer, Served, serving

HOST = b"Host: x\r\n"
KEY, OTHER_KEY = "sk-one", "sk-zwölf"


@dataclass
class Service:
    settings: ServeConfig
    draining: bool = False
    refusal: HeadraceError | None = None
    """What `admit` raises."""

    def admit(self, count: int) -> None:
        assert count == 1
        if self.refusal is not None:
            raise self.refusal


class Panic(BaseException):
    """As extensions raise it: no Exception."""


def build(service: Service) -> Guard:
    """A FastAPI application with the handlers as the server has them."""
    app = FastAPI(docs_url=None, redoc_url=None, redirect_slashes=False)

    @app.api_route("/v1/echo", methods=["GET", "POST"], response_model=None)
    async def echo(request: Request) -> Response:
        body = await read_json(request, service.settings.max_body_bytes) if request.method == "POST" else {}
        return JSONResponse({"keys": sorted(body), **request.scope["state"]})

    @app.get("/health/live", response_model=None)
    @app.get("/health/ready", response_model=None)
    @app.get("/health", response_model=None)
    @app.get("/metrics", response_model=None)
    @app.get("/page/page.js", response_model=None)
    @app.get("/", response_model=None)
    async def fine() -> Response:
        return Response("fine")

    @app.get("/number/{number}", response_model=None)
    async def number(number: int) -> Response:
        return Response(str(number))

    @app.get("/raise/{what}", response_model=None)
    @app.post("/generate", response_model=None)
    async def fail(what: str = "full") -> Response:
        raise {
            "full": QueueFull("128 requests wait already", retry_after_s=7.2),
            "late": DeadlineExceeded("too late"),
            "value": ValueError("S3CRET /root/path"),
            "panic": Panic("S3CRET"),
            "field": InvalidParameter("temperature", "\U0001f600" * 5000, "0 to 2" + "\U0001f600" * 5000),
            "teapot": HTTPException(418),
        }[what]

    @app.get("/half", response_model=None)
    async def half() -> Response:
        class Half(Response):
            async def __call__(self, scope, receive, send) -> None:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"half", "more_body": True})
                raise ValueError("S3CRET")

        return Half()

    app.add_exception_handler(HeadraceError, on_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(Exception, on_unexpected)
    return Guard(app, service)


@pytest.fixture(scope="module")
def service() -> Service:
    return Service(ServeConfig(max_body_mib=0.25))


@pytest.fixture(scope="module")
def served(service: Service) -> Iterator[Served]:
    with serving(build(service), service.settings) as made:
        yield made


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    """A server with keys, that pages of one origin may call."""
    settings = ServeConfig(api_key=(KEY, OTHER_KEY), cors_origin=("https://ours",))
    with serving(build(Service(settings)), settings) as made:
        yield made


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]
    return "\r\n".join(lines).encode()


def post(body: bytes, *headers: str, path: str = "/v1/echo") -> bytes:
    return get(path, f"Content-Length: {len(body)}", *headers, method="POST") + body


def bearer(key: str) -> str:
    return f"Authorization: Bearer {key}"


# ------------------------------------------------------------ ids, errors


def test_every_answer_has_an_id_of_ours(served: Served) -> None:
    answers = [served.ask(get(path, "x-request-id: mine")) for path in ("/v1/echo", "/nowhere", "/raise/value")]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == 3
    assert all(len(one) == 32 and int(one, 16) >= 0 for one in ids)
    assert answers[0].json()["request_id"] == ids[0]
    assert all(answer.headers["x-content-type-options"] == "nosniff" for answer in answers)


def test_routes_and_methods(served: Served) -> None:
    answer = served.ask(get("/v1/nowhere"))
    assert (answer.status, answer.code, answer.headers["x-should-retry"]) == (404, "not_found", "false")
    answer = served.ask(get("/metrics", method="DELETE"))
    assert (answer.status, answer.code, answer.headers["allow"]) == (405, "method_not_allowed", "GET")
    answer = served.ask(get("/raise/teapot"))
    assert (answer.status, answer.code) == (418, "bad_request")
    answer = served.ask(get("/number/S3CRET"))
    assert (answer.status, answer.code, answer.json()["error"]["param"]) == (400, "invalid_parameter", "number")
    assert b"S3CRET" not in answer.body


def test_when_to_try_again(served: Served) -> None:
    answer = served.ask(get("/raise/full"))
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (429, "queue_full", "8")
    assert "x-should-retry" not in answer.headers
    answer = served.ask(get("/raise/late"))
    assert (answer.status, answer.code, answer.headers["x-should-retry"]) == (408, "deadline_exceeded", "false")


@pytest.mark.parametrize("what", ["value", "panic"])
def test_unexpected_errors_tell_nothing(served: Served, caplog: pytest.LogCaptureFixture, what: str) -> None:
    answer = served.ask(get(f"/raise/{what}"))
    assert (answer.status, answer.code) == (500, "internal_error")
    assert b"S3CRET" not in answer.body
    began = time.monotonic()
    while not (logged := [record for record in caplog.records if record.name == "headrace.http"]):
        assert time.monotonic() - began < 5
        time.sleep(0.005)
    assert answer.headers["x-request-id"] in logged[0].getMessage()
    assert logged[0].exc_info is not None
    assert served.ask(get("/health")).status == 200
    assert not [record for record in caplog.records if record.name == "uvicorn.error"]


def test_error_bodies_are_small(served: Served) -> None:
    answer = served.ask(get("/raise/field"))
    assert (answer.status, answer.code, answer.json()["error"]["param"]) == (400, "invalid_parameter", "temperature")
    assert len(answer.body) <= MAX_BODY_BYTES


def test_half_an_answer_is_cut(served: Served) -> None:
    """A client must not take it for a whole one."""
    with served.client() as client:
        client.send(get("/half"))
        with pytest.raises(EOFError):
            client.answer()


def test_tgi_routes_have_tgi_errors(served: Served) -> None:
    for answer in (served.ask(post(b"{}", path="/generate")), served.ask(get("/info"))):
        body = answer.json()
        assert set(body) == {"error", "error_type"}
    assert served.ask(post(b"{}", path="/generate")).status == 429
    assert error_response(InvalidJson("no"), "/generate").status_code == 422


def test_error_statuses() -> None:
    assert openai_error(UnsupportedModel("no")).headers["x-should-retry"] == "false"
    crossed = openai_error(CodedError("server_shutting_down", "bye"))
    assert (crossed.status_code, crossed.headers["retry-after"]) == (503, "1")
    assert "x-should-retry" not in openai_error(CodedError("engine_fault", "boom")).headers


# ------------------------------------------------------------ keys

ROUTES = (
    "/v1/echo",
    "/metrics",
    "/health",
    "/",
    "/nowhere",
    "/number/1",
    "/openapi.json",
    "/health/live/",
    "/page",
    "/page/live.json",
)
TRICKS = (
    "/health/live/../../v1/echo",
    "/page/../v1/echo",
    "/page/page.js/../../v1/echo",
    "/page/%2e%2e/v1/echo",
    "/health%2flive%2f..",
    "/HEALTH/LIVE",
    "/health/live;x",
    "/v1/echo?/health/live",
    "/v1/echo?key=sk-one",
)


@pytest.mark.parametrize("path", ROUTES + TRICKS)
def test_routes_need_a_key(locked: Served, path: str) -> None:
    wrong = ("", "Bearer", "Bearer ", "Bearer sk-on", "Bearer sk-one sk-one", "Basic sk-one", "sk-one", "Bearer \xff")
    for value in wrong:
        answer = locked.ask(get(path, f"Authorization: {value}"))
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert b"sk-" not in answer.body
    answer = locked.ask(get(path))
    assert answer.status == 401
    assert answer.json()["error_type" if path == "/" else "error"]
    assert locked.ask(get(path, bearer(KEY), bearer(KEY))).status == 401
    assert locked.ask(get(path, bearer(KEY))).status != 401
    assert locked.ask(get(path, f"authorization: bEARER  {OTHER_KEY} ")).status != 401
    assert locked.ask(get(path, f"Host: /health/live?{path}", bearer("x"))).status in (400, 401)


def test_open_routes(locked: Served) -> None:
    assert [locked.ask(get(path)).status for path in ("/health/live", "/health/ready", "/page/page.js")] == [200] * 3
    assert locked.ask(get("/", "Accept: text/html,*/*;q=0.8")).status == 200
    assert locked.ask(get("/", "Accept: */*")).status == 401
    assert locked.ask(get("/", "Accept: text/html;q=0")).status == 401
    assert locked.ask(get("/", "Accept: text/html", method="DELETE")).status == 401
    assert locked.ask(get("/health/live", method="DELETE")).status == 401


def test_keys_have_salts(locked: Served, served: Served) -> None:
    def salt(key: str) -> str:
        return locked.ask(get("/v1/echo", bearer(key))).json()["key_salt"]

    assert salt(KEY) == salt(KEY) != salt(OTHER_KEY)
    assert len(salt(KEY)) == 64
    assert served.ask(get("/v1/echo", bearer(KEY))).json()["key_salt"] == ""


def test_refused_bodies_are_not_read(locked: Served) -> None:
    answer = locked.refused(get("/v1/echo", "Content-Length: 100000000", method="POST") + b"x" * 100_000)
    assert answer.status == 401


# ------------------------------------------------------------ CORS


def test_cors_is_off(served: Served) -> None:
    answer = served.ask(get("/v1/echo", "Origin: https://ours"))
    assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = get("/v1/echo", "Origin: https://ours", "Access-Control-Request-Method: POST", method="OPTIONS")
    assert served.ask(preflight).status == 405


def test_cors_where_asked_for(locked: Served) -> None:
    def preflight(origin: str) -> Answer:
        asked = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization,content-type")
        return locked.ask(get("/v1/echo", f"Origin: {origin}", *asked, method="OPTIONS"))

    assert preflight("https://ours").status == 200
    assert preflight("https://ours").headers["access-control-allow-origin"] == "https://ours"
    assert preflight("https://theirs").status == 400
    for headers in ((bearer(KEY),), ()):  # refusals can be read too
        answer = locked.ask(get("/v1/echo", "Origin: https://ours", *headers))
        assert answer.headers["access-control-allow-origin"] == "https://ours"
    assert "access-control-allow-origin" not in locked.ask(get("/v1/echo", "Origin: https://theirs")).headers


# ------------------------------------------------------------ shutting down


def test_draining(served: Served, service: Service) -> None:
    service.draining = True
    try:
        answer = served.ask(post(b"{}"))
        assert (answer.status, answer.code) == (503, "server_shutting_down")
        assert int(answer.headers["retry-after"]) >= 1
        assert served.ask(get("/v1/nowhere")).status == 503
        assert [served.ask(get(path)).status for path in ("/health/live", "/health", "/metrics", "/")] == [200] * 4
    finally:
        service.draining = False
    assert served.ask(post(b"{}")).status == 200


# ------------------------------------------------------------ no room


def test_a_full_server_reads_no_body_and_keeps_the_connection(served: Served, service: Service) -> None:
    """The body is no JSON, and nobody looks; other routes go on."""
    service.refusal = QueueFull("full", retry_after_s=2.5)
    try:
        with served.client() as client:
            for path, key in (("/v1/completions", "code"), ("/generate", "error_type")):
                client.send(post(b"{nonsense", path=path))
                answer = client.answer()
                assert answer.status == 429 and answer.headers["retry-after"] == "3"
                assert key in json.dumps(answer.json())
            client.send(post(b"{}"))
            assert client.answer().status == 200
        large = served.refused(post(b" " * 100_000, path="/v1/completions"))
        assert large.status == 429
        assert served.ask(get("/v1/completions")).status == 404
        service.refusal = NotReady("the engine is not ready")
        assert served.ask(post(b"{}", path="/v1/chat/completions")).status == 503
    finally:
        service.refusal = None
    assert served.ask(post(b"{}", path="/v1/completions")).status == 404


# ------------------------------------------------------------ bodies


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Content-Type: application/json", 200),
        ("Content-Type: Application/JSON; Charset=UTF-8", 200),
        ('Content-Type: application/json; charset="utf-8"', 200),
        ("Content-Type: application/problem+json", 200),
        ("X: y", 200),
        ("Content-Type: text/plain", 415),
        ("Content-Type: application/x-www-form-urlencoded", 415),
        ("Content-Type: multipart/form-data; boundary=x", 415),
        ("Content-Type: text/x+json", 415),
        ("Content-Type: application/jsonp", 415),
        ("Content-Type: ", 415),
        ("Content-Type: application/json; charset=latin-1", 415),
        ("Content-Type: application/json\r\nContent-Type: application/json", 415),
        ("Content-Encoding: gzip", 415),
        ("Content-Encoding: identity", 200),
    ],
)
def test_kinds_of_bodies(served: Served, header: str, status: int) -> None:
    answer = served.ask(post(b'{"a": 1}', header))
    assert answer.status == status
    if status == 415:
        assert answer.code == "unsupported_media_type"


def test_sizes_of_bodies(served: Served, service: Service) -> None:
    limit = service.settings.max_body_bytes
    fits = b'{"a": "' + b"x" * (limit - 9) + b'"}'
    assert len(fits) == limit
    assert served.ask(post(fits)).status == 200
    assert served.ask(chunked(fits)).status == 200
    refused = served.refused(get("/v1/echo", "Content-Length: 1000000000", method="POST"))
    assert (refused.status, refused.code) == (413, "body_too_large")
    for data in (post(fits + b" "), chunked(fits + b" "), chunked(fits * 40)):
        answer = served.refused(data)
        assert (answer.status, answer.code) == (413, "body_too_large")


def chunked(body: bytes) -> bytes:
    pieces = [body[at : at + 60_000] for at in range(0, len(body), 60_000)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return get("/v1/echo", "Transfer-Encoding: chunked", method="POST") + framed + b"0\r\n\r\n"


@pytest.mark.parametrize("body", [b"", b'{"a": NaN}', rb'{"a": "\ud800"}', b'{"a": ' + b"[" * 100_000])
def test_bad_bodies(served: Served, body: bytes) -> None:
    answer = served.ask(post(body))
    assert (answer.status, answer.code) == (400, "invalid_json")


# ------------------------------------------------------------ the log


def test_access_log(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ServeConfig(access_log=True, api_key=(KEY,))
    guard = build(Service(settings))
    with serving(guard, settings) as served:
        body = b'{"prompt": "PRIVATE"}'
        answer = served.ask(post(body, bearer(KEY), "x-request-id: mine\x01\xe9", path="/v1/echo?q=PRIVATE"))
        assert answer.status == 400 or answer.status == 200
        answer = served.ask(post(body, bearer(KEY), "x-request-id: mine", path="/v1/echo?q=PRIVATE"))
        refused = served.ask(get("/v1/%0aecho", bearer("wrong")))
    text = capsys.readouterr().err
    lines = [json.loads(line) for line in text.splitlines()]
    done, denied = lines[-2], lines[-1]
    assert (done["method"], done["path"], done["status"], done["label"]) == ("POST", "/v1/echo", 200, "mine")
    assert done["bytes"] == len(answer.body)
    assert 0 <= done["seconds"] < 5
    assert done["request_id"] == answer.headers["x-request-id"]
    assert (denied["path"], denied["status"]) == ("/v1/\necho", refused.status)
    assert "PRIVATE" not in text
    assert KEY not in text
