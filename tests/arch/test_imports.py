"""docs/DESIGN.md §2 and §4, by machine: who may import whom, and what no file may hold."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.arch import rules
from tests.arch.rules import REPO, Source

PACKAGE = rules.package_sources()


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([command, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=120)


def test_rooms_import_downwards() -> None:
    """The contracts of pyproject.toml, [tool.importlinter]."""
    done = lint_imports(REPO)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("path", "line", "contract"),
    [
        ("core/bad.py", "import headrace.engine", "imports go down"),
        ("sched/bad.py", "def f():\n    from headrace.backends import base", "imports go down"),
        ("engine/bad.py", "import headrace.testing", "imports go down"),
        ("testing/bad.py", "import headrace.cli", "imports go down"),
        ("backends/native/__init__.py", "import headrace.backends.torch", "a backend imports no other"),
        ("attic/__init__.py", "", "imports go down"),
    ],
)
def test_contracts_report(tmp_path: Path, path: str, line: str, contract: str) -> None:
    """The same contracts on a package with one wrong import, or a room nobody has named."""
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    for folder in (f for f in (REPO / "src" / "headrace").glob("**") if f.name != "__pycache__"):
        bare = tmp_path / folder.relative_to(REPO / "src")
        bare.mkdir(parents=True)
        (bare / "__init__.py").touch()
    (tmp_path / "headrace" / "backends" / "base.py").touch()
    bad = tmp_path / "headrace" / path
    bad.parent.mkdir(exist_ok=True)
    assert lint_imports(tmp_path).returncode == 0
    bad.write_text(line)
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    assert f"{contract}" in done.stdout
    assert "BROKEN" in done.stdout or "attic" in done.stdout, done.stdout


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_package_keeps(rule: Callable[[Source], list[str]]) -> None:
    complaints = [line for source in PACKAGE if not rules.is_driver(source) for line in rule(source)]
    assert not complaints, "\n".join(complaints)


def test_drivers_stand_alone() -> None:
    complaints = [line for source in PACKAGE if rules.is_driver(source) for line in rules.driver_stands_alone(source)]
    assert not complaints, "\n".join(complaints)


BAD = [
    (rules.tensor_library, "engine/llm.py", "import torch"),
    (rules.tensor_library, "cli/main.py", "def f():\n    from torch.nn import functional"),
    (rules.tensor_library, "engine/llm.py", "import importlib\nimportlib.import_module('torch')"),
    (rules.tensor_library, "parallel/mesh.py", "import triton.language as tl"),
    (rules.control_plane_is_plain, "core/types.py", "import numpy as np"),
    (rules.control_plane_is_plain, "sched/blocks.py", "def f():\n    import numpy"),
    (rules.http_server, "engine/core.py", "from fastapi import FastAPI"),
    (rules.http_server, "compare/report.py", "from http import server"),
    (rules.unsafe_code, "weights/a.py", "import pickle"),
    (rules.unsafe_code, "weights/a.py", "from marshal import loads"),
    (rules.unsafe_code, "weights/a.py", "eval('1')"),
    (rules.unsafe_code, "weights/a.py", "import yaml\nyaml.load('1')"),
    (rules.unsafe_code, "backends/torch/a.py", "import torch\ntorch.load('x')"),
    (rules.unsafe_code, "weights/a.py", "import numpy as np\nnp.load('x', allow_pickle=True)"),
    (rules.environment, "engine/core.py", "import os\nos.environ['A']"),
    (rules.environment, "engine/core.py", "import os as system\nsystem.getenv('A')"),
    (rules.environment, "engine/core.py", "from os import environ"),
    (rules.global_statement, "cli/main.py", "def f():\n    global x\n    x = 1"),
    (rules.module_state, "core/a.py", "CACHE = {}"),
    (rules.module_state, "core/a.py", "CACHE: dict[str, int] = {}"),
    (rules.module_state, "core/a.py", "CACHE: dict[str, int] = make()"),
    (rules.module_state, "core/a.py", "from typing import Final\nNAMES: Final = ['a']"),
    (rules.module_state, "core/a.py", "if True:\n    NAMES = [n for n in 'ab']"),
    (rules.module_state, "core/a.py", "import collections\nSEEN = collections.defaultdict(list)"),
    (rules.module_state, "core/a.py", "class A:\n    seen = set()"),
    (rules.module_state, "core/a.py", "TABLE['x'] = 1"),
    (rules.module_state, "core/a.py", "def f():\n    globals()['x'] = 1"),
    (rules.broad_except, "core/a.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (rules.broad_except, "core/a.py", "try:\n    f()\nexcept:\n    log()"),
    (rules.broad_except, "core/a.py", "try:\n    f()\nexcept (ValueError, BaseException) as e:\n    print(e)"),
    (rules.broad_except, "core/a.py", "import contextlib\nwith contextlib.suppress(Exception):\n    f()"),
    (rules.loading_in_models, "models/llama.py", "def load_weights(self, w): ..."),
    (rules.loading_in_models, "models/llama.py", "def f(weights):\n    for name, w in weights: ..."),
    (rules.loading_in_models, "models/llama.py", "def f(weights):\n    for name, w in weights.items(): ..."),
    (rules.loading_in_models, "models/llama.py", "def f(m):\n    return {n: t for n, t in m.state_dict().items()}"),
    (rules.driver_stands_alone, "compare/drivers/vllm.py", "from headrace.core import types"),
    (rules.driver_stands_alone, "compare/drivers/vllm.py", "from ...core import types"),
]


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_rule_reports(rule: Callable[[Source], list[str]], path: str, text: str) -> None:
    """Negative controls: each rule finds one fault in a source that has it."""
    complaints = rule(Source.parse(path, text))
    assert len(complaints) >= 1
    assert all(complaint.startswith(f"{path}:") for complaint in complaints)


GOOD = [
    (rules.tensor_library, "backends/torch/ops.py", "import torch"),
    (rules.tensor_library, "engine/llm.py", "import torchless"),
    (
        rules.control_plane_is_plain,
        "sched/blocks.py",
        "import heapq\nfrom headrace.core import types\nfrom . import stop",
    ),
    (rules.http_server, "server/app.py", "import uvicorn"),
    (rules.http_server, "compare/measure.py", "from http import HTTPStatus"),
    (rules.unsafe_code, "backends/torch/a.py", "model.eval()\nre.compile('x')"),
    (rules.environment, "cli/main.py", "import os\nos.environ['A']"),
    (rules.environment, "core/a.py", "import os\nos.cpu_count()\nself.environ"),
    (
        rules.module_state,
        "core/a.py",
        "A: Mapping[str, int] = {}\nB: Final[Sequence[int]] = [1]\nC = (1,)\n__all__ = ['A']",
    ),
    (
        rules.module_state,
        "core/a.py",
        "class A:\n    kinds: ClassVar[Mapping[str, int]] = {}\n    names: list[str] = field(default_factory=list)",
    ),
    (rules.module_state, "core/a.py", "def f():\n    seen = {}\n    seen['a'] = 1"),
    (rules.broad_except, "core/a.py", "try:\n    f()\nexcept Exception:\n    close()\n    raise"),
    (rules.broad_except, "core/a.py", "try:\n    f()\nexcept Exception as e:\n    out(RowError('a', str(e)))"),
    (rules.broad_except, "core/a.py", "try:\n    f()\nexcept ValueError:\n    pass"),
    (rules.loading_in_models, "models/llama.py", "def rules(n):\n    return [layer(i) for i in range(n)]"),
    (rules.loading_in_models, "models/gguf.py", "def f(weights):\n    return [rule.op for rule in weights.rules]"),
    (rules.loading_in_models, "weights/loader.py", "def load(weights):\n    for w in weights: ..."),
]


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_rule_is_fair(rule: Callable[[Source], list[str]], path: str, text: str) -> None:
    assert rule(Source.parse(path, text)) == []


def test_every_rule_has_a_negative_control() -> None:
    assert {rule for rule, _, _ in BAD} >= {*rules.RULES, rules.driver_stands_alone}
