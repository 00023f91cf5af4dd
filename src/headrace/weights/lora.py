"""LoRA adapters in peft's layout: adapter_config.json and adapter_model.safetensors (arXiv 2106.09685).

An adapter adds scale × (x Aᵀ) Bᵀ to what a linear layer makes of x. A key of the config that would be other mathematics
is refused by name; the tensors in the file say which layers are meant, and the config must agree with them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

import numpy as np

from headrace.core.errors import CheckpointError, ModelNotFound, UnsupportedModel, WeightsMismatch, shorten
from headrace.core.spec import ModelSpec, WeightMap, WeightRule
from headrace.weights.checkpoint import MAX_JSON, PICKLE_SUFFIXES, read_json
from headrace.weights.files import read_file
from headrace.weights.qtensor import QTensor
from headrace.weights.safetensors import SafetensorsFile

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 2**14
MAX_PATTERNS = 2**12
"""Entries of rank_pattern or alpha_pattern: one a linear layer of a large model."""
_SHOWN = 5
"""Names listed in a message."""

_READ = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
        *("bias", "init_lora_weights"),
    }
)
_INERT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
        *("lora_dropout", "layers_to_transform", "layers_pattern", "exclude_modules", "megatron_core"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "fan_in_fan_out"),
    }
)
"""Where the adapter comes from, how it was trained, and which layers were chosen for it. `fan_in_fan_out` says how the
base weight is stored: A is (r, in) and B is (out, r) all the same."""
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "lora_ga", "mica")
"""Values of init_lora_weights with which peft loads an adapter onto the base weights as they are."""

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(\.[^.]+)?\.weight")
"""peft leaves the adapter's name out when it saves; a state saved by hand has it."""
_EMBEDDING = re.compile(r".*\.lora_embedding_[AB](\.[^.]+)*")
_BASE_COPY = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.weight")
"""peft saves the frozen weight of a head beside an adapter of it. It is the base model's own, and not read here."""

_PATTERN = re.compile(r"\^?(?:[\w|-]|\\?\.|\.[*+]|\\d\+?|\[0-9\]\+?|\((?:\?:)?(?:[\w.|-]|\\[.d])+\))+\$?", re.ASCII)
"""Of regular expressions only what names a module: the rest can take an age on a short name."""
_MAX_PATTERN = 256
_MAX_CHOICES = 3
"""Repetitions and groups of one pattern: its time grows with the length of a name to this power."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """What one linear layer gets: scale × (x Aᵀ) Bᵀ."""

    a: QTensor
    """(r, K). Parts that were one layer in the checkpoint share one and the same object."""
    b: QTensor
    """(N, r)"""
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    name: str
    weights: Mapping[str, LowRank]
    """By the linear layer's name (`models/names.py`), less `.weight`: layers.3.attn.q, head."""
    fingerprint: str = ""
    """SHA-256 of its files, in hex; empty where it comes from none."""


def read_adapter(name: str, folder: Path, spec: ModelSpec, weight_map: WeightMap) -> Adapter:
    """Reads and checks a whole adapter; its tensors are views of the file.

    `weight_map` is the one of the architecture's Hugging Face checkpoints, whatever the base model is stored as: an
    adapter names those modules, and its rows have their order.
    Raises ModelNotFound, CheckpointError (a broken file, values that are not finite), UnsupportedModel (another kind
    of adapter), WeightsMismatch (another model's, or halves that are missing).
    """
    reader = _Reader(f"adapter {shorten(name)}")
    config = reader.config(folder)
    file = reader.open(folder)
    try:
        weights = reader.weights(file, config, _modules(spec, weight_map))
        return Adapter(name, weights, _fingerprint(folder, file))
    finally:
        file.close()


def _fingerprint(folder: Path, file: SafetensorsFile) -> str:
    digest = sha256(read_file(folder / CONFIG, MAX_JSON))
    digest.update(file.header_bytes)
    for name in file.names:
        digest.update(file.raw(name).data)
    return digest.hexdigest()


def _modules(spec: ModelSpec, weight_map: WeightMap) -> Mapping[str, Sequence[WeightRule]]:
    """Hugging Face's name of each linear layer -> what it becomes here."""
    modules: dict[str, list[WeightRule]] = {}
    for rule in weight_map.rules:
        linear = len(rule.shape) == 2 and rule.target.endswith(".weight") and not rule.target.startswith("embed.")
        if linear and rule.op in ("same", "transpose", "split_rows"):
            for source in rule.sources:
                modules.setdefault(source.removesuffix(".weight"), []).append(rule)
    if spec.embedding.tied:  # then the map has no head, but an adapter may
        source = "lm_head.weight"
        modules["lm_head"] = [WeightRule((source,), "head.weight", (spec.vocab_size, spec.hidden_size))]
    return modules


