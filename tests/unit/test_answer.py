"""Which tokens an answer's text has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from headrace.core.types import FinishEvent, FinishReason, Request, SamplingParams, TokenEvent
from headrace.engine.answer import Answer
from headrace.testing.checkpoints import tiny_checkpoint
from headrace.text.tokenizer import Tokenizer, load_tokenizer
from headrace.weights.checkpoint import open_checkpoint
from tests.unit.batch_cases import write_tokenizer

EOS, USER = 2, 3
A, B, C = 70, 71, 72


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(folder, vocab_size=write_tokenizer(folder), eos_token_id=EOS)
    found = load_tokenizer(open_checkpoint(folder))
    assert found.decode([A, B, C, EOS, USER], skip_special_tokens=False) == "abc</s><|user|>"
    return found


def told(tokenizer: Tokenizer, ids: Sequence[int], reason: FinishReason = FinishReason.STOP, **sampling: Any) -> str:
    """The text; token by token and all at once it is the same."""
    texts = []
    for cuts in (range(1, len(ids) + 1), [len(ids)]):
        answer = Answer(0, Request("r", (A,), SamplingParams(**sampling)), tokenizer, 0.0)
        start, shown = 0, ""
        for end in cuts:
            answer.tokens(TokenEvent("r", tuple(ids[start:end]), (), 1.0))
            shown += answer.take_text()
            start = end
        completion = answer.end(FinishEvent("r", reason, 1, len(ids), 0, 2.0))
        assert completion.text == shown + answer.take_text()
        assert completion.token_ids == tuple(ids)
        texts.append(completion.text)
    assert texts[0] == texts[1]
    return texts[0]


def test_the_token_that_ends_an_answer_is_not_in_its_text(tokenizer: Tokenizer) -> None:
    assert told(tokenizer, [A, B, C], stop_token_ids=[C]) == "ab"
    assert told(tokenizer, [C], stop_token_ids=[C]) == ""
    assert told(tokenizer, [A, EOS], skip_special_tokens=False) == "a"
    assert told(tokenizer, [A, B, C], stop_token_ids=[C], stop=["x"]) == "ab"
    # A stop string that the silent token would complete is not complete.
    assert told(tokenizer, [A, B, C], stop_token_ids=[C], stop=["bc"]) == "ab"


def test_unless_it_was_asked_for(tokenizer: Tokenizer) -> None:
    kept = {"include_stop_str_in_output": True}
    assert told(tokenizer, [A, B, C], stop_token_ids=[C], **kept) == "abc"
    assert told(tokenizer, [A, EOS], skip_special_tokens=False, **kept) == "a</s>"
    assert told(tokenizer, [A, EOS], **kept) == "a"


def test_other_special_tokens_and_an_ignored_end_are_text(tokenizer: Tokenizer) -> None:
    assert told(tokenizer, [USER, A, EOS], skip_special_tokens=False) == "<|user|>a"
    ids = [A, EOS, B]
    assert told(tokenizer, ids, FinishReason.LENGTH, ignore_eos=True, skip_special_tokens=False) == "a</s>b"
