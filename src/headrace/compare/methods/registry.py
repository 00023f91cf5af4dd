"""Names of methods, as a user writes them, to methods."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.compare.methods import Method
from headrace.compare.methods.admission import DESCRIPTIONS, AdmissionMethod
from headrace.compare.methods.bench import Bench
from headrace.compare.methods.dataloader import DataLoaderMethod
from headrace.compare.methods.instances import MOST as MOST_INSTANCES
from headrace.compare.methods.instances import InstancesMethod
from headrace.compare.methods.no_kv_cache import NoKvCacheMethod
from headrace.compare.methods.plain_attention import PlainAttentionMethod
from headrace.compare.methods.quantised import QuantisedMethod
from headrace.compare.methods.threads import ThreadsMethod
from headrace.compare.peers import ENGINES, parse_spec
from headrace.core.errors import InvalidParameter
from headrace.sched.policy import ALLOWED as POLICIES
from headrace.sched.policy import parse_policy

if TYPE_CHECKING:
    from headrace.compare.peer_setup import PeerCache

URL = "url:"
"""What the name of a server begins with."""
MOST_ROWS = 4096
"""Requests that may be computed at one time (`max_num_seqs`)."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """A method of ours that is no admission policy."""

    what: str
    """For a reader of the help."""
    make: Callable[[str, int | None, Bench], Method]
    """From its name and the number in it."""
    letter: str = ""
    """What its number is called; empty: it takes none."""
    most: int = 0
    """Its largest number."""

    def form(self, name: str) -> str:
        """How it is written."""
        return f"{name}[:{self.letter}]" if self.letter else name


KINDS: Mapping[str, _Kind] = {
    "dataloader": _Kind(
        "static batches of B (all that wait, at most 32), each computed until its longest answer has ended",
        DataLoaderMethod,
        "B",
        MOST_ROWS,
    ),
    "threads": _Kind(
        "K Python threads (one a request, at most 8) over one model, a request each", ThreadsMethod, "K", MOST_ROWS
    ),
    "instances": _Kind(
        "K processes (one a request, at most 32) with a copy of the model each, a request each",
        InstancesMethod,
        "K",
        MOST_INSTANCES,
    ),
    "no-kv-cache": _Kind(
        "serial, each token computing the whole sequence again", lambda name, _, bench: NoKvCacheMethod(name, bench)
    ),
    "plain-attention": _Kind(
        "serial on torch on the CPU, attention with the whole matrix of scores in memory",
        lambda name, _, bench: PlainAttentionMethod(name, bench),
    ),
    "fused-int8": _Kind(
        "fused, weights rounded to int8 at load", lambda name, _, bench: QuantisedMethod(name, "int8", bench)
    ),
    "fused-int4": _Kind(
        "fused, weights rounded to int4 at load", lambda name, _, bench: QuantisedMethod(name, "int4", bench)
    ),
    "fused-fp8": _Kind(
        "fused, weights and activations rounded to fp8 (NVIDIA GPUs from compute capability 8.9 on)",
        lambda name, _, bench: QuantisedMethod(name, "fp8", bench),
    ),
}
"""Beside those that `sched.policy` names."""


def known() -> Sequence[str]:
    """How every method is written, and what it does: a line each, for a help text."""
    letters = {"static": "B", "window": "MS"}
    policies = [
        f"{kind}:{letters[kind]}: {what.format(letters[kind])}" if kind in letters else f"{kind}: {what}"
        for kind, what in DESCRIPTIONS.items()
    ]
    return (
        *policies,
        *(f"{kind.form(name)}: {kind.what}" for name, kind in KINDS.items()),
        f"ENGINE[:PRECISION]: an engine from outside ({', '.join(ENGINES)})",
        f"{URL}ADDRESS: a server that speaks OpenAI's protocol",
    )


def check_names(names: Sequence[str]) -> None:
    """Raises InvalidParameter unless every name is a method. A server is checked when its method is made."""
    for name in names:
        if is_outside(name):
            # Which precision one without any gets is for the checkpoint to say: it has one.
            parse_spec(name, "f32", "methods")
        elif not name.startswith(URL) or name == URL:
            _parse(name)


def make_method(name: str, bench: Bench, peers: PeerCache | None = None, api_key: str = "") -> Method:
    """The method of that name, not started. `peers`: where outside engines are set up; `api_key`: for a server's
    Authorization header. Raises InvalidParameter, ConfigError for a wrong address."""
    if name.startswith(URL):
        from headrace.compare.methods.url import UrlMethod

        return UrlMethod(name, bench, api_key)
    if is_outside(name):
        from headrace.compare.methods.outside import make_outside

        return make_outside(name, bench, peers)
    kind, number = _parse(name)
    return AdmissionMethod(name, name, bench) if kind is None else kind.make(name, number, bench)


def is_outside(name: str) -> bool:
    """Whether it is an engine of `compare.peers`."""
    return re.split("[:,]", name, maxsplit=1)[0] in ENGINES


def _parse(name: str) -> tuple[_Kind | None, int | None]:
    """What is ours, and its number; no kind: an admission policy. Raises InvalidParameter."""
    head, colon, number = name.partition(":")
    kind = KINDS.get(head)
    if kind is None:
        try:
            parse_policy(name)
        except InvalidParameter as error:
            raise InvalidParameter("methods", name, _allowed()) from error
        return None, None
    if not colon:
        return kind, None
    if kind.letter and number.isascii() and number.isdecimal() and 1 <= int(number[:10]) <= kind.most:
        return kind, int(number)
    letter = kind.letter
    allowed = f"{kind.form(head)} (1 ≤ {letter} ≤ {kind.most})" if letter else f"{head}, without a number"
    raise InvalidParameter("methods", name, allowed)


def _allowed() -> str:
    ours = ", ".join(kind.form(name) for name, kind in KINDS.items())
    return f"a comma-separated list of {POLICIES}, {ours}, {URL}ADDRESS, or an engine: {', '.join(ENGINES)}"
