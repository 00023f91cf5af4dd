"""langchain-huggingface, unchanged: python langchain_huggingface_client.py URL"""

import asyncio
import sys

from langchain_huggingface import HuggingFaceEndpoint

URL = sys.argv[1]
PROMPT = "The capital of France is"
llm = HuggingFaceEndpoint(endpoint_url=URL, max_new_tokens=8, timeout=60, seed=7, huggingfacehub_api_token="x")


def invoke() -> None:
    first, again = llm.invoke(PROMPT), llm.invoke(PROMPT)
    assert first and first == again
    assert llm.invoke(PROMPT, stop_sequences=[first[3:6]]).startswith(first[:3])


def stream() -> None:
    assert "".join(llm.stream(PROMPT)).endswith(llm.invoke(PROMPT).removeprefix(PROMPT))


async def asynchronous() -> None:
    assert await llm.ainvoke(PROMPT) == llm.invoke(PROMPT)


for check in (invoke, stream):
    check()
    print("ok:", check.__name__)
asyncio.run(asynchronous())
print("ok: async")
