"""How long matrix products take on this machine: a random forest trained on a sweep, beside the roofline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.core.errors import InvalidParameter

if TYPE_CHECKING:
    from headrace.plan.document import Document
    from headrace.plan.gemm_sweep import Product

MOST_PRODUCTS = 1000
PRODUCT = "MxNxK or MxNxK:PRECISION, such as 32x1536x576:int8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("matrix products")
    group.add_argument(
        "--product",
        metavar="MxNxK[:PRECISION]",
        action="append",
        default=[],
        help="Predict x wᵀ of M rows of K numbers with N rows of weights; PRECISION: float32, bfloat16, int8 or int4 "
        "(default: each). May be given several times.",
    )
    group.add_argument("--sweep", metavar="FILE", help="Learn from a sweep that --save wrote, instead of measuring.")
    group.add_argument("--save", metavar="FILE", help="Write the sweep to FILE (JSON).")
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="Threads of the sweep. Default: one per CPU that this process may use.",
    )


def document(arguments: argparse.Namespace) -> Document:
    """Raises InvalidParameter, BackendUnavailable, OSError."""
    from headrace.engine.hardware import probe_hardware
    from headrace.pages.files import ReportFile
    from headrace.plan.gemm import Predictor, require_forest
    from headrace.plan.gemm_document import describe
    from headrace.plan.gemm_sweep import measure_sweep, read_sweep, sweep_text
    from headrace.plan.probe_tools import check_threads

    threads = check_threads(arguments.threads, probe_hardware().cores)
    if arguments.sweep is not None and arguments.threads is not None:
        raise InvalidParameter("threads", threads, "to leave it out with --sweep, whose threads are the file's")
    if len(arguments.product) > MOST_PRODUCTS:
        raise InvalidParameter("product", len(arguments.product), f"at most {MOST_PRODUCTS} of them")
    asked = [product for text in arguments.product for product in products_of(text)]
    # Before the sweep, so that its seconds are not lost.
    require_forest()
    save = None if arguments.save is None else ReportFile("save", arguments.save)
    sweep = measure_sweep(threads) if arguments.sweep is None else read_sweep(Path(arguments.sweep))
    if save is not None:
        save.write(sweep_text(sweep))
    return describe(Predictor(sweep), list(dict.fromkeys(asked)))


def products_of(text: str) -> list[Product]:
    """MxNxK[:PRECISION]; without a precision one product for each. Raises InvalidParameter."""
    from headrace.plan.gemm_sweep import Product
    from headrace.plan.probe_programs import BITS

    sizes, colon, precision = text.partition(":")
    parts = sizes.lower().split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and len(part) < 12 for part in parts):
        raise InvalidParameter("product", text, PRODUCT)
    m, n, k = map(int, parts)
    return [Product(m, n, k, name) for name in ((precision,) if colon else tuple(BITS))]
