"""ggml's K blocks weight by weight, from their definition in C: a second opinion beside the gguf package's arrays.

Also what they are packed as: planes in the order of the file, and rows that can be cut and joined.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.weights.gguf import READ_TYPES
from headrace.weights.qtensor import SCHEMES, QTensor

Block = NDArray[np.uint8]
f32 = np.float32


def half(block: Block, place: int) -> np.float32:
    return f32(block[place : place + 2].view(np.float16)[0])


def six_bits(scales: Block, j: int) -> tuple[int, int]:
    """`get_scale_min_k4`"""
    q = [int(byte) for byte in scales]
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | ((q[j - 4] >> 6) << 4), (q[j + 4] >> 4) | ((q[j] >> 6) << 4)


def with_minimum(block: Block, number: int, j: int) -> np.float32:
    scale, minimum = six_bits(block[4:16], j)
    return half(block, 0) * f32(scale) * f32(number) - half(block, 2) * f32(minimum)


def q4_K(block: Block, i: int) -> np.float32:  # noqa: N802 (ggml's name)
    byte = int(block[16 + 32 * (i // 64) + i % 32])
    return with_minimum(block, byte >> 4 if i % 64 >= 32 else byte & 15, i // 32)


def q5_K(block: Block, i: int) -> np.float32:  # noqa: N802
    byte = int(block[48 + 32 * (i // 64) + i % 32])
    fifth = int(block[16 + i % 32]) >> (i // 32) & 1
    return with_minimum(block, (byte >> 4 if i % 64 >= 32 else byte & 15) + 16 * fifth, i // 32)


def q6_K(block: Block, i: int) -> np.float32:  # noqa: N802
    part, within = divmod(i, 128)
    quarter, column = divmod(within, 32)
    byte = int(block[64 * part + 32 * (quarter % 2) + column])
    low = byte >> 4 if quarter >= 2 else byte & 15
    high = int(block[128 + 32 * part + column]) >> (2 * quarter) & 3
    scale = int(block[192:208].view(np.int8)[i // 16])
    return half(block, 208) * f32(scale) * f32((low | high << 4) - 32)


def q2_K(block: Block, i: int) -> np.float32:  # noqa: N802
    part, within = divmod(i, 128)
    number = int(block[16 + 32 * part + within % 32]) >> (2 * (within // 32)) & 3
    scale = int(block[i // 16])
    return half(block, 80) * f32(scale & 15) * f32(number) - half(block, 82) * f32(scale >> 4)


def q3_K(block: Block, i: int) -> np.float32:  # noqa: N802
    part, within = divmod(i, 128)
    number = int(block[32 + 32 * part + within % 32]) >> (2 * (within // 32)) & 3
    if not int(block[i % 32]) >> (i // 32) & 1:
        number -= 4
    j = i // 16
    scales = [int(byte) for byte in block[96:108]]
    low = scales[j] & 15 if j < 8 else scales[j - 8] >> 4
    high = scales[8 + j % 4] >> (2 * (j // 4)) & 3
    return half(block, 108) * f32((low | high << 4) - 32) * f32(number)


ONE_BY_ONE = {"q2_K": q2_K, "q3_K": q3_K, "q4_K": q4_K, "q5_K": q5_K, "q6_K": q6_K}


@pytest.mark.parametrize("scheme", ONE_BY_ONE)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=12)
def test_every_weight_of_a_block(scheme: str, seed: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 256, SCHEMES[scheme].group_bytes, dtype=np.uint8)
    found = QTensor.from_bytes(scheme, (1, 256), raw).dequantise()[0]
    with np.errstate(all="ignore"):
        expected = np.array([ONE_BY_ONE[scheme](raw, i) for i in range(256)], np.float32)
    assert np.array_equal(found, expected, equal_nan=True)


def test_what_a_mixed_file_of_llama_cpp_holds_is_read() -> None:
    assert {"Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "Q5_0", "Q5_1", "Q8_0", "F16", "F32"} <= set(READ_TYPES)


@pytest.mark.parametrize("scheme", ONE_BY_ONE)
def test_columns_are_cut_between_blocks_of_256(scheme: str) -> None:
    tensor = QTensor.from_bytes(scheme, (2, 512), np.zeros(4 * SCHEMES[scheme].group_bytes, np.uint8))
    assert tensor.group == 256 and tensor.cols(256, 512).shape == (2, 256)
    with pytest.raises(ValueError, match="between groups of 256"):
        tensor.cols(32, 64)
    with pytest.raises(ValueError, match="not a multiple"):
        QTensor.from_bytes(scheme, (1, 288), np.zeros(0, np.uint8))
