"""Tokenizers from GGUF files, against an oracle written here and against transformers."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex

from headrace.core.errors import (
    CheckpointError,
    HeadraceError,
    RequestError,
    UnsupportedModel,
)
from headrace.text.gguf_tokenizer import PRE_TOKENIZERS, build_gguf_tokenizer
from headrace.text.tokenizer import Tokenizer, load_tokenizer
from headrace.weights.checkpoint import open_checkpoint
from tests.unit.tokenizer_cases import MODEL, tricky_strings

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# ---------------------------------------------------------------- the oracle


def byte_alphabet() -> list[str]:
    printable = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


class Oracle:
    """The published rule in plain Python: special tokens, single digits, GPT-2's pattern, lowest-rank merges."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        tokens = metadata["tokenizer.ggml.tokens"]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(metadata["tokenizer.ggml.merges"])}
        self.letters = byte_alphabet()
        special = [t for t, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3]
        self.special = regex.compile("|".join(map(regex.escape, sorted(special, key=len, reverse=True))))
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        out: list[int] = []
        at = 0
        for match in self.special.finditer(text):
            out += self._plain(text[at : match.start()])
            out.append(self.ids[match[0]])
            at = match.end()
        return out + self._plain(text[at:])

    def _plain(self, text: str) -> list[int]:
        pieces = [p for run in regex.findall(r"\p{N}|\P{N}+", text) for p in regex.findall(GPT2, run)]
        assert "".join(pieces) == text
        return [token_id for piece in pieces for token_id in self._piece(piece)]

    def _piece(self, piece: str) -> list[int]:
        if piece not in self.cache:
            # A byte without a token is left out (the model's vocabulary lacks some control characters).
            symbols = [letter for byte in piece.encode() if (letter := self.letters[byte]) in self.ids]
            while len(symbols) > 1:
                pairs = list(pairwise(symbols))
                best = min(pairs, key=lambda pair: self.ranks.get(pair, 1 << 30))
                if best not in self.ranks:
                    break
                merged: list[str] = []
                for symbol in symbols:
                    joined = merged and (merged[-1], symbol) == best
                    if joined:
                        merged[-1] += symbol
                    else:
                        merged.append(symbol)
                symbols = merged
            self.cache[piece] = [self.ids[symbol] for symbol in symbols]
        return self.cache[piece]


@pytest.fixture(scope="module")
def demo_metadata(demo_path: Path) -> Iterator[Mapping[str, Any]]:
    with open_checkpoint(demo_path) as checkpoint:
        yield checkpoint.config


@pytest.fixture(scope="module")
def demo(demo_path: Path) -> Iterator[Tokenizer]:
    with open_checkpoint(demo_path) as checkpoint:
        yield load_tokenizer(checkpoint)


@pytest.mark.demo
def test_demo_facts(demo: Tokenizer) -> None:
    assert demo.vocab_size == 49152
    assert demo.eos_token_ids == {2}
    assert demo.bos_token_id == 1
    assert demo.encode("") == []
    assert demo.special_tokens["eos_token"] == "<|im_end|>"
    assert demo.chat_template is not None and "named SmolLM" in demo.chat_template


@pytest.mark.demo
def test_demo_equals_the_oracle_on_2000_strings(demo: Tokenizer, demo_metadata: Mapping[str, Any]) -> None:
    oracle = Oracle(demo_metadata)
    for text in tricky_strings(2000):
        assert demo.encode(text) == oracle.encode(text), text
        if all(oracle.letters[byte] in oracle.ids for byte in text.encode()):
            assert demo.decode(demo.encode(text), skip_special_tokens=False) == text


