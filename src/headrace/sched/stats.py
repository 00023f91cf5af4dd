"""What the scheduler counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.core.metrics import STEP_ADMITTED, STEP_SECONDS, STEP_TOKENS, EngineStats, Histogram
from headrace.sched.blocks import BlockPool


@dataclass(slots=True)
class SchedulerStats:
    """Totals since the start."""

    iterations: int = 0
    """Plans that computed at least one token."""
    computed_tokens: int = 0
    cached_tokens: int = 0
    """Tokens whose KV was found in the prefix cache instead of being computed."""
    queried_tokens: int = 0
    """Tokens that were looked up there."""
    preemptions: int = 0
    faults: int = 0
    """Steps that raised."""
    leaks: int = 0
    """Times that blocks were missing when nobody held any."""
    step_seconds: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS))
    """Of committed steps, from submit to result."""
    prefill_step_seconds: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS))
    """Of those among them that computed tokens of a prompt."""
    tokens_per_step: Histogram = field(default_factory=lambda: Histogram(STEP_TOKENS))
    admitted_per_step: Histogram = field(default_factory=lambda: Histogram(STEP_ADMITTED))
    """Requests that joined, of steps in which one did."""

    def step(self, num_tokens: int, has_prompt: bool, num_joined: int, seconds: float) -> None:
        """A step was committed."""
        self.step_seconds.observe(seconds)
        if has_prompt:
            self.prefill_step_seconds.observe(seconds)
        self.tokens_per_step.observe(num_tokens)
        if num_joined:
            self.admitted_per_step.observe(num_joined)

    def report(self, running: int, waiting: int, pool: BlockPool, block_size: int) -> EngineStats:
        """With how things stand now, as data."""
        return EngineStats(
            running=running,
            waiting=waiting,
            blocks_used=pool.num_held,
            blocks_total=pool.num_blocks,
            block_size=block_size,
            iterations=self.iterations,
            computed_tokens=self.computed_tokens,
            cached_tokens=self.cached_tokens,
            queried_tokens=self.queried_tokens,
            preemptions=self.preemptions,
            faults=self.faults,
            leaks=self.leaks,
            step_seconds=self.step_seconds.state(),
            prefill_step_seconds=self.prefill_step_seconds.state(),
            tokens_per_step=self.tokens_per_step.state(),
            admitted_per_step=self.admitted_per_step.state(),
        )
