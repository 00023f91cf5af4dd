"""A LoRA adapter over the demo model's packed weights, in a conversation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from headrace.cli.conversation import Conversation, check_can_talk
from headrace.core.config import EngineConfig
from headrace.core.errors import InvalidParameter
from headrace.core.types import SamplingParams
from headrace.engine.model import OpenModel
from headrace.models.registry import describe

pytestmark = pytest.mark.demo


def write_adapter(folder: Path, model: OpenModel) -> Path:
    """Random, and loud enough to be heard in a few tokens."""
    source = model.checkpoint
    random = np.random.default_rng(0)
    tensors = {}
    for rule in describe(source.config, source.format, source.shapes()).adapter_map.rules:
        if rule.target.endswith(("attn.q.weight", "attn.v.weight")):
            (rows, columns), prefix = rule.shape, f"base_model.model.{rule.sources[0].removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = random.normal(0, 0.2, (8, columns)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = random.normal(0, 0.2, (rows, 8)).astype(np.float32)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_the_one_adapter_that_is_given_answers(demo_path: Path, tmp_path: Path) -> None:
    config = EngineConfig("demo", quant="none", threads=1, max_num_seqs=1, max_model_len=256)
    folder = write_adapter(tmp_path / "x", OpenModel(config))
    answers = []
    for adapters in ({}, {"x": str(folder)}):
        opened = OpenModel(replace(config, adapters=adapters))
        check_can_talk(opened, None)
        core, _ = opened.start()
        talk = Conversation(opened, core, SamplingParams(max_tokens=8), None)
        turn = talk.ask("What is the capital of France?", lambda text: None, lambda: False)
        core.close()
        assert turn is not None
        answers.append(turn.completion.text)
    assert "France" in answers[0] and "France" not in answers[1]
    two = OpenModel(replace(config, adapters={"x": str(folder), "y": str(folder)}))
    with pytest.raises(InvalidParameter, match="adapters: got 'x, y', allowed: one"):
        check_can_talk(two, None)
