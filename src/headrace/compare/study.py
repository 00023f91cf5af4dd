"""The published ratios of the study that this comparison generalises, and ours beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.compare.cells import ratio_of
from headrace.compare.runner import Comparison

SOURCE = (
    "NVLM-D-72B on six A100-SXM4-40GB GPUs, four text questions and six with a picture (NYCU-HPC-Team2, Open "
    "Hackathon, December 2024)"
)

IN_SHORT = (
    "The study: NVLM-D-72B on six A100 GPUs. Ratios of times, never seconds. It states no answer lengths; its vLLM row "
    "neither model, precision nor number of GPUs, and batching four questions alone gives 4 at most."
)

CAVEATS: Sequence[str] = (
    "Ratios of times, never seconds: the study's model, machine and answer lengths are others.",
    "The study does not state how long its answers are. Ours are held to the same token ids under every method, and "
    "where one differs its row says so.",
    "Where decoding is bound by memory traffic, a step takes as long for many rows as for one: a batch of all requests "
    "is then at most Σ lengths / longest length times as fast as one by one. 3.307 of four means that the study's mean "
    "answer was 0.83 of its longest.",
    "Its vLLM row states neither model, precision, number of GPUs nor answer length. Batching four questions alone "
    "gives 4 at most: the other tenfold is tensor parallelism and kernels, not another order of the same work.",
    "Its threads share one model, one interpreter lock and one device: 0.75 to 1.1 is to be expected of that, and with "
    "pictures they lost (0.762).",
    "Its layers lie on six GPUs without micro-batches, so that one works at a time. Every row but vLLM's pays for "
    "that, and vLLM's ratio gains by it.",
)
"""What has to be known before one of its numbers is quoted."""


BATCHES = ("dataloader", "static")
"""Kinds of methods of ours that are static batches."""


@dataclass(frozen=True, slots=True)
class Published:
    """One published ratio of times."""

    what: str
    ratio: float
    short: str = ""
    """What a terminal calls it; empty: it has no room for it."""
    ours: tuple[str, ...] = ()
    """Kinds of our methods (what stands before the colon of a name) that are nearest to it."""
    slowdown: bool = False
    """Ours is the time of such a method over the base's, not the base's over it."""
    pictures: bool = False
    """Of the questions with a picture."""


TABLE: Sequence[Published] = (
    Published("static batch against one by one", 3.307, "static batch", BATCHES),
    Published("static batch against one by one, both with flash attention", 3.309),
    Published("thread pool against one by one", 1.065, "thread pool", ("threads",)),
    Published("thread pool against one by one, both with flash attention", 1.059),
    Published(
        "flash attention on against off, one by one", 1.111, "flash attention on/off", ("plain-attention",), True
    ),
    Published("flash attention on against off, static batch", 1.111),
    Published("flash attention on against off, thread pool", 1.105),
    Published("with a picture: static batch against one by one", 1.515, "static batch", BATCHES, pictures=True),
    Published("with a picture: thread pool against one by one", 0.762, "thread pool", ("threads",), pictures=True),
    Published("vLLM against one by one with flash attention", 37.19, "vLLM", ("vllm", "fused")),
    Published("vLLM against one by one without it (not like with like)", 41.31),
)
"""Of its seconds: 208.60 / 63.07, 187.80 / 56.76, 208.60 / 195.93, 187.80 / 177.3, 208.60 / 187.80, 63.07 / 56.76,
195.93 / 177.3, 35.94 / 23.72, 35.94 / 47.18, 187.80 / 5.05, 208.60 / 5.05."""


def rows(comparison: Comparison) -> list[tuple[Published, list[tuple[str, float]]]]:
    """Every published ratio, with (name, ratio) of each method of ours that is nearest to it. A ratio of questions with
    pictures stands beside ours only where the workload has pictures, one without only where it has none."""
    pictures = has_pictures(comparison)
    found = []
    for published in TABLE:
        ours = []
        for result in comparison.methods if published.pictures == pictures else ():
            if result is not comparison.base and kind_of(result.name) in published.ours:
                ratio = ratio_of(result).median
                ours.append((result.name, 1 / ratio if published.slowdown else ratio))
        found.append((published, ours))
    return found


def nearest(comparison: Comparison, name: str) -> list[float]:
    """The study's ratios to one by one that stand beside the method `name`, if any."""
    pictures = has_pictures(comparison)
    return [
        published.ratio
        for published in TABLE
        if kind_of(name) in published.ours and published.pictures == pictures and not published.slowdown
    ]


def has_pictures(comparison: Comparison) -> bool:
    return comparison.workload.name.startswith("image")


def applies(comparison: Comparison) -> bool:
    """Whether the workload is one of the study's own."""
    return comparison.workload.name.startswith(("text4", "image6"))


def kind_of(name: str) -> str:
    """What stands before the number or the settings in a method's name."""
    return name.partition(":")[0].partition(",")[0]


def ratio_text(ratio: float, digits: int = 3) -> str:
    """Of a published ratio: so many decimals below 10, else one."""
    return f"{ratio:.{digits}f}" if ratio < 10 else f"{ratio:.1f}"
