"""What every method is asked: prompts as token ids, when each arrives, how long its answer is and when it stops."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from headrace.core.errors import InvalidParameter
from headrace.core.types import ImageSpan, SamplingParams

FORMAT = "headrace-workload/1"
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request of a workload."""

    token_ids: tuple[int, ...]
    """The prompt."""
    max_tokens: int
    arrival_s: float = 0.0
    """Seconds from the start of a run, ≥ 0."""
    title: str = ""
    text: str = ""
    """The prompt as it was written; empty where it never was text."""
    images: tuple[ImageSpan, ...] = ()
    """In the prompt's order; without pixels as they come out of a manifest (`pictures.with_pixels` reads those)."""
    sources: tuple[str, ...] = ()
    """One an image: picture:NAME for one of `compare.pictures`, else its URL."""

    @property
    def work(self) -> tuple[object, ...]:
        """What decides the work, as JSON takes it; images by their hashes."""
        images = [(one.start, one.length, one.tiles, one.hash) for one in self.images]
        return (self.token_ids, self.max_tokens, float(self.arrival_s), *([images] if images else ()))

    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "token_ids": list(self.token_ids),
            "max_tokens": self.max_tokens,
            "arrival_s": float(self.arrival_s),
            "title": self.title,
            "text": self.text,
        }
        if self.images:
            pairs = zip(self.images, self.sources, strict=True)
            found["images"] = [
                {"source": source, "hash": one.hash, "tiles": one.tiles, "start": one.start, "length": one.length}
                for one, source in pairs
            ]
        return found


@dataclass(frozen=True)
class Workload:
    """The same for every method; answered greedily, each request up to its `max_tokens` or its natural end."""

    name: str
    requests: tuple[WorkloadRequest, ...]
    """At least one; in order of arrival."""
    ignore_eos: bool = False
    """Every answer has exactly `max_tokens` tokens."""
    templated: bool = False
    """Whether the texts went through the model's chat template; else they are plain text."""
    seed: int | None = None
    """What arrivals, lengths and prompts were drawn with; None: nothing was drawn."""
    notes: tuple[str, ...] = ()
    """What a reader has to know of it, in sentences (that lengths were cut, and from what)."""

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        return tuple(one.token_ids for one in self.requests)

    @property
    def max_tokens(self) -> int:
        """Of the longest answer that is allowed."""
        return max(one.max_tokens for one in self.requests)

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return max(len(one.token_ids) + one.max_tokens for one in self.requests)

    @property
    def together(self) -> bool:
        """Whether all requests arrive at once."""
        return all(one.arrival_s == 0 for one in self.requests)

    def sampling(self, index: int) -> SamplingParams:
        """Of the request `index`."""
        return SamplingParams(max_tokens=self.requests[index].max_tokens, ignore_eos=self.ignore_eos)

    def warm_up(self, max_tokens: int, most: int) -> Workload:
        """A short piece of it: its first `most` requests at once, each answered with up to `max_tokens` tokens."""
        first = self.requests[:most]
        short = tuple(replace(one, max_tokens=min(max_tokens, one.max_tokens), arrival_s=0.0) for one in first)
        return replace(self, requests=short)

    def manifest(self) -> dict[str, Any]:
        """All that a run depends on, as a JSON object; `from_manifest` reads it. Of an image it has the source and the
        hash, not the pixels."""
        return {
            "format": FORMAT,
            "name": self.name,
            "temperature": 0,
            "ignore_eos": self.ignore_eos,
            "templated": self.templated,
            "seed": self.seed,
            "notes": list(self.notes),
            "requests": [one.manifest() for one in self.requests],
            "sha256": self.sha256,
        }

    @cached_property
    def sha256(self) -> str:
        """Of what decides the work: token ids, images, lengths, arrivals, sampling and the stop rule."""
        work = [one.work for one in self.requests]
        decides = {"requests": work, "temperature": 0, "ignore_eos": self.ignore_eos}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def from_manifest(manifest: Mapping[str, Any]) -> Workload:
    """The workload that `Workload.manifest` told of, checked against its hash; its images without pixels. Raises
    InvalidParameter, which names the field (`requests[3].max_tokens`)."""
    _take(manifest, "", "format", FORMAT.__eq__, FORMAT)
    _take(manifest, "", "temperature", _is_zero, "0: answers are greedy")
    requests = _take(manifest, "", "requests", _is_list, "a list of at least one request")
    found = Workload(
        name=_take(manifest, "", "name", _is_text, "a string"),
        requests=tuple(_request(one, f"requests[{index}]") for index, one in enumerate(requests)),
        ignore_eos=_take(manifest, "", "ignore_eos", _is_flag, "true or false"),
        templated=_take(manifest, "", "templated", _is_flag, "true or false"),
        seed=_take(manifest, "", "seed", lambda value: value is None or type(value) is int, "an integer or null"),
        notes=tuple(_take(manifest, "", "notes", _is_texts, "a list of strings")),
    )
    times = [one.arrival_s for one in found.requests]
    for index, (before, after) in enumerate(pairwise(times), 1):
        if after < before:
            raise InvalidParameter(f"requests[{index}].arrival_s", after, f"{before:g} or later: in order of arrival")
    _take(manifest, "", "sha256", found.sha256.__eq__, f"{found.sha256}, of what the requests are now")
    return found


