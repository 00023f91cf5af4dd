"""For those who hold code written for NVLM-D or InternVL: a model with `chat`, `batch_chat` and `generate`.

`from headrace import ChatModel as AutoModel` is the line of such code that changes. The questions of one call run in
one batch and get the answers that they get alone, token for token. Pixels are what that code makes: normalised tiles in
a tensor (tiles, 3, side, side). torch is not imported here: its tensors are asked for their numbers.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from headrace.core.errors import CodedError, InvalidParameter, TemplateError, UnsupportedParameter
from headrace.core.types import SamplingParams
from headrace.engine.answer import Completion
from headrace.engine.hf_arguments import Generation, engine_config
from headrace.engine.images import IMAGE_MARK, Encoded, ImagePrompt
from headrace.engine.llm import LLM
from headrace.engine.model import OpenModel

if TYPE_CHECKING:
    from headrace.media.prepare import Prepared

Turn = tuple[str, str]
"""A question and its answer."""
Tiles = NDArray[Any]
"""Normalised, (tiles, 3, side, side)."""
TURN_END = "<|im_end|>"
"""What ends an answer in the conversations of these models, whatever else their configuration says."""
_NVLM_TOKENS: Mapping[str, str] = {"IMG_START_TOKEN": "<|vision_start|>", "IMG_END_TOKEN": "<|vision_end|>"}
"""What NVLM-D's code calls so; its prompts hold neither."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question ready to be computed."""

    question: str
    """With the `<image>` that was put before it, if one was."""
    text: str
    """The whole prompt, with `<image>` for each image."""
    encoded: Encoded


