"""Memory and time of a training run, by ZeRO stage, tensor and pipeline parallelism, recomputation and offloading."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from headrace.cli.plan_arguments import add_model, refuse_beside
from headrace.core.errors import InvalidParameter

if TYPE_CHECKING:
    from headrace.core.spec import ModelSpec
    from headrace.plan.document import Document
    from headrace.plan.training import Cluster, Layout

PRESETS = ("gpt-175b", "gpt-1t", "glm-130b")
SEARCHED = ("tp", "pp", "zero", "recompute", "interleave", "sequence_parallel")
"""What a search chooses."""
GIVEN = ("tp", "pp", "zero", "micro_batch", "sequence", "recompute", "interleave", "offload", "gpus")
FLAGS = ("sequence_parallel", "plain_attention", "dropout", "search")
WHERE = ("device", "gpus_per_node", "network", "efficiency")
RUN = ("tokens", "deepspeed", "torchtitan")
GB = 1e9
MOST = 2**24
"""Of any count; of layers MOST_LAYERS."""
MOST_LAYERS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from headrace.plan.training import EFFICIENCY, NETWORK, OFFLOAD, PER_NODE, RECOMPUTE

    add_model(parser, "llama-2-7b", instead="")
    parser.add_argument("--gpt", metavar="LAYERS,HIDDEN,HEADS", help="Instead of MODEL: a GPT of this shape.")
    parser.add_argument("--preset", choices=PRESETS, help="Instead of MODEL: a published run, with its layout.")
    parser.add_argument("--checks", action="store_true", help="Only the published figures, and what the formulas give.")
    where = parser.add_argument_group("where")
    where.add_argument("--device", metavar="NAME", help="Of the catalogue: H100, A100-80GB … Default: A100-80GB.")
    where.add_argument("--gpus", type=int, metavar="N", help="Default: 8.")
    where.add_argument("--gpus-per-node", type=int, metavar="N", help=f"Default: {PER_NODE}.")
    where.add_argument(
        "--network", type=float, metavar="GB/s", help=f"Between nodes, for each GPU. Default: {NETWORK / GB:g}."
    )
    where.add_argument(
        "--efficiency",
        type=float,
        metavar="X",
        help="Share of the peak that compute reaches, above 0 and at most 1. "
        f"Default: {EFFICIENCY}, between two runs of Frontier (--checks).",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--tp", type=int, metavar="N", help="GPUs that share every layer. Default: 1.")
    how.add_argument("--pp", type=int, metavar="N", help="Pipeline stages. Default: 1.")
    how.add_argument("--zero", type=int, metavar="N", help="ZeRO stage, 0 to 3. Default: 1.")
    how.add_argument("--micro-batch", type=int, metavar="N", help="Sequences at a time. Default: 1.")
    how.add_argument("--global-batch", type=int, metavar="N", help="Sequences of a step. Default: GPUs × micro-batch.")
    how.add_argument("--sequence", type=int, metavar="N", help="Tokens of a sequence. Default: 2048.")
    how.add_argument("--recompute", choices=RECOMPUTE, metavar="NAME", help=f"{', '.join(RECOMPUTE)}. Default: none.")
    how.add_argument("--sequence-parallel", action="store_true", help="Deal out norms and dropout over TP too.")
    how.add_argument("--interleave", type=int, metavar="N", help="Pieces of the model a pipeline stage. Default: 1.")
    how.add_argument("--plain-attention", action="store_true", help="Attention writes its scores (no flash attention).")
    how.add_argument("--dropout", action="store_true", help="Keep dropout's masks, as GPT-3 did.")
    how.add_argument(
        "--offload",
        choices=OFFLOAD,
        metavar="NAME",
        help=f"What lies on the host: {', '.join(OFFLOAD)}. Default: none.",
    )
    how.add_argument("--search", action="store_true", help="Instead of --tp … : all TP, PP and ZeRO that fit.")
    run = parser.add_argument_group("run")
    run.add_argument("--tokens", type=float, metavar="X", help="Of the whole run, 2e12 say: days, GPU-hours and rent.")
    run.add_argument("--deepspeed", metavar="FILE", help="Write the layout as a DeepSpeed config (JSON) to FILE.")
    run.add_argument(
        "--torchtitan", metavar="FILE", help="Write the layout as a config of torchtitan 0.2 (TOML) to FILE."
    )


def document(arguments: argparse.Namespace) -> Document:
    """Raises InvalidParameter, ModelError."""
    from headrace.plan.training_answer import search_document, training_document
    from headrace.plan.training_published import checks_document

    asked = [one for one in ("model", "gpt", "preset") if getattr(arguments, one) is not None]
    if arguments.checks and not asked:
        refuse_beside(arguments, "--checks", (*WHERE, *GIVEN, *FLAGS, "global_batch", *RUN))
        return checks_document()
    if arguments.checks or len(asked) != 1:
        found = ", ".join(asked + ["checks"] * arguments.checks) or None
        raise InvalidParameter("model", found, "one of MODEL, --gpt, --preset, --checks")
    spec, layout, device, source = _subject(arguments)
    cluster = _cluster(arguments, device)
    layout, batch = _layout(arguments, layout)
    if arguments.search:
        refuse_beside(arguments, "--search", (*SEARCHED, *RUN))
        return search_document(spec, layout, cluster, batch, source)
    _check_count("tokens", arguments.tokens)
    write = _fragments(arguments, layout, cluster.dtype, len(spec.layers))
    answer = training_document(spec, layout, cluster, source, arguments.tokens)
    return replace(answer, notes=[*answer.notes, *write()])


def _subject(arguments: argparse.Namespace) -> tuple[ModelSpec, Layout | None, str, str]:
    """(model, published layout, its device, where the sizes come from)."""
    from headrace.plan.training_published import presets

    if arguments.preset is not None:
        preset = presets()[arguments.preset]
        return preset.spec, preset.layout, preset.device, preset.source
    if arguments.gpt is not None:
        return _gpt(arguments.gpt), None, "A100-80GB", "--gpt"
    from headrace.plan.subject import read_subject

    subject = read_subject(arguments.model)
    return replace(subject.spec, name=subject.name), None, "A100-80GB", subject.source


def _gpt(text: str) -> ModelSpec:
    from headrace.plan.training import gpt

    allowed = "LAYERS,HIDDEN,HEADS: three whole numbers, heads a divisor of hidden"
    try:
        layers, hidden, heads = (int(one) for one in text.split(","))
    except ValueError as error:
        raise InvalidParameter("gpt", text, allowed) from error
    if not (1 <= layers <= MOST_LAYERS and 1 <= heads <= hidden <= MOST) or hidden % heads:
        raise InvalidParameter("gpt", text, allowed)
    return gpt(f"GPT of {layers} layers, hidden {hidden}", layers, hidden, heads)


def _cluster(arguments: argparse.Namespace, device: str) -> Cluster:
    from headrace.plan.devices import find_device
    from headrace.plan.fragments import PRECISIONS
    from headrace.plan.training import NETWORK, PER_NODE, Cluster

    chosen = find_device(arguments.device or device)
    share = arguments.efficiency
    if share is not None and not 0 < share <= 1:
        raise InvalidParameter("efficiency", share, "a number above 0 and at most 1")
    network = NETWORK / GB if arguments.network is None else arguments.network
    if not 0 < network <= MOST:
        raise InvalidParameter("network", network, f"GB/s above 0, up to {MOST}")
    per_node = PER_NODE if arguments.gpus_per_node is None else arguments.gpus_per_node
    if not 1 <= per_node <= MOST:
        raise InvalidParameter("gpus_per_node", per_node, f"an integer from 1 to {MOST}")
    dtype = next((name for name in PRECISIONS if name in chosen.flops), None)
    if dtype is None:
        raise InvalidParameter("device", chosen.name, "one with 16-bit arithmetic: training is in mixed precision")
    return Cluster(chosen, dtype, per_node, network * GB, share)


def _layout(arguments: argparse.Namespace, published: Layout | None) -> tuple[Layout, int]:
    """The layout, and the sequences of a step. What is given wins over the published one."""
    from headrace.plan.training import Layout

    layout = published or Layout(8)
    given = {name: getattr(arguments, name) for name in GIVEN if getattr(arguments, name) is not None}
    for name, value in given.items():
        if isinstance(value, int) and value > MOST:
            raise InvalidParameter(name, value, f"at most {MOST}")
        if name not in ("zero", "recompute", "offload") and value < 1:
            raise InvalidParameter(name, value, "an integer ≥ 1")
    layout = replace(
        layout,
        **given,
        sequence_parallel=arguments.sequence_parallel,
        fused=not arguments.plain_attention,
        dropout=arguments.dropout,
    )
    batch: int | None = arguments.global_batch
    if batch is None:
        kept = published is not None and not given
        batch = layout.global_batch if kept else layout.gpus * layout.micro_batch
    each = max(1, layout.dp) * layout.micro_batch
    if not 1 <= batch <= MOST or (not arguments.search and batch % each):
        raise InvalidParameter("global_batch", batch, f"a multiple of DP × micro-batch = {each}, up to {MOST}")
    return replace(layout, micro_batches=max(1, batch // each)), batch


def _check_count(field: str, value: float | None) -> None:
    if value is not None and not 0 < value < 1e18:
        raise InvalidParameter(field, value, "a number above 0 and below 1e18")


def _fragments(arguments: argparse.Namespace, layout: Layout, dtype: str, layers: int) -> Callable[[], list[str]]:
    """Refuses what cannot be written before the work; what it returns writes, and says so."""
    from headrace.pages.files import ReportFile
    from headrace.plan import fragments

    ready, notes = [], []
    if arguments.deepspeed is not None:
        text = fragments.json_text(fragments.deepspeed_training(layout, dtype))
        ready.append((ReportFile("deepspeed", arguments.deepspeed), text))
        notes += fragments.deepspeed_notes(layout)
    if arguments.torchtitan is not None:
        text = fragments.toml_text(fragments.torchtitan(layout, layers, dtype))
        ready.append((ReportFile("torchtitan", arguments.torchtitan), text))

    def write() -> list[str]:
        for file, text in ready:
            file.write(text)
        return [*notes, *(f"Written: {file.path}" for file, _ in ready)]

    return write
