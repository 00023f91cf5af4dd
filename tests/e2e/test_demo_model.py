"""The demo model against transformers: the same tokens, alone and all at once, under every policy."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from headrace import LLM, Completion, SamplingParams

NUM_TOKENS = 64
WHOLE, START = 5, 16
"""Alone, every so manieth prompt has its whole answer; the others have so many tokens."""
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Once upon a time, in a village by the sea, there lived",
    "Water boils at 100 degrees Celsius because",
    "Q: What is the largest planet of the solar system?\nA:",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "Ein Satz auf Deutsch: Der schnelle braune Fuchs",
    "日本の首都は",
    "La tour Eiffel se trouve à",
    "{\"name\": \"Ada\", \"born\": 18",
    "#include <stdio.h>\n\nint main(void) {\n",
    "SELECT name, COUNT(*) FROM users WHERE",
    "x",
    "   leading spaces and\ttabs\n\n\nand blank lines",
    "The following is a list of fruits: apple, banana, cherry, apple, banana, cherry,",
    "Dear Sir or Madam,\n\nI am writing to",
    "🙂🙃🙂🙃 means",
    "In mathematics, a prime number is a natural number greater than 1 that " * 6,
    "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def llm(demo_path: Path) -> LLM:
    with LLM("demo", backend="native", dtype="float32", threads=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def together(llm: LLM) -> list[Completion]:
    """All prompts at once, before anything is cached."""
    return llm.generate(PROMPTS, max_tokens=NUM_TOKENS)


@contextmanager
def one_thread() -> Iterator[None]:
    """Of torch's: on a busy machine two take ten times as long as one for so short a pass."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def greedy(model: PreTrainedModel, prompt: Sequence[int], draft: Sequence[int], most: int) -> list[int]:
    """The likeliest token after the prompt, the likeliest after both, and so on: every one is the model's own choice.

    `draft`: a guess at the answer. One pass computes the choice after each of its tokens, and those up to the first
    that is not as guessed stand after the model's own answer. So a wrong guess costs a pass, and changes nothing.
    """
    ends = model.generation_config.eos_token_id
    answer: list[int] = []
    while len(answer) < most and (not answer or answer[-1] != ends):
        guessed = draft[len(answer) :]
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer, *guessed]])).logits[0, -len(guessed) - 1 :]
        for choice, guess in zip_longest(logits.argmax(-1).tolist(), guessed):
            answer.append(choice)
            if choice != guess or choice == ends:
                break
    return answer[:most]


