"""What the native backend packs behind its caller is what it packs at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headrace.weights.files import map_file
from headrace.weights.qtensor import SCHEMES, QTensor
from tests.unit.native_reference import same_bits
from tests.unit.test_qtensor import make

kernels = pytest.importorskip("headrace.backends.native._kernels")
weights = pytest.importorskip("headrace.backends.native.weights")

BLOCKS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q3_K", "q4_K", "q5_K", "q6_K")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("scheme", BLOCKS)
def test_what_is_packed_behind_its_caller(scheme: str, threads: int, tmp_path: Path) -> None:
    """Views of a mapped file, whose pages are given back; rows in another order; copies that nobody else keeps."""
    whole = make(scheme, (200, 512), 5)
    records = np.empty((200, 512 // SCHEMES[scheme].group), SCHEMES[scheme].dtype)
    for name, plane in whole.planes.items():
        records[name] = plane
    path = tmp_path / "weights"
    path.write_bytes(records.tobytes())
    file = np.frombuffer(map_file(path), np.uint8)
    mapped = QTensor.from_bytes(scheme, whole.shape, file)
    order = np.random.default_rng(1).permutation(200)
    values = np.array(mapped.dequantise())
    packing = weights.Packing(
        iter(
            [
                ("mapped", mapped),
                ("part", mapped.rows(3, 90)),
                ("moved", mapped.take_rows(order)),
                ("moved twice", mapped.take_rows(order).take_rows(order)),
                ("joined", QTensor.cat_rows([mapped.rows(0, 3), mapped.rows(30, 37)])),
            ]
        ),
        kernels.Packer(threads),
        "stored",
        "float32",
    )
    packing.read_ahead()
    packed = packing.take_all()
    packing.finish()
    expected = {
        "mapped": values,
        "part": values[3:90],
        "moved": values[order],
        "moved twice": values[order][order],
        "joined": np.concatenate([values[:3], values[30:37]]),
    }
    for name, one in expected.items():
        assert same_bits(packed.weight(name, *one.shape).unpack(), one), name
    packed.finish()
    assert same_bits(mapped.dequantise(), values), "what was given back is read again"


def test_a_packer_that_is_dropped_ends_what_it_does() -> None:
    packer = kernels.Packer(2)
    for seed in range(8):
        weights._stored(packer, make("q4_1", (512, 4096), seed), behind=True)
    del packer


def test_an_order_names_rows_that_are_there() -> None:
    tensor = make("q4_0", (4, 64))
    planes = [tensor.planes[name] for name, _, _ in SCHEMES["q4_0"].record]
    for order in ([0, 1, 2, 4], [0, 1, 2, -1], [0, 1, 2]):
        with pytest.raises(ValueError, match="not the planes of a q4_0 tensor"):
            kernels.pack_blocks(kernels.Packer(1), "q4_0", planes, 4, 64, np.array(order))
