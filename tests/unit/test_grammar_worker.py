"""The process that checks grammars: limits, hostile grammars, verdicts, and that it never outlives its use."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.api.structured import read_grammar
from headrace.core.errors import BackendUnavailable, EngineError, GrammarError, HeadraceError, QueueFull
from headrace.text import grammar as grammar_module
from headrace.text.grammar import Vocabulary
from headrace.text.grammar_worker import GrammarChecker, GrammarLimits, _Verdict

MIB = 2**20
BYTES = Vocabulary((b"<eos>", *(bytes([byte]) for byte in range(256)), b"ab", b'{"'), frozenset((0,)), frozenset((0,)))


@pytest.fixture
def checker() -> Iterator[GrammarChecker]:
    checker = GrammarChecker(lambda: BYTES)
    yield checker
    checker.close()


def pid_of(checker: GrammarChecker) -> int:
    assert checker._child is not None
    return checker._child.pid


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def of_schema(schema: Any) -> str:
    return "start: %json " + json.dumps(schema)


def of_regex(pattern: str) -> str:
    return read_grammar(None, {"regex": pattern})


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def chain(kind: str, count: int) -> dict[str, Any]:
    parts = {f"a{i}": {kind: [{"$ref": f"#/$defs/a{i + 1}"}, {"type": "object"}]} for i in range(count)}
    return {"$defs": parts | {f"a{count}": {"type": "object"}}, "$ref": "#/$defs/a0"}


PROPERTIES = {f"p{i}": {"type": "integer"} for i in range(5000)}
FINE = {
    "nested quantifier": of_regex("(a+)+b"),
    "many ways": of_regex("(a|aa)*c"),
    "many repeats": of_regex("x{1000}{1000}"),
    "long class": of_regex(r"(\p{L}|\p{N}|\p{P}){0,5000}"),
    "subset blow-up": of_regex("(a|b)*a(a|b){30}"),
    "nested": of_schema(nested(40)),
    "recursive": of_schema({"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}),
    "1000 properties": of_schema({"type": "object", "properties": {f"p{i}": {} for i in range(1000)}}),
    "enum": of_schema({"enum": [f"value {i} {i * 7919 % 1000}" for i in range(3000)]}),
    "long array": of_schema({"type": "array", "minItems": 10**9}),
    "choices": read_grammar(None, {"choice": [f"choice {i}" for i in range(1024)]}),
    "references": of_schema(chain("anyOf", 30)),
}
HOSTILE = {
    **FINE,
    "deep": of_schema(nested(60)).replace('{"type": "integer"}', '{"items":' * 1000 + "{}" + "}" * 1000),
    "brackets": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000,
    "deep regex": of_regex("(" * 20_000 + "a" + ")" * 20_000),
    "stars": of_regex("(" * 200 + "a" + ")*" * 200),
    "loop": of_schema({"$ref": "#"}),
    "two in a loop": of_schema(
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    ),
    "2000 properties": of_schema({"type": "object", "properties": {f"p{i}": {} for i in range(2000)}}),
    "5000 properties": of_schema({"type": "object", "properties": PROPERTIES}),
    "5000 required": of_schema({"type": "object", "properties": PROPERTIES, "required": list(PROPERTIES)}),
    "long chain": of_schema(chain("allOf", 2000)),
    "chain": of_schema(chain("anyOf", 1000)),
    "product": of_schema(
        {"allOf": [{"anyOf": [{"properties": {f"{c}{i}": {"const": i}}} for c in "ab"]} for i in range(20)]}
    ),
    "remote": of_schema({"$ref": "http://localhost/a"}),
    "huge numbers": of_schema({"type": "number", "minimum": -1e300, "maximum": 1e300, "multipleOf": 1e-300}),
    "huge integers": of_schema({"type": "integer", "minimum": 10**40}),
    "long strings": of_schema({"type": "string", "minLength": 10**8, "maxLength": 10**9}),
    "intersections": "start: A\nA: " + " & ".join(f"/(?s:.)*{i}{i + 7}(?s:.)*/" for i in range(60)),
    "negations": "start: A\nA: " + "~(/a/ " * 300 + ")" * 300,
    "terminals": "start: A0\n" + "".join(f'A{i}: "a" A{i + 1}\n' for i in range(3000)) + 'A3000: "b"\n',
    "doubling": "start: A20\nA0: /[a-z]/\n" + "".join(f"A{i + 1}: A{i} A{i}\n" for i in range(20)),
    "squaring": "start: A6\nA0: /[ab]/\n" + "".join(f"A{i + 1}: A{i}{{50}} | A{i}\n" for i in range(6)),
    "left and right": 'start: s\ns: s s s | s s | "a" |\n',
    "empty loops": "start: a\na: b* b*\nb: a* | \n",
    "rules": "start: a0\n" + "".join(f'a{i}: "a" a{i + 1}\n' for i in range(3000)) + 'a3000: "b"\n',
    "gbnf chain": "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(3000)) + '\nr3000 ::= "a"',
    "gbnf brackets": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000,
    "nothing": "start: /[^\\x00-\\U0010ffff]/",
    "zeros": "\x00" * 10_000,
    "braces": "{" * 50_000,
    "quote": '"' * 50_001,
}


class Memory(threading.Thread):
    """The largest address space and resident size of the checker's processes above their first."""

    def __init__(self, checker: GrammarChecker) -> None:
        super().__init__(daemon=True)
        self.checker = checker
        self.base: dict[int, int] = {}
        self.peak = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            child = self.checker._child
            with contextlib.suppress(OSError, StopIteration, IndexError, ValueError):
                if child is None or not child._ready:
                    continue
                status = Path(f"/proc/{child.pid}/status").read_text()
                size = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
                self.peak = max(self.peak, size - self.base.setdefault(child.pid, size))