@pytest.fixture(scope="module")
def reference(demo_path: Path) -> PreTrainedModel:
    """transformers' model of the dequantised weights in fp32."""
    return AutoModelForCausalLM.from_pretrained(
        demo_path.parent, gguf_file=demo_path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def expected(reference: PreTrainedModel, llm: LLM, together: list[Completion]) -> list[list[int]]:
    """What transformers generates greedily, one prompt at a time. Our own answers are the guesses: see `greedy`."""
    asked = zip(PROMPTS, together, strict=True)
    with one_thread():
        return [greedy(reference, llm.opened.encode(prompt), one.token_ids, NUM_TOKENS) for prompt, one in asked]


def test_the_expected_is_what_generate_says(reference: PreTrainedModel, llm: LLM, expected: list[list[int]]) -> None:
    ids = torch.tensor([llm.opened.encode(PROMPTS[0])])
    with one_thread():
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        answer = out[0, ids.shape[1] :].tolist()
        wrong = [*answer[:1], *(token + 1 for token in answer[1:])]
        assert greedy(reference, ids[0].tolist(), wrong, 8) == answer, "whatever the guess"
    assert expected[0][:8] == answer


def test_prompts_all_at_once_as_transformers(together: list[Completion], expected: list[list[int]]) -> None:
    assert [list(one.token_ids) for one in together] == expected


def test_the_torch_backend_too(demo_path: Path, expected: list[list[int]]) -> None:
    with LLM("demo", backend="torch", threads=2) as llm:
        completions = llm.generate(PROMPTS, max_tokens=NUM_TOKENS)
    assert [list(c.token_ids) for c in completions] == expected


def test_prompts_one_by_one_as_transformers(llm: LLM, expected: list[list[int]]) -> None:
    for index, (prompt, tokens) in enumerate(zip(PROMPTS, expected, strict=True)):
        most = START if index % WHOLE else NUM_TOKENS
        assert list(llm.generate(prompt, max_tokens=most)[0].token_ids) == tokens[:most], prompt


def test_policies_agree_and_compute_each_token_once(demo_path: Path) -> None:
    draw = random.Random(5)
    prompts = [[draw.randrange(1000, 40_000) for _ in range(draw.randint(2, 40))] for _ in range(50)]
    sampling = [SamplingParams(max_tokens=draw.randint(1, 10), ignore_eos=True) for _ in prompts]
    needed = sum(len(p) + (s.max_tokens or 0) - 1 for p, s in zip(prompts, sampling, strict=True))
    outputs, iterations = {}, {}
    for policy in ("fused", "serial", "static:8", "window:20"):
        with LLM("demo", threads=2, policy=policy) as llm:
            outputs[policy] = [c.token_ids for c in llm.generate(prompts, sampling)]
            assert llm.stats.computed_tokens == needed and llm.stats.preemptions == 0
            iterations[policy] = llm.stats.iterations
    assert all(tokens == outputs["serial"] for tokens in outputs.values())
    assert iterations["fused"] == min(iterations.values()) < iterations["static:8"] < iterations["serial"], iterations


def test_a_small_cache_preempts_and_changes_nothing(llm: LLM) -> None:
    draw = random.Random(6)
    prompts = [[draw.randrange(1000, 40_000) for _ in range(30)] for _ in range(8)]
    plain = [c.token_ids for c in llm.generate(prompts, max_tokens=40, ignore_eos=True)]
    with LLM("demo", dtype="float32", threads=2, max_model_len=80, kv_cache_mib=14) as small:
        assert [c.token_ids for c in small.generate(prompts, max_tokens=40, ignore_eos=True)] == plain
        assert small.stats.preemptions > 0
    again = llm.generate(prompts, max_tokens=40, ignore_eos=True)
    assert [c.token_ids for c in again] == plain and all(c.cached_tokens == 16 for c in again)


def test_stop_strings_end_the_answer_without_them(llm: LLM) -> None:
    plain = llm.generate("1, 2, 3, 4,", max_tokens=30)[0]
    stopped = llm.generate("1, 2, 3, 4,", max_tokens=30, stop=[", 7"])[0]
    assert ", 7" in plain.text and stopped.text == plain.text.split(", 7")[0]
    assert stopped.finish_reason == "stop" and len(stopped.token_ids) < len(plain.token_ids)
    assert stopped.token_ids == plain.token_ids[: len(stopped.token_ids)]
    # The last token that is allowed completes the stop string: it is what ended the answer.
    last = llm.generate("1, 2, 3, 4,", max_tokens=len(stopped.token_ids), stop=[", 7"])[0]
    assert (last.finish_reason, last.text) == ("stop", stopped.text)


def test_sampling_is_repeatable_and_independent_of_company(llm: LLM) -> None:
    fields = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "max_tokens": 24, "logprobs": 3}
    alone = llm.generate("Once upon a time", seed=11, **fields)[0]
    company = llm.generate(["Once upon a time", *PROMPTS[:9]], seed=11, **fields)
    other = llm.generate("Once upon a time", seed=12, **fields)[0]
    assert company[0].token_ids == alone.token_ids and company[0].logprobs == alone.logprobs
    assert other.token_ids != alone.token_ids
    drawn = llm.generate("Once upon a time", **fields)[0]
    assert drawn.seed is not None
    assert llm.generate("Once upon a time", seed=drawn.seed, **fields)[0].token_ids == drawn.token_ids
    assert all(entry.logprob <= entry.top[0][1] and len(entry.top) == 3 for entry in alone.logprobs or ())


