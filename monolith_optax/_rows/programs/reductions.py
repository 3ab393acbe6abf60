"""Reductions over the rows of a table that need only those of the batch.

If a value is the same in all rows without a gradient, its reduction over the table is
that over the rows of the batch, and this value once more. Positions that have no row
are masked here, and not only in the gradient: what their gathered slots hold may have
become anything on the way.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from monolith_optax._rows.programs.jaxprs import Equation, bind
from monolith_optax._rows.programs.known_constants import Constant
from monolith_optax._rows.slices.row_access import Table
from monolith_optax._rows.types import EquationParams

_SUMS = {"reduce_sum": 0, "reduce_prod": 1, "reduce_xor": 0}
_EXTREMES = {
    "reduce_max": lax.max,
    "reduce_min": lax.min,
    "reduce_and": lax.bitwise_and,
    "reduce_or": lax.bitwise_or,
}
NAMES = frozenset({*_SUMS, *_EXTREMES, "dot_general"})


def is_over_rows(equation: Equation, row_axes: int) -> bool:
    """Whether an equation reduces over all row axes of its operands."""
    if equation.primitive.name == "dot_general":
        (left, right), _ = equation.params["dimension_numbers"]
        pairs = set(zip(left, right, strict=True))
        return pairs >= {(axis, axis) for axis in range(row_axes)}
    if equation.primitive.name not in NAMES:
        return False
    return set(equation.params["axes"]) >= set(range(row_axes))


def reduce_rows(
    equation: Equation, rows: list[jax.Array], elsewhere: list[Constant], table: Table
) -> jax.Array | None:
    """The result of a reduction over the rows of a table, or None.

    Args:
      equation: the reduction.
      rows: its operands at the positions of the batch.
      elsewhere: what is known of them in rows without a gradient.
      table: the table.
    """
    name, changed = str(equation.primitive.name), _of_one_axis(equation, table)
    if 0 in rows[0].shape[1:]:  # no row has any entries
        return _only(bind(equation, rows, **changed))
    if name == "dot_general":
        if not any(constant.is_zero() for constant in elsewhere):
            return None
        zeros = [np.zeros((), operand.dtype) for operand in rows]
        masked = list(map(table.mask, rows, zeros))
        return _only(bind(equation, masked, **changed))
    if elsewhere[0].value is None:
        return None
    [operand], constant = rows, elsewhere[0].value
    neutral = _neutral(name, operand.dtype)
    result = _only(bind(equation, [table.mask(operand, neutral)], **changed))
    if constant == neutral:
        return result
    if name in _SUMS:
        return None
    all_touched = jnp.sum(table.valid) == table.num_rows
    with_others = _EXTREMES[name](result, jnp.full_like(result, constant))
    return jnp.where(all_touched, result, with_others)


def _of_one_axis(equation: Equation, table: Table) -> EquationParams:
    """The parameters, where the row axes of the table are one."""
    count = len(table.axes)

    def moved(axes: Sequence[int]) -> tuple[int, ...]:
        others = tuple(axis - count + 1 for axis in axes if axis >= count)
        return (0, *others) if len(others) < len(axes) else others

    if equation.primitive.name != "dot_general":
        return {"axes": moved(equation.params["axes"])}
    # Rows come first in both operands.
    contracted, batch = equation.params["dimension_numbers"]
    numbers = tuple(map(moved, contracted)), tuple(map(moved, batch))
    return {"dimension_numbers": numbers}


def _only(results: list[jax.Array]) -> jax.Array:
    [result] = results
    return result


def _neutral(name: str, dtype: np.dtype) -> np.ndarray:
    """The number that a reduction ignores."""
    if name in _SUMS or name == "reduce_or":
        return np.asarray(_SUMS.get(name, 0), dtype)
    if name == "reduce_and":
        return ~np.zeros((), dtype)
    largest = name == "reduce_min"
    if dtype == jnp.bool_:
        return np.asarray(largest)
    if not jnp.issubdtype(dtype, jnp.inexact):
        integers = jnp.iinfo(dtype)
        return np.asarray(integers.max if largest else integers.min, dtype)
    infinity = np.asarray(np.inf if largest else -np.inf, dtype)
    if np.isinf(infinity):
        return infinity
    limits = jnp.finfo(dtype)  # an 8-bit dtype without infinities
    return np.asarray(limits.max if largest else limits.min, dtype)
