"""Adapters made by the peft package, and peft's own answers with them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.parity.common import Logits

EXPECTED = ("Setting `save_embedding_layers`", "Model has `tie_word_embeddings", "`is_gradient_checkpointing`")
"""What peft and transformers warn of; what they compute is checked."""


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        for text in EXPECTED:
            warnings.filterwarnings("ignore", message=text)
        yield


def write_adapter(folder: Path, model: Path, seed: int = 0, **config: Any) -> Path:
    """A random adapter of a checkpoint, none of whose halves is zero, as peft saves it. `config`: of LoraConfig."""
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tuned = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **config}))
        torch.manual_seed(seed)
        for name, parameter in tuned.named_parameters():
            if ".lora_" in name:
                parameter.data.normal_(0.0, 0.15)
        tuned.save_pretrained(folder)
    return folder


class Tuned:
    """transformers, with an adapter that peft has read from its folder."""

    def __init__(self, model: Path, folder: Path | None) -> None:
        with quiet():
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                model, dtype=torch.float32, attn_implementation="eager"
            )
            if folder is not None:
                self._model = PeftModel.from_pretrained(self._model, folder)
        self._model.eval()

    def logits(self, tokens: Sequence[int]) -> Logits:
        """(tokens, vocabulary)"""
        with torch.inference_mode():
            found: Logits = self._model(torch.tensor([list(tokens)])).logits[0].numpy()
        return found

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]
