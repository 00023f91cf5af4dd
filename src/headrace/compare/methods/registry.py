"""Names of methods, as a user writes them, to methods."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.compare.methods import Method
from headrace.compare.methods.admission import AdmissionMethod
from headrace.compare.methods.bench import Bench
from headrace.core.errors import InvalidParameter
from headrace.sched.policy import ALLOWED, parse_policy


def check_names(names: Sequence[str]) -> None:
    """Raises InvalidParameter unless every name is a method."""
    for name in names:
        try:
            parse_policy(name)
        except InvalidParameter as error:
            raise InvalidParameter("methods", name, f"a comma-separated list of {ALLOWED}") from error


def make_method(name: str, bench: Bench) -> Method:
    """The method of that name, not started. Raises InvalidParameter."""
    return AdmissionMethod(name, name, bench)
