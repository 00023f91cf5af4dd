"""One check of every request against what the model allows, used by every way in, before any work."""

from __future__ import annotations

from headrace.core.errors import ContextLengthExceeded, EmptyPrompt, InvalidParameter
from headrace.core.types import EngineLimits, Request


def validate(request: Request, limits: EngineLimits) -> None:
    """Raises a RequestError unless the engine can run the request to its end."""
    count = len(request.token_ids)
    if count == 0:
        raise EmptyPrompt("the prompt has no tokens")
    if count >= limits.max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {count} tokens, allowed: up to {limits.max_model_len - 1}, "
            f"since prompt and answer share {limits.max_model_len}"
        )
    for name, ids in (("prompt_token_ids", request.token_ids), ("stop_token_ids", request.sampling.stop_token_ids)):
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < limits.vocab_size:
                raise InvalidParameter(name, token_id, f"integers from 0 to {limits.vocab_size - 1}")
    room = limits.max_model_len - count
    if request.sampling.min_tokens > room:
        raise InvalidParameter(
            "min_tokens", request.sampling.min_tokens, f"at most {room}, the room the prompt leaves in the context"
        )
    if request.sampling.min_tokens and len(set(request.sampling.stop_token_ids)) >= limits.vocab_size:
        raise InvalidParameter("stop_token_ids", len(request.sampling.stop_token_ids), "fewer than the vocabulary")
