"""`headrace chat` and `doctor` as a user meets them: through a real pseudo-terminal, and through pipes."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pexpect
import pyte
import pytest

from headrace import LLM, SamplingParams
from headrace.core.config import EngineConfig
from headrace.core.sizing import kv_bytes_per_token
from headrace.core.types import FinishEvent, FinishReason, TokenEvent
from headrace.engine.answer import Answer
from headrace.engine.model import OpenModel
from headrace.testing.checkpoints import tiny_checkpoint

pytestmark = pytest.mark.demo

COMMAND = (sys.executable, "-m", "headrace.cli.main")
SMALL = ("--threads", "1", "--max-model-len", "512")
SGR = re.compile(r"\x1b\[[0-9;]*m")
WAIT_S = 60.0


class Terminal:
    """A process on a pseudo-terminal, and the screen as a person would see it."""

    def __init__(self, *arguments: str, state: Path, **environment: str) -> None:
        self.raw = ""
        self.screen = pyte.Screen(80, 60)
        self._stream = pyte.Stream(self.screen)
        inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
        own = {"TERM": "xterm-256color", "XDG_STATE_HOME": str(state), "INPUTRC": "/dev/null", "OMP_NUM_THREADS": "1"}
        self.process = pexpect.spawn(
            COMMAND[0], [*COMMAND[1:], *arguments], dimensions=(60, 80), env=inherited | own | environment,
            encoding="utf-8", timeout=WAIT_S,
        )  # fmt: skip
        self.process.delaybeforesend = None

    def read(self, seconds: float = 0.05) -> str:
        """What came in this time; all of it is on the screen."""
        try:
            new = self.process.read_nonblocking(4096, seconds)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return ""
        self.raw += new
        self._stream.feed(new)
        return new

    def until(self, reached: Callable[[], bool]) -> None:
        limit = time.monotonic() + WAIT_S
        while not reached():
            assert time.monotonic() < limit, self.text
            self.read()

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines).rstrip()

    @property
    def at_prompt(self) -> bool:
        return self.screen.cursor.x == 2 and self.lines[self.screen.cursor.y] == ">"

    def say(self, keys: str) -> str:
        """Types a line at the prompt; returns what is on the screen between it and the next prompt."""
        self.until(lambda: self.at_prompt)
        self.process.send("\x0c")  # readline clears the screen
        self.until(lambda: self.at_prompt and self.screen.cursor.y == 0)
        self.process.send(keys + "\r")
        self.until(lambda: self.at_prompt and self.screen.cursor.y > 0)
        return "\n".join(self.lines[1 : self.screen.cursor.y]).strip("\n")

    def type(self, keys: str, shown: str) -> None:
        self.process.send(keys)
        self.until(lambda: shown in self.text)

    def interrupt(self, reached: Callable[[], bool]) -> None:
        """Ctrl-C until it is heard: CPython's readline does not hear one that comes after it has written its prompt and
        before it waits for keys (it acts at the next key)."""
        limit = time.monotonic() + WAIT_S
        while not reached():
            assert time.monotonic() < limit, self.text
            self.process.send("\x03")
            again = time.monotonic() + 2
            while not reached() and time.monotonic() < again:
                self.read()

    def end(self) -> int:
        """The exit status, a signal's negative."""
        limit = time.monotonic() + WAIT_S
        while self.process.isalive():
            assert time.monotonic() < limit, self.text
            self.read()
        while self.read():
            pass
        self.process.close()
        status = self.process.exitstatus
        return -self.process.signalstatus if status is None else status

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.process.child_fd)[3] & termios.ECHO)


