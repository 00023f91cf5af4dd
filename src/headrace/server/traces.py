"""OpenTelemetry traces of requests, sent by OTLP over HTTP; only where they are asked for.

A request is one span with a child for each phase: queue, prefill, decode. They are made when the request has ended,
from the times that its answer holds, so that nothing is added while it runs. Attributes are named by OpenTelemetry's
semantic conventions for generative AI; text of prompts and answers is never among them. Spans wait in a bounded queue
and leave from a thread of their own: a collector that is slow or away costs spans, not requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from headrace import __version__
from headrace.core.errors import ConfigError, InvalidParameter
from headrace.core.types import Request
from headrace.engine.answer import Completion

EXPORT_S = 2.0
"""Most seconds for one batch of spans to leave."""
NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """What is told of one answer. Times are seconds from its arrival; None: it did not come so far."""

    id: str
    operation: str
    """chat, text_completion or generate_content, as the conventions call them."""
    model: str
    arrival_ns: int
    """Nanoseconds since 1970 (`time.time_ns`)."""
    joined_s: float | None
    """It joined the running batch."""
    first_token_s: float | None
    end_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    finish_reasons: tuple[str, ...] = ()
    error: str = ""
    """The error's code; empty: none."""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None

    def attributes(self) -> dict[str, Any]:
        """By their names in the conventions, without those that have no value."""
        known = {
            "gen_ai.operation.name": self.operation,
            "gen_ai.provider.name": "headrace",
            "gen_ai.request.model": self.model,
            "gen_ai.response.model": self.model,
            "gen_ai.response.id": self.id,
            "gen_ai.response.finish_reasons": self.finish_reasons or None,
            "gen_ai.usage.input_tokens": self.prompt_tokens,
            "gen_ai.usage.output_tokens": self.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": self.cached_tokens,
            "gen_ai.request.temperature": self.temperature,
            "gen_ai.request.top_p": self.top_p,
            "gen_ai.request.max_tokens": self.max_tokens,
            "gen_ai.request.seed": self.seed,
            "error.type": self.error or None,
        }
        return {name: value for name, value in known.items() if value is not None}

    def phases(self) -> list[tuple[str, float, float]]:
        """(name, begin, end) of each; a request that ends early ends in the phase that it had reached."""
        marks = [("queue", 0.0), ("prefill", self.joined_s), ("decode", self.first_token_s)]
        begun = [(name, at) for name, at in marks if at is not None]
        ends = [at for _, at in begun[1:]] + [self.end_s]
        return [(name, at, max(at, end)) for (name, at), end in zip(begun, ends, strict=True)]


def traced(request: Request, completion: Completion, operation: str, model: str, arrival_ns: int) -> TracedRequest:
    """What is told of an answer."""
    sampling = request.sampling
    error = completion.error
    return TracedRequest(
        id=request.id,
        operation=operation,
        model=request.adapter or model,
        arrival_ns=arrival_ns,
        joined_s=completion.queue_s,
        first_token_s=completion.ttft_s,
        end_s=completion.latency_s or 0.0,
        prompt_tokens=len(completion.prompt_token_ids),
        output_tokens=len(completion.token_ids),
        cached_tokens=completion.cached_tokens,
        finish_reasons=(completion.finish_reason,) if completion.finish_reason else (),
        error="" if error is None else error.code,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
    )


class Traces:
    """Sends the spans of one server."""

    def __init__(self, endpoint: str, service_name: str = "headrace", exporter: Any = None) -> None:
        """`endpoint`: of a collector, such as http://127.0.0.1:4318; `exporter`: an OpenTelemetry SpanExporter to use
        instead. Raises InvalidParameter for what is no such address, ConfigError where the packages are missing."""
        url = _traces_url(endpoint)
        try:
            self._trace = import_module("opentelemetry.trace")
            resources = import_module("opentelemetry.sdk.resources")
            sdk = import_module("opentelemetry.sdk.trace")
            export = import_module("opentelemetry.sdk.trace.export")
            propagation = import_module("opentelemetry.trace.propagation.tracecontext")
            if exporter is None:
                otlp = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
                exporter = otlp.OTLPSpanExporter(endpoint=url, timeout=EXPORT_S)
        except ImportError as error:
            raise ConfigError(
                "otlp_endpoint: traces need the packages opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http, "
                f"which are not installed ({error.name})"
            ) from error
        resource = resources.Resource.create({"service.name": service_name, "service.version": __version__})
        self._provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("headrace", __version__)
        self._propagator = propagation.TraceContextTextMapPropagator()

    def request(self, facts: TracedRequest, headers: Mapping[str, str]) -> None:
        """An answer has ended. Its parent is the span that `traceparent` names among the headers (in lower case), and
        it is traced if that one is; a malformed one is as none."""
        trace = self._trace
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        span = self._tracer.start_span(
            f"{facts.operation} {facts.model}",
            context=self._propagator.extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes=facts.attributes(),
            start_time=facts.arrival_ns,
        )
        if facts.error:
            span.set_status(trace.Status(trace.StatusCode.ERROR, facts.error))
        inside = trace.set_span_in_context(span)
        for name, begin_s, end_s in facts.phases():
            phase = self._tracer.start_span(name, context=inside, start_time=facts.arrival_ns + int(begin_s * NS))
            phase.end(facts.arrival_ns + int(end_s * NS))
        span.end(facts.arrival_ns + int(facts.end_s * NS))

    def close(self) -> None:
        """Sends what is left, and takes no more. Blocks for about EXPORT_S where the collector is away."""
        self._provider.shutdown()


def _traces_url(endpoint: str) -> str:
    """The collector's address for traces: `/v1/traces` below the one given, unless that is it."""
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        raise InvalidParameter("otlp_endpoint", endpoint, "an address such as http://127.0.0.1:4318")
    base = endpoint.rstrip("/")
    return base if base.endswith("/v1/traces") else f"{base}/v1/traces"
