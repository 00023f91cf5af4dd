"""Masks of grammars: against an oracle on small vocabularies, and on whole answers of real tokenizers."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.api.structured import read_grammar
from headrace.core.errors import BackendUnavailable, GrammarError
from headrace.text import grammar as grammar_module
from headrace.text.grammar import GrammarCompiler, Matcher, Vocabulary
from headrace.text.parts import TokenizerParts
from headrace.text.sentencepiece import SentencePiece
from headrace.text.tokenizer import Tokenizer, load_tokenizer
from headrace.text.vocabulary import TokenBytes, build_vocabulary
from headrace.weights.checkpoint import open_checkpoint
from tests.unit.sentencepiece_cases import train
from tests.unit.test_detokenize import DECODERS, make
from tests.unit.test_sentencepiece import build

TEXTS = [
    *(b"", b"<eos>", b"<x>", b"a", b"b", b"ab", b"aa", b"aab", b"bb", b"1", b" ", b" a"),
    *(
        "é".encode(),
        b"\xc3",
        b"\xa9",
        b"\xa9a",
        "日".encode(),
        b"\xe6\x97",
        b"\xa5",
        b"a\xe6",
        b"a",
        b"\xff",
        b"\x00",
        b"",
        b"\x97",
    ),
]
EOS, SPECIAL = 1, 2
SMALL = Vocabulary(tuple(TEXTS), frozenset((EOS, SPECIAL)), frozenset((EOS,)))


def ids(mask: bytes) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")).tolist())


@cache
def small() -> GrammarCompiler:
    return GrammarCompiler(SMALL)


ATOMS = st.sampled_from(["a", "b", "ab", "1", " ", "é", "日", "(?:a|é)", "(?:ab|aab|b)"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "?", "+", "{2}", "{0,2}", "{1,3}"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=150)
@given(PATTERNS, st.randoms(use_true_random=False))
def test_masks_equal_partial_matching(pattern: str, rng: random.Random) -> None:
    """A token is allowed iff its bytes keep the text a beginning of some match."""
    oracle = regex.compile(pattern.encode())
    matcher = small().compile(f"start: /{pattern}/").start()
    text = b""
    for _ in range(6):
        allowed = ids(matcher.mask())
        wanted = {i for i, data in enumerate(TEXTS) if data and i not in (EOS, SPECIAL)}
        wanted = {i for i in wanted if oracle.fullmatch(text + TEXTS[i], partial=True)}
        if oracle.fullmatch(text):
            wanted.add(EOS)
        assert allowed == wanted, text
        if not (go_on := sorted(allowed - {EOS})):
            break
        chosen = rng.choice(go_on)
        matcher.advance([chosen])
        text += TEXTS[chosen]


def test_the_end() -> None:
    grammar = small().compile("start: /a+/ | <x>")
    matcher = grammar.start(stop_ids=(9, 3, 10**6))
    assert ids(matcher.mask()) == {3, 6, 20, SPECIAL}
    matcher.advance([SPECIAL])
    assert ids(matcher.mask()) == {EOS, 9, 3} and not matcher.stopped
    matcher.advance([9])
    assert matcher.stopped and ids(matcher.mask()) == {EOS, 9, 3}
    matcher.advance([EOS, 4, 4])  # an answer that goes on past its end is no longer followed
    assert ids(matcher.mask()) == {EOS, 9, 3}
    matcher = grammar.start()
    matcher.advance([3, 3])
    assert ids(matcher.mask()) == {3, 6, 20, EOS}
    with pytest.raises(GrammarError, match=r"^the grammar: "):
        matcher.advance([4])
    with pytest.raises(GrammarError):
        matcher.mask()


def test_what_is_no_text_is_never_matched() -> None:
    everything = ids(small().compile(r"start: /(?s:.)*/").start().mask())
    assert everything.isdisjoint({0, 23, SPECIAL, 21}) and {EOS, 13, 17, 22} <= everything
    assert 14 not in everything  # a byte that continues a character, where none has begun
    wild = ids(small().compile("start: <[*]>").start().mask())
    assert SPECIAL in wild and wild.isdisjoint({0, 23})  # padding


def test_forcing_cannot_be_switched_on() -> None:
    """llguidance would allow one spelling of what is certain, and ask a tokenizer which."""
    for settings_line in ("", '%llguidance {"no_forcing": false}\n'):
        matcher = small().compile(settings_line + 'start: "aa" "b" // end').start()
        assert ids(matcher.mask()) == {3, 6, 7, 20}
    forced = small().compile('{"grammars": [{"lark_grammar": "start: \\"aab\\""}]}').start()
    assert ids(forced.mask()) <= {3, 6, 7, 20}  # its own JSON may: still no other text


def test_no_way_on_is_an_error() -> None:
    compiler = GrammarCompiler(Vocabulary((b"a", b"<x>"), frozenset((1,)), frozenset()))
    with pytest.raises(GrammarError, match=r"give stop_token_ids$"):
        compiler.compile('start: "a"').start()
    matcher = compiler.compile('start: "ab"').start(stop_ids=(1,))
    assert ids(matcher.mask()) == {0}
    matcher.advance([0])
    for dead_end in (matcher, compiler.compile('start: "b"').start(stop_ids=(1,))):
        with pytest.raises(GrammarError, match=r"cannot spell"):
            dead_end.mask()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("start: (", r"^the grammar: 1\(9\): Expected token '\)'"),
        ("start: a\n\nb: b", r"^the grammar: .*"),
        ("x: /a/", "^the grammar: .*"),
        (r"start: /a\1/", "backreferences are not supported$"),
        ("start: /(?=a)/", "look-around.* is not supported$"),
        ("start: /(/", "unclosed group"),
        ('start: %json {"type": "nothing"}', "^the grammar: "),
        ('start: %json {"type": "string", "not": {}}', "^the grammar: "),
        ('start: %json {"$ref": "http://example.com/a.json"}', "^the grammar: "),
        ('start: %json {"$ref": "#/$defs/a"}', "^the grammar: "),
        ("start: %json {", "^the grammar: "),
        ("{", "^the grammar: "),
        ("{}", "^the grammar: "),
        ("", "^the grammar: "),
        ("start: @other", "^the grammar: "),
        ("\x00", "^the grammar: "),
    ],
)
def test_faults_are_told_on_one_line(source: str, reason: str) -> None:
    with pytest.raises(GrammarError, match=reason) as caught:
        small().compile(source).start().mask()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and "no_forcing" not in message and "non-verbose" not in message


def test_a_costly_answer_ends() -> None:
    """A grammar whose every letter can be read in very many ways is given up within the request's allowance."""
    matcher = small().compile('start: s\ns: s s s | s s | "a" | \n').start()
    began = time.thread_time()
    worst = 0.0
    with pytest.raises(GrammarError, match=r"^the grammar"):
        for _ in range(400):
            before = time.thread_time()
            matcher.mask()
            matcher.advance([3])
            worst = max(worst, time.thread_time() - before)
    assert time.thread_time() - began < 2 and worst < 0.2


