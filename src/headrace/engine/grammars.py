"""The grammars of running requests: compiled beside the engine's loop, once for all requests of the same one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from headrace.core.errors import EngineError, HeadraceError
from headrace.core.types import Request
from headrace.text.grammar import Grammar, GrammarCompiler, Matcher, Vocabulary, require_llguidance

_MAX_CACHED = 32
_MAX_CACHED_CHARACTERS = 2**20
"""Of the texts of all cached grammars."""


@dataclass(slots=True, eq=False)
class _Live:
    """A request's grammar. `matcher` has taken `taken`, the answer's tokens so far."""

    grammar: Future[Grammar]
    stop_ids: tuple[int, ...]
    matcher: Matcher | None = None
    taken: list[int] = field(default_factory=list)


class Grammars:
    """Not thread-safe: for the engine's own thread. Nothing here waits, but `mask` for a fraction of a millisecond."""

    def __init__(self, make_vocabulary: Callable[[], Vocabulary]) -> None:
        """`make_vocabulary` is called once, on a thread of ours, with the first grammar."""
        self._make_vocabulary = make_vocabulary
        self._compiler: GrammarCompiler | None = None
        """Made, and used, on the one thread of `_pool` alone."""
        self._pool = ThreadPoolExecutor(1, "grammars")
        self._cache: OrderedDict[str, Future[Grammar]] = OrderedDict()
        self._live: dict[str, _Live] = {}

    def begin(self, request: Request) -> None:
        """Starts to compile the request's grammar, if no other has. Until `drop`, the request is known here. Raises
        BackendUnavailable without llguidance."""
        require_llguidance()
        text = request.grammar
        found = self._cache.pop(text, None)
        if found is None:
            found = self._pool.submit(self._compile, text)
        self._cache[text] = found
        while len(self._cache) > _MAX_CACHED or sum(map(len, self._cache)) > _MAX_CACHED_CHARACTERS:
            self._cache.popitem(last=False)
        self._live[request.id] = _Live(found, request.sampling.stop_token_ids)

    def state(self, request_id: str) -> Literal["compiling", "ready"]:
        """Whether `mask` may be asked. Raises the grammar's GrammarError, or EngineError where it is not at fault."""
        live = self._live[request_id]
        if live.matcher is not None:
            return "ready"
        if not live.grammar.done():
            return "compiling"
        fault = live.grammar.exception()
        if isinstance(fault, HeadraceError):
            raise fault
        if fault is not None:  # a panic of the library is a BaseException
            raise EngineError(f"{type(fault).__name__} in the grammar: {' '.join(str(fault).split())[:200]}")
        live.matcher = live.grammar.result().start(live.stop_ids)
        return "ready"

    def mask(self, request_id: str, output_ids: Sequence[int]) -> bytes:
        """Which tokens may follow `output_ids`, all tokens of the answer so far: as `RowStep.mask` has it.

        Raises GrammarError where the answer has left the grammar, or following it costs too much.
        """
        live = self._live[request_id]
        if live.matcher is None and self.state(request_id) != "ready":
            raise EngineError(f"the grammar of request {request_id} is not compiled yet")
        assert live.matcher is not None
        taken = live.taken
        if len(output_ids) < len(taken) or (taken and output_ids[len(taken) - 1] != taken[-1]):
            live.matcher = live.grammar.result().start(live.stop_ids)
            taken.clear()
        new = output_ids[len(taken) :]
        if new:
            live.matcher.advance(new)
            taken += new
        return live.matcher.mask()

    def drop(self, request_id: str) -> None:
        """The request has ended; unknown ones are no error."""
        self._live.pop(request_id, None)

    def close(self) -> None:
        """Idempotent. What is being compiled goes on to its end, on its thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, text: str) -> Grammar:
        if self._compiler is None:
            self._compiler = GrammarCompiler(self._make_vocabulary())
        return self._compiler.compile(text)
