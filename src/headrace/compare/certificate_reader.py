"""A certificate read strictly: every field, and no other, each of its type and within its bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from headrace.compare.certificate import ARITHMETIC, CUDA_ARITHMETIC, FORMAT, SCHEDULE, SEALED, WeightsFile, parts
from headrace.compare.verdict import Verdict
from headrace.compare.workloads import Workload, WorkloadRequest, is_digest
from headrace.core.errors import CheckpointError, InputFileError, shorten
from headrace.core.types import ImageSpan
from headrace.weights.files import parse_object, read_file

MAX_BYTES = 256 * 2**20
MAX_TEXT = 2**20
"""Characters."""
MAX_SOURCE = 2**26
"""Characters of an image's URL: a data: URL is the file itself."""
MAX_ENTRIES = 100_000
MAX_TOKENS = 2**20
"""Of a prompt or of an answer."""
MAX_ARRIVAL_S = 7 * 24 * 3600.0
MAX_COUNT = 2**53
MAX_ID = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Recorded:
    """One answer as a certificate has it."""

    prompt_sha256: str
    tokens: int
    token_ids: tuple[int, ...]
    sha256: str
    reference_ids: tuple[int, ...] | None
    """None: the same as the method's."""
    reference_sha256: str
    finish_reason: str
    verdict: Verdict
    at: int | None
    margin: float | None

    @property
    def expected(self) -> tuple[int, ...]:
        """The reference's token ids."""
        return self.token_ids if self.reference_ids is None else self.reference_ids


@dataclass(frozen=True, slots=True)
class RecordedSide:
    """Reference or method as a certificate has it."""

    name: str
    config: Mapping[str, Any] | None
    """Fields of `EngineConfig`; None: an engine from outside."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate of the right form; whether it is true is another matter."""

    raw: Mapping[str, Any]
    created: str
    model: str
    weights: tuple[WeightsFile, ...]
    tokenizer_sha256: str | None
    prompts_sha256: str
    workload: Workload
    reference: RecordedSide
    method: RecordedSide
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    results: tuple[Recorded, ...]
    """One a request of the workload."""
    verdict: Verdict
    epsilon: float
    sealed: Mapping[str, str]
    """Path of a part -> its seal (`certificate.seals`)."""

    @property
    def workload_sha256(self) -> str:
        """The workload's hash as its manifest has it."""
        return str(self.raw["workload"]["sha256"])

    @property
    def order_follows_batch(self) -> bool:
        """Whether one of the two was computed on a GPU without batch_invariant: then near-ties may fall otherwise."""
        sides = (self.reference.config or {}, self.method.config or {})
        return any(config.get("batch_invariant") is False for config in sides)

    def value(self, part: str) -> object:
        """What is at a path. Raises KeyError."""
        return dict(parts(self.raw))[part]


def read_certificate(path: Path) -> Certificate:
    """Raises InputFileError, which names the file and the field."""
    try:
        value = parse_object(read_file(path, MAX_BYTES), shorten(path.name), unique_keys=True)
    except CheckpointError as error:
        raise InputFileError(f"certificate {error}") from error
    return _certificate(_Fields(value, f"certificate {shorten(path.name)}", ""))