@pytest.fixture(scope="module")
def chat(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """One conversation, which the tests take up in turn."""
    terminal = Terminal("chat", "demo", *SMALL, "--quant", "none", state=tmp_path_factory.mktemp("state"))
    yield terminal
    terminal.process.close(force=True)


def test_greeting_and_first_answer(chat: Terminal) -> None:
    chat.until(lambda: chat.at_prompt)
    assert chat.lines[0] == "SmolLM2-135M-Instruct.Q4_1"
    assert chat.lines[1] == "native, float32, 1 thread, context of 512 tokens"
    assert "reading weights" not in chat.text, "a line while it loads, if that takes long enough to see, and gone after"
    assert chat.say("What is the capital of France?") == "The capital of France is Paris."
    assert SGR.search(chat.raw)


def test_next_turn_knows_the_first_and_reuses_its_blocks(chat: Terminal) -> None:
    assert "Rome" in chat.say("And of Italy?")
    stats = chat.say("/stats")
    prompt, cached = map(int, re.search(r"prompt +(\d+) tokens, (\d+) of them", stats).groups())  # type: ignore[union-attr]
    assert prompt > cached >= 32
    assert re.search(r"context +\d+ of 512 tokens used", stats)


def test_answer_streams_and_ctrl_c_stops_it(chat: Terminal) -> None:
    chat.until(lambda: chat.at_prompt)
    chat.process.send("\x0cTell me a long story about a dog and a river.\r")
    chat.until(lambda: chat.at_prompt is False and len(chat.text) > 60)
    lengths = []
    while len(lengths) < 5:
        if chat.read():
            lengths.append(len(chat.text))
    assert lengths == sorted(lengths) and len(set(lengths)) >= 4, "the answer grows piece by piece"
    began = time.monotonic()
    chat.process.send("\x03")
    chat.until(lambda: chat.at_prompt)
    assert time.monotonic() - began < 5 and chat.lines[chat.screen.cursor.y - 2] == "[stopped]"
    assert "^C" not in chat.text
    assert "Paris" in chat.say("Again: what is the capital of France?"), "the next turn works"


@pytest.fixture
def talk() -> Iterator[Path]:
    """A file whose path fits into a line of the terminal, wherever pytest keeps its own."""
    with TemporaryDirectory() as folder:
        yield Path(folder) / "talk.json"


def test_what_was_stopped_stays_in_the_conversation(chat: Terminal, talk: Path) -> None:
    assert chat.say(f"/save {talk}").startswith("Written: ")
    messages = json.loads(talk.read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"] * 4
    assert [m.get("stopped", False) for m in messages[1::2]] == [False, False, True, False]
    assert len(messages[5]["content"]) > 20
    assert "File exists" in " ".join(chat.say(f"/save {talk}").split())


def test_keys_at_the_prompt(chat: Terminal) -> None:
    chat.until(lambda: chat.at_prompt)
    chat.type("half a line", "half a line")
    chat.interrupt(lambda: chat.at_prompt)
    assert "Ctrl-D or /quit leaves." not in chat.text
    chat.interrupt(lambda: "Ctrl-D or /quit leaves." in chat.text)
    chat.until(lambda: chat.at_prompt)
    chat.type("/he\t", "> /help")
    chat.process.send("\r")
    chat.until(lambda: chat.at_prompt)
    chat.process.send("\x1b[A")  # arrow up
    chat.until(lambda: chat.lines[chat.screen.cursor.y] == "> /help")
    chat.interrupt(lambda: chat.at_prompt)


def test_commands(chat: Terminal) -> None:
    shown = chat.say("/help")
    for name in ("/help", "/new", "/retry", "/undo", "/system", "/set", "/stats", "/save", "/quit"):
        assert re.search(rf"^{name}\b", shown, re.MULTILINE)
    assert "did you mean /retry?" in chat.say("/retyr")
    assert "/help lists them" in chat.say("/xyzzy")
    assert "temperature: got 9, allowed: a number from 0 to 2" in " ".join(chat.say("/set temperature 9").split())
    assert "field: got 'warmth', allowed:" in chat.say("/set warmth 1")
    assert re.search(r"^max_tokens +1024$", chat.say("/set"), re.MULTILINE)
    assert chat.say('/set stop ["Rome"]') == 'stop  ["Rome"]'
    assert chat.say("/set stop Paris") == 'stop  ["Paris"]'
    assert "Paris" not in chat.say("What is the capital of France?"), "no part of a stop string is shown"
    assert chat.say("/set stop []") == "stop  []"
    assert "Taken back: 'What is" in chat.say("/undo")
    assert "forgotten" in chat.say("/new")
    assert "nothing to take back" in chat.say("/undo")
    assert "nothing to answer again" in chat.say("/retry")


def test_messages_of_several_lines(chat: Terminal, talk: Path) -> None:
    chat.say("/new")
    chat.say("/set max_tokens 2")
    for keys in ('"""One\rtwo"""', "One\\\rtwo", "\x1b[200~One\ntwo\x1b[201~"):
        chat.until(lambda: chat.at_prompt)
        chat.process.send("\x0c" + keys + "\r")
        chat.until(lambda: "[cut at 2 tokens" in chat.text)
        chat.until(lambda: chat.at_prompt)
    chat.say(f"/save {talk}")
    assert [m["content"] for m in json.loads(talk.read_text())[::2]] == ["One\ntwo"] * 3


def test_control_characters_of_the_model_do_not_reach_the_terminal(chat: Terminal, demo_path: Path) -> None:
    opened = OpenModel(EngineConfig("demo"))
    (escape,) = opened.tokenizer.encode("\x1b")
    opened.close()
    chat.say("/new")
    chat.say(f"/set allowed_token_ids [{escape}]")
    chat.say("/set max_tokens 3")
    before = len(chat.raw)
    assert chat.say("Hi").startswith("[cut at 3 tokens")
    assert "\x1b\x1b" not in chat.raw[before:]
    chat.say("/set allowed_token_ids none")
    chat.say("/set max_tokens 1024")


def test_full_context_says_so_and_loses_nothing(chat: Terminal) -> None:
    chat.say("/new")
    chat.say("What is the capital of France?")
    shown = " ".join(chat.say("word " * 600).split())
    assert "the context is full" in shown and "/undo" in shown and "/new" in shown
    assert "Italy" in chat.say("And of Italy?"), "the conversation goes on as it was"
    assert "Lima" not in chat.text


def test_leaving_keeps_the_history_private(chat: Terminal) -> None:
    chat.until(lambda: chat.at_prompt)
    chat.process.send("\x04")
    assert chat.end() == 0
    state = Path(chat.process.env["XDG_STATE_HOME"])
    history = state / "headrace" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    typed = [json.loads(line) for line in history.read_text().splitlines()]
    assert typed[0] == "What is the capital of France?" and "/stats" in typed and "One\ntwo" in typed

    again = Terminal("chat", "demo", *SMALL, state=state, NO_COLOR="1")
    try:
        again.until(lambda: again.at_prompt)
        again.type("\x1b[A", "> And of Italy?")
        again.process.send("\x03")
        again.say("/help")
        assert not SGR.search(again.raw)
        again.process.send("Tell me a long story.\r")
        again.until(lambda: len(again.text.split()) > 140)
        assert not again.echoes
        again.process.kill(signal.SIGTERM)
        assert again.end() == 128 + signal.SIGTERM
    finally:
        again.process.close(force=True)


def test_sigterm_at_the_prompt_gives_the_terminal_back(demo_path: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a history cannot be written below a file")
    terminal = Terminal("chat", "demo", *SMALL, "--quant", "none", state=blocked, TERM="dumb")
    try:
        before = termios.tcgetattr(terminal.process.child_fd)
        terminal.until(lambda: terminal.at_prompt)
        terminal.type("/set top_k 5\r", "top_k  5")
        terminal.until(lambda: terminal.at_prompt)
        assert "\x1b" not in terminal.raw
        assert not terminal.echoes, "readline reads"
        terminal.process.kill(signal.SIGTERM)
        terminal.until(lambda: not terminal.process.isalive())
        assert termios.tcgetattr(terminal.process.child_fd)[3] == before[3]
        assert terminal.end() == 128 + signal.SIGTERM
    finally:
        terminal.process.close(force=True)


def piped(text: str | bytes, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    data = text if isinstance(text, bytes) else text.encode()
    done = subprocess.run(
        [*COMMAND, *arguments], input=data, capture_output=True, timeout=WAIT_S, env=dict(os.environ) | environment
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_pipe_gives_what_the_library_gives(demo_path: Path, tmp_path: Path) -> None:
    asked = ["Name three colours.", "And three animals.", "/retry", "\\ is a backslash \\"]
    lines = "\n".join(["", *asked[:3], "/nope", asked[3]])
    run = piped(lines, "chat", "demo", *SMALL, "--max-tokens", "24", "--system", "Be brief.", FORCE_COLOR="1")
    messages = [{"role": "system", "content": "Be brief."}]
    expected = []
    with LLM("demo", threads=1, max_model_len=512, max_num_seqs=1) as llm:
        for text in (asked[0], asked[1], asked[3]):
            messages.append({"role": "user", "content": text})
            answer = llm.chat(messages, max_tokens=24)[0].text
            messages.append({"role": "assistant", "content": answer})
            expected += [answer] * (2 if text == asked[1] else 1)
    assert run.stdout == "".join(f"{answer}\n" for answer in expected)
    assert "\x1b" not in run.stdout + run.stderr
    assert "headrace: error: unknown command '/nope'" in run.stderr and run.returncode == 1


def test_bad_input_of_a_pipe_is_refused_line_by_line(demo_path: Path) -> None:
    run = piped(b"\xff\n" + b"a" * 1_100_000 + b"\n//is this a command?\n", "chat", "demo", *SMALL, "--max-tokens", "2")
    assert run.returncode == 1 and run.stdout.count("\n") == 1
    errors = [line for line in run.stderr.splitlines() if "error" in line]
    assert len(errors) == 2 and "line 1: not UTF-8" in errors[0] and "line 2: longer than" in errors[1]


def test_text_is_shown_only_when_it_is_certain(demo_path: Path) -> None:
    """Token by token: no half character, and nothing of a stop string."""
    opened = OpenModel(EngineConfig("demo"))
    with closing(opened):
        ids = opened.tokenizer.encode("🙂 é 日本 EN and 🙂 END more")
        request = opened.request("r", "x", SamplingParams(stop=("END",)))
        answer = Answer(0, request, opened.tokenizer, 0.0)
    shown = []
    for token_id in ids:
        answer.tokens(TokenEvent("r", (token_id,), (), 0.0))
        shown.append(answer.take_text())
    completion = answer.end(FinishEvent("r", FinishReason.STOP, 1, len(ids), 0, 0.0))
    shown.append(answer.take_text())
    assert "".join(shown) == completion.text == "🙂 é 日本 EN and 🙂 "
    assert "\ufffd" not in completion.text and shown.count("") >= 4


def test_model_that_cannot_chat(tmp_path: Path) -> None:
    run = piped("Hi\n", "chat", str(tiny_checkpoint(tmp_path / "tiny")))
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "no tokenizer" in run.stderr


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import of it fails
from headrace.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_generate_needs_no_torch_and_little_memory(demo_path: Path) -> None:
    command = ("generate", "demo", "--prompt", "The capital of France is", "--max-tokens", "8", "--json", "--stats")
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command], capture_output=True, text=True, timeout=WAIT_S, check=True
    )
    answer, stats = (json.loads(line) for line in run.stdout.splitlines())
    assert "Paris" in answer["text"] and stats["stats"]["backend"] == "native"
    with closing(OpenModel(EngineConfig("demo"))) as opened:
        cache = 13 * kv_bytes_per_token(opened.spec, "float32")
        assert stats["stats"]["peak_rss_bytes"] < opened.checkpoint.nbytes + cache + 120 * 10**6


def test_doctor_on_the_demo_model(demo_path: Path) -> None:
    text = piped("", "doctor", "demo", HF_TOKEN="hf_secret")
    assert text.returncode == 0 and text.stderr == "" and "\x1b" not in text.stdout
    assert "hf_secret" not in text.stdout and "HF_TOKEN=set" in text.stdout
    assert max(map(len, text.stdout.splitlines())) <= 110
    found = json.loads(piped("", "doctor", "demo", "--json").stdout)
    assert found["usable"] and found["model"]["fits"] and found["model"]["layers"] == 30
    assert found["model"]["kv_bytes_per_token"] == 2 * 30 * 3 * 64 * 2, "bfloat16, beside packed weights"
    assert found["model"]["settings"]["dtype"] == {
        "value": "float32",
        "reason": found["model"]["settings"]["dtype"]["reason"],
    }
    assert found["model"]["settings"]["quant"]["value"] == "stored"
    assert found["model"]["loaded_weight_bytes"] == found["model"]["weight_bytes"] < 10**8
    assert [one["name"] for one in found["backends"] if one["available"]] == ["native", "torch"]
    assert found["auto"]["backend"] == found["model"]["settings"]["backend"]["value"] == "native"
