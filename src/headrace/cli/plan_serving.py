"""Which mix of GPU types serves these requests within their latencies for the least money? (Mélange)"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.core.errors import InvalidParameter

if TYPE_CHECKING:
    from headrace.plan.document import Document

EXAMPLE = "melange-example"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from headrace.plan.serving import SLICE_FACTOR
    from headrace.plan.speed import QUANTS

    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        help="JSON, as Mélange has it: workload_distribution (rows: prompt sizes, columns: answer sizes), "
        "total_request_rate (requests/s), slice_factor, gpu_info: name -> cost ($/h; without: the catalogue's), and "
        "tputs (requests/s by size), points (with latencies: requests_per_s, ttft_s, itl_s) or reports (files of "
        "headrace compare --json); with input_tokens and output_tokens, the upper ends of the sizes, throughputs that "
        "are not there are predicted for --model.",
    )
    parser.add_argument("--preset", choices=(EXAMPLE,), help="Instead of FILE: the example of Mélange's repository.")
    parser.add_argument("--rate", type=float, metavar="X", help="Requests/s. Default: the file's.")
    parser.add_argument(
        "--slice-factor",
        type=int,
        metavar="N",
        help=f"Parts that the requests of one size may be dealt out in. Default: the file's, else {SLICE_FACTOR}.",
    )
    parser.add_argument("--ttft-s", type=float, metavar="S", help="Most seconds to the first token. Default: no limit.")
    parser.add_argument(
        "--itl-s", type=float, metavar="S", help="Most seconds between tokens, as a mean. Default: no limit."
    )
    parser.add_argument(
        "--gpus",
        metavar="LIST",
        help="GPU types to choose from, with commas: of the file or of the catalogue; 2xL4 is two of them that share "
        "every layer. Default: the file's.",
    )
    parser.add_argument("--model", metavar="MODEL", help="What throughputs that are not given are predicted for.")
    parser.add_argument(
        "--quant",
        choices=QUANTS,
        default="none",
        help="How a predicted model's weights are held. Default: none, 16 bits.",
    )


def document(arguments: argparse.Namespace) -> Document:
    """Raises InvalidParameter, InputFileError, ModelError, BackendUnavailable without scipy."""
    from headrace.plan.serving import Slo
    from headrace.plan.serving_document import document as answer
    from headrace.plan.serving_input import MELANGE, read_gpus, read_request, read_workload
    from headrace.plan.subject import read_subject

    if (arguments.file is None) == (arguments.preset is None):
        raise InvalidParameter("file", arguments.file, f"a FILE, or --preset {EXAMPLE}")
    slo = Slo(arguments.ttft_s, arguments.itl_s)
    folder = Path() if arguments.file is None else Path(arguments.file).parent
    request = MELANGE if arguments.file is None else read_request(Path(arguments.file))
    workload = read_workload(request, arguments.rate, arguments.slice_factor)
    names = None if arguments.gpus is None else [name.strip() for name in arguments.gpus.split(",")]
    model = None
    if arguments.model is not None:
        subject = read_subject(arguments.model)
        model = (subject.name, subject.spec)
    elif arguments.quant != "none":
        raise InvalidParameter("quant", arguments.quant, "only beside --model")
    gpus = read_gpus(request, workload, folder, names, model, arguments.quant)
    notes = [workload.note] if workload.note else []
    if model is not None:
        if all(gpu.basis in ("given", "measured") for gpu in gpus):
            raise InvalidParameter("model", arguments.model, "none where every GPU has its throughputs")
        notes.append(
            f"Predicted throughputs are those of {model[0]}, for the largest request of each size, at data-sheet speed "
            "(roofline): no engine reaches all of it, and no queue is counted."
        )
    return answer(gpus, workload.demand, slo, notes)
