"""When a sequence has ended, by token ids alone (stop strings are text: the client finds them)."""

from __future__ import annotations

from headrace.core.types import FinishReason
from headrace.sched.sequence import Sequence


def stop_reason(sequence: Sequence) -> FinishReason | None:
    """Why the sequence ends with the token it has just received, or None."""
    if sequence.num_output >= sequence.request.sampling.min_tokens and sequence.tokens[-1] in sequence.stop_ids:
        return FinishReason.STOP
    if sequence.num_output >= sequence.max_output:
        return FinishReason.LENGTH
    return None
