"""What runs in the grammar process: reads grammars from fd 0, compiles each and computes its first masks.

Law: a grammar may spend its limits and the process, and nothing else. What the process gives up before it reads the
first one: see `child_channel`. Its stack is smaller than that of any thread which compiles the same grammar later: one
that nests too deeply ends this process, and no other.

The first frame is the vocabulary (`Vocabulary.pack`). A request is a grammar in UTF-8 (Lark, GBNF, or llguidance's
JSON), an answer one byte of kind and UTF-8: the grammar in llguidance's form, or what is wrong.
"""

from __future__ import annotations

import contextlib
import os
import re

from llguidance.gbnf_to_lark import any_to_lark

from headrace.core.errors import GrammarError
from headrace.text import child_channel as channel
from headrace.text.grammar import GrammarCompiler, Matcher, Vocabulary

TAKEN, FAULT, NO_MEMORY = b"t", b"f", b"m"
RETIRE = b"T"
"""Taken, and the process ends: it has grown, and the next grammar shall have its full share."""
_STACK_BYTES = 2**20
_PROBED = 4
"""Tokens of an answer that are tried."""
_SOME_STOP_ID = (0,)
"""A request may have one, where the model has none."""
_CODE_POINT = re.compile(r"\\\\|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})")


def main(memory_bytes: str, cpu_s: str) -> None:
    """Serves until the parent's end of the channel closes."""
    channel.restore_signals()
    memory = int(memory_bytes)
    parent = os.getppid()
    packed = channel.receive(parent)
    if packed is None:
        return
    compiler = GrammarCompiler(Vocabulary.unpack(packed))
    with contextlib.suppress(GrammarError):  # what is imported or built late
        compiler.compile(convert('root ::= "a" | "b"+')).start().mask()
    statm = channel.open_statm()
    used = channel.address_space(statm)
    channel.give_up(used + memory if used else None, _STACK_BYTES)
    channel.send(channel.READY)
    while (frame := channel.receive(parent)) is not None:
        channel.limit_cpu(float(cpu_s))
        answer = _answer(compiler, frame)
        channel.limit_cpu(0)
        if answer[:1] == TAKEN and channel.address_space(statm) > used + memory // 2:
            answer = RETIRE + answer[1:]
        channel.send(answer)
        if answer[:1] in (RETIRE, NO_MEMORY):
            return


def _answer(compiler: GrammarCompiler, frame: bytes) -> bytes:
    try:
        grammar = convert(frame.decode())
        probe(compiler.compile(grammar).start(stop_ids=_SOME_STOP_ID))
        return TAKEN + grammar.encode()
    except GrammarError as error:
        return FAULT + str(error).encode()
    except MemoryError:
        return NO_MEMORY


def probe(matcher: Matcher) -> None:
    """The first masks of an answer: some limits are met only after a token or two. Raises GrammarError."""
    for _ in range(_PROBED):
        mask = int.from_bytes(matcher.mask(), "little")
        lowest = (mask & -mask).bit_length() - 1
        matcher.advance([lowest])


def convert(grammar: str) -> str:
    """Lark and JSON as they are, GBNF as Lark. Raises GrammarError."""
    if grammar.lstrip().startswith("{"):
        return grammar
    try:
        return any_to_lark(_CODE_POINT.sub(_character, grammar) if "::=" in grammar else grammar)
    except RecursionError:
        raise GrammarError("the grammar nests too deeply") from None
    except MemoryError:
        raise
    except Exception as error:  # the converter raises bare Exception too
        reason = " ".join(str(error).split())[:300]
        raise GrammarError(f"the grammar: {reason}; it is read as GBNF, since no line begins 'start:'") from None


def _character(match: re.Match[str]) -> str:
    r"""The converter writes \u0041 as \u41, which llguidance does not know: the character itself is as good."""
    digits = match[1] or match[2]
    if digits is None:
        return match[0]
    code = int(digits, 16)
    plain = 0x20 < code < 0xD800 or 0xDFFF < code < 0x110000
    if not plain or chr(code) in '"\\[]^-':
        return match[0]
    return chr(code)
