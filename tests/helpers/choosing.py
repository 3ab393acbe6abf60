"""Which optimizers of the registry a test runs on."""

from collections.abc import Callable

import pytest
from registry import VARIANTS, Variant


def only(holds: Callable[[Variant], object]) -> pytest.MarkDecorator:
    """Runs a test only on the optimizers for which something holds."""
    chosen = [key for key, variant in VARIANTS.items() if holds(variant)]
    return pytest.mark.parametrize("variant", chosen, indirect=True)


def with_argument(name: str) -> pytest.MarkDecorator:
    """Runs a test only on the optimizers that have this argument."""
    return only(lambda variant: variant.takes(name))
