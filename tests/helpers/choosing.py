"""Which optimizers of the registry a test runs on."""

import pytest
from registry import VARIANTS


def with_argument(name: str) -> pytest.MarkDecorator:
    """Runs a test only on the optimizers that have this argument."""
    chosen = [key for key, variant in VARIANTS.items() if variant.takes(name)]
    return pytest.mark.parametrize("variant", chosen, indirect=True)
