"""FakeBackend: a backend whose next token is computed by hand, and which checks every law it can see.

Its KV cache is an array that holds, per slot, the token written there and its position. The next token is computed
from what the row's block table leads to, never from the row's own ids: a lost, reused or wrongly shared block
gives a wrong token or a `LawViolation`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from headrace.backends.base import BackendOptions
from headrace.core.errors import EngineError, NoTokenAllowed, shorten
from headrace.core.spec import ModelSpec
from headrace.core.types import (
    Admit,
    Capacity,
    RowError,
    RowOut,
    RowStep,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from headrace.parallel.mesh import Mesh
from headrace.weights.lora import Adapter
from headrace.weights.qtensor import QTensor

MODULUS = 8191
NO_TOKEN = -1


def unknown_adapter(name: str) -> RowError:
    return RowError(EngineError.code, f"adapter {shorten(name)} is not loaded")


class LawViolation(AssertionError):
    """A plan broke one of the laws of docs/CONTRACTS.md §1."""


def fold(state: int, position: int, token_id: int) -> int:
    """One step of the hash whose last value decides the next token."""
    return (state * 31 + token_id * 7 + position + 1) % MODULUS


def next_token(token_ids: Iterable[int], vocab_size: int, adapter: str = "") -> int:
    """The token that follows `token_ids`; an adapter's name is what the hash begins with."""
    state = 0
    for place, byte in enumerate(adapter.encode()):
        state = fold(state, place, byte)
    for position, token_id in enumerate(token_ids):
        state = fold(state, position, token_id)
    return state % vocab_size


def prompt_score(token_ids: Iterable[int], adapter: str = "") -> TokenLogprobs:
    """The log-probability that FakeBackend gives the prompt token after `token_ids`."""
    return TokenLogprobs(-float(next_token(token_ids, MODULUS, adapter)))


def _runs(sampling: SamplingParams) -> bool:
    """Whether it asks for nothing but greedy tokens."""
    plain = SamplingParams()
    kept = ("max_tokens", "min_tokens", "seed", "stop", "stop_token_ids", "ignore_eos", "prompt_logprobs")
    return replace(sampling, **{name: getattr(plain, name) for name in kept}) == plain


def answer(
    prompt: Iterable[int],
    vocab_size: int,
    count: int,
    stop_ids: frozenset[int] = frozenset(),
    min_tokens: int = 0,
    adapter: str = "",
) -> list[int]:
    """The `count` tokens (fewer if one of `stop_ids` comes) that FakeBackend generates after `prompt`."""
    token_ids = list(prompt)
    output: list[int] = []
    while len(output) < count:
        token = next_token(token_ids + output, vocab_size, adapter)
        while len(output) < min_tokens and token in stop_ids:
            token = (token + 1) % vocab_size
        output.append(token)
        if token in stop_ids:
            break
    return output


@dataclass(slots=True)
class _Row:
    admit: Admit
    token_ids: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    last_step: int = -1
    error: RowError | None = None


