"""The calls of NVLM-D's and InternVL's own code, on tiny models: the same answers as transformers, batched or not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace.core.errors import CodedError, HeadraceError, InvalidParameter, UnsupportedParameter
from headrace.engine.hf_model import ChatModel
from headrace.engine.images import Encoded
from headrace.testing.checkpoints import tiny_checkpoint
from headrace.testing.tiny_tokenizer import write_tiny_tokenizer
from headrace.testing.vision_checkpoints import tiny_vision_checkpoint, tiny_vision_model, token_ids

GREEDY = {"max_new_tokens": 12, "do_sample": False}
SETTINGS: dict[str, Any] = {"threads": 1, "kv_cache_mib": 16, "max_num_seqs": 8, "max_num_batched_tokens": 64}
SIDE = 28
ROWS = 4
"""Placeholders a tile."""
NVLM_SYSTEM = "Follow the user's instruction and answer questions."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision_checkpoint(tmp_path_factory.mktemp("study") / "nvlm", "nvlm", chat_template=False)


@pytest.fixture(scope="module")
def nvlm(folder: Path) -> Iterator[ChatModel]:
    with ChatModel.from_pretrained(folder, torch_dtype=torch.float32, **SETTINGS) as model:
        yield model.eval()


@pytest.fixture(scope="module")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatModel]:
    path = tiny_vision_checkpoint(tmp_path_factory.mktemp("study") / "internvl", "internvl_chat")
    with ChatModel.from_pretrained(str(path), **SETTINGS) as model:
        yield model


@pytest.fixture(scope="module")
def theirs() -> Any:
    return tiny_vision_model("nvlm")


def pixels(tiles: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tiles, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def reference(model: Any, encoded: Encoded, tiles: torch.Tensor | None, length: int = 12) -> list[int]:
    """What transformers generates for one prompt, alone."""
    found = model.generate(
        input_ids=torch.tensor([encoded.token_ids]),
        attention_mask=torch.ones(1, len(encoded.token_ids), dtype=torch.long),
        **({} if tiles is None else {"pixel_values": tiles}),
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=token_ids("nvlm")["<|im_end|>"],
    )
    return list(found[0, len(encoded.token_ids) :].tolist())


def nvlm_image(tiles: int) -> str:
    tags = [*(f"<tile_{index}>" for index in range(1, tiles)), "<tile_global_thumbnail>"]
    return "<Image>" + "".join(tag + "<|vision_pad|>" * ROWS for tag in tags) + "</Image>"


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("tiles", [1, 3, 7])
def test_the_prompt_of_one_image(nvlm: ChatModel, tiles: int) -> None:
    asked = nvlm._ask(pixels(tiles).numpy(), "What is it?", None, None)
    head = f"<|im_start|>system\n{NVLM_SYSTEM}<|im_end|>\n<|im_start|>user\n"
    tail = "\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert asked.question == "<image>\nWhat is it?" and asked.text == f"{head}<image>{tail}"
    tokenizer = nvlm.llm.opened.tokenizer
    assert list(asked.encoded.token_ids) == tokenizer.encode(f"{head}{nvlm_image(tiles)}{tail}", False)
    assert [image.tiles for image in asked.encoded.images] == [tiles]
    named = nvlm._ask(pixels(tiles).numpy(), "<image>\nWhat is it?", None, [tiles])
    assert named.encoded == asked.encoded


def test_the_prompt_of_a_conversation(internvl: ChatModel) -> None:
    history = [("<image> or\n<image>?", "The <image> one."), ("Why?", "So.")]
    asked = internvl._ask(pixels(4).numpy(), "And <image>?", history, [1, 1, 2])
    image = "<img>" + "<IMG_CONTEXT>" * ROWS + "</img>"
    text = (
        f"<|im_start|>user\n{image} or\n{image}?<|im_end|>\n<|im_start|>assistant\nThe <image> one.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
        f"<|im_start|>user\nAnd <img>{'<IMG_CONTEXT>' * 2 * ROWS}</img>?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert list(asked.encoded.token_ids) == internvl.llm.opened.tokenizer.encode(text, False)
    assert [one.tiles for one in asked.encoded.images] == [1, 1, 2] and asked.question == "And <image>?"
    # With a history nothing is put before the question.
    with pytest.raises(InvalidParameter, match=r"num_patches_list: got '1 images', allowed: 0, one for each <image>"):
        internvl._ask(pixels(1).numpy(), "And?", [("Why?", "So.")], None)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("tiles", [0, 1, 3])
def test_answers_are_those_of_transformers(nvlm: ChatModel, theirs: Any, tiles: int) -> None:
    given = pixels(tiles) if tiles else None
    question = "Describe the picture."
    encoded = nvlm._ask(None if given is None else given.numpy(), question, None, None).encoded
    expected = reference(theirs, encoded, given)
    found = nvlm.generate(given, torch.tensor([encoded.token_ids]), generation_config=GREEDY)
    assert isinstance(found, torch.Tensor) and found.dtype == torch.int64 and found.tolist() == [expected]
    text = nvlm.llm.opened.tokenizer.decode([one for one in expected if one != token_ids("nvlm")["<|im_end|>"]])
    assert nvlm.chat(None, given, question, GREEDY) == text.strip()


def test_forms_of_pixels_and_of_settings_are_one(nvlm: ChatModel) -> None:
    exact = pixels(2).bfloat16()
    forms = (exact, exact.float(), exact.double(), exact.float().numpy(), exact.double().numpy())
    assert len({nvlm.chat(object(), form, "What?", GREEDY) for form in forms}) == 1

    class Config:
        def to_dict(self) -> dict[str, object]:
            return {**GREEDY, "transformers_version": "5"}

    assert nvlm.chat(None, exact, "What?", Config()) == nvlm.chat(None, exact, "What?", GREEDY)
    drawn = {"max_new_tokens": 12, "do_sample": True, "top_k": 1}
    assert nvlm.chat(None, exact, "What?", drawn) == nvlm.chat(None, exact, "What?", GREEDY)


QUESTIONS = ["What?", "<image>\nDescribe the picture, and <image> as well, please.", "Hi", "<image> Why is this funny?"]
PATCHES: list[int | list[int]] = [3, [1, 2], 0, 7]


@pytest.mark.parametrize("kind", ["nvlm", "internvl"])
def test_batched_is_one_by_one(kind: str, request: pytest.FixtureRequest) -> None:
    model: ChatModel = request.getfixturevalue(kind)
    whole = pixels(13)
    together = model.batch_chat(None, whole, QUESTIONS, GREEDY, num_patches_list=PATCHES)
    each = [whole[:3], whole[3:6], None, whole[6:]]
    lists = [[3], [1, 2], None, [7]]
    alone = [
        model.chat(None, own, question, GREEDY, num_patches_list=patches)
        for own, question, patches in zip(each, QUESTIONS, lists, strict=True)
    ]
    assert together == alone and len(set(together)) == len(together)
    assert model.chat_batch(None, each, QUESTIONS, GREEDY, num_patches_lists=lists) == alone
    texts = ["What?", "Why is that so, and what of it?"]
    assert model.batch_chat(None, None, texts, GREEDY) == [model.chat(None, None, text, GREEDY) for text in texts]
    assert model.batch_chat(None, whole[:2], texts, GREEDY) == [
        model.chat(None, whole[i : i + 1], text, GREEDY) for i, text in enumerate(texts)
    ]


def test_the_script_of_the_study(folder: Path) -> None:
    """Its calls, in its order, with the one import changed."""
    from transformers import AutoTokenizer, GenerationConfig

    from headrace.engine.hf_model import ChatModel as AutoModel

    model = AutoModel.from_pretrained(
        folder,
        torch_dtype=torch.float32,
        low_cpu_mem_usage=True,
        use_flash_attn=False,
        trust_remote_code=True,
        device_map="auto",
        **SETTINGS,
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, use_fast=False)
    generation_config = {"max_new_tokens": 12, "do_sample": False}
    response, history = model.chat(
        tokenizer, None, "Hello, who are you?", generation_config, history=None, return_history=True
    )
    assert history == [("Hello, who are you?", response)]
    pixel_values = torch.cat((pixels(3), pixels(1, 1)))
    question = "<image>\nWhat is the difference?"
    questions = [question] * 2
    responses = model.batch_chat(tokenizer, pixel_values, questions, generation_config, num_patches_list=[3, 1])
    assert responses[1] == model.chat(tokenizer, pixel_values[3:], question, GenerationConfig(**generation_config))
    text = f"<|im_start|>user\n{nvlm_image(3)}<|im_end|>\n<|im_start|>assistant\n"
    inputs = tokenizer(text, return_tensors="pt")
    found = model.generate(
        pixel_values=pixel_values[:3], **inputs, **generation_config, eos_token_id=tokenizer.eos_token_id
    )
    assert found.shape[0] == 1 and 1 <= found.shape[1] <= 12
    assert isinstance(tokenizer.batch_decode(found, skip_special_tokens=True)[0], str)
    model.close()


def test_a_thread_for_each_question(nvlm: ChatModel) -> None:
    """As the study runs them on one model."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: nvlm.chat(None, pixels(1 + i, i), f"Question {i}?", GREEDY), range(4)))
    assert found == [nvlm.chat(None, pixels(1 + i, i), f"Question {i}?", GREEDY) for i in range(4)]