class _Fields:
    """An object of a certificate, whose fields are taken one by one."""

    def __init__(self, value: dict[str, Any], where: str, path: str) -> None:
        """`where` names the file, `path` the object in it."""
        self.value = value
        self._where, self._path = where, path
        self._left = set(value)

    def error(self, name: str, value: object, allowed: str) -> InputFileError:
        return InputFileError(f"{self._where}: {self._path}{name}: got {shorten(value)}, allowed: {allowed}")

    def take(self, name: str, allowed: str, is_good: Callable[[Any], bool]) -> Any:
        if name not in self.value:
            raise InputFileError(f"{self._where}: {self._path}{name}: missing")
        self._left.discard(name)
        value = self.value[name]
        if not is_good(value):
            raise self.error(name, value, allowed)
        return value

    def text(self, name: str) -> str:
        return cast("str", self.take(name, f"text of up to {MAX_TEXT} characters", _is_text))

    def digest(self, name: str) -> str:
        return cast("str", self.take(name, "64 hexadecimal digits", is_digest))

    def exactly(self, name: str, wanted: object) -> None:
        self.take(name, repr(wanted), lambda value: type(value) is type(wanted) and value == wanted)

    def verdict(self, name: str) -> Verdict:
        allowed = tuple(map(str, Verdict))
        return Verdict(self.take(name, ", ".join(allowed), lambda value: isinstance(value, str) and value in allowed))

    def flag(self, name: str) -> bool:
        return cast("bool", self.take(name, "true or false", lambda value: isinstance(value, bool)))

    def count(self, name: str, low: int = 0, high: int = MAX_COUNT) -> int:
        allowed = f"an integer from {low} to {high}"
        return cast("int", self.take(name, allowed, lambda value: _is_integer(value) and low <= value <= high))

    def number(self, name: str, high: float = MAX_COUNT) -> float:
        allowed = f"a number from 0 to {high:g}"
        return float(self.take(name, allowed, lambda value: _is_number(value) and value <= high))

    def ids(self, name: str, least: int) -> tuple[int, ...]:
        allowed = f"a list of {least} to {MAX_TOKENS} token ids from 0 to {MAX_ID}"
        return tuple(self.take(name, allowed, lambda value: _are_ids(value, least)))

    def texts(self, name: str) -> list[str]:
        return cast("list[str]", self.take(name, "a list of texts", _are_texts))

    def is_null(self, name: str) -> bool:
        """Whether the field, which may be null, is."""
        found = name in self.value and self.value[name] is None
        if found:
            self._left.discard(name)
        return found

    def fields(self, name: str) -> _Fields:
        value = self.take(name, "an object", lambda value: isinstance(value, dict))
        return _Fields(value, self._where, f"{self._path}{name}.")

    def entries(self, name: str) -> list[_Fields]:
        allowed = f"a list of 1 to {MAX_ENTRIES} objects"
        value = self.take(name, allowed, _are_objects)
        return [_Fields(entry, self._where, f"{self._path}{name}.{index}.") for index, entry in enumerate(value)]

    def named_texts(self) -> dict[str, str]:
        """The whole object, whatever its fields are called."""
        return {name: self.text(name) for name in self.value}

    def done(self) -> None:
        """Nothing else may be there."""
        if self._left:
            name = shorten(min(self._left))
            raise InputFileError(f"{self._where}: {self._path or 'the file'}: {name} is no field of {FORMAT}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _is_source(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_SOURCE


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and len(value) <= MAX_ENTRIES and all(map(_is_text, value))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and cast("float", value) >= 0


def _are_ids(value: object, least: int) -> bool:
    if not isinstance(value, list) or not least <= len(value) <= MAX_TOKENS:
        return False
    return all(_is_integer(one) and 0 <= one <= MAX_ID for one in value)


def _are_objects(value: object) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= MAX_ENTRIES and all(isinstance(one, dict) for one in value)


def _certificate(top: _Fields) -> Certificate:
    top.exactly("format", FORMAT)
    top.text("scope")
    workload = _workload(top.fields("workload"))
    prompts_sha256 = _prompts(top, workload)
    weights = _weights(top.fields("weights"))
    epsilon = top.fields("epsilon")
    epsilon.count("positions")
    epsilon.text("source")
    _margin(top.fields("margin"))
    results = tuple(_recorded(one, index) for index, one in enumerate(top.entries("results")))
    if len(results) != len(workload.requests):
        raise top.error("results", len(results), f"{len(workload.requests)} entries, one a prompt")
    found = Certificate(
        raw=top.value,
        created=top.text("created"),
        model=top.text("model"),
        weights=weights,
        tokenizer_sha256=None if top.is_null("tokenizer_sha256") else top.digest("tokenizer_sha256"),
        prompts_sha256=prompts_sha256,
        workload=workload,
        reference=_side(top.fields("reference")),
        method=_side(top.fields("method")),
        versions=top.fields("versions").named_texts(),
        machine=_machine(top.fields("machine")),
        results=results,
        verdict=top.verdict("verdict"),
        epsilon=epsilon.number("value"),
        sealed=top.fields(SEALED).named_texts(),
    )
    epsilon.done()
    top.done()
    return found


def _prompts(top: _Fields, workload: Workload) -> str:
    """The hash of all prompts."""
    prompts, sampling = top.fields("prompts"), top.fields("sampling")
    prompts.exactly("count", len(workload.requests))
    prompts.exactly("ids_included", True)
    digest = prompts.digest("sha256")
    prompts.done()
    sampling.exactly("temperature", 0)
    sampling.exactly("max_tokens", workload.max_tokens)
    sampling.exactly("ignore_eos", workload.ignore_eos)
    sampling.done()
    return digest


def _workload(fields: _Fields) -> Workload:
    """Not by `from_manifest`, which refuses what does not have its hash: here the part that was changed is to be named
    (`check.changed_parts`)."""
    requests: list[WorkloadRequest] = []
    for one in fields.entries("requests"):
        images = [_image(entry) for entry in one.entries("images")] if "images" in one.value else []
        request = WorkloadRequest(
            token_ids=one.ids("token_ids", 1),
            max_tokens=one.count("max_tokens", 1, MAX_TOKENS),
            arrival_s=one.number("arrival_s", MAX_ARRIVAL_S),
            title=one.text("title"),
            text=one.text("text"),
            images=tuple(span for span, _ in images),
            sources=tuple(source for _, source in images),
        )
        if requests and request.arrival_s < requests[-1].arrival_s:
            raise one.error("arrival_s", request.arrival_s, f"{requests[-1].arrival_s:g} or later: in order of arrival")
        requests.append(request)
    found = Workload(
        name=fields.text("name"),
        requests=tuple(requests),
        ignore_eos=fields.flag("ignore_eos"),
        templated=fields.flag("templated"),
        seed=None if fields.is_null("seed") else fields.count("seed", -MAX_COUNT),
        notes=tuple(fields.texts("notes")),
    )
    manifest = found.manifest() | {"sha256": fields.digest("sha256")}
    for name in {**manifest, **fields.value}:
        if manifest.get(name) != fields.value.get(name):
            allowed = shorten(manifest[name]) if name in manifest else "only what a workload's manifest has"
            raise fields.error(name, fields.value.get(name), allowed)
    return found


def _image(fields: _Fields) -> tuple[ImageSpan, str]:
    """Where it lies and what it is, without pixels; and where it comes from."""
    start, length = fields.count("start", 0, MAX_TOKENS), fields.count("length", 1, MAX_TOKENS)
    span = ImageSpan(start, length, fields.digest("hash"), fields.count("tiles", 1, MAX_TOKENS))
    source = fields.take("source", f"text of up to {MAX_SOURCE} characters", _is_source)
    return span, cast("str", source)


def _weights(fields: _Fields) -> tuple[WeightsFile, ...]:
    files = []
    for one in fields.entries("files"):
        files.append(WeightsFile(one.text("name"), one.count("bytes"), one.digest("sha256")))
        one.done()
    fields.digest("sha256")
    fields.digest("fingerprint")
    fields.done()
    return tuple(files)


def _margin(fields: _Fields) -> None:
    for name in ("positions", "tied_positions", "near_tied_positions"):
        fields.count(name)
    for name in ("min", "p01"):
        if not fields.is_null(name):
            fields.number(name)
    fields.done()


def _side(fields: _Fields) -> RecordedSide:
    name = fields.text("name")
    config: dict[str, Any] | None = None
    if not fields.is_null("config"):
        settings = fields.fields("config")
        config = {field: settings.text(field) for field in ARITHMETIC}
        if any(field in settings.value for field in CUDA_ARITHMETIC):
            settings.exactly("device", "cuda")
            config |= {"device": "cuda", "batch_invariant": settings.flag("batch_invariant")}
        for field in SCHEDULE:
            config[field] = settings.count(field, 1)
        settings.done()
    fields.done()
    return RecordedSide(name, config)


def _machine(fields: _Fields) -> Mapping[str, Any]:
    fields.text("cpu")
    fields.texts("isa")
    fields.text("system")
    fields.count("threads", 1, 1024)
    if not fields.is_null("gpu"):
        fields.text("gpu")
    fields.done()
    return fields.value


def _recorded(fields: _Fields, index: int) -> Recorded:
    fields.exactly("prompt", index)
    found = Recorded(
        prompt_sha256=fields.digest("prompt_sha256"),
        tokens=fields.count("tokens"),
        token_ids=fields.ids("token_ids", 0),
        sha256=fields.digest("sha256"),
        reference_ids=None if fields.is_null("reference_token_ids") else fields.ids("reference_token_ids", 0),
        reference_sha256=fields.digest("reference_sha256"),
        finish_reason=fields.text("finish_reason"),
        verdict=fields.verdict("verdict"),
        at=None if fields.is_null("at") else fields.count("at"),
        margin=None if fields.is_null("margin") else fields.number("margin"),
    )
    fields.done()
    return found
