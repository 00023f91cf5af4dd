"""text-generation 0.7, unchanged: python text_generation_client.py URL"""

import asyncio
import sys

from text_generation import AsyncClient, Client
from text_generation.errors import BadRequestError, ValidationError
from text_generation.types import Grammar, GrammarType

URL = sys.argv[1]
PROMPT = "The capital of France is"
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
client = Client(URL, timeout=60)


def generate() -> None:
    whole = client.generate(PROMPT, max_new_tokens=8, decoder_input_details=True, top_n_tokens=2)
    assert whole.details.generated_tokens == 8 and whole.details.finish_reason == "length"
    assert "".join(token.text for token in whole.details.tokens) == whole.generated_text
    assert len(whole.details.prefill) == 5 and [len(top) for top in whole.details.top_tokens] == [2] * 8
    sampled = client.generate(PROMPT, max_new_tokens=4, do_sample=True, temperature=0.8, top_k=20, top_p=0.9, seed=3)
    assert sampled.details.seed == 3
    best = client.generate(PROMPT, max_new_tokens=4, do_sample=True, best_of=2, stop_sequences=["never said"])
    assert len(best.details.best_of_sequences) == 1


def generate_stream() -> None:
    whole = client.generate(PROMPT, max_new_tokens=8)
    told = list(client.generate_stream(PROMPT, max_new_tokens=8, top_n_tokens=1))
    assert "".join(one.token.text for one in told) == told[-1].generated_text == whole.generated_text
    assert told[-1].details.finish_reason == "length" and told[-1].details.generated_tokens == 8


def grammar() -> None:
    found = client.generate(PROMPT, max_new_tokens=40, grammar=Grammar(type=GrammarType.Json, value=SCHEMA))
    assert "Oslo" in found.generated_text or "Rome" in found.generated_text


def chat() -> None:
    answer = client.chat([{"role": "user", "content": "Say hello."}], max_tokens=6, temperature=0.5, seed=1)
    assert answer.choices[0].message.content and answer.usage["completion_tokens"] <= 6
    function = {"name": "look", "description": "Look at a city", "parameters": SCHEMA}
    tools = [{"type": "function", "function": function}]
    called = client.chat([{"role": "user", "content": "Rome?"}], tools=tools, tool_choice="required", max_tokens=60)
    assert called.choices[0].message.tool_calls[0]["function"]["name"] == "look"


def errors() -> None:
    # What the client lets through of what a server refuses.
    for stream in (False, True):
        try:
            ask = client.generate_stream if stream else client.generate
            list(ask("word " * 20_000, max_new_tokens=5))
        except ValidationError as error:
            assert "Input validation error" in str(error)
        else:
            raise AssertionError("a prompt of 20,000 words was taken")
    try:
        client.chat([{"role": "user", "content": "a"}], temperature=9.0)
    except BadRequestError as error:
        assert "temperature" in str(error)
    else:
        raise AssertionError("a temperature of 9 was taken")


async def asynchronous() -> None:
    own = AsyncClient(URL, timeout=60)
    whole = await own.generate(PROMPT, max_new_tokens=4)
    told = [one async for one in own.generate_stream(PROMPT, max_new_tokens=4)]
    assert told[-1].generated_text == whole.generated_text == client.generate(PROMPT, max_new_tokens=4).generated_text
    assert (await own.chat([{"role": "user", "content": "Hello"}], max_tokens=4)).choices[0].message.content


for check in (generate, generate_stream, grammar, chat, errors):
    check()
    print("ok:", check.__name__.replace("_", " "))
asyncio.run(asynchronous())
print("ok: async")
