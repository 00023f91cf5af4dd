"""What is the native backend's own: its options, plans that break the protocol, and what it says of itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.backends.base import BackendOptions
from headrace.core.errors import ConfigError, EngineError
from headrace.core.types import Admit, Capacity, RowStep, SamplingParams, StepPlan
from headrace.models.registry import describe
from headrace.parallel.mesh import Mesh
from headrace.testing.driver import Driver
from headrace.weights.checkpoint import open_checkpoint
from headrace.weights.loader import stream
from tests.parity.native_cases import ARITHMETIC, SIZES

module = pytest.importorskip("headrace.backends.native.backend")

OPTIONS = BackendOptions("float32", 1, 8, 16, 4, 64, 64)
CAPACITY = Capacity(OPTIONS.num_blocks, OPTIONS.block_size, OPTIONS.max_rows, OPTIONS.max_tokens)
Load = Callable[..., Any]


@pytest.fixture
def load(checkpoint: Callable[..., Path]) -> Load:
    def load_one(
        architecture: str = "llama",
        instruction_set: str | None = None,
        sizes: Mapping[str, Any] = SIZES,
        **options: Any,
    ) -> Any:
        source = open_checkpoint(checkpoint(architecture, **sizes))
        description = describe(source.config, source.format, source.shapes())
        backend = module.NativeBackend(instruction_set)
        backend.load(description.spec, stream(source, description.weight_map), replace(OPTIONS, **options), Mesh())
        return backend

    return load_one


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(("name", "allowed"), [("dtype", "float32"), ("quant", "none, stored"), ("kv_dtype", "int8")])
def test_an_option_it_does_not_know(name: str, allowed: str, load: Load) -> None:
    with pytest.raises(ConfigError, match=f"{name}: got 'int3', allowed: .*{allowed}"):
        load(**{name: "int3"})


def test_instruction_sets(load: Load) -> None:
    found = module.instruction_sets()
    assert found[0] == "portable"
    with pytest.raises(ConfigError, match="instruction set: got 'z80', allowed: portable"):
        module.NativeBackend("z80")
    for name in found:
        backend = load(instruction_set=name)
        assert backend.probe()["instructions"] == name and backend.explain().startswith(f"native, {name}, 1 threads")
    assert module.NativeBackend().probe()["instructions"] == found[-1], "the fastest"


# ---------------------------------------------------------------- plans

ADMIT = Admit(0, (3, 4, 5), 3, SamplingParams())


def step(start: int, length: int, blocks: tuple[int, ...] = (0,), drafts: tuple[int, ...] = (), **more: Any) -> RowStep:
    return RowStep(0, start, length, drafts, blocks, **{"sample": True, **more})


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (StepPlan(0, (), release=(2,)), "row 2, where no request is"),
        (StepPlan(0, (), (ADMIT, ADMIT)), "row 0 is not free"),
        (StepPlan(0, (), (replace(ADMIT, row=4),)), "row 4 is not free"),
        (StepPlan(0, (), (replace(ADMIT, row=-1),)), "row -1 is not free"),
        (StepPlan(0, (), (replace(ADMIT, token_ids=()),)), "prompt tokens of 0"),
        (StepPlan(0, (), (replace(ADMIT, num_prompt=4),)), "4 prompt tokens of 3"),
        (StepPlan(0, (), (replace(ADMIT, token_ids=(3, 61, 5)),)), "token 61, the vocabulary has 61"),
        (StepPlan(0, (), (replace(ADMIT, token_ids=(3, -1, 5)),)), "token -1"),
        (StepPlan(0, (), (replace(ADMIT, token_ids=(3, 2**40, 5)),)), "more than 32 bits"),
        (StepPlan(0, (), (replace(ADMIT, token_ids=(3,) * 65),)), "3 prompt tokens of 65"),
        (StepPlan(0, (step(0, 4),), (ADMIT,)), "has 3 tokens, the plan wants 0 to 4"),
        (StepPlan(0, (step(0, 0),), (ADMIT,)), "wants 0 to 0"),
        (StepPlan(0, (step(-1, 2),), (ADMIT,)), "wants -1 to 1"),
        (StepPlan(0, (step(2**31 - 1, 2**31 - 1),), (ADMIT,)), "wants 2147483647 to 4294967294"),
        (StepPlan(0, (step(0, 2),), (ADMIT,)), "cannot sample after token 2 of 3"),
        (StepPlan(0, (step(0, 3, ()),), (ADMIT,)), "0 blocks for 3 tokens"),
        (StepPlan(0, (step(0, 3, (16,)),), (ADMIT,)), "a block outside 0 … 15"),
        (StepPlan(0, (step(0, 3, (-1,)),), (ADMIT,)), "a block outside 0 … 15"),
        (StepPlan(0, (step(0, 3, tuple(range(9))),), (ADMIT,)), "more blocks than the longest sequence needs"),
        (StepPlan(0, (step(0, 3, drafts=(6,), sample=False),), (ADMIT,)), "has drafts but does not sample"),
        (StepPlan(0, (step(0, 3, drafts=(61,)),), (ADMIT,)), "draft 61"),
        (StepPlan(0, (step(0, 3, drafts=(6,) * 6),), (ADMIT,)), "1 blocks for 9 tokens"),
        (StepPlan(0, (step(0, 3), step(0, 62, tuple(range(1, 8)))), (ADMIT,)), "wants 0 to 62"),
        (StepPlan(0, (), (), (), ((0, 16),)), "block 0 is copied to 16"),
        (StepPlan(0, (), (), (), ((-1, 1),)), "block -1 is copied to 1"),
    ],
)
def test_a_plan_that_breaks_the_protocol(load: Load, plan: StepPlan, message: str) -> None:
    backend = load()
    with pytest.raises(EngineError, match=message):
        backend.submit(plan)
    with pytest.raises(EngineError, match="without a plan"):
        backend.result()
    if not plan.admit:
        assert len(Driver(backend, CAPACITY).generate([3, 4, 5], 3)) == 3, "it goes on"


def test_more_tokens_than_a_step_computes(load: Load) -> None:
    driver = Driver(load(), CAPACITY)
    rows = [driver.admit([3] * 40), driver.admit([4] * 40)]
    with pytest.raises(EngineError, match="the plan has 80 tokens or more, a step computes 64"):
        driver.run(*(driver.span(row, 40) for row in rows))


# ---------------------------------------------------------------- what it says of itself


def test_explain_names_every_operation(load: Load) -> None:
    sizes = {"vocab_size": 2000, "hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128, "num_experts": 3}
    backend = load("qwen3_moe", None, sizes, quant="int8", kv_dtype="bfloat16", threads=2)
    driver = Driver(backend, CAPACITY)
    assert "nan" not in backend.explain(), "before the first step"
    driver.generate([3, 4, 5], 8)
    title, header, *lines = backend.explain().splitlines()
    assert re.fullmatch(r"native, \w+, 2 threads, weights int8, keys and values bfloat16: \d+ operations, .*", title)
    assert header.split() == ["operation", "shape", "MB", "kernel", "time"]
    assert len(lines) == int(re.search(r"(\d+) operations", title)[1])  # type: ignore[index]
    names = [line[:24].strip() for line in lines]
    assert names[0] == "embed" and names[-1] == "head" and "1 attend" in names and "0 experts" in names
    assert len({len(line) for line in lines}) == 1, "columns are straight"
    shares = [float(line.split()[-1].removesuffix("%")) for line in lines]
    assert sum(shares) == pytest.approx(100, abs=0.01 * len(lines)) and max(shares) > 0
    megabytes = sum(float(line[60:69]) for line in lines)
    embedding = 2000 * 256 * (1 + 2 / 32) / 1e6
    assert backend.memory()["weights"] / 1e6 == pytest.approx(megabytes + embedding, rel=0.02), "of it rows are read"


@pytest.mark.parametrize("name", ARITHMETIC)
def test_memory_is_what_the_types_take(name: str, load: Load) -> None:
    """Blocks of 16 tokens and heads of 16 numbers: what the planner counts (core/sizing.py)."""
    kv_dtype = ARITHMETIC[name].options.get("kv_dtype", "float32")
    backend = load(kv_dtype=kv_dtype, block_size=16, num_blocks=5)
    numbers = 2 * 5 * 16 * 2 * 2 * 16
    scales = 2 * 5 * 16 * 2 * 2 * 4 if kv_dtype == "int8" else 0
    assert backend.memory()["kv_cache"] == numbers * {"float32": 4, "bfloat16": 2, "int8": 1}[kv_dtype] + scales