class ChatModel:
    """A loaded model, with the calls of NVLM-D's and InternVL's own code. Use it in a `with`, or call `close()`.

    Of the arguments: `tokenizer` may be anything, also None: the checkpoint's own, as headrace reads it, is used.
    `generation_config` is described in `hf_arguments.Generation`. `num_patches_list` says how many of the tiles in
    `pixel_values` each image has, in order; without it all are one image. Each `<image>` of a question is the place of
    one image; where pixels come with a first question that has none, it begins with `<image>` and a newline. The names
    of tokens are None, or what the model's prompts have. `visual_features` are refused: the model's own vision tower
    makes them. `verbose` prints prompt and answer.

    Raises RequestError for what is asked wrongly; what fails in the engine has its own code.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        """The same model, with headrace's own calls."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: object, **arguments: object) -> Self:
        """Loads a model. What each argument does is in `hf_arguments.engine_config`; an unknown one is refused."""
        opened = OpenModel(engine_config(pretrained_model_name_or_path, arguments))
        try:
            return cls(LLM.load(opened))
        except BaseException:
            opened.close()
            raise

    def eval(self) -> Self:
        """Itself: here a model is always ready to answer."""
        return self

    def close(self) -> None:
        """Gives the memory back. Idempotent."""
        self.llm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ questions

    def chat(
        self,
        tokenizer: object,
        pixel_values: object,
        question: str,
        generation_config: object,
        history: Sequence[Turn] | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
        IMG_START_TOKEN: str | None = None,
        IMG_END_TOKEN: str | None = None,
        IMG_CONTEXT_TOKEN: str | None = None,
        verbose: bool = False,
        visual_features: object = None,
    ) -> str | tuple[str, list[Turn]]:
        """The answer to one question; with `return_history` (answer, the conversation so far).

        `pixel_values` holds the images of the whole conversation: those of `history` come first.
        """
        self._check_tokens(IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)
        _refuse_features(visual_features)
        generation = Generation(generation_config)
        tiles = self._tiles(pixel_values, "pixel_values")
        asked = self._ask(tiles, question, history, num_patches_list)
        (answer,) = self._answer([asked], generation, verbose)
        return (answer, [*(history or ()), (asked.question, answer)]) if return_history else answer

    def batch_chat(
        self,
        tokenizer: object,
        pixel_values: object,
        questions: Sequence[str],
        generation_config: object,
        num_patches_list: Sequence[int | Sequence[int]] | None = None,
        history: None = None,
        return_history: bool = False,
        IMG_START_TOKEN: str | None = None,
        IMG_END_TOKEN: str | None = None,
        IMG_CONTEXT_TOKEN: str | None = None,
        verbose: bool = False,
    ) -> list[str]:
        """An answer to each question, all in one batch.

        `pixel_values` holds the tiles of all questions, in order, and `num_patches_list` how many each question has: a
        number for one image (0: none), or a list with a number for each of its images. Without it each question has one
        tile, or none has.
        """
        if history is not None or return_history:
            raise UnsupportedParameter("history", "a conversation", "None; chat_batch takes one for each question")
        self._check_tokens(IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)
        generation = Generation(generation_config)
        count = _check_questions(questions)
        tiles = self._tiles(pixel_values, "pixel_values")
        if num_patches_list is None:
            num_patches_list = [0 if tiles is None else 1] * count
        patches = [_patches(one) for one in _one_each("num_patches_list", num_patches_list, count)]
        total = 0 if tiles is None else len(tiles)
        ends = list(accumulate((sum(one) for one in patches), initial=0))
        if ends[-1] != total:
            raise InvalidParameter("num_patches_list", f"{ends[-1]} tiles", f"the {total} of pixel_values, in all")
        asked = []
        for index, (start, stop) in enumerate(pairwise(ends)):
            own = None if tiles is None or start == stop else tiles[start:stop]
            asked.append(self._ask(own, questions[index], None, patches[index], f"[{index}]"))
        return self._answer(asked, generation, verbose)

    def chat_batch(
        self,
        tokenizer: object,
        pixel_values_list: Sequence[object] | None,
        questions: Sequence[str],
        generation_config: object,
        histories: Sequence[Sequence[Turn] | None] | None = None,
        return_histories: bool = False,
        num_patches_lists: Sequence[Sequence[int] | None] | None = None,
        IMG_START_TOKEN: str | None = None,
        MG_END_TOKEN: str | None = None,
        IMG_CONTEXT_TOKEN: str | None = None,
        verbose: bool = False,
        visual_features_list: Sequence[object] | None = None,
    ) -> list[str] | tuple[list[str], list[list[Turn]]]:
        """An answer to each question, all in one batch; with `return_histories` (answers, the conversations so far).

        Every list has an entry for each question; None stands for a list of None. `MG_END_TOKEN` is how the published
        code spells it.
        """
        self._check_tokens(IMG_START_TOKEN, MG_END_TOKEN, IMG_CONTEXT_TOKEN)
        generation = Generation(generation_config)
        count = _check_questions(questions)
        for features in _one_each("visual_features_list", visual_features_list, count):
            _refuse_features(features)
        pixels = _one_each("pixel_values_list", pixel_values_list, count)
        pasts = _one_each("histories", histories, count)
        patches = _one_each("num_patches_lists", num_patches_lists, count)
        asked = []
        for index, question in enumerate(questions):
            tiles = self._tiles(pixels[index], f"pixel_values_list[{index}]")
            asked.append(self._ask(tiles, question, pasts[index], patches[index], f"[{index}]"))
        answers = self._answer(asked, generation, verbose)
        if not return_histories:
            return answers
        turns = [(one.question, answer) for one, answer in zip(asked, answers, strict=True)]
        return answers, [[*(past or ()), turn] for past, turn in zip(pasts, turns, strict=True)]

    # ------------------------------------------------------------ token ids

    def generate(
        self,
        pixel_values: object = None,
        input_ids: Any = None,
        attention_mask: object = None,
        visual_features: object = None,
        generation_config: object = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **generate_kwargs: object,
    ) -> Any:
        """New tokens only, (rows, the longest answer), filled up with `pad_token_id` at the end: int64, a tensor of
        torch where `input_ids` is one, else an array of numpy.

        `input_ids` (rows, tokens) hold the placeholders of `pixel_values`, which are given to the rows in order. Where
        `attention_mask` is 0 there is nothing, wherever that is: a row gets what it gets alone.
        """
        rows = self._rows(pixel_values, input_ids, attention_mask, visual_features)
        more = {**generate_kwargs, "output_hidden_states": output_hidden_states, "return_dict": return_dict}
        return self._generate(rows, Generation(generation_config, more), input_ids)

    def generate_batch(
        self,
        pixel_values_list: Sequence[object] | None,
        input_ids_list: Sequence[Any],
        attention_mask_list: Sequence[object] | None = None,
        visual_features: object = None,
        generation_config: object = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **generate_kwargs: object,
    ) -> Any:
        """`generate` for prompts of different lengths, all in one batch: entries of the lists are what it takes."""
        if not isinstance(input_ids_list, Sequence) or not input_ids_list:
            raise InvalidParameter("input_ids_list", input_ids_list, "a list of input_ids, not empty")
        pixels = _one_each("pixel_values_list", pixel_values_list, len(input_ids_list))
        masks = _one_each("attention_mask_list", attention_mask_list, len(input_ids_list))
        rows: list[Encoded] = []
        for index, input_ids in enumerate(input_ids_list):
            rows += self._rows(pixels[index], input_ids, masks[index], visual_features, f"[{index}]")
        more = {**generate_kwargs, "output_hidden_states": output_hidden_states, "return_dict": return_dict}
        return self._generate(rows, Generation(generation_config, more), input_ids_list[0])

    # ------------------------------------------------------------ parts

    def _ask(
        self,
        tiles: Tiles | None,
        question: str,
        history: object,
        num_patches: object,
        where: str = "",
    ) -> Asked:
        """`where`: behind the names of fields, in errors."""
        past = _check_history(history, f"histories{where}" if where else "history")
        if not isinstance(question, str):
            raise InvalidParameter(f"questions{where}" if where else "question", question, "a string")
        total = 0 if tiles is None else len(tiles)
        patches = _patches(total if num_patches is None else num_patches)
        if sum(patches) != total:
            raise InvalidParameter(f"num_patches_list{where}", f"{sum(patches)} tiles", f"the {total} of pixel_values")
        if tiles is not None and not past and IMAGE_MARK not in question:
            question = f"{IMAGE_MARK}\n{question}"
        places = question.count(IMAGE_MARK) + sum(asked.count(IMAGE_MARK) for asked, _ in past)
        if places != len(patches):
            allowed = f"{places}, one for each {IMAGE_MARK} of the conversation"
            raise InvalidParameter(f"num_patches_list{where}", f"{len(patches)} images", allowed)
        # Nobody can type this mark: an answer, or the model's own frame, may well hold `<image>`.
        mark = f"<{secrets.token_hex(16)}>"
        messages: list[dict[str, str]] = []
        for asked, answer in past:
            messages.append({"role": "user", "content": asked.replace(IMAGE_MARK, mark)})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": question.replace(IMAGE_MARK, mark)})
        opened = self.llm.opened
        text = opened.tokenizer.render(messages)
        if text.count(mark) != places:
            raise TemplateError(f"the chat template does not show each {IMAGE_MARK} once")
        if tiles is None:
            return Asked(question, text, Encoded(tuple(opened.encode_text(text, False))))
        ends = pairwise(accumulate(patches, initial=0))
        images = [self._prepare(tiles[start:stop], f"pixel_values{where}") for start, stop in ends]
        names = [f"pixel_values{where}"] * len(images)
        prompt = ImagePrompt(text, images, names, mark, f"questions{where}" if where else "question", False)
        return Asked(question, text.replace(mark, IMAGE_MARK), self._encode(prompt))

    def _answer(self, asked: Sequence[Asked], generation: Generation, verbose: bool) -> list[str]:
        end = self.llm.opened.tokenizer.encode(TURN_END, False)
        sampling = generation.sampling(end if len(end) == 1 else ())
        answers = [one.text.strip() for one in self._run([one.encoded for one in asked], sampling)]
        if verbose:
            for one, answer in zip(asked, answers, strict=True):
                print(one.text, answer)
        return answers

    def _generate(self, rows: Sequence[Encoded], generation: Generation, like: Any) -> Any:
        """`like`: what the answer is to be a tensor like."""
        sampling = generation.sampling()
        ends = sampling.stop_token_ids if sampling.ignore_eos else sorted(self.llm.opened.eos_token_ids)
        pad = generation.pad_token_id
        found = [one.token_ids for one in self._run(rows, sampling)]
        filled = np.full((len(found), max(map(len, found))), next(iter(ends), 0) if pad is None else pad, np.int64)
        for row, token_ids in zip(filled, found, strict=True):
            row[: len(token_ids)] = token_ids
        return like.new_tensor(filled.tolist()) if hasattr(like, "new_tensor") else filled

    def _run(self, prompts: Sequence[Encoded], sampling: SamplingParams) -> list[Completion]:
        """All in one batch. Raises the first error, once all have ended."""
        found = self.llm.generate(list(prompts), sampling, progress=False)
        for one in found:
            if one.error is not None:
                which = f"question {one.index}: " if len(prompts) > 1 else ""
                raise CodedError(one.error.code, f"{which}{one.error.message}")
        return found

    def _rows(
        self, pixel_values: object, input_ids: object, attention_mask: object, features: object, where: str = ""
    ) -> list[Encoded]:
        """Each row's prompt. `where`: behind the names of fields, in errors."""
        _refuse_features(features)
        field = f"input_ids{where}"
        rows = _id_rows(input_ids, attention_mask, field)
        tiles = self._tiles(pixel_values, f"pixel_values{where}")
        if tiles is None:
            return [Encoded(tuple(row)) for row in rows]
        vision = self.llm.opened.spec.vision
        assert vision is not None
        counts = [row.count(vision.image_token_id) for row in rows]
        each = vision.projector.tokens
        if any(count % each for count in counts) or sum(counts) != each * len(tiles):
            found = ", ".join(map(str, counts))
            allowed = f"{each} in a row for each of its tiles, of {len(tiles)} in all"
            raise InvalidParameter(field, f"{found} placeholders (id {vision.image_token_id})", allowed)
        prompts = []
        for row, (start, stop) in zip(rows, pairwise(accumulate((n // each for n in counts), initial=0)), strict=True):
            images = [self._prepare(tiles[start:stop], f"pixel_values{where}")] if start < stop else []
            prompts.append(self._encode(ImagePrompt(row, images, [f"pixel_values{where}"] * len(images))))
        return prompts

    def _encode(self, prompt: ImagePrompt) -> Encoded:
        """A conversation's text says itself how it begins."""
        opened = self.llm.opened
        assert opened.images is not None
        return opened.images.encode_prompt(prompt, lambda text, special: opened.encode_text(text, False))

    def _prepare(self, tiles: Tiles, field: str) -> Prepared:
        from headrace.media.prepare import prepare_values

        vision = self.llm.opened.spec.vision
        assert vision is not None
        return prepare_values(tiles, vision.tiling, field)

    def _tiles(self, value: Any, field: str) -> Tiles | None:
        """A tensor of torch, or an array; `prepare_values` says what is wrong with its numbers."""
        if value is None:
            return None
        vision = self.llm.opened.spec.vision
        if vision is None:
            raise UnsupportedParameter(field, "pixels", "None, since this model reads no images")
        if hasattr(value, "detach"):  # a tensor: bfloat16, and what lies on a device, has no numpy of its own
            value = value.detach().cpu()
            value = (value.float() if value.is_floating_point() else value).numpy()
        if not isinstance(value, np.ndarray) or value.ndim != 4 or not len(value):
            side = vision.tiling.tile_size
            shape = str(getattr(value, "shape", type(value).__name__))
            raise InvalidParameter(field, shape, f"None, or a tensor or an array (tiles, 3, {side}, {side})")
        return value

    def _check_tokens(self, start: str | None, end: str | None, context: str | None) -> None:
        vision = self.llm.opened.spec.vision
        prompt = None if vision is None else vision.prompt
        own = {
            "IMG_START_TOKEN": (start, prompt and prompt.before),
            "IMG_END_TOKEN": (end, prompt and prompt.after),
            "IMG_CONTEXT_TOKEN": (context, prompt and prompt.pad),
        }
        for name, (given, ours) in own.items():
            if prompt is not None and prompt.tile_tags:
                ours = _NVLM_TOKENS.get(name, ours)
            if given is not None and given != ours:
                raise InvalidParameter(name, given, f"None or {ours!r}, as this model's prompts have it")


def _refuse_features(features: object) -> None:
    if features is not None:
        raise UnsupportedParameter("visual_features", "features", "None, and pixel_values instead")


def _check_questions(questions: object) -> int:
    if isinstance(questions, str) or not isinstance(questions, Sequence) or not questions:
        raise InvalidParameter("questions", questions, "a list of questions, not empty")
    return len(questions)


def _one_each(field: str, values: object, count: int) -> Sequence[Any]:
    """One value a question; None: all are None."""
    if values is None:
        return [None] * count
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        raise InvalidParameter(field, values, f"a list with an entry for each of {count}")
    return values


def _patches(value: object) -> list[int]:
    """Tiles of each image of one question, from a number or a list."""
    numbers = ([value] if value else []) if type(value) is int else value
    if not isinstance(numbers, Sequence) or not all(type(one) is int and one > 0 for one in numbers):
        raise InvalidParameter("num_patches_list", value, "numbers of tiles, each of at least 1")
    return list(numbers)


def _check_history(history: object, field: str) -> Sequence[Turn]:
    turns = [] if history is None else history
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise InvalidParameter(field, history, "a list of (question, answer)")
    for turn in turns:
        if not isinstance(turn, tuple | list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise InvalidParameter(field, turn, "(question, answer), two strings")
    return turns


def _id_rows(input_ids: Any, attention_mask: Any, field: str) -> list[list[int]]:
    """The ids of each row that the mask leaves. Raises InvalidParameter."""
    rows = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
    ids = _table(rows)
    if ids is None or not all(isinstance(one, int) and not isinstance(one, bool) for row in ids for one in row):
        raise InvalidParameter(field, rows, "token ids, (rows, tokens)")
    if attention_mask is None:
        return ids
    mask = _table(attention_mask.tolist() if hasattr(attention_mask, "tolist") else attention_mask)
    if mask is None or [len(row) for row in mask] != [len(row) for row in ids]:
        raise InvalidParameter("attention_mask", attention_mask, "0 or 1 for each of the token ids")
    if any(one not in (0, 1) for row in mask for one in row):
        raise InvalidParameter("attention_mask", "a number that is neither", "0 or 1 for each of the token ids")
    return [[one for one, kept in zip(row, keep, strict=True) if kept] for row, keep in zip(ids, mask, strict=True)]


def _table(value: object) -> list[list[Any]] | None:
    """A list of lists, not empty; None where it is another thing."""
    if not isinstance(value, list | tuple) or not value or not all(isinstance(row, list | tuple) for row in value):
        return None
    return [list(row) for row in value]
