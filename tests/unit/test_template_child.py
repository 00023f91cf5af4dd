"""The process that renders templates: limits, hostile templates, and that it never outlives its use."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from headrace.core.errors import EngineError, TemplateError
from headrace.text.template_worker import TemplateLimits, TemplateRenderer
from tests.unit.hostile_templates import HOSTILE

MIB = 2**20
SPIN = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
VARIABLES = {"messages": [{"role": "user", "content": "a"}], "tools": None, "add_generation_prompt": True}
INTERNALS = ("<class", "<function", "<built-in", "object at 0x", "<module", "root:", "uid=")


@pytest.fixture
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    renderer.close()


def pid_of(renderer: TemplateRenderer) -> int:
    assert renderer._child is not None
    return renderer._child.pid


def running(pid: int) -> bool:
    """Not so a process that has ended and waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while running(pid):
        assert time.monotonic() < deadline, "the template process is still there"
        time.sleep(0.01)


class PeakMemory(threading.Thread):
    """The largest resident size of the renderer's process above its first one, sampled every few milliseconds."""

    def __init__(self, renderer: TemplateRenderer) -> None:
        super().__init__(daemon=True)
        self.renderer = renderer
        self.base: dict[int, int] = {}
        self.peak = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.003):
            child = self.renderer._child
            with contextlib.suppress(OSError, StopIteration, IndexError, ValueError):
                if child is None or not child._ready:
                    continue
                status = Path(f"/proc/{child.pid}/status").read_text()
                line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
                size = int(line.split()[1]) * 1024
                self.peak = max(self.peak, size - self.base.setdefault(child.pid, size))


def test_hostile_templates() -> None:
    """Each is stopped by a limit, refused, or writes something harmless; the next rendering is right."""
    assert len(set(HOSTILE)) >= 150
    renderer = TemplateRenderer(TemplateLimits(cpu_s=0.1))
    memory = PeakMemory(renderer)
    memory.start()
    slow: list[tuple[float, str]] = []
    try:
        for source in HOSTILE:
            start = time.perf_counter()
            try:
                out = renderer.render(source, VARIABLES)
            except TemplateError as error:
                message = str(error)
                assert message.startswith(("the chat template ", "the messages and the template have "))
                assert "\n" not in message and len(message) < 400
                assert "ended its process" not in message, (source[:80], message)
            else:
                assert len(out) <= renderer.limits.output
                assert not any(mark in out for mark in INTERNALS), (source[:80], out[:200])
            slow.append((time.perf_counter() - start, source[:80]))
            assert renderer.render("{{ messages[0].content }}{{ 6 * 7 }}", VARIABLES) == "a42"
    finally:
        memory.done.set()
        memory.join()
        renderer.close()
    assert max(slow)[0] < 5, max(slow)  # a busy machine; 0.2 s on an idle one
    assert memory.peak <= 128_000_000
    assert len(memory.base) > 10  # many were killed, and replaced


def test_each_limit_is_named(renderer: TemplateRenderer) -> None:
    for source, message in (
        (SPIN, r"^the chat template ran longer than 1 s of CPU time$"),
        (
            "{% set n = namespace(l=[]) %}{% for i in range(99999) %}{% set n.l = n.l + ['x' * 99999] %}{% endfor %}",
            r"^the chat template needs more than 112 MiB of memory$",
        ),
        ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", r"^the chat template writes more than 4194304 char"),
        ("x" * (MIB + 1), r"^the chat template has 1048577 characters, allowed: 1048576$"),
    ):
        with pytest.raises(TemplateError, match=message):
            renderer.render(source, {})
        assert renderer.render("{{ 1 }}", {}) == "1"
    with pytest.raises(TemplateError, match=r"^the messages and the template have \d+ bytes, allowed: 20971520$"):
        renderer.render("x", {"messages": "x" * 20 * MIB})
    with pytest.raises(TemplateError, match=r"^the messages cannot be written as JSON"):
        renderer.render("x", {"n": 10**5000})
    small = TemplateRenderer(TemplateLimits(output=10))
    assert small.render("{{ 'é' * 10 }}", {}) == "é" * 10
    with pytest.raises(TemplateError, match="writes more than 10 characters"):
        small.render("12345678901", {})
    small.close()


def test_the_parents_signals_do_not_matter() -> None:
    """Ignored and blocked signals are inherited; CPU time ends by one."""
    renderer = TemplateRenderer(TemplateLimits(cpu_s=0.2))
    handler = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF, signal.SIGINT})
    try:
        with pytest.raises(TemplateError, match=r"of CPU time$"):
            renderer.render(SPIN, {})
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGPROF, handler)
        renderer.close()