def test_vocabularies_pack() -> None:
    vocabulary = Vocabulary((b"a", b"", "é".encode(), b" b"), frozenset((1, 2)), frozenset((2,)), {3: b"b", 0: b""})
    again = Vocabulary.unpack(vocabulary.pack())
    for name in ("tokens", "special", "eos_ids", "firsts"):
        assert getattr(again, name) == getattr(vocabulary, name)
    assert list(again.firsts) == [3, 0]
    assert Vocabulary.unpack(Vocabulary((), frozenset(), frozenset()).pack()).tokens == ()


# ---------------------------------------------------------------- tokenizers

TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {name: (lambda name=name: make(name)) for name in DECODERS}
TOKENIZERS |= {
    f"gguf_{name}": (lambda name=name: build(train(name))) for name in ("llama", "gemma", "unigram", "collapse")
}


@cache
def tokenizer_of(name: str) -> Tokenizer:
    return TOKENIZERS[name]()


@cache
def compiler_of(name: str) -> GrammarCompiler:
    tokenizer = tokenizer_of(name)
    return GrammarCompiler(build_vocabulary(tokenizer, tokenizer.vocab_size + 5))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_joined_are_the_text(name: str) -> None:
    tokenizer, vocabulary = tokenizer_of(name), compiler_of(name).vocabulary
    known = TokenBytes(tokenizer)
    rng = random.Random(5)
    usable = [i for i, data in enumerate(vocabulary.tokens) if data and i not in vocabulary.special]
    assert all(known.data(i) == vocabulary.tokens[i] for i in usable) and known.data(10**6) == b""
    checked = 0
    for _ in range(3000):
        chosen = rng.choices(usable, k=rng.randrange(1, 4))
        first = vocabulary.firsts.get(chosen[0], vocabulary.tokens[chosen[0]])
        if not first:
            continue  # leaves no text: what comes next might be the first
        data = first + b"".join(vocabulary.tokens[i] for i in chosen[1:])
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        assert tokenizer.decode(chosen) == text, chosen
        checked += 1
    assert checked > 500


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "none"])  # that one writes spaces between
def test_answers_are_words_of_the_language(name: str) -> None:
    """Of the text that a reader sees, the leading space of the first token and all."""
    tokenizer, compiler = tokenizer_of(name), compiler_of(name)
    alphabet = set(compiler.vocabulary.tokens)
    end = next(i for i in compiler.vocabulary.special)
    rng = random.Random(7)
    for pattern in (" ?(a|b){1,5}", "(é|日| )+(a|b)?", "(?s:.){1,6}", " a b"):
        oracle = regex.compile(pattern)
        ended = 0
        if name == "spm_strip_2" and pattern.startswith(" a"):
            continue  # no text of its begins with one space
        for _ in range(60):
            matcher = compiler.compile(f"start: /{pattern}/").start(stop_ids=(end,))
            chosen: list[int] = []
            for _ in range(12):
                allowed = sorted(ids(matcher.mask()))
                if end in allowed:
                    assert oracle.fullmatch(tokenizer.decode(chosen)), chosen
                    ended += 1
                go_on = [i for i in allowed if i != end]
                if not go_on:
                    break
                chosen.append(rng.choice(go_on))
                matcher.advance(chosen[-1:])
        assert ended or not {b" ", b"a"} <= alphabet


