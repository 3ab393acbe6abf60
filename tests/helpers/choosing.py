"""Which optimizers of the registry a test runs on."""

from collections.abc import Callable
from typing import Any

import pytest
from registry import VARIANTS, Variant


def only(holds: Callable[[Variant], object]) -> pytest.MarkDecorator:
    """Runs a test only on the optimizers for which something holds."""
    return pytest.mark.parametrize("variant", chosen(holds), indirect=True)


def chosen(holds: Callable[[Variant], object] = bool) -> list[Any]:
    """The optimizers for which something holds; all but first variants are slow."""
    return [
        key if variant.is_first else pytest.param(key, marks=pytest.mark.slow)
        for key, variant in VARIANTS.items()
        if holds(variant)
    ]


def with_argument(name: str) -> pytest.MarkDecorator:
    """Runs a test only on the optimizers that have this argument."""
    return only(lambda variant: variant.takes(name))
