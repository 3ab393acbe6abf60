"""Which optimizers of the registry a test runs on, and which cases by default."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from registry import VARIANTS, Variant


def only(holds: Callable[[Variant], object]) -> pytest.MarkDecorator:
    """Runs a test only on the optimizers for which something holds."""
    chosen = [key for key, variant in VARIANTS.items() if holds(variant)]
    return pytest.mark.parametrize("variant", chosen, indirect=True)


def with_argument(name: str) -> pytest.MarkDecorator:
    """Runs a test only on the optimizers that have this argument."""
    return only(lambda variant: variant.takes(name))


def sampled(cases: Iterable[Any], *sample: Any) -> list[Any]:
    """The cases of a test, of which only CI runs those that are not in the sample.

    A tuple is a case of several arguments.
    """
    cases = list(cases)
    assert {*sample} <= {*cases}
    return [case if case in sample else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
