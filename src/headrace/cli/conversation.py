"""A conversation with a loaded model: what was said, and the next answer, step by step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.core.errors import EngineError, InvalidParameter, RequestError, TemplateError, UnsupportedParameter
from headrace.core.types import FinishReason, SamplingParams, TokenEvent
from headrace.engine.answer import Answer, Completion
from headrace.engine.images import Picture

if TYPE_CHECKING:
    from headrace.core.types import Event, Request
    from headrace.engine.core import EngineCore
    from headrace.engine.model import OpenModel
    from headrace.media.prepare import Prepared


@dataclass(frozen=True, slots=True)
class Attached:
    """A picture that goes with a message: read once, however often the conversation is told anew."""

    path: Path
    prepared: Prepared

    @property
    def part(self) -> dict[str, object]:
        return {"type": "image", "image": self.prepared}

    @property
    def saved(self) -> dict[str, object]:
        """The part in a file of messages."""
        return {"type": "image_url", "image_url": {"url": self.path.resolve().as_uri()}}


def attach(opened: OpenModel, name: str, field: str) -> Attached:
    """Reads a picture. Raises RequestError, which calls it `field`, also where the model reads none."""
    if opened.images is None:
        raise UnsupportedParameter(field, name, "none, since this model reads no images")
    path = Path(name).expanduser()
    return Attached(path, opened.images.prepare_one(Picture(path, field)))


@dataclass(frozen=True, slots=True)
class Turn:
    """A message and the answer to it."""

    user: str
    completion: Completion
    images: tuple[Attached, ...] = ()
    """They stand before the message's text."""

    @property
    def stopped(self) -> bool:
        """Whether the user ended the answer."""
        return self.completion.finish_reason == FinishReason.ABORT

    @property
    def num_tokens(self) -> int:
        """Of the whole conversation up to and with this answer."""
        return len(self.completion.prompt_token_ids) + len(self.completion.token_ids)


def check_can_talk(opened: OpenModel, system: str | None) -> None:
    """Raises RequestError, before any weight is read, unless the model has a template that takes a conversation."""
    if not opened.has_text:
        raise RequestError("this model has no tokenizer, so it cannot chat: headrace generate takes token ids")
    if opened.tokenizer.chat_template is None:
        raise TemplateError("this model has no chat template, so it cannot chat: headrace generate continues text")
    if len(opened.adapters) > 1:
        raise InvalidParameter("adapters", ", ".join(opened.adapters), "one, which answers throughout")
    check_system(opened, system)


def check_system(opened: OpenModel, system: str | None) -> None:
    """Raises RequestError unless the model's template takes this system message."""
    opened.encode(messages_of(system, [], "Hi"))


def messages_of(
    system: str | None, turns: list[Turn], user: str | None, images: Sequence[Attached] = (), to_save: bool = False
) -> list[dict[str, object]]:
    """`user` and `images`: the message that is to be answered. `to_save`: pictures by their addresses."""
    messages: list[dict[str, object]] = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages.append({"role": "user", "content": _content(turn.user, turn.images, to_save)})
        messages.append({"role": "assistant", "content": turn.completion.text})
    if user is not None:
        messages.append({"role": "user", "content": _content(user, images, to_save)})
    return messages


def _content(text: str, images: Sequence[Attached], to_save: bool) -> object:
    if not images:
        return text
    return [*(one.saved if to_save else one.part for one in images), {"type": "text", "text": text}]


class Conversation:
    """Every turn goes through the model's chat template; the prefix cache holds what was computed before."""

    def __init__(self, opened: OpenModel, core: EngineCore, sampling: SamplingParams, system: str | None) -> None:
        self.opened = opened
        self.core = core
        self.sampling = sampling
        self.system = system
        self.turns: list[Turn] = []
        self._asked = 0

    @property
    def num_tokens(self) -> int:
        """Tokens in the context after the last answer."""
        return self.turns[-1].num_tokens if self.turns else 0

    def set_system(self, system: str | None) -> None:
        """Holds from the next answer on. Raises RequestError where the template takes none."""
        check_system(self.opened, system)
        self.system = system

    def set_sampling(self, name: str, value: Any) -> None:
        """Raises InvalidParameter."""
        self.sampling = replace(self.sampling, **{name: value})

    def ask(
        self,
        user: str,
        show: Callable[[str], None],
        stopping: Callable[[], bool],
        images: tuple[Attached, ...] = (),
    ) -> Turn | None:
        """Answers a message, its pictures before it. `show` gets the text as it comes; once `stopping` says so, the
        answer ends within a step.

        The turn is kept, with what was said so far if it was stopped; None: it was stopped before a word was said,
        and is forgotten. Raises RequestError or EngineError; then nothing has changed.
        """
        self._asked += 1
        now_s = time.monotonic()
        messages = messages_of(self.system, self.turns, user, images)
        adapter = next(iter(self.opened.adapters), "")
        request = self.opened.request(f"chat-{self._asked}", messages, self.sampling, now_s, adapter)
        completion = self._answer(request, Answer(0, request, self.opened.tokenizer, now_s), show, stopping)
        if completion.error is not None:
            raise self.core.error or EngineError(completion.error.message)
        turn = Turn(user, completion, images)
        if turn.stopped and not completion.text:
            return None
        self.turns.append(turn)
        return turn

    def retry(self, show: Callable[[str], None], stopping: Callable[[], bool]) -> Turn | None:
        """Answers the last message again. Where no new answer comes about, the old one stays. Raises as `ask`."""
        if not self.turns:
            raise RequestError("there is nothing to answer again")
        old = self.turns.pop()
        turn = None
        try:
            turn = self.ask(old.user, show, stopping, old.images)
        finally:
            if turn is None:
                self.turns.append(old)
        return turn

    def undo(self) -> Turn:
        """Takes the last turn back. Raises RequestError if there is none."""
        if not self.turns:
            raise RequestError("there is nothing to take back")
        return self.turns.pop()

    def _answer(
        self, request: Request, answer: Answer, show: Callable[[str], None], stopping: Callable[[], bool]
    ) -> Completion:
        """Steps the engine itself: a client's poll would go on through a long prompt without asking `stopping`."""
        self.core.submit(request)
        try:
            while self.core.has_work:
                for event in self.core.step():
                    completion = self._take(event, request, answer)
                    if text := answer.take_text():
                        show(text)
                    if completion is not None:
                        return completion
                if stopping():
                    self.core.abort(request.id)
                elif delay_s := self.core.sleep_s():
                    time.sleep(delay_s)
        finally:
            self.core.abort(request.id)
        raise self.core.error or EngineError("the engine ended without an answer")

    def _take(self, event: Event, request: Request, answer: Answer) -> Completion | None:
        if event.request_id != request.id:
            return None
        if not isinstance(event, TokenEvent):
            return answer.end(event)
        if (num_output := answer.tokens(event)) is not None:
            self.core.finish(request.id, num_output)
        return None


def parse_setting(name: str, text: str) -> Any:
    """A sampling field's value as a user types it: JSON; for texts, also the text itself. Checked by SamplingParams."""
    kind = str(SamplingParams.__dataclass_fields__[name].type)
    if text.lower() == "none" and "None" in kind:
        return None
    if "str" in kind and not text.startswith(("[", "{", '"')):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