def test_what_ends_an_answer_is_no_text() -> None:
    """Also where the tokenizer does not call it special; and ids that the model has and the tokenizer lacks."""
    raw = make("byte_level").raw
    assert not isinstance(raw, SentencePiece)
    plain = raw.token_to_id("a")
    tokenizer = Tokenizer(TokenizerParts(raw, frozenset((plain, 10**6)), None, {}, None), "tokenizer.json")
    vocabulary = build_vocabulary(tokenizer, tokenizer.vocab_size + 3)
    assert plain in vocabulary.special and vocabulary.eos_ids == {plain}
    assert vocabulary.tokens[-3:] == (b"", b"", b"")
    allowed = ids(GrammarCompiler(vocabulary).compile("start: /[a-z]+/").start().mask())
    assert plain not in allowed and raw.token_to_id("b") in allowed


@pytest.fixture(scope="module")
def demo(demo_path: Path) -> Iterator[Tokenizer]:
    with open_checkpoint(demo_path) as checkpoint:
        yield load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def demo_compiler(demo: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(build_vocabulary(demo, 49_152))


def test_the_demo_vocabulary_is_built_quickly(demo: Tokenizer) -> None:
    times = []
    for _ in range(3):
        began = time.thread_time()
        compiler = GrammarCompiler(build_vocabulary(demo, 49_152))
        times.append(time.thread_time() - began)
    assert min(times) < 0.5
    matcher = compiler.compile("start: /(?s:.)*/").start()
    began = time.thread_time()
    for _ in range(200):
        assert len(matcher.mask()) == 6144
    assert (time.thread_time() - began) / 200 < 0.002


SCHEMAS: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
    (
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 12},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "tags": {"type": "array", "items": {"enum": ["é", "日本", "👩", "a\nb"]}, "minItems": 1, "maxItems": 3},
            },
            "required": ["name", "age", "tags"],
            "additionalProperties": False,
        },
        lambda v: (
            list(v) == ["name", "age", "tags"]
            and 1 <= len(v["name"]) <= 12
            and 0 <= v["age"] <= 150
            and 1 <= len(v["tags"]) <= 3
            and set(v["tags"]) <= {"é", "日本", "👩", "a\nb"}
        ),
    ),
    (
        {
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {"left": {"$ref": "#/$defs/node"}},
                    "additionalProperties": False,
                }
            },
            "$ref": "#/$defs/node",
        },
        lambda v: set(v) <= {"left"},
    ),
    (
        {
            "anyOf": [
                {"type": "string", "pattern": "^[à-ö]{2,5}$"},
                {"type": "boolean"},
                {"type": "null"},
                {"const": {"é": [1.5]}},
            ]
        },
        lambda v: v in (True, False, None, {"é": [1.5]}) or regex.fullmatch("[à-ö]{2,5}", v) is not None,
    ),
    ({"type": "string", "format": "date"}, lambda v: regex.fullmatch(r"\d{4}-\d\d-\d\d", v) is not None),
]


