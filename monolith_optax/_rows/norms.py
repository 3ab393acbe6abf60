"""The norm of gradients of which some are RowSlices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from monolith_optax._rows.duplicates import (
    at_least_float32,
    one_position,
    sum_rows,
)
from monolith_optax._rows.slices import RowSlices, is_slices
from monolith_optax._shardings import replicated


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
    arrays = [_sums(leaf) if is_slices(leaf) else jnp.asarray(leaf) for leaf in leaves]
    with jax.numpy_dtype_promotion("standard"):
        norm: jax.Array = jnp.sqrt(sum(map(_sum_of_squares, arrays), jnp.float32(0)))
    return norm


def _sums(slices: RowSlices) -> jax.Array:
    """The rows of slices, with those of one id added up."""
    ids = replicated(slices.ids).reshape(-1)
    wide = slices.rows.astype(at_least_float32(slices.rows.dtype))
    return sum_rows(one_position(ids, np.uint32(2**31)), wide, slices.row_shape)


def _sum_of_squares(array: jax.Array) -> jax.Array:
    wide = array.astype(at_least_float32(array.dtype))
    return jnp.sum(jnp.real(wide * jnp.conj(wide)))
