"""When a sequence has ended, by token ids alone (stop strings are text: the client finds them)."""

from __future__ import annotations

from headrace.core.types import FinishReason
from headrace.sched.sequence import Sequence


def stop_reason(sequence: Sequence) -> FinishReason | None:
    """Why the sequence ends with the token it has just received, or None.

    `min_tokens` needs no word here: until they are out, backends mask every id that would end the sequence.
    """
    if sequence.tokens[-1] in sequence.stop_ids:
        return FinishReason.STOP
    if len(sequence.tokens) >= sequence.max_total:
        return FinishReason.LENGTH
    return None
