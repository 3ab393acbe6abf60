"""What is known of the rows that have no gradient: constants, found when asked for.

In such a row a gradient is 0, so that its square is 0, too, and whether it is finite is
True. Constants of results are found by applying the same operation to constants. Only
where one operand decides are there rules: `0 * x` and `0 / x` count as 0 whatever `x`
is, so where a dense step has NaN in a row without a gradient, because `x` is no
number there, a lazy step takes no notice of it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from monolith_optax._rows.programs.jaxprs import Equation, type_of


class Constant:
    """A number that all entries of some rows have, if one is known."""

    def __init__(
        self, find: Callable[[], Any], operands: "Sequence[Constant]" = ()
    ) -> None:
        self._find = find
        depths: list[int] = [operand._depth for operand in operands]
        self._depth: int = 1 + max(depths, default=0)
        if self._depth % 100 == 0:  # Python's stack has an end
            _ = self.value

    @functools.cached_property
    def value(self) -> Any:
        """The number, or None."""
        return self._find()

    def is_zero(self) -> bool:
        """Whether the number is known to be zero."""
        return self.value is not None and not self.value


UNKNOWN = Constant(lambda: None)
ZERO = Constant(lambda: np.zeros(()))


def literal(value: Any) -> Constant:
    """What is known of an array or number in a program: numbers that are part of it.

    Arrays are not: what they hold may change without another program.
    """
    if isinstance(value, jax.Array) or np.ndim(value) != 0:
        return UNKNOWN
    return Constant(lambda: np.asarray(value))


def after(
    equation: Equation,
    operands: Sequence[Constant],
    evaluate: Callable[[list[Any]], list[Any]],
) -> list[Constant]:
    """What is known of the results of an equation.

    Args:
      equation: the equation.
      operands: what is known of its operands.
      evaluate: applies the equation to constants.
    """

    @functools.cache
    def find() -> list[Any]:
        values = [operand.value for operand in operands]
        decided = _decided(str(equation.primitive.name), values)
        if decided is not None:
            return [np.asarray(decided, type_of(equation.outvars[0]).dtype)]
        if any(value is None for value in values):
            return [None] * len(equation.outvars)
        typed = [
            np.asarray(value, type_of(operand).dtype)
            for value, operand in zip(values, equation.invars, strict=True)
        ]
        # Constants may be computed where the user forbids transfers of data.
        with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
            return [_common(np.asarray(result)) for result in evaluate(typed)]

    def result(index: int) -> Constant:
        return Constant(lambda: find()[index], operands)

    return list(map(result, range(len(equation.outvars))))


def joined(alternatives: Sequence[Constant]) -> Constant:
    """What is known of a value that is one of several."""
    return Constant(lambda: _same([each.value for each in alternatives]), alternatives)


def _decided(name: str, values: list[Any]) -> Any:
    """The result where some operands decide it, whatever the others are."""
    zeros = [value is not None and not value for value in values]
    if name in ("mul", "and", "dot_general") and any(zeros):
        return 0
    if name == "div" and zeros[0]:
        return 0
    if name == "select_n":
        chosen, *cases = values
        return _same(cases) if chosen is None else cases[int(chosen)]
    return None


def _same(values: list[Any]) -> Any:
    first, *others = values
    if any(value is None for value in values) or any(v != first for v in others):
        return None
    return first


def _common(results: np.ndarray[Any, Any]) -> Any:
    """The one number that all entries have, if they do."""
    if results.size == 0 or (results != results.flat[0]).any():
        return None
    return results.flat[0]