@dataclass(frozen=True, slots=True)
class _Config:
    """What counts of adapter_config.json."""

    rank: int
    alpha: float
    ranks: Mapping[re.Pattern[str], float]
    alphas: Mapping[re.Pattern[str], float]
    rank_stabilised: bool
    targets: frozenset[str] | None
    """Names of modules, or ends of names; None where an expression chose them."""

    def rank_of(self, module: str) -> int:
        return int(_first_match(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """alpha ÷ r, or alpha ÷ √r (rank-stabilised, arXiv 2312.03732)."""
        rank = self.rank_of(module)
        return _first_match(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def targets_module(self, module: str) -> bool:
        return self.targets is None or any(module == end or module.endswith(f".{end}") for end in self.targets)


def _first_match(patterns: Mapping[re.Pattern[str], float], module: str, default: float) -> float:
    """As in peft: the first pattern that is the end of a module's name, from a dot on, or the whole of it."""
    return next((value for pattern, value in patterns.items() if pattern.fullmatch(module)), default)


class _Reader:
    """Reads one adapter; every message begins with whose it is."""

    def __init__(self, where: str) -> None:
        self.where = where

    def open(self, folder: Path) -> SafetensorsFile:
        try:
            if (folder / WEIGHTS).exists():
                return SafetensorsFile(folder / WEIGHTS)
            names = sorted(file.name for file in folder.iterdir())
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}") from error
        except OSError as error:
            raise CheckpointError(f"{self.where}: {WEIGHTS} cannot be read ({error.strerror})") from error
        pickled = next((name for name in names if Path(name).suffix in PICKLE_SUFFIXES), None)
        if pickled is not None:
            raise UnsupportedModel(
                f"{self.where}: weights are in {shorten(pickled)}, a pickle, which can run code; supported: {WEIGHTS}"
            )
        raise ModelNotFound(f"{self.where}: {shorten(str(folder), 200)} has no {WEIGHTS}")

    # ------------------------------------------------------------ adapter_config.json

    def config(self, folder: Path) -> _Config:
        table = self._table(folder)
        kind = table.get("peft_type")
        if kind != "LORA":
            self._unsupported("peft_type", kind, "LORA")
        if table.get("bias", "none") != "none":
            self._unsupported("bias", table["bias"], "none")
        start = table.get("init_lora_weights")
        if not any(start is plain or (isinstance(plain, str) and start == plain) for plain in _PLAIN_STARTS):
            allowed = ", ".join(f"{plain}".lower() for plain in _PLAIN_STARTS[1:])
            self._unsupported("init_lora_weights", start, f"{allowed}: others change the base weights")
        for key, value in table.items():
            off = value is None or value is False or value in ("", [], {})
            if key not in _READ and key not in _INERT and not off:
                self._unsupported(shorten(key), value, "absent, null, false or empty")
        stabilised = table.get("use_rslora")
        if stabilised is not None and not isinstance(stabilised, bool):
            self._bad("use_rslora", stabilised, "true or false")
        return _Config(
            rank=int(self._rank("r", table.get("r"))),
            alpha=self._alpha("lora_alpha", table.get("lora_alpha")),
            ranks=self._patterns(table, "rank_pattern"),
            alphas=self._patterns(table, "alpha_pattern"),
            rank_stabilised=bool(stabilised),
            targets=self._targets(table.get("target_modules")),
        )

    def _table(self, folder: Path) -> dict[str, object]:
        try:
            if (folder / CONFIG).is_file():
                return read_json(folder / CONFIG)
            fault = f"has no {CONFIG}" if folder.is_dir() else "is no folder"
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}") from error
        except OSError as error:  # a path that is too long, or that may not be looked at
            fault = f"cannot be read ({error.strerror})"
        raise ModelNotFound(f"{self.where}: {shorten(str(folder), 200)} {fault}, allowed: a folder as peft saves it")

    def _rank(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
            self._bad(key, value, f"an integer from 1 to {MAX_RANK}")
        return value

    def _alpha(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e9 <= value <= 1e9:
            self._bad(key, value, "a number from -1e9 to 1e9")
        return float(value)

    def _targets(self, value: object) -> frozenset[str] | None:
        if value is None or isinstance(value, str):
            return None
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            self._bad("target_modules", value, "a list of names, or a string")
        return frozenset(value)

    def _patterns(self, table: Mapping[str, object], key: str) -> Mapping[re.Pattern[str], float]:
        found = table.get(key)
        if found is None:
            return {}
        if not isinstance(found, dict) or len(found) > MAX_PATTERNS:
            self._bad(key, found, f"an object with up to {MAX_PATTERNS} keys")
        read = self._rank if key == "rank_pattern" else self._alpha
        made = {}
        for text, value in found.items():
            choices = sum(text.count(mark) for mark in "*+(")
            if len(text) > _MAX_PATTERN or choices > _MAX_CHOICES or not _PATTERN.fullmatch(text):
                allowed = f"module names, with up to {_MAX_CHOICES} of .* .+ [0-9]+ \\d+ and (one|other)"
                self._unsupported(key, text, allowed)
            made[re.compile(rf"(?:.*\.)?(?:{text})")] = read(f"{key}[{shorten(text)}]", value)
        return made

    def _unsupported(self, key: str, value: object, allowed: str) -> NoReturn:
        raise UnsupportedModel(f"{self.where}: {CONFIG}: {key} is {shorten(value)}, allowed: {allowed}")

    def _bad(self, key: str, value: object, allowed: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: {CONFIG}: {key} is {shorten(value)}, allowed: {allowed}")

    # ------------------------------------------------------------ adapter_model.safetensors

    def weights(
        self, file: SafetensorsFile, config: _Config, modules: Mapping[str, Sequence[WeightRule]]
    ) -> Mapping[str, LowRank]:
        pairs, copies = self._halves(file, modules)
        self._check_complete(pairs)
        strays = sorted(module for module in pairs if not config.targets_module(module))
        if strays:
            self._mismatch(f"{CONFIG}: target_modules does not name", strays)
        for name, module in copies.items():
            self._check_shape(name, file.shape(name), _base_shape(modules[module]))
        made: dict[str, LowRank] = {}
        for module, halves in pairs.items():
            rules, rank, scale = modules[module], config.rank_of(module), config.scale_of(module)
            rows, columns = _base_shape(rules)
            self._check_shape(halves["A"], file.shape(halves["A"]), (rank, columns))
            self._check_shape(halves["B"], file.shape(halves["B"]), (rows, rank))
            a, b = (self._tensor(file, halves[half]) for half in "AB")
            for rule in rules:
                part = b if rule.rows is None else b.rows(*rule.rows)
                made[rule.target.removesuffix(".weight")] = LowRank(a, part, scale)
        return made

    def _halves(
        self, file: SafetensorsFile, modules: Mapping[str, Sequence[WeightRule]]
    ) -> tuple[Mapping[str, Mapping[str, str]], Mapping[str, str]]:
        """(module -> half -> tensor, copy of a base weight -> its module)"""
        pairs: dict[str, dict[str, str]] = {}
        copies: dict[str, str] = {}
        left_over: list[str] = []
        for name in file.names:
            if _EMBEDDING.fullmatch(name):
                raise UnsupportedModel(
                    f"{self.where}: tensor {shorten(name, 120)} adapts an embedding, allowed: linears"
                )
            tensor, copy = _TENSOR.fullmatch(name), _BASE_COPY.fullmatch(name)
            if tensor is not None and tensor["module"] in modules:
                halves = pairs.setdefault(tensor["module"], {})
                if tensor["half"] in halves:
                    self._mismatch("there twice", [halves[tensor["half"]], name])
                halves[tensor["half"]] = name
            elif copy is not None and copy["module"] in modules:
                copies[name] = copy["module"]
            else:
                left_over.append(name)
        left_over += [name for name, module in copies.items() if module not in pairs]
        if left_over:
            self._mismatch("no linear layer of this model has", sorted(left_over))
        return pairs, copies

    def _check_complete(self, pairs: Mapping[str, Mapping[str, str]]) -> None:
        missing = sorted(f"{module}.lora_{half}" for module, halves in pairs.items() for half in {"A", "B"} - {*halves})
        if missing:
            self._mismatch("missing", missing)
        if not pairs:
            raise WeightsMismatch(f"{self.where}: {WEIGHTS} holds no lora_A and lora_B")

    def _check_shape(self, name: str, found: tuple[int, ...], needed: tuple[int, ...]) -> None:
        if found != needed:
            raise WeightsMismatch(f"{self.where}: tensor {shorten(name, 120)} has shape {found}, needed {needed}")

    def _tensor(self, file: SafetensorsFile, name: str) -> QTensor:
        try:
            tensor = file.tensor(name)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{self.where}: {error}") from error
        if not np.isfinite(tensor.dequantise()).all():
            raise CheckpointError(f"{self.where}: tensor {shorten(name, 120)} holds values that are not finite")
        return tensor

    def _mismatch(self, fault: str, names: Sequence[str]) -> NoReturn:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise WeightsMismatch(
            f"{self.where}: {fault}: {', '.join(shorten(name, 120) for name in names[:_SHOWN])}{more}"
        )


def _base_shape(rules: Sequence[WeightRule]) -> tuple[int, int]:
    """(rows, columns) of the whole module, of which each rule is a part."""
    rows = max(rule.shape[0] if rule.rows is None else rule.rows[1] for rule in rules)
    return rows, rules[0].shape[1]
