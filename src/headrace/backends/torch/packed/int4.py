"""Weights of 4 bits on the device: stored codes as they are, plain numbers rounded; `kernels/int4.py` meets them.

Stored codes are never rounded again: their scales keep their bits. Plain numbers are rounded as the native backend
rounds them at load: groups of 32 columns, a minimum in float16, not above the least number, a scale in float16, large
enough that the largest number is within the codes; both float32 in a tensor for which float16 is too small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.backends.torch.kernels.int4 import PLANE, SUPER, UNIT, Int4Planes, int4_linear
from headrace.backends.torch.kernels.matmul import Card, new_counters
from headrace.backends.torch.packed.upload import Rows, uploaded_array
from headrace.core.errors import WeightsMismatch
from headrace.weights.qtensor import QTensor
from headrace.weights.scaled import ORDER

Form = Literal["zero", "minimum", "super"]
Planes = Mapping[str, NDArray[np.generic]]

PLAIN = ("f32", "f16", "bf16")
ROUND_GROUP = 32
UPLOAD_WEIGHTS = 1 << 24
"""Weights repacked at once."""

_ZERO, _MINIMUM = frozenset(("int4", "int4_asym")), frozenset((*PLAIN, "q4_0", "q4_1", "q4_K"))
_MOST_HALF = 65504.0
_LEAST_NORMAL = 2.0**-126
_TYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float16": torch.float16, "uint16": torch.bfloat16, "float32": torch.float32}
)
"""Of scales, by numpy's name; uint16 is raw bfloat16."""


def int4_form(schemes: Sequence[str], cols: int, group: int = ROUND_GROUP) -> Form | None:
    """The form that holds tensors of these schemes (`QTensor.scheme`), one under the other; None: there is none.

    `group`: columns that share a scale, of int4 and int4_asym, the same in all of them. It must be a multiple of 32 or
    the whole row; the groups of the other schemes are 32 columns, and a row is whole groups.
    """
    kinds = frozenset(schemes)
    if not kinds or cols < 1:
        return None
    if kinds <= _ZERO:
        return "zero" if group == cols or (group > 0 and group % PLANE == 0 and cols % group == 0) else None
    if kinds == {"q4_K"}:
        return "super" if cols % SUPER == 0 else None
    return "minimum" if kinds <= _MINIMUM and cols % ROUND_GROUP == 0 else None


