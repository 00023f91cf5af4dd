"""fp8 checkpoints of `quant_method` fp8: DeepSeek-V3 and Qwen3-FP8 (blocks), AutoFP8 (whole matrices).

A layer (N, K): weight fp8 E4M3; weight_scale_inv (ceil(N / h), ceil(K / w)), which multiplies despite its name; or one
number for the whole matrix, under this name or weight_scale. The product is a float32, as transformers has it.
"""

from __future__ import annotations

from headrace.core.errors import WeightsMismatch, shorten
from headrace.weights.packed import (
    SCALE_TYPES,
    Layer,
    Packed,
    Quantisation,
    RawTensors,
    Table,
    block_size,
    modules_with,
    spread,
)
from headrace.weights.qtensor import QTensor
from headrace.weights.scaled import scale_values

BLOCK_SCALE = "weight_scale_inv"
SCALES = (BLOCK_SCALE, "weight_scale")
_ACTIVATION_PARTS = ("activation_scale", "input_scale")
NOTE = (
    "the checkpoint was made for inputs of its layers rounded to fp8: headrace does not round them and applies the "
    "quantised weights only"
)


def read(config: Table, raw: RawTensors) -> Quantisation:
    """Raises UnsupportedModel, CheckpointError, WeightsMismatch."""
    config.word("activation_scheme", ("dynamic", "static"), "dynamic")
    config.word("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    block = None if config.get("weight_block_size") is None else block_size(config, "weight_block_size")
    names = frozenset(raw.names())
    layers: dict[str, tuple[Layer, str]] = {}
    for scale in SCALES if block is None else SCALES[:1]:
        for module in modules_with(raw, scale):
            layers.setdefault(module, (Layer(raw, names, module), scale))
    for name in raw.names():
        if raw.dtype(name) == "F8_E4M3" and name.removesuffix(".weight") not in layers:
            raise WeightsMismatch(f"tensor {shorten(f'{name}_scale_inv', 120)} is missing, and the weight needs it")
    unused = [f"{module}.{part}" for module in layers for part in _ACTIVATION_PARTS if layers[module][0].has(part)]
    packed = {f"{module}.weight": _layer(layer, scale, block) for module, (layer, scale) in layers.items()}
    return Quantisation(packed, frozenset(unused), (NOTE,))


def _layer(layer: Layer, scale: str, block: tuple[int, int] | None) -> Packed:
    rows, columns = layer.need("weight", ("F8_E4M3",), 2)
    height, width = block or (max(1, rows), max(1, columns))
    if block is None:
        layer.need_shape(scale, SCALE_TYPES, (), (1,), (1, 1))
    else:
        layer.need_shape(scale, SCALE_TYPES, (-(-rows // height), -(-columns // width)))

    def read() -> QTensor:
        stored = scale_values(layer.array(scale))
        s_NG = spread(stored if block else stored.reshape(1, 1), rows, columns, height, width)
        return QTensor("fp8", (rows, columns), {"q": layer.array("weight"), "s": s_NG})

    return layer.packed((rows, columns), read)
