"""LoRA adapters through the library and the command line: chosen a request, over any kind of base model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
from safetensors.torch import load_file, save_file

from headrace import LLM
from headrace.cli.main import main
from headrace.core.config import EngineConfig
from headrace.core.errors import HeadraceError, InvalidParameter, ModelNotFound, WeightsMismatch
from headrace.engine.model import OpenModel
from tests.parity.common import Checkpoint, prompt_of
from tests.parity.peft_adapters import Tuned, write_adapter
from tests.unit.gguf_cases import write_gguf

PROMPT = prompt_of(37, 1)
"""Two blocks of the KV cache and a bit."""


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Path:
    return checkpoint("llama", vocab_size=96, hidden_size=64, num_attention_heads=4, intermediate_size=96)


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two adapters of different ranks and layers."""
    attention = {"target_modules": ["q_proj", "k_proj", "v_proj"], "r": 3, "lora_alpha": 9}
    rest = {"target_modules": ["v_proj", "down_proj", "lm_head"], "r": 8, "use_rslora": True}
    root = tmp_path_factory.mktemp("adapters")
    made = {"a": write_adapter(root / "a", model, 1, **attention), "b": write_adapter(root / "b", model, 2, **rest)}
    return {name: str(folder) for name, folder in made.items()}


@pytest.fixture(scope="module")
def wanted(model: Path, folders: dict[str, str]) -> dict[str, list[int]]:
    """What peft answers to PROMPT."""
    found = {name: Tuned(model, Path(folder)).greedy(PROMPT, 24) for name, folder in folders.items()}
    found[""] = Tuned(model, None).greedy(PROMPT, 24)
    assert len({tuple(tokens) for tokens in found.values()}) == 3
    return found


@pytest.fixture
def llm(model: Path, folders: dict[str, str]) -> Iterator[LLM]:
    with LLM(str(model), threads=1, adapters=folders) as llm:
        yield llm


SAMPLING = {"max_tokens": 24, "ignore_eos": True}


def test_the_prefix_cache_never_mixes_adapters(llm: LLM, wanted: dict[str, list[int]]) -> None:
    for turn, name in enumerate(("a", "b", "", "", "b", "a")):
        (answer,) = llm.generate(PROMPT, adapter=name, **SAMPLING)
        assert answer.error is None and list(answer.token_ids) == wanted[name]
        assert answer.cached_tokens == (0 if turn < 3 else 32), "the second time its own blocks are there"


def test_all_adapters_in_one_batch(llm: LLM, wanted: dict[str, list[int]]) -> None:
    names = ["a", "b", "", "a", "", "b", "b"]
    answers = llm.generate([PROMPT] * len(names), adapter=names, **SAMPLING)
    assert [list(answer.token_ids) for answer in answers] == [wanted[name] for name in names]


def test_several_answers_share_the_adapter(llm: LLM, wanted: dict[str, list[int]]) -> None:
    answers = llm.generate(PROMPT, adapter="b", n=2, **SAMPLING)
    assert [list(answer.token_ids) for answer in answers] == [wanted["b"]] * 2


def test_adapters_as_the_command_line_gives_them(
    model: Path, folders: dict[str, str], wanted: dict[str, list[int]]
) -> None:
    entries = tuple(f"{name}={folder}" for name, folder in folders.items())
    with LLM(str(model), threads=1, adapters=entries) as llm:
        answers = llm.generate([PROMPT] * 2, adapter=["b", "a"], **SAMPLING) + llm.generate(PROMPT, **SAMPLING)
    assert [list(answer.token_ids) for answer in answers] == [wanted[name] for name in ("b", "a", "")]


def test_an_unknown_adapter_costs_its_request_alone(llm: LLM, wanted: dict[str, list[int]]) -> None:
    good, bad = llm.generate([PROMPT] * 2, adapter=["a", "c"], **SAMPLING)
    assert list(good.token_ids) == wanted["a"]
    assert bad.error is not None and bad.error.code == "invalid_parameter"
    assert bad.error.message == "adapter: got 'c', allowed: a, b"
    for adapter in (["a"], 3):
        with pytest.raises(InvalidParameter, match="adapter: got"):
            llm.generate([PROMPT] * 2, adapter=adapter)