@pytest.mark.demo
@pytest.mark.filterwarnings("ignore")
def test_demo_against_transformers(demo: Tokenizer, demo_path: Path) -> None:
    """transformers cannot be the reference for digits: its conversion ignores the pre-tokenizer name `smollm`.

    It builds GPT2Tokenizer (GPT-2's pattern, digits together), while the model's own tokenizer.json, like llama.cpp,
    splits digits singly and first. ASCII digits have no merges, so they come out alike; the spaces before a digit
    ("a  1": one token of two spaces, theirs two of one) and other numbers (" ½") do not. So they must agree wherever
    the text has no character of \\p{N}, and may differ only where it has one.
    """
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(demo_path.parent), gguf_file=demo_path.name)
    strings = tricky_strings(2000)
    compared = [text for text in strings if not regex.search(r"\p{N}", text)]
    assert len(compared) > 400
    for text in compared:
        assert demo.encode(text) == theirs(text)["input_ids"], text
    differing = [text for text in strings if demo.encode(text) != theirs(text)["input_ids"]]
    assert differing and all(regex.search(r"\p{N}", text) for text in differing)
    for text, ours, other in (("a  1", ["a", "ĠĠ", "1"], ["a", "Ġ", "Ġ", "1"]), (" ½", ["Ġ", "Â½"], ["ĠÂ", "½"])):
        assert demo.tokens(demo.encode(text)) == ours
        assert theirs.convert_ids_to_tokens(theirs(text)["input_ids"]) == other
    for text in strings[:300]:
        ids = demo.encode(text)
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert demo.decode(ids, skip) == expected


@pytest.mark.demo
def test_demo_builds_quickly(demo_metadata: Mapping[str, Any]) -> None:
    best = 1e9
    for _ in range(3):
        start = time.perf_counter()
        build_gguf_tokenizer(demo_metadata, "demo.gguf")
        best = min(best, time.perf_counter() - start)
    assert best < 0.35


@pytest.mark.demo
def test_chat_adds_nothing_to_the_template(demo: Tokenizer) -> None:
    ids = demo.chat([{"role": "user", "content": "hi"}])
    assert demo.decode(ids, skip_special_tokens=False).endswith(
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (
        demo.chat([{"role": "user", "content": "hi"}], add_generation_prompt=False)
        == ids[: -len(demo.encode("<|im_start|>assistant\n"))]
    )


@pytest.mark.demo
def test_long_text_and_surrogates(demo: Tokenizer) -> None:
    assert len(demo.encode("word " * 200_000)) > 200_000
    assert demo.decode(demo.encode("x" * 500_000)) == "x" * 500_000
    with pytest.raises(RequestError, match=r"^text: a lone surrogate \(U\+D83D\) at character 2 "):
        demo.encode("ab\ud83d")


# ---------------------------------------------------------------- GGUF metadata, made here


def metadata(**changes: object) -> dict[str, Any]:
    tokens = [*sorted(MODEL["vocab"], key=MODEL["vocab"].__getitem__), "<|b|>", "<|e|>", "<think>", "[PAD]", "<|eot|>"]
    types = [1] * (len(tokens) - 5) + [3, 3, 4, 5, 3]
    size = len(tokens)
    made: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "merges": [" ".join(merge) for merge in MODEL["merges"]],
        "bos_token_id": size - 5,
        "eos_token_id": size - 4,
        "eot_token_id": size - 1,
    }
    made |= changes
    return {f"tokenizer.ggml.{key}": value for key, value in made.items() if value is not None}


def build(**changes: object) -> Tokenizer:
    return Tokenizer(build_gguf_tokenizer(metadata(**changes), "m.gguf"), "m.gguf")


def test_token_types_and_stop_ids() -> None:
    tokenizer = build()
    size = tokenizer.vocab_size
    assert tokenizer.eos_token_ids == {size - 4, size - 1}
    assert tokenizer.bos_token_id == size - 5
    assert tokenizer.special_tokens == {"bos_token": "<|b|>", "eos_token": "<|e|>"}
    assert tokenizer.encode("<|b|><think>") == [size - 5, size - 3]
    # Control tokens are special; user-defined ones are text; unused ones are never matched.
    assert tokenizer.decode([size - 5, size - 3, size - 4]) == "<think>"
    assert tokenizer.decode([size - 5, size - 3], skip_special_tokens=False) == "<|b|><think>"
    assert size - 2 not in tokenizer.encode("a[PAD]b")
    assert build(token_type=None).encode("<|b|>") != [size - 5]


