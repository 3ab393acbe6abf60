"""Reductions over the rows of a table that need only those of the batch.

If a value is the same in all rows without a gradient, its reduction over the table is
that over the rows of the batch, and this value once more. Positions that have no row
are masked here, and not only in the gradient: what their gathered slots hold may have
become anything on the way.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from monolith_optax._rows.programs.jaxprs import Equation, bind
from monolith_optax._rows.programs.known_constants import Constant
from monolith_optax._rows.slices.row_access import Table

_SUMS = {"reduce_sum": 0, "reduce_prod": 1, "reduce_xor": 0}
_EXTREMES = {
    "reduce_max": lax.max,
    "reduce_min": lax.min,
    "reduce_and": lax.bitwise_and,
    "reduce_or": lax.bitwise_or,
}


def is_over_rows(equation: Equation) -> bool:
    """Whether an equation reduces over the first axes of its operands."""
    if equation.primitive.name == "dot_general":
        (left, right), _ = equation.params["dimension_numbers"]
        return (0, 0) in zip(left, right, strict=True)
    name = equation.primitive.name
    return name in _SUMS | _EXTREMES and 0 in equation.params["axes"]


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
    name = str(equation.primitive.name)
    if name == "dot_general":
        if not any(constant.is_zero() for constant in elsewhere):
            return None
        zeros = [np.zeros((), operand.dtype) for operand in rows]
        return _only(bind(equation, list(map(table.mask, rows, zeros))))
    if elsewhere[0].value is None:
        return None
    [operand], constant = rows, elsewhere[0].value
    neutral = _neutral(name, operand.dtype)
    result = _only(bind(equation, [table.mask(operand, neutral)]))
    if constant == neutral:
        return result
    if name in _SUMS:
        return None
    all_touched = jnp.sum(table.valid) == table.num_rows
    with_others = _EXTREMES[name](result, jnp.full_like(result, constant))
    return jnp.where(all_touched, result, with_others)


def _only(results: list[jax.Array]) -> jax.Array:
    [result] = results
    return result


def _neutral(name: str, dtype: Any) -> Any:
    """The number that a reduction takes no notice of."""
    if name in _SUMS or name == "reduce_or":
        return np.asarray(_SUMS.get(name, 0), dtype)
    if name == "reduce_and":
        return ~np.zeros((), dtype)
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.asarray(-np.inf if name == "reduce_max" else np.inf, dtype)
    limits = np.iinfo(dtype)
    return np.asarray(limits.min if name == "reduce_max" else limits.max, dtype)
