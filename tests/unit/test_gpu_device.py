"""What is said of a card's kernels, and how figures are taken; the figures themselves need a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from headrace.backends.torch.gpu import device
from headrace.backends.torch.kernels.matmul import Card
from headrace.backends.torch.packed.fp8 import Fp8Weight
from headrace.backends.torch.packed.int4 import Int4Weight
from headrace.backends.torch.packed.int8 import Int8Weight
from headrace.core.sizing import CARD_GROUP, CardUse, Stored, card_weight_bytes
from headrace.core.spec import AttentionSpec, EmbeddingSpec, LayerNorms, LayerSpec, MlpSpec, ModelSpec, NormSpec
from headrace.weights.qtensor import QTensor


class Ticks:
    """In place of CUDA's events: a millisecond more each time."""

    numbers: Iterator[int]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0

    def record(self) -> None:
        self.at = next(self.numbers)

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, ended: Ticks) -> float:
        return float(ended.at - self.at)


@pytest.fixture(autouse=True)
def events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ticks, "numbers", iter(range(1, 10**6)), raising=False)
    monkeypatch.setattr(device.torch.cuda, "Event", Ticks)
    monkeypatch.setattr(device, "SIDE", 64)


def test_kernels_by_capability() -> None:
    table = {one["op"]: one for one in device.kernels((9, 0), frozenset({"flashinfer"}))}
    assert table["attention"]["reason"] == "FlashInfer: installed, not measured yet; flash-attn: not installed"
    assert table["linear, fp8"]["chosen"].startswith("torch._scaled_mm")
    old = {one["op"]: one for one in device.kernels((8, 0), frozenset())}
    assert old["linear, fp8"] == {
        "op": "linear, fp8", "chosen": "none", "reason": "it needs compute capability 8.9, this card has 8.0",
    }  # fmt: skip
    assert list(old) == list(table) and device.installed() <= device.ATTENTION_PACKAGES.keys()
    assert device.matmul_types((7, 5)) == ("float16",)
    assert device.matmul_types((8, 0)) == ("bfloat16", "float16")
    assert device.matmul_types((8, 9)) == ("bfloat16", "float16", "fp8")


def test_figures_count_every_byte_and_operation() -> None:
    place = torch.device("cpu")
    assert device.median_seconds(lambda: None) == pytest.approx(1e-3)
    assert device.copy_gbps(place, 2**20) == pytest.approx(2 * 2**20 / 1e6)
    assert device.read_gbps(place, 2**20) == pytest.approx(2**20 / 1e6)
    assert device.matmul_tflops(place, "float16") == pytest.approx(2 * 64**3 / 1e9)


def test_every_figure_is_taken() -> None:
    found = device.measure(torch.device("cpu"), (9, 0), 2**20)
    assert list(found) == ["copy_GBps", "read_GBps", "matmul_TFLOPs"]
    assert list(found["matmul_TFLOPs"]) == ["bfloat16", "float16", "fp8"]
    assert all(value > 0 for value in (found["copy_GBps"], found["read_GBps"], *found["matmul_TFLOPs"].values()))


def test_slow_runs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ticks, "numbers", iter(range(100, 10**6, 100)))
    runs: list[int] = []
    device.median_seconds(lambda: runs.append(1))
    assert len(runs) == 2 + 3, "0.1 s each, until 0.25 s are over"


def test_what_a_device_does_not_do_is_unknown() -> None:
    def fail() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert device._measured(fail) is None and device._measured(lambda: 2.0) == 2.0


@pytest.mark.parametrize("quant", ["int8", "fp8", "int4"])
def test_weights_take_the_bytes_that_the_budget_has_for_them(quant: str) -> None:
    place, numbers = torch.device("cpu"), np.random.default_rng(0).standard_normal((64, 128), dtype=np.float32)
    weight: Any
    if quant == "int4":
        weight = Int4Weight(64, 128, torch.bfloat16, place, CARD_GROUP, "minimum")
    else:
        kind = Int8Weight if quant == "int8" else Fp8Weight
        weight = kind(64, 128, torch.bfloat16, place, Card())
    weight.put(0, QTensor.from_array(numbers))
    weight.finish()
    norm = NormSpec("rms", 1e-5, 128)
    layer = LayerSpec(AttentionSpec(1, 1, 64, 0.125), MlpSpec(False, "relu", 64), LayerNorms(norm, None, norm, None))
    spec = ModelSpec("m", 10, 128, 8, EmbeddingSpec(False), (layer,), norm)
    use = CardUse("bfloat16", quant, "bfloat16", 16, 1, 8, 8)
    linear = [(64, 128)] * 4 + [(128, 64)] * 2
    plain = 2 * (2 * 10 * 128 + 3 * 128)
    found = card_weight_bytes(spec, use, Stored()) - plain
    transposed = sum(rows == 128 for rows, _ in linear)
    assert found == len(linear) * weight.nbytes + transposed * (4 * 64 if quant != "int4" else 0)
