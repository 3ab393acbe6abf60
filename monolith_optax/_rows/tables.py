"""Where a step looks in one table: the distinct rows that the batch's ids name."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from monolith_optax._rows.duplicates import is_beyond
from monolith_optax._shardings import explicit_sharding, rows_sharding


class Table:
    """The rows of a table that a step touches.

    Attributes:
      name: the path of the table in the parameters.
      num_rows: how many rows the table has.
      ids: for each position in the batch a row id, no two of them the same. Positions
        of padding and of further occurrences of an id have ids beyond the table, for
        which `is_beyond` holds.
    """

    def __init__(self, name: str, num_rows: int, ids: jax.Array) -> None:
        self.name, self.num_rows, self.ids = name, num_rows, ids

    @property
    def batch_size(self) -> int:
        """How many positions there are."""
        return len(self.ids)

    @property
    def valid(self) -> jax.Array:
        """Which positions have a row of the table."""
        return ~is_beyond(self.ids)

    def gather(self, array: jax.Array) -> jax.Array:
        """The rows of an array that is as long as the table; beyond it, any of them.

        As StableHLO defines it, a gather clamps ids and a scatter, which is what the
        derivative of a gather is, drops those beyond. JAX's modes that do more keep
        XLA from fusing gathers, and a step takes half as long again.
        """
        if self.num_rows == 0:
            return jnp.zeros((self.batch_size, *jnp.shape(array)[1:]), array.dtype)
        return (
            jnp.asarray(array)
            .at[self.ids]
            .get(
                mode="promise_in_bounds",
                wrap_negative_indices=False,
                out_sharding=rows_sharding(array, self.ids),
            )
        )

    def scatter(self, array: jax.Array, rows: jax.Array) -> jax.Array:
        """The array with new rows, of which those beyond it are dropped."""
        return (
            jnp.asarray(array, rows.dtype)
            .at[self.ids]
            .set(
                rows,
                mode="drop",
                unique_indices=True,
                wrap_negative_indices=False,
                out_sharding=explicit_sharding(array),
            )
        )

    def mask(self, rows: jax.Array, fill: ArrayLike) -> jax.Array:
        """The rows with another value at the positions that have no row."""
        valid = jnp.expand_dims(self.valid, tuple(range(1, rows.ndim)))
        return jnp.where(valid, rows, fill)
