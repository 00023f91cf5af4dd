"""headrace: runs decoder language models fast, and proves that the fast answer is the same answer.

Each name of `__all__` is imported when it is first asked for, so that `import headrace` itself is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.core.errors import HeadraceError
    from headrace.core.types import SamplingParams
    from headrace.engine.answer import Completion
    from headrace.engine.hf_model import ChatModel
    from headrace.engine.llm import LLM
    from headrace.engine.split_model import placement_text, split_model

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "ChatModel",
    "Completion",
    "HeadraceError",
    "SamplingParams",
    "__version__",
    "placement_text",
    "split_model",
]

_HOMES: Mapping[str, str] = {
    "LLM": "headrace.engine.llm",
    "ChatModel": "headrace.engine.hf_model",
    "Completion": "headrace.engine.answer",
    "HeadraceError": "headrace.core.errors",
    "SamplingParams": "headrace.core.types",
    "placement_text": "headrace.engine.split_model",
    "split_model": "headrace.engine.split_model",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
