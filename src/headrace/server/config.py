"""What a user may set of the server. Flags of `headrace serve` are made from these fields and their docstrings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from headrace.core.errors import InvalidParameter

TOOL_PARSERS = ("auto", "hermes", "llama3", "mistral")
METRIC_NAMES = ("headrace", "vllm", "tgi")
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
TEXT_BODY_MIB = 2.0
"""Largest body that has no images."""
IMAGE_BODY_MIB = 64.0
"""At most so much more for images, unless --max-body-mib says otherwise."""
BASE64 = 4 / 3
"""Characters a byte."""


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Settings of one server. Raises InvalidParameter."""

    host: str = "127.0.0.1"
    """Address to listen on. Another than the machine's own needs an API key, or --insecure."""
    port: int = 8000
    """Port to listen on; 0: any free one, which is printed."""
    api_key: tuple[str, ...] = ()
    """A key that clients may send as `Authorization: Bearer KEY`. Also taken from the environment: HEADRACE_API_KEY."""
    insecure: bool = False
    """Listen on other addresses without a key."""
    served_model_name: tuple[str, ...] = ()
    """A name that clients may ask for; the first is what answers say. Otherwise the model's own."""
    max_queued: int = 128
    """Most requests that wait to join the running batch; more are answered with 429 and when to try again."""
    queue_timeout: float = 60.0
    """Most seconds a request waits to join the running batch."""
    drain: float = 30.0
    """Seconds that running requests get to finish after SIGTERM; a second signal ends them at once."""
    header_timeout: float = 10.0
    """Most seconds for a request's headers to arrive."""
    body_timeout: float = 30.0
    """Most seconds for a request's body to arrive."""
    write_timeout: float = 30.0
    """Most seconds that a client may leave an answer unread."""
    max_body_mib: float | None = None
    """Largest body of a request, in MiB. Otherwise 2, and up to 64 more where the model reads images."""
    max_held_mib: int = 1024
    """Memory for long bodies that are read and for the pixels of requests that wait or run, in MiB; a request that
    finds none left is answered with 429 and when to try again."""
    keep_alive: float = 15.0
    """Seconds of silence after which a stream sends a comment; 0: never."""
    cors_origin: tuple[str, ...] = ()
    """An origin whose pages may call the server (CORS)."""
    tool_parser: str = "auto"
    """How the model writes tool calls: auto (from its chat template), hermes, llama3 or mistral."""
    strict: bool = False
    """Refuse bodies with unknown fields, which are otherwise ignored and named in the header x-headrace-ignored."""
    metrics_as: tuple[str, ...] = ("headrace",)
    """Names under which /metrics shows the figures: headrace, vllm or tgi."""
    price_per_kwh: float = 0.0
    """Price of a kilowatt-hour, in any currency: /metrics then shows what requests cost. 0: it does not."""
    otlp_endpoint: str = ""
    """Address of an OpenTelemetry collector that is sent a trace of each request, such as http://127.0.0.1:4318. Also
    taken from the environment: OTEL_EXPORTER_OTLP_ENDPOINT."""
    access_log: bool = False
    """Log a line for each request: method, path, status, times, counts; never text."""

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise InvalidParameter("host", self.host, "an address")
        _number("port", self.port, 0, 65535, int)
        _number("max_queued", self.max_queued, 0, 1_000_000, int)
        for name in ("queue_timeout", "header_timeout", "body_timeout", "write_timeout"):
            _number(name, getattr(self, name), 0.1, 86_400)
        for name in ("drain", "keep_alive"):
            _number(name, getattr(self, name), 0, 86_400)
        _number("price_per_kwh", self.price_per_kwh, 0, 1e9)
        if self.max_body_mib is not None:
            _number("max_body_mib", self.max_body_mib, 0.001, 1024)
        _number("max_held_mib", self.max_held_mib, 16, 1_048_576, int)
        if self.tool_parser not in TOOL_PARSERS:
            raise InvalidParameter("tool_parser", self.tool_parser, ", ".join(TOOL_PARSERS))
        for name in self.metrics_as:
            if name not in METRIC_NAMES:
                raise InvalidParameter("metrics_as", name, ", ".join(METRIC_NAMES))
        for name, values in (("api_key", self.api_key), ("served_model_name", self.served_model_name)):
            if not all(isinstance(value, str) and value for value in values):
                raise InvalidParameter(name, "an empty one", "texts of at least one character")
        if self.host not in LOOPBACK and not self.api_key and not self.insecure:
            raise InvalidParameter(
                "host", self.host, "127.0.0.1 without an API key; another address with --api-key KEY, or --insecure"
            )

    @property
    def max_body_bytes(self) -> int:
        return int((TEXT_BODY_MIB if self.max_body_mib is None else self.max_body_mib) * 2**20)

    def with_images(self, most: int, image_mib: float) -> ServeConfig:
        """The same where the model reads up to `most` images of `image_mib` MiB each: bodies have room for them."""
        if self.max_body_mib is not None:
            return self
        return replace(self, max_body_mib=TEXT_BODY_MIB + min(most * image_mib * BASE64, IMAGE_BODY_MIB))


def _number(name: str, value: object, low: float, high: float, kind: type = float) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int if kind is int else int | float)
    if wrong or not low <= value <= high:  # type: ignore[operator]
        what = "an integer" if kind is int else "a number"
        raise InvalidParameter(name, value, f"{what} from {low} to {high}")
