"""Detokenizer against decoding all ids at once, for every kind of decoder."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from headrace.core.errors import UnsupportedModel
from headrace.text.detokenize import Detokenizer
from headrace.text.parts import TokenizerParts
from headrace.text.tokenizer import Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
PIECES = ["<unk>", "▁", "▁▁", "▁a", "b", "▁héllo", "👩", "\ufffd", "a▁b", "", " ", "end", "\n", "<0x>", "<0x0g>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPM = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "byte_level": decoders.ByteLevel(),
    "metaspace": decoders.Metaspace(),
    "metaspace_never": decoders.Metaspace(prepend_scheme="never"),
    "spm": decoders.Sequence([*SPM, decoders.Strip(" ", 1, 0)]),
    "spm_strip_2": decoders.Sequence([*SPM, decoders.Strip(" ", 2, 0)]),
    "gemma": decoders.Sequence(SPM),
    "replace": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]),
    "none": None,
}


def wrap(raw: RawTokenizer) -> Tokenizer:
    return Tokenizer(TokenizerParts(raw, frozenset(), None, {}, None), "tokenizer.json")


@cache
def make(name: str) -> Tokenizer:
    if name == "byte_level":
        vocab = {char: i for i, char in enumerate(ALPHABET)}
        vocab |= {token: 256 + i for i, token in enumerate(["Ġthe", "Ã©", "ðŁĳ©", "ï¿½", "Ġ日"])}
        raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    else:
        raw = RawTokenizer(models.WordLevel({token: i for i, token in enumerate(PIECES + BYTES)}, unk_token="<unk>"))
    raw.add_special_tokens(["<s>", "<|日本|>"])
    raw.add_tokens([AddedToken("<think>", normalized=False), AddedToken("two words", normalized=False)])
    if DECODERS[name] is not None:
        raw.decoder = DECODERS[name]
    return wrap(raw)


def stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> list[str]:
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    detokenizer = Detokenizer(tokenizer, skip)
    return [*(detokenizer.push(ids[low:high]) for low, high in pairwise(bounds)), detokenizer.finish()]


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    tokenizer = make(name)
    anything = st.integers(0, tokenizer.vocab_size + 2)
    text = st.sampled_from(["é", "日本", "👩‍🚀", "\ufffd", "a", " "]).flatmap(lambda s: st.just(spell(tokenizer, s)))
    byte_ids = st.integers(0, 255).map(lambda b: spell_byte(tokenizer, b))
    runs = st.lists(st.one_of(anything.map(lambda i: [i]), text, byte_ids), max_size=14)
    return runs.map(lambda lists: [i for run in lists for i in run])


def spell_byte(tokenizer: Tokenizer, byte: int) -> list[int]:
    token = f"<0x{byte:02X}>"
    found = tokenizer.raw.token_to_id(token)
    return [byte if found is None else found]


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    if tokenizer.decoder_rules.kind == "byte_level":
        table = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        return [tokenizer.raw.token_to_id(char) for char in table[0][0]]
    return [spell_byte(tokenizer, byte)[0] for byte in text.encode()]


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_joined_equals_decode_for_any_split(name: str, data: st.DataObject) -> None:
    tokenizer = make(name)
    ids = data.draw(ids_of(name))
    skip = data.draw(st.booleans())
    pieces = stream(tokenizer, ids, data.draw(st.lists(st.integers(0, 60), max_size=8)), skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip)
    assert "".join(pieces) == "".join(stream(tokenizer, ids, list(range(len(ids))), skip))


@pytest.mark.parametrize("name", ["spm", "spm_strip_2", "gemma"])
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_byte_fallback_equals_the_library_where_bytes_are_utf8(name: str, data: st.DataObject) -> None:
    """Where they are not, the library turns a whole run of bytes into U+FFFD, and we only the bad ones."""
    tokenizer = make(name)
    ids = data.draw(ids_of(name))
    skip = data.draw(st.booleans())
    theirs = tokenizer.raw.decode(ids, skip_special_tokens=skip)
    ours = tokenizer.decode(ids, skip)
    if "\ufffd" not in theirs:
        assert ours == theirs
    else:
        assert len(ours) <= len(theirs)


@pytest.mark.parametrize("name", ["byte_level", "spm"])
def test_no_half_characters(name: str) -> None:
    tokenizer = make(name)
    text = "é日👩‍🚀x"
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([token_id]) for token_id in spell(tokenizer, text)]
    assert [piece for piece in pieces if piece] == list(text)
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("name", ["byte_level", "spm"])
def test_invalid_bytes_are_not_held_for_ever(name: str) -> None:
    tokenizer = make(name)
    detokenizer = Detokenizer(tokenizer)
    out = ""
    bad = spell(tokenizer, "👩")[:1]
    for count in range(1, 50):
        out += detokenizer.push(bad)
        assert out == "\ufffd" * (count - 1)
    assert detokenizer.finish() == "\ufffd"


def test_literal_replacement_character_comes_out_at_once() -> None:
    tokenizer = make("byte_level")
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push([tokenizer.raw.token_to_id("ï¿½")]) == "\ufffd"


def test_special_token_ends_a_byte_run_only_when_shown() -> None:
    tokenizer = make("spm")
    first, second = spell(tokenizer, "é")
    special = tokenizer.raw.token_to_id("<s>")
    assert tokenizer.decode([first, special, second], skip_special_tokens=True) == "é"
    assert tokenizer.decode([first, special, second], skip_special_tokens=False) == "\ufffd<s>\ufffd"


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "b")]),
        decoders.Sequence([]),
    ],
)
def test_unknown_decoders_are_refused(decoder: decoders.Decoder) -> None:
    raw = RawTokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    raw.decoder = decoder
    with pytest.raises(UnsupportedModel, match=r"^tokenizer\.json: decoder is "):
        wrap(raw)
