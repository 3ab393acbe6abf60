"""What ids and rows must be, to be parts of slices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def int32_ids(ids: ArrayLike) -> jax.Array:
    """Integers as int32; those that do not fit become padding, not other rows."""
    if not isinstance(ids, jax.Array):
        ids = np.asarray(ids)  # JAX would cut 64-bit ids to 32 bits
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"The ids of RowSlices must be integers, but they are {ids.dtype}."
        )
    if ids.dtype == np.int32:
        return jnp.asarray(ids)
    where = np.where if isinstance(ids, np.ndarray) else jnp.where
    narrow = ids.astype(np.int32)
    fits = (narrow.astype(ids.dtype) == ids) & ((narrow < 0) == (ids < 0))
    return jnp.asarray(where(fits, narrow, np.int32(-1)))


def checked_rows(rows: ArrayLike, ids_shape: tuple[int, ...]) -> jax.Array:
    """Rows for ids of a shape.

    Raises:
      ValueError: they are not floating-point numbers, or there is not one for each id.
    """
    rows = jnp.asarray(rows)
    if not jnp.issubdtype(rows.dtype, jnp.inexact):
        raise ValueError(
            f"The rows of RowSlices must have a floating-point dtype, not {rows.dtype}."
        )
    if rows.shape[: len(ids_shape)] != ids_shape:
        raise ValueError(
            f"The rows of RowSlices must have the shape of the ids, {ids_shape}, "
            f"before that of a row, but their shape is {rows.shape}."
        )
    return rows
