"""The questions of the NVLM acceleration study (Open Hackathon, December 2024), word for word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.compare.pictures import SCHEME, PictureReader
from headrace.compare.workloads import Workload, WorkloadRequest, check_room
from headrace.core.errors import UnsupportedParameter
from headrace.core.types import SamplingParams
from headrace.engine.images import IMAGE_MARK

if TYPE_CHECKING:
    from headrace.engine.model import OpenModel, Prompt


@dataclass(frozen=True, slots=True)
class Question:
    title: str
    text: str
    picture: str = ""
    """One of `compare.pictures`; empty: none."""


TEXT4 = (
    Question(
        "merge two sorted arrays",
        "You are given two integer arrays nums1 and nums2, sorted in non-decreasing order, and two integers m and n, "
        "representing the number of elements in nums1 and nums2 respectively. Merge nums1 and nums2 into a single "
        "array sorted in non-decreasing order. The final sorted array should not be returned by the function, but "
        "instead be stored inside the array nums1. To accommodate this, nums1 has a length of m + n, where the first "
        "m elements denote the elements that should be merged, and the last n elements are set to 0 and should be "
        "ignored. nums2 has a length of n.",
    ),
    Question(
        "majority element",
        "Given an array nums of size n, return the majority element. The majority element is the element that "
        "appears more than  $\\lfloor n / 2 \\rfloor$  times. You may assume that the majority element always exists "
        "in the array.",
    ),
    Question(
        "three numbers that sum to zero",
        "Given an integer array nums, return all the triplets [nums[i], nums[j], nums[k]] such that i != j, i != k, "
        "and j != k, and nums[i] + nums[j] + nums[k] == 0.",
    ),
    Question(
        "valid parentheses",
        "Given a string s containing just the characters (, ), {, }, [ and ], determine if the input string is valid. "
        "An input string is valid if:\n"
        "Open brackets must be closed by the same type of brackets.\n"
        "Open brackets must be closed in the correct order.\n"
        "Every close bracket has a corresponding open bracket of the same type.",
    ),
)
"""The four text questions."""

IMAGE6 = (
    Question("a meme", "<image>\nExplain why this meme is funny", "meme"),
    Question(
        "three objects",
        "<image>\nWhat is the difference between the left, middle and right object in the image?",
        "objects",
    ),
    Question(
        "which lane",
        "<image>\nYou are a helpful driving assistant. In this scene, which lane should I choose and why?",
        "road",
    ),
    Question("pseudo code", "<image>\nWrite code based on the provided pseudo code", "pseudo_code"),
    Question(
        "food poisoning",
        "<image>\nAccording to the table, explain which food is the most likely cause of the outbreak of food "
        "poisoning?",
        "food_table",
    ),
    Question(
        "market share",
        "<image>\nWhat percentage of market share does NVIDIA have for data center GPUs in 2023?",
        "market_share",
    ),
)
"""The six questions with a picture each; the study's own pictures are not public, these are ours."""


def text4(opened: OpenModel, max_tokens: int) -> Workload:
    """The four text questions for one model, all at once. Raises RequestError if one, with its answer, does not fit the
    model's context."""
    sampling = SamplingParams(max_tokens=max_tokens)
    templated = opened.tokenizer.chat_template is not None
    requests: list[WorkloadRequest] = []
    for number, question in enumerate(TEXT4, 1):
        prompt: Prompt = [{"role": "user", "content": question.text}] if templated else question.text
        token_ids = opened.request(f"question {number}", prompt, sampling).token_ids
        check_room("workload", len(token_ids), "max_tokens", max_tokens, opened.limits.max_model_len)
        requests.append(WorkloadRequest(token_ids, max_tokens, title=question.title, text=question.text))
    return Workload("text4", tuple(requests), templated=templated)


def image6(opened: OpenModel, max_tokens: int) -> Workload:
    """The six questions with pictures for one model, all at once. Raises UnsupportedParameter for a model that reads no
    images, InvalidParameter if a prompt, with its answer, does not fit the model's context."""
    if opened.spec.vision is None:
        allowed = "a workload of text: this model reads no images; InternVL, NVLM-D and Open-Qwen2VL do"
        raise UnsupportedParameter("workload", "image6", allowed)
    sampling = SamplingParams(max_tokens=max_tokens)
    reader = PictureReader(opened)
    requests: list[WorkloadRequest] = []
    for number, question in enumerate(IMAGE6, 1):
        source = f"{SCHEME}{question.picture}"
        image = {"type": "image", "image": reader.read(source, f"question {number}")}
        text = {"type": "text", "text": question.text.removeprefix(f"{IMAGE_MARK}\n")}
        prompt: Prompt = [{"role": "user", "content": [image, text]}]
        asked = opened.request(f"question {number}", prompt, sampling)
        check_room("workload", len(asked.token_ids), "max_tokens", max_tokens, opened.limits.max_model_len)
        requests.append(
            WorkloadRequest(
                asked.token_ids,
                max_tokens,
                title=question.title,
                text=question.text,
                images=asked.images,
                sources=(source,),
            )
        )
    return Workload("image6", tuple(requests), templated=True)
