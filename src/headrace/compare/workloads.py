"""What every method is asked: fixed questions, as token ids, with one way to sample and to stop."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.core.types import Request, SamplingParams

if TYPE_CHECKING:
    from headrace.engine.model import OpenModel, Prompt


@dataclass(frozen=True, slots=True)
class Question:
    title: str
    text: str


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
"""The four text questions of the NVLM acceleration study (Open Hackathon, December 2024), word for word."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The same for every method: questions that arrive together, answered greedily up to `max_tokens` or their end."""

    name: str
    questions: tuple[Question, ...]
    prompts: tuple[tuple[int, ...], ...]
    """Token ids, one prompt a question."""
    max_tokens: int
    templated: bool
    """Whether the questions went through the model's chat template; else they are plain text."""

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens)

    @property
    def sha256(self) -> str:
        """Of the prompts' token ids, max_tokens and the way of sampling."""
        manifest = {"prompts": self.prompts, "max_tokens": self.max_tokens, "temperature": 0, "ignore_eos": False}
        return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def text4(opened: OpenModel, max_tokens: int) -> Workload:
    """The four text questions for one model. Raises RequestError if one does not fit its context."""
    sampling = SamplingParams(max_tokens=max_tokens)
    templated = opened.tokenizer.chat_template is not None
    requests: list[Request] = []
    for number, question in enumerate(TEXT4, 1):
        prompt: Prompt = [{"role": "user", "content": question.text}] if templated else question.text
        requests.append(opened.request(f"question {number}", prompt, sampling))
    return Workload("text4", TEXT4, tuple(request.token_ids for request in requests), max_tokens, templated)
