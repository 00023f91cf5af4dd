"""Templates as models publish them, with random conversations: the text of transformers' apply_chat_template, or its
refusal."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models

from headrace.core.errors import TemplateError
from headrace.text.chat import ChatTemplate
from headrace.text.template_worker import TemplateRenderer
from tests.unit.published_templates import PUBLISHED
from tests.unit.tokenizer_cases import tricky_strings

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    renderer.close()


def make_conversations(count: int) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    rng = random.Random(11)
    texts = [
        *tricky_strings(200, seed=4)[10:],
        "",
        "  x \n",
        "<think>\na\n</think>\n\nb",
        "a</think>b",
        "{{ 1 }}",
        "{% x %}",
    ]

    def text() -> str:
        return rng.choice(texts)

    def call() -> dict[str, Any]:
        arguments = {"x": text(), "n": rng.randint(-9, 9), "deep": {"é": [1, 2.5, None, True]}}
        return {"id": "abcdef123", "type": "function", "function": {"name": "get", "arguments": arguments}}

    for _ in range(count):
        messages: list[dict[str, Any]] = []
        if rng.random() < 0.5:
            messages.append({"role": "system", "content": text()})
        for _ in range(rng.randint(1, 4)):
            messages.append({"role": "user", "content": text()})
            if rng.random() < 0.2:
                calls = [call() for _ in range(rng.choice([1, 1, 2]))]
                messages.append({"role": "assistant", "content": rng.choice(["", "calling"]), "tool_calls": calls})
                messages += [{"role": "tool", "content": text(), "name": "get"} for _ in calls]
            if rng.random() < 0.7:
                messages.append({"role": "assistant", "content": text()})
                if rng.random() < 0.3:
                    messages[-1][rng.choice(["reasoning_content", "reasoning", "thinking"])] = text()
        if rng.random() < 0.1:
            messages.append({"role": "user", "content": "twice"})
        function = {"name": "get", "description": text(), "parameters": {"type": "object", "properties": {"é": {}}}}
        arguments: dict[str, Any] = {
            "add_generation_prompt": rng.random() < 0.5,
            "tools": [{"type": "function", "function": function}] * rng.randint(1, 2) if rng.random() < 0.4 else None,
        }
        if rng.random() < 0.3:
            arguments["enable_thinking"] = rng.random() < 0.5
        if rng.random() < 0.2:
            arguments["builtin_tools"] = ["search", "code_interpreter"]
        if rng.random() < 0.2:
            arguments["thinking_budget"] = {"b": 1, "a": ["é"]}
        yield messages, arguments


@pytest.fixture(scope="module")
def conversations() -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    return list(make_conversations(120))


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import PreTrainedTokenizerFast

    raw = RawTokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)


@pytest.mark.parametrize("name", PUBLISHED)
def test_random_conversations(reference: Any, renderer: TemplateRenderer, conversations: Any, name: str) -> None:
    source = PUBLISHED[name]
    template = ChatTemplate(source, SPECIAL, renderer)
    rendered = 0
    for messages, arguments in conversations:
        try:
            theirs = reference.apply_chat_template(messages, chat_template=source, tokenize=False, **arguments)
        except Exception as error:
            with pytest.raises(TemplateError) as caught:
                template.render(messages, **arguments)
            assert " ".join(str(error).split())[:100] in str(caught.value)
        else:
            rendered += 1
            assert template.render(messages, **arguments) == theirs
    assert rendered > 20
