"""`headrace batch` killed with -9 at random points, inside writes, and on a full disk: is the file the same in the end?

    python -m tests.robustness.batch_kill --kills 20 --torn 5 [--url]

The process is the real command on a tiny random model. One batch is killed again and again and always started with the
same command; when it gets to its end, its files are compared byte for byte with those of a run that nothing disturbed.
A torn write is a real one: the process writes half of a record and kills itself there. The full disk is a tmpfs of the
size that a user namespace may mount, or, where there are none, a limit on the size of a file.

With --url it is the command's other half that is killed: the lines are answered by a server of the same model, which
lives on. Its ids, its times and what its cache held are left out of the comparison, and every line that draws has a
seed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.server.conftest import serving
from tests.unit.batch_cases import mixed_lines, tiny_model, write_lines

WINDOW = 16
"""Requests in flight, and so the most lines that a kill may cost: 2 × --max-num-seqs."""
FLAGS = ("--threads", "1", "--max-num-seqs", str(WINDOW // 2))
URL_FLAGS = ("--concurrency", str(WINDOW))
SERVERS_OWN = re.compile(
    rb'"id":"(chatcmpl|cmpl)-[0-9a-f]+",|"created":[0-9]+,|,"prompt_tokens_details":\{[^{}]*\}', re.ASCII
)
"""What a server makes anew in each body."""
TORN = """
import os, signal, sys
from headrace.cli.main import main
real, left = os.write, int(sys.argv.pop(1))
def torn(fd, data):
    global left
    if os.readlink(f"/proc/self/fd/{fd}").endswith(".journal"):
        left -= 1
        if left < 0:
            real(fd, bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
    return real(fd, data)
os.write = torn
sys.exit(main(sys.argv[1:]))
"""
LIMIT_S = 300


@dataclass
class Case:
    """One input, what an undisturbed run makes of it, and a batch that is disturbed."""

    folder: Path
    num_lines: int
    draw: random.Random
    model: str = ""
    """A folder or a URL; empty: a tiny model of its own."""
    kills: int = 0
    again: int = 0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.is_url = self.model.startswith("http")
        self.model = self.model or str(tiny_model(self.folder / "tiny"))
        self.flags = URL_FLAGS if self.is_url else FLAGS
        lines = mixed_lines(self.num_lines)
        for k, line in enumerate(lines if self.is_url else ()):
            line["body"].setdefault("seed", k)
            if "no_such_field" in line["body"]:
                line["body"]["top_p"] = 9  # a server looks away from the one, and refuses the other
        self.source = write_lines(self.folder / "in.jsonl", lines)
        self.out = self.folder / "out.jsonl"
        self.journal = self.folder / "out.jsonl.journal"
        plain = self.folder / "plain.jsonl"
        began_s = time.monotonic()
        done = self.finish(plain)
        self.undisturbed_s = time.monotonic() - began_s
        self.notes.append(f"undisturbed, {self.undisturbed_s:.1f} s: {done.stderr.splitlines()[0]}")
        self.expected = self.files_of(plain)
        self.size_of_output = plain.stat().st_size
        self.journal_bytes = 0

    def command(self, out: Path, *extra: str, source: Path | None = None) -> list[str]:
        return ["batch", self.model, str(source or self.source), str(out), *self.flags, *extra]

    def files_of(self, out: Path) -> tuple[bytes, bytes]:
        """The answers and the errors."""
        answers, errors = out.read_bytes(), out.with_name(out.name.replace(".jsonl", ".errors.jsonl")).read_bytes()
        if self.is_url:
            answers, errors = SERVERS_OWN.sub(b"", answers), SERVERS_OWN.sub(b"", errors)
        return answers, errors

    def start(self, out: Path | None = None, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "headrace.cli.main", *self.command(out or self.out)]
        return subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=before)

    def finish(self, out: Path | None = None, *extra: str) -> subprocess.CompletedProcess[str]:
        """The same command, to its end."""
        line = [sys.executable, "-m", "headrace.cli.main", *self.command(out or self.out, *extra)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT_S)
        if done.returncode != 0 or done.stdout or "Traceback" in done.stderr:
            raise AssertionError(f"exit {done.returncode}: {done.stderr}{done.stdout}")
        return done

    def size(self) -> int:
        return self.journal.stat().st_size if self.journal.exists() else 0

    def kill_at(self, growth: int) -> bool:
        """Runs until the journal has grown by so many bytes, then SIGKILL. False if it was done before that."""
        start = self.size()
        process = self.start()
        try:
            while process.poll() is None and self.size() - start < growth:
                time.sleep(0.0005)
        finally:
            process.kill()
            _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err
        self.kills += process.returncode != 0
        return process.returncode != 0

    def kill_after(self, seconds: float) -> bool:
        """Runs for so long, whatever it is doing then."""
        process = self.start()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
            process.communicate()
        self.kills += process.returncode != 0
        return process.returncode != 0

    def tear(self, writes: int) -> bool:
        """Runs until half of a record is written. False if there were fewer writes."""
        line = [sys.executable, "-c", TORN, str(writes), *self.command(self.out)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        self.kills += done.returncode != 0
        return done.returncode != 0

    def check(self) -> None:
        """Runs it to its end and compares; the next disturbance begins a new batch."""
        done = self.finish()
        found = self.files_of(self.out)
        assert found == self.expected, "the files differ from those of the undisturbed run"
        assert not self.journal.exists()
        left = {path.name for path in self.folder.iterdir() if "partial" in path.name}
        assert not left, left
        if match := re.search(r"(\d+) begun more than once", done.stderr):
            self.again += int(match[1])
        assert self.again <= self.kills * WINDOW, f"{self.again} lines again after {self.kills} kills"
        for name in ("out.jsonl", "out.errors.jsonl"):
            (self.folder / name).unlink()


def kill_randomly(case: Case, kills: int) -> None:
    """Three quarters of the kills while lines are answered, a quarter at any time of the process's life."""
    began, batches = case.kills, 0
    while case.kills - began < kills:
        if case.draw.random() < 0.25:
            going_on = case.kill_after(case.draw.uniform(0.05, case.undisturbed_s))
        else:
            going_on = case.kill_at(case.draw.randint(1, 2000 * case.num_lines // max(1, kills // 2)))
        if not going_on:
            case.check()
            batches += 1
    case.check()
    case.notes.append(f"{kills} kills at random points over {batches + 1} batches: files equal")


def tear_writes(case: Case, times: int) -> None:
    done = 0
    while done < times:
        if case.tear(case.draw.randint(0, 2 * case.num_lines // times)):
            done += 1
        else:
            case.check()
    case.check()
    case.notes.append(f"{times} kills inside a write: files equal")


def limit_file_size(case: Case, limit: int) -> None:
    """A file may not grow over `limit` bytes: the write fails as on a full disk."""
    process = case.start(before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1 and "File too large; what is done is kept" in err, (process.returncode, err)
    assert len(err.strip().splitlines()) == 1 and not case.out.exists(), err
    case.check()
    case.notes.append(f"a file of at most {limit} bytes: one line of error, then files equal")


def fill_disk(case: Case, kib: int) -> None:
    """A real tmpfs of that size; then it gets larger, and the same command again."""
    place = case.folder / "small"
    place.mkdir(exist_ok=True)
    command = " ".join([sys.executable, "-m", "headrace.cli.main", *case.command(place / "out.jsonl")])
    script = f"""
        mount -t tmpfs -o size={kib}k tmpfs {place} || exit 90
        {command}; echo "exit $?" >&2
        ls -A {place} >&2
        mount -o remount,size=100m {place} || exit 91
        {command} || exit 92
        cp {place}/out*.jsonl {case.folder}
    """
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, (done.returncode, done.stderr)
    lines = done.stderr.splitlines()
    assert "No space left on device; what is done is kept" in lines[0] and lines[1] == "exit 1", done.stderr
    assert "out.jsonl" not in lines, "there was an output although the disk was full"
    assert case.files_of(case.out) == case.expected
    for name in ("out.jsonl", "out.errors.jsonl"):
        (case.folder / name).unlink()
    case.notes.append(f"a disk of {kib} KiB: {lines[0].split('/')[-1]!r}, then files equal")


def namespaces_work() -> bool:
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    with tempfile.TemporaryDirectory() as place:
        line = [unshare, "-rm", "mount", "-t", "tmpfs", "tmpfs", place]
        return subprocess.run(line, capture_output=True).returncode == 0


def change_input(case: Case) -> None:
    assert case.kill_at(2000), "it was done before it could be killed"
    original, kept = case.source.read_bytes(), case.journal.read_bytes()
    status = case.source.stat()
    case.source.write_bytes(original.replace(b'"max_tokens": 1', b'"max_tokens": 2', 1))
    refused(case.start(), "was begun with another input")
    case.source.write_bytes(original)
    os.utime(case.source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert case.journal.read_bytes() == kept
    if not case.is_url:
        refused_flags = [sys.executable, "-m", "headrace.cli.main", *case.command(case.out, "--dtype", "bfloat16")]
        refused(subprocess.Popen(refused_flags, stderr=subprocess.PIPE, text=True), "was begun with dtype 'float32'")
    case.check()
    case.notes.append(f"another input{'' if case.is_url else ', another dtype'}: refused; then files equal")


def run_two(case: Case) -> None:
    first = case.start()
    while first.poll() is None and not case.size():
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    try:
        refused(case.start(), "another process is running this batch")
    finally:
        first.send_signal(signal.SIGCONT)
    first.communicate(timeout=LIMIT_S)
    assert first.returncode == 0
    assert case.files_of(case.out) == case.expected
    assert "already complete" in case.finish().stderr
    for name in ("out.jsonl", "out.errors.jsonl"):
        (case.folder / name).unlink()
    case.notes.append("two at once: the second refused; the finished batch known again")


def interrupt(case: Case, number: signal.Signals) -> None:
    """Ctrl-C, or a manager's stop: what is done is on disk, and the exit status says so."""
    start = case.size()
    process = case.start()
    while process.poll() is None and case.size() - start < 20_000:
        time.sleep(0.001)
    process.send_signal(number)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + number, (process.returncode, err)
    assert "the same command goes on from here" in err and "Traceback" not in err
    case.kills += 1
    case.check()
    case.notes.append(f"{number.name}: exit {128 + number}, then files equal")


def refused(process: subprocess.Popen[str], words: str) -> None:
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2 and words in err and len(err.strip().splitlines()) == 1, (process.returncode, err)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--torn", type=int, default=5)
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", action="store_true", help="against a server of the tiny model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = ""
        if arguments.url:
            own = tiny_model(Path(folder) / "tiny")
            model = stack.enter_context(serving(own, "--threads", "1")).url
        case = Case(Path(folder), arguments.lines, random.Random(arguments.seed), model)
        run_all(case, arguments.kills, arguments.torn)
        print("\n".join(case.notes))
        print(f"computed twice: {case.again} lines over {case.kills} kills, allowed: {case.kills * WINDOW}")
    return 0


def run_all(case: Case, kills: int, torn: int) -> None:
    kill_randomly(case, kills)
    tear_writes(case, torn)
    if namespaces_work():
        out_kib = case.size_of_output // 1024
        fill_disk(case, out_kib // 3)  # the journal does not fit
        fill_disk(case, 3 * out_kib // 2)  # the journal fits, the output beside it does not
    else:
        limit_file_size(case, case.size_of_output // 3)
        limit_file_size(case, 40)
    change_input(case)
    run_two(case)
    interrupt(case, signal.SIGINT)
    interrupt(case, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
