"""The workload, and a run of it under watch: warm-up, once as it is, once with every range kept."""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from headrace.backends.base import Backend
from headrace.backends.ranges import Profiled, Range
from headrace.core.config import ResolvedConfig
from headrace.core.errors import EngineError, InvalidParameter
from headrace.core.types import ErrorEvent, Request, SamplingParams, StepPlan, StepResult, TokenEvent
from headrace.core.validate import validate
from headrace.engine.answer import Answer
from headrace.engine.core import EngineCore
from headrace.engine.model import OpenModel
from headrace.profile.ranges import COMMIT, DECODE, DETOKENISE, LOAD, PREFILL, SCHEDULE, WAIT, Node, nest

MOST: Mapping[str, int] = {"prompt_tokens": 2**20, "max_tokens": 1024, "requests": 256}
MAX_STEPS = 2048
"""More tell nothing new, and make a trace that no viewer opens: some 300 ranges a step for 30 layers."""
WARM_UP_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Work:
    """Requests that arrive at once; prompts are random token ids, different in every run. Greedy, of fixed length.

    Raises InvalidParameter for what is out of range.
    """

    prompt_tokens: int = 128
    max_tokens: int = 32
    requests: int = 4

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise InvalidParameter(name, getattr(self, name), f"an integer from 1 to {most}")

    def make(self, run: str, vocab_size: int) -> list[Request]:
        draw = random.Random(run)
        sampling = SamplingParams(max_tokens=self.max_tokens, ignore_eos=True)
        now_s = time.monotonic()
        return [
            Request(f"{run} {number}", self._prompt(draw, vocab_size), sampling, arrival_s=now_s)
            for number in range(self.requests)
        ]

    def _prompt(self, draw: random.Random, vocab_size: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab_size) for _ in range(self.prompt_tokens))


@dataclass(frozen=True, slots=True)
class Step:
    """One iteration."""

    phase: str
    """headrace.prefill or headrace.decode."""
    begin_ns: int
    end_ns: int
    rows: int
    tokens: int


@dataclass(frozen=True)
class Profile:
    """What a run was, and where its time went."""

    model_name: str
    config: ResolvedConfig
    how: str
    """The backend's first word on how it runs."""
    work: Work
    load: Range
    before: tuple[Range, ...]
    """What was done between the load and the run."""
    ranges: tuple[Range, ...]
    """Of the run, without the load."""
    steps: tuple[Step, ...]
    begin_ns: int
    """Of the run."""
    end_ns: int
    plain_steps: tuple[Step, ...]
    """Of a run of the same work with no range kept."""
    has_text: bool
    """Whether there was a tokenizer, and so something to detokenise."""
    preemptions: int

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.begin_ns) / 1e9

    @cached_property
    def roots(self) -> list[Node]:
        return nest(self.ranges)


class _Planned(NamedTuple):
    """A plan without an answer yet."""

    phase: str
    rows: int
    tokens: int


