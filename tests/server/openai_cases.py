"""What the tests of openai-python ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from openai import OpenAI
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel, Field

MODEL = "demo"
COLOURS: Any = [{"role": "user", "content": "Name three colours."}]
WEATHER: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Oslo", "Rome"]},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
PLAIN: Mapping[str, Any] = {"model": MODEL, "messages": COLOURS, "max_tokens": 12, "temperature": 0}
SETTINGS: Mapping[str, Any] = {"max_retries": 0, "timeout": 60}


class Weather(BaseModel):
    city: Literal["Oslo", "Rome"]
    degrees: int = Field(ge=0, le=9)
    sunny: bool


def strict_client(url: str) -> OpenAI:
    """Refuses an answer that its types do not allow. Never asks twice."""
    return OpenAI(base_url=f"{url}/v1", api_key="x", _strict_response_validation=True, **SETTINGS)


def joined(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    """The text of a choice, of a stream that is well formed."""
    mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert [choice.delta.role for choice in mine] == ["assistant"] + [None] * (len(mine) - 1)
    assert [choice.finish_reason is None for choice in mine] == [True] * (len(mine) - 1) + [False]
    return "".join(choice.delta.content or "" for choice in mine)
