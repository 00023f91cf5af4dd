"""Outside engines as processes: which there are, what each needs, and how to talk to one (see `drivers`)."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace.core.errors import EngineError, InvalidParameter, shorten

DRIVERS = Path(__file__).parent / "drivers"
OURS = "headrace"
ISAS = ("native", "avx2")
AVX2: Mapping[str, str] = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "CT2_FORCE_CPU_ISA": "AVX2",
}
"""Keeps those engines from newer instructions that have a switch for it. llama.cpp is compiled for one instruction set
or the other; onnxruntime asks the CPU and cannot be told."""
CLOSE_S = 5.0
MAX_ANSWER = 256 * 2**20
"""Bytes of one answer of a driver."""
_STDERR_TAIL = 4096
_FLOAT32 = ("fp32", "float32", "f32")
"""Names of what holds the weights of any checkpoint as they are."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An outside engine."""

    driver: str
    """Name of its script in `drivers`, and of its environment."""
    files: Mapping[str, str]
    """Precision -> the model's file or folder that it reads."""
    compiled: bool = False
    """Whether its environment is compiled for one instruction set."""
    unrestricted: frozenset[str] = frozenset()
    """Precisions in which it cannot be kept from instructions newer than AVX2."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of its driver, that make it what its name says."""

    def nearest(self, stored: str) -> str:
        """The precision whose weights differ least from those of a checkpoint that stores them as `stored`."""
        if stored in self.files:
            return stored
        return next(precision for precision in _FLOAT32 if precision in self.files)


def _folders(kind: str, precisions: Sequence[str]) -> Mapping[str, str]:
    return {precision: f"{kind}-{precision}" for precision in precisions}


ENGINES: Mapping[str, Engine] = {
    "llama.cpp": Engine("llama_cpp", {name: f"{name}.gguf" for name in ("q4_1", "q4_0", "q8_0", "f16", "f32")}, True),
    # Its matrix products of float32 choose their instructions by themselves.
    "openvino": Engine("openvino", _folders("openvino", ("fp32", "int8", "int4")), unrestricted=frozenset({"fp32"})),
    "onnxruntime": Engine(
        "onnxruntime", _folders("onnxruntime", ("int4", "fp32")), unrestricted=frozenset({"int4", "fp32"})
    ),
    "ctranslate2": Engine("ctranslate2", _folders("ctranslate2", ("int8_float32", "float32"))),
    "transformers": Engine("transformers", {"fp32": "hf"}),
    "transformers-continuous": Engine("transformers", {"fp32": "hf"}, settings={"continuous": True}),
    "transformers-compiled": Engine("transformers", {"fp32": "hf"}, settings={"compile": True}),
    "vllm": Engine("vllm_cpu", {"fp32": "hf"}),
}


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """One row of a comparison: ENGINE:PRECISION[,NAME=VALUE…]; of headrace: headrace:BACKEND[,file=PRECISION][,…]."""

    name: str
    engine: str
    precision: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    """The model's file that headrace reads: a precision of llama.cpp's, or `hf`; empty: the model as it was given."""

    @property
    def ours(self) -> bool:
        return self.engine == OURS

    def kept_to(self, isa: str) -> PeerSpec:
        """The same row with kernels of ours that use no newer instructions than `isa` has."""
        if isa == "native" or self.precision != "native" or "instruction_set" in self.settings:
            return self
        return replace(self, settings={**self.settings, "instruction_set": isa})

    def keeps_to(self, isa: str) -> bool:
        """Whether it uses no newer instructions than `isa` has."""
        return isa == "native" or self.ours or self.precision not in ENGINES[self.engine].unrestricted


