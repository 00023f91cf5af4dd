"""SentencePiece tokenizers out of GGUF files, against the sentencepiece library."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as RawTokenizer

from headrace.core.errors import CheckpointError, HeadraceError
from headrace.text.detokenize import Detokenizer
from headrace.text.gguf_tokenizer import build_gguf_tokenizer
from headrace.text.parts import TokenizerParts
from headrace.text.spm_normalizer import CharacterMap
from headrace.text.tokenizer import Tokenizer, load_tokenizer
from headrace.weights.checkpoint import open_checkpoint
from tests.unit.sentencepiece_cases import VARIANTS, hard_strings, metadata, processor, train, write_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def build(model: bytes, **changes: object) -> Tokenizer:
    values = metadata(model)
    if "precompiled_charsmap" in values:
        values["precompiled_charsmap"] = list(values["precompiled_charsmap"])
    values |= changes
    keyed = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None and "." not in key}
    keyed |= {key: value for key, value in values.items() if "." in key}
    return Tokenizer(build_gguf_tokenizer(keyed, "m.gguf"), "m.gguf")


@cache
def ours(name: str) -> Tokenizer:
    return build(train(name))


@cache
def strings() -> list[str]:
    return hard_strings(2000)


def spelled(name: str) -> re.Pattern[str]:
    """The control and unknown tokens of a model: encode reads them, the library does not."""
    pieces = proto.ModelProto.FromString(train(name)).pieces
    special = [piece.piece for piece in pieces if piece.type in (CONTROL, UNKNOWN)]
    return re.compile("(" + "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) + ")")


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_sentencepiece_on_2000_strings(name: str, tmp_path: Path) -> None:
    reference = processor(name)
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", train(name))) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.vocab_size == reference.get_piece_size()
    special = spelled(name)
    compared = 0
    for text in strings():
        ids = tokenizer.encode(text, add_special_tokens=False)
        parts = special.split(text)
        if len(parts) == 1:
            compared += 1
            assert ids == reference.encode(text), text[:80]
        else:
            by_part = (reference.encode(p) if i % 2 == 0 else [reference.piece_to_id(p)] for i, p in enumerate(parts))
            assert ids == [token_id for part in by_part for token_id in part], text[:80]
        plain = reference.encode(text)
        assert tokenizer.decode(plain) == reference.decode(plain), text[:80]
    assert compared > 1600


@pytest.mark.parametrize("name", VARIANTS)
def test_any_ids_decode_and_stream_as_in_sentencepiece(name: str) -> None:
    reference, tokenizer = processor(name), ours(name)
    rng = random.Random(3)
    size = reference.get_piece_size()
    starts = ["é", "👩‍🚀", "日本", "\ufffd", " ", "  a"]
    for _ in range(600):
        ids = [rng.randrange(size) for _ in range(rng.randint(0, 12))]
        if tokenizer.raw.byte_values:
            ids[2:2] = [tokenizer.raw.token_to_id(f"<0x{byte:02X}>") for byte in rng.choice(starts).encode()]
            ids[5:5] = [tokenizer.raw.token_to_id(f"<0x{rng.randrange(256):02X}>") for _ in range(rng.randint(0, 5))]
        if rng.random() < 0.3:
            ids[:0] = [tokenizer.raw.token_to_id(token) for token in ("<s>", "▁")]
        expected = reference.decode(ids)
        assert tokenizer.decode(ids) == expected
        cuts = sorted(rng.randint(0, len(ids)) for _ in range(rng.randint(0, 9)))
        for bounds in ([0, *cuts, len(ids)], range(len(ids) + 1)):
            detokenizer = Detokenizer(tokenizer)
            pieces = [detokenizer.push(ids[low:high]) for low, high in pairwise(bounds)]
            assert "".join(pieces) + detokenizer.finish() == expected


@pytest.mark.parametrize("name", ["llama", "gemma", "unigram"])
def test_streamed_text_has_no_half_characters(name: str) -> None:
    tokenizer = ours(name)
    for text in strings()[:600]:
        detokenizer = Detokenizer(tokenizer)
        out = [detokenizer.push([token_id]) for token_id in tokenizer.encode(text, add_special_tokens=False)]
        assert detokenizer.finish() == ""
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in out)
        if not spelled(name).search(text):
            # ▁ is how a space is written: it cannot come back.
            assert "".join(out) == text.replace("▁", " ")


def test_special_tokens_shown_or_not() -> None:
    tokenizer = ours("llama")
    ids = tokenizer.encode("<s> a</s> b")
    assert [tokenizer.raw.id_to_token(i) for i in ids[:2]] == ["<s>", "<s>"]  # one is added, one is spelled
    assert tokenizer.decode(ids[1:]) == " a  b"
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == "<s>  a</s>  b"
    assert tokenizer.decode([tokenizer.raw.token_to_id("<unk>")], skip_special_tokens=False) == " ⁇ "
    assert tokenizer.decode([10**6, -1, *ids[1:]]) == " a  b"


def test_bos_and_eos() -> None:
    model = train("llama")
    plain = ours("llama").encode("a b", add_special_tokens=False)
    assert ours("llama").encode("a b") == [1, *plain]
    assert build(model, add_bos_token=False).encode("a b") == plain
    assert build(model, add_eos_token=True).encode("a b") == [1, *plain, 2]
    assert build(model, bos_token_id=None).encode("a b") == plain
    assert ours("t5").encode("a b") == ours("t5").encode("a b", add_special_tokens=False)
    assert ours("llama").eos_token_ids == {2} and ours("llama").bos_token_id == 1
    assert ours("llama").special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert build(model, add_space_prefix=False).encode(" a b", False) == plain
    with pytest.raises(CheckpointError, match="bos_token_id is missing"):
        build(model, add_bos_token=True, bos_token_id=None)


def test_a_template_that_writes_bos_gets_one() -> None:
    values = {"tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"}
    tokenizer = build(train("llama"), **values)
    tokenizer.start()
    ids = tokenizer.chat([{"role": "user", "content": "a</s>"}])
    assert ids == tokenizer.encode("[a</s>]") and ids.count(1) == 1
    tokenizer.close()


def test_phi3_tokens_take_the_white_space_after_them() -> None:
    model = train("user_defined")
    plain, phi3 = build(model), build(model, **{"general.architecture": "phi3"})
    text = "[INST] \n\u2003 a <s> b"
    assert phi3.encode(text) == plain.encode("[INST]a <s> b") != plain.encode(text)


# ---------------------------------------------------------------- models made by hand


def made(pieces: list[tuple[str, float, int]], unigram: bool, prefix: bool, collapse: bool, fallback: bool) -> bytes:
    model = proto.ModelProto()
    special = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    octets = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)] if fallback else []
    for piece, score, kind in [*special, *octets, *pieces]:
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = proto.TrainerSpec.UNIGRAM if unigram else proto.TrainerSpec.BPE
    trainer.byte_fallback = fallback
    model.normalizer_spec.add_dummy_prefix = prefix
    model.normalizer_spec.remove_extra_whitespaces = collapse
    model.normalizer_spec.escape_whitespaces = True
    return bytes(model.SerializeToString())


@st.composite
def any_model(draw: st.DrawFn, unigram: bool) -> bytes:
    """Few letters, many pieces, equal scores, odd types: what a trainer would never write."""
    words = draw(st.lists(st.text("ab▁é", min_size=1, max_size=6), min_size=3, max_size=24, unique=True))
    kinds = (NORMAL, NORMAL, NORMAL, UNUSED) if unigram else (NORMAL, NORMAL, NORMAL, UNUSED, USER_DEFINED)
    # Sums of these are exact in float32, so that equal paths of a unigram model are equal.
    pieces = [(word, float(draw(st.integers(-6, 0))), draw(st.sampled_from(kinds))) for word in words]
    if all(kind != NORMAL for _, _, kind in pieces):
        pieces.append(("c", -1.0, NORMAL))
    flags = [draw(st.booleans()) for _ in range(3)]
    return made(pieces, unigram, *flags)


@pytest.mark.parametrize("unigram", [False, True])
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_model_equals_sentencepiece(unigram: bool, data: st.DataObject) -> None:
    model = data.draw(any_model(unigram))
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = build(model)
    for text in data.draw(st.lists(st.text("abé ▁x", max_size=40), min_size=4, max_size=8)):
        ids = reference.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("llama", lambda: "a" * 1_000_000),
        ("llama", lambda: "日本語テスト" * 166_667),
        ("llama", lambda: " ".join(random.Random(1).choices(["the", "quick", "fox", "naïve"], k=200_000))),
        ("t5", lambda: "the quick fox " * 70_000),
    ],
)
def test_a_megabyte_takes_seconds(name: str, make: Callable[[], str]) -> None:
    text = make()
    start = time.perf_counter()
    ids = ours(name).encode(text)
    assert time.perf_counter() - start < 60  # at most 5 s on an idle machine
    assert ids[-50:] == processor(name).encode(text)[-50:]


def size_of(name: str) -> int:
    return int(processor(name).get_piece_size())


BROKEN: list[tuple[str, object]] = [
    ("scores", None),
    ("scores", [1.0]),
    ("scores", "x"),
    ("scores", [float("nan")] * size_of("llama")),
    ("scores", [float("inf")] * size_of("llama")),
    ("scores", ["1"] * size_of("llama")),
    ("scores", [True] * size_of("llama")),
    ("token_type", [1] * 7),
    ("token_type", [9] * size_of("llama")),
    ("token_type", [1] * size_of("llama")),
    ("tokens", None),
    ("tokens", []),
    ("tokens", ["a"] * size_of("llama")),
    ("tokens", ["x" * 2000, *map(str, range(size_of("llama") - 1))]),
    ("unknown_token_id", 10**6),
    ("bos_token_id", -1),
    ("add_space_prefix", 1),
    ("remove_extra_whitespaces", "no"),
    ("precompiled_charsmap", "abc"),
    ("precompiled_charsmap", [300]),
    ("precompiled_charsmap", [1, 2]),
    ("precompiled_charsmap", [255] * 64),
    ("precompiled_charsmap", [4, 0, 0, 0, 0, 0, 0, 0] + [65] * 1000),
]


@pytest.mark.parametrize(("key", "value"), BROKEN, ids=lambda value: str(value)[:12])
def test_broken_metadata(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"^m\.gguf: (tokenizer\.ggml\.)?{key}") as caught:
        build(train("llama"), **{key: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_byte_tokens_are_all_or_none() -> None:
    values = metadata(train("llama"))
    for odd, message in (
        ("<0x1>", "'<0x1>', allowed: <0x00> to <0xFF>"),
        (None, "has 255 byte tokens, <0x00> is missing"),
    ):
        tokens, types = list(values["tokens"]), list(values["token_type"])
        at = tokens.index("<0x00>")
        tokens[at], types[at] = odd or "q", BYTE if odd else NORMAL
        with pytest.raises(CheckpointError, match=re.escape(message)):
            build(train("llama"), tokens=[f"{t}{i}" if t == "q" else t for i, t in enumerate(tokens)], token_type=types)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200), text=st.text(max_size=20))
def test_any_character_map_stays_in_bounds(data: bytes, text: str) -> None:
    framed = (len(data) // 8 * 4).to_bytes(4, "little") + data
    for given_data in (data, framed):
        values = metadata(train("llama")) | {"precompiled_charsmap": list(given_data)}
        keyed = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
        try:
            tokenizer = Tokenizer(build_gguf_tokenizer(keyed, "m.gguf"), "m.gguf")
        except HeadraceError:
            continue
        with_text = text.encode("utf-8", "ignore").decode()
        tokenizer.encode(with_text)


def test_a_character_map_that_was_made_by_hand() -> None:
    """One unit a node: "a" maps to the string at 0. darts-clone: offset << 10, has_leaf << 8, label; then the value."""
    units = [0] * 256
    units[0] = 1 << 10  # root: its children are at 1 ^ byte
    units[1 ^ ord("a")] = (0x10 ^ (1 ^ ord("a"))) << 10 | 1 << 8 | ord("a")
    units[0x10] = 1 << 31 | 2
    array = b"".join(unit.to_bytes(4, "little") for unit in units)
    characters = CharacterMap(len(array).to_bytes(4, "little") + array + b"x\0yz\0")
    assert characters.longest(b"a", 0) == (1, "yz")
    assert characters.longest(b"ba", 1) == (1, "yz")
    assert characters.longest(b"b", 0) is None


# ---------------------------------------------------------------- tokenizer.json of SentencePiece models


def converted(name: str) -> RawTokenizer:
    """A tokenizer.json as converters write one of a Llama model: merges by score, byte fallback, ▁ by normaliser."""
    values = metadata(train(name))
    tokens, scores, types = values["tokens"], values["scores"], values["token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [
        (scores[i], len(token[:at]), (token[:at], token[at:]))
        for token, i in vocab.items()
        if types[i] == NORMAL
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    ranked = [pair for _, _, pair in sorted(merges, key=lambda merge: -merge[0])]
    raw = RawTokenizer(models.BPE(vocab, ranked, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    raw.add_special_tokens(
        [AddedToken(t, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind == 3]
    )
    return raw


def test_a_folder_of_the_same_model_streams_the_same(tmp_path: Path) -> None:
    converted("llama").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))

    class Folder:
        path, config, format = tmp_path, {}, "hf"

    folder, gguf_file = load_tokenizer(Folder()), ours("llama")  # type: ignore[arg-type]
    same = 0
    for text in strings()[:800]:
        if spelled("llama").search(text):
            continue
        ids = gguf_file.encode(text, add_special_tokens=False)
        same += ids == folder.encode(text, add_special_tokens=False)
        detokenizer = Detokenizer(folder)
        out = "".join(detokenizer.push([token_id]) for token_id in ids) + detokenizer.finish()
        assert out == gguf_file.decode(ids) == text.replace("▁", " ")
    assert same > 700


def test_parts_name_what_they_are() -> None:
    parts = build_gguf_tokenizer({f"tokenizer.ggml.{k}": v for k, v in metadata(train("llama")).items()}, "m.gguf")
    assert isinstance(parts, TokenizerParts) and parts.raw.get_vocab_size() == size_of("llama")


def test_unused_pieces_are_taken_apart() -> None:
    pieces: list[Any] = [("a", -1.0, NORMAL), ("b", -2.0, NORMAL), ("ab", -3.0, UNUSED), ("abab", -4.0, NORMAL)]
    model = made(pieces, unigram=False, prefix=False, collapse=False, fallback=False)
    tokenizer, reference = build(model), sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ("ab", "abab", "ababab", "abb", "aab"):
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)
    assert tokenizer.tokens(tokenizer.encode("ab", add_special_tokens=False)) == ["a", "b"]
