"""`headrace plan serving` from its words to its document, for tests."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from headrace.cli import plan_serving
from headrace.plan.document import Document, Quantity, Table

WORKLOAD: Mapping[str, object] = {
    "workload_distribution": [[6, 2], [1, 1]],
    "total_request_rate": 20,
    "input_tokens": [100, 1000],
    "output_tokens": [50, 400],
}


def run(*words: str) -> Document:
    parser = argparse.ArgumentParser()
    plan_serving.add_arguments(parser)
    return plan_serving.document(parser.parse_args(words))


def quantity(found: Document, name: str) -> Quantity:
    (one,) = [one for one in found.quantities if one.name == name]
    return one


def table(found: Document, title: str) -> Table:
    (one,) = [one for one in found.tables if one.title == title]
    return one


def written(folder: Path, **changes: object) -> str:
    """A file with WORKLOAD and these changes; None: without."""
    path = folder / "workload.json"
    path.write_text(json.dumps({key: value for key, value in {**WORKLOAD, **changes}.items() if value is not None}))
    return str(path)