def test_conversations(nvlm: ChatModel, capsys: pytest.CaptureFixture[str]) -> None:
    whole = pixels(3)
    answer, history = nvlm.chat(None, whole[:2], "What?", GREEDY, return_history=True)
    assert history == [("<image>\nWhat?", answer)] and capsys.readouterr().out == ""
    second, history = nvlm.chat(
        None, whole, "And <image>?", GREEDY, history=history, return_history=True, num_patches_list=[2, 1], verbose=True
    )
    assert [question for question, _ in history] == ["<image>\nWhat?", "And <image>?"]
    printed = capsys.readouterr().out
    assert printed.count("<image>") == 2 and "<|vision_pad|>" not in printed and printed.endswith(f"{second}\n")
    answers, histories = nvlm.chat_batch(
        None, [whole, None], ["And <image>?", "Hi"], GREEDY, [history[:1], None], True, [[2, 1], None]
    )
    assert answers[0] == second and histories == [history, [("Hi", answers[1])]]


# ---------------------------------------------------------------- the study's padding


def test_padding_at_the_end_changes_answers_and_ours_has_none(nvlm: ChatModel, theirs: Any) -> None:
    """The published pair of functions fills the shorter embeddings up with zeros at the end, so that generation starts
    behind them. At the front, masked, they change nothing; ours take neither."""
    questions, tiles = ["What?", "Describe the picture, and say why it is funny."], [pixels(1), pixels(2, seed=1)]
    prompts = [nvlm._ask(one.numpy(), q, None, None).encoded for one, q in zip(tiles, questions, strict=True)]
    alone = [reference(theirs, prompt, one) for prompt, one in zip(prompts, tiles, strict=True)]
    pad = token_ids("nvlm")["<|vision_pad|>"]
    embedded = []
    for prompt, one in zip(prompts, tiles, strict=True):
        ids = torch.tensor(prompt.token_ids)
        rows = theirs.get_input_embeddings()(ids).detach().clone()
        features = theirs.get_image_features(pixel_values=one, return_dict=True).pooler_output
        rows[ids == pad] = torch.cat(list(features)).reshape(-1, rows.shape[-1]).detach()
        embedded.append(rows)
    longest = max(map(len, embedded))
    padded = {}
    for side in ("end", "front"):
        rows = torch.zeros(2, longest, embedded[0].shape[-1])
        mask = torch.zeros(2, longest, dtype=torch.long)
        for i, own in enumerate(embedded):
            place = slice(0, len(own)) if side == "end" else slice(longest - len(own), longest)
            rows[i, place], mask[i, place] = own, 1
        found = theirs.generate(
            inputs_embeds=rows,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=token_ids("nvlm")["<|im_end|>"],
        )
        padded[side] = [row[: len(own)] for row, own in zip(found.tolist(), alone, strict=True)]
    assert padded["end"][0] != alone[0] and padded["end"][1] == alone[1] and padded["front"] == alone
    ids = [np.array([prompt.token_ids]) for prompt in prompts]
    ours = nvlm.generate_batch(tiles, ids, generation_config=GREEDY, pad_token_id=0)
    assert isinstance(ours, np.ndarray)
    assert [row[: len(own)].tolist() for row, own in zip(ours, alone, strict=True)] == alone
    # Padded on either side, as a tokenizer may do it, rows are what they are alone.
    for side in ("end", "front"):
        rows = np.zeros((2, longest), np.int64)
        mask = np.zeros((2, longest), np.int64)
        for i, prompt in enumerate(prompts):
            count = len(prompt.token_ids)
            place = slice(0, count) if side == "end" else slice(longest - count, longest)
            rows[i, place], mask[i, place] = prompt.token_ids, 1
        again = nvlm.generate(torch.cat(tiles), rows, mask, generation_config=GREEDY, pad_token_id=0)
        assert again.tolist() == ours.tolist()


