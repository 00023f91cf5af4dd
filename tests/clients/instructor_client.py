"""instructor, unchanged: python instructor_client.py URL"""

import asyncio
import sys
from typing import Literal

import instructor
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

URL = f"{sys.argv[1]}/v1"
SETTINGS = {"base_url": URL, "api_key": "x", "max_retries": 0, "timeout": 60}
ASKED = {
    "model": "demo",
    "messages": [{"role": "user", "content": "It is 7 degrees in Rome."}],
    "max_tokens": 120,
    "temperature": 0,
    "max_retries": 0,
}


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Rome"]
    degrees: int = Field(ge=0, le=9)


def check(mode: instructor.Mode) -> None:
    client = instructor.from_openai(OpenAI(**SETTINGS), mode=mode)
    found, answer = client.chat.completions.create_with_completion(response_model=Weather, **ASKED)
    assert isinstance(found, Weather) and answer.usage.completion_tokens > 5
    *_, last = client.chat.completions.create_partial(response_model=Weather, **ASKED)
    assert Weather.model_validate(last.model_dump())


async def asynchronous() -> None:
    client = instructor.from_openai(AsyncOpenAI(**SETTINGS), mode=instructor.Mode.TOOLS)
    found = await asyncio.gather(*(client.chat.completions.create(response_model=Weather, **ASKED) for _ in range(2)))
    assert found[0].model_dump() == found[1].model_dump()


for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    check(mode)
    print("ok:", mode.name.lower().replace("_", " "))
asyncio.run(asynchronous())
print("ok: async")
