"""`split_model`: on which of several GPUs NVLM-D's and InternVL's own code puts each part of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headrace.core.errors import InvalidParameter
from headrace.core.sizing import layer_devices
from headrace.weights.checkpoint import read_json

NVLM_D = "NVLM-D-72B"
NVLM_D_LAYERS = 80
MAX_GPUS = MAX_LAYERS = 4096
LAYERS = "language_model.model.layers"
OTHER_SPELLINGS = ("language_model.model.tok_embeddings", "language_model.output")
"""What decoders of InternLM2 call their embedding and their head; to others such a name says nothing."""
FIRST_GPU = (
    "vision_model",
    "mlp1",
    "language_model.model.embed_tokens",
    "language_model.model.rotary_emb",
    "language_model.model.norm",
    "language_model.lm_head",
    *OTHER_SPELLINGS,
)
"""What is beside the layers."""
BESIDE = ", vision tower, projector, embedding, final norm, head"


def split_model(model: str | int | Path, num_gpus: int) -> dict[str, int]:
    """Module -> GPU, as `device_map` of transformers takes it.

    `model`: the number of decoder layers, "NVLM-D-72B", or a folder whose config.json says how many there are. The
    first GPU, which has the vision tower, counts as half a one; the last layer is there too, so that what it gives is
    where the head is. Raises InvalidParameter; CheckpointError for a config.json that cannot be read.
    """
    layers = count_layers(model)
    if isinstance(num_gpus, bool) or not isinstance(num_gpus, int) or not 1 <= num_gpus <= MAX_GPUS:
        raise InvalidParameter("num_gpus", num_gpus, f"an integer from 1 to {MAX_GPUS}")
    devices = layer_devices(layers, num_gpus)
    placed = {f"{LAYERS}.{layer}": gpu for layer, gpu in enumerate(devices)}
    return {**placed, **dict.fromkeys(FIRST_GPU, 0)}


def placement_text(model: str | int | Path, num_gpus: int) -> str:
    """The placement for a reader: a line a GPU. Raises as `split_model` does."""
    placed = split_model(model, num_gpus)
    lines = []
    for gpu in range(num_gpus):
        layers = [int(name.rpartition(".")[2]) for name, home in placed.items() if home == gpu and LAYERS in name]
        where = f" ({_spans(layers)})" if layers else ""
        lines.append(f"GPU {gpu}: {len(layers)} layers{where}{BESIDE if gpu == 0 else ''}")
    return "\n".join(lines)


def _spans(numbers: Sequence[int]) -> str:
    """`0-7, 79` of ascending numbers."""
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i + 1 == len(numbers) or numbers[i + 1] != n + 1]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def count_layers(model: str | int | Path) -> int:
    """Decoder layers of what `split_model` takes."""
    if isinstance(model, int) and not isinstance(model, bool) and 1 <= model <= MAX_LAYERS:
        return model
    if isinstance(model, str) and model.rpartition("/")[2] == NVLM_D and not Path(model).is_dir():
        return NVLM_D_LAYERS
    if isinstance(model, str | Path) and (Path(model) / "config.json").is_file():
        config = read_json(Path(model) / "config.json")
        for key in ("llm_config", "text_config"):
            inner = config.get(key)
            if isinstance(inner, dict):
                config = inner
        layers = config.get("num_hidden_layers")
        if isinstance(layers, int) and not isinstance(layers, bool) and 1 <= layers <= MAX_LAYERS:
            return layers
        raise InvalidParameter("config.json: num_hidden_layers", layers, f"an integer from 1 to {MAX_LAYERS}")
    allowed = f"a number of layers from 1 to {MAX_LAYERS}, {NVLM_D!r}, or a folder with config.json"
    raise InvalidParameter("model", model, allowed)
