"""Grammars of running requests: compiled once, followed through preemptions, failing alone."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from headrace.core.errors import BackendUnavailable, EngineError, GrammarError
from headrace.core.types import Request, SamplingParams
from headrace.engine.grammars import Grammars
from headrace.text import grammar as grammar_module
from headrace.text.grammar import Grammar, GrammarCompiler, Vocabulary

EOS = 0
WORDS = Vocabulary((b"<eos>", b"a", b"b", b"c", b"ab", b""), frozenset((EOS,)), frozenset((EOS,)))
ABC = "start: /a(b|c)*/"


def bits(*ids: int) -> bytes:
    return bytes([sum(1 << i for i in ids)])


def request(name: str, grammar: str = ABC, **sampling: object) -> Request:
    return Request(name, (1, 2), SamplingParams(**sampling), grammar=grammar)  # type: ignore[arg-type]


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    grammars = Grammars(lambda: WORDS)
    yield grammars
    grammars.close()


def wait(grammars: Grammars, name: str) -> None:
    deadline = time.monotonic() + 20
    while grammars.state(name) == "compiling":
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_an_answer_is_followed(grammars: Grammars) -> None:
    grammars.begin(request("r", stop_token_ids=(3,)))
    wait(grammars, "r")
    output: list[int] = []
    assert grammars.mask("r", output) == bits(1, 4)
    output.append(4)
    assert grammars.mask("r", output) == bits(2, 3, EOS) == grammars.mask("r", output)
    output += [2, 2]
    assert grammars.mask("r", tuple(output)) == bits(2, 3, EOS)
    grammars.drop("r")
    grammars.drop("r")
    with pytest.raises(KeyError):
        grammars.state("r")


def test_the_same_tokens_again_and_others(grammars: Grammars) -> None:
    """After a preemption, or where drafts were taken back."""
    grammars.begin(request("r", "start: /ab/ | /cc/"))
    wait(grammars, "r")
    assert grammars.mask("r", [1]) == bits(2)
    assert grammars.mask("r", []) == bits(1, 3, 4)
    assert grammars.mask("r", [3]) == bits(3)
    assert grammars.mask("r", [1]) == bits(2)
    assert grammars.mask("r", [1, 2]) == bits(EOS)
    assert grammars.mask("r", [1, 2, EOS]) == bits(EOS)
    assert grammars.mask("r", [3, 3]) == bits(EOS)


def test_one_compilation_for_all_of_one_text(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_one = GrammarCompiler.compile

    def counted(self: GrammarCompiler, text: str) -> Grammar:
        compiled.append(text)
        return compile_one(self, text)

    monkeypatch.setattr(GrammarCompiler, "compile", counted)
    for name in range(32):
        grammars.begin(request(f"r{name}"))
    for name in range(32):
        wait(grammars, f"r{name}")
        assert grammars.mask(f"r{name}", [1] if name % 2 else []) == (bits(2, 3, EOS) if name % 2 else bits(1, 4))
    assert compiled == [ABC]
    for name in range(40):  # the oldest are forgotten, those in use go on
        grammars.begin(request(f"o{name}", f"start: /a{{{name}}}/"))
    wait(grammars, "o39")
    assert len(grammars._cache) == 32 and ABC not in grammars._cache
    assert grammars.mask("r0", [1, 2]) == bits(2, 3, EOS)
    large = [f"start: /a/ // {'x' * 400_000} {i}" for i in range(4)]
    for i, text in enumerate(large):
        grammars.begin(request(f"l{i}", text))
    assert list(grammars._cache) == large[-2:]


def test_one_that_is_wrong_fails_alone(grammars: Grammars) -> None:
    grammars.begin(request("bad", "start: ("))
    grammars.begin(request("good"))
    wait(grammars, "good")
    for _ in range(2):
        with pytest.raises(GrammarError, match=r"^the grammar: "):
            wait(grammars, "bad")
    with pytest.raises(GrammarError):
        grammars.mask("bad", [])
    with pytest.raises(GrammarError, match=r"does not|doesn't"):
        grammars.mask("good", [2])
    grammars.begin(request("again"))
    wait(grammars, "again")
    assert grammars.mask("again", [1]) == bits(2, 3, EOS)


def test_a_model_without_an_end() -> None:
    endless = Grammars(lambda: Vocabulary((b"a", b"b"), frozenset(), frozenset()))
    endless.begin(request("r", "start: /a+/"))
    with pytest.raises(GrammarError, match=r"give stop_token_ids$"):
        wait(endless, "r")
    endless.begin(request("s", "start: /a+/", stop_token_ids=(1,)))
    wait(endless, "s")
    assert endless.mask("s", [0]) == bits(0, 1)
    endless.close()


def test_begin_does_not_wait() -> None:
    def slowly() -> Vocabulary:
        time.sleep(0.2)
        return WORDS

    grammars = Grammars(slowly)
    began = time.monotonic()
    grammars.begin(request("r"))
    assert grammars.state("r") == "compiling" and time.monotonic() - began < 0.15
    with pytest.raises(EngineError, match="not compiled yet"):
        grammars.mask("r", [])
    wait(grammars, "r")
    grammars.close()
    grammars.close()


def test_a_vocabulary_that_cannot_be_made_is_no_fault_of_the_request() -> None:
    def broken() -> Vocabulary:
        raise RuntimeError("no\nvocabulary")

    grammars = Grammars(broken)
    grammars.begin(request("r"))
    with pytest.raises(EngineError, match=r"^RuntimeError in the grammar: no vocabulary$"):
        wait(grammars, "r")
    grammars.close()


def test_without_llguidance(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"headrace\[serve\]"):
        grammars.begin(request("r"))
