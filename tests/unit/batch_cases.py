"""A tiny model with a tokenizer, batch lines, and a model whose answers are computed by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from headrace.backends.base import Backend, BackendOptions
from headrace.core.config import EngineConfig
from headrace.core.types import Capacity
from headrace.engine.model import OnProgress, OpenModel
from headrace.parallel.mesh import Mesh
from headrace.testing.fake import FakeBackend
from headrace.weights.loader import stream

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ note }}"
)
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "then", "it", "runs", "down", "river")


def write_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer without merges, and a chat template. Returns the size of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(special)
    raw.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


def tiny_model(folder: Path) -> Path:
    """A random checkpoint with a tokenizer; needs transformers."""
    from headrace.testing.checkpoints import tiny_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    tiny_checkpoint(folder, vocab_size=write_tokenizer(folder), eos_token_id=2)
    return folder


def write_adapter(folder: Path, value: float = 0.5) -> Path:
    """A LoRA adapter of `tiny_model`, of one layer."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    shapes = {"A": (2, 48), "B": (48, 2)}
    tensors = {f"{name}{half}.weight": np.full(shape, value, np.float32) for half, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class FakeModel(OpenModel):
    """The real model but for its backend."""

    def load_backend(
        self, name: str, options: BackendOptions, on_progress: OnProgress | None = None
    ) -> tuple[Backend, Capacity]:
        backend = FakeBackend()
        capacity = backend.load(self.spec, stream(self.checkpoint, self._weight_map), options, Mesh())
        for adapter in self.adapters.values():
            backend.load_adapter(adapter)
        return backend, capacity


def fake_model(folder: Path, **settings: Any) -> FakeModel:
    return FakeModel(EngineConfig(str(folder), **{"max_num_seqs": 8, **settings}))


def call(custom_id: object = "a", url: str = "/v1/completions", method: str = "POST", **body: object) -> dict[str, Any]:
    """A batch line. Greedy unless `body` says otherwise."""
    if "messages" not in body:
        body.setdefault("prompt", "the quick")
    body.setdefault("temperature", 0)
    return {"custom_id": custom_id, "method": method, "url": url, "body": body}


def mixed_lines(count: int, seed: int = 3) -> list[dict[str, Any]]:
    """Chats and completions; greedy, seeded and unseeded; several answers; log-probabilities; stops; bad ones."""
    draw = random.Random(seed)
    lines: list[dict[str, Any]] = []
    for index in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
        body: dict[str, Any] = {"max_tokens": draw.randint(1, 24)}
        if draw.random() < 0.5:
            body["temperature"] = draw.choice([0.7, 1.0])
            if draw.random() < 0.5:
                body["seed"] = draw.randint(0, 2**40)
        if draw.random() < 0.2:
            body["n"] = draw.randint(2, 4)
        if draw.random() < 0.2:
            body["stop"] = ["e", "th"]
        url = draw.choice(["/v1/completions", "/v1/chat/completions"])
        if url == "/v1/completions":
            body["prompt"] = text if draw.random() < 0.8 else [text, text[:3] or "a"]
            if draw.random() < 0.2:
                body |= {"logprobs": 2, "echo": True}
        else:
            body["messages"] = [{"role": "user", "content": text}]
            if draw.random() < 0.2:
                body |= {"logprobs": True, "top_logprobs": 3}
        if draw.random() < 0.04:
            body["no_such_field"] = 1
        lines.append(call(f"line-{index}", url, **body))
    return lines


def write_lines(path: Path, lines: Iterable[Mapping[str, Any] | str]) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file; none if it is missing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
