"""Strings that are hard to tokenise, and a small vocabulary trained on them."""

from __future__ import annotations

import json
import random
import unicodedata
from typing import Any

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, trainers


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