def sample(matcher: Matcher, vocabulary: Vocabulary, rng: random.Random) -> list[int]:
    """Any allowed token, by preference one that closes something."""
    chosen: list[int] = []
    for _ in range(400):
        allowed = sorted(ids(matcher.mask()))
        if rng.random() < 0.5:
            closing = [
                i
                for i in allowed
                if i in vocabulary.eos_ids or vocabulary.tokens[i].strip() in (b'"', b"}", b"]", b'"}')
            ]
            allowed = closing or allowed
        chosen.append(rng.choice(allowed))
        if chosen[-1] in vocabulary.eos_ids:
            return chosen[:-1]
        matcher.advance(chosen[-1:])
    pytest.fail("the answer has no end")


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_json_answers_parse_and_validate(demo: Tokenizer, demo_compiler: GrammarCompiler, number: int) -> None:
    schema, valid = SCHEMAS[number]
    compiled = demo_compiler.compile(read_grammar(None, {"json": schema}))
    rng = random.Random(number)
    for _ in range(15):
        chosen = sample(compiled.start(), demo_compiler.vocabulary, rng)
        text = demo.decode(chosen)
        assert valid(json.loads(text)), text


def test_white_space_ends(demo: Tokenizer, demo_compiler: GrammarCompiler) -> None:
    """A model that would write spaces for ever may write 64."""
    matcher = demo_compiler.compile(read_grammar({"type": "json_object"}, None)).start()
    matcher.advance(demo.encode("{", False))
    space = demo.encode(" ", False)
    for _ in range(64):
        matcher.advance(space)
    white = {i for i in ids(matcher.mask()) if not demo_compiler.vocabulary.tokens[i].strip()}
    assert white == set()


def test_choices_and_numbers(demo: Tokenizer, demo_compiler: GrammarCompiler) -> None:
    choices = ["yes", "no", 'maybe "so"\n', "", "日本語", "👩‍🚀", "\\", "yes!"]
    compiled = demo_compiler.compile(read_grammar(None, {"choice": choices}))
    rng = random.Random(1)
    seen = {demo.decode(sample(compiled.start(), demo_compiler.vocabulary, rng)) for _ in range(120)}
    assert seen == set(choices)


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'headrace\[serve\]'"):
        GrammarCompiler(SMALL)
