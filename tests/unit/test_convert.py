"""`headrace convert`: a tiny Open-Qwen2VL as torch saves it -> the folder that is run."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headrace.cli import convert as command
from headrace.cli.convert import PARTS, convert
from headrace.cli.main import main
from headrace.core.errors import CheckpointError, HeadraceError, InvalidParameter, WeightsMismatch
from headrace.models.registry import describe
from headrace.testing.tiny_tokenizer import write_tiny_tokenizer
from headrace.testing.vision_checkpoints import tiny_vision_checkpoint
from headrace.weights.checkpoint import open_checkpoint
from headrace.weights.loader import stream

Model = dict[str, dict[str, torch.Tensor]]


class Source:
    """A tiny checkpoint as a folder, and the same as the file and the decoder's folder that it is converted from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = tiny_vision_checkpoint(path / "made", "open_qwen2vl")
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text("utf-8"))
        self.tensors = load_file(self.folder / "model.safetensors")
        self.decoder = path / "decoder"
        write_tiny_tokenizer(self.decoder, ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"))
        (self.decoder / "config.json").write_text(json.dumps(self.config["text_config"]), encoding="utf-8")

    def model(self) -> Model:
        """As the published file has it, the tied head and what nothing uses included."""
        parts: Model = {part: OrderedDict() for part in PARTS}
        for name, tensor in self.tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        parts["llm_backbone"]["llm.lm_head.weight"] = parts["llm_backbone"]["llm.model.embed_tokens.weight"]
        return parts

    def save(self, value: object) -> Path:
        torch.save(value, self.path / "in.pt")
        return self.path / "in.pt"

    def convert(self, out: str = "out", **arguments: Any) -> Path:
        given = {"query_num": 4, "vision": self.config["vision_config"], **arguments}
        print(convert(self.path / "in.pt", self.path / out, self.decoder, **given))
        return self.path / out


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def streamed(folder: Path) -> dict[str, bytes]:
    """Every tensor that a backend gets."""
    with open_checkpoint(folder) as checkpoint:
        weight_map = describe(checkpoint.config, "hf", checkpoint.shapes()).weight_map
        return {name: tensor.dequantise().tobytes() for name, tensor in stream(checkpoint, weight_map)}


def test_round_trip(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    source.save({"model": source.model(), "optimizer": {"state": {}, "lr": 0.1}})
    out = source.convert(prompt_form="cli")
    assert streamed(out) == streamed(source.folder)
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert config["projector"] == {"type": "avgpool", "layers": 2, "query_num": 4}
    assert config["prompt_form"] == "cli" and config["architectures"] == ["OpenQwen2VL"]
    assert config["text_config"] == source.config["text_config"] and config["dtype"] == "float32"
    assert "tensors that no answer depends on" in capsys.readouterr().out
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert [file for file in source.path.iterdir() if file.name.endswith(".partial")] == []


def test_the_models_own_tokens_are_added(source: Source) -> None:
    source.save({"model": source.model()})
    out = source.convert()
    added = {
        one["content"]: one["id"] for one in json.loads((out / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    }
    assert (added["<|image_pad|>"], added["<|endofchunk|>"], added["<s>"]) == (355, 356, 357)
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert (config["image_token_id"], config["bos_token_id"], config["eos_token_id"]) == (355, 357, 354)
    (source.decoder / "tokenizer.json").write_bytes((out / "tokenizer.json").read_bytes())
    again = source.convert("again")
    assert json.loads((again / "tokenizer.json").read_bytes()) == json.loads((out / "tokenizer.json").read_bytes())


def test_types_stay(source: Source) -> None:
    model = {part: {key: tensor.bfloat16() for key, tensor in held.items()} for part, held in source.model().items()}
    model["projector"] = source.model()["projector"]
    source.save({"model": model})
    out = source.convert()
    written = load_file(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"
    for name, tensor in written.items():
        part, _, key = name.partition(".")
        assert tensor.dtype == model[part][key].dtype and torch.equal(tensor, model[part][key]), name


def test_the_published_sizes() -> None:
    """Numbers of the released model's parts: a tower of 27 blocks, the last of which gives no features."""
    decoder = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    }
    config = {
        "architectures": ["OpenQwen2VL"],
        "vision_config": dict(command.SIGLIP),
        "projector": {"type": "avgpool", "layers": 2, "query_num": command.QUERIES},
        "text_config": decoder,
        "image_token_id": 151655,
    }
    found = describe(config, "hf", {})
    numbers: Counter[str] = Counter()
    for rule in found.weight_map.rules:
        numbers[rule.target.split(".")[0]] += math.prod(rule.shape)
    block = 15_239_504
    assert numbers.pop("vision") == 412_984_944 - block and numbers.pop("projector") == 4_131_840
    assert numbers.total() == 1_543_714_304
    assert found.spec.vision is not None and found.spec.vision.encoder.grid == 27


def test_a_decoder_without_its_wrapper(source: Source) -> None:
    model = source.model()
    model["llm_backbone"] = {key.removeprefix("llm."): tensor for key, tensor in model["llm_backbone"].items()}
    source.save({"model": model})
    assert streamed(source.convert()) == streamed(source.folder)


def test_a_head_of_its_own_stays(source: Source) -> None:
    model = source.model()
    model["llm_backbone"]["llm.lm_head.weight"] = model["llm_backbone"]["llm.lm_head.weight"] + 1
    source.save({"model": model})
    assert "head.weight" in streamed(source.convert())


def drop(part: str, key: str) -> Callable[[Model], Any]:
    return lambda model: {**model, part: {name: tensor for name, tensor in model[part].items() if name != key}}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda model: {"model": {**model, "extra": {}}}, WeightsMismatch, r"left over .*'extra'"),
        (lambda model: {"model": model, "epoch": 3}, WeightsMismatch, r"left over beside model, optimizer: 'epoch'"),
        (lambda model: {"weights": model}, CheckpointError, "no dictionary `model`"),
        (lambda model: [1], CheckpointError, "no dictionary `model`"),
        (
            lambda model: {"model": {part: model[part] for part in PARTS[1:]}},
            WeightsMismatch,
            "missing: vision_backbone; needed",
        ),
        (
            lambda model: {"model": drop("projector", "mlp_projector.2.bias")(model)},
            WeightsMismatch,
            r"1 missing \('projector.mlp_projector.2.bias'\)",
        ),
        (
            lambda model: {"model": {**model, "projector": {**model["projector"], "odd": torch.ones(1)}}},
            WeightsMismatch,
            r"1 left over \('projector.odd'\)",
        ),
        (
            lambda model: {
                "model": {**model, "projector": {**model["projector"], "mlp_projector.0.bias": torch.ones(1)}}
            },
            WeightsMismatch,
            r"projector.up.bias .*found \(1,\)",
        ),
        (
            lambda model: {"model": {**model, "projector": {**model["projector"], "mlp_projector.0.bias": 1.5}}},
            CheckpointError,
            "projector: 'mlp_projector.0.bias' is a float",
        ),
        (
            lambda model: {
                "model": {
                    **model,
                    "projector": {
                        **model["projector"],
                        "mlp_projector.0.bias": model["projector"]["mlp_projector.0.bias"].double(),
                    },
                }
            },
            HeadraceError,
            "is f64, supported: f32, f16, bf16",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    source: Source, change: Callable[[Model], object], error: type[HeadraceError], message: str
) -> None:
    source.save(change(source.model()))
    with pytest.raises(error, match=message):
        source.convert()
    assert not (source.path / "out").exists() and not (source.path / "out.partial").exists()


def test_settings_that_cannot_be(source: Source) -> None:
    source.save({"model": source.model()})
    with pytest.raises(CheckpointError, match="query_num"):
        source.convert(query_num=5)
    with pytest.raises(HeadraceError, match="prompt_form"):
        source.convert(prompt_form="own")
    with pytest.raises(WeightsMismatch, match="vision"):
        source.convert(vision=command.SIGLIP)
    (source.path / "out").mkdir()
    (source.path / "out" / "x").touch()
    with pytest.raises(InvalidParameter, match=r"OUT: got .*, allowed: a folder that is not there, or is empty"):
        source.convert()
    (source.path / "out" / "x").unlink()
    source.convert()


def test_a_decoder_that_cannot_be(source: Source) -> None:
    source.save({"model": source.model()})
    write_tiny_tokenizer(source.decoder, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    with pytest.raises(CheckpointError, match=r"no token <\|image_pad\|>"):
        source.convert()
    (source.decoder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: "):
        source.convert()
    (source.decoder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json"):
        source.convert()


def test_the_disk_is_full(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    source.save({"model": source.model()})

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "out.partial/model.safetensors")

    monkeypatch.setattr("headrace.weights.safetensors_writer.write_safetensors", fail)
    with pytest.raises(OSError, match="No space"):
        source.convert()
    assert not (source.path / "out").exists() and not (source.path / "out.partial").exists()


def test_command(source: Source, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = source.save({"model": source.model()}), source.path / "out"
    arguments = ["convert", str(file), str(out), "--decoder", str(source.decoder), "--query-num", "4"]
    assert main(arguments) == 2  # not the sizes of the published tower
    assert "headrace: error: " in capsys.readouterr().err
    monkeypatch.setattr(command.convert, "__defaults__", (729, "train", source.config["vision_config"]))
    assert main([*arguments, "--prompt-form", "raw"]) == 0
    assert json.loads((out / "config.json").read_text("utf-8"))["prompt_form"] == "raw"
    assert capsys.readouterr().out.startswith(f"{out}: ")
    assert main(arguments) == 2
    with pytest.raises(SystemExit):
        main(["convert", str(file), str(out)])


def test_code_in_the_file(source: Source, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "was here"), "w"))

    source.save({"model": {**source.model(), "projector": Hostile()}})
    with pytest.raises(HeadraceError, match="which may run code"):
        source.convert()
    assert not (tmp_path / "was here").exists()
