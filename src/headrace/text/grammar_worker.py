"""Checks grammars in a process that can be killed: a grammar is untrusted, and threads cannot be stopped."""

from __future__ import annotations

import signal
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from headrace.core.errors import GrammarError, QueueFull
from headrace.text.child_process import ChildProcess, ChildStopped
from headrace.text.grammar import Vocabulary, require_llguidance

_MIB = 2**20
_MAX_GRAMMAR = 2**19
"""Bytes, after it is put in llguidance's form; what clients send is bounded by the routes."""
# The kinds of answer, as grammar_child writes them; that module is not imported here, since it imports llguidance.
_TAKEN, _RETIRE, _FAULT = b"t", b"T", b"f"
_PACKAGES = ("llguidance",)
_NO_ROOM = "the grammar is too complex: compiling it takes more memory, or more stack, than it may have"
_MAX_REMEMBERED = 4 * _MIB
_VERDICT_BYTES = 512
"""What remembering one costs, beside its texts."""


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What one grammar may cost: to compile it, and to compute its first masks."""

    cpu_s: float = 0.5
    """Seconds of CPU time."""
    wall_s: float = 1.5
    """Seconds in all; larger, since a busy machine is no fault of the grammar."""
    queue_s: float = 1.0
    """Seconds that one waits for those before it."""
    memory_bytes: int = 256 * _MIB
    """Address space above what the process has when it starts."""
    start_s: float = 60.0
    """Seconds for the process to start; not counted in `wall_s`."""


class GrammarChecker:
    """At most one grammar process: started with the first grammar (or `start`), started anew after one that had to be
    killed. Thread-safe; one grammar at a time. Verdicts are remembered, failures too."""

    def __init__(self, make_vocabulary: Callable[[], Vocabulary], limits: GrammarLimits | None = None) -> None:
        """`make_vocabulary` is called once, with the first grammar."""
        self.limits = limits or GrammarLimits()
        self._make_vocabulary = make_vocabulary
        self._packed: bytes | None = None
        self._verdicts = _Verdicts()
        self._lock = threading.Lock()
        self._child: ChildProcess | None = None

    def start(self) -> None:
        """Starts the process, and waits until it takes grammars. Raises BackendUnavailable, EngineError."""
        require_llguidance()
        with self._lock:
            self._ready_child()

    def check(self, grammar: str) -> str:
        """The same grammar in the form that `Request.grammar` takes: Lark and llguidance's JSON as they are, GBNF as
        Lark. Blocks for up to `limits`.

        Raises GrammarError: no grammar, or one that meets a limit; QueueFull if others take too long before it;
        BackendUnavailable without llguidance; EngineError if the process cannot be started.
        """
        require_llguidance()
        try:
            data = grammar.encode()
        except UnicodeEncodeError as error:
            raise GrammarError(f"the grammar has a lone surrogate at character {error.start}") from None
        if len(data) > _MAX_GRAMMAR:
            raise GrammarError(f"the grammar has {len(data)} bytes, allowed: {_MAX_GRAMMAR}")
        digest = sha256(data).digest()
        verdict = self._verdicts.find(digest)
        if verdict is None:
            verdict = self._ask_in_turn(data, digest)
        if verdict.reason is not None:
            raise GrammarError(verdict.reason)
        return grammar if verdict.converted is None else verdict.converted

    def close(self) -> None:
        """Ends the process. The next grammar would start another."""
        with self._lock:
            self._drop()

    def _ask_in_turn(self, data: bytes, digest: bytes) -> _Verdict:
        if not self._lock.acquire(timeout=self.limits.queue_s):
            raise QueueFull("too many grammars wait to be checked", 2.0)
        try:
            # Another thread may just have asked for the same.
            verdict = self._verdicts.find(digest)
            if verdict is None:
                verdict = self._ask(data)
                if verdict.lasting:
                    self._verdicts.keep(digest, verdict)
            return verdict
        finally:
            self._lock.release()

    def _ask(self, data: bytes) -> _Verdict:
        child = self._ready_child()
        try:
            answer = child.ask(data, self.limits.wall_s, self.limits.cpu_s)
        except ChildStopped as stopped:
            self._drop()
            return _stopped(stopped)
        except BaseException:  # Ctrl-C too: what the process would answer later belongs to nobody
            self._drop()
            raise
        kind, text = answer[:1], answer[1:].decode()
        if kind not in (_TAKEN, _FAULT):
            self._drop()
        if kind in (_TAKEN, _RETIRE):
            return _Verdict(converted=None if answer[1:] == data else text)
        if kind == _FAULT:
            return _Verdict(reason=text)
        return _Verdict(reason=_NO_ROOM)

    def _ready_child(self) -> ChildProcess:
        if self._child is not None and not self._child.alive():
            self._drop()
        if self._packed is None:
            self._packed = self._make_vocabulary().pack()
        if self._child is None:
            limits = self.limits
            arguments = (limits.memory_bytes, limits.cpu_s)
            self._child = ChildProcess("grammars", "headrace.text.grammar_child", arguments, _PACKAGES, limits.start_s)
        try:
            self._child.wait_until_ready(self._packed)
        except BaseException:
            self._drop()
            raise
        return self._child

    def _drop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.close()


@dataclass(frozen=True, slots=True)
class _Verdict:
    converted: str | None = None
    """The grammar in another form, where it is taken in that one."""
    reason: str | None = None
    """Why it is refused."""
    lasting: bool = True
    """Whether the grammar alone is the reason, and not a busy machine."""


class _Verdicts:
    """The latest verdicts by digest, as many as `_MAX_REMEMBERED` bytes hold. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._size = 0

    def find(self, digest: bytes) -> _Verdict | None:
        with self._lock:
            verdict = self._kept.get(digest)
            if verdict is not None:
                self._kept.move_to_end(digest)
            return verdict

    def keep(self, digest: bytes, verdict: _Verdict) -> None:
        with self._lock:
            self._kept[digest] = verdict
            self._size += _size(verdict)
            while self._size > _MAX_REMEMBERED:
                self._size -= _size(self._kept.popitem(last=False)[1])


def _size(verdict: _Verdict) -> int:
    return _VERDICT_BYTES + 4 * len(verdict.converted or "") + 4 * len(verdict.reason or "")


def _stopped(stopped: ChildStopped) -> _Verdict:
    if stopped.ended_by in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
        return _Verdict(reason=_NO_ROOM)
    too_long = stopped.ended_by == signal.SIGPROF
    return _Verdict(reason=f"the grammar is too complex: compiling it {stopped}", lasting=too_long)
