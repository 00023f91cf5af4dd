"""A stream, put together again, is the whole answer: a few bodies here, many with `tests.robustness.stream_equals`."""

from __future__ import annotations

import pytest

from tests.robustness.stream_equals import compare_many, put_together


def test_streams_equal_whole_answers(server_url: str) -> None:
    found = compare_many(server_url, 25, seed=2)
    assert [(one.difference, one.body) for one in found if one.difference] == []
    assert any(one.calls for one in found) and any("logprobs" in one.kind for one in found)


@pytest.mark.parametrize(
    "stream", ["data: {}\n\n", "data: [DONE]\n\ndata: {}\n\n", 'data: {"error": {}}\n\ndata: [DONE]\n\n'], ids=range(3)
)
def test_a_broken_stream_is_noticed(stream: str) -> None:
    with pytest.raises(ValueError):
        put_together(stream.encode())
