"""Where this process stands among the ranks of one model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mesh:
    """`tp` ranks split each layer, `pp` ranks split the layers; this process is `rank` of tp × pp."""

    tp: int = 1
    pp: int = 1
    rank: int = 0