class Witness(threading.Thread):
    """A thread with other work to do; the longest time it had to wait."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest = 0.0
        self.done = threading.Event()

    def run(self) -> None:
        last = time.monotonic()
        while not self.done.wait(0.001):
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last), now


def test_hostile_grammars(checker: GrammarChecker) -> None:
    """Each is taken or refused in time; the next one is answered as if nothing had been."""
    checker.start()
    memory, witness = Memory(checker), Witness()
    memory.start()
    witness.start()
    slow: list[tuple[float, str]] = []
    try:
        for name, source in HOSTILE.items():
            began = time.monotonic()
            try:
                checker.check(source)
            except GrammarError as error:
                assert name not in FINE, (name, str(error))
                message = str(error)
                assert message.startswith("the grammar") and "\n" not in message and len(message) < 450
            slow.append((time.monotonic() - began, name))
            assert checker.check(f"start: /{name}/") == f"start: /{name}/"
    finally:
        memory.done.set()
        witness.done.set()
        memory.join()
        witness.join()
    assert max(slow)[0] < 4, max(slow)  # a busy machine; at most 0.9 s on an idle one
    assert memory.peak < 256 * MIB
    assert witness.longest < 0.5
    assert len(memory.base) > 3  # some were killed, and replaced


def test_each_limit_is_named(checker: GrammarChecker) -> None:
    short = GrammarChecker(lambda: BYTES, GrammarLimits(cpu_s=0.05))
    with pytest.raises(GrammarError, match=r"too complex: compiling it ran longer than 0\.05 s of CPU time$"):
        short.check(HOSTILE["gbnf chain"])
    short.close()
    with pytest.raises(GrammarError, match=r"too complex: compiling it takes more memory, or more stack, than"):
        checker.check(HOSTILE["terminals"])
    with pytest.raises(GrammarError, match=r"^the grammar has 600000 bytes, allowed: 524288$"):
        checker.check("a" * 600_000)
    with pytest.raises(GrammarError, match=r"^the grammar has a lone surrogate at character 2$"):
        checker.check("ab\ud800")
    with pytest.raises(GrammarError, match=r"^the grammar: Parser Error: Current row has \d+ items"):
        checker.check(HOSTILE["2000 properties"])
    with pytest.raises(GrammarError, match=r"^the grammar nests too deeply$"):
        checker.check(HOSTILE["gbnf brackets"])


def test_a_model_without_an_end_may_be_given_one() -> None:
    checker = GrammarChecker(lambda: Vocabulary((b"a", b"b"), frozenset(), frozenset()))
    assert checker.check("start: /b/") == "start: /b/"
    checker.close()


def test_gbnf_becomes_lark(checker: GrammarChecker) -> None:
    source = 'root ::= "a" [0-9]+ other | "\\u0042\\\\u0043" # comment\nother ::= "\\U0001F469" | root\n'
    written = checker.check(source)
    assert "start:" in written and '"👩"' in written and '"B\\\\u0043"' in written
    assert checker.check(source) == written == checker.check(written)
    for wrong, reason in (
        ("root ::= x", "Rule 'x' not found"),
        ("hello", "::="),
        ("root ::= (", "Expected"),
        ("rot ::= [a]", "root"),
    ):
        with pytest.raises(GrammarError, match=reason) as caught:
            checker.check(wrong)
        assert "it is read as GBNF" in str(caught.value)


def test_verdicts_are_remembered(checker: GrammarChecker) -> None:
    assert checker.check("start: /a/") == "start: /a/"
    with pytest.raises(GrammarError) as first:
        checker.check("start: (")
    gbnf = checker.check('root ::= "a"')
    os.kill(pid_of(checker), signal.SIGSTOP)  # it answers nothing more
    assert checker.check("start: /a/") == "start: /a/"
    assert checker.check('root ::= "a"') == gbnf
    with pytest.raises(GrammarError) as second:
        checker.check("start: (")
    assert str(second.value) == str(first.value)


def test_memory_of_verdicts_is_bounded(checker: GrammarChecker) -> None:
    for i in range(12_000):
        checker._verdicts.keep(i.to_bytes(32, "big"), _Verdict(reason="characters"))
    assert len(checker._verdicts._kept) == 4 * MIB // (512 + 4 * 10)
    assert checker._verdicts.find((0).to_bytes(32, "big")) is None
    assert checker._verdicts.find((11_999).to_bytes(32, "big")) is not None


def test_wall_time_is_bounded() -> None:
    checker = GrammarChecker(lambda: BYTES, GrammarLimits(wall_s=0.3))
    checker.start()
    os.kill(pid_of(checker), signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(GrammarError, match=r"ran longer than 0\.3 s$"):
        checker.check("start: /a/")
    assert 0.3 <= time.monotonic() - began < 3
    assert checker.check("start: /a/") == "start: /a/"  # that it took too long was no verdict on it
    checker.close()


def test_one_that_waits_too_long_is_told(checker: GrammarChecker) -> None:
    checker = GrammarChecker(lambda: BYTES, GrammarLimits(queue_s=0.1, wall_s=5))
    checker.start()
    pid = pid_of(checker)
    os.kill(pid, signal.SIGSTOP)
    first = threading.Thread(target=checker.check, args=("start: /first/",))
    first.start()
    time.sleep(0.1)
    with pytest.raises(QueueFull):
        checker.check("start: /second/")
    os.kill(pid, signal.SIGCONT)
    first.join()
    assert checker.check("start: /second/") == "start: /second/"
    checker.close()


def test_killed_from_outside_is_no_verdict(checker: GrammarChecker) -> None:
    checker.start()
    os.kill(pid_of(checker), signal.SIGKILL)
    while running(pid_of(checker)):
        time.sleep(0.01)
    assert checker.check("start: /a/") == "start: /a/"
    os.kill(pid_of(checker), signal.SIGSTOP)
    threading.Timer(0.2, os.kill, (pid_of(checker), signal.SIGKILL)).start()
    with pytest.raises(GrammarError, match=r"ended its process \(signal 9\)$"):
        checker.check("start: /b/")
    assert checker.check("start: /b/") == "start: /b/"


def test_what_the_process_holds(checker: GrammarChecker) -> None:
    checker.start()
    pid = pid_of(checker)
    assert Path(f"/proc/{pid}/environ").read_bytes() == b""
    links = {str(entry.readlink()).partition(":")[0] for entry in Path(f"/proc/{pid}/fd").iterdir()}
    assert links == {"socket", "/dev/null", f"/proc/{pid}/statm"}
    assert os.getsid(pid) == pid
    for limit, value in (
        (resource.RLIMIT_NOFILE, 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_STACK, MIB),
    ):
        assert resource.prlimit(pid, limit) == (value, value)
    space = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    assert space <= resource.prlimit(pid, resource.RLIMIT_AS)[1] <= space + 256 * MIB
    assert not any(name in Path(f"/proc/{pid}/maps").read_text() for name in ("numpy", "torch", "tokenizers"))


def test_one_that_has_grown_is_replaced() -> None:
    """Nobody notices: every grammar has its full share of memory."""
    checker = GrammarChecker(lambda: BYTES, GrammarLimits(memory_bytes=12 * MIB))
    pids = set()
    for i in range(8):
        text = of_schema({"type": "object", "properties": {f"p{i}_{j}": {} for j in range(900)}})
        assert checker.check(text) == text
        checker.start()
        pids.add(pid_of(checker))
    assert len(pids) > 1
    checker.close()


def test_one_process_and_one_vocabulary_for_all_threads() -> None:
    asked: list[int] = []

    def make() -> Vocabulary:
        asked.append(1)
        return BYTES

    checker = GrammarChecker(make, GrammarLimits(queue_s=20))
    assert asked == [] and checker._child is None
    faults: list[HeadraceError] = []

    def work(name: int) -> None:
        try:
            for i in range(40):
                text = f"start: /{name % 3} {i}/"
                assert checker.check(text) == text
        except HeadraceError as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and asked == [1]
    pid = pid_of(checker)
    checker.close()
    checker.close()
    assert not running(pid)
    assert checker.check("start: /a/") == "start: /a/" and asked == [1]
    checker.close()


def test_it_never_outlives_its_parent() -> None:
    code = (
        "import os, signal\nfrom headrace.text.grammar import Vocabulary\n"
        "from headrace.text.grammar_worker import GrammarChecker\n"
        "checker = GrammarChecker(lambda: Vocabulary((b'a', b'<e>'), frozenset((1,)), frozenset((1,))))\n"
        "checker.check('start: /a/')\nprint(checker._child.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid, deadline = int(done.stdout), time.monotonic() + 20
    while running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_cannot_start(monkeypatch: pytest.MonkeyPatch, checker: GrammarChecker) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match=r"^the process for grammars did not start: exit status 1$"):
        checker.check("start: /a/")
    monkeypatch.undo()
    assert checker.check("start: /a/") == "start: /a/"


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch, checker: GrammarChecker) -> None:
    monkeypatch.setattr(grammar_module, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'headrace\[serve\]'"):
        checker.check("start: /a/")
