"""RowSlices: a few rows of a table, named by their ids."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from monolith_optax._public import public
from monolith_optax._rows.shardings import explicit_sharding, replicated


@public("monolith_optax")
@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class RowSlices:
    """The sum of some rows into a table of zeros.

    It is what the gradient of a lookup is, without the table. Rows with the same id
    add up. Ids outside of the table, negative ones included, are padding: their rows
    may hold anything and count for nothing.

    `params + slices` adds the rows to a table, so that `optax.apply_updates` takes
    updates of this kind, and `slices * scalar` scales them.

    Attributes:
      ids: integers of any shape.
      rows: an array of shape `ids.shape + row_shape`.

    Raises:
      ValueError: the ids are not integers, or the shapes do not belong together.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import RowSlices
      >>> slices = RowSlices(jnp.array([2, 0, 2, -1]), jnp.ones((4, 2)))
      >>> print(slices.to_dense(3))
      [[1. 1.]
       [0. 0.]
       [2. 2.]]
    """

    ids: jax.Array
    rows: jax.Array

    # NumPy's operators would otherwise take the slices for an element.
    __array_ufunc__ = None

    def __post_init__(self) -> None:
        if not jnp.issubdtype(jnp.result_type(self.ids), jnp.integer):
            raise ValueError(
                f"The ids of RowSlices must be integers, but they are "
                f"{jnp.result_type(self.ids)}."
            )
        shape, ids_shape = jnp.shape(self.rows), jnp.shape(self.ids)
        if shape[: len(ids_shape)] != ids_shape:
            raise ValueError(
                f"The rows of RowSlices must have the shape of the ids, {ids_shape}, "
                f"before that of a row, but their shape is {shape}."
            )

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return jnp.shape(self.rows)[jnp.ndim(self.ids) :]

    def to_dense(self, num_rows: int) -> jax.Array:
        """The table of `num_rows` rows that the slices stand for."""
        return jnp.zeros((num_rows, *self.row_shape), self.rows.dtype) + self

    def __radd__(self, table: ArrayLike) -> jax.Array:
        table = jnp.asarray(table)
        if table.shape[1:] != self.row_shape or table.ndim == 0:
            raise ValueError(
                f"Rows of shape {self.row_shape} cannot be added to a table of shape "
                f"{table.shape}."
            )
        ids = replicated(beyond_not_below(self.ids, len(table)))
        return table.at[ids].add(
            replicated(self.rows).astype(table.dtype),
            mode="drop",
            out_sharding=explicit_sharding(table),
        )

    __add__ = __radd__

    def __mul__(self, scalar: ArrayLike) -> "RowSlices":
        if jnp.ndim(scalar) != 0:
            raise ValueError(
                f"RowSlices are scaled by a scalar, not by shape {jnp.shape(scalar)}."
            )
        return RowSlices(self.ids, self.rows * jnp.asarray(scalar, self.rows.dtype))

    __rmul__ = __mul__

    def __neg__(self) -> "RowSlices":
        return RowSlices(self.ids, -self.rows)

    def __truediv__(self, scalar: ArrayLike) -> "RowSlices":
        return self * (1 / jnp.asarray(scalar, self.rows.dtype))

    @staticmethod
    def concatenate(slices: "list[RowSlices]") -> "RowSlices":
        """The sum of slices of one table: several lookups, or several batches."""
        row_shapes = {part.row_shape for part in slices}
        if len(row_shapes) != 1:
            raise ValueError(
                f"Slices of one table have rows of one shape, not {row_shapes or None}."
            )
        [row_shape] = row_shapes
        return RowSlices(
            jnp.concatenate(
                [replicated(fitting(part.ids)).reshape(-1) for part in slices]
            ),
            jnp.concatenate(
                [
                    replicated(part.rows).reshape(np.size(part.ids), *row_shape)
                    for part in slices
                ]
            ),
        )

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        key = jax.tree_util.GetAttrKey
        return ((key("ids"), self.ids), (key("rows"), self.rows)), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any, Any]) -> "RowSlices":
        # JAX unflattens with placeholders too, which the checks would not understand.
        self = object.__new__(cls)
        object.__setattr__(self, "ids", children[0])
        object.__setattr__(self, "rows", children[1])
        return self


def beyond_not_below(ids: ArrayLike, num_rows: int) -> jax.Array:
    """Ids with those below zero, which would wrap around, moved beyond the table."""
    ids = wide_ids(ids)
    return jnp.where(ids < 0, num_rows, ids)


def wide_ids(ids: ArrayLike) -> jax.Array:
    """Ids in a dtype that also holds what is beyond a table."""
    ids = jnp.asarray(fitting(ids))
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"The ids of RowSlices have become {ids.dtype}: a transformation outside "
            "of lazy_rows has mapped over them. Put it inside: "
            "lazy_rows(optax.chain(...))."
        )
    return ids.astype(jnp.int64 if ids.dtype.itemsize == 8 else jnp.int32)


def fitting(ids: ArrayLike) -> ArrayLike:
    """Ids of which JAX, where it has no 64 bits, would cut none to one of the table."""
    cut = jax.dtypes.canonicalize_dtype(np.int64) == np.int32
    if not (isinstance(ids, np.ndarray) and ids.dtype.itemsize == 8 and cut):
        return ids
    return np.where((ids < 0) | (ids > np.iinfo(np.int32).max), -1, ids).astype(
        np.int32
    )
