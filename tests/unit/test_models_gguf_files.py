"""GGUF files as llama.cpp's converter writes them, against the checkpoints they were made of and transformers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import CheckpointError, ModelError, UnsupportedModel
from headrace.core.spec import ModelSpec
from headrace.models.gguf import ARCHITECTURES, KNOWN_KEYS
from headrace.models.registry import Description, describe
from headrace.weights.checkpoint import Checkpoint, open_checkpoint
from headrace.weights.loader import stream
from headrace.weights.qtensor import QTensor
from tests.unit.gguf_cases import write_gguf
from tests.unit.models_cases import CASES, Tensors, apply_map, build, frequencies, run_spec, save

FILES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-mha-tied": {},
    "llama-linear": {},
    "llama-yarn": {},
    "llama-llama3": {},
    "mistral-no-window": {},
    "mistral-tied": {},
    "mixtral": {},
    "mixtral-one-of-one": {},
    "qwen2": {},
    "qwen2-tied": {},
    "qwen2-head-dim-yarn": {},
    "qwen3": {},
    "qwen3-tied": {},
    "qwen3-moe-normalised": {},
    "gemma3-seven-layers": {},
    "gemma3-seven-layers-period": {"attention__sliding_window_pattern": 6},
    "phi3": {},
    "phi3-longrope": {},
    "phi3-partial-tied": {},
}
"""Case -> keys beside those of the converter. What GGUF has no word for (another activation, Mistral's window) is not
here."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield


def case_of(name: str) -> str:
    return name if name in CASES else name.rpartition("-")[0]


def made(case: str, folder: Path, **options: Any) -> tuple[transformers.PreTrainedModel, Description, Tensors, Path]:
    """(model, description of its folder, tensors of its folder, its GGUF file)"""
    model = build(case)
    config, tensors = save(model, folder)
    write_gguf(folder / "model.gguf", config, tensors, **options)
    return model, describe(config, "hf", {}), tensors, folder / "model.gguf"


def opened(path: Path) -> tuple[Checkpoint, Description]:
    checkpoint = open_checkpoint(path)
    return checkpoint, describe(checkpoint.config, checkpoint.format, checkpoint.shapes(), checkpoint.vector)


def loaded(checkpoint: Checkpoint, description: Description) -> Tensors:
    return {
        name: torch.from_numpy(tensor.dequantise().copy())
        for name, tensor in stream(checkpoint, description.weight_map)
    }


def plain(spec: ModelSpec) -> Any:
    """A spec as nested values, less what GGUF says in another way: the offset of norms, the stretch of frequencies."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: changed(v) for k, v in value.items() if k not in ("unit_offset", "rope", "name", "context")}
        if isinstance(value, list | tuple):
            return [changed(part) for part in value]
        return pytest.approx(value, rel=1e-6) if isinstance(value, float) else value

    return changed(dataclasses.asdict(spec))


@pytest.mark.parametrize("name", FILES)
def test_same_model_as_the_folder_it_came_from(name: str, tmp_path: Path) -> None:
    model, folder, tensors, path = made(case_of(name), tmp_path, **FILES[name])
    checkpoint, file = opened(path)
    assert dataclasses.asdict(file.spec).keys() == dataclasses.asdict(folder.spec).keys()
    assert plain(file.spec) == plain(folder.spec)
    assert file.spec.context == folder.spec.context
    for ours, theirs in zip(file.spec.layers, folder.spec.layers, strict=True):
        assert ours.attention.rope is not None and theirs.attention.rope is not None
        assert ours.attention.rope.dim == theirs.attention.rope.dim
        for length in (1, 21):
            got, factor = frequencies(ours.attention.rope, length)
            wanted, wanted_factor = frequencies(theirs.attention.rope, length)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
            assert factor == pytest.approx(wanted_factor, rel=1e-6)

    wanted_tensors, got_tensors = apply_map(folder.weight_map, tensors), loaded(checkpoint, file)
    assert got_tensors.keys() == wanted_tensors.keys()
    offset = 1.0 if "gemma3" in name else 0.0
    for target, wanted_tensor in wanted_tensors.items():
        assert torch.equal(got_tensors[target], wanted_tensor + (offset if "norm" in target else 0.0)), target

    # Longer than every window and every original context of the cases.
    token_ids = torch.randint(0, 37, (21,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted_logits = model(token_ids[None]).logits[0]
        torch.testing.assert_close(run_spec(file.spec, got_tensors, token_ids), wanted_logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("experts", ["merged", "single", "fused"])
@pytest.mark.parametrize("case", ["mixtral-wide", "qwen3-moe-wide"])
def test_experts_stay_packed_in_every_spelling(case: str, experts: str, tmp_path: Path) -> None:
    quantised = GGMLQuantizationType.Q8_0
    _, folder, tensors, path = made(case, tmp_path, experts=experts, quantised=quantised)
    checkpoint, file = opened(path)
    wanted = apply_map(folder.weight_map, tensors)
    permuted = ("attn.q.", "attn.k.") if "mixtral" in case else ()
    for target, tensor in stream(checkpoint, file.weight_map):
        values = wanted[target].numpy()
        packed = ".mlp.experts." in target or target.startswith(("embed", "head")) or ".attn." in target
        if values.ndim == 1 or not packed:
            assert tensor.scheme == "f32" and np.array_equal(tensor.dequantise(), values)
            continue
        assert tensor.scheme == "q8_0"
        exact = gguf.quants.dequantize(gguf.quants.quantize(values, quantised), quantised)
        assert np.array_equal(tensor.dequantise(), exact)
        assert any(part in target for part in permuted) or is_view(tensor)


def is_view(tensor: QTensor) -> bool:
    return not any(plane.flags.owndata or plane.flags.writeable for plane in tensor.planes.values())


@pytest.mark.parametrize("case", ["mixtral", "mixtral-window-tied", "qwen3-moe-normalised", "qwen3-moe-steps"])
def test_transformers_own_names_of_experts(case: str, tmp_path: Path) -> None:
    """A folder saved without restoring the published names: one tensor for all experts' gates and ups."""
    model = build(case)
    config, tensors = save(model, tmp_path / "published")
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    published = describe(config, "hf", {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    with open_checkpoint(tmp_path / "own") as checkpoint:
        assert any(name.endswith(".mlp.experts.gate_up_proj") for name in checkpoint.names())
        own = describe(checkpoint.config, "hf", checkpoint.shapes())
        assert own.spec == published.spec
        wanted, got = apply_map(published.weight_map, tensors), loaded(checkpoint, own)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[target], wanted[target]) for target in wanted)


def test_mistral3_is_the_same_graph(tmp_path: Path) -> None:
    model = build("mistral-no-window")
    config, tensors = save(model, tmp_path)
    write_gguf(tmp_path / "a.gguf", config, tensors)
    checkpoint, file = opened(tmp_path / "a.gguf")
    renamed = {key.replace("llama.", "mistral3."): value for key, value in checkpoint.config.items()}
    renamed["general.architecture"] = "mistral3"
    assert describe(renamed, "gguf", checkpoint.shapes()) == file
    for key in ("attention.temperature_scale", "rope.scaling.yarn_log_multiplier"):
        with pytest.raises(UnsupportedModel, match=f"mistral3.{key}"):
            describe({**renamed, f"mistral3.{key}": 0.1}, "gguf", checkpoint.shapes())


# ---------------------------------------------------------------- metadata alone


def metadata_of(case: str, folder: Path, **keys: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    _, _, _, path = made(case, folder, **keys)
    with open_checkpoint(path) as checkpoint:
        return dict(checkpoint.config), dict(checkpoint.shapes())


def test_the_scale_of_gemma3_27b(tmp_path: Path) -> None:
    metadata, shapes = metadata_of("gemma3-seven-layers", tmp_path)
    spec = describe({**metadata, "gemma3.block_count": 62}, "gguf", shapes).spec
    assert {layer.attention.scale for layer in spec.layers} == {(24 // 4) ** -0.5}
    spec = describe({**metadata, "gemma3.block_count": 61}, "gguf", shapes).spec
    assert {layer.attention.scale for layer in spec.layers} == {8**-0.5}


def test_windows_of_gemma3(tmp_path: Path) -> None:
    metadata, shapes = metadata_of("gemma3-seven-layers", tmp_path)

    def windows(**keys: Any) -> list[int | None]:
        changed = {**metadata, **{f"gemma3.attention.{key}": value for key, value in keys.items()}}
        return [layer.attention.window for layer in describe(changed, "gguf", shapes).spec.layers]

    assert windows() == [4] * 5 + [None, 4]
    assert windows(sliding_window_pattern=2) == [4, None, 4, None, 4, None, 4]
    assert windows(sliding_window_pattern=1) == [None] * 7
    assert windows(sliding_window=0) == [None] * 7 == windows(sliding_window=None)
    with pytest.raises(CheckpointError, match=r"gemma3\.attention\.sliding_window_pattern"):
        windows(sliding_window_pattern=[True] * 7)
    local = {**metadata, "gemma3.rope.freq_base_swa": None}
    ropes = {layer.attention.rope.base for layer in describe(local, "gguf", shapes).spec.layers if layer.attention.rope}
    assert ropes == {1e4, 1e6}


def test_width_of_experts_that_qwen3moe_leaves_out(tmp_path: Path) -> None:
    metadata, shapes = metadata_of("qwen3-moe-normalised", tmp_path)
    experts = describe({**metadata, "qwen3moe.expert_feed_forward_length": None}, "gguf", shapes).spec.layers[0].mlp
    assert experts.experts is not None
    assert (experts.experts.intermediate, experts.experts.normalise_weights) == (20 // 2, True)
    with pytest.raises(CheckpointError, match=r"qwen3moe\.expert_count"):
        describe({**metadata, "qwen3moe.expert_count": 0}, "gguf", shapes)


@pytest.mark.parametrize("half", [1, 2, 3, 23, 24, 48, 49])
def test_rotary_dimensions_of_phi3(half: int, tmp_path: Path) -> None:
    metadata, shapes = metadata_of("phi3", tmp_path)
    metadata |= {"phi3.attention.key_length": 98, "phi3.attention.value_length": 98}
    metadata["phi3.rope.dimension_count"] = 2 * half
    rope = describe(metadata, "gguf", shapes).spec.layers[0].attention.rope
    assert rope is not None and rope.dim == 2 * half


def test_longrope_without_a_factor_of_its_own(tmp_path: Path) -> None:
    metadata, shapes = metadata_of("phi3-longrope", tmp_path)
    del metadata["phi3.rope.scaling.attn_factor"], metadata["phi3.rope.scaling.original_context_length"]
    metadata["phi3.rope.scaling.type"] = "longrope"
    rope = describe(metadata, "gguf", shapes, lambda _: (1.0, 2.0, 3.0)).spec.layers[0].attention.rope
    assert rope is not None and rope.scaling is not None
    numbers = rope.scaling.numbers
    assert (numbers["attention_factor"], numbers["original_context"]) == (1.0, 64.0)
    assert rope.scaling.long_factors == rope.scaling.short_factors == (1.0, 2.0, 3.0)


DIVISORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@pytest.mark.parametrize(
    ("case", "names", "keys", "message"),
    [
        ("qwen3", DIVISORS[:1], {}, r"rope_freqs\.weight is present"),
        ("gemma3-seven-layers", DIVISORS[:1], {}, r"rope_freqs\.weight is present"),
        ("phi3", DIVISORS[:1], {}, r"rope_freqs\.weight is present"),
        ("llama", DIVISORS, {}, "allowed: rope_factors_long.weight, rope_factors_short.weight"),
        ("llama", DIVISORS[:2], {}, r"got rope_freqs\.weight, rope_factors_long\.weight"),
        ("llama", DIVISORS[1:2], {}, "allowed: rope_freqs.weight"),
        ("llama", DIVISORS[:1], {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "none, beside the tensor"),
        ("llama", DIVISORS[:1], {"rope.scaling.type": "yarn"}, "none, beside the tensor"),
        ("llama", DIVISORS[:1], {"rope.scaling.type": "longrope"}, "got rope_freqs.weight"),
        ("llama", DIVISORS[:1], {"rope.scaling.attn_factor": 1.5}, "attn_factor"),
        ("llama", (), {"rope.scaling.type": "longrope"}, "got none"),
    ],
)
def test_divisors_that_are_refused(
    case: str, names: tuple[str, ...], keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    metadata, shapes = metadata_of(case, tmp_path)
    prefix = metadata["general.architecture"]
    metadata |= {f"{prefix}.{key}": value for key, value in keys.items()}
    with pytest.raises(UnsupportedModel, match=message) as caught:
        describe(metadata, "gguf", {**shapes, **dict.fromkeys(names, (3,))}, lambda _: (1.0, 1.0, 1.0))
    assert "allowed: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "values", "message"),
    [
        ((4,), (1.0,) * 4, r"shape is \(4,\), allowed: \(3,\)"),
        ((3, 1), (1.0,) * 3, r"shape is \(3, 1\)"),
        ((3,), (1.0, 0.0, 1.0), "a divisor is 0.0"),
        ((3,), (1.0, float("nan"), 1.0), "a divisor is nan"),
        ((3,), (1.0, float("inf"), 1.0), "a divisor is inf"),
    ],
)
def test_divisors_that_are_broken(
    shape: tuple[int, ...], values: tuple[float, ...], message: str, tmp_path: Path
) -> None:
    metadata, shapes = metadata_of("llama", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        describe(metadata, "gguf", {**shapes, DIVISORS[0]: shape}, lambda _: values)


def test_divisors_need_a_way_to_be_read(tmp_path: Path) -> None:
    metadata, shapes = metadata_of("llama-llama3", tmp_path)
    with pytest.raises(UnsupportedModel, match=r"tensor rope_freqs\.weight is present"):
        describe(metadata, "gguf", shapes)


def test_vector_reads_small_plain_vectors_only(tmp_path: Path) -> None:
    _, _, tensors, path = made("llama-llama3", tmp_path)
    with open_checkpoint(path) as checkpoint:
        norm = tensors["model.norm.weight"].tolist()
        assert list(checkpoint.vector("output_norm.weight")) == norm
        for name in ("token_embd.weight", "no.such"):
            with pytest.raises(CheckpointError, match="one dimension"):
                checkpoint.vector(name)
    build("llama").half().save_pretrained(tmp_path / "half")
    with open_checkpoint(tmp_path / "half") as checkpoint, pytest.raises(CheckpointError, match="type is f16"):
        checkpoint.vector("model.norm.weight")


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(width=32)
    | st.text(max_size=4)
    | st.sampled_from(["linear", "yarn", "longrope", "none"])
    | st.lists(st.integers(0, 3), max_size=3).map(np.array)
    | st.lists(st.text(max_size=3), max_size=3)
)
SIZES_OF_DIVISORS = st.dictionaries(st.sampled_from(DIVISORS), st.sampled_from([(3,), (4,), (3, 1), ()]))


@pytest.fixture(scope="module")
def every_architecture(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    cases = ("llama", "mixtral", "qwen2", "qwen3", "qwen3-moe-normalised", "gemma3-seven-layers", "phi3-longrope")
    return [metadata_of(case, tmp_path_factory.mktemp("files")) for case in cases]


@given(data=st.data())
def test_no_metadata_escapes(data: st.DataObject, every_architecture: list[Any]) -> None:
    """Whatever the keys of an architecture hold, the answer is a description or a ModelError of one line."""
    metadata, shapes = data.draw(st.sampled_from(every_architecture))
    architecture = metadata["general.architecture"]
    known = sorted(KNOWN_KEYS | ARCHITECTURES[architecture].keys)
    changes = data.draw(st.dictionaries(st.sampled_from(known), VALUES, max_size=4))
    changed = metadata | {f"{architecture}.{key}": value for key, value in changes.items()}
    present = {name: shape for name, shape in shapes.items() if name not in DIVISORS} | data.draw(SIZES_OF_DIVISORS)
    try:
        description = describe(changed, "gguf", present, lambda _: (1.0, 2.5, 4.0))
    except ModelError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
    else:
        assert len(description.spec.layers) == changed[f"{architecture}.block_count"]


def test_the_most_experts_are_described_quickly(tmp_path: Path) -> None:
    metadata, shapes = metadata_of("qwen3-moe-normalised", tmp_path)
    started = time.perf_counter()
    rules = describe({**metadata, "qwen3moe.block_count": 256, "qwen3moe.expert_count": 128}, "gguf", shapes)
    assert len(rules.weight_map.rules) > 256 * 128 * 3
    assert time.perf_counter() - started < 10


def test_no_key_of_an_architecture_is_passed_over(tmp_path: Path) -> None:
    for case in ("mixtral", "qwen3", "qwen3-moe-normalised", "gemma3-seven-layers", "phi3"):
        metadata, shapes = metadata_of(case, tmp_path)
        prefix = metadata["general.architecture"]
        with pytest.raises(ModelError, match=rf"{prefix}\.logit_scale"):
            describe({**metadata, f"{prefix}.logit_scale": 0.5}, "gguf", shapes)
