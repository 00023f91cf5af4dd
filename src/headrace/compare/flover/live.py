"""`headrace compare --live`: Flover's demo in the terminal, on a model or on the fixture of its picture.

It draws between steps, at most ten times a second and for at most a fiftieth of the time, and no run that is compared
is ever drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from headrace.compare.flover import published
from headrace.compare.flover.board import Board, added, closing, ended, screen
from headrace.compare.flover.clock import CountingBackend, IterationClock, engine, iteration_workload
from headrace.compare.flover.identities import end_order
from headrace.compare.flover.trace import Check, completions_csv, progress_csv
from headrace.compare.methods import Outcome
from headrace.compare.methods.admission import play
from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.errors import InvalidParameter
from headrace.core.types import Event, FinishEvent, TokenEvent
from headrace.engine.core import EngineCore
from headrace.sched.policy import Fused

NAME = "live"
LEAST_S = 0.1
"""Between two drawings."""
SHARE = 50
"""One part in so many of the time may go into drawing."""
ITERATION_S = published.DEMO_MILLISECONDS / 1000 / published.DEMO_ITERATIONS
"""Of the picture's run."""
PROBE_TOKENS = 32
BUDGET_S = 600.0


class LiveView:
    """Shows a run while `play` makes it: `watch` goes to it, `sleep` in place of the clock's own.

    On a terminal a full screen, which the last picture and the closing words outlive; elsewhere a line an event.
    """

    def __init__(
        self,
        core: EngineCore,
        workload: Workload,
        out: Console,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`clock`, `sleep`: those of the run; what is shown as seconds is on that clock. `timer`: of the drawing."""
        self.board = Board(tuple(one.max_tokens for one in workload.requests))
        self.drawings = 0
        self._core = core
        self._out = out
        self._clock = clock
        self._sleep = sleep
        self._timer = timer
        self._numbers = {f"{NAME} request {index + 1}": index for index in range(len(workload.requests))}
        self._before = core.stats.iterations
        self._began_s = clock()
        self._live: set[int] = set()
        self._level = 0
        """Requests in flight in the iteration whose events are coming."""
        self._next_s = 0.0
        self._screen: Live | None = None
        self._stack = ExitStack()

    def __enter__(self) -> LiveView:
        if self._out.is_terminal:
            shown = Live(console=self._out, screen=True, auto_refresh=False, transient=True)
            self._screen = self._stack.enter_context(shown)
            self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def watch(self, event: Event) -> None:
        """An event of the run, in order."""
        iteration = self._core.stats.iterations - self._before
        if iteration > len(self.board.levels):
            self._level = len(self._live)
            # Steps without an event (a prompt in pieces) had those in flight who are there now.
            self.board.levels += [self._level] * (iteration - len(self.board.levels))
        number = self._numbers[event.request_id]
        if isinstance(event, TokenEvent):
            self.board.tokens += len(event.token_ids)
            if number not in self._live:
                self._live.add(number)
                self._level += 1
                self.board.levels[-1] = self._level
                self._tell(self.board.incoming, added(number))
        elif isinstance(event, FinishEvent):
            self._live.discard(number)
            self._tell(self.board.finished, ended(number))
        self.refresh()

    def sleep(self, seconds: float) -> None:
        """The run waits for the next request."""
        self.refresh()
        self._sleep(seconds)

    def refresh(self) -> None:
        """Draws if it is time to."""
        if self._screen is not None and self._timer() >= self._next_s:
            self._draw()

    def end(self, outcome: Outcome) -> None:
        """The whole run, as the engine counted it. On a terminal the screen is left, and its last picture printed."""
        self.board.levels[:] = [one.in_flight for one in outcome.iterations]
        self.board.elapsed_s = outcome.seconds
        self._stack.close()
        if self._screen is not None:
            self._out.print(self._picture())
            self._out.print()
        for text in closing(self.board):
            self._out.print(text)

    def _tell(self, log: list[str], text: str) -> None:
        log.append(text)
        if self._screen is None:
            self._out.print(Text(f"iteration {len(self.board.levels)}: {text}"))

    def _picture(self) -> Group:
        width, height = self._out.size
        return Group(*screen(self.board, width, height))

    def _draw(self) -> None:
        assert self._screen is not None
        began = self._timer()
        self.board.elapsed_s = self._clock() - self._began_s
        self._screen.update(self._picture(), refresh=True)
        self.drawings += 1
        now = self._timer()
        self._next_s = now + max(LEAST_S, SHARE * (now - began))


def play_live(
    core: EngineCore,
    workload: Workload,
    out: Console,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """One fused run, shown. `core`: without work, on `clock`. Raises EngineError if a request fails."""
    core.use_policy(Fused())
    with LiveView(core, workload, out, clock, sleep) as view:
        outcome = play(core, workload, NAME, clock, view.sleep, view.watch)
        view.end(outcome)
    return outcome


class _PictureClock(IterationClock):
    """Iterations, each of which takes as long as in the picture; `paced`: in real time too."""

    def __init__(self, paced: bool) -> None:
        super().__init__(self._wait)
        self._paced = paced
        self._began_s = time.monotonic()

    def seconds(self) -> float:
        return self.now * ITERATION_S

    def _wait(self) -> None:
        if self._paced:
            time.sleep(max(0.0, self._began_s + self.seconds() - time.monotonic()))


def play_fixture(out: Console, paced: bool | None = None) -> Outcome:
    """The run of Flover's own picture, on the iteration clock: 32 requests, 1,521 iterations. The outcome's times are
    seconds at the picture's pace; `paced`: it takes them, which by default is so on a terminal."""
    iterations = _PictureClock(out.is_terminal if paced is None else paced)
    lengths = published.DEMO_LENGTHS
    arrivals = [round(published.DEMO_GAP * index) for index in range(len(lengths))]
    workload = in_seconds(iteration_workload(arrivals, lengths), ITERATION_S)
    core = engine(workload, len(lengths), Fused(), CountingBackend(iterations.tick), iterations.seconds)
    outcome = play_live(
        core, workload, out, iterations.seconds, lambda seconds: iterations.sleep(seconds / ITERATION_S)
    )
    for check in fixture_checks(outcome):
        out.print(Text(f"{check.name}: {check.detail}" if check.holds else f"NOT {check.name}: {check.detail}"))
    return outcome


def fixture_checks(outcome: Outcome) -> tuple[Check, ...]:
    """Whether a run of the picture's requests is the picture."""
    iterations = len(outcome.iterations)
    peak = max(one.in_flight for one in outcome.iterations)
    order = end_order([one.end_s for one in outcome.requests])
    return (
        Check("as many iterations as in the picture", iterations == published.DEMO_ITERATIONS, str(iterations)),
        Check("as many in flight at most", peak == published.DEMO_PEAK, str(peak)),
        Check("finished in its order", order == tuple(published.DEMO_ORDER), " ".join(map(str, order))),
    )


def in_seconds(workload: Workload, iteration_s: float) -> Workload:
    """A workload whose arrivals are in iterations, at that many seconds each."""
    requests = tuple(
        WorkloadRequest(one.token_ids, one.max_tokens, one.arrival_s * iteration_s) for one in workload.requests
    )
    return Workload("fusion demo", requests, ignore_eos=True)


def play_demo(
    core: EngineCore,
    prompts: Sequence[tuple[int, ...]],
    longest: int,
    out: Console,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """The picture's requests on a model: its lengths, and gaps of as many iterations, of a request alone, as there.

    `prompts`: at least 32; `longest`: tokens of prompt and answer that the context has room for. Lengths and gaps are
    cut in proportion where the whole would take over ten minutes or not fit. Raises InvalidParameter, EngineError.
    """
    lengths = published.DEMO_LENGTHS
    if len(prompts) < len(lengths):
        raise InvalidParameter("prompts", len(prompts), f"at least {len(lengths)}")
    core.use_policy(Fused())
    probe = Workload("probe", (WorkloadRequest(tuple(prompts[0]), PROBE_TOKENS),), ignore_eos=True)
    # The first run of a model is slower than all others.
    step_s = min(play(core, probe, NAME, clock, sleep).seconds for _ in range(3)) / PROBE_TOKENS
    room = (longest - max(map(len, prompts))) / max(lengths)
    # An iteration may take twice as long with many rows.
    cut = min(1.0, room, BUDGET_S / (2 * step_s * published.DEMO_ITERATIONS))
    ours = [max(1, round(length * cut)) for length in lengths]
    if cut < 1:
        out.print(Text(f"Lengths and gaps are {cut:.2f} of the picture's, to fit ten minutes and the context."))
    arrivals = [published.DEMO_GAP * cut * index for index in range(len(lengths))]
    workload = in_seconds(iteration_workload(arrivals, ours, prompts[: len(lengths)]), step_s)
    return play_live(core, workload, out, clock, sleep)


def live_files(outcome: Outcome) -> Mapping[str, str]:
    """CSV files of a run: the two of experiment 6, and the requests in flight in each iteration."""
    lines = [f"{index},{one.end_s:.6f},{one.in_flight}" for index, one in enumerate(outcome.iterations, 1)]
    runs = {NAME: outcome}
    return {
        "progress.csv": progress_csv(runs),
        "completions.csv": completions_csv(runs),
        "in_flight.csv": "\n".join(["iteration,t,in_flight", *lines]) + "\n",
    }