class FakeBackend:
    """Greedy only. A row whose context holds a token of `poison` fails with `nan_logits`."""

    name = "fake"

    def __init__(self, vocab_size: int = 61, depth: int = 1, poison: frozenset[int] = frozenset()) -> None:
        self.depth = depth
        self.vocab_size = vocab_size
        self.computed_tokens = 0
        self._poison = poison
        self._rows: dict[int, _Row] = {}
        self._answers: deque[StepResult] = deque()
        self._named: deque[tuple[int, frozenset[int]]] = deque()
        """(step, blocks it names) of unanswered plans."""
        self._sampling: deque[frozenset[int]] = deque()
        """Rows that each of them samples."""
        self._written: deque[list[int]] = deque()
        """Slots that each plan whose result was not taken wrote, the one that is being submitted included."""
        self._last_step = -1
        self._memory: list[tuple[int, int, str] | None] = []
        """Token, its position and the adapter it was computed with."""
        self._adapters: set[str] = set()

    def load(
        self, spec: ModelSpec, tensors: Iterable[tuple[str, QTensor]], options: BackendOptions, mesh: Mesh
    ) -> Capacity:
        self.vocab_size = spec.vocab_size
        for _ in tensors:
            pass
        return self.open(Capacity(options.num_blocks, options.block_size, options.max_rows, options.max_tokens))

    def open(self, capacity: Capacity) -> Capacity:
        """What load() does without a model."""
        self._capacity = capacity
        self._memory = [None] * (capacity.blocks * capacity.block_size)
        return capacity

    def load_adapter(self, adapter: Adapter) -> None:
        """The name is all that counts. Raises EngineError if it is taken."""
        if adapter.name in self._adapters:
            raise EngineError(f"adapter {shorten(adapter.name)} is loaded already")
        self._adapters.add(adapter.name)

    def submit(self, plan: StepPlan) -> None:
        self._check_plan(plan)
        self._written.append([])
        for row in plan.release:
            self._free(row)
        for admit in plan.admit:
            self._require(admit.row not in self._rows, f"row {admit.row} is taken")
            self._require(0 <= admit.row < self._capacity.max_rows, f"row {admit.row} does not exist")
            self._rows[admit.row] = _Row(admit, list(admit.token_ids))
        size = self._capacity.block_size
        for source, target in plan.copies:
            self._memory[target * size : (target + 1) * size] = self._memory[source * size : (source + 1) * size]
        for step in plan.rows:
            self._grow(plan.step, step)
        outs = tuple(self._run(step) for step in plan.rows)
        self.computed_tokens += sum(step.length for step in plan.rows)
        named = frozenset(block for step in plan.rows for block in self._rows[step.row].blocks)
        self._named.append((plan.step, named))
        self._sampling.append(frozenset(step.row for step in plan.rows if step.sample))
        self._answers.append(StepResult(plan.step, outs))

    def result(self) -> StepResult:
        self._named.popleft()
        self._sampling.popleft()
        self._written.popleft()
        return self._answers.popleft()

    def reset(self) -> None:
        """What an unanswered plan wrote is gone, so that whoever counts on it is noticed."""
        for slot in (slot for slots in self._written for slot in slots):
            self._memory[slot] = None
        for held in (self._rows, self._answers, self._named, self._sampling, self._written):
            held.clear()

    def probe(self) -> Mapping[str, object]:
        return {"device": "none"}

    def explain(self) -> str:
        return "computed by hand"

    def memory(self) -> Mapping[str, int]:
        return {"weights": 0, "adapters": 0, "kv_cache": 0, "workspace": 0}

    def close(self) -> None:
        self._rows.clear()

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise LawViolation(message)

    def _check_plan(self, plan: StepPlan) -> None:
        self._require(len(self._answers) < self.depth, f"more than {self.depth} plans in flight")
        self._require(plan.step > self._last_step, f"step {plan.step} after {self._last_step}")
        self._last_step = plan.step
        rows = [step.row for step in plan.rows]
        self._require(len(set(rows)) == len(rows), "a row twice in one plan")
        total = sum(step.length + len(step.drafts) for step in plan.rows)
        self._require(total <= self._capacity.max_tokens, f"{total} tokens exceed the budget")

    def _free(self, row: int) -> None:
        self._require(row in self._rows, f"row {row} released but not live")
        unanswered = {step for step, _ in self._named}
        self._require(self._rows[row].last_step not in unanswered, f"row {row} released while a step names it (law 3)")
        del self._rows[row]

    def _grow(self, number: int, step: RowStep) -> None:
        """Appends new blocks and checks who else may still use them."""
        self._require(step.row in self._rows, f"row {step.row} is not live")
        row = self._rows[step.row]
        size = self._capacity.block_size
        for block in step.new_blocks:
            self._require(0 <= block < self._capacity.blocks, f"block {block} does not exist")
            cached = (len(row.blocks) + 1) * size <= step.start
            if not cached:
                in_flight = any(block in blocks for _, blocks in self._named)
                self._require(not in_flight, f"block {block} reused while a step names it (law 3)")
                for slot in range(block * size, (block + 1) * size):
                    self._memory[slot] = None
            row.blocks.append(block)
        if row.last_step < 0:
            row.computed = step.start
        row.last_step = number

    def _run(self, step: RowStep) -> RowOut:
        row = self._rows[step.row]
        if row.error is None:
            out = self._compute(step, row)
            row.error = out.error
            return out
        return RowOut(step.row, error=row.error)

    def _compute(self, step: RowStep, row: _Row) -> RowOut:
        admit = row.admit
        size = self._capacity.block_size
        self._require(step.length >= 1, "an empty span")
        self._require(step.start == row.computed, f"starts at {step.start}, computed {row.computed}")
        self._require(step.start + step.length <= len(row.token_ids), "computes a token that does not exist")
        unknown = any(step.row in rows for rows in self._sampling)
        self._require(not (step.drafts or step.mask) or not unknown, "drafts or mask without a commit (law 2)")
        stop = step.start + step.length
        needed = stop + len(step.drafts)
        self._require(len(row.blocks) * size >= needed, f"{len(row.blocks)} blocks for {needed} tokens")
        if not _runs(admit.sampling) or step.logits or admit.images:
            return RowOut(step.row, error=RowError("unsupported", "the fake backend decodes greedily, without extras"))
        if admit.adapter and admit.adapter not in self._adapters:
            return RowOut(step.row, error=unknown_adapter(admit.adapter))
        for position in range(step.start, stop):
            self._write(step.row, position, row.token_ids[position])
        row.computed = stop
        error = self._check_finite(row, stop)
        if error is not None:
            return RowOut(step.row, error=error)
        scores = self._scores(row, step) if step.score_prompt else ()
        if not step.sample:
            return RowOut(step.row, prompt_logprobs=scores)
        self._require(stop == len(row.token_ids), "samples before the last known token")
        tokens = [self._next(row, stop, step, 0)]
        for draft in step.drafts:
            if draft != tokens[-1]:
                break
            self._write(step.row, stop + len(tokens) - 1, draft)
            row.computed += 1
            tokens.append(self._next(row, row.computed, step, len(tokens)))
        if NO_TOKEN in tokens:
            return RowOut(step.row, error=RowError(NoTokenAllowed.code, "the mask allows no token"))
        row.token_ids += tokens
        return RowOut(step.row, tuple(tokens), accepted=len(tokens) - 1, prompt_logprobs=scores)

    def _scores(self, row: _Row, step: RowStep) -> tuple[TokenLogprobs, ...]:
        stop = min(step.start + step.length, row.admit.num_prompt - 1)
        adapter = row.admit.adapter
        return tuple(prompt_score(self._read(row, position + 1), adapter) for position in range(step.start, stop))

    def _write(self, index: int, position: int, token_id: int) -> None:
        size = self._capacity.block_size
        block = self._rows[index].blocks[position // size]
        for other, owner in self._rows.items():
            self._require(other == index or block not in owner.blocks, "writes into another row's block")
        slot = block * size + position % size
        self._memory[slot] = (token_id, position, self._rows[index].admit.adapter)
        self._written[-1].append(slot)

    def _read(self, row: _Row, stop: int) -> list[int]:
        """The tokens before `stop`, as the row's block table leads to them."""
        size = self._capacity.block_size
        found = []
        for position in range(stop):
            held = self._memory[row.blocks[position // size] * size + position % size]
            if held is None or held[1:] != (position, row.admit.adapter):
                raise LawViolation(f"position {position} of row {row.admit.row} reads a slot that holds {held}")
            found.append(held[0])
        return found

    def _check_finite(self, row: _Row, stop: int) -> RowError | None:
        sick = self._poison.intersection(self._read(row, stop))
        return RowError("nan_logits", f"token {min(sick)} gives no finite logits") if sick else None

    def _next(self, row: _Row, stop: int, step: RowStep, place: int) -> int:
        """The token computed by hand, or the first one above it, in a circle, that no mask forbids. `place`: among the
        step's sampled positions."""
        begun = next_token(self._read(row, stop), self.vocab_size, row.admit.adapter)
        masked = row.admit.stop_ids if stop - row.admit.num_prompt < row.admit.sampling.min_tokens else frozenset()
        size = -(-self.vocab_size // 8)
        mask = step.mask[place * size : (place + 1) * size] if isinstance(step.mask, bytes) else None
        for offset in range(self.vocab_size):
            token = (begun + offset) % self.vocab_size
            if token not in masked and (mask is None or mask[token // 8] >> token % 8 & 1):
                return token
        return NO_TOKEN
