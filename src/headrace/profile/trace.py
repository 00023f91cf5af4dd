"""The ranges as a JSON trace that ui.perfetto.dev and chrome://tracing open (Trace Event Format)."""

from __future__ import annotations

import json
from typing import Any

from headrace.backends.ranges import LAYER, Range
from headrace.profile.ranges import Node, walk
from headrace.profile.run import Profile

PROCESS, THREAD = 1, 1
"""Numbers in the trace, which has one of each: whatever the ranges hold lies on the thread that leads."""


def trace(profile: Profile) -> dict[str, Any]:
    """Times are microseconds from the begin of the load."""
    start_ns = profile.load.begin_ns
    steps = {step.begin_ns: step for step in profile.steps}
    events = [
        _name("process_name", f"headrace profile: {profile.model_name}"),
        _name("thread_name", "engine and backend"),
        *(_event(one, start_ns, {}) for one in (profile.load, *profile.before)),
    ]
    for node in walk(profile.roots):
        arguments = _arguments(node)
        step = steps.get(node.range.begin_ns)
        if step is not None and step.phase == node.range.name:
            arguments |= {"rows": step.rows, "tokens": step.tokens}
        events.append(_event(node.range, start_ns, arguments))
    work = profile.work
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "model": profile.model_name,
            "backend": profile.how,
            "requests": work.requests,
            "prompt_tokens": work.prompt_tokens,
            "max_tokens": work.max_tokens,
        },
    }


def trace_json(profile: Profile) -> str:
    return json.dumps(trace(profile), allow_nan=False, separators=(",", ":")) + "\n"


def _name(kind: str, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": PROCESS, "tid": THREAD, "args": {"name": name}}


def _event(one: Range, start_ns: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": f"layer {one.layer}" if one.name == LAYER else one.name,
        "cat": "operator" if one.is_detail else "headrace",
        "ts": (one.begin_ns - start_ns) / 1000,
        "dur": (one.end_ns - one.begin_ns) / 1000,
        "pid": PROCESS,
        "tid": THREAD,
        "args": arguments,
    }


def _arguments(node: Node) -> dict[str, Any]:
    one = node.range
    found: dict[str, Any] = {} if one.layer is None else {"layer": one.layer}
    if one.weight_bytes:
        found["weight_bytes"] = one.weight_bytes
    if one.multiply_adds:
        found["floating_point_operations"] = 2 * one.multiply_adds
    return found