def test_wall_time_is_bounded() -> None:
    renderer = TemplateRenderer(TemplateLimits(wall_s=0.3))
    assert renderer.render("{{ 1 }}", {}) == "1"
    os.kill(pid_of(renderer), signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(TemplateError, match=r"^the chat template ran longer than 0\.3 s$"):
        renderer.render("{{ 1 }}", {})
    assert 0.3 <= time.monotonic() - start < 5
    assert TemplateRenderer().render("{{ 1 }}", {}) == "1"
    renderer.close()


def test_every_value_arrives_as_it_left(renderer: TemplateRenderer) -> None:
    text = "é日👩‍🚀\x00\u2028\ud83d\ude00\udfff \"'\\\n"
    assert renderer.render("{{ x }}", {"x": text}) == text
    values = {"a": None, "b": [True, 1.5, -3, "é"], "c": {"ü": {}}, "d": float("inf"), "z": 1, "e": 2**80}
    assert renderer.render("{{ x }}", {"x": values}) == str(values)
    long = "👩" * (4 * MIB)
    assert renderer.render("{{ x }}", {"x": long}) == long
    for count in range(6):  # it grows, ends itself, and is replaced: nobody notices
        part = str(count) * (3 * MIB)
        assert renderer.render("{{ x }}" + f"{{# {count} #}}", {"x": part}) == part


def test_what_the_process_holds(renderer: TemplateRenderer) -> None:
    assert renderer.render("{{ 1 }}", {}) == "1"
    pid = pid_of(renderer)
    assert Path(f"/proc/{pid}/environ").read_bytes() == b""
    links = {str(entry.readlink()).partition(":")[0] for entry in Path(f"/proc/{pid}/fd").iterdir()}
    assert links == {"socket", "/dev/null", f"/proc/{pid}/statm"}
    assert os.getsid(pid) == pid
    for limit, value in (
        (resource.RLIMIT_NOFILE, 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        assert resource.prlimit(pid, limit) == (value, value)
    space = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    assert space < resource.prlimit(pid, resource.RLIMIT_AS)[1] <= space + 112 * MIB
    modules = Path(f"/proc/{pid}/maps").read_text()
    assert not any(name in modules for name in ("numpy", "torch", "tokenizers"))


def test_a_process_that_died_is_replaced(renderer: TemplateRenderer) -> None:
    renderer.start()
    first = pid_of(renderer)
    assert renderer.render("{{ 1 }}", {}) == "1" and pid_of(renderer) == first
    os.kill(first, signal.SIGINT)  # what a Ctrl-C would send
    assert renderer.render("{{ 2 }}", {}) == "2" and pid_of(renderer) == first
    os.kill(first, signal.SIGKILL)
    wait_until_gone(first)
    assert renderer.render("{{ 3 }}", {}) == "3" and pid_of(renderer) != first


def test_killed_while_rendering(renderer: TemplateRenderer) -> None:
    renderer.render("{{ 1 }}", {})
    threading.Timer(0.1, os.kill, (pid_of(renderer), signal.SIGKILL)).start()
    with pytest.raises(TemplateError, match=r"^the chat template ended its process \(signal 9\)$"):
        renderer.render(SPIN, {})
    assert renderer.render("{{ 1 }}", {}) == "1"


def test_interrupted_by_the_user(renderer: TemplateRenderer) -> None:
    """An answer that nobody waited for must not become the next one's."""
    renderer.render("{{ 1 }}", {})
    first = pid_of(renderer)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            renderer.render(SPIN, {})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not running(first)
    assert renderer.render("{{ 2 }}", {}) == "2"


def test_threads_share_one_process(renderer: TemplateRenderer) -> None:
    def work(name: int) -> bool:
        source = f"{{{{ x }}}}-{name % 12}"
        return all(renderer.render(source, {"x": f"{name}.{i}"}) == f"{name}.{i}-{name % 12}" for i in range(30))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(24)))


def test_close_and_garbage_end_the_process() -> None:
    renderer = TemplateRenderer()
    renderer.close()
    renderer.render("x", {})
    pid = pid_of(renderer)
    renderer.close()
    renderer.close()
    assert not running(pid)
    assert renderer.render("y", {}) == "y"
    pid = pid_of(renderer)
    del renderer
    gc.collect()
    assert not running(pid)


PARENT = """
import os, signal, sys
from headrace.text.template_worker import TemplateRenderer
renderer = TemplateRenderer()
renderer.render("x", {})
print(renderer._child.pid, flush=True)
"""


@pytest.mark.parametrize(
    "ending",
    ["sys.exit(0)", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)", "raise KeyboardInterrupt", "os.abort()"],
)
def test_it_never_outlives_its_parent(ending: str) -> None:
    code = f"import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)){PARENT}{ending}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert "ResourceWarning" not in done.stderr
    wait_until_gone(int(done.stdout))


def test_a_fork_leaves_it_alone() -> None:
    code = (
        f"{PARENT}pid = os.fork()\n"
        "if pid == 0:\n"
        "    assert renderer.render('b', {}) == 'b'; renderer.close(); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "first = renderer._child.pid\n"
        "assert renderer.render('a', {}) == 'a' and renderer._child.pid == first\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_it_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for program, message in (
        ("/nonexistent/python", "cannot be started: "),
        ("/bin/false", "did not start: exit status 1"),
        ("", "an interpreter|a Python interpreter"),
    ):
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(EngineError, match=message) as caught:
            TemplateRenderer().render("x", {})
        assert "\n" not in str(caught.value)
    monkeypatch.undo()
    with pytest.raises(EngineError, match=r"did not start in 1e-09 s$"):
        TemplateRenderer(TemplateLimits(start_s=1e-9)).render("x", {})


def test_rendering_is_quick(renderer: TemplateRenderer) -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    messages = [{"role": "user", "content": "a question of some length " * 20}] * 8
    times = []
    for _ in range(200):
        start = time.perf_counter()
        renderer.render(source, {"messages": messages})
        times.append(time.perf_counter() - start)
    assert sorted(times)[100] < 0.01  # 0.1 ms on an idle machine
