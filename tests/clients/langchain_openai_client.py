"""langchain-openai, unchanged: python langchain_openai_client.py URL"""

import asyncio
import sys
from typing import Literal

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

URL = f"{sys.argv[1]}/v1"
model = ChatOpenAI(base_url=URL, api_key="x", model="demo", temperature=0, max_retries=0, timeout=60, max_tokens=12)
longer = ChatOpenAI(base_url=URL, api_key="x", model="demo", temperature=0, max_retries=0, timeout=60, max_tokens=80)


class Place(BaseModel):
    """A place."""

    city: Literal["Oslo", "Rome"]
    warm: bool


@tool
def look(city: Literal["Oslo", "Rome"]) -> str:
    """Looks at a city."""
    return city


def invoke() -> None:
    answer = model.invoke([("system", "Be brief."), ("human", "Name three colours.")])
    assert answer.content and answer.usage_metadata["output_tokens"] == 12
    assert answer.response_metadata["finish_reason"] == "length"
    assert len(model.batch(["One", "Two", "Three"])) == 3
    scored = model.bind(logprobs=True, top_logprobs=2).invoke("Hello")
    assert len(scored.response_metadata["logprobs"]["content"]) == scored.usage_metadata["output_tokens"]


def stream() -> None:
    chunks = list(model.stream("Name three colours.", stream_usage=True))
    joined = sum(chunks[1:], chunks[0])
    assert joined.content == model.invoke("Name three colours.").content
    assert joined.usage_metadata["output_tokens"] == 12


def tools() -> None:
    answer = longer.bind_tools([look], tool_choice="look").invoke("Look at Rome.")
    (call,) = answer.tool_calls
    assert call["name"] == "look" and call["args"]["city"] in ("Oslo", "Rome")
    chunks = list(longer.bind_tools([look], tool_choice="any", parallel_tool_calls=False).stream("Look at Rome."))
    assert sum(chunks[1:], chunks[0]).tool_calls[0]["name"] == "look"
    history = [HumanMessage("Look at Rome."), answer, ToolMessage("sunny", tool_call_id=call["id"])]
    assert isinstance(model.bind_tools([look], tool_choice="none").invoke(history), AIMessage)


def structured() -> None:
    for method in ("json_schema", "function_calling"):
        found = longer.with_structured_output(Place, method=method).invoke("Rome is warm.")
        assert isinstance(found, Place)


def completions() -> None:
    llm = OpenAI(base_url=URL, api_key="x", model="demo", temperature=0, max_tokens=8, max_retries=0)
    assert llm.invoke("The capital of France is") == "".join(llm.stream("The capital of France is"))


async def asynchronous() -> None:
    answer, *others = await asyncio.gather(*(model.ainvoke("Name three colours.") for _ in range(3)))
    assert all(other.content == answer.content for other in others)
    assert "".join([chunk.content async for chunk in model.astream("Name three colours.")]) == answer.content


for check in (invoke, stream, tools, structured, completions):
    check()
    print("ok:", check.__name__)
asyncio.run(asynchronous())
print("ok: async")
