"""LLM: a model in this process, for scripts and notebooks."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

from headrace.core.config import EngineConfig, ResolvedConfig
from headrace.core.errors import EngineError, InvalidParameter, RequestError
from headrace.core.types import Request, SamplingParams, TokenEvent
from headrace.engine.answer import Answer, Completion, refused
from headrace.engine.client import InProcessClient
from headrace.engine.images import Encoded, ImagePrompt, is_message_list
from headrace.engine.model import Message, OnProgress, OpenModel, Prompt
from headrace.engine.progress import progress_bar
from headrace.sched.scheduler import SchedulerStats

__all__ = ["LLM", "Completion"]

MOST_PIXEL_BYTES = 2**28
"""Of pixels of one call's unfinished requests, before the next of its prompts is read."""


class LLM:
    """Loads a model at once and answers prompts in one running batch.

    `model` is a Hugging Face-layout folder, a .gguf file, a Hub id or `demo`; the other settings are those of
    `EngineConfig` by name. Use it in a `with`, or call `close()`. Calls from several threads take turns.
    Raises ModelError, ConfigError, InvalidParameter or EngineError.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        self._start(OpenModel(make_config(model, settings)))

    @classmethod
    def load(cls, opened: OpenModel, on_progress: OnProgress | None = None) -> Self:
        """Loads the weights of a model that is already open."""
        llm = cls.__new__(cls)
        llm._start(opened, on_progress)
        return llm

    def _start(self, opened: OpenModel, on_progress: OnProgress | None = None) -> None:
        opened.begin()
        core, self.load_s = opened.start(on_progress)
        self._opened = opened
        self._client: InProcessClient | None = InProcessClient(core)
        self._lock = threading.Lock()
        self._count = 0

    @property
    def config(self) -> ResolvedConfig:
        """Every setting, and why it is so."""
        return self._opened.config

    @property
    def opened(self) -> OpenModel:
        """The model's description and tokenizer."""
        return self._opened

    @property
    def stats(self) -> SchedulerStats:
        """Iterations and tokens since the load."""
        return self._running_client().stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        images: object = None,
        adapter: str | Sequence[str] = "",
        progress: bool | None = None,
        **fields: Any,
    ) -> list[Completion]:
        """Answers one prompt or many, together, in the order given; of `n` answers to a prompt, one after the other.

        A prompt is text, a list of token ids, or a list of messages. `images`: the picture of the one prompt or a list
        of them, or for each of many prompts such a list (None: none); each `<image>` in a text is the place of one, and
        a text without any gets them first (see `ImagePrompt`). Messages hold theirs as parts. `sampling` holds for all
        prompts, or is one a prompt; its fields can be given by name instead. `adapter` names the LoRA adapter that
        answers, for all or one a prompt (empty: the model itself). What is wrong with one prompt is the `error` of its
        completion; the others are answered. `progress`: a bar on stderr (None: if that is a terminal).
        Raises InvalidParameter for wrong sampling fields, EngineError if the engine has ended.
        """
        many = cast("list[Prompt]", [prompts] if is_single(prompts) else list(cast("Sequence[Prompt]", prompts)))
        if images is not None:
            many = with_images(many, [images] if is_single(prompts) else images)
        each = sampling_for(len(many), sampling, fields)
        adapters = adapters_for(len(many), adapter)
        shown = progress if progress is not None else sys.stderr.isatty()
        answers: list[Completion] = []
        with progress_bar(sum(one.n for one in each), shown) as advance:
            for completion in self.iterate(list(zip(many, each, strict=True)), adapters):
                answers.append(completion)
                advance(completion)
        return sorted(answers, key=lambda answer: (answer.index, answer.choice))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str] = "",
        progress: bool | None = None,
        **fields: Any,
    ) -> list[Completion]:
        """Like `generate`, for one conversation or many: messages of the form {"role": …, "content": …}.

        The content is a text or a list of parts, in order: {"type": "text", "text": …}, {"type": "image", "image": …}
        with the bytes of a file, a PIL image, a uint8 array (height, width, 3) or a Path, and {"type": "image_url",
        "image_url": {"url": …}} with a data: URL, or another that the settings allow.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise InvalidParameter("messages", messages, "a list of messages, or a list of such lists")
        prompts = cast("Sequence[Prompt]", messages)
        return self.generate(prompts, sampling, adapter=adapter, progress=progress, **fields)

    def iterate(
        self, asked: Sequence[tuple[Prompt, SamplingParams]], adapters: Sequence[str] | None = None
    ) -> Iterator[Completion]:
        """Answers (prompt, sampling) pairs; yields each completion as soon as it is whole, in any order.

        `adapters`: a name for each pair, as in `generate`; None: the model itself answers all.
        """
        with self._lock:
            yield from self._iterate(asked, [""] * len(asked) if adapters is None else adapters)

    def _iterate(self, asked: Sequence[tuple[Prompt, SamplingParams]], adapters: Sequence[str]) -> Iterator[Completion]:
        client = self._running_client()
        tokenizer = self._opened.tokenizer if self._opened.has_text else None
        live: dict[str, Answer] = {}
        waiting = deque(enumerate(asked))
        held_bytes = 0
        try:
            while waiting or live:
                # Texts all come at once; of pictures, not more are in memory than the batch has use for.
                while waiting and held_bytes < MOST_PIXEL_BYTES:
                    index, (prompt, sampling) = waiting.popleft()
                    self._count += 1
                    now_s = time.monotonic()
                    try:
                        requests = self._opened.requests(f"llm-{self._count}", prompt, sampling, now_s, adapters[index])
                    except RequestError as error:
                        yield from (refused(index, error, choice) for choice in range(sampling.n))
                        continue
                    for choice, request in enumerate(requests):
                        live[request.id] = Answer(index, request, tokenizer, now_s, choice)
                        held_bytes += _pixel_bytes(request)
                        client.submit(request)
                for event in client.poll():
                    answer = live.get(event.request_id)
                    if answer is None:
                        continue
                    if isinstance(event, TokenEvent):
                        if (num_output := answer.tokens(event)) is not None:
                            client.finish(event.request_id, num_output)
                    else:
                        del live[event.request_id]
                        held_bytes -= _pixel_bytes(answer.request)
                        yield answer.end(event)
        finally:
            for request_id in live:
                client.abort(request_id)

    def _running_client(self) -> InProcessClient:
        if self._client is None:
            raise EngineError("this LLM is closed")
        return self._client

    def close(self) -> None:
        """Gives the memory back. Idempotent; later calls of other methods raise EngineError."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_config(model: str, settings: Mapping[str, Any]) -> EngineConfig:
    """EngineConfig from settings by name. Raises InvalidParameter for an unknown name."""
    known = [name for name in EngineConfig.__dataclass_fields__ if name != "model"]
    for name in settings:
        if name not in known:
            raise InvalidParameter("setting", name, ", ".join(known))
    return EngineConfig(model=model, **settings)


