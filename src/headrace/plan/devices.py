"""What can be bought or rented, as data: peaks of data sheets and of one paper. A measured probe overrides all of it.

Rates are those of dense arithmetic (no sparsity) and of one direction of a link. GB = 10^9 bytes, as vendors count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from headrace.core.errors import InvalidParameter
from headrace.plan.document import Basis

GB = 10**9
TERA = 1e12
Kind = Literal["gpu", "cpu", "pim"]


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or one node's processors."""

    name: str
    kind: Kind
    flops: Mapping[str, float]
    """Dense FLOP/s (int8: operations/s) by type: float32, bfloat16, float16, fp8, int8. A type that is not there is one
    the device has no units for."""
    memory_bytes: int
    bandwidth: float
    """Of its memory, bytes/s."""
    watts: float | None
    """At full load."""
    price_per_hour: float | None
    """USD; None: no published one in the sources."""
    host_link: float | None
    """Bytes/s between host and device, one direction; None: it is the host."""
    peer_link: float | None
    """Bytes/s to another device of the node, one direction; None: there is no other."""
    source: str
    basis: Basis = "data sheet"


def _gpu(
    name: str,
    tflops: Mapping[str, float],
    memory_gb: int,
    gb_per_s: float,
    watts: float,
    links_gb_per_s: tuple[float, float],
    source: str,
    price: float | None = None,
) -> Device:
    """`links_gb_per_s`: to the host, to a peer."""
    host, peer = (rate * GB for rate in links_gb_per_s)
    flops = {dtype: rate * TERA for dtype, rate in tflops.items()}
    return Device(name, "gpu", flops, memory_gb * GB, gb_per_s * GB, watts, price, host, peer, source)


def _halves(rate: float) -> Mapping[str, float]:
    return {"bfloat16": rate, "float16": rate}


_PRICE = "; price: Mélange, its GPU table"
_HOPPER: Mapping[str, float] = {"float32": 67, **_halves(989), "fp8": 1979, "int8": 1979}
_AMPERE: Mapping[str, float] = {"float32": 19.5, **_halves(312), "int8": 624}

_ALL: tuple[Device, ...] = (
    _gpu("A100-40GB", _AMPERE, 40, 1555, 400, (32, 300), "NVIDIA A100 data sheet, SXM 40 GB"),
    _gpu("A100-80GB", _AMPERE, 80, 2039, 400, (32, 300), "NVIDIA A100 data sheet, SXM 80 GB" + _PRICE, 3.67),
    _gpu("H100", _HOPPER, 80, 3350, 700, (64, 450), "NVIDIA H100 data sheet, SXM5" + _PRICE, 7.516),
    _gpu("H200", _HOPPER, 141, 4800, 700, (64, 450), "NVIDIA H200 data sheet, SXM5"),
    _gpu(
        "L4",
        {"float32": 30.3, **_halves(121), "fp8": 242, "int8": 242},
        24,
        300,
        72,
        (32, 32),
        "NVIDIA L4 data sheet" + _PRICE,
        0.70,
    ),
    _gpu(
        "A10G",
        {"float32": 31.2, **_halves(125), "int8": 250},
        24,
        600,
        300,
        (32, 32),
        "NVIDIA A10 data sheet (boost clock), 300 W as A10G" + _PRICE,
        1.01,
    ),
    _gpu("T4", {"float32": 8.1, "float16": 65, "int8": 130}, 16, 320, 70, (16, 16), "NVIDIA T4 data sheet"),
    _gpu("V100", {"float32": 15.7, "float16": 125}, 32, 900, 300, (16, 150), "NVIDIA V100 data sheet, SXM2 32 GB"),
    _gpu(
        "RTX-4090",
        {"float32": 82.6, **_halves(165), "fp8": 330, "int8": 660.6},
        24,
        1008,
        450,
        (32, 32),
        "NVIDIA Ada GPU architecture paper (tensor cores with float32 sums)",
    ),
    _gpu(
        "MI250X",
        {"float32": 47.85, **_halves(191.5), "int8": 191.5},
        64,
        1638,
        280,
        (36, 50),
        "AMD MI250X data sheet, one of its two dies (GCD); links as in Frontier's nodes",
    ),
    Device(
        name="Dual-SPR-8480C",
        kind="cpu",
        flops={"float32": 112 * 64 * 2.0e9, "bfloat16": 112 * 2048 * 2.0e9, "int8": 112 * 4096 * 2.0e9},
        memory_bytes=2000 * GB,
        bandwidth=614.4e9,
        watts=700,
        price_per_hour=None,
        host_link=None,
        peer_link=None,
        source="Intel Xeon 8480C: 2 sockets x 56 cores at 2.0 GHz, AVX-512 and AMX, 8 channels of DDR5-4800 each; "
        "2 TB as in a DGX H100; 700 W is the processors alone",
    ),
    Device(
        name="EPYC-7763",
        kind="cpu",
        flops={"float32": 64 * 32 * 2.45e9},
        memory_bytes=512 * GB,
        bandwidth=204.8e9,
        watts=280,
        price_per_hour=None,
        host_link=None,
        peer_link=None,
        source="AMD EPYC 7763 data sheet: 64 cores at 2.45 GHz, AVX2, 8 channels of DDR4-3200; 512 GB assumed",
    ),
    Device(
        name="PIM-GPT-v2",
        kind="pim",
        flops={"bfloat16": 8 * 16 * 32 * 1.0e9},
        memory_bytes=4 * GB,
        bandwidth=8 * 16 * 32e9,
        watts=None,
        price_per_hour=None,
        host_link=None,
        peer_link=None,
        source="PIM-GPT, arXiv 2310.09385 version 2: 8 channels x 16 banks, a bank reads 32 bytes and does 16 products "
        "a nanosecond (configuration not checked against the paper's table); simulated there, never built",
        basis="published",
    ),
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _ALL}