class Int4Weight:
    """A weight (rows, cols) for x of `dtype`, of any `int4_form`.

    A weight is that of `QTensor.dequantise`, rounded once to x's type or not at all (see `kernels/int4.py`). Where GPTQ
    sorted the columns by importance, those of x are put in the same order before each product. Products must follow one
    another, as on one stream.

    float32 scales are kept as such; with them, d and m of q4_K take part in the form `minimum`.
    """

    def __init__(
        self,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        device: torch.device,
        group: int,
        form: Form,
        card: Card | None = None,
        counters: Tensor | None = None,
        batch_invariant: bool = False,
    ) -> None:
        """`counters`: `new_counters`, shared by the products of a stream; None: its own."""
        self.shape = (rows, cols)
        self.card = Card() if card is None else card
        self.dtype = dtype
        self.batch_invariant = batch_invariant
        self._form = form
        self._device = torch.device(device)
        self._counters = new_counters(self.card, self._device) if counters is None else counters
        # One group a row is one for every unit, also where the last is not whole.
        self._group = (-(-cols // UNIT) * UNIT if group == cols else group) if form == "zero" else ROUND_GROUP
        units = -(-cols // UNIT)
        self._codes = self._empty(units, rows, PLANE, dtype=torch.int16)
        groups = units * UNIT // SUPER if form == "super" else max(1, cols // self._group)
        self._words = self._empty(groups, rows, dtype=torch.int32)
        self._six = self._empty(cols // (2 * PLANE), rows, dtype=torch.int32) if form == "super" else None
        # Of `zero` known with the first tensor; of the others float32 as soon as one needs it.
        self._scale_type = None if form == "zero" else torch.float16
        self._order: NDArray[np.generic] | None = None
        self._columns: Tensor | None = None
        self._rows = Rows(rows, cols)
        self._planes: Int4Planes | None = None

    @property
    def nbytes(self) -> int:
        parts = (self._codes, self._words, self._six, self._columns)
        return sum(part.nbytes for part in parts if part is not None)

    def put(self, start: int, tensor: QTensor) -> None:
        """Rows [start, start + n), each once. Raises WeightsMismatch for what this form does not hold."""
        if tensor.scheme not in (_ZERO if self._form == "zero" else _MINIMUM):
            raise WeightsMismatch(f"{tensor.scheme} has no place in a weight of the form {self._form}")
        if self._form == "super" and tensor.scheme != "q4_K":
            raise WeightsMismatch(f"{tensor.scheme} has no place in a weight of q4_K")
        if self._form == "zero":
            self._agree(tensor)
        self._rows.take(start, tensor)
        # Each plane once: rows in another order are copied when they are asked for.
        planes = {name: tensor.planes[name] for name in tensor.planes}
        if tensor.scheme in PLAIN:
            self._put_rounded(start, tensor.scheme, planes)
        else:
            step = max(1, UPLOAD_WEIGHTS // max(1, self.shape[1]))
            for first in range(0, tensor.shape[0], step):
                part = {name: p if name == ORDER else p[first : first + step] for name, p in planes.items()}
                self._put_stored(start + first, tensor.scheme, part)

    def finish(self) -> None:
        """After the last row, before the first product. Raises WeightsMismatch if rows are missing."""
        self._rows.finish()
        if self._order is not None:
            self._columns = torch.from_numpy(np.array(self._order, np.int64)).to(self._device)
        self._planes = Int4Planes(
            codes=self._codes,
            words=self._words,
            six=self._six,
            tickets=self._counters,
            form=self._form,
            group=self._group,
            scale_type=self._scale_type or torch.float32,
            columns=self.shape[1],
        )

    def __call__(self, x_MK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """y = x Wᵀ + bias, (M, N) in x's type."""
        assert self._planes is not None, "finish() comes first"
        x = x_MK if self._columns is None else x_MK.index_select(1, self._columns)
        return int4_linear(x, self._planes, bias_N, self.card, self.batch_invariant)

    def dequantise(self) -> Tensor:
        """(N, K) float32, not rounded to x's type: for tests and verdicts."""
        rows, cols = self.shape
        shifts = 4 * torch.arange(4, device=self._device, dtype=torch.int32)
        codes_UNPJ = (self._codes.int()[:, :, None, :] >> shifts[:, None]) & 15
        q_NK = codes_UNPJ.permute(1, 0, 2, 3).reshape(rows, -1)[:, :cols].float()
        if self._form == "super":
            assert self._six is not None
            six = torch.stack((self._six & 0xFFFF, (self._six >> 16) & 0xFFFF), 1).flatten(0, 1)
            large, least = (part.repeat_interleave(SUPER // PLANE, 0) for part in self._halves(torch.float16))
            scale, second = large * (six & 0xFF), -(least * (six >> 8))
        else:
            scale, second = self._halves(self._scale_type or torch.float32)
        scale, second = (part.T.repeat_interleave(self._group, 1)[:, :cols] for part in (scale, second))
        if self._form != "zero":
            values = q_NK * scale + second
        else:
            values = ((q_NK - second) * scale).to(self._scale_type).float()
        if self._columns is None:
            return values
        return torch.empty_like(values).index_copy_(1, self._columns, values)

    # ------------------------------------------------------------ what is stored

    def _agree(self, tensor: QTensor) -> None:
        """Tensors of the form zero: one group, one type of scales, one order of columns."""
        scale, order = tensor.planes["s"], tensor.planes.get(ORDER)
        if scale.shape[-1] != self._words.shape[0]:
            raise WeightsMismatch(f"{scale.shape[-1]} groups a row do not fit a weight with {self._words.shape[0]}")
        if self._scale_type is None:
            self._scale_type, self._order = _TYPES[scale.dtype.name], order
            if self._scale_type == torch.float32:
                self._words = self._empty(*self._words.shape, 2, dtype=torch.int32)
        elif self._scale_type != _TYPES[scale.dtype.name]:
            raise WeightsMismatch(f"scales of {scale.dtype} do not fit a weight with those of {self._scale_type}")
        elif (order is None) != (self._order is None) or (
            order is not None and self._order is not None and not np.array_equal(order, self._order)
        ):
            raise WeightsMismatch("tensors whose columns lie in different orders cannot be met in one product")

    def _put_stored(self, start: int, scheme: str, planes: Planes) -> None:
        if self._form == "zero":
            codes, scale = _nibbles(self._upload(planes["q"])), self._upload(planes["s"])
            zeros = self._upload(planes["z"]) if "z" in planes else torch.full_like(scale, 8, dtype=torch.uint8)
            # What fills up the last unit means zero.
            self._put_codes(start, codes, zeros[:, -1])
            second = zeros.int()
            self._put_words(start, scale, second.view(torch.float32) if scale.dtype == torch.float32 else second)
            return
        q = self._upload(planes["q"])
        run = 32 if scheme == "q4_K" else 16
        runs = q.reshape(len(q), -1, 1, run)
        codes = torch.cat((runs & 15, runs >> 4), 2).reshape(len(q), -1)
        self._put_codes(start, codes, torch.zeros_like(codes[:, 0]))
        d = self._upload(planes["d"])
        if scheme == "q4_1":
            self._put_pair(start, d, self._upload(planes["m"]))
        elif scheme == "q4_0":
            self._put_pair(start, d, d.float() * -8)
        else:
            self._put_super(start, d, self._upload(planes["dmin"]), self._upload(planes["s"]).int())

    def _put_super(self, start: int, d: Tensor, least: Tensor, packed: Tensor) -> None:
        """q4_K's d and dmin (n, blocks), and the 12 bytes of each block's 8 scales and 8 minima (`weights/ggml.py`)."""
        low, high, both = packed[..., :4], packed[..., 4:8], packed[..., 8:]
        scale = torch.cat((low & 63, (both & 15) | ((low >> 2) & 48)), -1)
        minimum = torch.cat((high & 63, (both >> 4) | ((high >> 2) & 48)), -1)
        if self._form != "super":
            m = -(least.float()[..., None] * minimum)
            self._put_pair(start, (d.float()[..., None] * scale).flatten(1), m.flatten(1))
            return
        assert self._six is not None
        self._put_words(start, d, least)
        six = (scale | minimum << 8).reshape(len(d), -1, 2)
        self._six[:, start : start + len(d)] = (six[..., 0] | six[..., 1] << 16).T

    # ------------------------------------------------------------ what is rounded

    def _put_rounded(self, start: int, scheme: str, planes: Planes) -> None:
        """As `round_group` of native/src/pack.cpp: the same codes and the same scales."""
        if not self._round(start, scheme, planes, single=False):
            self._round(start, scheme, planes, single=True)

    def _round(self, start: int, scheme: str, planes: Planes, single: bool) -> bool:
        """False where float16 cannot hold a scale or a minimum; what was put until then is to be put again."""
        for first, part in self._chunks(planes["data"]):
            values = part.view(torch.bfloat16).float() if scheme == "bf16" else part.float()
            x = values.reshape(len(values), -1, ROUND_GROUP)
            codes, scale, minimum = _round_groups(x, single)
            if not single and bool(((scale.abs() > _MOST_HALF) | (minimum.abs() > _MOST_HALF)).any()):
                return False
            self._put_codes(start + first, codes, torch.zeros_like(codes[:, 0]))
            self._put_pair(start + first, scale, minimum, single)
        return True

    def _chunks(self, plane: NDArray[np.generic]) -> Iterator[tuple[int, Tensor]]:
        step = max(1, UPLOAD_WEIGHTS // max(1, math.prod(plane.shape[1:])))
        for first in range(0, len(plane), step):
            yield first, self._upload(plane[first : first + step])

    # ------------------------------------------------------------ memory

    def _put_codes(self, start: int, codes_nK: Tensor, fill_n: Tensor) -> None:
        """Codes 0 to 15, uint8; `fill_n`: those beyond the last column."""
        count, cols = codes_nK.shape
        missing = -cols % UNIT
        if missing:
            codes_nK = torch.cat((codes_nK, fill_n[:, None].expand(count, missing)), 1)
        parts = codes_nK.reshape(count, -1, 4, PLANE).int().unbind(2)
        words = parts[0] | parts[1] << 4 | parts[2] << 8 | parts[3] << 12
        # The upper half of 32 bits wraps: the cast keeps the bits.
        self._codes[:, start : start + count] = words.to(torch.int16).transpose(0, 1)

    def _put_pair(self, start: int, d: Tensor, m: Tensor, single: bool = False) -> None:
        """d and m of `minimum`, as float16 if both are that exactly and all before were."""
        kept = all(_is_half(part) for part in (d, m))
        if (single or not kept) and self._scale_type != torch.float32:
            self._words = torch.stack([part.view(torch.int32) for part in self._halves(torch.float16)], -1)
            self._scale_type = torch.float32
        kind = self._scale_type or torch.float32
        self._put_words(start, d.to(kind), m.to(kind))

    def _put_words(self, start: int, low_nG: Tensor, high_nG: Tensor) -> None:
        """Both of 32 bits, or of 16 bits, where `high_nG` may be small int32 numbers."""
        if low_nG.dtype == torch.float32:
            words = torch.stack((low_nG.view(torch.int32), high_nG.view(torch.int32)), -1)
        else:
            high = high_nG if high_nG.dtype == torch.int32 else high_nG.view(torch.int16).int()
            words = (low_nG.view(torch.int16).int() & 0xFFFF) | high << 16
        self._words[:, start : start + len(words)] = words.transpose(0, 1)

    def _halves(self, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales and seconds as float32, (groups, N); `kind`: of the scales."""
        if kind == torch.float32:
            low, high = self._words.unbind(-1)
            scale = low.contiguous().view(torch.float32)
            return scale, high.float() if self._form == "zero" else high.contiguous().view(torch.float32)
        scale = self._words.to(torch.int16).view(kind).float()
        high = (self._words >> 16) & 0xFFFF
        return scale, high.float() if self._form == "zero" else high.to(torch.int16).view(kind).float()

    def _upload(self, plane: NDArray[np.generic]) -> Tensor:
        """uint16 arrives as bfloat16."""
        part = uploaded_array(plane, self._device)
        return part.view(torch.bfloat16) if plane.dtype == np.uint16 else part

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)


def _nibbles(packed: Tensor) -> Tensor:
    """(n, K / 2) bytes -> (n, K) codes, the even column in the low nibble."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def _is_half(values: Tensor) -> bool:
    return values.dtype == torch.float16 or torch.equal(values.half().float().nan_to_num(), values.nan_to_num())


def _half_toward(x: Tensor, up: bool) -> Tensor:
    """The nearest float16 that is not below x ≥ 0 (`up`), or not above any x, as float32; where it would leave
    float16's range, x itself."""
    bits = x.half().view(torch.int16)
    near = bits.view(torch.float16).float()
    # The next number away from zero has bits one higher, whatever the sign.
    wrong, step = (near < x, 1) if up else (near > x, torch.where(bits < 0, 1, -1))
    found = torch.where(wrong, bits + step, bits).to(torch.int16).view(torch.float16).float()
    return torch.where(x.abs() > _MOST_HALF, x, found)


def _round_groups(x_nGJ: Tensor, single: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(n, G, 32) float32 -> codes (n, 32 G) uint8, scales and minima (n, G) float32, float16 numbers unless `single`.

    A group with a number that is not finite gets the scale NaN.
    """
    finite = torch.isfinite(x_nGJ).all(-1)
    x = torch.where(finite[..., None], x_nGJ, 0.0)
    minimum, most = x.amin(-1), x.amax(-1)
    if not single:
        minimum = _half_toward(minimum, up=False)
    # Halved first: the range of two large numbers may be infinite.
    scale = (0.5 * most - 0.5 * minimum) / 7.5
    if not single:
        scale = _half_toward(scale, up=True)
    usable = scale >= _LEAST_NORMAL  # the inverse of a smaller one may be infinite
    inverse = torch.where(usable, scale, 1.0).reciprocal()
    codes = torch.round((x - minimum[..., None]) * inverse[..., None]).clamp(0, 15)
    codes = torch.where(usable[..., None] & finite[..., None], codes, 0.0).to(torch.uint8)
    return codes.flatten(1), torch.where(finite, scale, torch.nan), minimum