def test_generated_rows_end_in_padding(nvlm: ChatModel) -> None:
    ids = [[1, 2, 3], [4, 5, 6]]
    free = nvlm.generate(input_ids=ids, max_new_tokens=6, eos_token_id=[])
    assert free.shape == (2, 6) and free.dtype == np.int64
    stop = int(free[0, 1])
    assert stop not in free[1].tolist() and stop != free[0, 0]
    ended = nvlm.generate(None, ids, generation_config={"max_new_tokens": 6, "eos_token_id": stop, "pad_token_id": 9})
    assert ended.tolist() == [[int(free[0, 0]), stop, 9, 9, 9, 9], free[1].tolist()]
    filled = nvlm.generate(input_ids=ids, max_new_tokens=6, eos_token_id=stop)
    assert filled[0].tolist() == [int(free[0, 0]), *[stop] * 5]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"visual_features": torch.ones(1)}, "visual_features: got"),
        ({"num_patches_list": [1]}, "num_patches_list: got '1 tiles', allowed: the 2 of pixel_values"),
        ({"num_patches_list": [1, 1]}, "num_patches_list: got '2 images', allowed: 1, one for each <image>"),
        ({"num_patches_list": [2, 0]}, "num_patches_list: got [2, 0]"),
        ({"num_patches_list": ["2"]}, "num_patches_list: got ['2']"),
        ({"question": "<image> and <image>"}, "num_patches_list: got '1 images', allowed: 2"),
        ({"question": "<image>", "pixel_values": None}, "num_patches_list: got '0 images', allowed: 1"),
        ({"question": "a <|vision_pad|>"}, "<|vision_pad|>"),
        ({"question": ["What?"]}, "question: got ['What?'], allowed: a string"),
        ({"history": [("a",)]}, "history: got ('a',)"),
        ({"history": "ab"}, "history: got 'ab'"),
        ({"generation_config": {"num_beams": 3}}, "num_beams: got 3"),
        ({"pixel_values": [1.0]}, "pixel_values: got 'list'"),
        ({"pixel_values": torch.ones(3, SIDE, SIDE)}, "pixel_values"),
        ({"pixel_values": torch.ones(0, 3, SIDE, SIDE)}, "pixel_values"),
        ({"pixel_values": torch.ones(2, 3, SIDE, SIDE + 1)}, "pixel_values"),
        ({"pixel_values": torch.ones(2, 3, SIDE, SIDE, dtype=torch.uint8)}, "pixel_values"),
        ({"pixel_values": torch.full((2, 3, SIDE, SIDE), float("nan"))}, "pixel_values"),
        ({"IMG_CONTEXT_TOKEN": "<IMG_CONTEXT>"}, "IMG_CONTEXT_TOKEN: got '<IMG_CONTEXT>', allowed: None or"),
        ({"IMG_START_TOKEN": "<img>"}, "IMG_START_TOKEN"),
    ],
)
def test_refused_by_name(nvlm: ChatModel, arguments: dict[str, Any], message: str) -> None:
    given = {"pixel_values": pixels(2), "question": "What?", "generation_config": GREEDY, **arguments}
    with pytest.raises(HeadraceError) as caught:
        nvlm.chat(None, **given)
    assert caught.value.status == 400 and message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions": "What?"}, "questions: got 'What?'"),
        ({"questions": []}, "questions: got []"),
        ({"num_patches_list": [2]}, "num_patches_list: got [2], allowed: a list with an entry for each of 2"),
        ({"num_patches_list": [1, 2]}, "num_patches_list: got '3 tiles', allowed: the 2 of pixel_values"),
        ({"pixel_values": pixels(3)}, "num_patches_list: got '2 tiles', allowed: the 3 of pixel_values"),
        ({"history": [("a", "b")]}, "history: got"),
        ({"return_history": True}, "history: got"),
    ],
)
def test_batches_refused_by_name(nvlm: ChatModel, arguments: dict[str, Any], message: str) -> None:
    given = {"pixel_values": pixels(2), "questions": ["a", "b"], "generation_config": GREEDY, **arguments}
    with pytest.raises(HeadraceError) as caught:
        nvlm.batch_chat(None, **given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_ids: got None"),
        ({"input_ids": [1, 2]}, "input_ids: got [1, 2]"),
        ({"input_ids": [[1, 2.5]]}, "input_ids"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "attention_mask"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, "attention_mask"),
        ({"input_ids": [[1, 2]], "pixel_values": pixels(1)}, "input_ids: got '0 placeholders"),
        ({"input_ids": [[1, 2]], "return_dict": True}, "return_dict: got True"),
        ({"input_ids": [[1, 2]], "visual_features": 1}, "visual_features"),
        ({"input_ids": [[1, 10**6]]}, "prompt_token_ids: got 1000000"),
        ({"input_ids": [[1]], "attention_mask": [[0]]}, "the prompt has no tokens"),
    ],
)
def test_ids_refused_by_name(nvlm: ChatModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadraceError) as caught:
        nvlm.generate(**arguments)
    assert caught.value.status == 400 and message in str(caught.value)


