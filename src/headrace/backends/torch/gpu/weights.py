"""Which form the weights of a product take on a GPU (`packed/`), and which kernel meets them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from headrace.backends.torch.gpu.slots import Weight
from headrace.backends.torch.kernels.matmul import Card, invariant_tile, matmul, new_counters
from headrace.backends.torch.packed.choices import LIBRARY, UNMEASURED, Choices, Timer, measure
from headrace.backends.torch.packed.fp8 import CAPABILITY as FP8_CAPABILITY
from headrace.backends.torch.packed.fp8 import Fp8Weight, fp8_form
from headrace.backends.torch.packed.int4 import ROUND_GROUP, Form, Int4Weight, int4_form
from headrace.backends.torch.packed.int8 import Int8Weight, int8_form
from headrace.backends.torch.packed.plain import PlainWeight
from headrace.core.errors import ConfigError, shorten
from headrace.weights.qtensor import QTensor
from headrace.weights.scaled import ORDER

PLAIN_SCHEMES = frozenset(("f32", "f16", "bf16"))


class Forms:
    """Makes a model's weights. `quant`: none, stored, int8, int4 or fp8 (CONTRACTS §3)."""

    def __init__(self, quant: str, dtype: torch.dtype, device: torch.device, invariant: bool, card: Card) -> None:
        """Raises ConfigError for a quant that is not known."""
        allowed = ("none", "stored", *self._rounding)
        if quant not in allowed:
            raise ConfigError(f"quant: got {shorten(quant)}, allowed on a GPU: {', '.join(allowed)}")
        self._quant = quant
        self._dtype, self._device, self._invariant = dtype, device, invariant
        self.card = card
        self._counters = new_counters(card, device)
        self.plain_weights: list[PlainWeight] = []
        self._made: Counter[str] = Counter()
        self._choices: Choices | None = None

    @property
    def _rounding(self) -> Mapping[str, Callable[[int, int], Weight]]:
        return {"int8": self._int8, "int4": self._int4, "fp8": self._fp8}

    def of_layers(self, tensors: Sequence[QTensor]) -> Weight:
        """Of a product in the decoder's layers, whose rows are those of the tensors, one under the other."""
        make = self._rounding.get(self._quant) or (self._stored(tensors) if self._quant == "stored" else self._plain)
        return self._filled(make, tensors)

    def plain(self, tensors: Sequence[QTensor], dtype: torch.dtype | None = None) -> Weight:
        """Of the head, of routers (float32), and of all that only images go through."""
        return self._filled(partial(self._plain, dtype=dtype), tensors)

    def product(self, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        """With a weight of an adapter."""
        if not self._invariant:
            return functional.linear(x_MK, weight_NK)
        rows, columns = weight_NK.shape
        tile = invariant_tile(len(x_MK), rows, columns, weight_NK.dtype, self.card)
        return matmul(x_MK, weight_NK, None, tile, self._counters)

    def tied(self, weight_NK: Tensor) -> Weight:
        """The embedding, which is the head as well."""
        made = PlainWeight.over(weight_NK, self.card, self._counters, self._unmeasured, self._invariant)
        self.plain_weights.append(made)
        return made

    def choose(self, dtype: torch.dtype, timer: Timer) -> None:
        """Measures which kernel meets which plain weight quickest with few rows; from now on that one does."""
        shapes = {weight.shape for weight in self.plain_weights if weight.dtype == dtype}
        choices = measure(shapes, dtype, self._device, self.card, timer)
        for weight in self.plain_weights:
            weight.choices = choices
        self._choices = choices

    def explain(self) -> str:
        """How many products have which form, and what was measured of the plain ones."""
        forms = ", ".join(f"{count} × {name}" for name, count in self._made.items())
        chosen = Counter(self._choices.table.values()) if self._choices is not None else Counter[str]()
        if not chosen:
            return forms
        kernels = ", ".join(f"{count} by {name}" for name, count in sorted(chosen.items()))
        return f"{forms} (plain ones with few rows, as measured for {chosen.total()} sizes: {kernels})"

    @property
    def _unmeasured(self) -> Choices:
        return UNMEASURED if self._device.type == "cuda" else LIBRARY

    def _filled(self, make: Callable[[int, int], Weight], tensors: Sequence[QTensor]) -> Weight:
        rows, columns = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]
        made = make(rows, columns)
        start = 0
        for tensor in tensors:
            made.put(start, tensor)
            start += tensor.shape[0]
        made.finish()
        self._made[type(made).__name__.removesuffix("Weight").lower()] += 1
        return made

    def _stored(self, tensors: Sequence[QTensor]) -> Callable[[int, int], Weight]:
        """The form that holds the tensors' codes as they are; plain numbers where there is none, or where the tensors
        of one product are not packed alike."""
        schemes, columns = [tensor.scheme for tensor in tensors], tensors[0].shape[1]
        if set(schemes) & PLAIN_SCHEMES or not _alike(tensors):
            return self._plain
        scales = tensors[0].planes.get("s")
        group = ROUND_GROUP if scales is None else columns // scales.shape[-1]
        if (form := int4_form(schemes, columns, group)) is not None:
            return partial(self._int4_of, group, form)
        if fp8_form(schemes, group, columns) and self.card.capability >= FP8_CAPABILITY:
            return self._fp8
        return self._int8 if int8_form(schemes, group, columns) else self._plain

    def _plain(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> Weight:
        made = PlainWeight(
            rows,
            columns,
            dtype or self._dtype,
            self._device,
            self.card,
            self._counters,
            self._unmeasured,
            self._invariant,
        )
        self.plain_weights.append(made)
        return made

    def _int4(self, rows: int, columns: int) -> Weight:
        form = int4_form(["bf16"], columns)
        if form is None:
            return self._plain(rows, columns)
        return self._int4_of(ROUND_GROUP, form, rows, columns)

    def _int4_of(self, group: int, form: Form, rows: int, columns: int) -> Weight:
        place = (self._dtype, self._device, group, form, self.card, self._counters, self._invariant)
        return Int4Weight(rows, columns, *place)

    def _int8(self, rows: int, columns: int) -> Weight:
        return Int8Weight(rows, columns, self._dtype, self._device, self.card, self._counters)

    def _fp8(self, rows: int, columns: int) -> Weight:
        return Fp8Weight(rows, columns, self._dtype, self._device, self.card, self._counters, self._invariant)


def _alike(tensors: Sequence[QTensor]) -> bool:
    """Whether scales have one type and one width, and columns one order."""
    kinds = {(scales.dtype, scales.shape[-1]) for tensor in tensors if (scales := tensor.planes.get("s")) is not None}
    orders = {None if (order := tensor.planes.get(ORDER)) is None else order.tobytes() for tensor in tensors}
    return len(kinds) <= 1 and len(orders) == 1
