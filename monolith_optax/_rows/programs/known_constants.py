"""What is known of the rows that have no gradient: constants, found when asked for.

In such a row a gradient is 0, so that its square is 0, too, and whether it is finite is
True. Constants of results are found by applying the same operation to constants. Only
where one operand decides are there rules: `0 * x` and `0 / x` count as 0 whatever `x`
is, so where a dense step has NaN in a row without a gradient, because `x` is not a
number there, a lazy step ignores it. But `x` decides the sign of that 0.

In clipping by a norm and then adagrad, with the gradient `g` and the slot `norm`:

    a = square g            0, as square(0) is
    b = reduce_sum a        zeros add nothing, so the rows of the batch are enough
    c = div g (sqrt b)      0 of either sign, as 0 / x is
    d = mul c c             0 of either sign: that both are the same value is not seen
    e = add d norm          unknown, as the slot is
    f = mul (rsqrt e) c     0 of either sign, whatever rsqrt e is

Nothing of this is computed before it is asked for: here only the constant of `a` is, by
the reduction (`reductions.py`).
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import numpy as np
from jax.typing import ArrayLike

from monolith_optax._rows.programs.jaxprs import Equation, type_of
from monolith_optax._rows.programs.primitives import PLACEMENTS


class _EitherZero:
    """Stands for 0 and -0, in any mixture."""


_EITHER_ZERO = _EitherZero()

# A number, what stands for one, or None if it is not known.
Found: TypeAlias = np.ndarray | _EitherZero | None

# Applies an equation to numbers.
Evaluate: TypeAlias = Callable[[list[np.ndarray]], list[np.ndarray]]


class Constant:
    """A number that all entries of some rows have, if one is known."""

    def __init__(
        self, find: Callable[[], Found], operands: "Sequence[Constant]" = ()
    ) -> None:
        self._find = find
        depths: list[int] = [operand._depth for operand in operands]
        self._depth: int = 1 + max(depths, default=0)
        if self._depth % 100 == 0:  # Python's stack has an end
            _ = self.found

    @functools.cached_property
    def found(self) -> Found:
        """The number, or what stands for a zero of any sign, or None."""
        return self._find()

    @property
    def value(self) -> np.ndarray | None:
        """The number, or None."""
        return np.zeros(()) if isinstance(self.found, _EitherZero) else self.found

    def is_zero(self) -> bool:
        """Whether the number is known to be zero."""
        return self.value is not None and not self.value


UNKNOWN = Constant(lambda: None)
ZERO = Constant(lambda: np.zeros(()))


def literal(value: ArrayLike) -> Constant:
    """What is known of an array or number in a program: numbers that are part of it.

    Arrays are not: what they hold may change without another program.
    """
    if isinstance(value, jax.Array) or np.ndim(value) != 0:
        return UNKNOWN
    return Constant(lambda: np.asarray(value))


def after(
    equation: Equation,
    operands: Sequence[Constant],
    evaluate: Evaluate,
) -> list[Constant]:
    """What is known of the results of an equation.

    Args:
      equation: the equation.
      operands: what is known of its operands.
      evaluate: applies the equation to constants.
    """

    @functools.cache
    def find() -> list[Found]:
        found = [operand.found for operand in operands]
        results = _evaluated(equation, found, evaluate)
        if results[0] is None:
            results[0] = _decided(str(equation.primitive.name), found)
        return results

    def result(index: int) -> Constant:
        return Constant(lambda: find()[index], operands)

    return list(map(result, range(len(equation.outvars))))


def joined(alternatives: Sequence[Constant]) -> Constant:
    """What is known of a value that is one of several."""
    return Constant(lambda: _same([each.found for each in alternatives]), alternatives)


def _evaluated(
    equation: Equation, found: list[Found], evaluate: Evaluate
) -> list[Found]:
    """The constants of results, of operands that are all known."""
    count = len(equation.outvars)
    if any(value is None for value in found):
        return [None] * count
    if equation.primitive.name in PLACEMENTS:
        return list(found)
    cases: list[list[np.ndarray]] = [[] for _ in range(count)]
    signs = [(0.0, -0.0) if value is _EITHER_ZERO else (value,) for value in found]
    for values in itertools.product(*signs):
        typed = [
            np.asarray(value, type_of(operand).dtype)
            for value, operand in zip(values, equation.invars, strict=True)
        ]
        results = [result.reshape(-1) for result in evaluate(typed)]
        for case, result in zip(cases, results, strict=True):
            case.extend(result)
    return [_same(case) if case else None for case in cases]


def _decided(name: str, found: list[Found]) -> Found:
    """The result where some operands decide it, whatever the others are."""
    zeros = [
        value is _EITHER_ZERO or (value is not None and not value) for value in found
    ]
    if name == "and" and any(zeros):
        return np.zeros((), bool)
    if (name in ("mul", "dot_general") and any(zeros)) or (name == "div" and zeros[0]):
        return _EITHER_ZERO
    if name == "select_n":
        chosen, *cases = found
        if chosen is None:
            return _same(cases)
        return cases[int(0 if isinstance(chosen, _EitherZero) else chosen)]
    return None


def _same(values: Sequence[Found]) -> Found:
    """The one number that all values are, if they are."""
    if any(value is None for value in values):
        return None
    plain = [
        np.zeros(()) if isinstance(value, _EitherZero) else np.asarray(value)
        for value in values
    ]
    first = plain[0]
    if any(value != first for value in plain):
        return None
    signs = {bool(np.signbit(np.real(value))) for value in plain}
    if len(signs) > 1 or any(value is _EITHER_ZERO for value in values):
        return _EITHER_ZERO
    return first