class Watch:
    """The engine's backend, with a clock before and after it. What `Backend` says holds of it."""

    def __init__(self, inner: Backend) -> None:
        """Of a backend that keeps no ranges (on a GPU) those of the engine are all there are."""
        self._inner = inner
        self._profiled: Profiled | None = inner if isinstance(inner, Profiled) else None
        self.name, self.depth = inner.name, inner.depth
        self.load, self.load_adapter = inner.load, inner.load_adapter
        self.probe, self.explain = inner.probe, inner.explain
        self.memory, self.close = inner.memory, inner.close
        self._num_prompt: dict[int, int] = {}
        self._on = False
        self._ranges: list[Range] = []
        self._steps: list[Step] = []
        self._unanswered: deque[_Planned] = deque()
        self._submitted_ns = self._answered_ns = 0
        self._answered: _Planned | None = None

    def start(self) -> None:
        self._on = True
        if self._profiled is not None:
            self._profiled.profile(True)

    def stop(self) -> list[Range]:
        self._on = False
        if self._profiled is None:
            return self._ranges
        self._profiled.profile(False)
        return self._ranges + self._profiled.take_ranges()

    def take_steps(self) -> tuple[Step, ...]:
        """Since the last call."""
        steps, self._steps = tuple(self._steps), []
        return steps

    def submit(self, plan: StepPlan) -> None:
        self._num_prompt.update((admit.row, admit.num_prompt) for admit in plan.admit)
        # A row that is computed anew after it gave way begins at its prompt again.
        in_prompt = any(step.start < self._num_prompt[step.row] for step in plan.rows)
        tokens = sum(row.length + len(row.drafts) for row in plan.rows)
        planned = _Planned(PREFILL if in_prompt else DECODE, len(plan.rows), tokens)
        self._unanswered.append(planned)
        with nullcontext() if self._profiled is None else self._profiled.ranged(planned.phase):
            self._submitted_ns = time.monotonic_ns()
            self._inner.submit(plan)

    def result(self) -> StepResult:
        with self.range(WAIT) if self.depth > 1 else nullcontext():
            result = self._inner.result()
        self._answered_ns = time.monotonic_ns()
        self._answered = self._unanswered.popleft()
        return result

    def reset(self) -> None:
        self._unanswered.clear()
        self._inner.reset()

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        begin_ns = time.monotonic_ns()
        yield
        self._keep(name, begin_ns, time.monotonic_ns())

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step of the engine. It counts as the step that it answers; where plans are answered later than they
        are submitted, one that only submits counts as that."""
        self._answered, self._submitted_ns = None, 0
        begin_ns = time.monotonic_ns()
        yield
        end_ns = time.monotonic_ns()
        answered = self._answered
        if answered is None and not self._submitted_ns:
            self._keep(SCHEDULE, begin_ns, end_ns)
            return
        self._keep((answered or self._unanswered[-1]).phase, begin_ns, end_ns)
        if self._submitted_ns:
            self._keep(SCHEDULE, begin_ns, self._submitted_ns)
        if answered is not None:
            self._keep(COMMIT, self._answered_ns, end_ns)
            self._steps.append(Step(answered.phase, begin_ns, end_ns, answered.rows, answered.tokens))

    def _keep(self, name: str, begin_ns: int, end_ns: int) -> None:
        if self._on:
            self._ranges.append(Range(name, begin_ns, end_ns))


def profile(opened: OpenModel, work: Work, progress: Callable[[str], None]) -> Profile:
    """Loads, runs and closes. `progress` hears what is being done. Raises RequestError where the work does not fit the
    model, ModelError and EngineError."""
    check_work(opened, work)
    vocab_size = opened.spec.vocab_size
    progress("loading")
    began_ns = time.monotonic_ns()
    backend, capacity = opened.load_backend(opened.config.backend, opened.options())
    try:
        watch = Watch(backend)
        core = opened.engine(watch, capacity)
        load = Range(LOAD, began_ns, time.monotonic_ns())
        progress("warming up")
        short = replace(work, max_tokens=min(work.max_tokens, WARM_UP_TOKENS))
        warm_up = Range("warm-up", *play(core, short.make("warm-up", vocab_size), opened, watch))
        progress("running without the profile")
        watch.take_steps()
        plain = Range("run without the profile", *play(core, work.make("plain", vocab_size), opened, watch))
        plain_steps = watch.take_steps()
        progress("running with the profile")
        requests = work.make("profiled", vocab_size)
        before = core.stats.preemptions
        watch.start()
        begin_ns, end_ns = play(core, requests, opened, watch)
        progress("reading the profile")
        ranges = watch.stop()
        return Profile(
            model_name=_printable(opened.checkpoint.path.resolve().name),
            config=opened.config,
            how=backend.explain().partition("\n")[0],
            work=work,
            load=load,
            before=(warm_up, plain),
            ranges=tuple(ranges),
            steps=watch.take_steps(),
            begin_ns=begin_ns,
            end_ns=end_ns,
            plain_steps=plain_steps,
            has_text=opened.has_text,
            preemptions=core.stats.preemptions - before,
        )
    finally:
        backend.close()


def check_work(opened: OpenModel, work: Work) -> None:
    """Raises RequestError where the work does not fit the model's settings, or is too long to be looked at."""
    validate(work.make("check", opened.spec.vocab_size)[0], opened.limits)
    room = opened.limits.max_model_len - work.prompt_tokens
    if work.max_tokens > room:
        raise InvalidParameter("max_tokens", work.max_tokens, f"up to {room}: prompt and answer fit --max-model-len")
    rows = opened.config.max_num_seqs
    steps = -(-work.requests // rows) * work.max_tokens
    if steps > MAX_STEPS:
        allowed = f"up to {rows * (MAX_STEPS // work.max_tokens)}: {rows} run together, for {MAX_STEPS} steps at most"
        raise InvalidParameter("requests", work.requests, allowed)


def play(core: EngineCore, requests: Sequence[Request], opened: OpenModel, watch: Watch) -> tuple[int, int]:
    """Answers them, and makes text of each token at once, as a server does. -> begin and end in nanoseconds."""
    tokenizer = opened.tokenizer if opened.has_text else None
    answers = {
        request.id: Answer(index, request, tokenizer, request.arrival_s) for index, request in enumerate(requests)
    }
    begin_ns = time.monotonic_ns()
    for request in requests:
        core.submit(request)
    while core.has_work:
        with watch.step():
            events = core.step()
        with watch.range(DETOKENISE):
            for event in events:
                if isinstance(event, ErrorEvent):
                    raise EngineError(f"{event.request_id} failed ({event.code}): {event.message}")
                if isinstance(event, TokenEvent):
                    answers[event.request_id].tokens(event)
                    answers[event.request_id].take()
                else:
                    answers.pop(event.request_id).end(event)
    end_ns = time.monotonic_ns()
    if answers:
        raise EngineError(f"the engine stopped with {len(answers)} requests unanswered")
    return begin_ns, end_ns


def _printable(name: str) -> str:
    """A file name need not be valid text, and what it holds is not to be obeyed by a terminal."""
    text = os.fsencode(name).decode("utf-8", "replace")
    return "".join(char if char.isprintable() else "�" for char in text)
