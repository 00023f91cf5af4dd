"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.robustness.sanitize

Builds the extension once more, in a scratch folder and with HEADRACE_SANITIZE=ON, and runs the kernels' tests and a
short generation on tiny random models with it. The first read or write outside of memory, the first overflow or other
undefined operation ends the process and is printed. Weights lie each by itself on the heap there, so that reading past
one is seen. Needs cmake, nanobind, and a compiler with the sanitizers' libraries (GCC).

The tests' process runs under `-p tests.robustness.sanitize`: as pytest's plugin this module puts the sanitized
extension in the place of the installed one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "headrace.backends.native._kernels"
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
}
TIMEOUT_S = 1200


class Missing(RuntimeError):
    """What the check needs and this machine has not."""


# ---------------------------------------------------------------- the build


def tool(name: str) -> str:
    """A program, from beside the interpreter or from PATH. Raises Missing."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise Missing(f"{name} was not found")
    return found


def library(name: str) -> str:
    """The path of one of the compiler's shared libraries. Raises Missing."""
    path = subprocess.run([tool("c++"), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    found = Path(path.stdout.strip())
    if not found.is_absolute():  # the name alone: the compiler does not have it
        raise Missing(f"the compiler has no {name}")
    return str(found)


def build(folder: Path) -> Path:
    """The sanitized extension. Raises Missing, CalledProcessError."""
    if importlib.util.find_spec("nanobind") is None:
        raise Missing("nanobind is not installed")
    cmake = tool("cmake")
    jobs = str(len(os.sched_getaffinity(0)))
    configure = [cmake, "-S", str(ROOT / "native"), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    configure += ["-DHEADRACE_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    for command in (configure, [cmake, "--build", str(folder), "--parallel", jobs]):
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    (built,) = folder.glob("_kernels*.so")
    contents = built.read_bytes()
    if b"__asan_init" not in contents or b"__ubsan_handle" not in contents:
        raise Missing("the compiler took no notice of -fsanitize")
    return built


# ---------------------------------------------------------------- the run


def write_models(folder: Path) -> None:
    from headrace.testing.checkpoints import tiny_checkpoint
    from tests.unit.batch_cases import write_tokenizer

    for name, config in MODELS.items():
        path = folder / name
        path.mkdir()
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            tiny_checkpoint(path, name, vocab_size=write_tokenizer(path), **sizes, **config)


def run(built: Path, models: Path, libraries: Sequence[str], tests: Sequence[str]) -> int:
    """The tests' exit status."""
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:strict_init_order=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }
    # pytest must not catch what the sanitizers write to the process's own stderr.
    options = ["-p", "tests.robustness.sanitize", "-p", "no:cacheprovider", "--capture=sys", "--no-header", "-x"]
    paths = ["--sanitized", str(built), "--models", str(models)]
    command = [sys.executable, "-m", "pytest", *options, *paths, *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=TIMEOUT_S).returncode


def main() -> int:
    tests = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / "unit").glob("test_native_*.py"))]
    with tempfile.TemporaryDirectory(prefix="headrace-sanitize-") as folder:
        began = time.monotonic()
        (scratch := Path(folder) / "build").mkdir()
        try:
            # The sanitizer has to come first, and finds what the C++ library has only where that is there already.
            libraries = [library("libasan.so"), library("libstdc++.so.6")]
            built = build(scratch)
        except Missing as missing:
            print(f"cannot build the sanitized kernels: {missing}", file=sys.stderr)
            return 2
        except subprocess.CalledProcessError as error:
            print(f"building the sanitized kernels failed:\n{error.stdout}\n{error.stderr}", file=sys.stderr)
            return 1
        compiled = time.monotonic()
        (models := Path(folder) / "models").mkdir()
        write_models(models)
        try:
            status = run(built, models, libraries, [*tests, "tests/robustness/sanitize.py"])
        except subprocess.TimeoutExpired:
            print(f"the tests did not end within {TIMEOUT_S} s", file=sys.stderr)
            return 1
        took = f"built in {compiled - began:.0f} s, run in {time.monotonic() - compiled:.0f} s"
        print(f"sanitizers: {'nothing found' if status == 0 else f'FAILED, status {status}'} ({took})")
        return int(status != 0)


# ---------------------------------------------------------------- inside the tests' process


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitized", type=Path, required=True, help="the extension to test")
    parser.addoption("--models", type=Path, required=True, help="folder of tiny models")


def pytest_configure(config: pytest.Config) -> None:
    assert NAME not in sys.modules, "too late: the installed kernels are loaded"
    spec = importlib.util.spec_from_file_location(NAME, config.getoption("--sanitized"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("quant", "kv_dtype"), [("none", "auto"), ("int8", "int8"), ("int4", "bfloat16")])
def test_generation(name: str, quant: str, kv_dtype: str, request: pytest.FixtureRequest) -> None:
    """More requests than rows, prompts in parts, greedy and sampled."""
    from headrace import LLM, SamplingParams

    model = str(request.config.getoption("--models") / name)
    sampling = [SamplingParams(max_tokens=12, temperature=0.0 if i % 2 else 1.0, seed=i, logprobs=3) for i in range(7)]
    prompts = [list(range(3, 5 + 3 * i)) for i in range(7)]
    settings = {"quant": quant, "kv_dtype": kv_dtype, "max_num_seqs": 4, "max_num_batched_tokens": 8, "threads": 2}
    with LLM(model, backend="native", **settings) as llm:
        answers = llm.generate(prompts, sampling, progress=False)
    assert [answer.error for answer in answers] == [None] * 7
    assert all(0 < len(answer.token_ids) <= 12 for answer in answers)


if __name__ == "__main__":
    sys.exit(main())
