"""The questions of the NVLM acceleration study (Open Hackathon, December 2024), word for word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.compare.workloads import Workload, WorkloadRequest, check_room
from headrace.core.types import SamplingParams

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
"""The four text questions."""


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
