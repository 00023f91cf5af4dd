"""How fast the NVIDIA GPU is that the torch backend would run on, as that backend's own report measures it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from headrace.core.errors import shorten
from headrace.plan.probe_tools import Bench, What
from headrace.plan.profile import Detail

GIGA, TERA = 1e9, 1e12
Report = Callable[[], Mapping[str, Any]]


class Card:
    """Reading and copying its memory, and one large product a type."""

    def __init__(self, bench: Bench, missing: str, report: Report | None = None) -> None:
        """`missing`: why there is no such GPU; empty: there is one. `report`: as the torch backend's `card_report`."""
        self._bench = bench
        self._report = report
        if missing:
            self._leave_out(f"not there: {missing}")
        elif report is None:
            try:
                from headrace.backends.torch.gpu.device import card_report
            except (ImportError, OSError, RuntimeError, AttributeError) as error:  # torch, or a driver not fit for it
                self._leave_out(_said(error))
            else:
                self._report = card_report

    def _leave_out(self, note: str) -> None:
        self._report = None
        self._bench.skipped.append(What("card", {}, "", note))

    def round(self) -> Iterator[tuple[What, float]]:
        if self._report is None:
            return
        try:
            found = self._report()
        except (ImportError, OSError, RuntimeError, AssertionError) as error:
            self._leave_out(_said(error))
            return
        whose: Mapping[str, Detail] = {"card": str(found["name"]), "memory_bytes": int(found["memory_bytes"])}
        for kind in ("read", "copy"):
            if (rate := found[f"{kind}_GBps"]) is not None:
                yield What("card", {"kind": kind, **whose}, "bytes/s"), GIGA * rate
        for dtype, rate in found["matmul_TFLOPs"].items():
            if rate is not None:
                yield What("card", {"kind": "product", "dtype": dtype, **whose}, "FLOP/s"), TERA * rate


def _said(error: BaseException) -> str:
    return shorten(" ".join(str(error).split()), 200)[1:-1]
