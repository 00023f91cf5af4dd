"""Spans of a request: as OpenTelemetry's own exporters receive them, and as they go over the wire."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from headrace.core.errors import ConfigError, InvalidParameter
from headrace.server.traces import EXPORT_S, TracedRequest, Traces

AT = 1_700_000_000_000_000_000
FACTS = TracedRequest(
    id="chatcmpl-1",
    operation="chat",
    model="demo",
    arrival_ns=AT,
    joined_s=0.5,
    first_token_s=0.75,
    end_s=2.0,
    prompt_tokens=9,
    output_tokens=5,
    cached_tokens=4,
    finish_reasons=("stop",),
    temperature=0.5,
    max_tokens=16,
)
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def spans(*requests: tuple[TracedRequest, dict[str, str]]) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    traces = Traces("http://127.0.0.1:4318", exporter=exporter)
    for facts, headers in requests:
        traces.request(facts, headers)
    traces.close()
    return list(exporter.get_finished_spans())


def times(found: list[ReadableSpan]) -> dict[str, tuple[float, float]]:
    """Name -> begin and end, in seconds from arrival."""
    return {span.name: (((span.start_time or 0) - AT) / 1e9, ((span.end_time or 0) - AT) / 1e9) for span in found}


def test_a_request_and_its_phases() -> None:
    found = spans((FACTS, {}))
    assert times(found) == {"queue": (0, 0.5), "prefill": (0.5, 0.75), "decode": (0.75, 2), "chat demo": (0, 2)}
    whole = found[-1]
    assert whole.parent is None
    assert whole.kind == SpanKind.SERVER
    assert whole.status.status_code == StatusCode.UNSET
    for span in found[:-1]:
        assert span.parent is not None
        assert span.parent.span_id == whole.context.span_id
        assert span.context.trace_id == whole.context.trace_id
    assert dict(whole.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "headrace",
        "gen_ai.request.model": "demo",
        "gen_ai.response.model": "demo",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 16,
    }
    assert whole.resource.attributes["service.name"] == "headrace"


@pytest.mark.parametrize(
    ("joined_s", "first_token_s", "expected"),
    [
        (None, None, {"queue": (0, 2)}),
        (0.5, None, {"queue": (0, 0.5), "prefill": (0.5, 2)}),
        (0.5, 2.0, {"queue": (0, 0.5), "prefill": (0.5, 2), "decode": (2, 2)}),
    ],
)
def test_a_request_that_fails_ends_in_the_phase_it_had_reached(
    joined_s: float | None, first_token_s: float | None, expected: dict[str, tuple[float, float]]
) -> None:
    facts = replace(FACTS, joined_s=joined_s, first_token_s=first_token_s, finish_reasons=(), error="engine_fault")
    found = spans((facts, {}))
    assert times(found) == {**expected, "chat demo": (0, 2)}
    attributes = dict(found[-1].attributes or {})
    assert attributes["error.type"] == "engine_fault"
    assert "gen_ai.response.finish_reasons" not in attributes
    assert (found[-1].status.status_code, found[-1].status.description) == (StatusCode.ERROR, "engine_fault")


def test_the_callers_trace_goes_on() -> None:
    whole = spans((FACTS, {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=1"}))[-1]
    assert whole.parent is not None
    assert (f"{whole.parent.trace_id:032x}", f"{whole.parent.span_id:016x}") == (TRACE, PARENT)
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert whole.context.trace_state.get("a") == "1"


def test_a_trace_that_is_not_sampled_is_not_sent() -> None:
    assert spans((FACTS, {"traceparent": f"00-{TRACE}-{PARENT}-00"})) == []


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        "x" * 5000,
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        "é-\ud800-1-1",
    ],
)
def test_a_malformed_parent_is_none(header: str) -> None:
    whole = spans((FACTS, {"traceparent": header}))[-1]
    assert whole.parent is None


class Collector(BaseHTTPRequestHandler):
    """Takes what is posted."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((self.path, body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def collector() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.received = []
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("path", ["", "/", "/v1/traces", "/behind/a/proxy"])
def test_over_the_wire(collector: Any, path: str) -> None:
    traces = Traces(f"http://127.0.0.1:{collector.server_port}{path}", service_name="ours")
    traces.request(FACTS, {})
    traces.close()
    ((where, body),) = collector.received
    assert where == ("/behind/a/proxy/v1/traces" if "proxy" in path else "/v1/traces")
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert {one.key: one.value.string_value for one in resource.resource.attributes}["service.name"] == "ours"
    assert [span.name for span in resource.scope_spans[0].spans] == ["queue", "prefill", "decode", "chat demo"]


def test_a_collector_that_is_away_does_not_keep_the_server(caplog: pytest.LogCaptureFixture) -> None:
    traces = Traces("http://127.0.0.1:9")
    begin = time.monotonic()
    for _ in range(3000):
        traces.request(FACTS, {})
    assert time.monotonic() - begin < 5
    begin = time.monotonic()
    with caplog.at_level(logging.CRITICAL):
        traces.close()
    assert time.monotonic() - begin < 4 * EXPORT_S


@pytest.mark.parametrize(
    "endpoint",
    ["", "127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://", "http://[::1", "http://host:port", "ftp://host"],
)
def test_an_address_that_is_none(endpoint: str) -> None:
    with pytest.raises(InvalidParameter, match=r"otlp_endpoint: got .* allowed: an address such as http"):
        Traces(endpoint)


@pytest.mark.parametrize(
    "missing", ["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter"]
)
def test_without_the_packages_the_server_says_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match="opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http"):
        Traces("http://127.0.0.1:4318")
