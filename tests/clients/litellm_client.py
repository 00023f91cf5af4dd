"""litellm, unchanged: python litellm_client.py URL"""

import asyncio
import gc
import json
import sys

import litellm
from litellm import acompletion, completion, text_completion

URL = sys.argv[1]
litellm.telemetry = False
CHAT = [{"role": "user", "content": "Name three colours."}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look at a city", "parameters": SCHEMA}}]
COMMON = {"api_base": f"{URL}/v1", "api_key": "x", "temperature": 0, "max_tokens": 12, "num_retries": 0, "timeout": 60}


def stream(name: str, **fields: object) -> list:
    """All chunks. httpx leaves a stream that is read up to `[DONE]` to the collector of garbage, and httpcore waits for
    itself forever where that comes while it holds its lock: so it comes here."""
    chunks = list(completion(f"{name}/demo", CHAT, stream=True, **fields))
    gc.collect()
    return chunks


def chat(name: str) -> None:
    whole = completion(f"{name}/demo", CHAT, **COMMON)
    assert whole.choices[0].message.content and whole.usage.completion_tokens == 12
    chunks = stream(name, stream_options={"include_usage": True}, **COMMON)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert litellm.stream_chunk_builder(chunks, CHAT).choices[0].message.content == text
    scored = completion(f"{name}/demo", CHAT, logprobs=True, top_logprobs=2, **COMMON)
    assert len(scored.choices[0].logprobs.content) == 12


def tools(name: str) -> None:
    choice = {"type": "function", "function": {"name": "look"}}
    asked = {**COMMON, "tools": TOOLS, "tool_choice": choice, "max_tokens": 60}
    whole = completion(f"{name}/demo", CHAT, **asked)
    (call,) = whole.choices[0].message.tool_calls
    assert whole.choices[0].finish_reason == "tool_calls" and call.function.name == "look"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    chunks = stream(name, **asked)
    built = litellm.stream_chunk_builder(chunks, CHAT).choices[0].message.tool_calls[0]
    assert (built.function.name, built.function.arguments) == (call.function.name, call.function.arguments)
    history = [*CHAT, whole.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert completion(f"{name}/demo", history, tools=TOOLS, tool_choice="none", **COMMON).choices[0].message.content


def response_format(name: str) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    answer = completion(f"{name}/demo", CHAT, response_format=wanted, **{**COMMON, "max_tokens": 60})
    assert sorted(json.loads(answer.choices[0].message.content)) == ["city"]


def completions(name: str) -> None:
    told = text_completion(model=f"{name}/demo", prompt="The capital of France is", **COMMON)
    assert told.choices[0].text and told.choices[0].finish_reason == "length"


def errors(name: str) -> None:
    for fields, expected in (
        ({"model": f"{name}/demo", "temperature": 9}, litellm.BadRequestError),
        ({"model": f"{name}/nope"}, litellm.NotFoundError),
        (
            {"model": f"{name}/demo", "messages": [{"role": "user", "content": "word " * 20_000}]},
            litellm.ContextWindowExceededError,
        ),
    ):
        try:
            completion(**{"messages": CHAT, **COMMON, **fields})
        except expected:
            continue
        raise AssertionError(f"{list(fields)} was taken")


async def asynchronous(name: str) -> None:
    whole = await acompletion(f"{name}/demo", CHAT, **COMMON)
    chunks = await acompletion(f"{name}/demo", CHAT, stream=True, **COMMON)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
    assert text == whole.choices[0].message.content


for name in ("openai", "hosted_vllm"):
    for check in (chat, tools, response_format):
        check(name)
        print(f"ok: {name} {check.__name__.replace('_', ' ')}")
    asyncio.run(asynchronous(name))
    print(f"ok: {name} async")
completions("text-completion-openai")
print("ok: completions")
for name in ("openai", "hosted_vllm"):
    errors(name)
    print(f"ok: {name} errors")
