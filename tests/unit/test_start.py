"""What a start does early, and what it leaves for later."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from headrace import LLM
from headrace.cli import console
from headrace.cli.flags import NOT_FLAGS
from headrace.cli.main import COMMANDS, main
from headrace.core.config import EngineConfig
from headrace.core.docs import field_docs
from headrace.core.errors import OutOfMemory, WeightsMismatch
from headrace.core.types import SamplingParams
from headrace.engine.model import OpenModel
from headrace.server.config import ServeConfig
from headrace.weights.files import map_file, mapped_file

LATE = ("numpy", "tokenizers", "jinja2", "rich", "torch", "headrace.cli.generate", "headrace.engine.model")
NOT_FOR_A_GGUF_FILE = ("headrace.weights.lora", "headrace.weights.folder", "headrace.text.chat", "jinja2", "torch")


def imported(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of the modules `code` has imported, in a process of its own."""
    script = f"import sys\n{code}\nprint('found', *(name for name in {names} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def test_help_imports_no_command() -> None:
    assert imported("from headrace.cli.main import build_parser\nbuild_parser().format_help()", LATE) == []


def test_a_command_imports_what_it_uses(demo_path: Path) -> None:
    code = "from headrace.cli.main import main\nmain(['generate', 'demo', '--prompt', 'x', '--max-tokens', '1'])"
    assert imported(code, NOT_FOR_A_GGUF_FILE) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: headrace {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "configs"), [("generate", (EngineConfig, SamplingParams)), ("serve", (EngineConfig, ServeConfig))]
)
def test_flags_say_what_their_fields_say(
    command: str, configs: tuple[type, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = "".join(capsys.readouterr().out.split())
    for cls in configs:
        docs = field_docs(cls)
        for item in fields(cls):
            if item.name in NOT_FLAGS:
                continue
            said = "".join(docs[item.name].split())
            assert said[1:] in shown, item.name
            assert cls.__name__ + "." not in shown
            if item.default not in (None, False, True) and isinstance(item.default, int | float | str):
                assert f"{said}Default:{item.default}." in shown, item.name


def test_numpy_alone_leaves_the_environment_as_it_was() -> None:
    environ: dict[str, str] = {}
    console.import_numpy(environ)
    assert environ == {}
    environ["OPENBLAS_NUM_THREADS"] = "2"
    console.import_numpy(environ)
    assert environ == {"OPENBLAS_NUM_THREADS": "2"}


def test_what_is_a_view_of_a_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(64)))
    file = np.frombuffer(map_file(path), np.uint8)
    for view in (file, file[3:9], file.view("<u2").reshape(4, 8)[::2, 1:], file.view([("a", "u1"), ("b", "u1")])["b"]):
        whole = mapped_file(view)
        assert whole is not None and whole.nbytes == 64 and np.shares_memory(whole, view)
    for other in (file.copy(), np.zeros(3), file[np.array([1, 2])], np.memmap(path, np.uint8, "r", 1)):
        assert mapped_file(other) is None


# ---------------------------------------------------------------- loading beside what comes first


@pytest.fixture
def opened(demo_path: Path) -> OpenModel:
    pytest.importorskip("headrace.backends.native._kernels")
    return OpenModel(EngineConfig("demo", backend="native", threads=2))


def test_a_load_that_began_answers_as_another(opened: OpenModel) -> None:
    opened.begin()
    opened.begin()
    with LLM.load(opened) as early, LLM("demo", backend="native", threads=2) as late:
        prompts = ["The capital of France is", "x"]
        answers = [[one.token_ids for one in llm.generate(prompts, max_tokens=12)] for llm in (early, late)]
        assert answers[0] == answers[1]
        assert early.load_s > 0


def test_a_load_that_began_can_be_given_up(opened: OpenModel) -> None:
    opened.begin()
    opened.close()
    opened.close()


@pytest.mark.parametrize("error", [OutOfMemory, WeightsMismatch])
def test_what_goes_wrong_early_is_said_by_start(
    opened: OpenModel, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    from headrace.backends.native import weights

    def fail(*_: object, **__: object) -> None:
        raise error("not this one")

    monkeypatch.setattr(weights, "_stored", fail)
    opened.begin()
    with pytest.raises(error, match="not this one"):
        opened.start()
    opened.close()
