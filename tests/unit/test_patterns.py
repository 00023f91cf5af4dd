"""Targets of a quantization_config: what Python's `re` would match, at a price that is known beforehand."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.errors import UnsupportedModel
from headrace.weights.patterns import Pattern, Work

PIECES = st.sampled_from(
    [*"ab.0_^$|", r"\.", r"\d", r"\w", r"\S", "[ab]", "[^a.]", "[0-9]", ".*", "a+", "b?", "a{2}", r"\d{1,3}", "(a|b)",
     "(?:ab)+", "(?!a)", "(?=.*b)", "(a*)*", "(a|ab)*?", "x.*y", "layers"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=8).map("".join), st.text("ab0._xy", max_size=12))
@settings(max_examples=1500)
def test_patterns_match_what_re_matches(pattern: str, name: str) -> None:
    try:
        expected = re.match(pattern, name) is not None
    except re.error:
        return
    try:
        found = Pattern(f"re:{pattern}", "ignore", Work("x"))
    except UnsupportedModel:
        # `^*` and the like, which no file needs.
        assert re.search(r"[\^$)][*+?{]", pattern)
        return
    assert (found.rank(name) is not None) == expected


@pytest.mark.parametrize(
    "pattern", [r"(a)\1", "(?i)a", "(?P<n>a)", "a++", "a{", "a{3,1}", "a{999}", "[", "[]", "*a", "a)", "a" * 600]
)
def test_expressions_that_are_not_read(pattern: str) -> None:
    with pytest.raises(UnsupportedModel, match="is not read"):
        Pattern(f"re:{pattern}", "ignore", Work("x"))


def test_expressions_made_to_take_for_ever_do_not() -> None:
    work = Work("config.json")
    assert Pattern("re:" + "(a|a)*" * 40 + "(a*)*b", "ignore", work).rank("a" * 60) is None
    work.left = 2**20
    slow = Pattern("re:" + "(a|a)*" * 80 + "b", "ignore", work)
    with pytest.raises(UnsupportedModel, match="patterns take more than"):
        for _ in range(100_000):
            slow.rank("a" * 250)


def test_classes() -> None:
    def rank(target: str, module: str) -> int | None:
        return Pattern(target, "targets", Work("x")).rank(module)

    assert rank("Linear", "model.layers.0.mlp.up_proj") == 2
    assert rank("Linear", "model.embed_tokens") is None
    assert rank("Embedding", "model.embed_tokens") == 2
    assert rank("lm_head", "lm_head") == 0
    assert rank("re:lm", "lm_head") == 1