def test_bos_eos_and_space_prefix() -> None:
    plain, size = build(), build().vocab_size
    both = build(add_bos_token=True, add_eos_token=True)
    assert both.encode("a b") == [size - 5, *plain.encode("a b"), size - 4]
    assert both.encode("a b", add_special_tokens=False) == plain.encode("a b")
    prefixed = build(add_space_prefix=True)
    assert prefixed.encode("a b") == plain.encode(" a b")
    assert prefixed.encode(" a b") == plain.encode(" a b")
    assert prefixed.encode("") == []
    # As tokenizers' ByteLevel(add_prefix_space=True): once a stretch between added tokens, not once a piece.
    assert prefixed.encode("1 2<think>a") == [*plain.encode(" 1 2"), size - 3, *plain.encode(" a")]
    # llama3 begins with BOS where the file does not say.
    assert build(pre="llama-bpe").encode("a")[0] == size - 5
    assert build(pre="llama-bpe", add_bos_token=False).encode("a") == plain.encode("a")


PATTERNS = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "qwen2": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "tekken": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}"
        r"\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "gpt-4o": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}


@pytest.mark.parametrize("pre", PATTERNS)
def test_pre_tokenizers_equal_their_patterns(pre: str) -> None:
    """Pieces by the `regex` package: each pattern cuts each piece so far into matches and what lies between."""
    tokenizer = build(pre=pre)
    for text in tricky_strings(300, seed=5):
        pieces = [text]
        for pattern in PATTERNS[pre]:
            pieces = [p for piece in pieces for p in regex.split(f"({pattern})", piece) if p]
        cut = tokenizer.raw.pre_tokenizer.pre_tokenize_str(text)
        assert [text[low:high] for _, (low, high) in cut] == pieces, text


def test_every_name_builds() -> None:
    for pre in PRE_TOKENIZERS:
        assert build(pre=pre).decode(build(pre=pre).encode("Hello 123 wörld")) == "Hello 123 wörld"
    decomposed = "e\u0301"
    assert build(pre="qwen2").encode(decomposed) == build(pre="qwen2").encode("é")
    assert build(pre="smollm").encode(decomposed) != build(pre="smollm").encode("é")
    assert build(pre=None).encode("a1") == build(pre="default").encode("a1")


BROKEN = {
    "model": [("bert", UnsupportedModel), (None, UnsupportedModel), (3, CheckpointError)],
    "pre": [("made-up", UnsupportedModel), (3, CheckpointError)],
    "tokens": [
        (None, CheckpointError),
        ([], CheckpointError),
        (["a", 3], CheckpointError),
        (["a", "a"], CheckpointError),
    ],
    "merges": [
        (None, CheckpointError),
        (["ab"], CheckpointError),
        (["a qqqq"], CheckpointError),
        (["q \udcff"], CheckpointError),
    ],
    "token_type": [
        ([1], CheckpointError),
        ("x", CheckpointError),
        (np.full(len(MODEL["vocab"]) + 5, 9), CheckpointError),
    ],
    "eos_token_id": [(10**6, CheckpointError), (-1, CheckpointError), (True, CheckpointError), ("2", CheckpointError)],
    "add_bos_token": [(1, CheckpointError)],
    "add_space_prefix": [("yes", CheckpointError)],
}


@pytest.mark.parametrize(("key", "value", "error"), [(k, v, e) for k, cases in BROKEN.items() for v, e in cases])
def test_broken_metadata(key: str, value: object, error: type[HeadraceError]) -> None:
    changes = {key: value}
    if key == "tokens" and value:
        changes["token_type"] = [1] * len(value)
    with pytest.raises(error, match=rf"^m\.gguf: tokenizer\.ggml\.{key} ") as caught:
        build(**changes)
    assert "\n" not in str(caught.value)


def test_add_bos_without_bos() -> None:
    with pytest.raises(CheckpointError, match="bos_token_id is missing"):
        build(add_bos_token=True, bos_token_id=None)


def test_import_is_light() -> None:
    code = (
        "import sys, headrace.text.tokenizer\n"
        "print(sorted({'jinja2', 'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
