"""The roofline of a probed machine: what bandwidth and arithmetic allow, and where products and applications lie.

Attainable FLOP/s = min(peak, bandwidth × intensity), intensity in FLOPs a byte moved (Williams, Waterman, Patterson,
Roofline, CACM 2009).
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.core.sizing import product_bytes, product_flops
from headrace.plan.document import Plot, Series
from headrace.plan.profile import Figure, Profile

GIGA = 1e9
INTENSITIES: Sequence[float] = tuple(2.0**power for power in range(-5, 13))
"""Of the plot, FLOPs a byte."""
SOURCE = "Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009"
PEAKS: Sequence[tuple[str, str]] = (("float32", "float32"), ("int8", "int8 × int8 or int4"))
"""Type of arithmetic -> how it is called."""
PRODUCTS: Sequence[str] = ("float32", "bfloat16", "int8", "int4")
"""Precisions of weights."""


def attainable(peak: float, bandwidth: float, intensity: float) -> float:
    """FLOP/s. `peak` in FLOP/s, `bandwidth` in bytes/s, `intensity` in FLOPs a byte."""
    return min(peak, bandwidth * intensity)


def product_intensity(one: Figure) -> float:
    """FLOPs a byte of a `gemm` figure: its weight once, activations and result as float32."""
    rows, n, k = (int(one.of[name]) for name in ("rows", "n", "k"))
    return product_flops(rows, n, k) / (float(one.of["weight_bytes"]) + product_bytes(rows, n, k, 0))


def roofline(profile: Profile) -> Plot | None:
    """None: too little was measured for one."""
    if profile.find("read") is None:
        return None
    flops = profile.device().flops
    peaks = {name: flops[dtype] for dtype, name in PEAKS if dtype in flops}
    if not peaks:
        return None
    bandwidth = profile.read_bandwidth()
    series = [
        Series(f"{name}: memory {bandwidth / GIGA:.0f} GB/s, peak {peak / GIGA:.0f} GFLOP/s", _roof(peak, bandwidth))
        for name, peak in peaks.items()
    ]
    fastest = max(one.value for one in profile.figures if one.name == "read" and one.value)
    if fastest > bandwidth:
        roof = _roof(max(peaks.values()), fastest)
        series.append(Series(f"from caches: {fastest / GIGA:.0f} GB/s", roof, "dashed"))
    for weights in PRODUCTS:
        products = [one for one in profile.figures if one.name == "gemm" and one.of.get("weights") == weights]
        points = [(product_intensity(one), one.value / GIGA) for one in products if one.value]
        if points:
            series.append(Series(f"products, {weights} weights", sorted(points), "dots"))
    for one in profile.figures:
        if one.name == "application" and one.value:
            point = (float(one.of["intensity"]), one.value / GIGA)
            series.append(Series(str(one.of["kernel"]), [point], "dots"))
    return Plot(
        f"Roofline of {profile.machine.cpu}, {profile.machine.threads} threads",
        "intensity, FLOPs a byte",
        "GFLOP/s",
        series,
        log_x=True,
        log_y=True,
    )


def _roof(peak: float, bandwidth: float) -> list[tuple[float, float]]:
    """Points of a roof, the ridge among them."""
    places = sorted({*INTENSITIES, peak / bandwidth})
    return [(x, attainable(peak, bandwidth, x) / GIGA) for x in places]
