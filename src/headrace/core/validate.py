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
            # Clients know the case by its first words.
            f"this model's maximum context length is {limits.max_model_len} tokens, for prompt and answer together: "
            f"the prompt has {count}, allowed: up to {limits.max_model_len - 1}"
        )
    sampling = request.sampling
    if sampling.n != 1:
        raise InvalidParameter("n", sampling.n, "1 for the engine: the client asks it once an answer")
    if sampling.bad_words and not sampling.bad_words_ids:
        raise InvalidParameter("bad_words", sampling.bad_words, "bad_words_ids for the engine, which knows no text")
    if request.adapter and request.adapter not in limits.adapters:
        allowed = ", ".join(sorted(limits.adapters)) or "none, since no adapter is loaded"
        raise InvalidParameter("adapter", request.adapter, allowed)
    fields = {
        "prompt_token_ids": request.token_ids,
        "stop_token_ids": sampling.stop_token_ids,
        "allowed_token_ids": sampling.allowed_token_ids or (),
        "logit_bias": [token_id for token_id, _ in sampling.logit_bias],
        "bad_words_ids": [token_id for one in sampling.bad_words_ids for token_id in one],
    }
    for name, ids in fields.items():
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < limits.vocab_size:
                raise InvalidParameter(name, token_id, f"integers from 0 to {limits.vocab_size - 1}")
    room = limits.max_model_len - count
    if sampling.min_tokens > room:
        raise InvalidParameter(
            "min_tokens", sampling.min_tokens, f"at most {room}, the room the prompt leaves in the context"
        )
    if sampling.min_tokens and len(set(sampling.stop_token_ids)) >= limits.vocab_size:
        raise InvalidParameter("stop_token_ids", len(sampling.stop_token_ids), "fewer than the vocabulary")
    if sampling.allowed_token_ids is not None:
        never = {one[0] for one in sampling.bad_words_ids if len(one) == 1}
        never |= set(sampling.stop_token_ids) if sampling.min_tokens else set()
        if never.issuperset(sampling.allowed_token_ids):
            what = "an id that neither bad_words nor, with min_tokens, the stop ids forbid"
            raise InvalidParameter("allowed_token_ids", sampling.allowed_token_ids, what)