def parse_spec(text: str, stored: str = "", place: str = "engines") -> PeerSpec:
    """`stored`: how the model's weights are stored (q4_1 …), for a row without a precision; empty: a row has to have
    one. Raises InvalidParameter, which names `place`."""
    head, *pairs = text.split(",")
    engine, _, precision = head.partition(":")
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise InvalidParameter(place, text, "settings as NAME=VALUE after the precision")
        settings[name] = _value(value)
    if engine == OURS:
        gguf = ENGINES["llama.cpp"].files
        file = str(settings.pop("file", ""))
        if file and file != "hf" and file not in gguf:
            raise InvalidParameter("file", file, f"hf, {', '.join(gguf)}")
        if not precision:
            raise InvalidParameter(place, text, f"{OURS}:BACKEND")
        return PeerSpec(text, engine, precision, {"backend": precision, **settings}, file)
    if engine not in ENGINES:
        raise InvalidParameter(place, engine, f"{OURS}, {', '.join(ENGINES)}")
    known = ENGINES[engine]
    if stored and ":" not in head:
        precision = known.nearest(stored)
    if precision not in known.files:
        raise InvalidParameter(place, text, ", ".join(f"{engine}:{one}" for one in known.files))
    return PeerSpec(text, engine, precision, {**known.settings, **settings})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def driver_command(spec: PeerSpec, python: Path) -> list[str]:
    """What starts the driver of this row with its interpreter."""
    if spec.ours:
        return [str(python), "-m", "headrace.compare.own_driver"]
    return [str(python), "-I", str(DRIVERS / f"{ENGINES[spec.engine].driver}.py")]


def driver_environment(base: Mapping[str, str], isa: str, threads: int) -> dict[str, str]:
    """The environment variables of a driver. `base`: this process's."""
    return {
        **base,
        **(AVX2 if isa == "avx2" else {}),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class PeerProcess:
    """A running driver. Every answer is waited for at most as long as is said; a driver that fails is ended.

    Raises EngineError wherever the driver does: its message begins with `name`.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._rest = b""
        self._ended = False
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            self._stderr.close()
            raise EngineError(f"{name}: cannot start {shorten(command[0])}: {error.strerror}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, task: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer, which has `ok` true."""
        end_s = time.monotonic() + timeout_s
        self._send(json.dumps(task, allow_nan=False).encode() + b"\n", end_s, timeout_s)
        text = self._line(end_s, timeout_s)
        try:
            answer = json.loads(text)
        except ValueError:
            raise self._failed(f"answered {shorten(text)}, which is not JSON") from None
        if not isinstance(answer, dict):
            raise self._failed(f"answered {shorten(text)}, which is not a JSON object")
        if answer.get("ok") is not True:
            raise EngineError(f"{self.name}: {' '.join(str(answer.get('error', 'no reason given')).split())[:500]}")
        return answer

    def _send(self, line: bytes, end_s: float, timeout_s: float) -> None:
        """Never waits for a driver that does not read."""
        assert self._process.stdin is not None
        descriptor = self._process.stdin.fileno()
        while line:
            left_s = end_s - time.monotonic()
            if left_s <= 0 or not select.select([], [descriptor], [], left_s)[1]:
                raise self._failed(f"did not read its task within {timeout_s:g} s")
            try:
                line = line[os.write(descriptor, line[: select.PIPE_BUF]) :]
            except OSError:
                raise self._failed("ended before it was asked") from None

    def _line(self, end_s: float, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        parts = [self._rest]
        size = len(self._rest)
        while b"\n" not in parts[-1]:
            left_s = end_s - time.monotonic()
            if left_s <= 0 or not select.select([descriptor], [], [], left_s)[0]:
                raise self._failed(f"did not answer within {timeout_s:g} s")
            chunk = os.read(descriptor, 2**16)
            size += len(chunk)
            if not chunk:
                raise self._failed("ended without an answer")
            if size > MAX_ANSWER:
                raise self._failed(f"answered more than {MAX_ANSWER} bytes")
            parts.append(chunk)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line

    def _failed(self, what: str) -> EngineError:
        """The error to raise; the driver is ended, and the last line that it wrote to stderr is told."""
        self.kill()
        status = self._process.returncode
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - _STDERR_TAIL))
        said = [line for line in self._stderr.read().decode(errors="replace").split("\n") if line.strip()]
        last = f"; its last words: {shorten(said[-1].strip(), 200)}" if said else ""
        return EngineError(f"{self.name}: the driver {what} (exit status {status}){last}")

    def close(self) -> None:
        """Asks the driver to end, then makes sure. Idempotent."""
        if not self._ended and self._process.poll() is None:
            with suppress(EngineError):
                self.ask({"op": "close"}, CLOSE_S)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSE_S)
        self.kill()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def kill(self) -> None:
        """Ends the driver and what it started. Idempotent."""
        if not self._ended:
            self._ended = True
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def available_bytes() -> int | None:
    """Memory that can still be taken without swapping; None where the system does not say."""
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
