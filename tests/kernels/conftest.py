"""Every test here runs kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.triton_interpreter import products_in_order


@pytest.fixture(autouse=True)
def _interpreted(interpreted: None) -> None:
    """See tests/conftest.py."""


@pytest.fixture
def ordered() -> Iterator[None]:
    """For tests of bits: see `products_in_order`."""
    with products_in_order():
        yield