def test_names_of_tokens(nvlm: ChatModel, internvl: ChatModel) -> None:
    own = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
    assert nvlm.batch_chat(None, None, ["Hi"], GREEDY, None, None, False, *own) == [nvlm.chat(None, None, "Hi", GREEDY)]
    own = ("<img>", "</img>", "<IMG_CONTEXT>")
    given = dict(zip(("IMG_START_TOKEN", "IMG_END_TOKEN", "IMG_CONTEXT_TOKEN"), own, strict=True))
    assert internvl.chat(None, None, "Hi", GREEDY, **given) == internvl.chat(None, None, "Hi", GREEDY)


def test_one_of_several_that_fails_is_named(nvlm: ChatModel) -> None:
    with pytest.raises(CodedError, match="question 1: ") as caught:
        nvlm.batch_chat(None, None, ["Hi", "a " * 2000], GREEDY)
    assert caught.value.code == "context_length_exceeded"


def test_a_model_without_eyes(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "qwen2", vocab_size=384, eos_token_id=354, bos_token_id=352)
    write_tiny_tokenizer(tmp_path, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    with ChatModel.from_pretrained(tmp_path, low_cpu_mem_usage=True, **SETTINGS) as model:
        assert model.llm.config.backend == "native"
        texts = ["What?", "Why is that so, and what of it?", "Hi"]
        assert model.batch_chat(None, None, texts, GREEDY) == [model.chat(None, None, text, GREEDY) for text in texts]
        with pytest.raises(UnsupportedParameter, match=r"pixel_values: got .*this model reads no images"):
            model.chat(None, pixels(1), "What?", GREEDY)
        with pytest.raises(InvalidParameter, match="IMG_CONTEXT_TOKEN"):
            model.chat(None, None, "What?", GREEDY, IMG_CONTEXT_TOKEN="<x>")
