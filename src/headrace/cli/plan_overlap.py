"""How fast could this node serve at most, and what do overlapped nano-batches bring? (NanoFlow)"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from headrace.cli.plan_arguments import add_model, device_named
from headrace.core.errors import InvalidParameter

if TYPE_CHECKING:
    from headrace.plan.document import Document

DEVICE, GPUS = "A100-80GB", 8
MOST_NANO = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from headrace.plan.overlap import GEMM_EFFICIENCY, NANO, Traffic

    usual = Traffic()
    add_model(
        parser,
        "llama-2-70b",
        instead="Without it: NanoFlow's published case, LLaMA-2-70B on 8 A100 with the constants of its repository.",
    )
    parser.add_argument("--device", metavar="NAME", help=f"Of the catalogue. Default: {DEVICE}.")
    parser.add_argument("--gpus", type=int, metavar="N", help=f"That deal out every layer. Default: {GPUS}.")
    parser.add_argument(
        "--gemm-efficiency",
        type=float,
        metavar="X",
        help="Share of the data sheet's FLOP/s that matrix products reach. "
        f"Default: {GEMM_EFFICIENCY:.3f}, NanoFlow's 260 of an A100's 312 TFLOP/s.",
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", default=usual.batch, help=f"Tokens of an iteration. Default: {usual.batch}."
    )
    parser.add_argument(
        "--prompt", type=int, metavar="N", default=usual.prompt, help=f"Tokens of a prompt. Default: {usual.prompt}."
    )
    parser.add_argument(
        "--output", type=int, metavar="N", default=usual.output, help=f"Tokens of an answer. Default: {usual.output}."
    )
    parser.add_argument(
        "--nano",
        metavar="LIST",
        default=",".join(map(str, NANO)),
        help=f"Numbers of nano-batches to simulate. Default: {','.join(map(str, NANO))}.",
    )


def document(arguments: argparse.Namespace) -> Document:
    """Raises InvalidParameter, ModelError."""
    from headrace.plan import overlap
    from headrace.plan.devices import find_device
    from headrace.plan.subject import read_subject

    traffic = overlap.Traffic(arguments.batch, arguments.prompt, arguments.output)
    nano = _counts(arguments.nano)
    own_node = (arguments.device, arguments.gpus, arguments.gemm_efficiency) != (None, None, None)
    if arguments.model is None:
        subject, parameters = read_subject(overlap.PUBLISHED_MODEL), overlap.PUBLISHED_PARAMETERS
        if not own_node:
            return overlap.document(subject, overlap.NANOFLOW_NODE, traffic, nano, parameters)
    else:
        subject, parameters = read_subject(arguments.model), None
    device = find_device(DEVICE) if arguments.device is None else device_named(arguments.device)
    efficiency = overlap.GEMM_EFFICIENCY if arguments.gemm_efficiency is None else arguments.gemm_efficiency
    node = overlap.node_of(device, GPUS if arguments.gpus is None else arguments.gpus, efficiency)
    return overlap.document(subject, node, traffic, nano, parameters)


def _counts(text: str) -> list[int]:
    """Rising, each once, 1 among them: all else is held against it."""
    allowed = f"integers from 1 to {MOST_NANO}, separated by commas"
    try:
        counts = {int(part) for part in text.split(",")}
    except ValueError:
        raise InvalidParameter("nano", text, allowed) from None
    if not all(1 <= count <= MOST_NANO for count in counts):
        raise InvalidParameter("nano", text, allowed)
    return sorted(counts | {1})
