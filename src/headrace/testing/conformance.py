"""What every backend must do (docs/CONTRACTS.md §1), as a pytest class.

    class TestMyBackend(BackendConformance):
        @pytest.fixture
        def driver(self): ...          # a loaded backend: ≥ 48 blocks, ≥ 8 rows, ≥ 48 tokens a step
        def adapter(self, name): ...   # a LoRA adapter for it, not the same for another name
        vocab_size = 61                # ids below it may be asked for

The oracle is the backend itself, run in the plainest way: one request, one chunk, one token a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from headrace.core.errors import EngineError
from headrace.core.types import Admit, RowOut, SamplingParams, StepPlan, TokenLogprobs
from headrace.testing.driver import Driver
from headrace.weights.lora import Adapter


class BackendConformance:
    """Subclass it and give it the fixture `driver`."""

    vocab_size: int = 61
    poison_id: int
    """An id that makes its row fail (its embedding is NaN, say) and that the model does not generate."""

    @pytest.fixture
    def driver(self) -> Driver:
        raise NotImplementedError("a conformance test needs its own `driver` fixture")

    def adapter(self, name: str) -> Adapter:
        """An adapter whose answers differ from the model's and from those of an adapter of another name."""
        raise NotImplementedError("a conformance test needs its own `adapter`")

    def prompt(self, length: int, seed: int = 1) -> list[int]:
        """Token ids, the same for the same arguments, none of them `poison_id`."""
        ids = [(seed * 17 + 13 * i * i + 5 * i) % self.vocab_size for i in range(length)]
        return [(i + 1) % self.vocab_size if i == self.poison_id else i for i in ids]

    def safe(self, tokens: Sequence[int]) -> Sequence[int]:
        """Generated tokens, all usable as prompt. Fails if the model itself came upon the poison."""
        assert self.poison_id not in tokens, "choose another poison_id: the model generates this one"
        return tokens

    def test_the_same_tokens_in_any_chunks(self, driver: Driver) -> None:
        prompt = self.prompt(29)
        whole = self.safe(driver.generate(prompt, 8))
        for chunk in (1, 3, 7, 16, 28):
            assert driver.generate(prompt, 8, chunk) == whole

    def test_the_same_tokens_in_company(self, driver: Driver) -> None:
        prompts = [self.prompt(length, seed) for seed, length in enumerate((3, 1, 17, 9, 5))]
        alone = [self.safe(driver.generate(prompt, 6)) for prompt in prompts]
        rows = [driver.admit(prompt) for prompt in prompts]
        first = driver.run(*(driver.span(row, len(prompt)) for row, prompt in zip(rows, prompts, strict=True)))
        rest = driver.decode(rows, 5)
        assert [[*first[row].tokens, *rest[row]] for row in rows] == alone

    def test_mixed_spans_in_one_step(self, driver: Driver) -> None:
        decoding, prefilling = self.prompt(6, 2), self.prompt(21, 3)
        expected = self.safe(driver.generate(decoding, 4)), self.safe(driver.generate(prefilling, 1))
        a, b = driver.admit(decoding), driver.admit(prefilling)
        tokens = list(driver.prefill(a, 6).tokens)
        for size in (8, 8, 5):
            outs = driver.run(driver.span(a, 1), driver.span(b, size, sample=size == 5))
            tokens += outs[a].tokens
        assert (tokens, list(outs[b].tokens)) == (list(expected[0]), list(expected[1]))

    def test_nothing_is_sampled_unless_asked(self, driver: Driver) -> None:
        row = driver.admit(self.prompt(9))
        assert driver.run(driver.span(row, 4, sample=False))[row] == RowOut(row)
        assert len(driver.run(driver.span(row, 5))[row].tokens) == 1

    def test_a_prompt_is_scored_once_whatever_its_chunks(self, driver: Driver) -> None:
        """A score for each prompt token but the first; none for what was generated, none unless asked."""
        prompt, beside = self.prompt(14), self.prompt(4, 2)
        sampling = SamplingParams(prompt_logprobs=0)
        found = []
        for sizes in ((14, 1), (5, 1, 8, 1), (13, 2)):
            tokens = [*prompt, *self.safe(driver.generate(prompt, 1))]
            row, other = driver.admit(tokens, sampling, num_prompt=len(prompt)), driver.admit(beside)
            scores: list[TokenLogprobs] = []
            for size in sizes:
                last = driver.rows[row].computed + size == len(tokens)
                span = replace(driver.span(row, size, sample=last), score_prompt=True)
                outs = driver.run(span, driver.span(other, 4 if driver.rows[other].computed == 0 else 1))
                scores += outs[row].prompt_logprobs
                assert outs[row].error is None and outs[other].prompt_logprobs == ()
            assert len(scores) == len(prompt) - 1
            found.append(scores)
            driver.release(row)
            driver.release(other)
        assert found[0] == found[1] == found[2]

    def test_results_answer_plans_in_order_and_rows_in_plan_order(self, driver: Driver) -> None:
        rows = [driver.admit(self.prompt(3, seed)) for seed in range(4)][::-1]
        driver.submit(*(driver.span(row, 3) for row in rows))
        result = driver.backend.result()
        assert result.step == 0 and [out.row for out in result.rows] == rows

    def test_a_step_may_name_a_token_that_is_still_being_sampled(self, driver: Driver) -> None:
        prompt = self.prompt(7)
        expected = self.safe(driver.generate(prompt, 6))
        row = driver.admit(prompt)
        depth = driver.backend.depth
        tokens: list[int] = []
        steps = [7, 1, 1, 1, 1, 1]
        for index, length in enumerate(steps):
            driver.submit(driver.span(row, length))
            if index >= depth - 1:
                tokens += driver.result()[row].tokens
        for _ in range(depth - 1):
            tokens += driver.result()[row].tokens
        assert tokens == list(expected)

    def test_a_prefix_hit_changes_nothing(self, driver: Driver) -> None:
        size = driver.capacity.block_size
        shared = self.prompt(2 * size, 4)
        first, second = [*shared, *self.prompt(3, 5)], [*shared, *self.prompt(5, 6)]
        expected = self.safe(driver.generate(second, 6))
        owner = driver.admit(first)
        driver.prefill(owner, len(first))
        blocks = driver.rows[owner].blocks[:2]
        row = driver.admit(second, shared=blocks)
        outs = driver.run(driver.span(owner, 1), driver.span(row, 5))
        tokens = [*outs[row].tokens, *driver.decode([row], 5)[row]]
        assert tokens == list(expected)

    def test_release_and_admit_in_one_plan(self, driver: Driver) -> None:
        a, b = self.prompt(5, 1), self.prompt(8, 2)
        expected = self.safe(driver.generate(b, 5))
        row = driver.admit(a, row=3)
        driver.prefill(row, 5)
        driver.release(row)
        again = driver.admit(b, row=3)
        tokens = [*driver.prefill(again, 8).tokens, *driver.decode([again], 4)[again]]
        assert tokens == list(expected)

    def test_a_preempted_request_goes_on_as_if_nothing_had_been(self, driver: Driver) -> None:
        prompt = self.prompt(10, 3)
        expected = self.safe(driver.generate(prompt, 9))
        row = driver.admit(prompt)
        tokens = [*driver.prefill(row, 10).tokens, *driver.decode([row], 3)[row]]
        driver.release(row)
        other = driver.admit(self.prompt(20, 9))
        driver.prefill(other, 20)
        row = driver.admit([*prompt, *tokens], num_prompt=len(prompt))
        tokens += driver.prefill(row, len(prompt) + 4, chunk=6).tokens
        tokens += driver.decode([row], 4)[row]
        assert tokens == list(expected)

    def test_reused_blocks_hold_nothing_of_their_past(self, driver: Driver) -> None:
        prompt = self.prompt(driver.capacity.block_size + 1, 7)
        expected = self.safe(driver.generate(prompt, 4))
        for seed in range(6):
            driver.generate(self.prompt(40, seed), 2)
            assert driver.generate(prompt, 4) == list(expected)

    def test_copied_blocks_are_as_good_as_the_originals(self, driver: Driver) -> None:
        size = driver.capacity.block_size
        prompt = self.prompt(2 * size + 3, 8)
        expected = self.safe(driver.generate(prompt, 5))
        owner = driver.admit(prompt)
        driver.prefill(owner, len(prompt))
        copies = [driver.free_blocks.pop(), driver.free_blocks.pop()]
        for source, target in zip(driver.rows[owner].blocks[:2], copies, strict=True):
            driver.copy(source, target)
        driver.release(owner, reuse=False)
        row = driver.admit(prompt, shared=copies)
        tokens = [*driver.run(driver.span(row, 3))[row].tokens, *driver.decode([row], 4)[row]]
        assert tokens == list(expected)

    def test_drafts_are_accepted_while_right(self, driver: Driver) -> None:
        prompt = self.prompt(6, 5)
        expected = list(self.safe(driver.generate(prompt, 10)))
        for right in (0, 1, 3):
            row = driver.admit(prompt)
            tokens = list(driver.prefill(row, 6).tokens)
            wrong = (expected[1 + right] + 1) % self.vocab_size
            drafts = [*expected[1 : 1 + right], *([wrong, wrong] if right < 3 else [])]
            out = driver.run(driver.span(row, 1, drafts=drafts))[row]
            assert out.error is None and out.accepted == right
            assert list(out.tokens) == expected[1 : 2 + right]
            tokens += out.tokens
            tokens += driver.decode([row], 10 - len(tokens))[row]
            assert tokens == expected, "what was rejected leaves no trace"
            driver.release(row)

    def test_min_tokens_masks_what_would_end_the_answer(self, driver: Driver) -> None:
        prompt = self.prompt(4, 6)
        plain = self.safe(driver.generate(prompt, 1))
        row = driver.admit(prompt, stop_ids=frozenset(plain))
        assert list(driver.prefill(row, 4).tokens) == list(plain), "no mask without min_tokens"
        driver.release(row)
        row = driver.admit(prompt, SamplingParams(min_tokens=2), stop_ids=frozenset(plain))
        tokens = [*driver.prefill(row, 4).tokens, *driver.decode([row], 1)[row]]
        assert not set(tokens) & set(plain)

    def test_a_failing_row_fails_alone(self, driver: Driver) -> None:
        good = self.prompt(9, 2)
        expected = list(self.safe(driver.generate(good, 6)))
        row = driver.admit(good)
        sick = driver.admit([1, self.poison_id, 2])
        outs = driver.run(driver.span(row, 9), driver.span(sick, 3))
        assert outs[sick].error is not None and outs[sick].tokens == ()
        tokens = list(outs[row].tokens)
        driver.release(sick)
        nurse = driver.admit(self.prompt(3, 3))
        tokens += driver.run(driver.span(row, 1), driver.span(nurse, 3))[row].tokens
        tokens += driver.decode([row, nurse], 4)[row]
        assert tokens == expected

    def test_a_reset_forgets_rows_and_plans_and_keeps_blocks(self, driver: Driver) -> None:
        """With a plan unanswered, and after one that failed half way."""
        size = driver.capacity.block_size
        prompt = self.prompt(2 * size + 3, 8)
        expected = list(self.safe(driver.generate(prompt, 5)))
        row, other = driver.admit(prompt), driver.admit(self.prompt(4, 2))
        driver.prefill(row, len(prompt))
        blocks = driver.rows[row].blocks[:2]
        driver.submit(driver.span(row, 1), driver.span(other, 4))
        for _ in range(2):
            driver.backend.reset()
            driver.rows.clear()
            driver.free_blocks = [block for block in driver.free_blocks if block not in blocks]
            row = driver.admit(prompt, shared=blocks, row=row)
            tokens = [*driver.run(driver.span(row, 3))[row].tokens, *driver.decode([row], 4)[row]]
            assert tokens == expected
            twice = Admit(other, (1,), 1, SamplingParams())
            driver.step += 1
            with pytest.raises((EngineError, AssertionError)):
                driver.backend.submit(StepPlan(driver.step, (), (twice, twice)))
            driver.step += 1

    def test_adapters_beside_each_other_in_one_batch(self, driver: Driver) -> None:
        prompt = self.prompt(9, 4)
        plain = self.safe(driver.generate(prompt, 6))
        for name in ("a", "b"):
            driver.backend.load_adapter(self.adapter(name))
        assert driver.generate(prompt, 6) == plain, "an adapter that is loaded changes nothing for who does not ask"
        alone = {name: self.safe(driver.generate(prompt, 6, adapter=name)) for name in ("", "a", "b")}
        assert len({tuple(tokens) for tokens in alone.values()}) == 3
        assert driver.generate(prompt, 6, chunk=4, adapter="b") == alone["b"]
        names = ("b", "", "a", "a", "", "b")
        rows = [driver.admit(prompt, adapter=name) for name in names]
        first = driver.run(driver.span(rows[0], 4, sample=False), *(driver.span(row, 9) for row in rows[2:]))
        late = driver.run(driver.span(rows[0], 5), driver.span(rows[1], 9), *(driver.span(r, 1) for r in rows[2:]))
        tokens = {row: [*first.get(row, RowOut(row)).tokens, *late[row].tokens] for row in rows}
        for row, rest in driver.decode(rows, 4).items():
            tokens[row] += rest
        for row, name in zip(rows, names, strict=True):
            assert tokens[row] == list(alone[name])[: len(tokens[row])]

    def test_a_row_with_an_unknown_adapter_fails_alone(self, driver: Driver) -> None:
        prompt = self.prompt(9, 2)
        expected = list(self.safe(driver.generate(prompt, 3)))
        row, lost = driver.admit(prompt), driver.admit(prompt, adapter="nobody")
        outs = driver.run(driver.span(row, 9), driver.span(lost, 9))
        failure = outs[lost].error
        assert failure is not None and "nobody" in failure.message and outs[lost].tokens == ()
        driver.release(lost)
        assert [*outs[row].tokens, *driver.decode([row], 2)[row]] == expected

    def test_an_adapter_is_loaded_once(self, driver: Driver) -> None:
        driver.backend.load_adapter(self.adapter("a"))
        with pytest.raises(EngineError, match="'a'"):
            driver.backend.load_adapter(self.adapter("a"))