def _request(value: object, where: str) -> WorkloadRequest:
    if not isinstance(value, Mapping):
        raise InvalidParameter(where, value, "an object")
    where += "."
    listed = value.get("images", [])
    if not isinstance(listed, list) or ("images" in value and not listed):
        raise InvalidParameter(f"{where}images", listed, "a list of at least one image, or to leave it out")
    images = [_image(one, f"{where}images[{index}]") for index, one in enumerate(listed)]
    return WorkloadRequest(
        token_ids=tuple(_take(value, where, "token_ids", _is_token_ids, "a list of at least one token id")),
        max_tokens=_take(value, where, "max_tokens", lambda one: type(one) is int and one >= 1, "an integer from 1"),
        arrival_s=float(_take(value, where, "arrival_s", _is_time, "a finite number of seconds, 0 or more")),
        title=_take(value, where, "title", _is_text, "a string"),
        text=_take(value, where, "text", _is_text, "a string"),
        images=tuple(span for span, _ in images),
        sources=tuple(source for _, source in images),
    )


def _image(value: object, where: str) -> tuple[ImageSpan, str]:
    if not isinstance(value, Mapping):
        raise InvalidParameter(where, value, "an object")
    where += "."
    start = _take(value, where, "start", lambda one: type(one) is int and one >= 0, "an integer from 0")
    length, tiles = (
        _take(value, where, name, lambda one: type(one) is int and one >= 1, "an integer from 1")
        for name in ("length", "tiles")
    )
    digest = _take(value, where, "hash", is_digest, "64 hexadecimal digits")
    return ImageSpan(start, length, digest, tiles), _take(value, where, "source", _is_text, "a string")


def _take(source: Mapping[str, Any], where: str, name: str, is_good: Callable[[Any], object], allowed: str) -> Any:
    value = source.get(name)
    if is_good(value) is not True:
        raise InvalidParameter(where + name, value, allowed)
    return value


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_zero(value: object) -> bool:
    return type(value) in (int, float) and value == 0


def is_digest(value: object) -> bool:
    """Whether it is a SHA-256 in hex."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _is_list(value: object) -> bool:
    return isinstance(value, list) and bool(value)


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int and one >= 0 for one in value)


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


def check_room(prompt_field: str, count: int, answer_field: str, max_tokens: int, max_model_len: int) -> None:
    """Whether a prompt of `count` tokens and its whole answer fit a context. Raises InvalidParameter, which names the
    field that is at fault. An answer that the context cuts would be cut by some methods and not by others."""
    if not 1 <= count < max_model_len:
        allowed = f"1 to {max_model_len - 1} tokens, in a context of {max_model_len} for prompt and answer together"
        raise InvalidParameter(prompt_field, count, allowed)
    room = max_model_len - count
    if not 1 <= max_tokens <= room:
        allowed = f"1 to {room}, the room that a prompt of {count} tokens leaves in the context of {max_model_len}"
        raise InvalidParameter(answer_field, max_tokens, allowed)


def repeat(requests: Sequence[WorkloadRequest], count: int) -> tuple[WorkloadRequest, ...]:
    """The first `count` of them, begun again from the first where there are fewer."""
    return tuple(requests[index % len(requests)] for index in range(count))