@pytest.mark.parametrize("kind", [None, gguf.GGMLQuantizationType.Q8_0])
def test_a_gguf_base(
    kind: gguf.GGMLQuantizationType | None,
    model: Path,
    folders: dict[str, str],
    wanted: dict[str, list[int]],
    tmp_path: Path,
) -> None:
    """In the file the rows of q and k are permuted; an adapter's rows are not."""
    config, tensors = json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")
    if kind is not None:  # the oracle's weights are those that the file holds
        for tensor in tensors.values():
            if tensor.ndim == 2:
                packed = gguf.quants.quantize(tensor.numpy(), kind)
                tensor.numpy()[:] = gguf.quants.dequantize(packed, kind)
        rounded = tmp_path / "rounded"
        rounded.mkdir()
        (rounded / "config.json").write_text(json.dumps(config))
        save_file(tensors, rounded / "model.safetensors", {"format": "pt"})
        wanted = {"a": Tuned(rounded, Path(folders["a"])).greedy(PROMPT, 24)}
    write_gguf(tmp_path / "model.gguf", config, tensors, quantised=kind)
    with LLM(str(tmp_path / "model.gguf"), dtype="float32", threads=1, adapters=folders) as llm:
        answers = llm.generate([PROMPT] * len(wanted), adapter=list(wanted), **SAMPLING)
    assert [list(answer.token_ids) for answer in answers] == list(wanted.values())


# ---------------------------------------------------------------- settings


def test_errors_come_before_the_weights(model: Path, folders: dict[str, str], tmp_path: Path) -> None:
    cases: list[tuple[object, type[HeadraceError], str]] = [
        ("a", InvalidParameter, "adapters: got 'a', allowed: entries NAME=FOLDER"),
        (["a"], InvalidParameter, "adapters: got 'a', allowed: NAME=FOLDER"),
        ([3], InvalidParameter, "adapters: got 3, allowed: NAME=FOLDER"),
        (["=x"], InvalidParameter, "adapters: got '=x'"),
        (["a="], InvalidParameter, "adapters: got 'a='"),
        (["a b=x"], InvalidParameter, "adapters: got 'a b=x'"),
        (["a=x", "a=y"], InvalidParameter, "adapters: got 'a', allowed: each name once"),
        ({"a": 3}, InvalidParameter, "adapters: got 'a=3'"),
        ([f"a{i}=x" for i in range(1025)], InvalidParameter, "adapters: got '1025 entries', allowed: up to 1024"),
        ({"a": str(tmp_path / "nowhere")}, ModelNotFound, "adapter 'a': .*nowhere.* is no folder"),
        ({"a": str(model)}, ModelNotFound, "adapter 'a': .* has no adapter_config.json"),
    ]
    for adapters, kind, message in cases:
        with pytest.raises(kind, match=message):
            OpenModel(EngineConfig(str(model), adapters=adapters))  # type: ignore[arg-type]


def test_an_adapter_of_another_model(folders: dict[str, str], checkpoint: Checkpoint) -> None:
    with pytest.raises(WeightsMismatch, match="adapter 'a'"):
        OpenModel(EngineConfig(str(checkpoint("llama")), adapters=folders))


def test_command_line(
    model: Path,
    folders: dict[str, str],
    wanted: dict[str, list[int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [{"adapter": "a"}, {}, {"adapter": ""}, {"adapter": "c"}, {"adapter": 3}, {"adapter": None}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt_token_ids": PROMPT, **line}) + "\n" for line in lines))
    flags = [flag for name, folder in folders.items() for flag in ("--adapter", f"{name}={folder}")]
    flags += [
        "--use-adapter",
        "b",
        "--prompt-file",
        str(file),
        "--max-tokens",
        "24",
        "--ignore-eos",
        "--threads",
        "1",
    ]
    assert main(["generate", str(model), *flags, "--json"]) == 1
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["token_ids"] for record in records[:3]] == [wanted[name] for name in ("a", "b", "")]
    assert [record["error"]["message"] for record in records[3:]] == [
        "adapter: got 'c', allowed: a, b",
        "adapter: got 3, allowed: a name",
        "adapter: got None, allowed: a name",
    ]


def test_an_adapter_that_nobody_asks_for_is_not_noticed(
    model: Path, folders: dict[str, str], wanted: dict[str, list[int]]
) -> None:
    with LLM(str(model), threads=1, adapters=folders) as some, LLM(str(model), threads=1) as none:
        answers = [llm.generate(PROMPT, adapter="", logprobs=3, **SAMPLING)[0] for llm in (some, none)]
    assert list(answers[0].token_ids) == wanted[""]
    assert answers[0].logprobs == answers[1].logprobs, "to the last bit"
