"""Quantised checkpoints of every kind, by the `quantization_config` of their config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from headrace.core.errors import CheckpointError, shorten
from headrace.weights import awq, ctensors, fp8, gptq
from headrace.weights.packed import Quantisation, RawTensors, Table

METHODS: Mapping[str, Callable[[Table, RawTensors], Quantisation]] = MappingProxyType(
    {"gptq": gptq.read, "awq": awq.read, "compressed-tensors": ctensors.read, "fp8": fp8.read}
)


def read_quantisation(config: Mapping[str, object], raw: RawTensors) -> Quantisation:
    """The packed weights of a checkpoint; none where its config has no quantization_config.

    Shapes, types and names are checked; what the tensors hold is checked as they are read. Raises UnsupportedModel for
    a method or a setting that is not read, CheckpointError for a broken config, WeightsMismatch for tensors that are
    missing or do not fit together.
    """
    if config.get("quantization_config") is None:
        return Quantisation()
    table = Table(config["quantization_config"], "config.json: quantization_config")
    found = METHODS[table.word("quant_method", tuple(METHODS))](table, raw)
    consumed = {source for packed in found.packed.values() for source in packed.sources}
    for name in raw.names():
        if name in found.packed and name not in consumed:
            raise CheckpointError(f"tensor {shorten(name, 120)} is there both plain and packed")
    return found
