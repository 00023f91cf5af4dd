"""An experiment of Flover and its live view on the demo model, as short as they get."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from headrace.compare.flover import experiments
from headrace.compare.flover.board import ended
from headrace.compare.flover.experiments import run_experiment
from headrace.compare.flover.live import play_demo
from headrace.compare.methods import Method
from headrace.compare.methods.bench import Bench
from headrace.compare.methods.registry import make_method
from headrace.compare.synthetic import ordinary_ids, random_prompt
from headrace.core.config import EngineConfig
from headrace.core.errors import EngineError
from headrace.engine.model import OpenModel

CONTEXT = 72


@pytest.fixture(scope="module")
def bench(demo_path: Path) -> Iterator[Bench]:
    config = EngineConfig(
        str(demo_path), prefix_cache=False, threads=1, max_num_seqs=32, max_model_len=CONTEXT, backend="native"
    )
    with closing(OpenModel(config)) as opened, closing(Bench(opened)) as found:
        yield found


def prompts(bench: Bench) -> list[tuple[int, ...]]:
    ids = ordinary_ids(bench.opened)
    return [random_prompt(ids, 8, 0, index) for index in range(32)]


@pytest.mark.demo
def test_the_timeline_on_the_demo_model(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the calibration measures scales the arrivals, and here that need not be precise: it measures once."""
    monkeypatch.setattr(experiments, "PROBES", 1)

    def make(name: str) -> Method:
        if name != "fused":
            raise EngineError(f"{name}: 32 copies of the model take too long to start for a test")
        return make_method(name, bench)

    found = run_experiment(5, make, prompts(bench), CONTEXT, repeats=1, budget_s=0.1)
    assert [check for check in found.findings.checks if not check.holds] == []
    assert found.scale.tokens(512) == 16 and list(found.failures) == ["instances"]
    run = found.cells[0].runs["fused"][0]
    assert run.output_tokens == 512 and sum(one.in_flight for one in run.iterations) == 512


@pytest.mark.demo
def test_the_live_view_on_the_demo_model(bench: Bench) -> None:
    out = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)
    found = play_demo(bench.core, prompts(bench), CONTEXT, out)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert f"current iters={len(found.iterations)}" in text
    # Which request ends last depends on the machine's pace: the gaps are in seconds.
    last = max(one.end_s for one in found.requests)
    assert any(ended(index) in text for index, one in enumerate(found.requests) if one.end_s == last)
    assert f"Time taken: {1000 * found.seconds:.0f} milliseconds" in text
