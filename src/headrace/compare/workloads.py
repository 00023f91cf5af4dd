"""What every method is asked: prompts as token ids, when each arrives, how long its answer is and when it stops."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from headrace.core.types import SamplingParams

FORMAT = "headrace-workload/1"


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
        """All that a run depends on, as a JSON object; `from_manifest` reads it."""
        return {
            "format": FORMAT,
            "name": self.name,
            "temperature": 0,
            "ignore_eos": self.ignore_eos,
            "templated": self.templated,
            "seed": self.seed,
            "notes": list(self.notes),
            "requests": [
                {
                    "token_ids": list(one.token_ids),
                    "max_tokens": one.max_tokens,
                    "arrival_s": one.arrival_s,
                    "title": one.title,
                    "text": one.text,
                }
                for one in self.requests
            ],
        }

    @cached_property
    def sha256(self) -> str:
        """Of what decides the work: token ids, lengths, arrivals, sampling and the stop rule."""
        work = [(one.token_ids, one.max_tokens, one.arrival_s) for one in self.requests]
        decides = {"requests": work, "temperature": 0, "ignore_eos": self.ignore_eos}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def from_manifest(manifest: Mapping[str, Any]) -> Workload:
    """What `Workload.manifest` gave, already checked."""
    requests = tuple(
        WorkloadRequest(tuple(one["token_ids"]), one["max_tokens"], one["arrival_s"], one["title"], one["text"])
        for one in manifest["requests"]
    )
    return Workload(
        manifest["name"],
        requests,
        manifest["ignore_eos"],
        manifest["templated"],
        manifest["seed"],
        tuple(manifest["notes"]),
    )
