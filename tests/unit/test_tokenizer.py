"""Tokenizers from GGUF and from folders, against an oracle written here and against transformers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from headrace.core.errors import (
    CheckpointError,
    HeadraceError,
    RequestError,
    TemplateError,
    UnsupportedModel,
)
from headrace.text.gguf_tokenizer import PRE_TOKENIZERS, build_gguf_tokenizer
from headrace.text.tokenizer import Tokenizer, load_tokenizer
from headrace.weights.checkpoint import open_checkpoint

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass
class Folder:
    """As much of a checkpoint as a tokenizer reads."""

    path: Path
    config: Mapping[str, object] = field(default_factory=dict)
    format: str = "hf"


def load(folder: Folder) -> Tokenizer:
    return load_tokenizer(folder)  # type: ignore[arg-type]


# ---------------------------------------------------------------- strings


def _assigned(low: int, high: int) -> list[str]:
    return [c for c in map(chr, range(low, high)) if unicodedata.category(c) not in ("Cn", "Cs")]


PLANES = [_assigned(0, 0x250), _assigned(0x250, 0x3000), _assigned(0x3000, 0x10000)]
PLANES += [_assigned(0x10000, 0x20000), _assigned(0x20000, 0x30000), _assigned(0xE0000, 0xE0200)]
DIGITS = [c for plane in PLANES for c in plane if unicodedata.category(c).startswith("N")]
MARKS = [c for plane in PLANES for c in plane if unicodedata.category(c).startswith("M")]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\r", "\xa0", "\u2003", "\u3000", "\u2028", "\x0b", "\x0c", "\x85", "\u200b"]
WORDS = [
    *("I'm", "you'LL", "it'S", "'s", "'ve", "D'", "can't", "WE'RE", "’s", "'ſ", "''d", "Hello", "naïve", "ﬁnd", "x1y2"),
    *(
        "12345",
        "3.14159",
        "1,000,000",
        "²³",
        "½",
        "Ⅷ",
        "٠١٢٣",
        "९८७",
        "𝟘𝟙𝟚",
        "0x1F",
        "שלום",
        "مرحبا بالعالم",
        "日本語テスト",
    ),
    *(
        "한국어",
        "ไทย",
        "हिन्दी",
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "👍🏽",
        "🇫🇷🇩🇪",
        "e\u0301",
        "Z͑ͫ̓ͪ̂ͫ",
        "\u202eabc\u202c",
        "\ufeff",
        "\ufffd",
        "\x00\x01",
    ),
    *(
        "def f(x):\n\treturn x**2",
        "a->b",
        "x!=y&&z",
        "// comment\n",
        "<html></html>",
        "{{}}",
        "::",
        "…",
        "——",
        "$$$",
        "`~^|",
    ),
    *(
        "<|im_end|>",
        "<|im_start|>user\n",
        "<|endoftext|>",
        "<|im_end|",
        "<|im_ end|>",
        "|im_end|>",
        "<repo_name>",
        "<reponame",
    ),
    *("<|im_end|><|im_end|>", "<<|im_end|>>", "<file_sep>", "</s>", "[INST]", "Ġhello", "Ċ", "don’t", "_", "a_b"),
]


def tricky_strings(count: int, seed: int = 20240607) -> list[str]:
    rng = random.Random(seed)
    out = ["", " ", "\n", "a" * 3000, "ab1" * 700, "é" * 800, " " * 500, "\n" * 300, "日" * 400, "7" * 600]
    while len(out) < count:
        parts: list[str] = []
        for _ in range(rng.randint(1, 14)):
            kind = rng.random()
            if kind < 0.45:
                parts.append(rng.choice(WORDS))
            elif kind < 0.65:
                parts.append(rng.choice(SPACES) * rng.randint(1, 4))
            elif kind < 0.75:
                parts.append("".join(rng.choices(rng.choice(PLANES), k=rng.randint(1, 6))))
            elif kind < 0.85:
                parts.append("".join(rng.choices(DIGITS, k=rng.randint(1, 5))))
            elif kind < 0.92:
                parts.append(rng.choice("aeiouxé日") + "".join(rng.choices(MARKS, k=rng.randint(1, 3))))
            else:
                parts.append(rng.choice([" ", ""]).join(rng.choices(WORDS, k=3)))
        out.append("".join(parts))
    return out


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
    splits digits singly (" 12" is " ", "1", "2"; transformers' " 1", "2"). So they must agree wherever the text has no
    character of \\p{N}, and may differ only where it has one.
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
    assert demo.encode(" 12") == demo.encode(" ") + demo.encode("1") + demo.encode("2")
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

TRAINING = [
    *WORDS,
    *SPACES,
    "the quick brown fox jumps over the lazy dog " * 5,
    "don't won't I'll HELLO WORLD Hello 2024 123456",
]


def train_bpe(size: int = 600) -> dict[str, Any]:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(TRAINING * 3, trainer)
    model: dict[str, Any] = json.loads(raw.to_str())["model"]
    return model


MODEL = train_bpe()


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
    "model": [("llama", UnsupportedModel), (None, UnsupportedModel), (3, CheckpointError)],
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


# ---------------------------------------------------------------- folders


def byte_level_raw(bos: bool) -> RawTokenizer:
    raw = RawTokenizer(models.BPE(MODEL["vocab"], [tuple(merge) for merge in MODEL["merges"]]))
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>", "</s>"])
    if bos:
        ids = [("<s>", raw.token_to_id("<s>"))]
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    return raw


def unigram_raw() -> RawTokenizer:
    raw = RawTokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    raw.train_from_iterator(TRAINING * 3, trainer)
    ids = [("<s>", raw.token_to_id("<s>"))]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    return raw


def write(folder: Path, raw: RawTokenizer, **files: object) -> Folder:
    raw.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Folder(folder)


NAMED = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
TOKEN_X = {"__type": "AddedToken", "content": "<|x|>", "lstrip": True, "special": True}
CONFIGS = [
    {},
    {"add_bos_token": True},
    {"add_bos_token": False},
    {"add_eos_token": True},
    {"add_bos_token": True, "add_eos_token": True},
    {"add_bos_token": None},
    {
        "additional_special_tokens": [
            "the",
            {"__type": "AddedToken", "content": "<|x|>", "lstrip": True, "special": True},
        ]
    },
    {
        "pad_token": {
            "__type": "AddedToken",
            "content": "<pad>",
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        }
    },
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bpe", "bpe_bos", "unigram"])
@pytest.mark.parametrize("changes", CONFIGS)
def test_folder_equals_transformers(tmp_path: Path, kind: str, changes: dict[str, object]) -> None:
    from transformers import PreTrainedTokenizerFast

    raw = unigram_raw() if kind == "unigram" else byte_level_raw(bos=kind == "bpe_bos")
    raw.enable_truncation(4)
    raw.enable_padding(length=8, pad_token="</s>")
    ours = load(write(tmp_path, raw, tokenizer_config=NAMED | changes))
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    for text in [*tricky_strings(120, seed=11), "<s>a</s> the <|x|> <pad>"]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip) == expected


@pytest.mark.filterwarnings("ignore")
def test_added_tokens_decoder(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    raw = byte_level_raw(bos=False)
    size = raw.get_vocab_size()
    added = {
        str(size + 1): {"content": "<tool>", "special": False, "normalized": False},
        str(size): {"content": "<new>", "special": True},
    }
    ours = load(write(tmp_path, raw, tokenizer_config=NAMED | {"added_tokens_decoder": added}))
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert ours.encode("a<new>b<tool>c") == theirs("a<new>b<tool>c")["input_ids"]
    assert ours.decode([size, size + 1]) == "<tool>" == theirs.decode([size, size + 1], skip_special_tokens=True)
    added[str(size + 7)] = {"content": "<gap>"}
    with pytest.raises(CheckpointError, match=r"added_tokens_decoder\.\d+ is '<gap>'"):
        load(write(tmp_path, raw, tokenizer_config=NAMED | {"added_tokens_decoder": added}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_decoder", [True, False])
def test_special_tokens_map(tmp_path: Path, with_decoder: bool) -> None:
    """The older file of names wins, but only where tokenizer_config.json lists no added tokens."""
    from transformers import PreTrainedTokenizerFast

    raw = byte_level_raw(bos=False)
    token = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = NAMED | ({"added_tokens_decoder": {str(raw.token_to_id("</s>")): token}} if with_decoder else {})
    names = {"bos_token": token, "unk_token": "<s>"}
    ours = load(write(tmp_path, raw, tokenizer_config=config, special_tokens_map=names))
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.special_tokens == {key: str(value) for key, value in theirs.special_tokens_map.items()}


def test_eos_ids_by_precedence(tmp_path: Path) -> None:
    raw = byte_level_raw(bos=False)
    folder = write(tmp_path, raw, tokenizer_config=NAMED)
    eos = raw.token_to_id("</s>")
    assert load(folder).eos_token_ids == {eos}
    folder.config = {"text_config": {"eos_token_id": 9}}
    assert load(folder).eos_token_ids == {9}
    folder.config = {"eos_token_id": 7}
    assert load(folder).eos_token_ids == {7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert load(folder).eos_token_ids == {3, 4}
    for bad in ("-1", "true", '["a"]', "1.5"):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {bad}}}')
        with pytest.raises(CheckpointError, match=r"^generation_config\.json: eos_token_id is "):
            load(folder)


def test_chat_template_places(tmp_path: Path) -> None:
    raw = byte_level_raw(bos=False)
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert load(write(tmp_path, raw)).chat_template is None
    with pytest.raises(TemplateError, match="no chat template"):
        load(Folder(tmp_path)).chat([{"role": "user", "content": "a"}])
    for place, content, expected in (
        ("tokenizer_config", {"chat_template": "A"}, "A"),
        ("tokenizer_config", {"chat_template": named}, "D"),
        ("chat_template", {"chat_template": "J"}, "J"),
    ):
        assert load(write(tmp_path, raw, **{place: content})).chat_template == expected
    (tmp_path / "chat_template.jinja").write_text("é{{ 1 }}")
    assert load(Folder(tmp_path)).chat_template == "é{{ 1 }}"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"^chat_template\.jinja: not UTF-8"):
        load(Folder(tmp_path))


def test_missing_and_other_formats(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing$"):
        load(Folder(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match=r"the tokenizer is in tokenizer\.model, supported: tokenizer\.json$"):
        load(Folder(tmp_path))


def corrupt() -> Iterator[bytes]:
    good = byte_level_raw(bos=True).to_str()
    yield from (b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"model": 3}', good[: len(good) // 2].encode())
    yield b"[" * 100_000
    for path, value in (
        (("model", "type"), "Nope"),
        (("model", "vocab"), {"a": -1}),
        (("model", "vocab"), {"a": 2**40}),
        (("model", "merges"), [["zz", "yy"]]),
        (("post_processor", "single"), [{"SpecialToken": {"id": "<none>", "type_id": 0}}]),
        (("pre_tokenizer", "type"), "Python"),
        (("decoder", "type"), "Python"),
        (("pre_tokenizer",), {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        (("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ):
        tree = json.loads(good)
        node = tree
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        yield json.dumps(tree).encode()


@pytest.mark.parametrize("data", list(corrupt()), ids=lambda data: str(data[:12]))
def test_corrupt_tokenizer_json(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises((CheckpointError, UnsupportedModel), match=r"^tokenizer\.json: ") as caught:
        load(Folder(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": 3},
        {"eos_token": {"content": 3}},
        {"eos_token": {"content": "a", "lstrip": "yes"}},
        {"added_tokens_decoder": {"x": "a"}},
        {"added_tokens_decoder": [1]},
        {"additional_special_tokens": "abc"},
        {"additional_special_tokens": [1]},
        {"chat_template": 7},
    ],
)
def test_corrupt_tokenizer_config(tmp_path: Path, config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"^tokenizer_config\.json: "):
        load(write(tmp_path, byte_level_raw(bos=False), tokenizer_config=config))


def test_import_is_light() -> None:
    code = (
        "import sys, headrace.text.tokenizer\n"
        "print(sorted({'jinja2', 'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
