"""SentencePiece models trained here, and GGUF files of them."""

from __future__ import annotations

import contextlib
import io
import random
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from tests.unit.tokenizer_cases import PLANES, TRAINING, WORDS, tricky_strings

USER_DEFINED = ["<tool>", "▁▁", "▁▁▁▁", "\n\n", "aaa", "👩‍👩‍👧‍👦", "<|x", "<|x|>"]
BASE: dict[str, Any] = {
    "model_type": "bpe",
    "vocab_size": 1100,
    "character_coverage": 0.98,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "hard_vocab_limit": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"allow_whitespace_only_pieces": True},
    "no_bytes": {"byte_fallback": False, "vocab_size": 800},
    "user_defined": {"user_defined_symbols": USER_DEFINED, "control_symbols": ["[INST]", "<|im_end|>"]},
    "gemma": {"add_dummy_prefix": False, "user_defined_symbols": USER_DEFINED, "split_by_whitespace": False},
    "collapse": {"remove_extra_whitespaces": True},
    "nmt": {"normalization_rule_name": "nmt_nfkc", "user_defined_symbols": ["½", "ﬁnd"], "byte_fallback": False},
    "nfkc": {"normalization_rule_name": "nfkc", "remove_extra_whitespaces": True},
    "unigram": {"model_type": "unigram"},
    "unigram_no_bytes": {"model_type": "unigram", "byte_fallback": False, "vocab_size": 800},
    "t5": {
        "model_type": "unigram",
        "byte_fallback": False,
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "user_defined_symbols": ["<extra_id_0>", "<extra_id_1>", "½", "fox"],
        "vocab_size": 800,
    },
}


@cache
def train(name: str) -> bytes:
    model = io.BytesIO()
    corpus = [*TRAINING * 20, *tricky_strings(60, seed=3)[10:]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.replace("\n", " ") for line in corpus),
        model_writer=model,
        minloglevel=4,
        num_threads=1,
        **(BASE | VARIANTS[name]),
    )
    return model.getvalue()


def processor(name: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=train(name))


def metadata(model: bytes) -> dict[str, Any]:
    """The `tokenizer.ggml.*` values of a model, as converters write them."""
    read = proto.ModelProto.FromString(model)
    spec = read.normalizer_spec
    unigram = read.trainer_spec.model_type == proto.TrainerSpec.UNIGRAM
    values: dict[str, Any] = {
        "model": "t5" if unigram else "llama",
        "pre": "default",
        "tokens": [piece.piece for piece in read.pieces],
        "scores": [piece.score for piece in read.pieces],
        "token_type": [int(piece.type) for piece in read.pieces],
        "bos_token_id": read.trainer_spec.bos_id,
        "eos_token_id": read.trainer_spec.eos_id,
        "unknown_token_id": read.trainer_spec.unk_id,
        "add_space_prefix": spec.add_dummy_prefix,
    }
    if spec.remove_extra_whitespaces:
        values["remove_extra_whitespaces"] = True
    if spec.precompiled_charsmap:
        values["precompiled_charsmap"] = spec.precompiled_charsmap
    return values


def write_gguf(path: Path, model: bytes, **extra: Any) -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        writer = gguf.GGUFWriter(path, "llama")
    values = metadata(model) | extra
    writer.add_tokenizer_model(values["model"])
    writer.add_tokenizer_pre(values["pre"])
    writer.add_token_list(values["tokens"])
    writer.add_token_scores(values["scores"])
    writer.add_token_types(values["token_type"])
    writer.add_bos_token_id(values["bos_token_id"])
    writer.add_eos_token_id(values["eos_token_id"])
    writer.add_unk_token_id(values["unknown_token_id"])
    writer.add_add_space_prefix(values["add_space_prefix"])
    if "remove_extra_whitespaces" in values:
        writer.add_remove_extra_whitespaces(values["remove_extra_whitespaces"])
    if "precompiled_charsmap" in values:
        writer.add_precompiled_charsmap(values["precompiled_charsmap"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hard_strings(count: int, seed: int = 7) -> list[str]:
    """`tricky_strings`, and what is hard for SentencePiece: ▁ itself, runs of spaces, private use, 10k characters."""
    rng = random.Random(seed)
    fixed = [
        *(
            "▁",
            "▁▁",
            " ▁ ",
            "a▁b",
            "▁a",
            " a",
            "  a  b  ",
            "a ",
            "   ",
            "\t",
            "\n\n\n",
            "\x00",
            "a\x00b",
            "\x01",
            "\x7f",
        ),
        *("<0x41>", "<0xE2><0x96><0x81>", "[INST] a [/INST]", "<|x<|x|>", "<tool> <tool>", "aaaaaaa", "aaaa aaa"),
        *(
            "ab" * 3000,
            "a" * 10_000,
            " " * 10_000,
            "日本語" * 3000,
            "\ue000\uf8ff\U0010ffff",
            "🏳️‍🌈" * 900,
            "½½ ﬁﬁnd ﷺ¨ ｱ",
        ),
        *("e\u0301e\u0301\u0301", "ﬃ ² ｶﾞ Å\u0323", "\u200d\u200c\u2060", "\u3000\xa0x\u2009", "́start", "don't  won't"),
    ]
    out = [*fixed, *tricky_strings(count // 2, seed)]
    while len(out) < count:
        parts = [
            rng.choice(
                [
                    *(
                        "▁",
                        " ",
                        "  ",
                        "    ",
                        "\n",
                        "\t",
                        "a",
                        "aa",
                        "aaa",
                        "the ",
                        " fox",
                        "<|x|>",
                        "<|x",
                        "½",
                        "ﬁ",
                        "\ue0ff",
                    ),
                    rng.choice(WORDS),
                    chr(rng.choice([ord(c) for c in rng.choice(PLANES)[:500]])),
                    "".join(rng.choices("abelo ", k=rng.randint(1, 20))),
                ]
            )
            for _ in range(rng.randint(1, 30))
        ]
        out.append("".join(parts))
    return out
