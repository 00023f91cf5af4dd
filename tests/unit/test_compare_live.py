"""`--live`: the picture of Flover's demo, its screen at several sizes, and that drawing costs next to nothing."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, Group

from headrace.compare.flover import live, published
from headrace.compare.flover.board import Board, columns_of, screen
from headrace.compare.flover.clock import CountingBackend, IterationClock, engine, iteration_workload
from headrace.compare.flover.identities import end_order
from headrace.compare.flover.live import LiveView, fixture_checks, live_files, play_demo, play_fixture, play_live
from headrace.core.errors import EngineError, InvalidParameter
from headrace.core.types import ErrorEvent
from headrace.engine.core import EngineCore
from headrace.sched.policy import Fused

ENTER, LEAVE, HOME, CLEAR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[H", "\x1b[2J"


def terminal(width: int = 80, height: int = 24) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=True, _environ={"TERM": "xterm"})


def piped() -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=False)


def written(out: Console) -> str:
    return out.file.getvalue()  # type: ignore[attr-defined]


def small(clock: IterationClock, rows: int = 4, prompt: int = 8) -> EngineCore:
    """On which requests of up to 48 tokens run."""
    workload = iteration_workload((0,) * rows, (40,) * rows, [tuple(range(prompt))] * rows)
    return engine(workload, rows, Fused(), CountingBackend(clock.tick), clock)


def test_the_fixture_as_a_log() -> None:
    out = piped()
    found = play_fixture(out)
    assert len(found.iterations) == 1521 and max(one.in_flight for one in found.iterations) == 12
    assert end_order([one.end_s for one in found.requests]) == tuple(published.DEMO_ORDER)
    lines = written(out).splitlines()
    assert "\x1b" not in written(out) and len(lines) == 64 + 4 + 4
    assert lines[0] == "iteration 1: request 0 added..."
    assert lines[1] == "iteration 39: request 1 added..."
    finished = [int(line.split()[3]) for line in lines if line.endswith("finished...")]
    assert finished == list(published.DEMO_ORDER)
    added = [int(line.split()[3]) for line in lines if line.endswith("added...")]
    assert added == list(range(32))
    assert lines[64] == "Random request length:" and " ".join(lines[65:67]).split() == [
        str(length) for length in published.DEMO_LENGTHS
    ]
    assert lines[67] == "Time taken: 38537 milliseconds"
    assert lines[68:70] == ["as many iterations as in the picture: 1521", "as many in flight at most: 12"]
    assert lines[70].startswith("finished in its order: 2 5 3 0 1 6 11") and all(c.holds for c in fixture_checks(found))
    late = replace(found.requests[2], end_s=99.0)
    broken = replace(found, iterations=found.iterations[:-1], requests=(*found.requests[:2], late, *found.requests[3:]))
    assert [check.holds for check in fixture_checks(broken)] == [False, True, False]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_the_fixture_on_a_terminal(width: int, height: int) -> None:
    out = terminal(width, height)
    found = play_fixture(out, paced=False)
    assert len(found.iterations) == 1521
    text = written(out)
    assert text.count(ENTER) == text.count(LEAVE) == 1 and text.index(ENTER) < text.index(LEAVE)
    assert CLEAR not in text, "a screen that is cleared flickers"
    after = text.partition(LEAVE)[2]
    for shown in ("current iters=1521", "100 %", "38.5 s", "# of In-flight requests", "> iters"):
        assert shown in after
    for shown in ("request 31 added...", "request 31 finished...", "Random request length:", "Time taken: 38537"):
        assert shown in after


def test_what_is_seen_on_the_way_is_what_the_engine_counts() -> None:
    """Levels as the events tell them, against the engine's own; requests that wait for a while leave no gap."""
    clock = IterationClock()
    core = small(clock)
    workload = iteration_workload((0, 2, 2, 60), (9, 3, 20, 5))
    view = LiveView(core, workload, piped(), clock, clock.sleep)
    seen: list[int] = []
    found = live.play(core, workload, live.NAME, clock, view.sleep, view.watch)
    seen = list(view.board.levels)
    assert seen == [one.in_flight for one in found.iterations] and view.board.tokens == 37
    view.end(found)
    assert view.board.levels == seen and view.board.share == 1


def test_prompts_in_pieces_leave_no_gap() -> None:
    """Sixteen tokens a step and prompts of forty: steps without an event."""
    clock = IterationClock()
    workload = iteration_workload((0, 5), (4, 4), [tuple(range(40)), tuple(range(40, 80))])
    core = engine(iteration_workload((0,), (44,), [(1,) * 16]), 2, Fused(), CountingBackend(clock.tick), clock)
    view = LiveView(core, workload, piped(), clock, clock.sleep)
    found = live.play(core, workload, live.NAME, clock, view.sleep, view.watch)
    assert len(view.board.levels) == len(found.iterations) > 8


def test_drawing_is_rare() -> None:
    """A timer on which a drawing takes 10 ms and the rest of a step 1 ms: at most a fiftieth goes into drawing."""
    timer = IterationClock()
    clock = IterationClock(lambda: timer.sleep(0.001))

    class Slow(LiveView):
        def _picture(self) -> object:  # type: ignore[override]
            timer.sleep(0.010)
            return super()._picture()

    core = small(clock)
    workload = iteration_workload([10 * index for index in range(100)], (40,) * 100)
    with Slow(core, workload, terminal(), clock, clock.sleep, timer) as view:
        live.play(core, workload, live.NAME, clock, view.sleep, view.watch)
    drawn_s = 0.010 * view.drawings
    assert view.drawings >= 3 and drawn_s <= 0.010 + timer.now / live.SHARE