def test_chat_ends_by_itself_and_one_bad_conversation_fails_alone(llm: LLM) -> None:
    good = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    answers = llm.chat([good, [{"role": "user", "content": 5}], good], max_tokens=60)
    assert answers[0].finish_reason == "stop" and "Paris" in answers[0].text and "<|" not in answers[0].text
    assert answers[1].error is not None and answers[1].error.code == "invalid_parameter"
    assert answers[2].token_ids == answers[0].token_ids


def test_the_command_prints_one_object_a_request_in_order(tmp_path: Path, llm: LLM) -> None:
    lines = [
        {"prompt": "The capital of France is", "max_tokens": 5},
        {"prompt_token_ids": [], "max_tokens": 5},
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stop": ["zzz"]},
        {"prompt_token_ids": [504, 3575], "temperature": 0.5, "seed": 3},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    command = [
        sys.executable,
        "-m",
        "headrace.cli.main",
        "generate",
        "demo",
        "--prompt",
        "x",
        "--prompt-file",
        str(path),
    ]
    command += ["--json", "--stats", "--max-tokens", "7", "--ignore-eos", "--threads", "2", "--policy", "static:2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    *records, stats = (json.loads(line) for line in run.stdout.splitlines())
    assert run.returncode == 1 and "no tokens" in run.stderr
    assert [r["index"] for r in records] == [0, 1, 2, 3, 4]
    assert [len(r["token_ids"]) for r in records] == [7, 5, 0, 4, 7]
    assert [r["finish_reason"] for r in records] == ["length", "length", None, "length", "length"]
    assert records[2]["error"]["code"] == "empty_prompt"
    keys = {"index", "prompt_token_ids", "token_ids", "text", "finish_reason", "ttft_s", "decode_tokens_per_s", "error"}
    assert all(keys <= r.keys() for r in records)
    assert records[1]["token_ids"] == list(llm.generate("The capital of France is", max_tokens=5)[0].token_ids)
    assert set(stats["stats"]) == {
        "load_s", "wall_s", "prompt_tokens", "output_tokens", "iterations", "computed_tokens", "cached_tokens",
        "preemptions", "peak_rss_bytes", "backend",
    }  # fmt: skip
    assert stats["stats"]["output_tokens"] == 23 and stats["stats"]["backend"] == "native"
    prompts = sum(len(r["prompt_token_ids"]) for r in records)
    assert stats["stats"]["computed_tokens"] == prompts + 23 - 4


def test_an_answer_that_the_pipe_cannot_spell_is_printed_all_the_same(demo_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "headrace.cli.main",
        "generate",
        "demo",
        "--prompt",
        "日本の首都は",
        "--max-tokens",
        "8",
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0 and run.stdout.strip() and run.stderr == ""


def test_closing_gives_everything_back(demo_path: Path) -> None:
    from headrace.core.errors import EngineError

    llm = LLM("demo", max_model_len=256)
    llm.generate("x", max_tokens=2)
    llm.close()
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.generate("x")


def test_a_model_without_tokenizer_takes_and_gives_ids(tmp_path: Path) -> None:
    """As transformers saves it: no tokenizer.json. Ids in, ids out; what needs text is refused, request by request."""
    from headrace.testing.checkpoints import tiny_checkpoint

    path = tmp_path / "tiny"
    tiny_checkpoint(path, "qwen2", seed=3)
    with LLM(str(path), max_model_len=64) as llm:
        ids, text, stop = (
            llm.generate([[1, 2, 3]], max_tokens=5, ignore_eos=True)[0],
            llm.generate("hello", max_tokens=5)[0],
            llm.generate([[1, 2, 3]], max_tokens=5, stop="x")[0],
        )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert list(ids.token_ids) == out[0, 3:].tolist() and ids.text == "" and ids.error is None
    assert text.error is not None and "no tokenizer" in text.error.message
    assert stop.error is not None and stop.error.code == "invalid_parameter"
