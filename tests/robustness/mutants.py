"""Deliberate bugs in the scheduler, block pool, prefix cache and loop: does a property test notice each one?

    python -m tests.robustness.mutants        # `make robustness`

Each mutant is one edit in a scratch copy of the package; the random walks and the engine's tests run against it. A
mutant that nothing notices is printed and makes the run fail, unless fewer than ALLOWED_SURVIVORS survive.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = tuple(
    f"tests/unit/test_{name}.py" for name in ("sched_parts", "engine", "engine_faults", "scheduler_properties")
)
ALLOWED_SURVIVORS = 2
TIMEOUT_S = 120


@dataclass(frozen=True)
class Mutant:
    bug: str
    file: str
    before: str
    after: str


SCHEDULER, BLOCKS, PREFIX, POLICY, STOP, SEQUENCE, ADMISSION, ISOLATION, PACE, TIMERS = (
    f"sched/{name}.py"
    for name in (
        *("scheduler", "blocks", "prefix", "policy", "stop", "sequence"),
        *("admission", "isolation", "pace", "timers"),
    )
)
CORE = "engine/core.py"
MUTANTS = (
    Mutant(
        "blocks come back while a step in flight still names them",
        SCHEDULER,
        "(sequence)\n        if sequence.steps_in_flight == 0:\n            self._give_back(sequence)",
        "(sequence)\n        self._give_back(sequence)",
    ),
    Mutant(
        "a prompt to be scored takes a prefix hit",
        ADMISSION,
        "        if sequence.unscored:\n            return []\n",
        "",
    ),
    Mutant(
        "nobody waits for a block in the making",
        SCHEDULER,
        "and self._admission.is_coming(sequence, len(cached), self._running):",
        "and False:",
    ),
    Mutant(
        "a request waits for a block of another tenant",
        ADMISSION,
        "            and other.root_key == sequence.root_key\n",
        "",
    ),
    Mutant(
        "a request waits for a block that is there already",
        ADMISSION,
        "            len(other.keys) <= num_cached\n",
        "            True\n",
    ),
    Mutant(
        "a preempted request waits behind those that may not join",
        SCHEDULER,
        "if len(self._waiting) == self._num_fresh:",
        "if True:",
    ),
    Mutant(
        "after a preemption the prompt's scores are told twice",
        SCHEDULER,
        "out.prompt_logprobs[len(sequence.prompt_logprobs) - span.start :]",
        "out.prompt_logprobs",
    ),
    Mutant("a finished row is never released", SCHEDULER, "        self._release.append(sequence.row)\n", ""),
    Mutant("blocks of a finished request are lost", SCHEDULER, "        self._pool.release(sequence.blocks)\n", ""),
    Mutant(
        "a block is published one token too early",
        SCHEDULER,
        "* size <= sequence.num_computed:",
        "* size <= sequence.num_computed + 1:",
    ),
    Mutant(
        "blocks are published at plan time, not at commit",
        SCHEDULER,
        "        sequence.num_planned = stop\n",
        "        sequence.num_planned = sequence.num_computed = stop\n        self._publish(sequence)\n",
    ),
    Mutant(
        "a preempted request goes to the end of the queue",
        SCHEDULER,
        "sequence.status = Status.WAITING\n            insort(self._waiting, sequence, key=lambda s: s.place)",
        "sequence.status = Status.WAITING\n            self._waiting.append(sequence)",
    ),
    Mutant(
        "a failed row's answer goes on",
        SCHEDULER,
        "            self._end(sequence, ErrorEvent(sequence.request.id, out.error.code, out.error.message, now_s))\n"
        "            return",
        "            return",
    ),
    Mutant(
        "tokens after the end are still delivered",
        SCHEDULER,
        "            if not sequence.ended:\n                self._commit_row",
        "            if True:\n                self._commit_row",
    ),
    Mutant("the budget is counted per row, not per step", SCHEDULER, "                budget -= fits\n", ""),
    Mutant(
        "the oldest row loses its blocks instead of the youngest",
        SCHEDULER,
        "                youngest, remaining = todo.pop()",
        "                youngest, remaining = todo.popleft()",
    ),
    Mutant(
        "cached blocks are used without taking hold of them",
        SCHEDULER,
        "        for block in cached:\n            self._pool.share(block)\n",
        "",
    ),
    Mutant(
        "a prefix hit skips one block too many",
        SCHEDULER,
        "sequence.num_planned = sequence.num_computed = len(cached) * self._capacity.block_size",
        "sequence.num_planned = sequence.num_computed = len(cached) * self._capacity.block_size + bool(cached)",
    ),
    Mutant(
        "an answer may be one token too long",
        STOP,
        "len(sequence.tokens) >= sequence.max_total",
        "len(sequence.tokens) > sequence.max_total",
    ),
    Mutant(
        "the backend is not told what to mask until min_tokens are out",
        SCHEDULER,
        "            stop_ids=sequence.stop_ids,\n            images",
        "            stop_ids=frozenset(),\n            images",
    ),
    Mutant(
        "max_tokens is not cut to the context",
        SCHEDULER,
        "min(num_prompt + sampling.max_tokens, self._max_model_len)",
        "num_prompt + sampling.max_tokens",
    ),
    Mutant(
        "ignore_eos is ignored",
        SCHEDULER,
        "(frozenset() if sampling.ignore_eos else self._eos_ids)",
        "self._eos_ids",
    ),
    Mutant(
        "the adapter is left out of the key",
        PREFIX,
        "(self._identity, adapter.encode(), salt.encode())",
        "(self._identity, salt.encode())",
    ),
    Mutant(
        "the salt is left out of the key",
        PREFIX,
        "(self._identity, adapter.encode(), salt.encode())",
        "(self._identity, adapter.encode())",
    ),
    Mutant(
        "a block's key forgets what came before it",
        PREFIX,
        "        digest = sha256(parent)\n",
        "        digest = sha256()\n",
    ),
    Mutant(
        "a full hit leaves no token to compute",
        PREFIX,
        "range(0, len(token_ids) - size, size)",
        "range(0, len(token_ids) - size + 1, size)",
    ),
    Mutant(
        "an evicted block can still be found",
        PREFIX,
        "        del self._by_key[self._by_block.pop(block).key]",
        "        pass",
    ),
    Mutant(
        "a block with holders is freed",
        BLOCKS,
        "            if self._refs[block] == 0:\n                if block in self._kept",
        "            if self._refs[block] <= 1:\n                if block in self._kept",
    ),
    Mutant(
        "a shared idle block stays in the idle list",
        BLOCKS,
        "        if self._refs[block] == 0:\n            del self._idle[block]\n",
        "",
    ),
    Mutant(
        "the last wanted token is computed for nothing",
        SEQUENCE,
        "0 if num_tokens >= self.max_total else",
        "0 if len(self.tokens) >= self.max_total else",
    ),
    Mutant(
        "serial lets two in",
        POLICY,
        'StaticBatch("serial", 1)',
        'StaticBatch("serial", 2)',
    ),
    Mutant(
        "a static batch is topped up while it runs",
        POLICY,
        "        if active == 0:\n            self._left = min(self.size, waiting)",
        "        self._left = min(self.size - active, waiting)",
    ),
    Mutant(
        "the window never closes",
        POLICY,
        "waiting if now_s >= oldest_arrival_s + self.window_s else 0",
        "0",
    ),
    Mutant(
        "an aborted request keeps its place in the queue",
        SCHEDULER,
        "            self._waiting.remove(sequence)\n            sequence.status = Status.ENDED",
        "            sequence.status = Status.ENDED",
    ),
    Mutant(
        "joining ignores whether there is room",
        SCHEDULER,
        "            if not self._admission.room_for(sequence, cached, self._running):\n                break\n",
        "",
    ),
    Mutant(
        "a step that fails ends the first of its rows unheard",
        ISOLATION,
        "        half = len(suspects) // 2\n",
        "        if suspects:\n            return suspects[0]\n        half = 0\n",
    ),
    Mutant(
        "a fault that comes once ends a request",
        ISOLATION,
        "            if suspects[0] in self._accused:\n                return",
        "            if True:\n                return",
    ),
    Mutant(
        "who was accused once stays so for ever",
        ISOLATION,
        "        self._accused.discard(sequence)\n",
        "",
    ),
    Mutant(
        "who leaves is waited for in its trial",
        ISOLATION,
        "    def ended(self, sequence: Sequence) -> None:\n        self._trial.discard(sequence)",
        "    def ended(self, sequence: Sequence) -> None:\n        pass",
    ),
    Mutant(
        "the parked keep the blocks that a trial needs",
        ISOLATION,
        "        if not self._trial:\n            return []\n",
        "        return []\n",
    ),
    Mutant(
        "a passed trial does not count",
        ISOLATION,
        "        if sequence.num_computed >= sequence.tried_until:\n            self.ended(sequence)",
        "        pass",
    ),
    Mutant("after a fault old plans are still in flight", SCHEDULER, "        self._flights.clear()\n", ""),
    Mutant(
        "rows that a reset forgot are released again",
        SCHEDULER,
        "        self._release = []\n        return None if guilty",
        "        return None if guilty",
    ),
    Mutant(
        "after a fault tokens in flight still count",
        SCHEDULER,
        "            sequence.steps_in_flight = sequence.sampling_in_flight = 0\n",
        "            sequence.steps_in_flight = 0\n",
    ),
    Mutant(
        "what the row at fault left in the cache is found again",
        SCHEDULER,
        "            self._cache.withdraw(guilty.blocks)\n",
        "            pass\n",
    ),
    Mutant(
        "lost blocks stay lost",
        SCHEDULER,
        "            self._cache.clear()\n",
        "",
    ),
    Mutant(
        "a small step slows the pace of large ones",
        PACE,
        "if seconds > self._step_seconds or fits > self._tokens:",
        "if True:",
    ),
    Mutant("a slow step is forgotten", PACE, "seconds > self._step_seconds or fits", "fits"),
    Mutant("the pace starves prompts", PACE, "num_rows + self._chunk)", "num_rows)"),
    Mutant(
        "a preempted request has no time left in the queue",
        TIMERS,
        "request.join_by_s <= now_s and not was_admitted:",
        "request.join_by_s <= now_s:",
    ),
    Mutant(
        "a row is planned before its grammar's mask can be known",
        SEQUENCE,
        "        if self.sampling_in_flight and self.request.grammar:\n            return 0\n",
        "",
    ),
    Mutant("masks are made of the prompt too", CORE, "sequence.tokens[sequence.num_prompt :]", "sequence.tokens"),
    Mutant("grammars of requests that ended are kept", CORE, "            self._grammars.drop(request_id)\n", ""),
    Mutant(
        "a device that works again is still blamed",
        CORE,
        "        self._lone_faults = 0\n        self._cleared = T",
        "        self._cleared = T",
    ),
    Mutant("one that is well does not clear the device", CORE, "+= not self._cleared", "+= 1"),
    Mutant(
        "with a fault looked into, plans overtake results",
        CORE,
        "depth = 1 if self._scheduler.isolating else self._backend.depth",
        "depth = self._backend.depth",
    ),
)


def noticed(mutant: Mutant) -> str | None:
    """The first complaint of the tests about the mutant, or None."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "src"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        target = copy / "headrace" / mutant.file
        source = target.read_text(encoding="utf-8")
        if source.count(mutant.before) != 1:
            raise SystemExit(f"{mutant.file} holds {source.count(mutant.before)} times: {mutant.before!r}")
        target.write_text(source.replace(mutant.before, mutant.after), encoding="utf-8")
        code = f"import sys, pytest; sys.path.insert(0, {str(copy)!r}); sys.exit(pytest.main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "-x", "-q", "-p", "no:cacheprovider", "--tb=line", *TESTS]
        try:
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "ran without end"
        if run.returncode == 0:
            return None
        lines = [line for line in run.stdout.splitlines() if "Error" in line or "Violation" in line or "assert" in line]
        return (lines or run.stdout.splitlines()[-1:] or ["?"])[0].rsplit("/", 1)[-1][:110]


def main() -> int:
    survivors = 0
    for mutant in MUTANTS:
        complaint = noticed(mutant)
        survivors += complaint is None
        print(f"{'SURVIVED' if complaint is None else 'caught  '}  {mutant.bug}: {complaint or ''}", flush=True)
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} deliberate bugs caught")
    return int(survivors > ALLOWED_SURVIVORS)


if __name__ == "__main__":
    sys.exit(main())
