"""One check of every request against what the model allows, used by every way in, before any work."""

from __future__ import annotations

import re
from collections.abc import Sequence

from headrace.core.errors import ContextLengthExceeded, EmptyPrompt, InvalidImage, InvalidParameter
from headrace.core.types import MAX_PIXEL_BYTES, EngineLimits, ImageLimits, ImageSpan, Request

_HASH = re.compile("[0-9a-f]{64}")


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
    if request.images:
        _check_images(request.token_ids, request.images, limits.images)
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


def _check_images(token_ids: Sequence[int], images: Sequence[ImageSpan], limits: ImageLimits | None) -> None:
    """Laws 1 and 2 of docs/CONTRACTS.md §6."""
    if limits is None:
        raise InvalidParameter("images", len(images), "none, since this model reads no images")
    if len(images) > limits.most:
        raise InvalidImage("images", f"{len(images)} images", f"at most {limits.most}")
    pixels = sum(len(image.pixels) for image in images)
    if pixels > MAX_PIXEL_BYTES:
        raise InvalidImage("images", f"{pixels} bytes of pixels", f"up to {MAX_PIXEL_BYTES} in one request")
    before = 0
    for index, image in enumerate(images):
        _check_image(token_ids, image, limits, f"images[{index}]", before)
        before = image.start + image.length


def _check_image(token_ids: Sequence[int], image: ImageSpan, limits: ImageLimits, where: str, before: int) -> None:
    """`before`: where the image before it ends."""
    for name, value, low in (("start", image.start, before), ("length", image.length, 1), ("tiles", image.tiles, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InvalidParameter(f"{where}.{name}", value, f"an integer ≥ {low}")
    stop = image.start + image.length
    if stop > len(token_ids):
        raise InvalidParameter(f"{where}.length", image.length, f"up to the prompt's end, {len(token_ids)}")
    span = token_ids[image.start : stop]
    wanted, found = image.tiles * limits.tokens_per_tile, span.count(limits.token_id)
    if found != wanted:
        allowed = f"{wanted}, {limits.tokens_per_tile} for each of its {image.tiles} tiles"
        raise InvalidParameter(where, f"{found} placeholder tokens", allowed)
    if span[0] != limits.token_id or span[-1] != limits.token_id:
        raise InvalidParameter(where, f"{image.start} to {stop - 1}", "a span from its first placeholder to its last")
    size = image.tiles * limits.tile_size**2 * 3 * (4 if image.normalised else 1)
    if len(image.pixels) != size:
        raise InvalidParameter(f"{where}.pixels", f"{len(image.pixels)} bytes", f"{size} for its tiles")
    if not _HASH.fullmatch(image.hash):
        raise InvalidParameter(f"{where}.hash", image.hash, "64 hexadecimal digits, of SHA-256")
