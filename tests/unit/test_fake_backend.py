"""The fake backend passes the suite that it serves as the first example of, and notices broken laws."""

from __future__ import annotations

import pytest

from headrace.core.types import Admit, Capacity, RowStep, SamplingParams, StepPlan
from headrace.testing.conformance import BackendConformance
from headrace.testing.driver import Driver
from headrace.testing.fake import FakeBackend, LawViolation, answer, next_token
from headrace.weights.lora import Adapter

CAPACITY = Capacity(blocks=64, block_size=8, max_rows=8, max_tokens=64)


class TestFakeBackend(BackendConformance):
    poison_id = 1000

    @pytest.fixture(params=[1, 2])
    def driver(self, request: pytest.FixtureRequest) -> Driver:
        backend = FakeBackend(self.vocab_size, request.param, poison=frozenset({self.poison_id}))
        return Driver(backend, backend.open(CAPACITY))

    def adapter(self, name: str) -> Adapter:
        return Adapter(name, {})


def test_its_tokens_by_hand() -> None:
    """(((0·31 + 3·7 + 1)·31 + 5·7 + 2) mod 8191) mod 61"""
    assert next_token([3, 5], 61) == ((3 * 7 + 1) * 31 + 5 * 7 + 2) % 8191 % 61 == 48
    assert answer([3, 5], 61, 2) == [48, next_token([3, 5, 48], 61)]
    assert answer([3, 5], 61, 9, frozenset({48})) == [48]
    assert answer([3, 5], 61, 1, frozenset({48}), min_tokens=1) == [49]
    begun = 97 * 7 + 1  # the byte of "a"
    assert next_token([3], 61, "a") == (begun * 31 + 3 * 7 + 1) % 8191 % 61 == answer([3], 61, 1, adapter="a")[0]


def plan(step: int, *rows: RowStep, admit: tuple[Admit, ...] = (), release: tuple[int, ...] = ()) -> StepPlan:
    return StepPlan(step, rows, admit, release)


def admit(row: int, *token_ids: int) -> Admit:
    return Admit(row, token_ids, len(token_ids), SamplingParams())


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (plan(1, RowStep(0, 3, 1), RowStep(0, 3, 1)), "a row twice"),
        (plan(0, RowStep(0, 3, 1)), "step 0 after 0"),
        (plan(1, RowStep(5, 0, 1, new_blocks=(9,))), "row 5 is not live"),
        (plan(1, RowStep(0, 2, 1)), "starts at 2, computed 3"),
        (plan(1, RowStep(0, 3, 2)), "does not exist"),
        (plan(1, RowStep(1, 0, 1, new_blocks=(0,)), admit=(admit(1, 4),)), "writes into another row's block"),
        (plan(1, RowStep(1, 0, 1, new_blocks=(64,)), admit=(admit(1, 4),)), "block 64 does not exist"),
        (plan(1, RowStep(1, 0, 1), admit=(admit(1, 4),)), "0 blocks for 1 tokens"),
        (plan(1, RowStep(0, 3, 1), admit=(admit(0, 4),)), "row 0 is taken"),
        (plan(1, release=(4,)), "row 4 released but not live"),
        (plan(1, RowStep(1, 0, 65, new_blocks=tuple(range(1, 10))), admit=(admit(1, *[1] * 65),)), "exceed the budget"),
    ],
)
def test_broken_laws_are_noticed(second: StepPlan, words: str) -> None:
    backend = FakeBackend(61)
    backend.open(CAPACITY)
    backend.submit(plan(0, RowStep(0, 0, 3, new_blocks=(0,), sample=True), admit=(admit(0, 1, 2, 3),)))
    backend.result()
    with pytest.raises(LawViolation, match=words):
        backend.submit(second)


def test_a_block_may_not_be_reused_while_a_step_names_it() -> None:
    backend = FakeBackend(61, depth=2)
    backend.open(CAPACITY)
    backend.submit(plan(0, RowStep(0, 0, 3, new_blocks=(0,), sample=True), admit=(admit(0, 1, 2, 3),)))
    with pytest.raises(LawViolation, match="law 3"):
        backend.submit(plan(1, RowStep(0, 0, 3, new_blocks=(1,)), release=(0,), admit=(admit(0, 1, 2, 3),)))
    other = FakeBackend(61, depth=2)
    other.open(CAPACITY)
    other.submit(plan(0, RowStep(0, 0, 3, new_blocks=(0,), sample=True), admit=(admit(0, 1, 2, 3),)))
    with pytest.raises(LawViolation, match="law 3"):
        other.submit(plan(1, RowStep(1, 0, 3, new_blocks=(0,)), admit=(admit(1, 1, 2, 3),)))


def test_more_plans_than_its_depth() -> None:
    backend = FakeBackend(61)
    backend.open(CAPACITY)
    backend.submit(plan(0, RowStep(0, 0, 1, new_blocks=(0,), sample=True), admit=(admit(0, 1),)))
    with pytest.raises(LawViolation, match="in flight"):
        backend.submit(plan(1, RowStep(0, 1, 1)))


def test_a_block_of_another_adapter_is_noticed() -> None:
    backend = FakeBackend(61)
    backend.open(CAPACITY)
    backend.load_adapter(Adapter("a", {}))
    driver = Driver(backend, CAPACITY)
    prompt = list(range(20))
    owner = driver.admit(prompt, adapter="a")
    driver.prefill(owner, 20)
    row = driver.admit(prompt, shared=driver.rows[owner].blocks[:2])
    with pytest.raises(LawViolation, match="reads a slot"):
        driver.run(driver.span(row, 4))
