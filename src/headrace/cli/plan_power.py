"""Extra servers on one row's power: the two-threshold controller, simulated; brakes and latency by priority.

It changes no device: it prints the commands that an operator would run.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from headrace.core.errors import InvalidParameter

if TYPE_CHECKING:
    from headrace.plan.document import Document

MOST_POINTS = 101


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("row")
    group.add_argument("--servers", type=int, metavar="N", help="That the power is provisioned for. Default: 40.")
    group.add_argument("--server-kw", type=float, metavar="X", help="Provisioned for each. Default: 6.5 (DGX A100).")
    group.add_argument(
        "--utilisation", type=float, metavar="X", help="Mean share of its time that a server is busy. Default: 0.55."
    )
    group.add_argument(
        "--wave", type=float, metavar="X", help="By which share of it the load rises and falls in a day. Default: 0.5."
    )
    group.add_argument("--hours", type=float, metavar="X", help="Simulated, from the lowest load on. Default: 24.")
    group.add_argument("--seed", type=int, metavar="N", help="Of the arrivals and lengths. Default: 0.")
    group = parser.add_argument_group("controller")
    group.add_argument("--t1", type=float, metavar="X", help="First threshold, a share of the power. Default: 0.80.")
    group.add_argument("--t2", type=float, metavar="X", help="Second threshold. Default: 0.89.")
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--extra", type=float, metavar="X", default=30.0, help="%% more servers whose power is drawn. Default: 30."
    )
    group.add_argument("--most", type=float, metavar="X", default=50.0, help="%% more servers at most. Default: 50.")
    group.add_argument("--step", type=float, metavar="X", default=10.0, help="%% from point to point. Default: 10.")


def document(arguments: argparse.Namespace) -> Document:
    """Raises InvalidParameter."""
    from headrace.plan import power_document
    from headrace.plan.power import Policy
    from headrace.plan.power_simulation import Row, point

    row, policy = Row(**_given(arguments, Row)), Policy(**_given(arguments, Policy))
    extras = _extras(arguments)
    points = [point(row, policy, extra) for extra in extras]
    shown = points[extras.index(_share(arguments.extra))]
    given = frozenset(_given(arguments, Row)) | frozenset(_given(arguments, Policy))
    return power_document.document(row, policy, points, shown, given)


def _given(arguments: argparse.Namespace, config: type) -> dict[str, Any]:
    values = {item.name: getattr(arguments, item.name, None) for item in fields(config)}
    return {name: value for name, value in values.items() if value is not None}


def _extras(arguments: argparse.Namespace) -> list[float]:
    """Shares of extra servers, from none to the most, and the one that is drawn."""
    from headrace.plan.cost import check_number

    check_number("extra", arguments.extra, 0, 200)
    check_number("most", arguments.most, 0, 200)
    check_number("step", arguments.step, above=True)
    if arguments.most / arguments.step >= MOST_POINTS:
        raise InvalidParameter("step", arguments.step, f"more: at most {MOST_POINTS} points are simulated")
    count = int(arguments.most / arguments.step + 1e-9)
    return sorted({_share(arguments.step * index) for index in range(count + 1)} | {_share(arguments.extra)})


def _share(percent: float) -> float:
    """Of percent, without what floats leave behind the last digit: no point is simulated twice."""
    return round(percent / 100, 9)
