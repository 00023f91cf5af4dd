"""Experts that a checkpoint holds as one tensor (E, N, K) for a layer's E experts: the rules take them apart.

Three spellings: one tensor each for gate, up and down; gate and up one under the other in a fourth; and transformers'
own names for the latter, which it writes where it is asked not to restore the names that a model was published with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from headrace.core.spec import WeightMap, WeightRule

EXPERT = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)\.weight")
ROUTER = re.compile(r"layers\.(\d+)\.mlp\.router\.weight")
_FUSED_NAME = re.compile(r"model\.layers\.\d+\.mlp\.experts\.gate_up_proj")


@dataclass(frozen=True, slots=True)
class MergedNames:
    """Names of a layer's merged tensors; `gate_up` stands for both where it is given."""

    gate: str
    up: str
    down: str
    gate_up: str | None = None


def take_apart(rule: WeightRule, names_of: Callable[[int], MergedNames | None]) -> WeightRule:
    """An expert's rule, reading from the merged tensors of its layer; any other rule as it is, and an expert's where
    `names_of` its layer is None."""
    found = EXPERT.fullmatch(rule.target)
    names = names_of(int(found[1])) if found else None
    if found is None or names is None:
        return rule
    index, part = int(found[2]), found[3]
    if part == "down" or names.gate_up is None:
        return replace(rule, sources=(getattr(names, part),), op="take", index=index)
    rows = rule.shape[0]
    span = (0, rows) if part == "gate" else (rows, 2 * rows)
    return replace(rule, sources=(names.gate_up,), op="take", index=index, rows=span)


def read_transformers_names(weights: WeightMap, shapes: Mapping[str, tuple[int, ...]]) -> WeightMap:
    """The same map, for a checkpoint whose layers hold `mlp.experts.gate_up_proj` and `mlp.experts.down_proj`."""
    if not any(map(_FUSED_NAME.fullmatch, shapes)):
        return weights

    def names_of(layer: int) -> MergedNames | None:
        block = f"model.layers.{layer}.mlp.experts"
        names = MergedNames("", "", f"{block}.down_proj", f"{block}.gate_up_proj")
        return names if names.gate_up in shapes else None

    def changed(rule: WeightRule) -> WeightRule:
        router = ROUTER.fullmatch(rule.target)
        if router is not None and names_of(int(router[1])) is not None:
            return replace(rule, sources=(f"model.layers.{router[1]}.mlp.gate.weight",))
        return take_apart(rule, names_of)

    return WeightMap(tuple(map(changed, weights.rules)), weights.ignorable)
