"""The norm of gradients of which some are RowSlices."""

from typing import Any

import jax
import jax.numpy as jnp

from monolith_optax._rows.duplicates import (
    at_least_float32,
    one_position_each,
    sum_rows,
)
from monolith_optax._rows.shardings import replicated
from monolith_optax._rows.slices import is_slices


def global_norm(tree: Any) -> jax.Array:
    """The 2-norm of all gradients, as `optax.global_norm` of the dense ones gives it.

    Rows with the same id are summed before they are squared, and rows of negative ids
    are left out. Slices do not know how many rows their table has: ids beyond it count
    here, so use -1 for padding, as `value_and_row_grad` and `lazy_rows` do.

    Args:
      tree: floating-point arrays and `RowSlices`, those of different tables in
        different leaves.

    Returns:
      A scalar, float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import RowSlices, global_norm
      >>> slices = RowSlices(jnp.array([7, 7, -1]), jnp.array([[1.0], [2.0], [9.0]]))
      >>> print(global_norm({"table": slices, "dense": jnp.array([4.0])}))
      5.0
    """
    leaves = jax.tree.leaves(tree, is_leaf=is_slices)
    slices = [leaf for leaf in leaves if is_slices(leaf)]
    arrays = [jnp.asarray(leaf) for leaf in leaves if not is_slices(leaf)]
    ids = [replicated(part.ids).reshape(-1) for part in slices]
    positions = one_position_each(ids, [part >= 0 for part in ids])
    for its_positions, part in zip(positions, slices, strict=True):
        wide = part.rows.astype(at_least_float32(part.rows.dtype))
        arrays.append(sum_rows(its_positions, wide, part.row_shape))
    with jax.numpy_dtype_promotion("standard"):
        norm: jax.Array = jnp.sqrt(sum(map(_sum_of_squares, arrays), jnp.float32(0)))
    return norm


def _sum_of_squares(array: jax.Array) -> jax.Array:
    wide = array.astype(at_least_float32(array.dtype))
    return jnp.sum(jnp.real(wide * jnp.conj(wide)))