def make_sampling(fields: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from fields by name. Raises InvalidParameter."""
    for name in fields:
        if name not in SamplingParams.__dataclass_fields__:
            raise InvalidParameter("sampling field", name, ", ".join(SamplingParams.__dataclass_fields__))
    return SamplingParams(**fields)


def is_single(prompts: object) -> bool:
    """Whether this is one prompt: text, ids or messages, and not a list of such."""
    if isinstance(prompts, str | ImagePrompt | Encoded):
        return True
    if not isinstance(prompts, Sequence):
        raise InvalidParameter("prompts", prompts, "a prompt or a list of prompts")
    return bool(prompts) and all(isinstance(part, int | Mapping) for part in prompts)


def with_images(prompts: Sequence[Prompt], images: object) -> list[Prompt]:
    """Each prompt with its images: None, one of them, or a list."""
    if not isinstance(images, list | tuple) or len(images) != len(prompts):
        got = f"{len(images)} of them" if isinstance(images, list | tuple) else type(images).__name__
        raise InvalidParameter("images", got, f"a list of images, or None, for each of the {len(prompts)} prompts")
    found: list[Prompt] = []
    for prompt, own in zip(prompts, images, strict=True):
        if own is None:
            found.append(prompt)
            continue
        if isinstance(prompt, ImagePrompt | Encoded) or is_message_list(prompt):
            allowed = "none beside messages, which hold images as parts of their content"
            raise InvalidParameter("images", type(own).__name__, allowed)
        found.append(ImagePrompt(cast("str | Sequence[int]", prompt), own if isinstance(own, list | tuple) else [own]))
    return found


def _pixel_bytes(request: Request) -> int:
    return sum(len(image.pixels) for image in request.images)


def sampling_for(
    count: int, sampling: SamplingParams | Sequence[SamplingParams] | None, fields: Mapping[str, Any]
) -> list[SamplingParams]:
    """One SamplingParams a prompt."""
    if sampling is not None and fields:
        raise InvalidParameter("sampling", "both sampling= and " + ", ".join(fields), "one of the two")
    if sampling is None:
        return [make_sampling(fields)] * count
    if isinstance(sampling, SamplingParams):
        return [sampling] * count
    if len(sampling) != count:
        raise InvalidParameter("sampling", f"{len(sampling)} for {count} prompts", "one for all, or one a prompt")
    return list(sampling)


def adapters_for(count: int, adapter: str | Sequence[str]) -> list[str]:
    """One adapter a prompt."""
    if isinstance(adapter, str):
        return [adapter] * count
    if not isinstance(adapter, Sequence) or len(adapter) != count:
        raise InvalidParameter("adapter", adapter, f"a name for all, or one for each of the {count} prompts")
    return list(adapter)