_ALIASES: Mapping[str, str] = {
    "a100": "A100-80GB",
    "a100sxm": "A100-80GB",
    "a10": "A10G",
    "h100sxm": "H100",
    "h100sxm5": "H100",
    "h20080gb": "H200",
    "v100sxm": "V100",
    "teslat4": "T4",
    "4090": "RTX-4090",
    "geforcertx4090": "RTX-4090",
    "mi250xgcd": "MI250X",
    "8480c": "Dual-SPR-8480C",
    "spr8480c": "Dual-SPR-8480C",
    "spr": "Dual-SPR-8480C",
    "epyc": "EPYC-7763",
    "7763": "EPYC-7763",
    "pim": "PIM-GPT-v2",
    "pimgpt": "PIM-GPT-v2",
}


def _plain(name: str) -> str:
    """Case, punctuation, the vendor's name and a trailing GB say nothing about which device is meant."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"gb$", "", re.sub(r"^(nvidia|amd|intel)", "", letters))


def find_device(name: str) -> Device:
    """Of the catalogue, whatever the case and punctuation. Raises InvalidParameter, with the names there are."""
    wanted = _plain(name)
    for known, device in DEVICES.items():
        if _plain(known) == wanted:
            return device
    if wanted in _ALIASES:
        return DEVICES[_ALIASES[wanted]]
    raise InvalidParameter("device", name, ", ".join(DEVICES))


# ---------------------------------------------------------------- whether two names are of one

_COUNT = re.compile(r"^\s*\d+\s*[x×]\s*")
_BRAND = re.compile(
    r"\b(nvidia|amd|intel|tesla|geforce|xeon|platinum|gold|silver|dual|spr|processor|cpu|gpu|\d+[ -]core)\b|\((r|tm)\)"
)
_MEMORY = re.compile(r"\b(\d+) ?gb\b|\bhbm\d?e?\b")
_FORM = re.compile(r"\b(sxm\d?|pcie|nvl)\b")


def same_device(one: str, other: str) -> bool:
    """Whether two names may be those of one device: `6 x NVIDIA A100-SXM4-80GB` and `a100 80 gb` are, and so are the
    catalogue's names for one. What one of them leaves out, memory or form, is no difference."""
    (plain, memory, form), (others, other_memory, other_form) = _parts(one), _parts(other)
    with suppress(InvalidParameter):
        if find_device(_COUNT.sub("", one)) is find_device(_COUNT.sub("", other)):
            return True
    known = (memory, other_memory), (form, other_form)
    return plain == others and all(here == there or not here or not there for here, there in known)


def _parts(device: str) -> tuple[str, str, str]:
    """(model, GB, form) of a device's name; empty: it does not say."""
    text = re.sub(r"[-_/,]", " ", _COUNT.sub("", device.casefold()))
    memory, form = _MEMORY.search(text), _FORM.search(text)
    plain = re.sub(r"[\W_]", "", _FORM.sub(" ", _MEMORY.sub(" ", _BRAND.sub(" ", text))))
    # A name of nothing but brands is told apart by them.
    return plain or text, (memory and memory[1]) or "", form[0][:3] if form else ""


def as_measured(device: Device, card: Device) -> Device:
    """A device of the catalogue with the figures of a probed one of its kind; what the probe did not measure stays."""
    return replace(
        device,
        flops={**device.flops, **card.flops},
        memory_bytes=card.memory_bytes,
        bandwidth=card.bandwidth,
        host_link=card.host_link or device.host_link,
        source=f"{card.source}; what that did not measure: {device.source}",
        basis=card.basis,
    )