def test_a_run_that_fails_gives_the_terminal_back() -> None:
    clock = IterationClock()
    core = small(clock)
    out = terminal()

    class Failing(LiveView):
        def watch(self, event: object) -> None:  # type: ignore[override]
            raise EngineError("the device is gone")

    workload = iteration_workload((0,), (5,))
    with pytest.raises(EngineError, match="gone"), Failing(core, workload, out, clock, clock.sleep) as view:
        live.play(core, workload, live.NAME, clock, view.sleep, view.watch)
    assert written(out).count(ENTER) == written(out).count(LEAVE) == 1


def test_a_failed_request_is_an_error() -> None:
    clock = IterationClock()
    workload = iteration_workload((0,), (100,))  # longer than the engine allows
    core = small(clock)
    core.submit = lambda request: core._events.append(ErrorEvent(request.id, "nan_logits", "poisoned", 0.0))  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"live request 1 failed .nan_logits."):
        play_live(core, workload, piped(), clock, clock.sleep)


def test_the_picture_on_a_model() -> None:
    """Its lengths and gaps, cut to the context of the model at hand."""
    clock = IterationClock()
    core = small(clock, rows=32)
    prompts = [tuple(range(index, index + 8)) for index in range(32)]
    out = piped()
    found = play_demo(core, prompts, 48, out, clock, clock.sleep)
    cut = 40 / max(published.DEMO_LENGTHS)
    lengths = [max(1, round(length * cut)) for length in published.DEMO_LENGTHS]
    assert [len(one.token_ids) for one in found.requests] == lengths
    gaps = [one.arrival_s - before.arrival_s for before, one in zip(found.requests, found.requests[1:], strict=False)]
    assert gaps == pytest.approx([published.DEMO_GAP * cut] * 31)
    assert written(out).startswith("Lengths and gaps are 0.08 of the picture's")
    with pytest.raises(InvalidParameter, match=r"prompts: got 3, allowed: at least 32"):
        play_demo(core, prompts[:3], 48, out, clock, clock.sleep)


def test_files() -> None:
    found = play_fixture(piped())
    files = live_files(found)
    assert list(files) == ["progress.csv", "completions.csv", "in_flight.csv"]
    lines = files["in_flight.csv"].splitlines()
    assert lines[0] == "iteration,t,in_flight" and len(lines) == 1522 and lines[1].startswith("1,0.0253")
    assert files["progress.csv"].splitlines()[-1] == "live,38.537000,1.000000"
    assert len(files["completions.csv"].splitlines()) == 33


# ------------------------------------------------------------ the screen


def rows(board: Board, width: int, height: int) -> list[str]:
    return [line.plain for line in screen(board, width, height)]


def test_the_screen() -> None:
    board = Board((4,) * 8, [1, 2, 4, 8, 8, 4], 16, ["request 0 added..."], ["request 1 finished..."], 12.34)
    found = rows(board, 60, 24)
    assert found[0].startswith("current iters=6 ███") and found[0].endswith(" 50 %    12.3 s")
    assert found[2].strip() == "# of In-flight requests" and found[2].index("#") in (18, 19)
    assert found[4] == "   8 ┤   ██ " and found[5] == "     │   ██ "
    assert found[8] == "   4 ┤  ████" and found[11] == "     │██████"
    assert found[12] == "   0 └" + "─" * 47 + "> iters"
    assert found[13] == "      0" + f"{47:>46}"
    assert found[15] == "Incoming requests" + " " * 13 + "Finished requests"
    assert found[16] == "request 0 added..." + " " * 12 + "request 1 finished..."
    assert len(found) == 24


@given(st.integers(40, 240), st.integers(16, 80), st.integers(1, 300), st.integers(0, 5000))
def test_every_size_is_filled_and_never_overrun(width: int, height: int, requests: int, iterations: int) -> None:
    levels = [1 + index * 7 % requests for index in range(iterations)]
    logs = [f"request {index} finished..." for index in range(requests)]
    board = Board((10,) * requests, levels, min(iterations, 10 * requests), logs, logs, 99999.9)
    found = rows(board, width, height)
    assert len(found) == height and max(map(len, found)) <= width
    assert sum(line.endswith("> iters") for line in found) == 1


def test_a_screen_that_is_too_small_sees_a_part() -> None:
    board = Board((10,) * 8, [1, 2, 3], 6)
    assert rows(board, 10, 5) == rows(board, 40, 16)
    out = Console(file=io.StringIO(), width=30, height=5, force_terminal=True)
    out.print(Group(*screen(board, 30, 5)))
    assert len(written(out).splitlines()) == 16


def test_bars_hold_their_place_while_the_run_grows() -> None:
    each = [columns_of([1] * count, 10)[1] for count in range(1, 200)]
    assert each == sorted(each) and sorted(set(each)) == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    for count in range(1, 200):
        bars, wide = columns_of(list(range(count)), 10)
        assert len(bars) <= 10 and bars[-1] == count - 1 and len(bars) == -(-count // wide)
    assert columns_of([], 10) == ([], 1)
